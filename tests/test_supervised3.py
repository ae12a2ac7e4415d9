"Benchmarks of generation 3: labels, oracle, resumption, cross-validation by scan"

import sys

import numpy as np
import pytest
import torch
from conftest import TOP, load_script

from asap.abnormalities import ABNORMALITIES
from asap.data.adapter import available_adapters, get_cohort
from asap.data.volumes import write
from asap.phantom.abnormalities3 import synthesize_body_chest
from asap.phantom.bodies3b import Box, synthesize_other_body
from asap.phantom.lesions import lesion_values

sys.path.insert(0, str(TOP / "benchmarks"))  # the scripts import each other
patients, oracle, network, emboli, real = (
    load_script(TOP / f"benchmarks/{n}.py")
    for n in (
        "supervised3_patients",
        "supervised3_oracle",
        "supervised3_network",
        "fumpe3",
        "real_or_phantom",
    )
)
COARSE = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))


def test_every_label_of_a_task_is_measured():
    known = {*patients.LABELS, *patients.ALIASES}
    for name in available_adapters():
        assert {*get_cohort(name).labels} <= known, name
    assert patients.LABELS[:18] == ABNORMALITIES and len(patients.LABELS) == 18 + 13
    assert len(patients.LABELS) == len({*patients.LABELS})


@pytest.fixture(scope="module")
def chests():
    "A patient of each kind: angiography, general hospital"
    return {i: patients.draw("test", i, **COARSE) for i in (1, 2)}


def test_labels_follow_the_drawing(chests):
    for i, c in chests.items():
        y = dict(zip(patients.LABELS, patients.labels_of(c, 0, bool(i % 2))))
        assert [n for n in ABNORMALITIES if y[n]] == [f.name for f in c.findings]
        assert np.isnan(y["PE"]) == (i % 2 == 0)
        assert y["severe"] <= y["COVID-19"]
        assert np.isnan(y["NCP"]) or y["NCP"] + y["CP"] + y["Normal"] == 1
    assert chests[1].traits["contrast"]


def test_a_censored_outcome_is_unknown():
    assert patients._within(20, 1, 30) == 1 and patients._within(40, 1, 30) == 0
    assert np.isnan(patients._within(20, 0, 30)) and patients._within(40, 0, 30) == 0


def test_maps_hold_the_masks(chests):
    c = chests[2]
    maps = patients.maps_of(c)
    for f in c.findings:
        bit = (maps >> np.uint32(patients.MAPS.index(f.name))) & 1
        if f.name != "Cardiomegaly":
            assert (bit > 0).sum() == patients.half(f.mask).sum() > 0, f.name
    assert ((maps >> np.uint32(patients.MAPS.index("Cardiomegaly"))) & 1).any()


def visible(hu):
    "Strength of atelectasis of an HU"
    values = lesion_values("none", "plates") | {"atelectasis": hu}
    how = dict(phase="none", lesions=values, **COARSE)
    a, b = (synthesize_body_chest("plates", present=p, **how) for p in (["Atelectasis"], []))
    return oracle.detectability(a, b)


def test_the_oracle_fails_where_nothing_is_painted():
    seen, hidden = visible(40.0), visible(-1100.0)
    assert hidden < 0.5 < 8 < seen
    assert 0.4 < oracle.search_auc(np.full(40, hidden), 60, "hidden") < 0.6
    assert oracle.search_auc(np.full(40, seen), 60, "seen") > 0.99
    assert oracle.search_auc(np.full(40, 2.0), 60, "weak") < 0.8


def test_the_oracle_of_an_outcome_is_that_of_the_risk():
    r = np.random.default_rng(0)
    y = np.full((200, len(patients.LABELS)), np.nan, np.float32)
    q = np.zeros((200, len(patients.QUANTITIES)), np.float32)
    k = patients.LABELS.index("mortality 6 months")
    y[:150, k] = r.random(150) < 0.4
    assert 0.35 < oracle.oracle_auc("mortality 6 months", y, q + r.random(q.shape), {}) < 0.65
    q[:, -1] = np.nan_to_num(y[:, k])
    assert oracle.oracle_auc("mortality 6 months", y, q, {}) == 1
    y[:, k] = 0
    assert np.isnan(oracle.oracle_auc("mortality 6 months", y, q, {}))


def test_a_drawing_that_was_stopped_goes_on(tmp_path, monkeypatch):
    drawn, real_draw = [], patients.draw

    def stops(split, i, **kw):
        if i == 1 and not drawn[1:]:
            drawn.append("stopped")
            raise KeyboardInterrupt
        drawn.append(i)
        return real_draw(split, i, **kw)

    monkeypatch.setattr(patients, "draw", stops)
    with pytest.raises(KeyboardInterrupt):
        patients.cases(tmp_path, "train", 2, **COARSE)
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    sets = patients.cases(tmp_path, "train", 2, **COARSE)
    assert drawn == [0, "stopped", 1]
    assert sets["hu"].shape == (2, 48, 48, 24) and sets["y"].shape == (2, len(patients.LABELS))


