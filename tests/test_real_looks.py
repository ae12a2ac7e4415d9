"Scores on real scans: archives of phantoms in the published layouts go through both stages"

import hashlib
import tarfile
from functools import partial
from pathlib import Path

import files
import numpy as np
import pandas as pd
import pytest
from conftest import TOP, load_script

from asap.anatomy.organs import (
    map_to_groups,
    merge_class_masks,
    read_multilabel_map,
    totalsegmentator_classes,
)
from asap.anatomy.segmenter import Segmenter, SegmenterConfig, build_segmenter, save_segmenter
from asap.core import read_json, write_json
from asap.data import real
from asap.params import load_params
from asap.phantom.bodies3b import Box, synthesize_other_body
from asap.study import real_looks as looks, real_scores as scores
from asap.study.page import render_real_scores

P = load_params()
GROUPS = looks.organ_groups(P)
FLIP = np.diag([-1.0, -1, 1, 1])
SCORED = [n for n, s in real.SCANS.items() if s.region]
WHEN = dict(date="2026-01-01", commit="0" * 40)


def body(seed, box, spacing=(5.0, 5.0, 5.0)):
    "HU, TotalSegmentator's labels and affine, stored as LPS"
    o = synthesize_other_body(seed, spacing, box)
    affine = o.affine @ FLIP
    affine[:3, 3] = (o.affine @ [o.hu.shape[0] - 1, o.hu.shape[1] - 1, 0, 1])[:3]
    return o.hu[::-1, ::-1].copy(), o.labels[::-1, ::-1].copy(), affine


def class_masks(labels, affine, folder, names):
    ids = totalsegmentator_classes()
    for name in names:
        mask = (labels == ids[name]).astype(np.uint8)
        files.nifti(mask, affine, folder / f"{name}.nii.gz")


def write_totalsegmentator(top):
    "The files that the archive of TotalSegmentator has, of phantoms"
    chest, abdomen = real.SCANS["totalsegmentator_chest"], real.SCANS["totalsegmentator_abdomen"]
    part, series = real.SCANS["totalsegmentator_part"], real.SCANS["totalsegmentator_dicom"]
    hu, labels, affine = body("chest", Box())
    files.nifti(hu, affine, top / chest.image)
    class_masks(labels, affine, top / chest.masks[0], ["heart", "aorta"])
    for r in chest.reports:
        write_json(dict(landmarks={"1": dict(name="arch", diameter=2.9)}), top / r)
    hu, labels, affine = body("abdomen", Box((0.0, 0.0, -330.0), (336.0, 336.0, 200.0)))
    files.nifti(hu, affine, top / abdomen.image)
    files.nifti(labels, affine, top / abdomen.labels)
    low = slice(0, 18)
    files.nifti(hu[:, :, low], affine, top / part.image)
    files.nifti(labels[:, :, low], affine, top / part.labels)
    names = [n for classes in GROUPS.values() for n in classes]
    class_masks(labels[:, :, low], affine, top / part.masks[0], names)
    hu, labels, affine = body("series", Box((0.0, 0.0, -55.0), (336.0, 336.0, 60.0)))
    files.dicom(hu, affine, top / series.image)
    files.nifti(labels, affine, top / series.labels)


def write_pyradiomics(top):
    top.mkdir(parents=True)
    for name in ("pyradiomics_lung1", "pyradiomics_lung2"):
        hu, labels, affine = body(name, Box())
        lobe = totalsegmentator_classes()["lung_lower_lobe_right"]
        where = np.argwhere(labels == lobe).mean(0)
        grid = np.stack(np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), -1)
        lesion = np.linalg.norm(grid - where, axis=-1) < 4
        hu[lesion] = 40
        files.itk(hu, affine, top / real.SCANS[name].image)
        files.itk(lesion.astype(np.uint8), affine, top / real.SCANS[name].lesion)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "Both archives, and params with their hashes"
    top, section = tmp_path_factory.mktemp("archives"), P.real.model_dump()
    for package, write in zip(real.ARCHIVE_FOLDERS, (write_totalsegmentator, write_pyradiomics)):
        version = section[package]["version"]
        write(top / package)
        path = top / f"{package}-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            name = f"{package}-{version}/{real.ARCHIVE_FOLDERS[package]}"
            tar.add(top / package, arcname=name.rstrip("/"))
        section[package]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return top, real.RealConfig(**dict(section, fetch=True))


