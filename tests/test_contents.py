"""One flipped byte in each kind of file that a study keeps: named by the stage that reads it, or by
`asap doctor`"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TOP
from smoke import STUDY, change, clone as clone, digest, run

from asap import doctor
from asap.contents import (
    CONTENTS,
    DamageError,
    cached_files,
    check_inputs,
    find_changed_weights,
    read_records,
    stage_inputs,
)
from asap.processes import LOCKS
from asap.store import local_file, read_manifest, record_name

pytestmark = pytest.mark.study

# who runs; the records and the store, which hold their own hashes
NO_CONTENT = (LOCKS, CONTENTS, "build/store")


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def records(root: Path) -> list:
    return [read_records(p) for p in sorted((root / CONTENTS).glob("*.json"))]


def flip(path: Path) -> None:
    "Change a byte in the middle; the time stays, and no other name of the file sees it"
    s, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))


def kinds(root: Path) -> dict[tuple, Path]:
    "One file of each stage, folder and ending: a new kind of file is among them"
    found = {}
    for r in records(root):
        for p in r.files:
            stage, path = r.stage.partition("@")[0], root / p
            place = tuple(Path(p).parts[:2])
            if path.stat().st_size:
                found[stage, place, "".join(path.suffixes[-2:])] = path
    return found


def objects(root: Path) -> Iterator[Path]:
    "A file, a listing and a record of a run in DVC's cache"
    cached = cached_files(root)
    for keep in (
        lambda p: p.suffix == ".dir",
        lambda p: "runs" in p.parts[-4:-1],
        lambda p: p.suffix != ".dir" and "runs" not in p.parts[-4:-1] and p.stat().st_size,
    ):
        yield next(filter(keep, cached))


def test_all_that_a_study_keeps_has_a_record(clone):
    covered = {p for r in records(clone) for p in r.files}
    kept = [p.relative_to(clone).as_posix() for t in ("build", "runs") for p in files(clone / t)]
    assert len(kept) > 1000
    assert not [p for p in kept if p not in covered and not p.startswith(NO_CONTENT)]
    assert all(r.finished for r in records(clone))


def test_a_flipped_byte_is_named(clone):
    chosen = kinds(clone)
    assert len(chosen) > 60 and {k[0] for k in chosen} >= {"prepare", "embed", "tables", "page"}
    broken = [*chosen.values(), *objects(clone), clone / "weights/text/tokenizer.json"]
    before = {p: p.read_bytes() for p in broken}
    times = {p: p.stat().st_mtime_ns for p in broken}
    for p in broken:
        flip(p)
    named = "\n".join(f.text for f in doctor.examine(clone) if f.state == "problem")
    missed = [p for p in broken if p.relative_to(clone).as_posix() not in named]
    assert not missed, missed
    for r in records(clone):  # a stage names a damaged file that it reads
        inputs = stage_inputs(r.stage, clone)
        if any(p.is_relative_to(clone / i) for p in broken for i in inputs):
            with pytest.raises(DamageError, match="is not as"):
                check_inputs(r.stage, clone)
    for p, data in before.items():
        p.write_bytes(data)
        os.utime(p, ns=(times[p], times[p]))
    assert not [f for f in doctor.examine(clone) if f.state == "problem" and f.check != "versions"]


def test_changed_records_are_named(clone):
    path = clone / CONTENTS / "embed-asap.json"
    before = path.read_bytes()
    flip(path)
    assert "embed-asap.json has changed" in "\n".join(f.text for f in doctor.examine(clone))
    path.write_bytes(before)


def test_a_damaged_volume_is_made_anew_by_name(clone):
    "Overwritten in its middle: a stage that reads it stops, and the one that made it mends it"
    name = read_manifest(clone / "build/volumes/stoic").name[0]
    volume = local_file(clone / "build/volumes/stoic" / name)
    before = digest(volume)
    data = bytearray(volume.read_bytes())
    data[len(data) // 3 : 2 * len(data) // 3] = bytes(2 * len(data) // 3 - len(data) // 3)
    volume.write_bytes(data)
    read = "import sys; from asap.store import local_file; local_file(sys.argv[1])"
    path = clone / "build/volumes/stoic" / name
    text = run(sys.executable, "-c", read, str(path), cwd=clone, check=False)
    assert f"build/volumes/stoic/{name} is damaged in the store" in text, text[-3000:]
    text = run("dvc", "repro", "-f", "-s", "prepare@stoic", cwd=clone)
    assert f"a file of {Path(name).stem} has changed since it was written" in text, text[-3000:]
    assert digest(volume) == before


def test_a_flipped_byte_in_the_store_is_named(clone):
    "A volume, an organ map and a record; what is removed is made anew, with the same bytes"
    folders = [clone / "build" / kind / "ct_rate" for kind in ("volumes", "organs")]
    rows = [(folder, read_manifest(folder).iloc[i]) for i, folder in enumerate(folders)]
    broken = [local_file(folder / row["name"]) for folder, row in rows]
    key = read_manifest(folders[0]).key[2]
    broken.append(clone / "build/store" / record_name(key))
    before = [digest(p) for p in broken]
    for p in broken:
        flip(p)
    named = "\n".join(f.text for f in doctor.check_store(clone))
    for folder, row in rows:
        assert f"{folder.relative_to(clone)}/{row['name']} is not as it was written" in named
    command = [sys.executable, "-m", "asap.cli", "store", "verify"]
    text = run(*command, cwd=clone, check=False)
    assert "3 damaged" in text and f"ct_rate/{rows[0][1]['name']}" in text
    assert all(p.relative_to(clone / "build/store").as_posix() in text for p in broken)
    run(*command, "--remove", cwd=clone)
    assert not any(p.exists() for p in broken)
    run(*STUDY, cwd=clone)
    assert [digest(p) for p in broken[:2]] == before[:2] and broken[2].exists()
    assert "0 damaged" in run(*command, cwd=clone)


def test_what_dvc_takes_from_its_cache_is_no_damage(clone):
    "Params there and back: the records are of the run between"
    old = (clone / "params.yaml").read_text()
    change(clone, tables__n_bootstrap=60)
    run("dvc", "repro", "-s", "tables", cwd=clone)
    (clone / "params.yaml").write_text(old)
    assert "Running stage" not in run("dvc", "repro", "-s", "tables", cwd=clone)
    check_inputs("figures", clone)
    assert not [f for f in doctor.check_records(clone) if f.state == "problem"]


def test_the_hashes_of_the_weights_are_fresh():
    listed = (TOP / "weights/SHA256SUMS").read_text().splitlines()
    kept = [p for p in files(TOP / "weights") if p.name != "SHA256SUMS" and p.name[0] != "."]
    assert not find_changed_weights(TOP / "weights"), "run `make sums`"
    assert {line.partition("  ")[2] for line in listed} == {
        p.relative_to(TOP / "weights").as_posix() for p in kept
    }, "run `make sums`"
