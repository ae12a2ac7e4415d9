"TotalSegmentator really called, on a tiny random network, with the network cut off"

import json
import os
import socket

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import requests
from tiny_totalsegmentator import write_tiny

from asap.anatomy import segment as seg
from asap.anatomy.organs import map_to_groups
from asap.cli import main
from asap.data.volumes import Volume, write
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest

P = load_params().anatomy


def with_options(**options):
    "The params `anatomy` with other options of TotalSegmentator"
    told = P.totalsegmentator.model_copy(update=options)
    return P.model_copy(update=dict(totalsegmentator=told))


P = with_options(fast=True, download=False)
NAMES = [n for g in P.groups.values() for n in g]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Weights and a user's home whose config allows statistics; every way out is closed and counted"
    here, calls = tmp_path_factory.mktemp("segment"), []

    def refuse(self, address, *rest):
        if self.family == socket.AF_UNIX:
            return connect(self, address)  # how nnU-Net talks to its workers
        calls.append(address)
        raise OSError("the network is cut off")

    def no_request(self, method, url, *args, **kw):
        calls.append(url)
        raise OSError("the network is cut off")

    (here / "home").mkdir()
    (here / "home/config.json").write_text(
        json.dumps(dict(totalseg_id="user", send_usage_stats=True, prediction_counter=7))
    )
    for mode in ("fast", "default", "fastest"):
        write_tiny(here / "weights", mode, NAMES)
    connect = socket.socket.connect
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TOTALSEG_HOME_DIR", str(here / "home"))
        m.setenv("TOTALSEG_WEIGHTS_PATH", str(here / "weights"))
        m.setattr(socket.socket, "connect", refuse)
        m.setattr(requests.Session, "request", no_request)
        yield here
    assert not calls, f"something was sent: {calls}"
    assert json.loads((here / "home/config.json").read_text()) == dict(
        totalseg_id="user", send_usage_stats=True, prediction_counter=7
    )
    assert [f.name for f in (here / "home").iterdir()] == ["config.json"]


@pytest.fixture(scope="module")
def scan(place):
    "A phantom chest and its labels"
    c = synthesize_chest(("segment", 0), (48, 48, 24), (7.0, 7.0, 14.0))

    def names():
        return {k: x for k, x in os.environ.items() if k.startswith(("TOTALSEG_", "nnUNet_"))}

    v, before = Volume(c.hu, c.affine), names()
    (found,) = seg.segment([v], P.groups, device="cpu")
    assert names() == before
    return v, found


def test_labels_lie_on_the_input_grid(scan):
    v, labels = scan
    assert labels.dtype == np.uint8 and labels.shape == v.hu.shape and len(np.unique(labels)) > 2
    organs = map_to_groups(labels, P.groups)
    assert organs.dtype == np.uint8 and organs.any() and organs.max() <= len(P.groups)


def test_fill(scan, place, monkeypatch):
    """The same scan from a file in LPS gives the same labels, turned; a broken case is named; a
    second run makes nothing"""
    v, found = scan
    turn = v.affine @ np.diag([-1, -1, 1, 1.0])
    turn[:3, 3] = (v.affine @ [*np.array(v.hu.shape[:2]) - 1, 0, 1])[:3]
    assert nib.aff2axcodes(turn) == ("L", "P", "S")
    write(np.ascontiguousarray(v.hu[::-1, ::-1]), turn, place / "a.nii")
    (place / "b.nii").write_text("no NIfTI")
    table = pd.DataFrame(
        dict(
            case=list("abc"),
            image=[str(place / f"{c}.nii") for c in "abc"],
            organ_map=["", "", "own.nii.gz"],
        )
    )

    def run(p=P):
        return seg.fill_organ_maps(
            table, p, place / "organs", place / "lost.csv", "cpu"
        ).organ_map.tolist()

    assert run() == [str(place / "organs/a.nii.gz"), "", "own.nii.gz"]
    lost = pd.read_csv(place / "lost.csv")
    assert lost.case.tolist() == ["b"] and "b.nii" in lost.reason[0]
    img = nib.load(place / "organs/a.nii.gz")
    assert np.array_equal(
        np.asanyarray(img.dataobj)[::-1, ::-1], map_to_groups(found, P.groups)
    ) and np.allclose(img.affine, turn)
    monkeypatch.setattr(seg, "run_totalsegmentator", lambda *a: pytest.fail("made twice"))
    assert run()[0] == str(place / "organs/a.nii.gz")
    monkeypatch.setattr(
        seg, "run_totalsegmentator", lambda *a: np.full(v.hu.shape, 51, np.uint8)
    )  # all heart
    fewer = P.model_copy(update=dict(groups=dict(heart=["heart"])))
    assert run(fewer)[0] and np.asanyarray(nib.load(place / "organs/a.nii.gz").dataobj).min() == 1
    monkeypatch.setattr(seg, "run_totalsegmentator", lambda *a: np.zeros(v.hu.shape, np.uint8))
    with pytest.raises(ValueError, match="none of 2 cases"):
        run()


