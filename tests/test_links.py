"""Links and paths that lead out of a data set are followed only to folders that its user names;
members of an archive that lead out are not extracted"""

import io
import json
import shutil
import tarfile

import pandas as pd
import pytest
import yaml
from conftest import TOP

from asap.cli import main
from asap.data import review
from asap.data.adapter import get_cohort
from asap.data.prepare import read_raw_cohort
from asap.data.real import SCANS, extract_scans

SMALL = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))
SAID = "leads out of the cohort's folder, and `linked_folders` names no folder with its target"


def link_out(path, disk):
    "Move a file to a disk, and leave a link to it"
    disk.mkdir(exist_ok=True)
    target = disk / path.name
    path.rename(target)
    path.symlink_to(target)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    "data/own, itself a link, with links out of it and within it, and the cases with the former"
    here = tmp_path_factory.mktemp("links")
    root, disk = here / "somewhere", here / "disk"
    get_cohort("own").write(root, 3, 5, 1, **SMALL)
    t = pd.read_csv(root / "cases.csv", dtype=str).drop_duplicates("patient").set_index("patient")
    image, organs = (lambda n: root / t.image[f"p{n:04d}"]), (lambda n: root / t.organ_map[n])
    link_out(image(1), disk)
    link_out(image(2) / "0003.dcm", disk)
    link_out(organs("p0003"), disk)
    within = image(5)
    within.rename(root / "moved.nii.gz")
    within.symlink_to("../../moved.nii.gz")
    t.reset_index().to_csv(root / "cases.csv", index=False)
    (here / "data").mkdir()
    (here / "data/own").symlink_to(root)
    return here, disk, {f"p000{n}_1" for n in (1, 2, 3)}


def options(**more):
    return dict(split_files=None, csv="cases.csv", columns={}, linked_folders=[]) | more


def test_a_case_with_a_link_out_is_excluded_by_name(hospital):
    here, disk, linked = hospital
    table, bad = read_raw_cohort(get_cohort("own"), here / "data", options())
    assert {r["case"] for r in bad.rows} == linked
    assert all(
        SAID in r["reason"] and "`images/" in r["reason"] or "`organs/" in r["reason"]
        for r in bad.rows
    )
    assert "0003.dcm" in " ".join(r["reason"] for r in bad.rows)
    assert {"p0004_1", "p0005_1", "p0006_1"} <= set(table.case)


def test_a_folder_that_is_named_is_followed(hospital):
    here, disk, linked = hospital
    named = options(linked_folders=[str(disk)])
    table, bad = read_raw_cohort(get_cohort("own"), here / "data", named)
    assert not bad.rows and linked <= set(table.case)
    other = options(linked_folders=[str(here / "disk2")])  # no prefix of a name
    assert len(read_raw_cohort(get_cohort("own"), here / "data", other)[1].rows) == 3


def test_the_cache_of_dvc_is_followed(hospital, tmp_path):
    "Where `cache.type` is `symlink`, data/ holds links to it"
    here, disk, _ = hospital
    shutil.copytree(here / "data/own", tmp_path / "data/own", symlinks=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text(f"[cache]\n    dir = {disk}\n")
    assert not read_raw_cohort(get_cohort("own"), tmp_path / "data", options())[1].rows


def test_check_names_them(hospital, monkeypatch, tmp_path, capsys):
    here, disk, linked = hospital
    r = review.review_cohort(here / "data/own", jobs=1, pictures=0)
    assert set(r.refused.case) == linked and set(r.refused.kind) == {"path out of the folder"}
    p = yaml.safe_load((TOP / "params.yaml").read_text())
    p["cohorts"]["own"]["linked_folders"] = [str(disk)]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(p, sort_keys=False))
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path))
    assert main(["check", str(here / "data/own"), "--jobs", "1"]) == 0
    assert "refused  0 cases" in capsys.readouterr().out


def test_a_table_that_is_a_link_is_an_error(hospital, tmp_path, capsys):
    "And nothing of its target is shown"
    root = shutil.copytree(hospital[0] / "data/own", tmp_path / "data/own", symlinks=True)
    (tmp_path / "secret").write_text("user:secret,1\n")
    (root / "cases.csv").unlink()
    (root / "cases.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="cases.csv leads out of the cohort's folder"):
        read_raw_cohort(get_cohort("own"), tmp_path / "data", options())
    assert main(["check", str(root)]) == 1
    assert "secret" not in capsys.readouterr().err


def test_a_list_with_a_path_out(tmp_path):
    "Paths in a decathlon's list are those of strangers too"
    adapter, root = get_cohort("msd_lung"), tmp_path / "data/msd_lung"
    adapter.write(root, 3, 3, 1, **SMALL)
    f = next(root.rglob("dataset.json"))
    content = json.loads(f.read_text())
    moved = f.parent / content["training"][0]["image"]
    shutil.copy(moved, tmp_path / moved.name)
    above = "/".join([".."] * len(f.parent.relative_to(tmp_path).parts))
    content["training"][0]["image"] = f"{above}/{moved.name}"
    f.write_text(json.dumps(content))
    table, bad = read_raw_cohort(adapter, tmp_path / "data", dict(split_files=None))
    assert len(table) == 3 and len(bad.rows) == 1 and SAID in bad.rows[0]["reason"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_not_extracted(kind, tmp_path):
    scan = next(s for s in SCANS.values() if s.masks)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo(f"top/{scan.masks[0]}")
        link.type, link.linkname = kind, str(tmp_path / "secret")
        tar.addfile(link)
        inside = tarfile.TarInfo(f"top/{scan.masks[0]}/a.nii.gz")
        inside.size = 4
        tar.addfile(inside, io.BytesIO(b"good"))
    folder = tmp_path / "to"
    taken = extract_scans(tmp_path / "a.tar", scan.archive, folder)
    assert [f for f in folder.rglob("*") if f.is_symlink()] == []
    assert [f.read_bytes() for f in taken] == [b"good"]
