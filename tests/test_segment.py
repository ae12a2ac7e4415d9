"""Outlines: round trips through every format and grid, windows, what a killed training leaves,
what a bad mask does"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TOP
from files import FORMS, write as write_as

from asap.core import Quarantine
from asap.data.adapter import get_cohort
from asap.data.cohorts.luna16 import LUNA16, lung_labels
from asap.data.table import check_table
from asap.data.volumes import Source, Volume, read, resample, standard_grid, standardize, write
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest
from asap.tasks import masks, segment, unetr
from asap.tasks.metrics import bootstrap, point_estimates, to_table
from asap.train import resolve_precision

torch.set_num_threads(1)
C = synthesize_chest(("segment", 0), (96, 96, 48), (3.5, 3.5, 7.0))
SPACING = (3.5, 3.5, 7.0)
LUNGS = masks.to_class_indices(lung_labels(C.labels), LUNA16.targets)
WINDOW = Source(("window", -1000, 1000), C.spacing, "RAS")


def dice(a, b):
    return masks.dice_score(a, b, 4)[:2]  # of the lungs


def turned(form="same"):
    """The phantom's scan and lungs on another scanner's grid: the same, flipped, with swapped
    axes, oblique"""
    hu, m, a = C.hu, LUNGS, C.affine
    if form == "same":
        return hu, m, a
    if form == "flipped":
        flip = np.diag([-1.0, 1, -1, 1])
        flip[[0, 2], 3] = np.array(hu.shape)[[0, 2]] - 1
        return (
            np.ascontiguousarray(hu[::-1, :, ::-1]),
            np.ascontiguousarray(m[::-1, :, ::-1]),
            a @ flip,
        )
    if form == "swapped":
        return (
            np.ascontiguousarray(hu.transpose(1, 0, 2)),
            np.ascontiguousarray(m.transpose(1, 0, 2)),
            a @ np.eye(4)[[1, 0, 2, 3]].T,
        )
    t, turn = np.deg2rad(12), np.eye(4)
    turn[:2, :2] = [[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]
    shape, new = standard_grid(hu.shape, turn @ a, (3.0, 3.0, 5.0))
    new = np.linalg.inv(turn) @ new
    return (
        resample(hu, a, shape, new).round().astype(np.int16),
        resample(m, a, shape, new, order=0, fill=0),
        new,
    )


def trip(v) -> tuple:  # Dice of standard -> native -> standard, and of native -> standard -> native
    "The lungs, drawn on the standard grid of a volume as it was read"
    std = standardize(v, SPACING)
    here = resample(LUNGS, C.affine, std.hu.shape, std.affine, order=0, fill=0)
    out = masks.resample_to_native(masks.one_hot(here, 4), std.affine, v.hu.shape, v.affine)
    return dice(resample(out, v.affine, std.hu.shape, std.affine, order=0, fill=0), here)


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_survives_every_format(form, tmp_path):
    v = read(write_as(C.hu, C.affine, tmp_path, form), WINDOW if form == "pictures" else Source())
    if form == "pictures":
        v.affine = C.affine  # pictures do not say where they lie
    assert trip(v).min() >= 0.98


@pytest.mark.parametrize("form", ["same", "flipped", "swapped", "oblique"])
def test_a_mask_survives_every_grid(form):
    hu, own, affine = turned(form)
    v = Volume(hu, affine)
    assert trip(v).min() >= 0.98
    std = standardize(v, SPACING)
    masks.check_same_grid(own.shape, affine, std.hu.shape, std.affine)
    assert (
        dice(masks.resampling_oracle(own, affine, std.hu.shape, std.affine, 4), own).min() >= 0.98
    )


@pytest.mark.parametrize("form", ["nii", "nii.gz", "mhd", "nrrd", "npz", "dicom"])
def test_the_mask_lies_where_the_scan_lies(form, tmp_path):
    "Whatever the scan's format, the mask has its shape and affine, and the owners' values"

    class Ideal(torch.nn.Module):  # air inside the body is called left lung
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.cat([(x > -0.5) * 9.0, (x <= -0.5) * 9.0, x * 0, x * 0], 1)

    path = write_as(C.hu, C.affine, tmp_path, form)
    config = dict(
        class_names=LUNA16.targets, spacing=SPACING, hu_range=[-1000, 1000], img_size=[96, 96, 48]
    )
    mask, affine = segment.predict_mask(Ideal(), config, path, tmp_path / "mask.nii.gz")
    v, kept = read(path), read(tmp_path / "mask.nii.gz")
    assert (
        kept.hu.shape == v.hu.shape
        and np.allclose(kept.affine, v.affine, atol=1e-3)
        and (kept.hu == mask).all()
    )
    assert set(np.unique(mask)) == {0, 3}
    assert (
        2 * ((mask == 3) & (v.hu < -500)).sum() / ((mask == 3).sum() + (v.hu < -500).sum()) > 0.98
    )


@pytest.mark.parametrize("shape", [(48, 48, 24), (40, 48, 20)])
def test_one_window_is_the_whole(shape):
    torch.manual_seed(0)
    model = unetr.build_unet(3, (48, 48, 24), 4).eval()
    x = torch.rand(1, *shape)
    pad = [(n - s) // 2 for n, s in zip((48, 48, 24), shape)]
    whole = torch.full((1, 1, 48, 48, 24), -1.0)
    at = tuple(slice(p, p + s) for p, s in zip(pad, shape))
    whole[(0, 0, *at)] = x[0]
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=resolve_precision() == "bf16"),
    ):
        want = model(whole).float().softmax(1)[0][(slice(None), *at)].numpy()
    assert np.allclose(segment.sliding_window_proba(model, x, (48, 48, 24)), want, atol=1e-6)


@pytest.mark.parametrize("patch", [(12, 12, 6), (16, 16, 8), (8, 8, 4), (6, 6, 3), (24, 24, 4)])
def test_any_patch(patch):
    from asap.model.vit import ViT3D

    size = [2 * p for p in patch]
    m = unetr.Unetr(ViT3D(size, patch, 24, 5, 2), 3, 4)
    y = m(torch.randn(1, 1, *size))
    assert y.shape == (1, 3, *size)
    torch.nn.functional.cross_entropy(
        m(torch.randn(1, 1, *size)), torch.zeros(1, *size, dtype=torch.long)
    ).backward()
    assert m.coarse_head.weight.grad.abs().sum() > 0 and m.out.weight.grad.abs().sum() > 0


# a study of four classes of cases, of 24x24x12 voxels, that trains in seconds
SIZE, MM = (24, 24, 12), (14.0, 14.0, 28.0)


CASES = dict(train=4, val=1, test=2)


def cohort(folder, n=CASES):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, i in ((s, i) for s, k in n.items() for i in range(k)):
        k, name = synthesize_chest(("segment", split, i), SIZE, MM), f"{split}{i}"
        std = standardize(Volume(k.hu, k.affine), MM)
        write(std.hu, std.affine, folder / f"{name}.nii")
        write(lung_labels(k.labels), k.affine, folder / f"{name}_mask.nii.gz")
        rows.append(
            dict(
                case=name,
                scan=name,
                patient=name,
                image=str(folder / f"{name}.nii"),
                organ_map="",
                target_map=str(folder / f"{name}_mask.nii.gz"),
                findings="",
                impression="",
                split=split,
                time_days=None,
                event=None,
            )
        )
    return check_table(pd.DataFrame(rows), "luna16")


def told(steps=4):
    s = load_params(TOP / "params/smoke.yaml").segment.model_dump()
    row = dict(low_label=False, steps=steps, batch_size=1, lr=0.01, hu_window=None, roi_size=None)
    return dict(
        segment=dict(s, datasets=dict(luna16=row)),
        volumes=dict(spacing=list(MM), roi_size=list(SIZE), hu_range=[-1000, 1000]),
        phantoms=dict(luna16=True),
    )


def run(table, folder, steps=4, **kw):
    return segment.run_all(
        "unet", ["segment_luna16"], dict(luna16=table), told(steps), folder, **kw
    )


def test_bits_finished_runs_and_changed_params(tmp_path, monkeypatch):
    "Same seed, same predictions; finished is not trained again; a changed number is, and says why"
    table, said = cohort(tmp_path / "data"), []
    a, b = run(table, tmp_path / "a", masks=tmp_path / "masks"), run(table, tmp_path / "b")
    pd.testing.assert_frame_equal(a, b)
    assert list(a) == segment.COLUMNS and {
        f.name for f in (tmp_path / "masks/segment_luna16").iterdir()
    } == {"test0.nii.gz", "test1.nii.gz"}
    monkeypatch.setattr(
        segment, "train_segmentation", lambda *a, **kw: pytest.fail("trained again")
    )
    pd.testing.assert_frame_equal(run(table, tmp_path / "a"), a)
    monkeypatch.undo()
    from asap import core

    monkeypatch.setattr(core, "log_message", said.append)
    c = run(table, tmp_path / "a", steps=5)
    assert any("row.steps: 4 -> 5" in s for s in said), said
    assert len(c) == len(a)


def test_an_empty_mask_and_an_absent_class(tmp_path, monkeypatch):
    "Learnt from all the same; no Dice where there is nothing; said"
    table, said = cohort(tmp_path / "data"), []
    monkeypatch.setattr(segment, "log_message", said.append)
    for f in table.target_map[table.split != "test"]:
        v = read(f)
        write(
            np.where(v.hu == 5, 0, v.hu).astype(np.uint8), v.affine, f
        )  # no trachea to learn from
    for f in table.target_map[table.case.isin(["train0", "test0", "val0"])]:
        v = read(f)
        write(np.zeros(v.hu.shape, np.uint8), v.affine, f)
    d = run(table, tmp_path / "a")
    assert any("no voxel of trachea in 4 train cases" in s for s in said) and any(
        "the last step is kept" in s for s in said
    ), said
    assert d[d.case == "test0"].dice.isna().all() and d[d.case == "test1"].dice.notna().any()
    f = to_table(bootstrap(d, segment.metrics, 50), 0.95)
    assert f[f.metric == "dice"].value.notna().all()
    assert point_estimates(d, segment.metrics)["unet"]["segment_luna16"]["1.0"]["dice"] >= 0


def test_values_and_grids_that_do_not_belong(tmp_path):
    table = cohort(tmp_path / "data")
    where = dict(zip(table.case, table.target_map))
    v = read(where["test0"])
    write(np.where(v.hu == 3, 8, v.hu).astype(np.uint8), v.affine, where["test0"])
    v = read(where["train1"])
    write(v.hu[:-6].astype(np.uint8), v.affine, where["train1"])
    Path(where["train2"]).write_bytes(b"no gzip")
    d = run(table, tmp_path / "a", quarantine=tmp_path / "q.csv")
    assert set(d.case) == {"test1"}
    why = pd.read_csv(tmp_path / "q.csv").set_index("case").reason
    assert set(why.index) == {"test0", "train1", "train2"}
    assert (
        "value 8" in why["test0"] and "left lung" in why["test0"] and "test0_mask" in why["test0"]
    )
    assert "of this very image" in why["train1"] and "train1_mask" in why["train1"]


def test_several_outlines(tmp_path):
    "Further outlines of an image stand beside the target, and leave its figure alone"
    q, table = (
        segment.SegmentationTask("external_segment_rider", "rider", "msd_lung"),
        cohort(tmp_path / "data", dict(test=2)),
    )
    for f in table.target_map:
        v = read(f)
        write((v.hu == 3).astype(np.uint8), v.affine, f)
        write((v.hu > 0).astype(np.uint8), v.affine, f.replace("_mask", "_auto"))
    table = table.assign(other_maps=[f.replace("_mask", "_auto") for f in table.target_map])
    model = unetr.build_unet(2, SIZE, 4).eval()
    p = told()["segment"]
    d = segment.evaluate(model, q, table, ["cancer"], p, (-1000, 1000), SIZE, Quarantine())
    alone = segment.evaluate(
        model, q, table.drop(columns="other_maps"), ["cancer"], p, (-1000, 1000), SIZE, Quarantine()
    )
    assert d.reference.tolist() == ["target", "test0_auto", "target", "test1_auto"]
    both, one = segment.metrics(d, 20, 0), segment.metrics(alone, 20, 0)
    assert both["dice"][0] == one["dice"][0] and "dice other outlines" in both
    with pytest.raises(ValueError, match="does not know `lesion`"):
        segment.select_classes(np.zeros((2, 1)), ["cancer"], ["lesion"])


def test_no_patient_on_two_sides(tmp_path):
    "ACDC's frames are split by patient, also in the released list"
    from asap.data.splits import hold_out

    for layout in ("owners", "released"):
        get_cohort("acdc").write(tmp_path / layout, 1, 5, 3, layout=layout)
        t = hold_out(get_cohort("acdc").read(tmp_path / layout)[0], 0.2, 1)
        assert (t.groupby("patient").split.nunique() == 1).all() and (
            t.groupby("patient").size() == 2
        ).all()


KILLED = """
    import sys; sys.path.insert(0, "tests")
    from pathlib import Path
    import test_segment as t, asap.tasks.segment as s
    fit = s.fit
    s.fit = lambda *a, **kw: fit(*a, **kw | dict(save_every=2))
    folder = Path(sys.argv[1])
    t.run(t.cohort(folder/"data"), folder/"a", steps=int(sys.argv[2]))
