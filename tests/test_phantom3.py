"Generation 3 of the phantom: anatomy, contrast, coverage, pose, scanner"

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import label

from asap.anatomy.organs import totalsegmentator_classes
from asap.core import rng
from asap.phantom.canvas import TISSUE_IDS, TISSUES, Pose
from asap.phantom.patient import PHASES, sample_patient, tissue_values
from asap.phantom.scanner import ScannerSettings, kernel_response, sample_settings, scanner_noise
from asap.phantom.skeleton import VERTEBRAE
from asap.phantom.thorax import LOBES
from asap.phantom.trees import lung_trees, paint_emboli, select_branches, widen
from asap.phantom.whole_body import (
    LUNG_RANGE,
    View,
    sample_view,
    standard_view,
    synthesize_whole_body,
)

CLASSES = totalsegmentator_classes()
CYSTS = {CLASSES["kidney_cyst_left"], CLASSES["kidney_cyst_right"]}  # in some patients only
PLAIN = ScannerSettings(0, noise=8.0)


def whole(p, seed, spacing=(4.0, 4.0, 5.0)):
    view = View(Pose(1.0, p.stretch), (0, 0, -160), 840, 580, table=False)
    return synthesize_whole_body(seed, spacing, patient=p, view=view, settings=PLAIN)


def liters(b, *names):
    mask = np.isin(b.labels, [CLASSES[n] for n in names])
    return mask.sum() * np.prod(b.spacing) / 1e6


def pieces(mask):  # share of the largest piece
    found, _ = label(mask, np.ones((3, 3, 3)))
    return np.bincount(found.ravel())[1:].max() / mask.sum()


@pytest.fixture(scope="module", params=["M", "F"])
def body(request):
    "A man or a woman from the head to the thighs"
    seed = ("test", "whole", request.param)
    return whole(sample_patient(seed, sex=request.param, phase="arterial"), seed)


@pytest.fixture(scope="module")
def chest():
    "The middle of a chest at 1.2 mm"
    p = sample_patient(("test", "chest"), phase="arterial")
    view = View(Pose(1.0, p.stretch), (0, -5, -50), 250, 240, table=False)
    settings = ScannerSettings(0, thickness=1.5)
    return synthesize_whole_body(("test", "chest"), (1.2, 1.2, 1.5), None, p, view, settings)


def test_every_class_is_in_a_whole_body(body):
    absent = CYSTS | ({CLASSES["prostate"]} if body.patient.sex == "F" else set())
    assert set(CLASSES.values()) - set(np.unique(body.labels).tolist()) <= absent
    assert CLASSES["prostate"] in absent or CLASSES["prostate"] in body.labels


def test_tissues_of_a_whole_body(body):
    absent = {"table", "table_core", "cyst", "thrombus", "calcium", "metal"}
    absent |= {"breast"} if body.patient.sex == "M" else set()
    there = {TISSUES[i] for i in np.unique(body.tissues)}
    assert set(TISSUES) - there <= absent


def test_twelve_ribs_on_each_side_that_do_not_cross_the_middle(body):
    x = body.canvas.points[0]
    for side, sign in (("right", 1), ("left", -1)):
        for n in range(1, 13):
            mask = body.labels == CLASSES[f"rib_{side}_{n}"]
            assert mask.any() and (sign * x[mask] > 0).all(), (side, n)


def test_ribs_and_vertebrae_descend_in_order(body):
    z = body.canvas.points[2]
    for side in ("left", "right"):
        tops = [z[body.labels == CLASSES[f"rib_{side}_{n}"]].max() for n in range(1, 13)]
        assert (np.diff(tops) < 0).all()
    middles = [z[body.labels == row[1]].mean() for row in VERTEBRAE]
    assert (np.diff(middles) < 0).all()


