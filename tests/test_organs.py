"Domain randomization and the organ segmenter: geometry, seeds, sources, refusal, the command"

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from asap.anatomy import segmenter as sg
from asap.anatomy.organ_bodies import field_mask
from asap.anatomy.organ_training import (
    OrganDataset,
    OrgansConfig,
    flatten_kernels,
    restore_kernels,
    sample_center,
    segmenter_loss,
    train_segmenter,
)
from asap.anatomy.randomize import (
    RandomizeConfig,
    add_blobs,
    coarsen,
    paint_tissues,
    random_displacement,
    randomize,
    resample_grid,
    sample_grid,
    sample_hu,
)
from asap.anatomy.segment import MapSource, OrganPrediction, fill_organ_maps
from asap.cli import main
from asap.core import rng
from asap.data.volumes import Volume, write
from asap.params import load_params
from asap.phantom.canvas import TISSUES
from asap.phantom.whole_body import View

P = load_params(sections=["anatomy", "organs"])
GROUPS = {g: list(names) for g, names in P.anatomy.groups.items()}
TINY = OrgansConfig(
    spacing=[8.0, 8.0, 8.0],
    roi_size=[32, 32, 32],
    channels=[4, 8, 16],
    num_phantoms=2,
    steps=4,
    min_lung=1e-6,
    min_confidence=1e-6,
)


def box(shape=(24, 24, 24)):
    "A cube of class 6 in a body of class 9, as HU, tissues and classes"
    classes = np.zeros(shape, np.uint8)
    classes[3:-3, 3:-3, 3:-3] = 9
    classes[8:16, 8:16, 8:16] = 6
    tissues = np.select([classes == 6, classes == 9], [5, 3], 0).astype(np.uint8)
    hu = np.select([classes == 6, classes == 9], [200, 0], -1000).astype(np.int16)
    return hu, tissues, classes


PHYSICAL = np.linspace(-900, 900, len(TISSUES)).astype(np.float32)


def test_image_and_labels_move_together():
    "The border of the image lies where the border of the labels lies, with every warp"
    hu, _, classes = box((40, 40, 40))
    for seed in range(5):
        grid = sample_grid(rng(seed), (40, 40, 40), (3, 3, 3), (20, 20, 20), RandomizeConfig())
        image = resample_grid((classes == 6)[None], grid, labels=False)[0]
        labels = resample_grid(classes[None], grid, labels=True)[0]
        sure = (image - 0.5).abs() > 0.45  # away from the border
        assert ((image > 0.5) == (labels == 6))[sure].all()


@pytest.mark.parametrize("largest", [15.0, 25.0])
def test_a_warp_has_its_length_and_does_not_fold(largest):
    for seed in range(5):
        moved = random_displacement(rng(seed), (48, 48, 48), (3, 3, 3), largest)
        assert moved.norm(dim=0).max() == pytest.approx(largest, abs=1e-3)
        change = torch.stack(torch.gradient(moved, spacing=3.0, dim=(1, 2, 3)), 1)
        jacobian = torch.eye(3).reshape(3, 3, 1, 1, 1) + change
        assert (torch.linalg.det(jacobian.permute(2, 3, 4, 0, 1)) > 0).float().mean() > 0.99


def test_physical_samples_keep_their_hu():
    c = RandomizeConfig(prob=0.0, scale=[1.0, 1.0], turn=0.0)
    image, target = randomize(
        rng(0), *box(), PHYSICAL, (3, 3, 3), (24, 24, 24), (11.5, 11.5, 11.5), c
    )
    assert torch.allclose(image, torch.from_numpy(box()[0] / 1000).float().clamp(-1), atol=1e-3)
    assert np.array_equal(target.numpy(), box()[2])


def test_the_same_seed_gives_the_same_sample():
    args = (*box(), PHYSICAL, (3, 3, 3), (16, 16, 16), (12, 12, 12), RandomizeConfig(prob=1.0))
    one, same, other = (randomize(rng(k), *args) for k in (1, 1, 2))
    assert one[0].equal(same[0]) and one[1].equal(same[1]) and not one[0].equal(other[0])
    assert one[0].min() >= -1 and one[0].max() <= 1 and one[0].isfinite().all()