def tiny(n):
    "Patients of noise"
    r = np.random.default_rng(n)
    y = (r.random((n, len(patients.LABELS))) < 0.5).astype(np.float32)
    y[0] = np.nan
    maps = r.integers(0, 2 ** len(patients.MAPS), (n, 16, 16, 8)).astype(np.uint32)
    return dict(hu=r.integers(-1000, 400, (n, 32, 32, 16)).astype(np.int16), maps=maps, y=y)


def test_a_training_that_was_stopped_ends_at_the_same_weights(tmp_path):
    settings = dict(epochs=2, lr=0.003, size=4, widths=(4, 8, 8))
    sets = tiny(9), tiny(8)
    whole = network.Training(*sets, tmp_path / "whole.pt", **settings)
    whole.run()
    part = network.Training(*sets, tmp_path / "part.pt", **settings)
    part.epoch(0)
    part.log.append(0.5)
    part.best, part.kept = 0.0, part.net.state_dict()
    part.save()
    torch.manual_seed(77)
    again = network.Training(*sets, tmp_path / "part.pt", **settings)
    assert again.log == [0.5]
    again.run()
    assert again.log[1:] == whole.log[1:]
    other = network.Training(*sets, tmp_path / "part.pt", **settings | dict(lr=0.1))
    assert other.log == []


def test_unknown_labels_teach_nothing():
    logits = torch.zeros(2, 3, requires_grad=True)
    y = torch.tensor([[1.0, np.nan, 0.0], [np.nan, np.nan, 1.0]])
    network.label_loss(logits, y, torch.ones(3)).backward()
    assert (logits.grad == 0).tolist() == [[False, True, False], [True, True, False]]


def test_emboli_are_in_the_box_and_the_unet_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(emboli, "SIZE", (48, 48, 48))
    monkeypatch.setattr(emboli, "SPACING", (3.0, 3.0, 3.0))
    sets = emboli.cases(tmp_path, "train", 2)
    assert sets[0].shape == (2, 48, 48, 48) and sets[1].sum() > 20
    assert sets[0][sets[1] > 0].mean() < 160
    _, one = emboli.fit(sets, sets, tmp_path / "unet.pt", 1, 0.003, 4)
    _, two = emboli.fit(sets, sets, tmp_path / "unet.pt", 1, 0.003, 4)
    assert one["log"] == two["log"] and one["seconds"] == two["seconds"]
    assert emboli.dice(sets[1] > 0, sets[1] > 0) == 1


def test_the_scan_that_is_left_out_is_not_in_training(monkeypatch):
    level = {f"scan {i}": -400.0 + 100 * i for i in range(3)}
    ours = {f"phantom {i}": 200.0 + 100 * i for i in range(6)}
    volumes = [{k: np.full((26, 26, 14), v) for k, v in d.items()} for d in (level, ours)]
    seen, train = [], real.train

    def spy(x, y, steps):
        seen.append((set(x[y == 1].ravel().tolist()), set(x[y == 0].ravel().tolist())))
        return train(x, y, 1)

    monkeypatch.setattr(real, "train", spy)
    rows = real.compare(*volumes, 4, 1)
    assert [r["scan"] for r in rows] == list(level)
    for row, (trained, phantoms) in zip(rows, seen):
        own = np.float32(level[row["scan"]]) / np.float32(1000)
        assert float(own) not in trained and len(trained) == 2 and len(phantoms) == 4
    parts = real.folds(list(ours), 3)
    assert set.union(*parts) == {*ours} and sum(map(len, parts)) == 6


def test_stand_ins_in_the_layout_of_real_scans(tmp_path):
    for i in range(2):
        b = synthesize_other_body(("stand-in", i), (7.0, 7.0, 14.0), Box())
        write(np.clip(b.hu, -1000, 1000), b.affine, tmp_path / f"scan{i}/image.nii")
    found = real.real_volumes(tmp_path, ["scan0", "scan1"])
    assert all(v.ndim == 3 for v in found.values())
    cut = real.patches(found["scan0"], 3, "scan0")
    assert cut.shape == (3, *real.PATCH) and np.abs(cut).max() <= 1
    with pytest.raises(FileNotFoundError, match="scan7"):
        real.real_volumes(tmp_path, ["scan7"])
    with pytest.raises(ValueError, match="hold tissue"):
        real.patches(np.full((40, 40, 20), -1000), 2, "air")


def test_the_patch_cnn_finds_what_differs():
    r = np.random.default_rng(0)
    smooth = {f"phantom {i}": r.normal(0, 30, (30, 30, 16)) for i in range(6)}
    rough = {f"scan {i}": r.normal(0, 200, (30, 30, 16)) for i in range(2)}
    assert all(row["auc"] > 0.95 for row in real.compare(rough, smooth, 12, 30))
