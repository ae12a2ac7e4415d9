"""Broken files, folders without permission, a full disk, a kill, two at once: nothing half-
written is taken for whole, nothing is lost"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from conftest import TOP
from files import FORMS, write as write_as
from tiny_cases import toy_table

from asap.cli import main
from asap.core import atomic_write, list_files, write_json
from asap.data.checks import load_checked
from asap.data.prepare import prepare_cases
from asap.data.volumes import Source, write
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("faults", 0), (48, 48, 24), (7.0, 7.0, 14.0))
WINDOW = Source(("window", -1000, 1000), C.spacing, "RAS")
HOW = dict(spacing=[7, 7, 14], hu=[-1000, 1000])


def longest(path):  # the file that holds the voxels
    return max(
        (
            f
            for f in (
                [path]
                if path.is_file() and path.suffix != ".mhd"
                else path.rglob("*")
                if path.is_dir()
                else path.parent.iterdir()
            )
            if f.is_file()
        ),
        key=lambda f: f.stat().st_size,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0, 0.5, 0.97])
def test_a_truncated_file_is_named(form, keep, tmp_path):
    path = write_as(C.hu, C.affine, tmp_path, form)
    source = WINDOW if form == "pictures" else Source()
    load_checked(path, source)
    f = longest(path)
    f.write_bytes(f.read_bytes()[: int(keep * f.stat().st_size)])
    with pytest.raises(ValueError) as e:
        load_checked(path, source)
    assert f.stem in str(e.value) or path.name in str(e.value), str(e.value)


@pytest.mark.parametrize(
    "name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.mhd", "a.npz", "a.dcm", "p/1.png"]
)
def test_text_under_another_name(name, tmp_path):
    f = tmp_path / name
    f.parent.mkdir(exist_ok=True)
    f.write_text("The heart is normal.\n" * 200)
    path = f.parent if name.endswith(".png") else f
    with pytest.raises(ValueError, match=r"cannot be read|truncated|no DICOM image"):
        load_checked(path, WINDOW if name.endswith(".png") else Source())


@contextlib.contextmanager
def nobody():
    "As a user who owns nothing, where the tests run as root"
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_without_permission(tmp_path):
    "A file and a folder that may not be read are errors that name them; the batch goes on"
    for p in [tmp_path, *tmp_path.parents]:
        if os.stat(p).st_uid == os.getuid() and p != Path("/"):
            p.chmod(p.stat().st_mode | 0o055)
    good, shut = write_as(C.hu, C.affine, tmp_path, "nii.gz"), tmp_path / "shut"
    locked = write_as(C.hu, C.affine, tmp_path / "locked", "nrrd")
    write_as(C.hu, C.affine, shut, "dicom")
    good.chmod(0o644)
    locked.chmod(0)
    (shut / "series").chmod(0)
    with nobody():
        load_checked(good)
        for p in (locked, shut / "series"):
            with pytest.raises((PermissionError, ValueError)) as e:
                load_checked(p)
            assert p.name in str(e.value)
        for look in (
            lambda: load_checked(shut / "series"),
            *(partial(list_files, tmp_path, p) for p in ("*/*/*.dcm", "**/*")),
        ):
            with pytest.raises(PermissionError, match="series"):
                look()
    (shut / "series").chmod(0o755)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of one megabyte"
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_and_loses_nothing(small_disk, tmp_path):
    "The old file stays whole, no half is left, no case is put aside for it"
    write_json(dict(kept=1), small_disk / "metrics.json")
    with pytest.raises(OSError, match="No space left"):
        with atomic_write(small_disk / "metrics.json") as tmp:
            tmp.write_bytes(b"0" * 3_000_000)
    assert (
        sorted(f.name for f in small_disk.iterdir()) == ["metrics.json"]
        and "kept" in (small_disk / "metrics.json").read_text()
    )
    t = toy_table(tmp_path, 30, kinds=1)
    with pytest.raises(OSError, match="No space left"):
        prepare_cases(
            t, small_disk / "volumes", small_disk / "organs", HOW, quarantine=small_disk / "q.csv"
        )
    left = [f for f in small_disk.rglob("*") if f.is_file() and f.suffix == ".nii"]
    assert (
        left
        and all(np.asanyarray(nib.load(f).dataobj).shape for f in left)
        and not (small_disk / "q.csv").exists()
    )
    assert not [f for f in small_disk.rglob(".*") if f.is_file()]


WRITER = """
import sys
import numpy as np
from asap.data.volumes import write
n = int(sys.argv[2])
while True:
    for i in range(4):
        hu = np.full((60, 60, 60), n, np.int16)
        write(hu, np.diag([2., 2, 2, 1]), f"{sys.argv[1]}/{i}.nii.gz")