def test_half_of_the_samples_are_painted():
    c = RandomizeConfig(scale=[1.0, 1.0], turn=0.0)
    args = (*box(), PHYSICAL, (3, 3, 3), (24, 24, 24), (11.5, 11.5, 11.5), c)
    truth = torch.from_numpy(box()[2]).long()
    kept = [randomize(rng(k), *args)[1].equal(truth) for k in range(60)]
    assert 18 <= sum(kept) <= 42


def test_merged_split_and_foreign_hu():
    n = len(PHYSICAL)
    calm = dict(hu_spread=[1.0, 1.001], any_hu_prob=0.0, merge_prob=0.0)
    assert np.abs(sample_hu(rng(0), PHYSICAL, RandomizeConfig(**calm)) - PHYSICAL).max() < 6
    merged = sample_hu(rng(0), PHYSICAL, RandomizeConfig(**{**calm, "merge_prob": 1.0}))
    assert len(np.unique(merged)) < 0.8 * n
    tissues = torch.full((24, 24, 24), 3)
    plain = dict(calm, texture=[0.0, 1e-6])
    whole = paint_tissues(
        rng(0), tissues, PHYSICAL, (3, 3, 3), RandomizeConfig(**plain, split_prob=0.0)
    )
    split = paint_tissues(
        rng(0), tissues, PHYSICAL, (3, 3, 3), RandomizeConfig(**plain, split_prob=1.0)
    )
    assert whole.std() < 1e-3 and len(split.round().unique()) == 2


def test_blobs_stay_in_the_image_and_change_it():
    image = torch.zeros(20, 20, 20)
    add_blobs(rng(3), image, (3, 3, 3), RandomizeConfig(blobs=6))
    assert image.isfinite().all() and (image != 0).any()
    image = torch.zeros(20, 20, 20)
    add_blobs(rng(3), image, (3, 3, 3), RandomizeConfig(blobs=0))
    assert not image.any()


def test_thick_slices_keep_the_mean():
    image = torch.from_numpy(rng(0).normal(0, 1, (24, 24, 24)).astype(np.float32))
    thick = coarsen(image, 2, 4.0)
    assert thick.mean() == pytest.approx(float(image.mean()), abs=0.02)
    assert thick.diff(dim=2).abs().mean() < 0.5 * image.diff(dim=2).abs().mean()


def test_nothing_has_a_class_outside_the_field():
    view = View(padding=-1024, field=60.0, round_field=True)
    inside = field_mask((40, 40, 10), (3, 3, 3), view)
    assert inside[20, 20] and not inside[0, 0] and inside.mean() == pytest.approx(0.196, abs=0.02)
    assert field_mask((4, 4, 4), (3, 3, 3), View(padding=None)).all()


def test_samples_lie_at_organs():
    classes = np.zeros((60, 60, 60), np.uint8)
    classes[30:32, 40:42, 20:22] = 7
    c = OrgansConfig(roi_size=[16, 16, 16], oversample_foreground=0.999)
    centers = np.array([sample_center(rng(k), classes, c, 8) for k in range(40)])
    assert np.abs(centers - [30.5, 40.5, 20.5]).max() < 0.3 * 16 + 2


def test_bodies_are_drawn_once_and_again_after_a_change(tmp_path):
    data = OrganDataset(TINY, GROUPS, 0, tmp_path / "bodies")
    first = data.body(0)
    path = tmp_path / "bodies/0.npz"
    before = path.stat().st_mtime_ns
    again = OrganDataset(TINY, GROUPS, 0, tmp_path / "bodies").body(0)
    assert path.stat().st_mtime_ns == before
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert first["classes"].max() == 9 and first["values"].shape == (len(TISSUES),)
    OrganDataset(TINY, GROUPS, 1, tmp_path / "bodies")
    assert not path.exists()


def test_an_interrupted_training_resumes(tmp_path):
    whole = train_segmenter(TINY, GROUPS, 0, tmp_path / "whole", bodies=tmp_path / "bodies")

    def stop(_):
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        train_segmenter(
            TINY, GROUPS, 0, tmp_path / "part", stop, 3, tmp_path / "bodies", save_every=1
        )
    assert torch.load(tmp_path / "part/resume/state.pt", weights_only=True)["step"] == 2
    part = train_segmenter(
        TINY, GROUPS, 0, tmp_path / "part", None, 3, tmp_path / "bodies", save_every=1
    )
    a, b = whole.model.state_dict(), part.model.state_dict()
    assert all(a[k].equal(b[k]) for k in a)


