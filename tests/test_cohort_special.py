"Cohorts whose layout is unlike the others': MR frames, folders of pictures, MATLAB masks, abdomens"

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from asap.core import Quarantine
from asap.data import volumes
from asap.data.adapter import get_cohort
from asap.data.checks import check_mask, load_checked
from asap.data.prepare import prepare_cases
from asap.data.split_files import apply_splits, read_split_files
from asap.data.table import check_table, label_columns

SMALL = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))
HOW = dict(spacing=[7.0, 7.0, 14.0], hu=[-1000, 1000])
KEYS = ["acdc", "acdc-released", "cc_ccii", "fumpe", "btcv", "btcv-released"]
GOLDEN = {  # cases, patients, labels, cases a split
    "acdc": (12, 6, [], dict(train=8, test=4)),
    "acdc-released": (12, 6, [], dict(train=10, test=2)),
    "cc_ccii": (6, 6, [2, 2, 2], dict(train=4, test=2)),
    "fumpe": (6, 6, [], dict(train=5, test=1)),
    "btcv": (6, 6, [], dict(train=4, test=2)),
    "btcv-released": (6, 6, [], dict(train=4, test=2)),
}


def adapter(key):
    return get_cohort(key.split("-")[0])


def make(key, root, seed=0, train=4, test=2):
    more = dict(layout="released") if key.endswith("released") else {}
    adapter(key).write(
        root, seed=seed, n_train=train, n_test=test, **SMALL, second_recon_prob=0.0, **more
    )
    return root


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    "A miniature in each layout, made once; never changed"
    return {k: make(k, tmp_path_factory.mktemp("raw") / k) for k in KEYS}


@pytest.fixture
def copy(raw, tmp_path):
    "A miniature that may be changed: files are links until they are replaced"

    def build(key):
        for f in raw[key].rglob("*"):
            if f.is_file():
                to = tmp_path / key / f.relative_to(raw[key])
                to.parent.mkdir(parents=True, exist_ok=True)
                to.symlink_to(f)
        return tmp_path / key

    return build


@pytest.mark.parametrize("key", KEYS)
def test_golden_counts(key, raw):
    m = adapter(key)
    t, bad = m.read(raw[key])
    found = (
        len(t),
        t.patient.nunique(),
        [int(t[c].sum()) for c in label_columns(t)],
        t.split.value_counts().to_dict(),
    )
    assert found == GOLDEN[key] and not len(bad)
    assert (
        label_columns(t) == [f"label:{n}" for n in m.labels]
        and m.has_organ_maps is False
        and isinstance(m.unverified, str)
    )
    assert t.groupby("patient").split.nunique().max() == 1 and check_table(t, key) is t
    assert not t.case.str.contains(r"[./]").any()


@pytest.mark.parametrize("key", KEYS)
def test_read_prepare_and_lay_the_target_on_the_image(key, raw, tmp_path):
    m = adapter(key)
    t, bad = m.read(raw[key])
    t = t.groupby("split").head(2)
    made = prepare_cases(
        t,
        tmp_path / "v",
        tmp_path / "o",
        HOW,
        source=m.source,
        bad=bad,
        quarantine=tmp_path / "q.csv",
    )
    assert made.case.tolist() == t.case.tolist() and not len(pd.read_csv(tmp_path / "q.csv"))
    for row, new in zip(t.itertuples(), made.itertuples()):
        std, v = volumes.read(new.image), volumes.read(row.image, m.source)
        assert (
            std.hu.shape == volumes.standard_grid(v.hu.shape, v.affine, HOW["spacing"])[0]
            and std.axes == "RAS"
            and np.allclose(std.spacing, HOW["spacing"])
        )
        assert std.hu.dtype == np.int16 and -1000 <= std.hu.min() < std.hu.max() <= 1000
        if m.targets:
            mask, affine = m.read_target(row.target_map)
            check_mask(mask.shape, affine, v, row.target_map)
            assert set(np.unique(mask)) <= {0, *m.targets} and (mask > 0).any()


