"The tree: exports, README, params, import rules, what is installed"

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PAGES, STAGES, TOP
from project_files import project_files

from asap.params import load_params


def tracked() -> list[Path]:
    "Files of the tree: what git tracks and what is new; without git, what .gitignore leaves"
    return [TOP / n for n in project_files()]


def test_exports_are_fresh_and_notebooks_clean(tmp_path):
    for name in ("nbs", "asap"):
        shutil.copytree(TOP / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TOP / "settings.ini", tmp_path)
    (tmp_path / "pyproject.toml").write_text((TOP / "pyproject.toml").read_text())
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run(
            [shutil.which(command) or Path(sys.executable).with_name(command)],
            cwd=tmp_path,
            check=True,
        )
    stale = [
        f.relative_to(TOP).as_posix()
        for name in ("nbs", "asap")
        for f in (TOP / name).rglob("*")
        if f.suffix in (".py", ".ipynb")
        and f.read_bytes() != (tmp_path / f.relative_to(TOP)).read_bytes()
    ]
    made = {f.relative_to(tmp_path) for f in (tmp_path / "asap").rglob("*.py")} - {
        f.relative_to(TOP) for f in (TOP / "asap").rglob("*.py")
    }
    assert not stale and not made, f"run `make export`: {stale} {sorted(map(str, made))}"


def test_readme_is_fresh():
    subprocess.run([sys.executable, "tests/readme.py", "--check"], cwd=TOP, check=True)


@pytest.mark.parametrize("name", ["params/full.yaml", "params/smoke.yaml", "params/paper.yaml"])
def test_overlays_hold_what_differs(name):
    "Each key of an overlay is one of params.yaml with another value"
    load_params(TOP / name)
    base, overlay = (yaml.safe_load((TOP / f).read_text()) for f in ("params.yaml", name))
    assert next(iter(overlay)) == "base" and overlay.pop("base") == "params.yaml"
    same = [f"{s}.{k}" for s, keys in overlay.items() for k in keys if keys[k] == base[s][k]]
    assert not same, f"{name} repeats params.yaml: remove {same}"


def test_imports_go_downwards():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_absolute_path_and_no_marker_of_a_merge():
    """Paths of one machine, and what an unfinished merge leaves in a file"""
    home = re.compile(r"(?<![\w.:/])/(?:home|root|work|Users|mnt)/\w|<{7} \w|>{7} \w")
    bad = [
        f"{f.relative_to(TOP)}: {m[0]}"
        for f in tracked()
        if f.suffix
        in (
            ".py",
            ".ipynb",
            ".md",
            ".yaml",
            ".toml",
            ".ini",
            ".sh",
            ".dvc",
            ".lock",
            ".csv",
            ".json",
        )
        and f != Path(__file__)
        for m in home.finditer(f.read_text(encoding="utf8"))
    ]
    assert not bad, bad


def test_installed_set():
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    gpu = torch.version.cuda  # what the build for CUDA brings
    assert not [
        n
        for n in names
        if n.startswith(("nvidia-", "cuda-", "triton")) and not gpu or n in ("torchvision", "timm")
    ]
    pins = dict(
        line.partition(";")[0].strip().lower().split("==")
        for line in (TOP / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for name in (
        "torch",
        "monai",
        "transformers",
        "jupyterlab",
        "papermill",
        "nbdev",
        "nibabel",
        "seaborn",
        "dvc",
        "totalsegmentator",
    ):
        assert importlib.metadata.version(name).split("+")[0] == pins[name].split("+")[0], name


@pytest.mark.parametrize("stage", STAGES, ids=lambda p: p.stem)
def test_stage_notebooks_are_thin(stage):
    nb = json.loads(stage.read_text())
    code = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"]) == 1, (
        "one cell is tagged `parameters`"
    )
    assert not any(c.get("outputs") for c in nb["cells"]), "stage notebooks store no outputs"
    assert not [
        n for c in code for n in ast.walk(ast.parse(c)) if isinstance(n, ast.FunctionDef)
    ], "functions belong on a page"


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda p: p.relative_to(TOP / "nbs").with_suffix("").as_posix()
)
def test_stored_outputs_teach(page):
    for c in json.loads(page.read_text())["cells"]:
        for o in c.get("outputs", []):
            assert o["output_type"] != "error"
            assert len(json.dumps(o)) < 150_000, (
                f"an output of {len(json.dumps(o))} bytes in {page.name}"
            )
            assert o.get("name") != "stderr", f"progress or warnings stored in {page.name}"