def test_the_command(scan, place, monkeypatch, tmp_path, capsys):
    "`asap organs`: a map on the standard grid; without weights, an exit code and a sentence"
    v, found = scan
    write(v.hu, v.affine, tmp_path / "a.nii.gz")
    command = [
        "organs",
        str(tmp_path / "a.nii.gz"),
        "-o",
        str(tmp_path / "out"),
        "--to",
        "7",
        "7",
        "14",
    ]
    assert main(command) == 0
    img = nib.load(tmp_path / "out/a_organs.nii.gz")
    assert img.shape == v.hu.shape, (img.affine, v.affine, nib.load(tmp_path / "a.nii.gz").affine)
    assert np.array_equal(np.asanyarray(img.dataobj), map_to_groups(found, P.groups))
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "none"))
    assert (
        main([*command, "--source", "totalsegmentator"]) == 1
        and "TotalSegmentator's weights are incomplete" in capsys.readouterr().err
    )


@pytest.mark.parametrize("fast", [True, False])
def test_absent_weights_are_named(place, monkeypatch, tmp_path, fast):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "none"))
    with pytest.raises(
        FileNotFoundError, match="Dataset29.*anatomy.totalsegmentator.download"
    ) as e:
        seg.segment([], P.groups, fast=fast)
    assert str(tmp_path / "none") in str(e.value) and not (tmp_path / "none").exists()
    table = pd.DataFrame(dict(case=["a"], image=["a.nii"], organ_map=[""]))
    assert seg.fill_organ_maps(table, with_options(fast=fast), tmp_path).organ_map.tolist() == [""]
    assert not list(tmp_path.iterdir())


def test_half_a_model_is_missing(place, monkeypatch, tmp_path):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path))
    write_tiny(tmp_path, "fast")
    assert seg.find_weights(True) == tmp_path.resolve()
    next(tmp_path.rglob("checkpoint_final.pth")).unlink()
    assert seg.find_weights(True) is None and list(seg.missing_models(True)) == [297]
    with pytest.raises(FileNotFoundError, match="remove an incomplete folder first"):
        seg.ensure_weights(True, download=True)  # the library fetches no model that has a folder


def test_home_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path))
    write_tiny(tmp_path / "nnunet/results", "fast")
    assert (
        seg.find_weights(True) == (tmp_path / "nnunet/results").resolve()
        and seg.find_weights(False) is None
    )


def test_full_models_run_where_the_classes_are(scan, monkeypatch):
    "Without `fast` the wanted classes are named, so that two of the five models run"
    asked = {}

    def fake(img, output, **kw):
        asked.update(kw, output=output)
        return nib.Nifti1Image(np.zeros(img.shape, np.uint8), img.affine)

    monkeypatch.setattr("totalsegmentator.python_api.totalsegmentator", fake)
    seg.segment(scan[0], P.groups, fast=False, device="cpu")
    assert (
        asked["roi_subset"] == NAMES
        and not asked["fast"]
        and asked["ml"]
        and asked["output"] is None
    )
    monkeypatch.setattr(
        "totalsegmentator.python_api.totalsegmentator",
        lambda img, *a, **k: nib.Nifti1Image(np.zeros(img.shape, np.uint8), 2 * img.affine),
    )
    with pytest.raises(RuntimeError, match="affine"):
        seg.segment(scan[0], P.groups, device="cpu")


def test_another_folder_is_no_silent_mistake(scan, monkeypatch, tmp_path):
    write_tiny(tmp_path, "fast")
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="start a new Python process"):
        seg.segment(scan[0], P.groups, device="cpu")