"""


def test_killed_and_resumed(tmp_path):
    "Killed in the middle, it goes on from its state, and ends in the very same predictions"
    steps, env = 60, dict(os.environ, PYTHONPATH=str(TOP), OMP_NUM_THREADS="1")
    table, state = (
        cohort(tmp_path / "data"),
        tmp_path / "a/build/resume/segment/unet/luna16-1-0/resume/state.pt",
    )
    job = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(steps)],
        cwd=TOP,
        env=env,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not state.exists() and job.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert state.exists(), "killed before its first state, or finished before the kill"
    step = torch.load(state, weights_only=True)["step"]
    assert 0 < step < steps and not (tmp_path / "a/build/segment/unet/luna16-1-0").exists()
    pd.testing.assert_frame_equal(
        run(table, tmp_path / "a", steps), run(table, tmp_path / "b", steps)
    )
    assert not state.exists()


def test_side_labels_are_never_flipped():
    assert not set(segment.FLIP_COHORTS) & {"luna16", "segthor", "btcv", "acdc"}
    p = load_params(TOP / "params.yaml").segment.model_dump()
    names = [type(t).__name__ for t in segment.build_augmentation(p, SIZE, False).transforms]
    assert "RandFlipd" not in names and "RandFlipd" in [
        type(t).__name__ for t in segment.build_augmentation(p, SIZE, True).transforms
    ]


def test_the_baseline_is_of_like_size():
    p = load_params(TOP / "params.yaml")
    from asap.model.vit import ViT3D

    vit = ViT3D(
        p.volumes.roi_size,
        p.model.patch_size,
        p.model.embed_dim,
        p.model.depth,
        p.model.num_heads,
        p.model.stem.model_dump(),
    )

    def count(m):
        return sum(q.numel() for q in m.parameters())

    ours, plain = (
        count(unetr.Unetr(vit, 4, p.segment.feature_size)),
        count(unetr.build_unet(4, p.volumes.roi_size, p.segment.feature_size)),
    )
    assert 0.67 < ours / plain < 1.5, (ours, plain)