def test_trainings_share_bodies_and_differ_in_samples(tmp_path):
    args = (TINY, GROUPS, 0, tmp_path / "bodies")
    one, other = OrganDataset(*args, samples=1), OrganDataset(*args, samples=2)
    assert np.array_equal(one.body(0)["hu"], other.body(0)["hu"])
    assert not torch.equal(one[0, 0][0], other[0, 0][0])
    assert torch.equal(one[0, 0][0], OrganDataset(*args, samples=1)[0, 0][0])


def test_kernels_are_matrices_during_training():
    torch.manual_seed(0)
    model = sg.build_segmenter(TINY.channels, 8)
    names, x = sorted(model.state_dict()), torch.randn(1, 1, 16, 16, 16)
    before = model(x)
    matrices = flatten_kernels(model)
    kernels = sum(q.ndim == 5 for q in sg.build_segmenter(TINY.channels, 8).parameters())
    assert len(matrices) == kernels > 0 and {q.ndim for q in matrices} == {2}
    assert torch.equal(model(x), before)
    with torch.no_grad():
        matrices[0].mul_(2)
    changed = model(x)
    restore_kernels(model)
    assert torch.equal(model(x), changed) and not torch.equal(changed, before)
    assert sorted(model.state_dict()) == names


def test_voxels_of_organs_weigh_more():
    logits = torch.zeros(1, 4, 2, 2, 2)
    logits[:, 3] = 2.0  # everything is called the rest of the body
    wrong = []
    for truth in (3, 1):
        target = torch.full((1, 2, 2, 2), 3)
        target[0, 0, 0, 0] = truth
        for weight in (1.0, 5.0):
            loss, _ = segmenter_loss(lambda x: logits, (torch.zeros(1, 2, 2, 2), target), 0, weight)
            wrong.append(float(loss))
    right_1, right_5, missed_1, missed_5 = wrong
    assert missed_1 > right_1 and missed_5 - right_5 > missed_1 - right_1


def test_weights_are_kept_in_half_precision(weights):
    saved = sg.load_file(weights / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float16}
    loaded = sg.load_segmenter(weights).model.state_dict()
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[k], t.float()) for k, t in saved.items())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Untrained weights of a tiny segmenter that accepts every scan"
    folder = tmp_path_factory.mktemp("organs") / "weights"
    torch.manual_seed(0)
    model = sg.build_segmenter(TINY.channels, 8)
    sg.save_segmenter(sg.Segmenter(model, TINY.use(), GROUPS), folder, "tiny")
    return folder


def scan(shape=(40, 36, 20), affine=None):
    hu = rng("scan").normal(-300, 400, shape).clip(-1000, 1000).astype(np.int16)
    affine = np.diag([-5.0, -5.0, 10.0, 1.0]) if affine is None else affine
    return Volume(hu, affine)


def test_the_map_has_the_grid_of_the_scan(weights):
    s = sg.load_segmenter(weights)
    turn = np.array([[0.98, 0.2, 0, 3], [-0.2, 0.98, 0, 5], [0, 0, 1, 1], [0, 0, 0, 1]])
    for v in (scan(), scan((20, 40, 36), np.eye(4)[[2, 0, 1, 3]] * [6, 5, -5, 1])):
        found = sg.segment_organs(v, s)
        assert found.organs.shape == found.body.shape == v.hu.shape
        assert found.organs.dtype == np.uint8 and found.organs.max() <= 8
        assert found.body[found.organs > 0].all()
        assert set(found.confidence) == set(GROUPS)
    oblique = scan(affine=turn @ np.diag([5.0, 5, 10, 1]))
    assert sg.segment_organs(oblique, s).organs.shape == oblique.hu.shape


def test_a_flipped_scan_gives_the_same_organs(weights):
    s, v = sg.load_segmenter(weights), scan()
    flip = np.diag([1.0, -1, 1, 1])
    flip[1, 3] = v.hu.shape[1] - 1
    other = Volume(v.hu[:, ::-1].copy(), v.affine @ flip)
    one, two = sg.segment_organs(v, s).organs, sg.segment_organs(other, s).organs[:, ::-1]
    assert (one == two).mean() > 0.999


def test_small_pieces_are_removed():
    proba = torch.full((3, 20, 20, 20), 0.1)
    proba[0] = 0.5
    proba[1, :10, :10, :10] = 0.9
    proba[1, 15:17, 15:17, 15:17] = 0.9
    found = sg.remove_small_pieces(proba, 1, 0.1)
    assert found[:10, :10, :10].all() and not found[15:17, 15:17, 15:17].any()


