"""What owners and public copies really lay out: lists, archives, names and words that stand for
nothing"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from files import dicom, nifti

from asap.data.adapter import get_cohort
from asap.data.checks import load_checked
from asap.data.cohorts import radgenome
from asap.data.layouts import as_text, find_below, find_nifti
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("owners", 0), (48, 48, 24), (7.0, 7.0, 14.0), present=[])
SMALL = dict(size=(48, 48, 24), spacing=(7, 7, 14))


def scan(path):
    return nifti(C.hu, C.affine, path)


def mask(path, value=1):
    return nifti(((C.labels == 5) * value).astype(np.uint8), C.affine, path)


@pytest.mark.parametrize(
    "text", ["Not given.", "not given", " N/A ", "n.a.", "None.", "nan", "-", "", "Not specified."]
)
def test_words_that_stand_for_no_text(text):
    assert as_text(text) == "" and as_text(np.nan) == "" and as_text(None) == ""


@pytest.mark.parametrize(
    "text", ["No nodule.", "None of the nodes is enlarged.", "Not enlarged.", "Normal.", "NAD"]
)
def test_words_that_say_something(text):
    assert as_text(f" {text} ") == text


# CT-RATE


@pytest.fixture(scope="module")
def rate(tmp_path_factory):
    root = tmp_path_factory.mktemp("rate") / "ct_rate"
    get_cohort("ct_rate").write(root, 0, 3, 2, second_recon_prob=0, **SMALL)
    return root


LISTED = {  # file, its text
    "metadata": ("metadata/no_chest_train.txt", "train/train_2/train_2_a/train_2_a_1.nii.gz\n"),
    "old place": ("no_chest_train.txt", "train_2_a_1.nii.gz"),
    "beside reports": ("radiology_text_reports/no_chest_train.txt", "train_2_a_1.nii.gz\r\n"),
    "backslashes": ("metadata/no_chest_train.txt", "train\\train_2\\train_2_a\\train_2_a_1.nii.gz"),
    "a scan": ("metadata/no_chest_train.txt", "train_2_a\n"),
}


@pytest.mark.parametrize("how", LISTED)
def test_a_volume_on_a_list_stays_out(how, rate, tmp_path):
    root = shutil.copytree(rate, tmp_path / "ct_rate", symlinks=True)
    file, text = LISTED[how]
    (root / "dataset" / file).write_text(text)
    (root / "dataset/metadata/no_chest_valid.txt").write_text("valid_2_a_1.nii.gz")
    t, _ = get_cohort("ct_rate").read(root)
    assert t.case.tolist() == ["train_1_a_1", "train_3_a_1", "valid_1_a_1"]


def test_no_text_and_no_spacing_in_the_tables_of_ct_rate(rate, tmp_path, capsys):
    root = shutil.copytree(rate, tmp_path / "ct_rate")
    reports = root / "dataset/radiology_text_reports/train_reports.csv"
    t = pd.read_csv(reports)
    t.loc[0, "Impressions_EN"], t.loc[1, "Findings_EN"] = "Not given.", "not given"
    t.to_csv(reports, index=False)
    metadata = root / "dataset/metadata/train_metadata.csv"
    pd.read_csv(metadata).assign(ZSpacing=[np.nan, 14, 14]).to_csv(metadata, index=False)
    read, bad = get_cohort("ct_rate").read(root)
    assert read.impression[0] == "" and read.findings[1] == "" and read.findings[0] and not len(bad)
    assert "no ZSpacing for 1 of 3 volumes: the spacing of their headers" in capsys.readouterr().err


# RadGenome-ChestCT

HEAD = dict(radgenome.TABLE_COLUMNS)


def asked(kind, *rows):
    t = pd.DataFrame(rows, columns=HEAD[kind][1:]).assign(case="c")
    return [(q["question"], q["answer"]) for q in radgenome._ask(kind, t)]


def test_a_question_keeps_its_region():
    got = asked("presence", ("lung", "nodule", "Yes."), ("thyroid", "nodule", "No."))
    assert got == [
        ("Is there nodule in the lung?", "yes"),
        ("Is there nodule in the thyroid?", "no"),
    ]
    got = asked("size", ("left lung", "nodule", "8 mm"), ("right lung", "nodule", "1.5 cm"))
    assert [a for _, a in got] == ["8 mm", "15 mm"] and len({q for q, _ in got}) == 2
    assert asked("presence", ("", "nodule", "Yes.")) == [("Is there nodule?", "yes")]


def test_repeats_are_one_question_and_contradictions_none(capsys):
    rows = [("lung", "nodule", "Yes."), ("lung", "nodule", "yes"), ("lung", "mass", "No.")]
    assert len(asked("presence", *rows)) == 2
    rows += [("lung", "mass", "Yes.")]
    assert asked("presence", *rows) == [("Is there nodule in the lung?", "yes")]
    assert "1 questions (presence) are answered yes and no" in capsys.readouterr().err


def test_several_right_answers_count():
    got = asked(
        "location", ("left lung", "nodule"), ("right lung", "nodule"), ("left lung", "nodule")
    )
    assert got == [("Where is it: nodule?", "left lung/right lung")]
    got = asked("abnormality", ("lung", "nodule/scar"), ("lung", "no findings"), ("lung", "scar"))
    assert got == [("What abnormality is seen here: lung?", "nodule/scar")]


@pytest.mark.parametrize(
    "given, mm",
    [
        ("12 mm", "12 mm"),
        ("1.2 cm", "12 mm"),
        ("1,2 cm", "12 mm"),
        ("2.5x3 cm", "25x30 mm"),
        ("1 cm x 8 mm", "10 mm x 8 mm"),
        ("up to 3 cm and 4 mm", "up to 30 mm and 4 mm"),
        ("4-5 cm", "40-50 mm"),
    ],
)
def test_sizes_are_in_mm(given, mm):
    assert radgenome._normalize_answer("size", given) == mm


# layouts of archives and of public copies


@pytest.mark.parametrize("above", ["", "database", "ACDC/database"])
@pytest.mark.parametrize("form", ["{}.nii.gz", "{}.nii", "{}.nii/frame.nii"])
def test_acdc_as_archives_unpack(above, form, tmp_path):
    for folder, patient in (("training", "patient001"), ("testing", "patient101")):
        d = tmp_path / above / folder / patient
        for f in ("frame01", "frame09"):
            for name in (f"{patient}_{f}", f"{patient}_{f}_gt"):
                nifti(C.hu, C.affine, d / form.format(name))
        (d / "Info.cfg").write_text("ED: 1\nES: 9\nGroup: NOR\n")
    t, bad = get_cohort("acdc").read(tmp_path)
    assert len(t) == 4 and not len(bad) and set(t.split) == {"train", "test"}


def test_acdc_elsewhere_is_pointed_to(tmp_path):
    with pytest.raises(FileNotFoundError, match="database/"):
        get_cohort("acdc").read(tmp_path)


NAMES = ["img0001", "btcv_001", "img0001_0000", "BTCV-1", "1"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_list_of_btcv(name, tmp_path):
    pair = dict(image=f"imagesTr/{name}.nii.gz", label="labelsTr/label0001.nii.gz")
    nifti(C.hu, C.affine, tmp_path / pair["image"])
    mask(tmp_path / pair["label"])
    lists = dict(training=[pair], test=["imagesTs/img0061.nii.gz"])
    (tmp_path / "dataset_0.json").write_text(json.dumps(lists))
    t, bad = get_cohort("btcv").read(tmp_path)
    assert t.case.tolist() == ["btcv_001"] and not len(bad)


def test_the_second_image_of_a_study_of_inspect(tmp_path):
    a = get_cohort("inspect")
    a.write(tmp_path, 0, 1, 1, **SMALL)
    f = tmp_path / "study_mapping_20250611.tsv"
    t = pd.read_csv(f, sep="\t")
    second = t.iloc[[0]].assign(image_id="PE00000002")
    pd.concat([t, second]).to_csv(f, sep="\t", index=False)
    shutil.copy(next((tmp_path / "CTPA").iterdir()), tmp_path / "CTPA/PE00000002.nii.gz")
    shutil.copy(next((tmp_path / "CTPA").iterdir()), tmp_path / "CTPA/PE00000003.nii.gz")
    read, bad = a.read(tmp_path)
    why = {r["case"]: r["reason"] for r in bad.rows}
    assert len(read) == 3 and f"first image, {t.image_id[0]}" in why["PE00000002"]
    assert why["PE00000003"] == "no row in the table study_mapping"


def rex(root, **files):
    "Lists of one volume each; its masks have two channels"
    nifti(C.hu, C.affine, root / "ct_rate/dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz")
    (root / "ct_rate/dataset/valid_fixed").mkdir()
    masks = np.zeros((2, *C.hu.shape), np.uint8)
    nifti(masks, np.eye(4), root / "rex_grounding_ct/segmentations/train_1_a_1.nii.gz")
    for file, n in files.items():
        e = dict(
            name="train_1_a_1.nii.gz",
            findings={str(k): f"{file} {k}." for k in range(n)},
            categories={str(k): "2d" for k in range(n)},
        )
        to = root / "rex_grounding_ct" / f"{file}.json"
        to.write_text(json.dumps(dict(train=[], val=[e], test=[])))
    return get_cohort("rex_grounding_ct").read(root / "rex_grounding_ct")


CHALLENGE = "MICCAI_challenge_dataset"


@pytest.mark.parametrize(
    "files, chosen",
    [
        ({CHALLENGE: 2}, CHALLENGE),
        ({"dataset": 2}, "dataset"),
        ({CHALLENGE: 2, "dataset": 1}, CHALLENGE),
        ({CHALLENGE: 3, "dataset": 2}, "dataset"),  # the first has a channel too many
    ],
)
def test_the_file_of_the_challenge(files, chosen, tmp_path):
    t, bad = rex(tmp_path, **files)
    assert len(t) == 2 and not len(bad) and t.sentence[0] == f"{chosen} 0."
    (tmp_path / "rex_grounding_ct/dataset.json").unlink(missing_ok=True)


@pytest.mark.parametrize("above", ["", "covid19-ct-scans"])
@pytest.mark.parametrize("copy", ["owners", "kaggle", "in folders"])
def test_copies_of_covid_ct_seg(copy, above, tmp_path):
    d, kaggle = tmp_path / above, copy != "owners"
    folders = ("ct_scans", "lung_mask", "infection_mask") if kaggle else get_folders()
    form = {"owners": "{0}.nii.gz", "kaggle": "{0}.nii", "in folders": "{0}.nii/{0}.nii"}[copy]
    for n, folder in enumerate(folders):
        org = "org_" if kaggle and n == 0 else ""
        nifti(C.hu, C.affine, d / folder / form.format(f"coronacases_{org}001"))
    nifti(C.hu, C.affine, d / folders[0] / "radiopaedia_org_covid-19-pneumonia-10_85902_0.nii")
    t, bad = get_cohort("covid_ct_seg").read(tmp_path)
    assert t.case.tolist() == ["coronacases_001"] and [r["case"] for r in bad.rows] == [
        "radiopaedia_10_85902_0"
    ]


def get_folders():
    from asap.data.cohorts.covid_ct_seg import FOLDERS

    return FOLDERS


def test_what_the_converter_of_rider_writes(tmp_path):
    d = tmp_path / "RIDER-1/2.25.1"
    scan(d / "image.nii.gz")
    for name in ("auto", "man"):
        mask(d / f"mask_GTVp_test_{name}.nii.gz", 255)
    dicom(C.hu, C.affine, tmp_path / "RIDER-2/09-20-2006/100.000000-24533")
    a = get_cohort("rider")
    t, bad = a.read(tmp_path)
    assert t.target_map.str.contains("_man").all() and set(
        np.unique(a.read_target(t.target_map[0])[0])
    ) == {0, 1}
    assert "holds DICOM" in bad.rows[0]["reason"] and "dcmrtstruct2nii" in bad.rows[0]["reason"]


# edge slices of RSPECT


@pytest.fixture
def exams(tmp_path):
    get_cohort("rspect").write(tmp_path, 0, 0, 3, **SMALL)
    found = map(Path, get_cohort("rspect").read(tmp_path)[0].image)
    order = [sorted(d.iterdir(), key=lambda f: float(rspect_position(f))) for d in found]
    return tmp_path, order


def rspect_position(f):
    import pydicom

    return pydicom.dcmread(f, stop_before_pixels=True).ImagePositionPatient[2]


@pytest.mark.parametrize("at, kept", [(0, True), (-1, True), (11, False)])
@pytest.mark.parametrize("how", ["empty", "words", "cut"])
def test_a_slice_at_the_edge_that_cannot_be_read(at, kept, how, exams, capsys):
    root, order = exams
    f = order[0][at]
    damage = dict(empty=b"", words=b"an error page", cut=f.read_bytes()[:700])
    f.write_bytes(damage[how])
    t, bad = get_cohort("rspect").read(root)
    assert (str(f.parent) in set(t.image)) == kept, [r["reason"] for r in bad.rows]
    if kept:
        v, found = load_checked(f.parent, get_cohort("rspect").source)
        assert v.hu.shape[2] == len(order[0]) - 1
        assert any(f.name in str(issue) for issue in found)


def test_a_small_slice_that_can_be_read(exams):
    import pydicom

    root, order = exams
    f = order[0][5]
    d = pydicom.dcmread(f)
    d.set_pixel_data(np.zeros_like(d.pixel_array), "MONOCHROME2", 16, generate_instance_uid=False)
    d.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    d.save_as(f)
    t, _ = get_cohort("rspect").read(root)
    assert str(f.parent) in set(t.image)


def test_folders_below(tmp_path):
    for d in ("x/y/training", "z"):
        (tmp_path / d).mkdir(parents=True)
    assert find_below(tmp_path, "training") == tmp_path / "x/y"
    (tmp_path / "z/training").mkdir()
    assert find_below(tmp_path, "training") == tmp_path
    assert find_nifti(tmp_path, "none") == tmp_path / "none.nii.gz"
