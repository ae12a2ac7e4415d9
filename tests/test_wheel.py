"The wheel alone, unpacked, embeds a scan in a folder that holds nothing else"

import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from importlib import metadata

import numpy as np
import pytest
import torch
from conftest import TOP
from files import write as write_as
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from asap.data.volumes import write
from asap.phantom.abnormalities import synthesize_chest

PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
SHIPPED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "params.yaml")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    "The wheel's content, built from a copy, so that the tree stays as it is"
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("asap", "weights/asap", "weights/organs", "weights/text"):
        shutil.copytree(TOP / name, source / name, ignore=skip)
    for name in SHIPPED:
        shutil.copyfile(TOP / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (wheel,) = tmp.glob("*.whl")
    assert wheel.stat().st_size < 17e6
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp / "unpacked")
    return tmp / "unpacked"


def light_install() -> set[str]:
    "Distributions that pip brings with the wheel, without extras"
    found, todo = set(), list(PROJECT["dependencies"])
    while todo:
        wanted = Requirement(todo.pop())
        name = canonicalize_name(wanted.name)
        if name not in found and (not wanted.marker or wanted.marker.evaluate({"extra": ""})):
            found.add(name)
            todo += metadata.requires(name) or []
    return found


def other_modules() -> list[str]:
    "Modules that are installed here, and not by the wheel"
    light = light_install() | {"asap"}
    installed = metadata.packages_distributions()
    of = {m: {canonicalize_name(n) for n in names} for m, names in installed.items()}
    return [m for m in of if not light & of[m] and m not in sys.stdlib_module_names]


def test_the_light_install_stays_light():
    "On Python 3.11 (newer ones need less), with the build of torch for CPUs; without bytecode"
    if torch.version.cuda:
        pytest.skip(f"the build of torch for CUDA {torch.version.cuda} is larger by itself")
    light = light_install()
    size = sum(f.size or 0 for name in light for f in metadata.files(name) or [])
    assert len(light) <= 58
    assert size < 1.2e9