def test_a_scan_without_chest_is_refused(weights):
    s = sg.load_segmenter(weights)
    strict = sg.Segmenter(s.model, s.config.model_copy(update=dict(min_lung=1e6)), s.groups)
    with pytest.raises(sg.NoChestError, match="no chest found: .* ml of lung"):
        sg.segment_organs(scan(), strict)


def test_wrong_weights_are_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="make organs"):
        sg.load_segmenter(tmp_path)
    with pytest.raises(ValueError, match="`anatomy.groups` is not what .* was trained on"):
        sg.shipped_source(dict(heart=["heart"]), weights)


@pytest.fixture
def shipped(weights, monkeypatch, tmp_path):
    "The tiny weights as those of the repository; no weights of TotalSegmentator"
    monkeypatch.setattr(sg, "resource_path", lambda path: weights)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "none"))
    sg.load_segmenter.cache_clear()
    yield weights
    sg.load_segmenter.cache_clear()


def test_the_program_is_chosen(shipped, monkeypatch):
    assert sg.choose_source(GROUPS).name.startswith("weights/organs")
    with pytest.raises(FileNotFoundError, match="TotalSegmentator's weights are incomplete"):
        sg.choose_source(GROUPS, "totalsegmentator")
    monkeypatch.setattr(sg, "missing_models", lambda fast: {})
    monkeypatch.setattr(sg, "totalsegmentator_source", lambda *a: MapSource("other", None, {}))
    assert sg.choose_source(GROUPS).name == "other"
    assert sg.choose_source(GROUPS, "shipped").name.startswith("weights/organs")


def test_the_command_says_what_made_the_map(shipped, tmp_path, capsys, monkeypatch):
    v = scan()
    write(v.hu, v.affine, tmp_path / "a.nii.gz")
    made = OrganPrediction(
        np.ones(v.hu.shape, np.uint8), "weights/organs", np.ones(v.hu.shape, bool), {"heart": 0.5}
    )
    monkeypatch.setattr(
        sg, "choose_source", lambda *a: MapSource("weights/organs", lambda v: made, {})
    )
    out = tmp_path / "out"
    assert main(["organs", str(tmp_path / "a.nii.gz"), "-o", str(out), "--body"]) == 0
    assert "organ maps by weights/organs" in capsys.readouterr().err
    for kind in ("organs", "body"):
        img = nib.load(out / f"a_{kind}.nii.gz")
        assert img.shape == v.hu.shape and np.allclose(img.affine, v.affine)
    told = json.loads((out / "a_organs.json").read_text())
    assert told["source"] == "weights/organs" and set(told["organs"]) == set(GROUPS)
    assert told["organs"]["heart"] == dict(volume_ml=0.0, confidence=0.5)
    assert told["organs"]["left upper lobe"]["volume_ml"] == pytest.approx(7200.0)


def test_cohorts_without_masks_get_maps(shipped, tmp_path):
    v = scan()
    write(v.hu, v.affine, tmp_path / "a.nii")
    table = pd.DataFrame(dict(case=["a"], image=[str(tmp_path / "a.nii")], organ_map=[""]))
    source = sg.shipped_source(GROUPS)
    filled = fill_organ_maps(table, P.anatomy, tmp_path / "maps", source=source)
    made = nib.load(filled.organ_map[0])
    assert made.shape == v.hu.shape
    before = (tmp_path / "maps/a.nii.gz").stat().st_mtime_ns
    fill_organ_maps(table, P.anatomy, tmp_path / "maps", source=source)
    assert (tmp_path / "maps/a.nii.gz").stat().st_mtime_ns == before
    old = sg.load_file(shipped / "model.safetensors")
    try:
        save_file({k: t + 0.01 for k, t in old.items()}, shipped / "model.safetensors")
        sg.load_segmenter.cache_clear()
        fill_organ_maps(table, P.anatomy, tmp_path / "maps", source=sg.shipped_source(GROUPS))
    finally:
        save_file(old, shipped / "model.safetensors")
    assert (tmp_path / "maps/a.nii.gz").stat().st_mtime_ns > before


def test_the_default_source_is_totalsegmentator():
    assert P.anatomy.source == "totalsegmentator"
