"Adapters of cohorts with reports: own, CT-RATE (both releases), RadGenome-ChestCT, CTRG"

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from asap.data.adapter import get_cohort
from asap.data.checks import check_mask, check_volume, load_checked
from asap.data.cohorts import ct_rate, own, radgenome
from asap.data.prepare import prepare_cases
from asap.data.table import label_columns
from asap.data.volumes import open_nifti, resample, standardize

SMALL, HOW = (
    dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0)),
    dict(spacing=[7, 7, 14], hu=[-1000, 1000]),
)
ADAPTERS = {n: get_cohort(n) for n in ("own", "ct_rate", "radgenome", "ctrg")}
ADAPTERS["first"] = ADAPTERS["ct_rate"]
EXTRA = dict(first=dict(release="first"))
NAMES = list(ADAPTERS)


def organs(path, shape, affine):
    img = open_nifti(path)
    return resample(np.asarray(img.dataobj), img.affine, shape, affine, order=0, fill=0)


def miniature(name, folder, seed=3, train=4, test=2):
    root = folder / name
    ADAPTERS[name].write(
        root, seed, train, test, **SMALL, second_recon_prob=0.4, **EXTRA.get(name, {})
    )
    return root


@pytest.fixture(scope="module")
def minis(tmp_path_factory):
    "One miniature of each, in folders of their own; nothing changes them"
    return {n: miniature(n, tmp_path_factory.mktemp(n)) for n in NAMES}


def through(name, root, out):
    "Read, prepare, ask: everything that a stage does with a cohort"
    m = ADAPTERS[name]
    table, bad = m.read(root)
    t = prepare_cases(
        table,
        out / "volumes",
        out / "organs",
        HOW,
        organs,
        quarantine=out / "out.csv",
        bad=bad,
        source=m.source,
        opener=m.open_volume,
    )
    left = {r["case"] for r in bad.rows} | set(table.case) - set(t.case)
    m.read_questions(root, t, left)
    return table, t, left


GOLDEN = dict(  # cases, patients, splits, positives of each label
    own=(7, 6, {"train": 4, "test": 3}, [2, 0, 2, 1, 3, 3, 3, 2, 2, 3, 0, 5, 3, 1, 1, 1, 4, 1]),
    ct_rate=(7, 6, {"train": 5, "test": 2}, [3, 4, 3, 1, 2, 1, 3, 4, 1, 4, 0, 2, 5, 0, 0, 0, 4, 6]),
    first=(7, 6, {"train": 5, "test": 2}, [3, 4, 3, 1, 2, 1, 3, 4, 1, 4, 0, 2, 5, 0, 0, 0, 4, 6]),
    radgenome=(6, 6, {"train": 4, "test": 2}, []),
    ctrg=(6, 6, {"train": 5, "test": 1}, []),
)


@pytest.mark.parametrize("name", NAMES)
def test_golden_counts(name, minis):
    t, bad = ADAPTERS[name].read(minis[name])
    assert len(bad) == 0
    got = (
        len(t),
        t.patient.nunique(),
        t.split.value_counts().to_dict(),
        [int(t[c].sum()) for c in label_columns(t)],
    )
    assert label_columns(t) == [f"label:{n}" for n in ADAPTERS[name].labels]
    assert got == GOLDEN[name], got


@pytest.mark.parametrize("name", NAMES)
def test_no_patient_in_two_splits(name, minis):
    t, _ = ADAPTERS[name].read(minis[name])
    assert (t.groupby("patient").split.nunique() == 1).all() and set(t.split) == {"train", "test"}
    assert (t.groupby("scan").patient.nunique() == 1).all() and (t.findings.str.len() > 30).all()
    assert not t.case.str.contains(".", regex=False).any(), (
        "files of a case are named up to the first dot"
    )


@pytest.mark.parametrize("name", ["own", "ct_rate", "first", "radgenome", "ctrg"])
def test_prepared(name, minis, tmp_path):
    table, t, left = through(name, minis[name], tmp_path)
    assert not left and t.case.tolist() == table.case.tolist()
    for r, raw in zip(t.itertuples(), table.itertuples()):
        img = open_nifti(r.image)
        assert img.header.get_zooms() == (7, 7, 14) and all(
            abs(a - b) <= 1 for a, b in zip(img.shape, (48, 48, 24))
        ), img.shape
        if raw.organ_map:
            v, mask = (
                load_checked(raw.image, ADAPTERS[name].source, ADAPTERS[name].open_volume)[0],
                open_nifti(raw.organ_map),
            )
            check_mask(mask.shape, mask.affine, v, raw.organ_map)
            lung = np.isin(np.asarray(open_nifti(r.organ_map).dataobj), [10, 11, 12, 13, 14])
            assert np.asarray(img.dataobj)[lung].mean() < -400, "the lobes lie in air"