def outcome(
    key, root, f
) -> str:  # what a person is told of a damaged file, from `read` to the masks
    m, bad, said = adapter(key), Quarantine(), []
    try:
        t, bad = m.read(root)
    except (FileNotFoundError, ValueError) as e:
        return str(e)
    for row in t[
        [str(f) == i or str(f.parent) == i or str(f) == m for i, m in zip(t.image, t.target_map)]
    ].itertuples():
        try:
            v, _ = load_checked(row.image, m.source)
            if m.targets:
                mask, affine = m.read_target(row.target_map)
                check_mask(mask.shape, affine, v, row.target_map)
        except (FileNotFoundError, ValueError) as e:
            said.append(f"{row.case}: {e}")
    return " | ".join([f"{r['case']}: {r['reason']}" for r in bad.rows] + said)


KINDS = [
    ("acdc", "training/patient002/Info.cfg", "patient002"),
    ("acdc", "training/patient002/patient002_frame01.nii.gz", "patient002_frame01"),
    ("acdc", "testing/patient101/patient101_frame01_gt.nii.gz", "patient101_frame01"),
    ("acdc-released", "dataset.json", "dataset"),
    ("acdc-released", "imagesTr/patient002_frame01_0000.nii.gz", "patient002_frame01"),
    ("acdc-released", "labelsTr/patient002_frame01.nii.gz", "patient002_frame01"),
    ("cc_ccii", "CP/*/*/0009.png", "0009.png|slice 8"),
    ("fumpe", "CT_scans/PAT002/D0009.dcm", "PAT002"),
    ("fumpe", "GroundTruth/PAT002.mat", "PAT002"),
    ("btcv", "RawData/Training/img/img0002.nii.gz", "btcv_002"),
    ("btcv", "RawData/Training/label/label0002.nii.gz", "btcv_002"),
    ("btcv-released", "dataset_5.json", "dataset"),
    ("btcv-released", "imagesTr/btcv_002.nii.gz", "btcv_002"),
    ("btcv-released", "labelsTr/btcv_002.nii.gz", "btcv_002"),
]


