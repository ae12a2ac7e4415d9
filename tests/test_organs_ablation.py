"Parts of generation 3 that can be left out, findings in the bodies of the segmenter, the table"

import numpy as np
import pandas as pd
import pytest
from conftest import TOP, load_script

from asap.anatomy import organ_bodies as ob
from asap.anatomy.organ_training import OrganDataset, OrgansConfig
from asap.core import rng
from asap.params import load_params
from asap.phantom.canvas import TISSUE_IDS
from asap.phantom.lesions import Scene, lesion_values
from asap.phantom.patient import sample_patient
from asap.phantom.thorax import LOBES
from asap.phantom.trees import lung_trees
from asap.phantom.whole_body import synthesize_whole_body

P = load_params(sections=["anatomy", "organs"])
GROUPS = {g: list(names) for g, names in P.anatomy.groups.items()}
COARSE = (8.0, 8.0, 8.0)
SEED = ("test", "left out", 1)
REST = len(GROUPS) + 1


@pytest.fixture(scope="module")
def whole():
    return ob.draw_body(SEED, COARSE, GROUPS)


def same(a, b) -> bool:
    return all(a[k].shape == b[k].shape and (a[k] == b[k]).all() for k in a)


def test_without_options_a_body_is_that_of_the_generator(whole):
    b = synthesize_whole_body(SEED, COARSE)
    inside = ob.field_mask(b.hu.shape, COARSE, b.view)
    assert (whole["hu"] == b.hu).all()
    assert (whole["tissues"] == np.where(inside, b.tissues, TISSUE_IDS["air"])).all()
    assert same(whole, ob.draw_body(SEED, COARSE, GROUPS, leave_out=["randomization", "findings"]))
    assert same(whole, ob.draw_body(SEED, COARSE, GROUPS, 1.0, ["findings"]))


@pytest.mark.parametrize("part", ["pose", "anatomy", "trees", "scanner"])
def test_each_part_changes_the_body(whole, part):
    assert not same(whole, ob.draw_body(SEED, COARSE, GROUPS, leave_out=[part]))


def test_without_pose_every_scan_shows_the_whole_chest():
    for i in range(3):
        p, view, _ = ob.sample_scan(i, COARSE, ["pose"])
        assert p.arms == "up" and view.padding is None and view.table
        assert (view.pose.scale, *view.pose.turn, *view.pose.shift) == (1, 0, 0, 0, 0, 0, 0)
        assert view.size(COARSE) == (42, 42, 42)
    assert ob.sample_scan(0, COARSE)[1].pose.scale != 1


def test_without_anatomy_bodies_have_one_build_and_one_hu_of_blood():
    bodies = [ob.sample_scan(i, COARSE, ["anatomy"])[0] for i in range(3)]
    assert len({(b.stretch, b.fat, b.wobble, b.heart, b.phase) for b in bodies}) == 1
    blood = [bodies[0].values[n] for n in ("left_ventricle", "right_ventricle", "aorta")]
    assert np.ptp(blood) == 0 and len({b.values["liver"] for b in bodies}) == 3


def test_without_trees_the_lungs_have_no_vessel():
    for seed in (SEED, ("test", "left out", 3)):
        ids = [TISSUE_IDS["artery"], TISSUE_IDS["vein"]]
        d, bare = (
            ob.draw_body(seed, COARSE, GROUPS, 0.0, out) for out in (["pose"], ["pose", "trees"])
        )
        assert np.isin(d["tissues"], ids).sum() > 20
        assert not np.isin(bare["tissues"], ids).any()
    for i in range(30):
        f = ob.sample_findings(i, sample_patient(i), ["trees"])
        assert not {*f.names} & {*ob.BRONCHIAL} and "pulmonary embolism" not in f.diseases


def test_without_scanner_the_image_has_no_noise():
    d, clean = (
        ob.draw_body(SEED, COARSE, GROUPS, 0.0, out) for out in (["pose"], ["pose", "scanner"])
    )
    air = clean["tissues"] == TISSUE_IDS["air"]
    air[1:-1, 1:-1] &= air[2:, 1:-1] & air[:-2, 1:-1] & air[1:-1, 2:] & air[1:-1, :-2]
    corner = (slice(0, 4), slice(-4, None))  # far from the body
    assert air[corner].all() and clean["hu"][corner].std() < 1 < d["hu"][corner].std()


