"""The pinned versions, for each Python that pyproject.toml admits and each platform: `make pins`
writes constraints.txt, and requirements.txt, which adds the hashes of the files. Versions that
constraints.txt has are kept, but for those of packages that are named (`all`: every one)."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PINS = TOP / "constraints.txt"
HASHED = TOP / "requirements.txt"
OLDEST = "3.11.5"  # as requires-python in pyproject.toml
HEADS = {
    PINS: "# Every package of .venv, pinned for Linux, macOS and Windows, Python 3.11 to 3.13, by\n"
    "# `make pins`. torch==2.13.0 is any build; `make` takes the CPU build unless told another.\n",
    HASHED: "# constraints.txt with the sha256 of the files, by `make pins`: for `make HASHES=1`.\n"
    "# torch: the CPU builds alone.\n",
}

# What pyproject.toml cannot say: torch without PyPI's 5 GB of CUDA, and other versions where the
# pinned one has no file: fury 0.12 needs vtk < 9.4, which is not there for Python 3.13
PROJECT = """[project]
name = "pins"
version = "0"
requires-python = ">=3.11.5"
dependencies = {dependencies}
[tool.uv]
constraint-dependencies = ["fury < 0.12; python_version >= '3.13'",
                           "vtk >= 9.7; python_version >= '3.13'"]
[[tool.uv.dependency-metadata]]
name = "torch"
requires-dist = ["filelock", "typing-extensions>=4.10.0", "setuptools>=77.0.3", "sympy>=1.13.3",
                 "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"]
"""
# torch 2.13.0. Linux: the builds of https://download.pytorch.org/whl/cpu; macOS: those of PyPI
TORCH_FILES = {
    "cp311-linux-x86_64": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "cp312-linux-x86_64": "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    "cp313-linux-x86_64": "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
    "cp311-linux-aarch64": "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    "cp312-linux-aarch64": "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
    "cp313-linux-aarch64": "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    "cp311-macos-arm64": "e76f9bcecc52b8ff711239a2f7547d5353df95878ab232f0773c1d95928b92f8",
    "cp312-macos-arm64": "2fe228aba290d14b9f31b049be550dbd469c3fd3013d7a19705b30454da97027",
    "cp313-macos-arm64": "33449899ce5496c1b84b4853179d94fd102028ae1407314d9fb956bb79e70d09",
}


def wanted(
    *left_out: str,  # extras
) -> list[str]:
    "What pyproject.toml requires, with its extras"
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [n for e in extras if e not in left_out for n in extras[e]]


def resolve(
    names: list[str],  # requirements
    pins: str,  # lines of constraints
    *options: str,  # of `uv pip compile`
) -> str:
    "What the requirements resolve to, on all platforms"
    uv = shutil.which("uv") or sys.exit("make pins needs uv: pip install -c constraints.txt uv")
    with tempfile.TemporaryDirectory() as folder:
        project = PROJECT.format(dependencies=json.dumps(names))
        Path(folder, "pyproject.toml").write_text(project)
        Path(folder, "pins.txt").write_text(pins)
        call = [uv, "pip", "compile", "-q", "--universal", "--no-header", "--no-annotate"]
        call += [f"--python-version={OLDEST}", "--no-emit-package=pip", "--constraints=pins.txt"]
        call += ["--output-file=out.txt", *options]
        subprocess.run([*call, "pyproject.toml"], cwd=folder, check=True)
        return without_browsers(Path(folder, "out.txt").read_text())


def without_browsers(
    pins: str,
) -> str:
    "Without what is for Python in a browser alone"
    return re.sub(r"(?m)^.*sys_platform == 'emscripten'(?: \\\n +--hash=\S+)*\n", "", pins)


def with_cpu_torch(
    hashed: str,  # lines of requirements
) -> str:  # the same with the hashes of TORCH_FILES
    "The hashes of the files that hold no CUDA in place of all"
    hashes = " \\\n".join(f"    --hash=sha256:{h}" for h in TORCH_FILES.values())
    return re.sub(r"(?m)^(torch==\S+) \\\n(?: +--hash=.*\n)+", rf"\1 \\\n{hashes}\n", hashed)


def without_head(
    path: Path,  # constraints.txt or requirements.txt
) -> str:
    "Lines that are no comments"
    lines = path.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def kept(
    newer: list[str],  # names; ["all"] for everything
) -> str:
    "Lines of constraints.txt without those of some packages"
    lines = without_head(PINS).splitlines(keepends=True)
    pins = [line for line in lines if line.partition("==")[0] not in newer]
    return "" if newer == ["all"] else "".join(pins)


def main(*newer: str) -> None:
    "Write both files"
    pins = resolve(wanted(), kept(list(newer)))
    hashed = with_cpu_torch(resolve(wanted("audit", "mutation"), pins, "--generate-hashes"))
    for path, text in {PINS: pins, HASHED: hashed}.items():
        path.write_text(HEADS[path] + text)


if __name__ == "__main__":
    main(*sys.argv[1:])
