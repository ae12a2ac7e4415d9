"The wheel alone, unpacked, embeds a scan in a folder that holds nothing else"

import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import TOP

from asap.data.volumes import write
from asap.phantom.abnormalities import synthesize_chest

SHIPPED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "params.yaml")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    "The wheel's content, built from a copy, so that the tree stays as it is"
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("asap", "weights/asap", "weights/text"):
        shutil.copytree(TOP / name, source / name, ignore=skip)
    for name in SHIPPED:
        shutil.copyfile(TOP / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (wheel,) = tmp.glob("*.whl")
    assert wheel.stat().st_size < 15e6
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp / "unpacked")
    return tmp / "unpacked"


def run(unpacked, folder, *args):
    "`asap` in a folder, with the unpacked wheel alone on the path"
    env = {k: v for k, v in os.environ.items() if k != "ASAP_ROOT"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "asap.cli", *args],
        cwd=folder,
        env=env | {"PYTHONPATH": str(unpacked)},
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
    done = run(unpacked, scan, "embed", "scan.nii.gz", "-o", "scan.npz")
    assert done.returncode == 0, done.stderr
    with np.load(scan / "scan.npz") as z:
        assert z["features"].shape[0] == 1 and np.isfinite(z["features"]).all()
    assert {p.name for p in scan.iterdir()} == {"scan.nii.gz", "scan.npz"}


def test_zero_shot(unpacked, scan):
    done = run(unpacked, scan, "zero-shot", "scan.nii.gz", "-o", "scan.csv")
    assert done.returncode == 0, done.stderr
    assert len((scan / "scan.csv").read_text().splitlines()) == 19
