"""Cohorts of segmentation: counts, volumes and targets, what breaks is named, patients stay
apart, same seed same bytes"""

import functools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from asap.core import write_text
from asap.data import layouts
from asap.data.adapter import get_cohort
from asap.data.checks import check_mask, load_checked
from asap.data.cohorts.covid_ct_seg import read_lungs
from asap.data.prepare import prepare_cases
from asap.data.table import label_columns
from asap.data.volumes import read as read_volume

SMALL = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))
HOW = dict(spacing=(7.0, 7.0, 14.0), hu=(-1000, 1000))
WRITE = {
    "luna16": dict(n_train=7, n_test=3),
    "msd_lung": dict(n_train=6, n_test=2),
    "covid_19_20": dict(n_train=6, n_test=2),
    "segthor": dict(n_train=6, n_test=2),
    "segthor-released": dict(n_train=6, n_test=2, layout="released"),
    "rider": dict(n_train=0, n_test=4),
    "covid_ct_seg": dict(n_train=0, n_test=5),
}
GOLDEN = {  # cases, patients, positives of each label, splits
    "luna16": (10, 10, {"label:nodule": 4}, dict(train=7, test=3)),
    "msd_lung": (8, 8, {}, dict(train=6, test=2)),
    "covid_19_20": (8, 8, {}, dict(train=6, test=2)),
    "segthor": (8, 8, {}, dict(train=6, test=2)),
    "segthor-released": (8, 8, {}, dict(train=6, test=2)),
    "rider": (8, 4, {}, dict(test=8)),
    "covid_ct_seg": (5, 5, {}, dict(test=5)),
}
FILES = {  # kind of file -> pattern; the first that matches is the victim
    "luna16": dict(
        image="subset0/*.mhd",
        voxels="subset1/*.raw",
        target="seg-lungs-LUNA16/*.mhd",
        target_voxels="seg-lungs-LUNA16/*.zraw",
        table="annotations.csv",
    ),
    "msd_lung": dict(
        image="Task06_Lung/imagesTr/*",
        target="Task06_Lung/labelsTr/*",
        table="Task06_Lung/dataset.json",
    ),
    "covid_19_20": dict(image="*/Train/*_ct.nii.gz", target="*/Train/*_seg.nii.gz"),
    "segthor": dict(image="train/*/Patient*", target="train/*/GT.nii.gz"),
    "segthor-released": dict(image="imagesTr/*", target="labelsTr/*", table="dataset.json"),
    "rider": dict(image="*/*/ct.nii.gz", target="*/*/mask_rtstruct_*man*"),
    "covid_ct_seg": dict(
        image="COVID*/corona*", target="Infection_Mask/corona*", lungs="Lung_Mask/corona*"
    ),
}
FOLDERS = {
    "luna16": ["subset8", "seg-lungs-LUNA16"],
    "msd_lung": ["Task06_Lung/imagesTr", "Task06_Lung/labelsTr"],
    "covid_19_20": ["COVID-19-20_v2/Train"],
    "segthor": ["train"],
    "segthor-released": ["imagesTr", "labelsTr"],
    "covid_ct_seg": ["COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask"],
}


