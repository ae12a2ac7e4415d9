"""STOIC, RAD-ChestCT, INSPECT and RSPECT: miniatures in the owners' layout, read, prepared and
damaged"""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from asap.data.adapter import get_cohort
from asap.data.checks import load_checked
from asap.data.cohorts import inspect, rad_chest_ct
from asap.data.prepare import prepare_cases
from asap.data.table import check_table
from asap.data.volumes import standard_grid, standardize
from asap.phantom.words import synthesize_case

NAMES = ["stoic", "rad_chest_ct", "inspect", "rspect"]
SMALL = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))
HOW = dict(spacing=[7.0, 7.0, 14.0], hu=[-1000, 1000], code="test")
ADAPTERS = {n: get_cohort(n) for n in NAMES}
FILES = {  # one of each kind, and what its absence is called
    "stoic": ["data/mha/2.mha", "metadata/reference.csv"],
    "rad_chest_ct": [
        "trn00002.npz",
        "val00001.npz",
        "tst00001.npz",
        *[n for _, n in rad_chest_ct.TABLES.values()],
    ],
    "inspect": ["CTPA/*.nii.gz", *[f"{n}_20250611.tsv" for n in inspect.TABLES]],
    "rspect": ["train/*/*/*.dcm", "train.csv"],
}
DAMAGES = {
    "deleted": lambda f: f.unlink(),
    "text": lambda f: f.write_text("an error page of a download"),
    "empty": lambda f: f.write_bytes(b""),
    "truncated": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
}
COUNTS = {  # of the miniatures of seed 1
    "stoic": dict(
        cases=10, patients=10, split={"train": 8, "test": 2}, left_out=0, labels=[4, 2], empty=0
    ),
    "rad_chest_ct": dict(
        cases=14,
        patients=14,
        split={"train": 6, "test": 4, "val": 4},
        left_out=0,
        labels=[2, 7, 2, 4, 2, 6, 4, 2, 8, 9, 2, 4, 5, 4, 1, 3],
        empty=0,
    ),
    "inspect": dict(
        cases=14,
        patients=14,
        split={"train": 6, "val": 4, "test": 4},
        left_out=0,
        labels=[7, 1, 4, 6, 3, 5, 8],
        empty=4,
    ),
    "rspect": dict(cases=4, patients=4, split={"test": 4}, left_out=0, labels=[2], empty=0),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Each miniature once: name -> folder, table, what was left out"
    out = {}
    for n, a in ADAPTERS.items():
        root = tmp_path_factory.mktemp("raw") / n
        a.write(root, seed=1, n_train=6, n_test=4, **SMALL)
        out[n] = (root, *a.read(root))
    return out


def ready(table, bad, folder, source):
    return prepare_cases(
        table,
        folder / "volumes",
        folder / "organs",
        HOW,
        quarantine=folder / "quarantine.csv",
        bad=bad,
        source=source,
    )


@pytest.mark.parametrize("name", NAMES)
def test_counts(made, name):
    _, t, bad = made[name]
    a = ADAPTERS[name]
    assert [c for c in t if c.startswith("label:")] == [f"label:{n}" for n in a.labels]
    found = dict(
        cases=len(t),
        patients=t.patient.nunique(),
        split=t.split.value_counts().to_dict(),
        left_out=len(bad),
        labels=[int((t[f"label:{n}"] == 1).sum()) for n in a.labels],
        empty=int(t[[f"label:{n}" for n in a.labels]].isna().sum().sum()),
    )
    assert found == COUNTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_contract(made, name, tmp_path):
    _, t, _ = made[name]
    t.to_parquet(tmp_path / "t.parquet")
    check_table(pd.read_parquet(tmp_path / "t.parquet"), name)
    a = ADAPTERS[name]
    assert (
        t.groupby("patient").split.nunique().max() == 1
        and not t.case.str.contains(".", regex=False).any()
    )
    assert (
        (t.organ_map == "").all()
        and (t.target_map == "").all()
        and not a.targets
        and not a.has_organ_maps
    )
    assert all(Path(p).is_absolute() for p in t.image) and a.unverified.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_prepared(made, name, tmp_path):
    _, t, bad = made[name]
    before = len(bad)
    out = ready(t, bad, tmp_path, ADAPTERS[name].source)
    assert len(out) == len(t) and len(bad) == before, bad.rows
    for raw, new in zip(t.image[:3], out.image[:3]):
        img, v = nib.load(new), load_checked(raw, ADAPTERS[name].source)[0]
        assert (
            np.allclose(img.header.get_zooms(), HOW["spacing"])
            and img.shape == standard_grid(v.hu.shape, v.affine, HOW["spacing"])[0]
        )
        assert np.array_equal(np.asarray(img.dataobj), standardize(v, HOW["spacing"]).hu)


@pytest.mark.parametrize(
    "name,kind,damage", [(n, k, d) for n in NAMES for k in FILES[n] for d in DAMAGES]
)
def test_damage_is_named(made, name, kind, damage, tmp_path):
    """A damaged file is an error that names it, or a case left out by name; never a surprise of
    a library"""
    root = tmp_path / name
    shutil.copytree(made[name][0], root)
    f = sorted(root.glob(kind))[0]
    DAMAGES[damage](f)
    before = {r["case"] for r in made[name][2].rows}
    try:
        t, bad = ADAPTERS[name].read(root)
        own = t[
            t.image.map(lambda p: f == Path(p) or Path(p) in f.parents)
        ]  # the cases that the file is a part of
        if len(own):
            ready(own, bad, tmp_path, ADAPTERS[name].source)
    except (ValueError, FileNotFoundError) as e:
        assert type(e) in (ValueError, FileNotFoundError) and f.stem.split("_2025")[0] in str(e), e
        return
    new = [r for r in bad.rows if r["case"] not in before]
    assert new and all(
        len(r["reason"]) > 15 and "KeyError" not in r["reason"] and "IndexError" not in r["reason"]
        for r in new
    ), bad.rows


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(made, name, tmp_path):
    root = made[name][0]
    ADAPTERS[name].write(tmp_path, seed=1, n_train=6, n_test=4, **SMALL)
    files = [f.relative_to(root) for f in root.rglob("*") if f.is_file()]
    assert sorted(files) == sorted(
        f.relative_to(tmp_path) for f in tmp_path.rglob("*") if f.is_file()
    )
    assert not [f for f in files if (root / f).read_bytes() != (tmp_path / f).read_bytes()]


@pytest.mark.parametrize("name", NAMES)
def test_missing_folder_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        ADAPTERS[name].read(tmp_path / "nothing")


def test_a_lost_volume_moves_no_patient(made, tmp_path):
    root, t, _ = made["stoic"]
    shutil.copytree(root, tmp_path / "stoic")
    (tmp_path / "stoic/data/mha/1.mha").unlink()
    less = ADAPTERS["stoic"].read(tmp_path / "stoic")[0]
    assert (
        less.set_index("case").split.to_dict() == t[t.case != "1"].set_index("case").split.to_dict()
    )


def test_a_patient_in_two_splits_is_refused(made, tmp_path):
    shutil.copytree(made["inspect"][0], tmp_path / "inspect")
    f = tmp_path / "inspect/study_mapping_20250611.tsv"
    f.write_text(f.read_text().replace("\t100001\n", "\t100014\n"))
    with pytest.raises(ValueError, match="is in 2 splits"):
        ADAPTERS["inspect"].read(tmp_path / "inspect")


def test_inspect_flags_agree_with_times(made):
    t = made["inspect"][1]
    for months, days in inspect.HORIZONS.items():
        flag, label = (
            t[f"{months}_month_mortality"],
            t[f"label:mortality {months} month{'s' * (months > 1)}"],
        )
        assert (flag.eq("True") == label.eq(1)).all() and (
            flag.eq("Censored") == label.isna()
        ).all()
        assert (label.eq(1) == ((t.event == 1) & (t.time_days <= days))).all() and (
            t.time_days[label == 0] > days
        ).all()


def test_inspect_found_by_impression_id(made, tmp_path):
    shutil.copytree(made["inspect"][0], tmp_path / "inspect")
    t = made["inspect"][1]
    for name, image in zip(t.case, t.image):
        (tmp_path / "inspect/CTPA" / Path(image).name).rename(
            tmp_path / f"inspect/CTPA/{name}.nii.gz"
        )
    again, bad = ADAPTERS["inspect"].read(tmp_path / "inspect")
    assert (
        not len(bad)
        and again.case.tolist() == t.case.tolist()
        and Path(again.image[0]).name == "1.nii.gz"
    )


def test_rad_refuses_identical_effusions(made, tmp_path):
    a, root = ADAPTERS["rad_chest_ct"], tmp_path / "rad"
    shutil.copytree(made["rad_chest_ct"][0], root)
    copied = pd.DataFrame(
        {
            "Volume": ["trn00001", "trn00002"],
            "Hietal hernia": [0, 0],
            "Pericardial_effusion": [0, 1],
            "Pleural_effusion": [0, 1],
        }
    )
    copied.to_csv(root / "train.csv", index=False)
    assert len(a.read(root)[0]) == len(
        made["rad_chest_ct"][1]
    )  # the owners' tables are there: they are used
    for _, name in rad_chest_ct.TABLES.values():
        (root / name).unlink()
    with pytest.raises(ValueError, match="train.csv.*are the same in all 2 rows.*put the owners'"):
        a.read(root)


def test_rad_refuses_a_copy_in_the_owners_form(made, tmp_path):
    a, root = ADAPTERS["rad_chest_ct"], tmp_path / "rad"
    shutil.copytree(made["rad_chest_ct"][0], root)
    for prefix, (_, name) in rad_chest_ct.TABLES.items():
        t = pd.concat([pd.read_csv(root / name)] * 20, ignore_index=True)
        t["NoteAcc_DEID"] = [f"{prefix}{i:05d}" for i in range(1, len(t) + 1)]
        t["pericardial_effusion*heart"] = (
            t["pleural_effusion*left lung"] | t["pleural_effusion*right lung"]
        )
        t.to_csv(root / name, index=False)
    with pytest.raises(ValueError, match="both effusions are the same in all"):
        a.read(root)


def test_rad_labels_of_places(made):
    a = ADAPTERS["rad_chest_ct"]
    k, row = (
        synthesize_case(
            "rad_chest_ct 1", "train", 1, shift=a.domain_shift, second_recon_prob=0, **SMALL
        ),
        made["rad_chest_ct"][1].set_index("case").loc["trn00001"],
    )
    assert (
        row["label:Pleural effusion"] == k.labels["Pleural effusion"]
        and row["label:Pericardial effusion"] == k.labels["Pericardial effusion"]
    )


def test_rspect_series_of_a_study(made, tmp_path):
    "A study with two series is two cases of one patient, and dotted UIDs make names without dots"
    root = tmp_path / "rspect"
    shutil.copytree(made["rspect"][0], root)
    old = pd.read_csv(root / "train.csv", dtype=str)
    study, other = made["rspect"][1].case[0], made["rspect"][1].case[1]
    (root / "train" / other).rename(root / "train/1.2.3")
    series = old.SeriesInstanceUID[old.StudyInstanceUID == study].iloc[0]
    shutil.copytree(root / "train" / study / series, root / "train" / study / "second")
    twin = old[old.StudyInstanceUID == study].assign(SeriesInstanceUID="second")
    pd.concat([old.replace({"StudyInstanceUID": {other: "1.2.3"}}), twin]).to_csv(
        root / "train.csv", index=False
    )
    t = ADAPTERS["rspect"].read(root)[0]
    assert {f"{study}_{series}", f"{study}_second", "1-2-3"} <= set(
        t.case
    ) and t.patient.nunique() == len(t) - 1