"""


def start(folder, n):
    return psutil.Popen([sys.executable, "-c", WRITER, str(folder), str(n)], cwd=TOP)


def wait_for(there):
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end


def whole(folder) -> set:  # the numbers that the volumes hold; fails on half a volume
    found = set()
    for f in folder.glob("[0-9].nii.gz"):
        v = np.asanyarray(nib.load(f).dataobj)
        assert v.shape == (60, 60, 60) and v.min() == v.max(), f
        found.add(int(v.min()))
    return found


def test_a_kill_while_writing_leaves_whole_files(tmp_path):
    for n in range(1, 6):
        p = start(tmp_path, n)
        wait_for(lambda n=n: list(tmp_path.glob("[0-9].nii.gz")) and n in whole(tmp_path))
        p.send_signal(signal.SIGKILL)
        p.wait()
        whole(tmp_path)


def test_two_processes_on_the_same_files(tmp_path):
    a, b = start(tmp_path, 1), start(tmp_path, 2)
    seen = set()

    def both():
        seen.update(whole(tmp_path))
        return seen == {1, 2}

    wait_for(both)
    for p in (a, b):
        p.kill()
        p.wait()
    assert whole(tmp_path) <= {1, 2}


def test_two_preparations_of_one_cohort(tmp_path):
    "Both end well, with the same volumes"
    t = toy_table(tmp_path, 6, kinds=1)
    t.to_parquet(tmp_path / "t.parquet")
    code = textwrap.dedent(f"""
        import pandas as pd
        from pathlib import Path
        from asap.data.prepare import prepare_cases
        here = Path({str(tmp_path)!r})
        t = pd.read_parquet(here/"t.parquet")
        folders = here/"volumes", here/"organs"
        done = prepare_cases(t, *folders, {HOW!r}, quarantine=here/"q.csv")
        assert len(done) == 6""")
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=TOP, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for p in both:
        assert p.wait(120) == 0, p.stderr.read()
    assert len(list((tmp_path / "volumes").glob("*.nii"))) == 6 and not list(
        (tmp_path / "volumes").glob(".*")
    )


def test_a_changed_number_and_a_kill_do_not_mix(tmp_path):
    "A volume whose record was taken away is made anew, though its file is there"
    t = toy_table(tmp_path, 2, kinds=1)
    prepare_cases(t, tmp_path / "v", tmp_path / "o", HOW)
    first = (tmp_path / "v/c000.nii").read_bytes()
    (tmp_path / "v/c000.nii").write_bytes(b"of another run")
    (tmp_path / "v/c000.json").unlink()
    prepare_cases(t, tmp_path / "v", tmp_path / "o", HOW)
    assert (tmp_path / "v/c000.nii").read_bytes() == first


def test_embed_and_standardise_quarantine(tmp_path, capsys):
    """A folder with a broken scan: the others are done, the broken one is named, and the exit
    code is 1"""
    write(C.hu, C.affine, tmp_path / "in/good.nii.gz")
    (tmp_path / "in/broken.nii.gz").write_text("no volume")
    assert (
        main(
            [
                "standardize",
                str(tmp_path / "in"),
                "-o",
                str(tmp_path / "out"),
                "--to",
                "7",
                "7",
                "14",
            ]
        )
        == 1
    )
    assert (tmp_path / "out/good.nii").exists() and "broken" in (
        tmp_path / "out/quarantine.csv"
    ).read_text()
    before = (tmp_path / "out/good.nii").stat().st_mtime_ns
    assert (
        main(
            [
                "standardize",
                str(tmp_path / "in/good.nii.gz"),
                "-o",
                str(tmp_path / "out"),
                "--to",
                "7",
                "7",
                "14",
            ]
        )
        == 0
    )
    assert (tmp_path / "out/good.nii").stat().st_mtime_ns == before, (
        "what is there and fits is kept"
    )
    (tmp_path / "out/mine.nii").write_text("a user's own file")
    main(["standardize", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--to", "9", "9", "9"])
    assert (tmp_path / "out/mine.nii").exists() and nib.load(
        tmp_path / "out/good.nii"
    ).header.get_zooms() == (9, 9, 9)