def write_weights(folder, seed):
    "A tiny segmenter that was not trained"
    import torch

    torch.manual_seed(seed)
    config = SegmenterConfig(
        spacing=[12.0, 12.0, 12.0],
        roi_size=[16, 16, 16],
        channels=[4, 8],
        min_lung=1e-6,
        min_confidence=1e-6,
    )
    model = build_segmenter(config.channels, len(GROUPS)).eval()
    save_segmenter(Segmenter(model, config, GROUPS), folder, "# Random\n")


@pytest.fixture(scope="module")
def scanned(archives, tmp_path_factory):
    "A project's folder after the stage `real_scans`, with weights"
    root, (top, config) = tmp_path_factory.mktemp("project"), archives

    def copy(package, version, folder):
        source = top / f"{package}-{version}.tar.gz"
        return Path(folder, source.name).write_bytes(source.read_bytes()) and Path(
            folder, source.name
        )

    organs = dict(
        labels=lambda path, shape, affine: read_multilabel_map(path, GROUPS, shape, affine),
        masks=lambda masks, shape, affine, hu: merge_class_masks(masks, GROUPS, shape, affine, hu),
    )
    with pytest.MonkeyPatch.context() as m:
        m.setattr(real, "download_archive", copy)
        real.prepare_scans(config, root / "build/real", (3.5, 3.5, 7.0), (-1000, 1000), organs)
    write_weights(root / "weights/organs", 1)
    write_weights(root / "build/seed2", 2)
    (root / "weights/asap").symlink_to(TOP / "weights/asap")
    return root


@pytest.fixture
def project(scanned, tmp_path):
    "The same with lists of its own"
    for name in ("build", "weights"):
        (tmp_path / name).symlink_to(scanned / name)
    (tmp_path / "benchmarks").mkdir()
    return tmp_path


def lists(root):
    marks = root / "benchmarks"
    return dict(frozen=marks / "real_frozen.csv", ledger=marks / "real_looks.csv")


def loader(root):
    return partial(looks.load_real_model, root=root, p=P)


ORGANS = dict(model="organs", seed="1", source="weights/organs")
SECOND = dict(model="organs", seed="2", source="build/seed2")


def freeze(root, rows, generation="3"):
    return looks.freeze(rows, generation, **lists(root), load=loader(root), root=root, **WHEN)


def look(root, generation="3"):
    folder = root / "build/real"
    return looks.take_look(
        generation, **lists(root), load=loader(root), folder=folder, groups=GROUPS, **WHEN
    )


def truth_model(name="truth", roll=0):
    "Predicts the groups that the phantom was drawn with"
    where = dict(
        totalsegmentator_chest=("chest", Box()),
        pyradiomics_lung1=("pyradiomics_lung1", Box()),
        pyradiomics_lung2=("pyradiomics_lung2", Box()),
    )

    def predict(case):
        organs = np.zeros(case.volume.hu.shape, np.uint8)
        if case.region == "chest":
            _, labels, _ = body(*where[case.name])
            organs = np.roll(map_to_groups(labels, GROUPS)[::-1, ::-1], roll, 0)
        elif case.organs is not None:
            organs = case.organs

        def same(mask):
            return mask

        return scores.ScanShares(case.volume, organs, lambda k: np.isin(organs, k), same, same, 0.0)

    return scores.RealModel(name, 0, name, predict)


def test_every_scan_but_the_series_is_kept_on_its_own_grid(scanned):
    folder = scanned / "build/real"
    assert scores.scored_scans(folder) == SCORED
    assert (folder / "totalsegmentator_dicom/image.nii").exists()
    assert not (folder / "totalsegmentator_dicom/scan.nii.gz").exists()
    case = scores.load_case(folder, "totalsegmentator_chest")
    assert case.volume.axes == "RAS" and case.volume.spacing == pytest.approx((5, 5, 5))
    hu, labels, affine = body("chest", Box())
    assert np.array_equal(case.volume.hu, hu[::-1, ::-1])
    assert np.array_equal(case.organs == 6, map_to_groups(labels, GROUPS)[::-1, ::-1] == 6)