def test_the_sampling_follows_what_is_left_out():
    c = OrgansConfig(randomize=dict(prob=0.4))
    assert c.sampling() == c.randomize
    out = OrgansConfig(leave_out=["randomization", "pose", "findings"])
    assert (out.sampling().prob, out.sampling().scale, out.sampling().turn) == (0, [1, 1], 0)
    assert out.bodies()["findings_prob"] == 0 and out.bodies()["leave_out"] == ["pose"]
    assert OrgansConfig(leave_out=["randomization"]).bodies() == OrgansConfig().bodies()


@pytest.mark.parametrize("change", [dict(findings_prob=0.1), dict(leave_out=["trees"])])
def test_bodies_are_drawn_again_after_a_change(tmp_path, change):
    c = OrgansConfig(spacing=[*COARSE], num_phantoms=1)
    OrganDataset(c, GROUPS, 0, tmp_path / "bodies").body(0)
    OrganDataset(c, GROUPS, 0, tmp_path / "bodies")
    assert (tmp_path / "bodies/0.npz").exists()
    OrganDataset(c.model_copy(update=change), GROUPS, 0, tmp_path / "bodies")
    assert not (tmp_path / "bodies/0.npz").exists()


def test_half_of_the_bodies_have_findings(monkeypatch):
    class StopError(Exception):
        pass

    def found(*args):
        raise StopError

    monkeypatch.setattr(ob, "sample_findings", found)
    monkeypatch.setattr(ob, "lung_trees", lambda *a, **k: {})
    monkeypatch.setattr(ob, "synthesize_whole_body", lambda *a, **k: 1 / 0)
    hits = 0
    for i in range(60):
        try:
            ob.draw_body(i, COARSE, GROUPS, 0.5)
        except StopError:
            hits += 1
        except ZeroDivisionError:
            pass
    assert 18 <= hits <= 42


def with_finding(*names, severity=0.8):
    "Healthy classes, and the canvas, findings and classes of a body with findings"
    p = sample_patient(SEED)
    view = ob.standard_view(p)
    args = dict(patient=p, view=view, trees=lung_trees(p))
    healthy = synthesize_whole_body(SEED, COARSE, **args)
    f = ob.BodyFindings(SEED, p, [*names], (), dict.fromkeys(ob.ABNORMALITIES, severity))
    return healthy, synthesize_whole_body(SEED, COARSE, **args, finish=f.paint), f


def test_dense_lung_is_lung_with_a_tissue_of_its_own():
    healthy, b, f = with_finding("Consolidation", "Atelectasis")
    mask = np.any([x.mask for x in f.found], 0)
    assert len(f.found) == 2 and mask.sum() > 30
    assert (b.labels == healthy.labels)[mask].all() and np.isin(
        b.labels[mask], [*LOBES.values()]
    ).all()
    dense = b.tissue("thrombus")
    assert dense.sum() > 20 and not (dense & ~mask).any() and not healthy.tissue("thrombus").any()
    assert np.median(b.hu[dense].astype(int) - healthy.hu[dense]) > 300
    assert (ob.organ_classes(b.labels, b.labels > 0, GROUPS)[dense] <= 5).all()


def test_fluid_is_the_rest_of_the_body():
    healthy, b, f = with_finding("Pleural effusion")
    mask = f.found[0].mask
    classes = ob.organ_classes(b.labels, np.ones(b.labels.shape, bool), GROUPS)
    assert mask.sum() > 50 and (classes[mask] == REST).all()
    assert np.isin(healthy.labels[mask], [*LOBES.values()]).mean() > 0.6


def test_findings_of_walls_and_nodes_keep_the_organs():
    names = ("Arterial wall calcification", "Lymphadenopathy", "Coronary artery wall calcification")
    healthy, b, _ = with_finding(*names)
    assert (b.labels == healthy.labels).all() and (b.hu != healthy.hu).any()


def test_objects_on_the_skin_are_outside():
    for i in range(30):
        f = ob.sample_findings(i, sample_patient(i))
        if rng("distractor", i, "electrodes").random() < 0.45:
            break
    d = ob.draw_body(i, COARSE, GROUPS, 1.0, ["pose"])
    bare = ob.draw_body(i, COARSE, GROUPS, 0.0, ["pose"])
    metal = np.isin(d["tissues"], [TISSUE_IDS["metal"], TISSUE_IDS["calcium"]])
    loose = metal & (bare["tissues"] == TISSUE_IDS["air"])
    assert loose.any() and "Medical material" not in f.names
    assert (d["classes"][loose] == 0).all()