def test_first_release(minis, tmp_path):
    """The same volumes as the fixed release; never read without slope and intercept, never with
    them twice"""
    fixed, _ = ADAPTERS["ct_rate"].read(minis["ct_rate"])
    first, _ = ADAPTERS["ct_rate"].read(minis["first"])
    assert ct_rate.detect_release(minis["first"]) == "first" and set(first.intercept) == {
        -1024,
        -8192,
    }
    for a, b in zip(fixed.itertuples(), first.itertuples()):
        v = ADAPTERS["ct_rate"].open_volume(b.image)
        assert not [f for f in check_volume(v) if f.level == "error"]
        x, y = standardize(load_checked(a.image)[0], HOW["spacing"]), standardize(v, HOW["spacing"])
        assert (
            x.hu.shape == y.hu.shape
            and np.abs(x.hu.astype(int) - y.hu).max() <= 2
            and np.allclose(x.affine, y.affine, atol=0.02)
        )
        check_mask(open_nifti(b.organ_map).shape, open_nifti(b.organ_map).affine, v, b.organ_map)
        assert np.array_equal(
            ADAPTERS["ct_rate"].open_volume(a.image).hu, load_checked(a.image)[0].hu
        ), "the fixed release is in HU already"
    with pytest.raises(
        ValueError, match="none of .* cases could be prepared.*nothing is darker than"
    ):
        prepare_cases(first, tmp_path / "v", tmp_path / "o", HOW, organs)
    v.hu += np.int16(first.intercept.iloc[0])
    assert any("applied twice" in str(f) for f in check_volume(v))


def csvs(folder):
    return [
        f"{folder}/{s}_{k}.csv"
        for s in ("train", "validation")
        for k in [*radgenome.FILES.values(), "region_report"]
    ]


KINDS = dict(
    own=[
        "cases.csv",
        "images/p0001/p0001_1.nii.gz",
        "images/p0002/p0002_1/0011.dcm",
        "organs/p0001_1.nii.gz",
    ],
    ct_rate=[
        "dataset/radiology_text_reports/train_reports.csv",
        "dataset/radiology_text_reports/validation_reports.csv",
        "dataset/multi_abnormality_labels/train_predicted_labels.csv",
        "dataset/multi_abnormality_labels/valid_predicted_labels.csv",
        "dataset/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz",
        "dataset/ts_seg/ts_total/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz",
        "dataset/metadata/no_chest_train.txt",
    ],
    first=["dataset/metadata/train_metadata.csv", "dataset/metadata/validation_metadata.csv"],
    radgenome=csvs("dataset/radgenome_files"),
    ctrg=["CTRG-Chest-548K.json", "images/101.nii.gz"],
)
FREE = {
    ("ct_rate", "dataset/metadata/no_chest_train.txt"): (
        "deleted",
        "truncated",
    ),  # where it is there; empty here
    ("ct_rate", "dataset/ts_seg/ts_total/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"): (
        "deleted",
    ),  # the table says that there is none
    ("ct_rate", "dataset/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz"): ("deleted",),
}  # CT-RATE's splits are what lies in the folders