def test_organs_lie_on_their_sides(body):
    x, y, z = body.canvas.points
    middle = {n: x[body.labels == i].mean() for n, i in CLASSES.items() if i in body.labels}
    right = ("liver", "gallbladder", "kidney_right", "superior_vena_cava", "inferior_vena_cava")
    left = ("spleen", "stomach", "kidney_left", "heart", "adrenal_gland_left")
    assert all(middle[n] > 0 for n in right) and all(middle[n] < 0 for n in left)
    assert y[body.labels == CLASSES["sternum"]].mean() > 50 > -40
    assert y[body.labels == CLASSES["vertebrae_T6"]].mean() < -40
    liver = z[body.labels == CLASSES["liver"]]
    assert liver.max() < z[np.isin(body.labels, list(LOBES.values()))].max()


ORGANS = (  # liters in adults; the sources are on pages 16 and 18
    (tuple(LOBES), 2.6, 7.0),
    (("heart",), 0.4, 0.95),
    (("liver",), 1.0, 2.4),
    (("spleen",), 0.08, 0.4),
    (("kidney_left",), 0.1, 0.25),
    (("kidney_right",), 0.1, 0.25),
    (("aorta",), 0.1, 0.4),
    (("stomach",), 0.1, 0.8),
)


@pytest.mark.parametrize("i", range(4))
def test_volumes_are_those_of_adults(i):
    b = whole(sample_patient(("test", "volume", i)), ("test", "volume", i), (5.0, 5.0, 7.0))
    for names, low, high in ORGANS:
        assert low < liters(b, *names) < high, (names, liters(b, *names))
    lungs = liters(b, *LOBES)
    shares = {n: liters(b, n) / lungs for n in LOBES}
    assert 0.03 < shares["lung_middle_lobe_right"] < 0.14, shares
    others = [s for n, s in shares.items() if n != "lung_middle_lobe_right"]
    assert all(0.12 < s < 0.36 for s in others), shares
    assert shares["lung_upper_lobe_left"] + shares["lung_lower_lobe_left"] < 0.55


def test_deep_inspiration_gives_larger_and_darker_lungs():
    p = sample_patient(("test", "breath"))
    out = []
    for breath in (0.2, 1.0):
        values = tissue_values(p.phase, p.seed, p.dose, p.age, breath)
        q = dataclasses.replace(p, inspiration=breath, values=values)
        b = synthesize_whole_body(0, patient=q, view=standard_view(q), settings=PLAIN)
        lung = np.isin(b.labels, list(LOBES.values()))
        out.append((lung.sum(), b.canvas.hu[lung].mean()))
    assert out[1][0] > 1.15 * out[0][0] and out[1][1] < out[0][1] - 40


def test_airways_and_vessels_are_connected(chest):
    for share, *names in (
        (0.97, "airway"),
        (0.97, "pulmonary_artery", "artery"),
        (0.88, "left_atrium", "pulmonary_vein", "vein"),
        (0.9, "right_atrium", "superior_vein"),
        (0.99, "aorta"),
        (0.99, "left_ventricle", "aorta"),
    ):
        mask = np.isin(chest.tissues, [TISSUE_IDS[n] for n in names])
        assert pieces(mask) > share, (names, pieces(mask))
    assert pieces(chest.labels == CLASSES["heart"]) > 0.99
    assert pieces(np.isin(chest.labels, list(LOBES.values()))) > 0.4  # two lungs


def test_lobes_are_one_piece_each(chest):
    for name, i in LOBES.items():
        assert pieces(chest.labels == i) > 0.98, name


def test_chambers_lie_in_the_heart(chest):
    heart = chest.labels == CLASSES["heart"]
    volume = np.prod(chest.spacing) / 1e3
    for name, low, high in (
        ("left_ventricle", 60, 220),
        ("right_ventricle", 60, 260),
        ("left_atrium", 30, 140),
        ("right_atrium", 30, 160),
        ("myocardium", 90, 330),
    ):
        mask = chest.tissue(name)
        assert low < mask.sum() * volume < high, (name, mask.sum() * volume)
        assert heart[mask].mean() > 0.7, name


