"""All 18 data sets alike: from the owners' layout to a batch, what is in them, nobody on two
sides, lists, copies, kills, a cluster"""

import contextlib
import hashlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import TOP
from tiny_cases import toy_table

from asap.anatomy.organs import read_organ_map, totalsegmentator_classes
from asap.core import list_files
from asap.data.adapter import available_cohort_names, get_cohort
from asap.data.prepare import hash_inventory, quick_hash, run
from asap.data.splits import label_subsets
from asap.data.table import (
    available_cohorts,
    label_columns,
    load,
    load_acquisition,
    volume_hashes,
)
from asap.data.volumes import read, write
from asap.params import StageParams, load_params
from asap.pretrain.batches import ImageReportDataset, collate
from asap.store import local_file, read_manifest
from asap.text.encoder import load as load_text, train_text_encoder

NAMES = available_cohort_names()
P = load_params(TOP / "params/smoke.yaml")
HOW = dict(spacing=[7, 7, 14], hu=[-1000, 1000])
GOLDEN = pd.read_csv(TOP / "tests/cohorts.csv", index_col="cohort", keep_default_na=False)


def params(**cohorts):  # as a stage sees them
    tree = P.model_dump(by_alias=True)
    for n, more in cohorts.items():
        tree["cohorts"][n] |= more
    tree["study"]["n_jobs"] = 1
    return StageParams(tree, "prepare")