@pytest.mark.parametrize("fault", ["deleted", "truncated", "text", "empty"])
@pytest.mark.parametrize(
    "key, name, told", KINDS, ids=[f"{k}:{n.split('/')[-1]}" for k, n, _ in KINDS]
)
def test_a_damaged_file_is_named(key, name, told, fault, copy):
    root = copy(key)
    f = sorted(root.glob(name))[0]
    whole = f.read_bytes()
    f.unlink()
    if fault != "deleted":
        f.write_bytes(
            {"truncated": whole[: len(whole) // 2], "text": b"Not found\n", "empty": b""}[fault]
        )
    said = outcome(key, root, f)
    if name.endswith("Info.cfg") and fault == "truncated" and not said:
        return  # half of it still names both frames
    assert any(word in said for word in told.split("|")), said or "nothing was said"


@pytest.mark.parametrize(
    "key, folder",
    [
        ("acdc", "testing"),
        ("acdc", "training"),
        ("acdc-released", "imagesTr"),
        ("cc_ccii", "NCP"),
        ("fumpe", "CT_scans"),
        ("fumpe", "GroundTruth"),
        ("btcv", "RawData/Training/img"),
        ("btcv", "RawData/Training/label"),
        ("btcv-released", "labelsTr"),
    ],
)
def test_a_missing_folder_is_an_error_that_names_it(key, folder, copy):
    root = copy(key)
    (root / folder).rename(root / "elsewhere")
    with pytest.raises((FileNotFoundError, ValueError), match=Path(folder).name):
        adapter(key).read(root)


@pytest.mark.parametrize("key", ["acdc", "cc_ccii", "fumpe", "btcv"])
def test_nothing_there_is_an_error_that_says_what_was_expected(key, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected|is there"):
        adapter(key).read(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"training": [{"image": "a"}], "testing": []}', '{"training": 3, "testing": 4}'],
)
@pytest.mark.parametrize("key", ["acdc-released", "btcv-released"])
def test_a_list_of_another_kind_is_named(key, text, copy):
    root = copy(key)
    f = next(root.glob("dataset*.json"))
    f.unlink()
    f.write_text(text)
    with pytest.raises(ValueError, match=f"{f.name}: no list"):
        adapter(key).read(root)


@pytest.mark.parametrize("key", KEYS)
def test_same_seed_same_bytes_and_other_seed_other_patients(key, tmp_path):
    def bytes_of(root):
        return {
            f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()
        }

    a, b, c = (
        bytes_of(make(key, tmp_path / n / key, seed, 1, 1))
        for n, seed in (("a", 5), ("b", 5), ("c", "six"))
    )
    assert a == b and a != c and not [n for n in a if Path(n).name.startswith(".")]


def test_cohorts_hold_different_patients(raw):
    def small(v):
        return volumes.standardize(v, (14.0, 14.0, 14.0)).hu[8:16, 8:16, 8:16]

    fumpe, btcv = (volumes.read(adapter(k).read(raw[k])[0].image[0]) for k in ("fumpe", "btcv"))
    assert not np.array_equal(small(fumpe), small(btcv))


def test_acdc_names_the_patients_that_leak(raw, capsys):
    """The released list is applied with the leak named and mended: patients on both sides are
    tested on alone"""
    m = adapter("acdc")
    t, bad = m.read(raw["acdc-released"])
    lists = read_split_files(raw["acdc-released"] / "dataset.json")
    both = set.intersection(
        *({n.split("_")[0] for n in lists.name[lists.split == s]} for s in ("train", "test"))
    )
    split = check_table(apply_splits(t, lists, bad, "acdc"), "acdc")
    said = capsys.readouterr().err
    assert both and all(p in said for p in both) and "the validation list is the test list" in said
    assert {r["case"].split("_")[0] for r in bad.rows} == both and not both & set(
        split.patient[split.split == "train"]
    )


def test_acdc_does_without_the_whole_beat(copy, raw):
    root, m = copy("acdc"), adapter("acdc")
    for f in root.rglob("*_4d.nii.gz"):
        f.unlink()
    assert m.read(root)[0].case.tolist() == m.read(raw["acdc"])[0].case.tolist()


def test_the_list_with_most_to_train_on_is_read(copy):
    root = copy("btcv-released")
    (root / "dataset_10.json").write_text(
        '{"training": [{"image": "imagesTr/btcv_001.nii.gz", '
        '"label": "labelsTr/btcv_001.nii.gz"}], "testing": []}'
    )
    assert len(adapter("btcv").read(root)[0]) == 6


def test_fumpe_mask_faults(copy):
    from scipy.io import savemat

    root, m = copy("fumpe"), adapter("fumpe")
    f = root / "GroundTruth/PAT001.mat"
    for said, expected in (
        (dict(Other=np.zeros((3, 3, 3))), "no variable `Mask`"),
        (dict(Mask=np.zeros((3, 3))), "expected rows, columns, slices"),
        (dict(Mask=np.zeros((3, 3, 3))), "is it of another scan"),
    ):
        f.unlink()
        savemat(f, said)
        with pytest.raises(ValueError, match=expected):
            m.read_target(f)


def test_fumpe_left_out_patients_are_flagged(copy):
    root = copy("fumpe")
    (root / "CT_scans/PAT001").rename(root / "CT_scans/PAT024")
    (root / "GroundTruth/PAT001.mat").rename(root / "GroundTruth/PAT024.mat")
    t, _ = adapter("fumpe").read(root)
    assert t.case[~t.released].tolist() == ["PAT024"]


def test_btcv_has_no_more_cases_than_its_owners(tmp_path):
    with pytest.raises(ValueError, match="24 and 6"):
        adapter("btcv").write(tmp_path, 0, 25, 1)