def harm(f, how):
    if how == "deleted":
        f.unlink()
    elif how == "text":
        f.write_text("The heart is normal.\n" * 200)
    else:
        f.write_bytes(f.read_bytes()[: f.stat().st_size * 6 // 10])


@pytest.mark.parametrize("how", ["deleted", "truncated", "text"])
@pytest.mark.parametrize("name, file", [(n, f) for n in NAMES for f in KINDS[n]])
def test_a_harmed_file_is_named(name, file, how, minis, tmp_path, capsys):
    if how in FREE.get((name, file), ()):
        return
    shutil.copytree(minis[name].parent, tmp_path / "all")
    root = tmp_path / "all" / name
    harm(root / file, how)
    if file.endswith(".csv") and name in ("ct_rate", "radgenome", "first") or file.endswith(".txt"):

        def run():
            return (lambda tb: (*tb, {r["case"] for r in tb[1].rows}))(ADAPTERS[name].read(root))
    else:

        def run():
            return through(name, root, tmp_path)

    try:
        left = run()[2]
    except (ValueError, FileNotFoundError) as e:
        assert type(e) in (ValueError, FileNotFoundError), f"{type(e).__name__}: {e}"
        assert Path(file).stem.split(".")[0] in str(e) or str(root) in str(e), str(e)
        return
    if how == "truncated" and file.endswith(".csv") and not left:  # within the last field
        assert f"{Path(file).name}: the last line does not end" in capsys.readouterr().err
        return
    assert left, "nothing was said"
    if not file.endswith((".csv", ".json")):
        assert any(Path(file).name.split(".")[0] in c or c in file for c in left), left


def test_a_deleted_volume_is_not_asked_about(minis, tmp_path):
    """RadGenome names the missing volume: out of the table by name, and an error where its
    questions are asked"""
    shutil.copytree(minis["radgenome"].parent, tmp_path / "all")
    next((tmp_path / "all/ct_rate").rglob("train_2_a_1.nii.gz")).unlink()
    for f in (tmp_path / "all/ct_rate/dataset").rglob("train_2_a_1.nii.gz"):
        f.unlink()
    t, bad = ADAPTERS["radgenome"].read(tmp_path / "all/radgenome")
    assert [r["case"] for r in bad.rows] == ["train_2_a_1"]
    with pytest.raises(ValueError, match="train_2_a_1"):
        ADAPTERS["radgenome"].read_questions(tmp_path / "all/radgenome", t)
    assert len(
        ADAPTERS["radgenome"].read_questions(tmp_path / "all/radgenome", t, ["train_2_a_1.nii.gz"])
    )


def test_same_seed_same_bytes(minis, tmp_path):
    for name in NAMES:
        again = miniature(name, tmp_path / name)
        for f in minis[name].parent.rglob("*"):
            if f.is_file():
                assert (
                    f.read_bytes()
                    == (again.parent / f.relative_to(minis[name].parent)).read_bytes()
                ), f
    other = miniature("own", tmp_path / "other", seed=4)
    assert (other / "cases.csv").read_bytes() != (minis["own"] / "cases.csv").read_bytes()


def test_cohorts_hold_different_patients(minis):
    "Save RadGenome-ChestCT, which asks about CT-RATE's"
    words = {
        n: set(ADAPTERS[n].read(minis[n])[0].findings)
        for n in ("own", "ct_rate", "ctrg", "radgenome")
    }
    assert (
        not words["own"] & words["ct_rate"]
        and not words["own"] & words["ctrg"]
        and not words["ct_rate"] & words["ctrg"]
    )
    assert words["radgenome"] == words["ct_rate"]


def test_nothing_of_the_patient_goes_through(minis, tmp_path):
    t, made, _ = through("own", minis["own"], tmp_path)
    assert "Nobody" not in t.to_csv() and not [c for c in t if c == "name"]
    for f in tmp_path.rglob("*"):
        if f.is_file() and f.suffix != ".csv":
            assert (
                b"Nobody" not in f.read_bytes() and str(minis["own"]).encode() not in f.read_bytes()
            )


def test_pictures_as_published(tmp_path):
    "A scan of CTRG as a folder of JPG at the assumed spacing"
    small = dict(size=(48, 48, 24), spacing=(4.5, 4.5, 9.0))  # fewer slices
    ADAPTERS["ctrg"].write(tmp_path / "ctrg", 3, 1, 0, pictures=1, **small)
    t, bad = ADAPTERS["ctrg"].read(tmp_path / "ctrg")
    v, _ = load_checked(t.image[0], ADAPTERS["ctrg"].source)
    assert (
        v.facts["format"] == "pictures"
        and np.allclose(v.spacing, (0.7, 0.7, 1.0))
        and v.axes == "LPS"
        and len(bad) == 0
    )
    ADAPTERS["ctrg"].write(tmp_path / "nifti/ctrg", 3, 1, 0, **small)
    same = standardize(
        load_checked(
            ADAPTERS["ctrg"].read(tmp_path / "nifti/ctrg")[0].image[0], ADAPTERS["ctrg"].source
        )[0],
        (14, 14, 14),
    ).hu.astype(float)
    mine = standardize(v, (14, 14, 14)).hu.astype(float)
    assert (
        all(abs(a - b) <= 1 for a, b in zip(same.shape, mine.shape))
        and abs(same.mean() - mine.mean()) < 40
    )


@pytest.mark.parametrize(
    "text, parts",
    [
        ("IMPRESSION: Normal.", ("", "Normal.")),
        ("Heart normal.", ("Heart normal.", "")),
        ("FINDINGS: Heart normal.\r\nCONCLUSIONS:\r\nNormal.", ("Heart normal.", "Normal.")),
        ("No change in impression of the spleen.", ("No change in impression of the spleen.", "")),
        ("Findings\nClear.\n  impression :  Clear.", ("Clear.", "Clear.")),
    ],
)
def test_reports_are_split_at_a_heading(text, parts):
    assert own.split_report(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n",
        "case,image\nx,y\n",
        "case,image,patient\n",
        "case,image,patient,report\n",
        "case,image,patient,report\na,b\n",
        'case,image,patient,report\n"a,b,c,d\n',
        "\xff\xfe",
    ],
)
def test_tables_that_are_none(text, tmp_path):
    (tmp_path / "cases.csv").write_text(text, encoding="latin1")
    with pytest.raises(ValueError) as e:
        ADAPTERS["own"].read(tmp_path)
    assert type(e.value) in (ValueError, own.NoUsableCaseError) and "cases.csv" in str(e.value)


def test_both_spellings_of_a_scan_folder(minis, tmp_path):
    shutil.copytree(minis["first"], tmp_path / "first")
    for f in list((tmp_path / "first/dataset/train").glob("*/*_a")):
        f.rename(f.with_name(f.name.replace("_a", "a")))
    t, bad = ADAPTERS["ct_rate"].read(tmp_path / "first")
    assert (
        len(t) == len(ADAPTERS["ct_rate"].read(minis["first"])[0])
        and len(bad) == 0
        and t.organ_map.str.len().min() > 0
    )
    ADAPTERS["ct_rate"].open_volume(t.image[0])


@pytest.mark.parametrize(
    "text, given",
    [
        *[
            (t, 0)
            for t in (
                "Non-contrast images were taken in the axial plane.",
                "1.5 mm thick noncontrast sections.",
                "NON CONTRAST",
                "Non\u2010contrast CT.",
                "Unenhanced CT of the chest.",
                "Non-enhanced sections.",
                "Without contrast.",
                "Without IV contrast",
                "Images were taken without the use of intravenous contrast material.",
                "Without contrast enhancement.",
                "No contrast was given.",
                "No IV contrast agent.",
                "Contrast material was not given.",
                "IV contrast could not be administered.",
                "Contrast-enhanced images were not obtained.",
                "Not contrast-enhanced.",
                "In the absence of IV contrast, vessels are judged within limits.",
                "Without IV contrast. With oral contrast.",
                "Without IV and oral contrast.",
                "Without i.v. contrast.",
            )
        ],
        *[
            (t, 1)
            for t in (
                "Drawn by a program. With contrast.",
                "With IV contrast.",
                "With intravenous contrast material.",
                "Contrast-enhanced CT.",
                "Contrast enhanced sections.",
                "After the administration of IV contrast.",
                "Following i.v. contrast, sections of 1.5 mm.",
                "IV contrast, 80 ml.",
                "Contrast agent was given.",
                "Post-contrast images.",
                "With oral and intravenous contrast.",
                "IV and oral contrast.",
                "Without interruption, with contrast.",
                "CONTRAST-ENHANCED thorax; no complication.",
            )
        ],
        *[
            (t, None)
            for t in (
                "",
                "Drawn by a program.",
                "Axial sections of 1.5 mm.",
                "With and without contrast.",
                "Without and with IV contrast.",
                "Before and after contrast.",
                "Pre- and post-contrast images.",
                "Non-contrast images, then contrast-enhanced images.",
                "With oral contrast.",
                "With high contrast resolution.",
                "Pulmonary angiography.",
            )
        ],
    ],
)
def test_contrast_as_reports_tell_it(text, given):
    assert ct_rate.parse_contrast(text) == given and type(ct_rate.parse_contrast(text)) is type(
        given
    )


@pytest.mark.parametrize("name", ["ct_rate", "first"])
def test_kernels_where_metadata_says_none(name, minis, tmp_path, capsys):
    """A column or a row that is not there empties kernels and nothing else; a table that is cut
    off is named"""
    shutil.copytree(minis[name], tmp_path / name)
    whole, f = (
        ADAPTERS["ct_rate"].read(tmp_path / name)[0],
        tmp_path / name / "dataset/metadata/train_metadata.csv",
    )
    t = pd.read_csv(f)
    t.drop(columns="ConvolutionKernel").to_csv(f, index=False)
    less, bad = ADAPTERS["ct_rate"].read(tmp_path / name)
    assert (
        "train_metadata.csv has no column ConvolutionKernel" in capsys.readouterr().err
        and len(bad) == 0
    )
    assert (less.kernel == "").tolist() == less.case.str.startswith("train").tolist() and less.drop(
        columns="kernel"
    ).equals(whole.drop(columns="kernel"))
    t[1:].to_csv(f, index=False)
    less, bad = ADAPTERS["ct_rate"].read(tmp_path / name)
    if name == "ct_rate":
        assert (
            len(bad) == 0
            and less.kernel[0] == ""
            and less.kernel[1:].tolist() == whole.kernel[1:].tolist()
        )
    else:
        assert [r["case"] for r in bad.rows] == ["train_1_a_1.nii.gz"]
    f.write_bytes(f.read_bytes()[:-40])
    with pytest.raises(ValueError, match="train_metadata.csv"):
        ADAPTERS["ct_rate"].read(tmp_path / name)