def adapter(name):
    return get_cohort(name.split("-")[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A miniature of each, once"

    @functools.cache
    def make(name):
        root = tmp_path_factory.mktemp(name) / name
        adapter(name).write(root, seed=0, **WRITE[name], **SMALL)
        return root

    return make


def complaints(
    name, root, tmp, near=""
) -> list[str]:  # `near`: look only at the cases that mention it
    """All that read, prepare and the reading of targets say; other errors than ValueError and
    FileNotFoundError are failures"""
    mod = adapter(name)
    try:
        t, bad = mod.read(root)
    except (ValueError, FileNotFoundError) as e:
        return [str(e)]
    said = [f"{r['case']}: {r['reason']}" for r in bad.rows]
    if near:
        t = t[[near in " ".join(map(str, row)) for row in t.values]]
    if not len(t):
        return said
    try:
        prepare_cases(
            t,
            tmp / "volumes",
            tmp / "organs",
            HOW,
            quarantine=tmp / "quarantine.csv",
            source=mod.source,
        )
    except ValueError as e:
        said.append(str(e))
    said += (
        [f"{r.case}: {r.reason}" for r in pd.read_csv(tmp / "quarantine.csv").itertuples()]
        if (tmp / "quarantine.csv").exists()
        else []
    )
    for row in t.itertuples():
        try:
            mod.read_target(row.target_map)
            if hasattr(row, "lung_map"):
                read_lungs(row.lung_map)
        except (ValueError, FileNotFoundError) as e:
            said.append(str(e))
    return said


@pytest.mark.parametrize("name", WRITE)
def test_counts(name, made):
    t, bad = adapter(name).read(made(name))
    labels = {c: int(t[c].sum()) for c in label_columns(t)}
    assert (len(t), t.patient.nunique(), labels, t.split.value_counts().to_dict()) == GOLDEN[name]
    assert [c.removeprefix("label:") for c in label_columns(t)] == adapter(name).labels
    assert (t.groupby("patient").split.nunique() == 1).all()
    assert not t.case.str.contains(r"[./]").any()  # cases name files
    assert [r["case"] for r in bad.rows] == (
        ["radiopaedia_1_1_0"] if name == "covid_ct_seg" else []
    )
    assert (
        t.image.map(Path).map(Path.is_absolute).all()
        and (t.organ_map == "").all()
        and t.target_map.map(lambda p: Path(p).exists()).all()
    )


@pytest.mark.parametrize("name", WRITE)
def test_volumes_and_targets(name, made, tmp_path):
    mod = adapter(name)
    t, _ = mod.read(made(name))
    ready = prepare_cases(t, tmp_path / "volumes", tmp_path / "organs", HOW, source=mod.source)
    assert ready.case.tolist() == t.case.tolist()
    for row in ready.itertuples():
        s, (v, _), (mask, affine) = (
            read_volume(row.image),
            load_checked(t.set_index("case").image[row.case], mod.source),
            mod.read_target(row.target_map),
        )
        assert np.allclose(s.spacing, HOW["spacing"], atol=1e-3) and s.axes == "RAS"
        assert np.allclose(
            np.multiply(s.hu.shape, s.spacing),
            np.multiply(v.ras().hu.shape, v.ras().spacing),
            atol=14,
        )
        check_mask(mask.shape, affine, v, row.target_map)
        assert set(np.unique(mask)) == {0, *mod.targets}


def damage(kind, victim: Path):
    if kind == "deleted":
        for f in (
            victim.parent.glob("mask_rtstruct_*") if victim.name.startswith("mask_") else [victim]
        ):
            f.unlink()
    elif kind == "text":
        victim.write_text("<html>404: not found</html>\n")
    elif victim.suffix == ".csv":
        victim.write_text(victim.read_text()[: victim.stat().st_size // 2].rpartition(",")[0])
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["deleted", "truncated", "text"])
@pytest.mark.parametrize("name,what", [(n, w) for n, files in FILES.items() for w in files])
def test_what_breaks_is_named(name, what, kind, made, tmp_path):
    root = made(name)
    victim = sorted(root.glob(FILES[name][what]))[0]
    kept = {f: f.read_bytes() for f in victim.parent.iterdir() if f.is_file()}
    try:
        damage(kind, victim)
        said = complaints(
            name,
            root,
            tmp_path,
            ""
            if what == "table"
            else victim.parent.name
            if name in ("rider", "segthor")
            else victim.stem,
        )
    finally:
        for f, data in kept.items():
            f.write_bytes(data)
    names = {
        str(victim),
        str(victim.with_suffix(".mhd")),
        str(victim.parent) if name == "rider" else str(victim),
    }
    assert any(n in s for n in names for s in said), said


@pytest.mark.parametrize("name,folder", [(n, f) for n, folders in FOLDERS.items() for f in folders])
def test_a_missing_folder_is_named(name, folder, made, tmp_path):
    root = made(name)
    (root / folder).rename(tmp_path / "away")
    try:
        said = complaints(name, root, tmp_path)
    finally:
        (tmp_path / "away").rename(root / folder)
    assert any(folder.split("/")[-1] in s for s in said), said


@pytest.mark.parametrize("name", WRITE)
def test_a_missing_case_moves_nobody(name, made):
    root = made(name)
    t, _ = adapter(name).read(root)
    gone = Path(t.image[1])
    data = gone.read_bytes()
    gone.unlink()
    try:
        less, bad = adapter(name).read(root)
    finally:
        gone.write_bytes(data)
    assert t.case[1] in [r["case"] for r in bad.rows]
    assert less.set_index("case").split.to_dict() == t.drop(1).set_index("case").split.to_dict()


@pytest.mark.parametrize("name", WRITE)
def test_same_seed_same_bytes(name, made, tmp_path):
    few = WRITE[name] | dict(n_train=2 if WRITE[name]["n_train"] else 0, n_test=1)

    def bytes_of(root):
        return {
            f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()
        }

    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        adapter(name).write(tmp_path / folder, seed=seed, **few, **SMALL)
    a, b, c = (bytes_of(tmp_path / folder) for folder in "abc")
    assert a == b and set(a.values()) != set(c.values())
    assert len(set(a.values())) >= len(a) - 1  # no two patients are the same


def test_cohorts_hold_different_patients(made):
    first = {
        name: adapter(name).read(made(name))[0].image[0]
        for name in WRITE
        if name != "segthor-released"
    }
    shades = {name: read_volume(p).hu.astype(float).std().round(6) for name, p in first.items()}
    assert len(set(shades.values())) == len(first)


@pytest.mark.parametrize("name", [n for n in WRITE if n != "luna16"])
def test_every_case_has_its_lesion(name, made):
    t, _ = adapter(name).read(made(name))
    assert all(adapter(name).read_target(p)[0].any() for p in t.target_map)


@pytest.mark.parametrize(
    "name,text,error",
    [
        ("msd_lung", "[]", "no list `training`"),
        ("msd_lung", '{"training": []}', "no list `training`"),
        ("msd_lung", '{"training": [{"image": "a"}]}', "expected {image, label}"),
        (
            "msd_lung",
            '{"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}], "labels": ["cancer"]}',
            "label 1 is None, expected 'cancer'",
        ),
        (
            "segthor",
            '{"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}], "labels": {"1": "heart"}}',
            "label 1 is 'heart', expected 'oesophagus'",
        ),
        (
            "segthor",
            '{"training": [{"image": "a.nii.gz", "label": null}]}',
            "expected {image, label}",
        ),
    ],
)
def test_odd_lists_are_named(name, text, error, tmp_path):
    write_text(text, tmp_path / "dataset.json")
    with pytest.raises(ValueError) as e:
        adapter(name).read(tmp_path)
    assert error in str(e.value) and "dataset.json" in str(e.value)


@pytest.mark.parametrize(
    "text,error",
    [
        ("seriesuid,x\na,1\n", "no column `coordX`"),
        ("", "cannot be read as CSV"),
        ("seriesuid,coordX,coordY,coordZ,diameter_mm\na,1,2\n", "line 2 is not whole"),
    ],
)
def test_odd_annotations_are_named(text, error, made):
    f = made("luna16") / "annotations.csv"
    kept = f.read_text()
    try:
        f.write_text(text)
        with pytest.raises(ValueError) as e:
            adapter("luna16").read(f.parent)
    finally:
        f.write_text(kept)
    assert error in str(e.value) and str(f) in str(e.value)


@pytest.mark.parametrize(
    "name,cases,test", [("msd_lung", 63, 13), ("covid_19_20", 199, 40), ("segthor", 40, 8)]
)
def test_the_papers_sizes(name, cases, test, tmp_path):
    pairs = [(tmp_path / f"{i}.nii.gz", tmp_path / f"{i}_seg.nii.gz") for i in range(cases)]
    for f in sum(pairs, ()):
        f.touch()
    t, bad = layouts.segmentation_table(
        pairs, sys.modules[type(adapter(name)).__module__].TEST_FRACTION, name
    )
    assert not len(bad) and t.split.value_counts().to_dict() == dict(train=cases - test, test=test)


def test_a_second_scan_stays_with_its_patient(tmp_path):
    d = tmp_path / "Train"
    d.mkdir()
    for i in range(20):
        for scan in ("", "_1"):
            for kind in ("ct", "seg"):
                (d / f"volume-covid19-A-{i:04d}{scan}_{kind}.nii.gz").touch()
    t, _ = adapter("covid_19_20").read(tmp_path)
    assert (len(t), t.patient.nunique()) == (40, 20) and (
        t.groupby("patient").split.nunique() == 1
    ).all()


def test_lungs_are_named_by_where_they_lie(made):
    mod = adapter("luna16")
    t, _ = mod.read(made("luna16"))
    mask, affine = mod.read_target(t.target_map[0])
    x = {
        v: (np.argwhere(mask == v) @ affine[:3, :3].T + affine[:3, 3])[:, 0].mean() for v in (3, 4)
    }  # RAS: left is negative
    assert x[3] < 0 < x[4]
    assert (
        layouts.fix_laterality(np.where(mask == 3, 4, np.where(mask == 4, 3, mask)), affine, 3, 4)
        == mask
    ).all()
    one = np.where(mask == 4, 0, mask)
    assert (layouts.fix_laterality(one, affine, 3, 4) == one).all()


@pytest.mark.parametrize(
    "name", [n for n in WRITE if adapter(n).unverified and n != "segthor-released"]
)
def test_what_is_unverified_is_said_once(name, made, monkeypatch):
    mod, said = adapter(name), []
    for m in (layouts, sys.modules[type(mod).__module__]):
        monkeypatch.setattr(m, "log_message", said.append, raising=False)
    layouts.warn_unverified.cache_clear()
    for _ in range(2):
        mod.read(made(name))
    assert sum(mod.unverified in s for s in said) == 1
    assert name != "segthor" or sum("the owners' layout, train/" in s for s in said) == 2


def test_macos_leftovers_are_no_cases(made):
    for name, folder in (
        ("msd_lung", "Task06_Lung/imagesTr"),
        ("covid_19_20", "COVID-19-20_v2/Train"),
        ("covid_ct_seg", "COVID-19-CT-Seg_20cases"),
    ):
        f = made(name) / folder / "._volume-covid19-A-0001_ct.nii.gz"
        f.write_bytes(b"\0" * 10)
        try:
            t, bad = adapter(name).read(made(name))
        finally:
            f.unlink()
        assert len(t) == GOLDEN[name][0] and not any(r["case"].startswith(".") for r in bad.rows)