def test_a_branch_starts_where_its_parent_ends():
    for t in lung_trees(sample_patient(("test", "tree"))).values():
        inner = (t.parent >= 0) & (t.generation > 3)
        assert np.allclose(t.start[inner], t.end[t.parent[inner]])
        assert (t.parent < np.arange(len(t))).all()
        assert (t.radius[inner, 1] <= t.radius[t.parent[inner], 1] + 1e-9).all()
        assert (t.lobe[inner] == t.lobe[t.parent[inner]]).all()


def test_trees_have_five_generations_to_three_millimeters():
    for t in lung_trees(sample_patient(("test", "tree"), sex="M")).values():
        wide = 2 * t.radius[:, 1] >= 2.9
        assert t.generation[wide].max() >= 6 and wide.sum() > 60, t.kind
        means = [t.radius[t.generation == g, 1].mean() for g in range(2, 9)]
        assert (np.diff(means) < 0).all()


def test_branches_stay_in_their_lobe(chest):
    c = chest.canvas
    for kind in ("artery", "airway", "vein"):
        t = chest.trees[kind]
        end = t.end[t.generation > 4]
        index = np.rint((end - c.middle) @ c.to_index.T).astype(int)
        ok = ((index >= 0) & (index < c.hu.shape)).all(1)
        found = chest.labels[tuple(index[ok].T)]
        assert (found == t.lobe[t.generation > 4][ok]).mean() > 0.9, kind


def test_emboli_fill_arteries_only(chest):
    canvas = dataclasses.replace(
        chest.canvas, hu=chest.canvas.hu.copy(), tissues=chest.tissues.copy()
    )
    rows = select_branches(chest.trees["artery"], (2, 5), least=1.5)
    clot = paint_emboli(canvas, chest.trees["artery"], rows)
    before = {TISSUES[i] for i in np.unique(chest.tissues[clot])}
    assert clot.sum() > 500 and before <= {"artery", "pulmonary_artery"}
    assert np.array_equal(canvas.tissues == TISSUE_IDS["thrombus"], clot)
    assert canvas.hu[clot].mean() < chest.canvas.hu[clot].mean() - 50


def test_wider_bronchi_hold_more_air():
    p = sample_patient(("test", "wide"))
    trees = lung_trees(p)
    rows = select_branches(trees["airway"], (3, 6), lobe=14)
    wide = trees | dict(airway=widen(trees["airway"], rows, 2.0))
    view = View(Pose(1.0, p.stretch), (0, -10, -80), 60, 300, table=False)
    kw = dict(spacing=(1.5, 1.5, 3.0), patient=p, view=view, settings=PLAIN)
    a, b = (synthesize_whole_body(0, trees=t, **kw) for t in (trees, wide))
    more = b.tissue("airway") & ~a.tissue("airway")
    assert more.sum() > 100 and (b.labels[more] == 14).mean() > 0.7