def ready(name, root, p=None) -> dict:  # status
    p = p or params()
    organs = partial(read_organ_map, groups=p.anatomy.groups.model_dump())
    return run(
        get_cohort(name),
        p,
        root,
        organs,
        lambda table, out, quarantine, shared: table,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A project whose data/ holds a miniature of each"
    to = tmp_path_factory.mktemp("project")
    (to / "data").mkdir()
    for n in sorted(NAMES, key=lambda n: n == "radgenome"):
        train, test = dict(
            radgenome=(4, 2),
            luna16=(7, 3),
            rider=(0, 3),
            covid_ct_seg=(0, 4),
            rspect=(0, 4),
            ct_rate=(8, 4),
        ).get(n, (6, 4))
        get_cohort(n).write(
            to / "data" / n,
            1,
            train,
            test,
            size=(48, 48, 24),
            spacing=(7.0, 7.0, 14.0),
            second_recon_prob=0.3,
        )
    return to


@pytest.fixture(scope="module")
def made(root):
    "Each of them prepared: name -> status, table"
    return {n: (ready(n, root), load(root / f"build/cohorts/{n}/{n}.parquet", root)) for n in NAMES}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    to = tmp_path_factory.mktemp("text") / "text"
    said = [["The heart is normal.", "There is a nodule in the left lung."]] * 8
    train_text_encoder(said, said, P.text, 0, to)
    return load_text(to)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_it(name, made):
    status, t = made[name]
    positive = " ".join(str(int((t[c] == 1).sum())) for c in label_columns(t))
    got = {
        **{
            k: status[k]
            for k in (
                "cases",
                "patients",
                "train",
                "val",
                "test",
                "organ_maps",
                "targets",
                "questions",
                "left_out",
            )
        },
        "positive": positive,
    }
    assert {k: str(v) for k, v in got.items()} == {k: str(v) for k, v in GOLDEN.loc[name].items()}
    assert len(get_cohort(name).labels) == status["labels"]


@pytest.mark.parametrize("name", NAMES)
def test_from_the_owners_layout_to_a_batch(name, made, text):
    adapter, (_, t) = get_cohort(name), made[name]
    data = ImageReportDataset(t.head(3), P, text, seed=0)
    b = collate([data[(0, i)] for i in range(len(data))], text, 0.5)
    assert (
        b["image"].shape == (len(data), 1, *P.volumes.roi_size)
        and b["image"].abs().max() <= 1 + P.pretrain.intensity_shift + 1e-6
        and b["image"].std() > 0.05
    )
    whole = t.organ_map.head(3) != ""
    assert b["organ_valid"].any(1).tolist() == whole.tolist() and (
        adapter.has_organ_maps or not whole.any()
    )
    if whole.any():
        assert torch.allclose(b["organ_fractions"].sum(-1), torch.ones(()), atol=1e-5) and (
            b["organ_fractions"][..., 1:6].sum() > 1
        )


@pytest.mark.parametrize("name", NAMES)
def test_nobody_on_two_sides(name, made):
    """Patients, and so the reconstructions of a scan; small label fractions lie inside the
    larger ones, by patient"""
    _, t = made[name]
    assert (t.groupby("patient").split.nunique() == 1).all() and (
        t.groupby("scan").patient.nunique() == 1
    ).all()
    if not (t.split == "train").any() or not label_columns(t):
        return
    f = label_subsets(t, [0.3, 0.6, 1.0], 0)
    assert (
        not (f["0.3"] & ~f["0.6"]).any()
        and (f["1.0"] == (t.split == "train")).all()
        and (f.groupby(t.patient).nunique() == 1).all(axis=None)
    )


def test_no_patient_is_in_two_cohorts(root, made):
    "Save RadGenome-ChestCT, which asks about CT-RATE's"
    seen = {}
    for n, (_, t) in made.items():
        for v in set(volume_hashes(n, t.case, root)):
            seen.setdefault(v, set()).add(n)
    assert {frozenset(s) for s in seen.values() if len(s) > 1} == {
        frozenset({"ct_rate", "radgenome"})
    }


def test_the_kept_table_names_no_place(root, made):
    "Everything under the project is kept relative to it"
    for n in NAMES:
        assert str(root) not in pd.read_parquet(root / f"build/cohorts/{n}/{n}.parquet").to_csv()


ANGIOGRAPHY, CT_RATES = (
    ("inspect", "rspect", "fumpe"),
    ("ct_rate", "radgenome"),
)  # who knows of contrast; of contrast and kernels


@pytest.mark.parametrize("name", NAMES)
def test_how_each_case_was_acquired(name, root, made):
    "Beside the table, case by case, and nothing of it in the table"
    (_, t), a = made[name], load_acquisition(name, root)
    assert a.case.tolist() == t.case.tolist() and not {"kernel", "contrast"} & set(t)
    assert a.slice_mm.between(0.5, 25).all() and a.pixel_mm.between(0.3, 12).all()
    assert (
        (a.contrast == 1).all()
        if name in ANGIOGRAPHY
        else name in CT_RATES or a.contrast.isna().all()
    )
    assert (a.kernel != "").all() if name in CT_RATES else (a.kernel == "").all()


def test_kernel_contrast_and_spacing_of_ct_rate(root, made):
    "As its metadata, its reports and its headers say"
    a, d = load_acquisition("ct_rate", root).set_index("case"), root / "data/ct_rate/dataset"

    def both(*files):
        return (
            pd.concat([pd.read_csv(d / f) for f in files])
            .assign(case=lambda t: t.VolumeName.str.removesuffix(".nii.gz"))
            .set_index("case")
            .loc[a.index]
        )

    said = both("metadata/train_metadata.csv", "metadata/validation_metadata.csv")
    technique = both(
        "radiology_text_reports/train_reports.csv", "radiology_text_reports/validation_reports.csv"
    ).Technique_EN
    assert a.kernel.tolist() == said.ConvolutionKernel.tolist() and a.kernel.nunique() > 1
    assert (
        (a.contrast == 1).tolist() == technique.str.contains("With contrast").tolist()
        and set(a.contrast.dropna()) == {1}
        and a.contrast.isna().any()
    )
    zooms = np.array(
        [nib.load(next(d.glob(f"*_fixed/*/*/{c}.nii.gz"))).header.get_zooms() for c in a.index]
    )
    assert np.allclose(a.slice_mm, zooms[:, 2], atol=1e-3) and np.allclose(
        a.pixel_mm, zooms[:, :2].mean(1), atol=1e-3
    )


def test_how_it_was_acquired_outlives_a_rerun(root, made, tmp_path, capsys):
    """A case that is reused keeps it; one whose volume is damaged is made anew, with the same
    voxels; without metadata the kernels alone are lost"""
    folders = (f"build/{k}/ct_rate" for k in ("cohorts", "volumes", "organs"))
    for d in ("data/ct_rate", "build/store", *folders):
        shutil.copytree(root / d, tmp_path / d)
    here, volumes = tmp_path / "build/cohorts/ct_rate", tmp_path / "build/volumes/ct_rate"

    def stamp():
        found = (tmp_path / "build/store").rglob("*.nii")
        return {f.name: f.stat().st_mtime_ns for f in found}

    def files():
        return [(here / f).read_bytes() for f in ("ct_rate.parquet", "acquired.csv")]

    before, first = stamp(), files()
    (here / "acquired.csv").unlink()
    ready("ct_rate", tmp_path)
    assert files() == first and stamp() == before
    damaged = local_file(volumes / "train_1_a_1.nii")
    data = damaged.read_bytes()
    damaged.write_bytes(data[:400] + bytes(8) + data[408:])
    ready("ct_rate", tmp_path)
    assert damaged.read_bytes() == data
    after = stamp()
    assert (
        files() == first
        and [f for f in after if after[f] != before[f]] == [damaged.name]
        and "1 volumes were made anew" in capsys.readouterr().err
    )
    shutil.rmtree(tmp_path / "data/ct_rate/dataset/metadata")
    ready("ct_rate", tmp_path)
    assert (
        "metadata/train_metadata.csv is missing" in capsys.readouterr().err
        and stamp() == after
        and files()[0] == first[0]
    )
    assert set(load_acquisition("ct_rate", tmp_path).kernel) == {""} and load_acquisition(
        "ct_rate", tmp_path
    ).drop(columns="kernel").equals(load_acquisition("ct_rate", root).drop(columns="kernel"))


def test_a_lost_patient_moves_at_most_one_other(root, made, tmp_path):
    shutil.copytree(root / "data/ct_rate", tmp_path / "data/ct_rate")
    for f in (tmp_path / "data/ct_rate").rglob("train_3_a_*"):
        f.unlink()
    ready("ct_rate", tmp_path)
    a, b = made["ct_rate"][1], load(tmp_path / "build/cohorts/ct_rate/ct_rate.parquet", tmp_path)
    before, after = a.groupby("patient").split.first(), b.groupby("patient").split.first()
    assert (
        set(before.index) - set(after.index) == {"train_3"}
        and (before[after.index] != after).sum() <= 1
    )


def test_absent_and_pointed_to(root, made, tmp_path, capsys):
    """One that is not there is left out by name; one that a line points to is read where it
    lies, and nothing is written there"""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stoic.path").write_text(f"{root / 'data/stoic'}\n")

    def stamp():
        return {f: f.stat().st_mtime_ns for f in (root / "data/stoic").rglob("*")}

    before = stamp()
    assert (
        ready("acdc", tmp_path) == dict(cohort="acdc", there=False)
        and "acdc: left out" in capsys.readouterr().err
    )
    status = ready("stoic", tmp_path)
    assert (
        status["cases"] == made["stoic"][0]["cases"]
        and not status["phantoms"]
        and stamp() == before
    )
    assert available_cohorts(["acdc", "stoic"], tmp_path) == ["stoic"]
    (tmp_path / "data/stoic.path").write_text("/nowhere\n")
    with pytest.raises(FileNotFoundError, match="is the disk mounted"):
        ready("stoic", tmp_path)


def test_lists_by_a_param(tmp_path, capsys):
    "The split of ACDC's re-pack, by the name of its list in params.yaml"
    acdc = get_cohort("acdc")
    acdc.write(
        tmp_path / "data/acdc",
        0,
        6,
        4,
        layout="released",
        size=(48, 48, 24),
        spacing=(7.0, 7.0, 14.0),
    )
    status = ready("acdc", tmp_path, params(acdc=dict(split_files="dataset.json")))
    said, bad = capsys.readouterr().err, pd.read_csv(tmp_path / "build/cohorts/acdc/quarantine.csv")
    assert (
        status["left_out"] == len(bad) > 0
        and "are in train too: patient" in said
        and "but its patient is in that of test" in bad.reason[0]
    )
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        ready("acdc", tmp_path, params(acdc=dict(split_files="nothing.json")))


def test_what_is_there_twice(root, tmp_path):
    "A copy of a volume and of a report in the test set are found, and counted as leaks"
    shutil.copytree(root / "data/ct_rate", tmp_path / "data/ct_rate")
    d = tmp_path / "data/ct_rate/dataset"

    def one(s):
        return next((d / f"{s}_fixed").rglob(f"{s}_1_a_1.nii.gz"))

    shutil.copyfile(one("train"), one("valid"))
    trained, tested = (
        pd.read_csv(f)
        for f in (
            d / "radiology_text_reports/train_reports.csv",
            d / "radiology_text_reports/validation_reports.csv",
        )
    )
    for c in ("Findings_EN", "Impressions_EN"):
        tested.loc[1, c] = trained[c][0]
    tested.to_csv(d / "radiology_text_reports/validation_reports.csv", index=False)
    status = ready("ct_rate", tmp_path)
    twice = pd.read_csv(tmp_path / "build/cohorts/ct_rate/duplicates.csv")
    assert (
        status["twice"]["volume"] == 1
        and status["leaks"] == len(twice)
        and set(twice.kind) == {"report", "volume"}
        and twice.leak.all()
    )
    assert (
        twice[twice.kind == "volume"].iloc[0].case == "valid_1_a_1"
        and twice[twice.kind == "volume"].iloc[0].twin == "train_1_a_1"
    )


def test_organ_masks_in_a_folder(root, made, tmp_path):
    "TotalSegmentator's folder of one file a class gives the organ map that its one file gives"
    shutil.copytree(root / "data/own", tmp_path / "data/own")
    d = tmp_path / "data/own/organs"
    one = sorted(d.glob("*.nii.gz"))[0]
    img = nib.load(one)
    for name in sum(P.anatomy.groups.values(), []):
        write(
            (np.asanyarray(img.dataobj) == totalsegmentator_classes()[name]).astype(np.uint8),
            img.affine,
            d / f"segmentations/{name}.nii.gz",
        )
    cases = tmp_path / "data/own/cases.csv"
    cases.write_text(cases.read_text().replace(f"organs/{one.name}", "organs/segmentations"))
    ready("own", tmp_path)
    case = one.name.removesuffix(".nii.gz")
    a, b = (
        np.asanyarray(nib.load(local_file(r / f"build/organs/own/{case}.nii.gz")).dataobj)
        for r in (root, tmp_path)
    )
    assert np.array_equal(a, b) and a.any()


def test_killed_and_started_again_it_repeats_no_case(tmp_path):
    t = toy_table(tmp_path, 60)
    t.to_parquet(tmp_path / "t.parquet")
    code = textwrap.dedent(f"""
        import pandas as pd
        from pathlib import Path
        from asap.data.prepare import prepare_cases
        here = Path({str(tmp_path)!r})
        prepare_cases(pd.read_parquet(here/"t.parquet"), here/"v", here/"o", {HOW!r}, jobs=2)""")
    p = psutil.Popen([sys.executable, "-c", code], cwd=TOP)
    end = time.monotonic() + 60
    while len(list_files(tmp_path / "v", "*.json")) < 20:
        assert time.monotonic() < end
    for one in [p, *p.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    p.wait()
    done = {
        f.stem: (f.stat().st_mtime_ns, f.with_suffix(".nii").stat().st_ino)
        for f in list_files(tmp_path / "v", "*.json")
    }
    assert 20 <= len(done) < 60
    subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True)
    after = {
        f.stem: (f.stat().st_mtime_ns, f.with_suffix(".nii").stat().st_ino)
        for f in list_files(tmp_path / "v", "*.json")
    }
    assert len(after) == 60 and {k: after[k] for k in done} == done


def test_a_radgenome_volume_is_that_of_ct_rate(root, made):
    "Prepared and kept once"
    a, b = (read_manifest(root / f"build/volumes/{n}").set_index("case") for n in CT_RATES)
    assert len(b) == 6 and (a.key.reindex(b.index) == b.key).all()


def leave(folder):
    """What macOS leaves beside each file, what its archives unpack to, and what Finder leaves in
    each folder"""
    for f in [f for f in folder.rglob("*") if f.is_file()]:
        for to in (f.parent, folder / "__MACOSX" / f.parent.relative_to(folder)):
            to.mkdir(parents=True, exist_ok=True)
            (to / f"._{f.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    for d in [folder, *(d for d in folder.rglob("*") if d.is_dir())]:
        (d / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


@pytest.mark.parametrize("name", NAMES)
def test_what_macos_leaves_is_no_scan(name, root, tmp_path):
    "The same table, nobody more left out, the same hash and the same voxels"
    adapter = get_cohort(name)
    used = {name, "ct_rate"} if name == "radgenome" else {name}
    for n in used:
        shutil.copytree(root / "data" / n, tmp_path / "data" / n)

    def state():
        t, bad = adapter.read(tmp_path / "data" / name)
        return t, [
            bad.rows,
            hash_inventory(tmp_path / "data"),
            [quick_hash(f) for f in t.image],
            [hashlib.sha256(read(f).hu.tobytes()).hexdigest() for f in t.image[:2]],
        ]

    before = state()
    for n in used:
        leave(tmp_path / "data" / n)
    after = state()
    pd.testing.assert_frame_equal(after[0], before[0])
    assert after[1] == before[1]