def test_the_truth_scores_high_and_what_was_moved_does_not(scanned):
    cases = [scores.load_case(scanned / "build/real", n) for n in SCORED]
    t = {
        roll: scores.score_model(truth_model(roll=roll), cases, GROUPS)
        .set_index(["scan", "measure"])
        .value
        for roll in (0, 6)
    }
    for organ in ("heart", "aorta"):
        at = ("totalsegmentator_chest", f"Dice of {organ}")
        assert t[0][at] == 1 and t[6][at] < 0.8
    for name in SCORED:
        if real.SCANS[name].region == "chest":
            at = (name, "Dice of the lungs")
            assert t[0][at] > 0.85 > t[6][at]
        else:
            assert t[0][name, "false lung"] == 0
            assert t[0][name, scores.RATIO] < 0.01


def test_lung_in_an_abdomen_is_false(scanned):
    case = scores.load_case(scanned / "build/real", "totalsegmentator_part")
    everywhere = np.full(case.volume.hu.shape, 1, np.uint8)
    shares = scores.ScanShares(
        case.volume, everywhere, lambda k: np.isin(everywhere, k), lambda m: m, lambda m: m, 0.0
    )
    rows = {r["measure"]: r["value"] for r in scores.organ_scores(shares, case, GROUPS)}
    assert rows["false lung"] == pytest.approx(rows["lung share"]) == 1


def test_the_series_is_never_scored(project):
    with pytest.raises(ValueError, match="never scored"):
        scores.load_case(project / "build/real", "totalsegmentator_dicom")
    row = dict.fromkeys(looks.LEDGER, "x") | dict(scan="totalsegmentator_dicom", value=1.0)
    with pytest.raises(ValueError, match="never scored"):
        looks.record_looks(pd.DataFrame([row]), project / "looks.csv", **WHEN)
    assert not (project / "looks.csv").exists()


def test_an_arm_is_scored_on_its_own_grid(project):
    asap = dict(model="asap", seed="0", source="weights/asap")
    model = looks.load_real_model(asap, project, P)
    names = ["totalsegmentator_chest", "totalsegmentator_part", "pyradiomics_lung1"]
    cases = [scores.load_case(project / "build/real", n) for n in names]
    t = scores.score_model(model, cases, GROUPS, project / "pictures")
    t = t.set_index(["scan", "measure"]).value
    assert t["totalsegmentator_chest", "Dice of the lungs"] > 0.3, "a phantom of another program"
    rank = t["pyradiomics_lung1", "rank of the lesion's patch"]
    assert 1 <= rank <= t["pyradiomics_lung1", "patches that are ranked"] <= 512
    assert t["totalsegmentator_part", scores.RATIO] > 0
    assert len(list((project / "pictures").glob("*.png"))) == 3


def test_a_generation_is_looked_at_once(project):
    freeze(project, [ORGANS])
    first = look(project)
    assert looks.count_looks(first) == 5 and set(first.scan) == set(SCORED)
    bytes_before = lists(project)["ledger"].read_bytes()
    assert look(project).equals(first), "the same weights are the same look"
    assert lists(project)["ledger"].read_bytes() == bytes_before
    with pytest.raises(ValueError, match="new generation number"):
        freeze(project, [SECOND])
    kept = looks.read_looks(lists(project)["frozen"], looks.FROZEN)
    late = kept.assign(seed="2", weights="0" * 16)  # by hand
    pd.concat([kept, late]).to_csv(lists(project)["frozen"], index=False)
    with pytest.raises(ValueError, match="Give them a new generation number"):
        look(project)
    assert lists(project)["ledger"].read_bytes() == bytes_before
    kept.to_csv(lists(project)["frozen"], index=False)
    freeze(project, [ORGANS, SECOND], "4")
    second = look(project, "4")
    assert looks.count_looks(second) == 10, "the first weights were not scored again"
    assert second.head(len(first)).equals(first) and set(second.generation) == {"3", "4"}


def test_nothing_that_is_not_frozen_is_scored(project):
    with pytest.raises(ValueError, match="no frozen weights"):
        look(project)
    freeze(project, [ORGANS])
    kept = pd.read_csv(lists(project)["frozen"], dtype=str)
    kept.assign(weights="0" * 16).to_csv(lists(project)["frozen"], index=False)
    with pytest.raises(ValueError, match="frozen was 0000"):
        look(project)
    kept.assign(rules="0" * 16).to_csv(lists(project)["frozen"], index=False)
    with pytest.raises(ValueError, match="code that scores has changed"):
        look(project)
    assert not lists(project)["ledger"].exists()