ORDER = {  # phase: tissues by falling HU
    "pulmonary": ("superior_vein", "pulmonary_artery", "aorta", "liver"),
    "arterial": ("aorta", "pulmonary_artery", "inferior_vein"),
    "venous": ("portal_vein", "liver", "muscle"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_enhancement_is_consistent(phase):
    for i in range(20):
        v = sample_patient(("test", "phase", i), phase=phase).values
        names = ORDER.get(phase, ())
        assert all(v[a] > v[b] for a, b in zip(names, names[1:])), (phase, i)
        assert v["artery"] == v["pulmonary_artery"] and v["vein"] == v["pulmonary_vein"]
        if phase == "none":
            blood = [v[n] for n in ("aorta", "pulmonary_artery", "superior_vein", "left_atrium")]
            assert np.ptp(blood) < 1e-9 and 30 < blood[0] < 55
            assert v["kidney_cortex"] < 60
        if phase in ("arterial", "venous"):
            assert v["kidney_cortex"] > 100


def test_the_phase_changes_nothing_else():
    a, b = (sample_patient(("test", "same"), phase=p) for p in ("none", "venous"))
    assert {k for k in vars(a) if vars(a)[k] != vars(b)[k]} == {"phase", "values"}
    views = [standard_view(p) for p in (a, b)]
    x, y = (synthesize_whole_body(0, patient=p, view=v) for p, v in zip((a, b), views))
    assert np.array_equal(x.labels, y.labels) and not np.array_equal(x.hu, y.hu)


def test_hu_of_the_image_are_those_of_the_table(body):
    for name in ("aorta", "left_ventricle", "right_ventricle", "liver", "kidney_cortex", "muscle"):
        got = np.median(body.canvas.hu[body.tissue(name)])
        assert abs(got - body.patient.values[name]) < 12, (name, got)


def test_random_values_change_no_label():
    p = sample_patient(("test", "random"))
    r = rng("test", "random values")
    values = {n: float(r.uniform(-1000, 1000)) for n in TISSUES}
    kw = dict(patient=p, view=standard_view(p), settings=PLAIN)
    a, b = (synthesize_whole_body(0, values=v, **kw) for v in (None, values))
    assert np.array_equal(a.labels, b.labels) and np.array_equal(a.tissues, b.tissues)
    assert np.corrcoef(a.hu.ravel(), b.hu.ravel())[0, 1] < 0.7


def test_the_same_seed_gives_the_same_bytes():
    a, b = (synthesize_whole_body(("test", "bytes")) for _ in range(2))
    for name in ("hu", "labels", "tissues", "affine"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
    other = synthesize_whole_body(("test", "other"))
    assert other.hu.shape != a.hu.shape or not np.array_equal(other.hu, a.hu)


def test_a_volume_does_not_depend_on_the_grid():
    p = sample_patient(("test", "grid"))
    out = [
        synthesize_whole_body(0, s, patient=p, view=standard_view(p), settings=PLAIN)
        for s in ((3.5, 3.5, 7.0), (2.0, 2.0, 2.5))
    ]
    for name in ("lung_lower_lobe_left", "heart", "liver", "aorta"):
        a, b = (liters(x, name) for x in out)
        assert abs(a / b - 1) < 0.05, (name, a, b)


def test_a_pose_moves_and_scales_the_body():
    p = sample_patient(("test", "pose"))
    poses = (Pose(), Pose(scale=0.8), Pose(shift=(40, -20, 0)), Pose(turn=(0, 0, 20)), Pose(warp=9))
    found = []
    for pose in poses:
        view = View(pose, (0, 0, -60), 240, 420, table=False)
        b = synthesize_whole_body(0, (4, 4, 6), patient=p, view=view, settings=PLAIN)
        heart = np.argwhere(b.labels == CLASSES["heart"]) * b.spacing
        found.append((len(heart), heart.mean(0)))
    plain, small, moved, turned, warped = found
    assert abs(small[0] / plain[0] / 0.8**3 - 1) < 0.06
    assert np.allclose(moved[1] - plain[1], (40, -20, 0), atol=3)
    assert abs(turned[0] / plain[0] - 1) < 0.06
    assert np.linalg.norm(turned[1] - plain[1]) > 3
    assert 0.6 < warped[0] / plain[0] < 1.6 and warped[0] != plain[0]


def test_views_have_the_ranges_that_they_promise():
    views = [sample_view(("test", i), sample_patient(("test", i))) for i in range(400)]
    assert min(v.pose.scale for v in views) < 0.72 and max(v.pose.scale for v in views) > 1.28
    assert max(abs(v.pose.turn[2]) for v in views) > 18
    assert max(abs(v.pose.shift[0]) for v in views) > 60
    assert {v.padding for v in views} == {None, -1024, -2000, -3024}
    fields = [v.field for v in views]
    assert 250 <= min(fields) < 262 and 488 < max(fields) <= 500
    covers = [v.coverage for v in views]
    assert 80 <= min(covers) < 95 and 380 < max(covers) <= 400
    assert {sample_patient(("test", i)).arms for i in range(40)} == {"up", "down"}
    assert {v.table for v in views} == {True, False}


def below_the_lungs(v):
    "Whether a view was chosen to end below the lungs"
    return v.center[2] + 0.4 * v.coverage / v.pose.scale < LUNG_RANGE[0]


def test_a_tenth_of_the_views_lies_below_the_lungs():
    views = [sample_view(("test", i), sample_patient(("test", i))) for i in range(600)]
    assert 0.07 < np.mean([below_the_lungs(v) for v in views]) < 0.13


def test_only_views_below_the_lungs_show_none():
    drawn = []
    for i in range(200):
        seed = ("test", "coverage", i)
        v = sample_view(seed, sample_patient(seed))
        below = below_the_lungs(v)
        if drawn.count(below) < (6 if below else 14):
            b = synthesize_whole_body(seed, (9.0, 9.0, 9.0))
            assert np.isin(b.labels, list(LOBES.values())).any() != below, (i, b.view)
            drawn.append(below)
    assert len(drawn) == 20


def test_the_field_is_filled():
    p = sample_patient(("test", "field"))
    view = View(Pose(), (0, 0, -60), 60, 300, padding=-3024, round_field=True)
    b = synthesize_whole_body(0, (3, 3, 6), patient=p, view=view)
    x = (np.arange(b.hu.shape[0]) - (b.hu.shape[0] - 1) / 2) * 3
    far = np.hypot(x[:, None], x[None]) > 150
    assert (b.hu[far] == -3024).all() and (b.hu[~far] > -1100).all()


def test_thick_slices_blur_along_z_only():
    p = sample_patient(("test", "slice"))
    out = []
    for mm in (1.0, 7.0):
        s = ScannerSettings(0, thickness=mm, blur=0.1, noise=0.0)
        view = View(Pose(), (0, 0, -100), 100, 300, table=False)
        b = synthesize_whole_body(0, (3, 3, 1.5), patient=p, view=view, settings=s)
        out.append(np.abs(np.diff(b.canvas.hu, axis=2)).max(2).mean())
    assert out[1] < 0.8 * out[0]


def test_noise_has_a_ramp_and_follows_the_path():
    x, y = np.meshgrid(np.arange(128) - 64, np.arange(128) - 64, indexing="ij")
    inside = (x / 60) ** 2 + (y / 40) ** 2 < 1
    hu = np.where(inside, 0, -1000).astype(np.float32)[..., None].repeat(6, 2)
    s = ScannerSettings(0, blur=0.2, noise=20, thickness=3.0)
    noise = scanner_noise(hu, (3.0, 3.0, 3.0), s)
    assert noise[56:72, 56:72].std() > 1.4 * noise[56:72, :16].std()
    power = (np.abs(np.fft.fft2(noise, axes=(0, 1))) ** 2).mean(2)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    low, high = power[(f > 0.01) & (f < 0.06)].mean(), power[(f > 0.25) & (f < 0.35)].mean()
    assert high > 3 * low
    assert kernel_response(np.zeros(1), s)[0] == 1.0


def test_settings_cover_kernels_and_slices():
    many = [sample_settings(("test", i), 3.0) for i in range(200)]
    assert {s.thickness for s in many} == {1.5, 3.0, 3.75}
    assert 0.2 < np.mean([s.sharp > 0 for s in many]) < 0.8
    assert all(1 <= sample_settings(i, d).thickness <= 7 for i in range(20) for d in (0.6, 7.0, 10))


def test_generation_2_does_not_use_generation_3():
    from asap.data.synthesize import GENERATOR_MODULES

    pages = "canvas patient skeleton thorax trees abdomen scanner whole_body".split()
    assert not {f"asap.phantom.{m}" for m in pages} & set(GENERATOR_MODULES[2])