def run(unpacked, folder, *args):
    "Python in a folder, with the unpacked wheel on the path and no library that it does not bring"
    light = unpacked.parent / "light"
    light.mkdir(exist_ok=True)
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({other_modules()}))"]
    (light / "sitecustomize.py").write_text("\n".join(lines))
    env = {k: v for k, v in os.environ.items() if k != "ASAP_ROOT"}
    return subprocess.run(
        [sys.executable, "-P", *args],
        cwd=folder,
        env=env | {"PYTHONPATH": f"{unpacked}{os.pathsep}{light}"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def scan(tmp_path):
    chest = synthesize_chest(("wheel", 0), (48, 48, 24), (7.0, 7.0, 14.0), only="Consolidation")
    write(chest.hu, chest.affine, tmp_path / "scan.nii.gz")
    return tmp_path


def test_package_data(unpacked):
    for name in ("model.safetensors", "config.json", "card.md"):
        assert (unpacked / "asap/shipped/weights/asap" / name).is_file()
    for name in ("model.safetensors", "tokenizer.json"):
        assert (unpacked / "asap/shipped/weights/text" / name).is_file()
    sources = {p.relative_to(TOP) for p in (TOP / "asap").rglob("*") if p.is_file()}
    sources = {p for p in sources if "__pycache__" not in p.parts and p.parts[1] != "shipped"}
    assert not {p for p in sources if not (unpacked / p).is_file()}


def test_embed(unpacked, scan):
    done = run(unpacked, scan, "-m", "asap", "embed", "scan.nii.gz", "-o", "scan.npz")
    assert done.returncode == 0, done.stderr
    with np.load(scan / "scan.npz") as z:
        assert z["features"].shape[0] == 1 and np.isfinite(z["features"]).all()
    assert {p.name for p in scan.iterdir()} == {"scan.nii.gz", "scan.npz"}


SAID = ("--sentence", "There is pleural effusion.")
READ = [  # command, its options, format
    ("check", (), "nrrd"),
    ("check", (), "dicom"),
    ("standardize", ("-o", "out"), "nrrd"),
    ("standardize", ("-o", "out"), "dicom"),
    ("organs", ("-o", "out"), "nrrd"),
    ("embed", ("-o", "scan.npz"), "dicom"),
    ("zero-shot", ("-o", "scan.csv"), "nrrd"),
    ("ground", ("-o", "out", *SAID), "dicom"),
    ("view", ("-o", "page.html"), "nrrd"),
]


@pytest.mark.parametrize("command, options, form", READ)
def test_formats(unpacked, tmp_path, command, options, form):
    chest = synthesize_chest(("wheel", 0), (48, 48, 24), (7.0, 7.0, 14.0), only="Consolidation")
    path = write_as(chest.hu, chest.affine, tmp_path / "in", form)
    done = run(unpacked, tmp_path, "-m", "asap", command, path, *options)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"in", *options[1:2]}


def test_metaimage_needs_an_extra(unpacked, tmp_path):
    chest = synthesize_chest(("wheel", 0), (48, 48, 24), (7.0, 7.0, 14.0), only="Consolidation")
    path = write_as(chest.hu, chest.affine, tmp_path, "mha")
    done = run(unpacked, tmp_path, "-m", "asap", "check", path)
    assert done.returncode == 1 and "pip install '.[formats]'" in done.stdout + done.stderr


def test_parquet_needs_an_extra(unpacked, scan):
    done = run(unpacked, scan, "-m", "asap", "embed", "scan.nii.gz", "-o", "scan.parquet")
    assert done.returncode == 1 and "pip install '.[parquet]'" in done.stderr
    assert {p.name for p in scan.iterdir()} == {"scan.nii.gz"}


def test_zero_shot(unpacked, scan):
    options = ["-o", "scan.csv", "--device", "cpu"]
    done = run(unpacked, scan, "-m", "asap", "zero-shot", "scan.nii.gz", *options)
    assert done.returncode == 0, done.stderr
    assert len((scan / "scan.csv").read_text().splitlines()) == 19


def test_organs(unpacked, scan):
    "Without TotalSegmentator, by the shipped segmenter"
    done = run(unpacked, scan, "-m", "asap", "organs", "scan.nii.gz", "-o", "maps")
    assert done.returncode == 0, done.stderr
    assert (scan / "maps/scan_organs.nii.gz").is_file()


def test_python(unpacked, scan):
    "The functions work in a folder that holds nothing else, and are those of the wheel"
    code = textwrap.dedent(
        """
        import asap
        from pathlib import Path
        assert "unpacked" in asap.__file__
        e = asap.embed("scan.nii.gz")
        assert e.features.shape == (e.tokens.shape[1],)
        z = asap.zero_shot("scan.nii.gz")
        assert len(z.table) == 18 and z.table.probability.between(0, 1).all()
        g = asap.ground("scan.nii.gz", ["There is pleural effusion.", "There is a mass."])
        assert g.region(0).any() and g.unknown_words == ["mass"]
        assert 'id="typed"' in asap.view("scan.nii.gz").html
        m = asap.Model.from_pretrained(device="cpu")
        assert (m.embed("scan.nii.gz").features == e.features).all() and "phantoms" in m.card
        assert [p.name for p in Path().iterdir()] == ["scan.nii.gz"]
        """
    )
    done = run(unpacked, scan, "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_command_of_the_study_names_what_is_missing(unpacked, scan):
    for name in ("params.yaml", "dvc.yaml"):  # a project
        shutil.copyfile(TOP / name, scan / name)
    shutil.copytree(TOP / "nbs/stages", scan / "nbs/stages")
    done = run(unpacked, scan, "-m", "asap", "stage", "text")
    said = (
        "asap: stage needs papermill, which is not installed: in a clone, pip install '.[study]'\n"
    )
    assert (done.returncode, done.stderr) == (1, said)