def test_the_stage_scores_only_what_the_ledger_holds(project, monkeypatch):
    t = looks.write_real(project, P, project / "runs/real")
    assert t.empty
    freeze(project, [ORGANS])
    never = pytest.MonkeyPatch.context
    with never() as m:
        m.setattr(looks, "score_model", None)  # a call would fail
        assert looks.write_real(project, P, project / "runs/real").empty
    status = read_json(project / "runs/real/status.json")
    assert (status["looks"], status["frozen"]) == (0, 1)
    assert any("frozen but not scored" in s for s in status["skipped"])
    assert any("weights/asap" in s and "not frozen" in s for s in status["skipped"])
    assert "not scored yet" in render_real_scores(project / "runs/real")
    look(project)
    t = looks.write_real(project, P, project / "runs/real")
    assert set(t.repeated[t.measure != "seconds"]) == {"same"}
    assert len(list((project / "runs/real/pictures").glob("*.png"))) == 5
    said = render_real_scores(project / "runs/real")
    assert "5 looks so far" in said and "five patients or fewer" in said
    assert said.count("<img") == 5


def test_other_values_are_named_and_not_shown(project):
    freeze(project, [ORGANS])
    t = look(project)
    path = lists(project)["ledger"]
    t.assign(value=t.value + 0.5).to_csv(path, index=False)
    shown = looks.write_real(project, P, project / "runs/real")
    assert set(shown.repeated[shown.measure != "seconds"]) == {"differs"}
    assert np.allclose(shown.value, t.value + 0.5)


def test_weights_that_are_not_here_keep_their_rows(project):
    freeze(project, [ORGANS])
    look(project)
    (project / "weights").unlink()
    t = looks.write_real(project, P, project / "runs/real")
    assert len(t) and set(t.repeated) == {""}
    status = read_json(project / "runs/real/status.json")
    assert any("holds no model" in r for r in status["reasons"])
    assert "There is no organ segmenter (weights/organs)." in status["skipped"]


def test_offline_both_stages_say_so(tmp_path, capfd):
    config = P.real.model_copy(update=dict(fetch=False))
    status = real.prepare_scans(config, tmp_path / "build/real", (3.5, 3.5, 7.0))
    assert not status["scans"]
    t = looks.write_real(tmp_path, P, tmp_path / "runs/real")
    assert t.empty and list(t.columns) == [*looks.LEDGER, "bar", "repeated"]
    said = capfd.readouterr().err
    assert "`real.fetch` is false" in said and "no real scan is here" in said
    page = render_real_scores(tmp_path / "runs/real")
    assert "No weights are frozen, so no model was scored on the real scans." in page


def test_a_look_needs_all_scans(project, tmp_path):
    freeze(project, [ORGANS])
    (tmp_path / "part/build").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="real_scans"):
        looks.take_look(
            "3",
            **lists(project),
            load=loader(project),
            folder=tmp_path / "part",
            groups=GROUPS,
            **WHEN,
        )


def test_the_command(monkeypatch, capsys):
    script = load_script(TOP / "benchmarks/real_looks.py")
    assert script.parse_model("a:1=weights/a/") == dict(model="a", seed="1", source="weights/a")
    with pytest.raises(SystemExit, match="NAME:SEED=SOURCE"):
        script.parse_model("weights/a")
    monkeypatch.setattr(script, "git_revision", lambda: "0" * 40 + "-dirty")
    with pytest.raises(SystemExit, match="commit what is frozen"):
        script.main(["look", "--generation", "3"])
    script.main([])
    assert "looks (scans times weights) so far" in capsys.readouterr().out


def test_lists_of_the_repository_are_complete():
    "Rows of the ledger are of frozen weights"
    marks = TOP / "benchmarks"
    frozen = looks.read_looks(marks / "real_frozen.csv", looks.FROZEN)
    ledger = looks.read_looks(marks / "real_looks.csv", looks.LEDGER)
    keys = ["generation", "model", "seed", "weights"]
    rows = set(map(tuple, frozen[keys].to_numpy()))
    assert set(map(tuple, ledger[keys].to_numpy())) <= rows
    assert "totalsegmentator_dicom" not in set(ledger.scan)