@pytest.mark.parametrize("z", [-520.0, -230.0, -60.0, 110.0])
def test_findings_can_be_painted_in_any_view(z):
    "From thighs to neck; every abnormality and distractor"
    p = sample_patient(SEED)
    view = ob.View(ob.standard_view(p).pose, (0.0, 0.0, z), 90.0, 300.0)
    heart = 1.42
    f = ob.BodyFindings(
        SEED, p, [*ob.ABNORMALITIES], ("pulmonary embolism",), dict.fromkeys(ob.ABNORMALITIES, 0.9)
    )
    b = synthesize_whole_body(
        SEED,
        COARSE,
        patient=p,
        view=view,
        heart=heart,
        trees=lung_trees(p, size=heart),
        finish=f.paint,
    )
    assert np.isfinite(b.canvas.hu).all()
    assert bool(f.found) == (z > -400)


def test_a_lobe_without_a_generation_has_a_segment():
    from asap.phantom.lung_findings import _branch

    p = sample_patient(("q", 0))
    trees = lung_trees(p, size=1.42)
    t = trees["airway"]
    assert not ((t.lobe == 13) & (t.generation == 7)).any()
    s = Scene(None, None, p, trees, 1.42, lesion_values("none", 0), 0)
    row = _branch(s, rng(0), 13, 7)
    assert t.lobe[row] == 13 and t.generation[row] == 6


@pytest.fixture
def script(monkeypatch):
    "The benchmark with a training and measures that cost nothing"
    m = load_script(TOP / "benchmarks/organs_ablation.py")
    m.trained = []

    def train(c, groups, seed, folder, bodies):
        bodies.mkdir(parents=True, exist_ok=True)
        m.trained.append((tuple(c.leave_out), seed))
        if m.stop and len(m.trained) == m.stop:
            raise KeyboardInterrupt
        return m.Segmenter(None, c.use(), groups)

    m.stop = 0
    monkeypatch.setattr(m, "train_segmenter", train)
    monkeypatch.setattr(m, "measure", lambda s, a: dict(dice_3b=0.5, dice_2=s.config.min_lung))
    return m


def ask(m, folder, *more):
    a = m.arguments(["--folder", f"{folder}/runs", "--table", f"{folder}/t.csv", *more])
    m.run(a)
    return pd.read_csv(folder / "t.csv", dtype=dict(fingerprint=str))


def test_the_table_resumes(script, tmp_path):
    script.stop = 4
    with pytest.raises(KeyboardInterrupt):
        ask(script, tmp_path, "--seeds", "1")
    assert list(pd.read_csv(tmp_path / "t.csv").left_out) == ["nothing", "pose", "randomization"]
    script.stop = 0
    t = ask(script, tmp_path, "--seeds", "1")
    assert list(t.left_out) == ["nothing", *ob.PARTS] and t.fingerprint.is_unique
    assert len(script.trained) == 8 and script.trained.count(((), 1)) == 1
    assert (t.dice_2 < 1e-3).all(), "no scan is refused"
    ask(script, tmp_path, "--seeds", "1")
    assert len(script.trained) == 8
    assert not list((tmp_path / "runs").glob("bodies_*")), "drawn bodies are removed"


def test_other_settings_replace_a_row(script, tmp_path):
    one = ask(script, tmp_path, "--seeds", "1", "--leave-out", "nothing", "trees")
    two = ask(script, tmp_path, "--seeds", "1", "--leave-out", "trees", "--steps", "7")
    assert list(two.left_out) == ["nothing", "trees"] and list(two.steps) == [300, 7]
    assert one.fingerprint[0] == two.fingerprint[0] and one.fingerprint[1] != two.fingerprint[1]
    more = ask(script, tmp_path, "--seeds", "1", "2", "--leave-out", "nothing")
    assert list(more.seed) == [1, 1, 2]


def test_bodies_are_shared_where_they_are_the_same(script):
    c = OrgansConfig()
    a = script.arguments([])
    folders = {
        part: script.bodies_folder(a, c.model_copy(update=dict(leave_out=[part])))
        for part in ob.PARTS
    }
    assert folders["randomization"] == script.bodies_folder(a, c)
    assert len({*folders.values()}) == len(ob.PARTS)
