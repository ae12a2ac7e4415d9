"""Grounding: who hits on hand-made maps, strangers, intervals by patient, masks through both
releases of CT-RATE, and what is not there"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from asap.core import Quarantine, rng, write_json
from asap.data.cohorts import rex_grounding_ct as rex
from asap.data.cohorts.ct_rate import CTRATE
from asap.data.cohorts.rex_grounding_ct import ReXGroundingCT
from asap.data.crops import apply_crop, center_crop
from asap.data.table import save
from asap.data.volumes import resample, standardize
from asap.inference.ground import patch_dice, topk_patches
from asap.model.vit import patchify
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest
from asap.pretrain.pointing import (
    FOCAL_LESIONS,
    add_to_atlas,
    build_atlas,
    collect_targets,
    hit_patches,
    patch_coverage,
    read_lesions,
    read_targets,
    write_targets,
)
from asap.study.grounding import (
    build_sentence_queries,
    evaluate_grounding,
    label_groups,
    load_lesion_coverage,
    load_lesion_sentences,
    load_lesion_targets,
    negate_finding,
    score_pointing,
    shuffle_patients,
    summarize_hits,
)
from asap.study.page import render_grounding

SMALL, HOW = (
    dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0)),
    dict(size=(48, 48, 24), patch=(12, 12, 6), hu=(-1000, 1000)),
)

# four patches in a row; two patients, whose lesions lie in patch 0 and in patch 3
T = pd.DataFrame(
    [
        dict(case="a_1", patient="a", channel=0, sentence="A nodule.", label="Lung nodule"),
        dict(case="b_1", patient="b", channel=0, sentence="Nodules.", label="Lung nodule"),
    ]
)
SHARE, BODY = (
    np.array([[0.8, 0.1, 0, 0], [0, 0, 0, 0.4]]),
    np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool),
)


def played(own, stranger, deny, maps=None, share=SHARE) -> pd.DataFrame:
    "`score` of arms that point where they are told; regions are the patch pointed at"
    asked = build_sentence_queries(T, 0)
    point = np.array(
        [
            dict(own=own, shuffled_scan=stranger, negated=deny)[k][n]
            for k, n in zip(asked.kind, asked.row)
        ]
    )
    got = dict(point=point, region=np.eye(4, dtype=bool)[point], k=np.arange(len(asked)) % 3 + 1.0)
    return score_pointing(T, share, BODY, {} if maps is None else maps, asked, got)


def test_a_hit_is_its_own_sentence_on_its_own_mask():
    r = played([0, 3], [1, 1], [2, 2])
    assert (
        r.hit.tolist() == [1, 1]
        and r.shuffled_scan.tolist() == [0, 0]
        and r.negated.tolist() == [0, 0]
        and r.atlas.isna().all()
    )
    assert played([3, 0], [1, 1], [2, 2]).hit.tolist() == [0, 0]


def test_a_grazed_patch_does_not_count():
    assert played([1, 3], [1, 1], [2, 2]).hit.tolist() == [0, 1] and not hit_patches(SHARE)[0, 1]


def test_a_stranger_is_judged_by_the_mask_of_the_sentence():
    r = played([1, 1], [0, 0], [1, 1])
    assert r.shuffled_scan.tolist() == [1, 0], (
        "patch 0 is the first one's lesion: "
        "pointing at it on the second one's scan is what position alone gives"
    )


def test_a_denial_is_judged_by_the_mask_of_what_it_denies():
    assert played([1, 1], [1, 1], [0, 3]).negated.tolist() == [1, 1]


def test_a_guess_is_over_the_body():
    r = played([0, 3], [1, 1], [2, 2])
    np.testing.assert_allclose(r.random, [1 / 2, 1 / 3])
    np.testing.assert_allclose(r.dice_random, [2 * 0.9 / 2 / (1 + 0.9), 2 * 0.4 / 3 / (1 + 0.4)])


def test_the_atlas_is_of_its_label_and_of_train():
    train = np.array([[0, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], bool)
    maps = build_atlas(train, ["Lung nodule", "Lung nodule", "Emphysema", "Emphysema", ""])
    assert (
        maps["Lung nodule"].tolist() == [0, 0, 0, 2]
        and played([0, 0], [0, 0], [0, 0], maps).atlas.tolist() == [0, 1]
        and set(maps) == {"Lung nodule", "Emphysema"}
    )
    assert topk_patches(np.array([2, 5, 5, 1]), 1).argmax() == 1 and topk_patches(
        np.array([2, 5, 5, 1]), 3
    ).tolist() == [True, True, True, False]


def test_dice_is_that_of_the_voxels():
    r = rng("test dice")
    mask, region = r.random((5, 8, 8, 8)) > 0.6, r.random((5, 8)) > 0.5
    painted = np.stack([region.reshape(5, 2, 2, 2)]).repeat(4, 2).repeat(4, 3).repeat(4, 4)[0]
    voxels = 2 * (painted & mask).sum((1, 2, 3)) / (painted.sum((1, 2, 3)) + mask.sum((1, 2, 3)))
    np.testing.assert_allclose(patch_dice(region, patch_coverage(mask, (4, 4, 4))), voxels)


@pytest.mark.parametrize("n", [2, 3, 7, 50])
def test_nobody_is_his_own_stranger(n):
    t = pd.DataFrame(
        [
            dict(case=f"p{i}_{c}", patient=f"p{i}", sentence=f"s{i}{c}", label="")
            for i in range(n)
            for c in range(2)
        ]
    )
    for seed in range(5):
        q = build_sentence_queries(t, seed)
        q = q[q.kind == "shuffled_scan"]
        lender, asker = q.case.str.split("_").str[0], t.patient.loc[q.row].to_numpy()
        assert len(q) == len(t) and (lender != asker).all() and set(lender) == set(t.patient)
    assert build_sentence_queries(t, 0).equals(build_sentence_queries(t, 0)) and (
        n < 4 or shuffle_patients(t.patient, 0) != shuffle_patients(t.patient, 1)
    )


def test_one_patient_has_no_stranger_and_no_label_no_denial():
    assert (
        build_sentence_queries(T[:1].assign(label=""), 0).kind.tolist() == ["own"]
        and negate_finding("") == ""
    )
    assert all(negate_finding(n).lower().startswith(("no ", "there ")) for n in FOCAL_LESIONS)


def frame(n, patients, **columns):
    zero = dict.fromkeys(
        [
            "random",
            "atlas",
            "organ_atlas",
            "shuffled_scan",
            "negated",
            "dice",
            "dice_random",
            "dice_atlas",
            "dice_shuffled_scan",
            "extent",
            "k",
        ],
        0.0,
    )
    return pd.DataFrame(
        dict(zero, patient=patients, label="Lung nodule", hit=0.0) | columns, index=range(n)
    )


def test_intervals_are_paired_and_by_patient():
    hit = (rng("hits").random(120) < 0.5).astype(float)
    own = frame(120, [f"p{i}" for i in range(120)], hit=hit, atlas=hit)
    r = summarize_hits(own, 300, 0.95)
    assert (
        r["diff_atlas"] == r["diff_atlas_lo"] == r["diff_atlas_hi"] == 0
        and 0.1 < r["hit_rate_hi"] - r["hit_rate_lo"] < 0.25
    )
    again = summarize_hits(pd.concat([own] * 4), 300, 0.95)
    assert again["hit_rate_hi"] - again["hit_rate_lo"] == pytest.approx(
        r["hit_rate_hi"] - r["hit_rate_lo"]
    ), "the same patients four times know no more"
    assert np.isnan(summarize_hits(own.assign(negated=np.nan), 50, 0.95)["diff_negated"])


def test_the_four_are_pooled_and_the_others_stand_apart():
    g = label_groups(["Emphysema", "Atelectasis", "Lung nodule", ""], ["Emphysema"])
    assert list(g) == [
        "focal_lesions",
        "large_lesions",
        "Atelectasis",
        "Lung nodule",
        "Emphysema",
    ] and g["focal_lesions"] == ["Lung nodule", "Atelectasis"]


def digest(folder):
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(Path(folder).rglob("*"))
        if f.is_file()
    }


@pytest.fixture(scope="module", params=["fixed", "first"])
def tree(request, tmp_path_factory):
    "CT-RATE in either release, with masks beside it; the tree is as it was"
    data = tmp_path_factory.mktemp(request.param) / "data"
    CTRATE().write(data / "ct_rate", 3, 4, 3, **SMALL, second_recon_prob=0.5, release=request.param)
    before = digest(data / "ct_rate")
    ReXGroundingCT().write(data / "rex_grounding_ct", 3, 4, 3, **SMALL)
    assert digest(data / "ct_rate") == before
    return data


def test_masks_go_the_way_of_their_volume(tree):
    t, bad = ReXGroundingCT().read(tree / "rex_grounding_ct")
    assert len(bad) == 0 and len(t) > 8 and not t.duplicated(["case", "channel"]).any()
    cohort, _ = CTRATE().read(tree / "ct_rate")
    told, overlap = (
        dict(zip(cohort.case, cohort.findings)),
        lambda a, b: 2 * (a & b).sum() / (a.sum() + b.sum()),
    )
    close = []
    for r in t.itertuples():
        std = standardize(CTRATE().open_volume(r.image), SMALL["spacing"])
        split, i, *_ = r.case.split("_")
        c = synthesize_chest((3, split, int(i)), **SMALL)
        want = (
            resample(
                c.find(r.label).mask.astype(np.uint8),
                c.affine,
                std.hu.shape,
                std.affine,
                order=0,
                fill=0,
            )
            > 0
        )
        got = rex.read_masks(r.mask, r.image, [r.channel], std.hu.shape, std.affine)[0]
        close.append(overlap(got, want))
        assert max(overlap(np.flip(got, axis), want) for axis in range(3)) < close[-1], (
            r.case,
            r.label,
        )
        assert r.sentence in told[r.case]
    assert np.mean(close) > 0.9 and min(close) > 0.6, (
        "two grids of other spacing cost a thin lesion some voxels"
    )


def test_the_list_tells_the_truth(tree):
    for e in sum(json.loads((tree / "rex_grounding_ct/dataset.json").read_text()).values(), []):
        data = np.asarray(nib.load(tree / "rex_grounding_ct/segmentations" / e["name"]).dataobj)
        assert list(data.shape) == [len(e["findings"]), *e["shape"]] and data.dtype == np.uint8
        for k in e["findings"]:
            assert (data[int(k)] > 0).sum() == e["pixels"][k] and len(
                np.unique(data[int(k)])
            ) - 1 == e["entity_counts"][k]


@pytest.fixture
def edited(tree, tmp_path):
    "A copy of the list beside the same masks, to change"
    to = tmp_path / "rex_grounding_ct"
    to.mkdir()
    (to / "segmentations").mkdir()
    for f in (tree / "rex_grounding_ct/segmentations").iterdir():
        (to / "segmentations" / f.name).symlink_to(f)
    told = json.loads((tree / "rex_grounding_ct/dataset.json").read_text())

    def put(told):
        write_json(told, to / "dataset.json")
        return ReXGroundingCT().read(to, tree / "ct_rate")

    return told, put, to


def test_masks_that_the_owners_keep_are_passed_over(edited):
    told, put, to = edited
    held = told["train"].pop(0)
    (to / "segmentations" / held["name"]).unlink()
    told["test"] = [dict(name=held["name"], findings=held["findings"])]
    t, bad = put(told)
    assert len(bad) == 0 and held["name"].removesuffix(".nii.gz") not in set(t.case)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(name="lung_7.nii.gz"), "without the name of a CT-RATE volume"),
        (dict(findings={"one": "A nodule."}), "numbered findings"),
        (dict(findings={"0": "A nodule.", "9": "Effusion."}), "finding 9 is listed"),
        (dict(name="train_77_a_1.nii.gz"), "train_77_a_1.nii.gz is missing"),
    ],
)
def test_an_odd_entry_is_left_out_by_name(edited, change, says):
    told, put, _ = edited
    n = len(told["train"]) + len(told["val"])
    told["train"][0] |= change
    t, bad = put(told)
    assert len(bad) == 1 and says in bad.rows[0]["reason"] and t.case.nunique() == n - 1


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A project whose cohort table has standard volumes, and masks beside it"
    root = tmp_path_factory.mktemp("study")
    CTRATE().write(root / "data/ct_rate", 5, 6, 4, **SMALL, second_recon_prob=0.0)
    ReXGroundingCT().write(root / "data/rex_grounding_ct", 5, 6, 4, **SMALL)
    t, _ = CTRATE().read(root / "data/ct_rate")
    for r in t.itertuples():
        v = standardize(CTRATE().open_volume(r.image), SMALL["spacing"])
        (root / "build/volumes/ct_rate").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(v.hu, v.affine), root / f"build/volumes/ct_rate/{r.case}.nii")
    t = t.assign(image=[str(root / f"build/volumes/ct_rate/{c}.nii") for c in t.case], organ_map="")
    save(t, None, root / "build/cohorts/ct_rate", "ct_rate", root)
    write_json(dict(there=True), root / "build/cohorts/ct_rate/status.json")
    return root, t


def test_splits_are_the_tables_and_not_the_lists(study):
    root, cohort = study
    said, _ = ReXGroundingCT().read(root / "data/rex_grounding_ct")
    watched = cohort.patient[cohort.split == "train"].iloc[0]
    cohort = cohort.assign(
        split=np.where(
            cohort.patient == watched, "val", np.where(cohort.split == "train", "test", "train")
        )
    )  # as no list says it
    t, share, body, out = load_lesion_targets(said, cohort, bad=Quarantine(), **HOW)
    assert (
        set(t.split) == {"train", "test"}
        and watched not in set(t.patient)
        and t.case[t.split == "train"].str.startswith("valid").all()
    )
    assert (
        len(t) == len(share) == len(body)
        and out == 0
        and (share.max(1) > 0).all()
        and body[(t.split == "test").to_numpy()].any(1).all()
    )


def test_lesions_that_pretraining_watches_are_those_of_the_pointing_game(study, tmp_path):
    root, cohort = study
    corpus = cohort.assign(case="ct_rate:" + cohort.case, cohort="ct_rate")
    groups = list(load_params().anatomy.groups)
    p = SimpleNamespace(
        volumes=SimpleNamespace(roi_size=HOW["size"], hu_range=HOW["hu"]),
        model=SimpleNamespace(patch_size=HOW["patch"]),
        anatomy=SimpleNamespace(groups=groups),
    )
    lesions = read_lesions(corpus, root)
    rows = [corpus[corpus.split == k].to_dict("records") for k in ("test", "train")]
    write_targets(collect_targets(*rows, lesions, p), tmp_path, root)
    found = read_targets(tmp_path, root)
    said, _ = ReXGroundingCT().read(root / "data/rex_grounding_ct")
    t, share, body, _ = load_lesion_targets(said, cohort, bad=Quarantine(), **HOW)
    test, train = (t.split == k for k in ("test", "train"))
    own = (found.table.case.str.removeprefix("ct_rate:") + found.table.sentence).tolist()
    want = (t.case + t.sentence)[test].tolist()
    assert sorted(own) == sorted(want) and len(want) > 3
    order = [want.index(x) for x in own]
    np.testing.assert_allclose(found.share, share[test][order], atol=1e-6)
    assert (found.body == body[test][order]).all()
    atlas: dict = {}
    own = [t[k][train].tolist() for k in ("label", "sentence")]
    add_to_atlas(atlas, hit_patches(share[train]), *own, groups)
    assert set(atlas) == set(found.atlas)
    assert all((atlas[k] == found.atlas[k]).all() for k in atlas)
    assert read_lesions(corpus.assign(cohort="own"), root) is None
    assert read_lesions(corpus, tmp_path) is None


def test_what_the_crop_does_not_show_is_counted(study):
    root, cohort = study
    said, _ = ReXGroundingCT().read(root / "data/rex_grounding_ct")
    t, share, _, out = load_lesion_targets(
        said, cohort, size=(12, 12, 6), patch=(12, 12, 6), hu=(-1000, 1000), bad=Quarantine()
    )
    assert (
        out > 0 and len(t) + out == len(said[said.case.isin(cohort.case)]) and share.shape[1] == 1
    )


def test_patches_are_counted_as_the_encoder_counts_them(study):
    """A mask's patch is the patch of the image that holds it: one voxel, followed through
    reading, crop and cutting"""
    root, cohort = study
    said, _ = ReXGroundingCT().read(root / "data/rex_grounding_ct")
    g = said[said.case == said.case.iloc[0]].assign(
        volume=cohort.set_index("case").image[said.case.iloc[0]]
    )
    share, _ = load_lesion_coverage(g, **HOW, body=True)
    v = nib.load(g.volume.iloc[0])
    for got, c in zip(share, g.channel):
        m = rex.read_masks(g["mask"].iloc[0], g.image.iloc[0], [c], v.shape, v.affine)[0]
        x = torch.from_numpy(
            apply_crop(m, center_crop(v.shape, HOW["size"]), HOW["size"], False, 0).astype(
                np.float32
            )
        )[None, None]
        np.testing.assert_allclose(got, patchify(x, HOW["patch"])[0].mean(-1).numpy(), atol=1e-6)


def test_what_is_not_there_is_said(study, tmp_path):
    root, _ = study
    p = type("p", (), {})
    assert "no arm of this study" in evaluate_grounding({}, None, p, root, tmp_path / "a")[
        "reason"
    ] and "Not measured" in render_grounding(tmp_path / "a")
    write_json(dict(there=True), tmp_path / "build/cohorts/ct_rate/status.json")
    (tmp_path / "data/ct_rate").mkdir(parents=True)
    assert (
        "neither rex_grounding_ct/ nor rex_grounding_ct.path"
        in load_lesion_sentences(["ct_rate"], tmp_path)[1]
    )
    write_json(dict(there=False), tmp_path / "build/cohorts/ct_rate/status.json")
    assert (
        "ct_rate is not in this study" in load_lesion_sentences(["ct_rate"], tmp_path)[1]
        and "ct_rate is not" in load_lesion_sentences([], tmp_path)[1]
    )
