"""The same bytes whatever the threads, processes, umask, time zone, locale, home, folder and seed
of hashes"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP
from stand_in import NAME

SCRIPT = TOP / "tests/same_bytes.py"
PLAIN = dict(TZ="UTC", LANG="C.UTF-8", PYTHONHASHSEED="0", HOME="/", OMP_NUM_THREADS="1")
ODD = dict(TZ="Asia/Kathmandu", LANG="C", PYTHONHASHSEED="random", OMP_NUM_THREADS="4")
KEPT = ("PATH", "PYTHONPATH", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "LD_LIBRARY_PATH")
COMPARED = {".nii", ".gz", ".dcm", ".csv", ".md", ".tex", ".svg", ".png", ".parquet"}


def write(folder: Path, settings: dict, jobs: int, umask: int, command: list) -> dict[str, str]:
    "Run the script; path -> hash of what it wrote, but for records with times of files"
    env = {k: os.environ[k] for k in KEPT if k in os.environ} | settings
    env |= dict(OPENBLAS_NUM_THREADS=env["OMP_NUM_THREADS"], MPLBACKEND="Agg")
    folder.mkdir(parents=True)
    words = [sys.executable, *command, str(folder), str(jobs)]
    done = subprocess.run(words, cwd=folder, env=env, umask=umask, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    files = [f for f in sorted(folder.rglob("*")) if f.suffix in COMPARED or "text" in f.parts]
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if f.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory, forks):
    "What two quite different surroundings made"
    here = tmp_path_factory.mktemp("same")
    forked = {k: v for k, v in forks.items() if k == NAME}
    stand_in = [str(TOP / "tests/stand_in.py"), str(SCRIPT)]
    plain = write(here / "plain", PLAIN | forked, 1, 0o022, stand_in)
    odd = write(here / "Größe mit Leerzeichen", ODD, 2, 0o077, [str(SCRIPT)])
    return plain, odd


def test_the_same_bytes(written):
    plain, odd = written
    kinds = {Path(f).suffix for f in plain}
    assert {*COMPARED, ".json"} <= kinds and len(plain) > 60
    assert sorted(plain) == sorted(odd)
    assert not [f for f in plain if plain[f] != odd[f]]
