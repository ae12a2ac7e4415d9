"Pins: one version of each package for each Python and platform, hashes in step, actions by commit"

import re
import subprocess
import tomllib
from itertools import product

import pins
import pytest
from conftest import TOP
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYTHONS = ("3.11.5", "3.12.0", "3.13.0")
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())


def environment(python: str, platform: str, machine: str) -> dict[str, str]:
    "What markers ask about"
    return dict(
        python_version=python.rpartition(".")[0],
        python_full_version=python,
        sys_platform=platform,
        os_name="nt" if platform == "win32" else "posix",
        platform_machine=machine,
        platform_python_implementation="CPython",
        implementation_name="cpython",
        extra="",
    )


def read_pins(text: str) -> list[Requirement]:
    "The requirements of a file, without hashes"
    lines = re.sub(r" \\\n +--hash=\S+", "", text).splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_pins_are_read_as_they_stand():
    (one,) = read_pins(
        "# no\nx==1 ; sys_platform == 'darwin' \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\n"
    )
    assert (one.name, str(one.specifier)) == ("x", "==1") and one.marker


@pytest.mark.parametrize("python, platform", list(product(PYTHONS, PLATFORMS)))
def test_each_package_has_one_version(python, platform):
    "For what pyproject.toml requires, and never two for one environment"
    here = environment(python, *platform)
    found = {}
    for pin in read_pins(pins.PINS.read_text()):
        if pin.marker is None or pin.marker.evaluate(here):
            assert pin.name not in found, pin.name
            (version,) = pin.specifier
            assert version.operator == "=="
            found[canonicalize_name(pin.name)] = version.version
    for wanted in map(Requirement, pins.wanted()):
        assert found[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_no_pin_names_a_build_of_one_platform():
    assert not [p for p in read_pins(pins.PINS.read_text()) if "+" in str(p.specifier)]


def test_hashes_are_in_step_with_the_pins():
    "The same versions and markers, but for the programs of the extras `audit` and `mutation`"
    plain, hashed = (
        {(p.name, str(p.specifier), str(p.marker)) for p in read_pins(path.read_text())}
        for path in (pins.PINS, pins.HASHED)
    )
    names = {n for n, *_ in hashed}
    assert (
        hashed <= plain
        and {canonicalize_name(Requirement(w).name) for w in pins.wanted("audit", "mutation")}
        <= names
    )
    assert {"pip-audit", "cyclonedx-bom", "uv", "cosmic-ray"} <= {n for n, *_ in plain} - names
    blocks = re.split(r"\n(?=\S)", pins.without_head(pins.HASHED).strip())
    assert len(blocks) == len(hashed)
    assert not [b for b in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", b)]


def test_torch_is_the_build_without_cuda():
    (block,) = re.findall(r"(?m)^torch==.*(?:\n +--hash=.*)+", pins.HASHED.read_text())
    assert set(re.findall(r"sha256:(\S+)", block)) == set(pins.TORCH_FILES.values())
    assert not [p.name for p in read_pins(pins.PINS.read_text()) if p.name.startswith("nvidia")]
    assert PROJECT["tool"]["uv"]["sources"]["torch"]["index"] == "pytorch-cpu"


def test_the_oldest_python_is_that_of_the_project():
    assert (
        Version(pins.OLDEST) in Requirement(f"x{PROJECT['project']['requires-python']}").specifier
    )
    assert PROJECT["project"]["requires-python"] == f">={pins.OLDEST}"


def test_actions_are_pinned_by_commit():
    for path in (TOP / ".github/workflows").glob("*.yml"):
        used = re.findall(r"uses: (\S+)(.*)", path.read_text())
        assert used
        for name, version in used:
            assert re.search(r"@[0-9a-f]{40}$", name), name
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", version), f"{name} without its version"


def test_the_workflow_checks_hashes():
    text = (TOP / ".github/workflows/test.yml").read_text()
    assert 'HASHES: "1"' in text and "requirements.txt" in (TOP / "tests/install.sh").read_text()


def test_the_install_says_how_far_it_is():
    script = (TOP / "tests/install.sh").read_text()
    (progress,) = re.findall(r"(?ms)^progress\(\) \{.*?^\}", script)
    lines = [f"Collecting p{i}\n  Using cached p{i}.whl" for i in range(110)]
    told = "\n".join(
        [*lines, "Installing build dependencies", "Installing collected packages: p1", ""]
    )
    done = subprocess.run(
        ["bash", "-c", f"total=300\n{progress}\nprogress"],
        input=told,
        capture_output=True,
        text=True,
    )
    *counts, last = done.stdout.split("\n")[:-1]
    assert counts == ["    50 of about 300", "    100 of about 300"] and "unpacking" in last
