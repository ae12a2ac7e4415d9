"Abnormalities of generation 3: place, HU, size, diseases, reports"

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_erosion, uniform_filter

from asap.abnormalities import ABNORMALITIES, DomainShift
from asap.core import rng
from asap.phantom import abnormalities3 as p3, chest_findings, lesions, lung_findings
from asap.phantom.canvas import TISSUE_IDS, Pose
from asap.phantom.patient import sample_patient
from asap.phantom.thorax import LOBES
from asap.phantom.whole_body import View
from asap.phantom.words import PhantomCase, synthesize_questions, synthesize_report

SPACING = (3.5, 3.5, 5.0)
IN_LUNG = lung_findings.LUNG_FINDINGS
FLUID = "Pleural effusion"
COARSE = dict(size=(64, 64, 32), spacing=(5.2, 5.2, 10.0))


def healthy(seed, phase="venous", spacing=SPACING, heart=1.0):
    "A body without abnormalities"
    p = sample_patient(seed, phase=phase)
    view = View(Pose(1.0, p.stretch))
    return lesions.draw_scene(seed, p, view, spacing, thickness=4.0, heart=heart)


@pytest.fixture(scope="module")
def bodies():
    "Two bodies, copied for each painter"
    return [healthy(("test", "abnormal", i)) for i in range(2)]


def paint(body, name, severity=0.6):
    "Scene and finding of one abnormality"
    s = lesions.copy_scene(body, severity)
    found = p3.paint_findings(s, [name])
    return s, found[0] if found else None


def near(body, mask, mm):
    return binary_dilation(mask, iterations=int(np.ceil(mm / min(SPACING))))


@pytest.mark.parametrize("name", IN_LUNG)
def test_findings_of_the_lung_lie_in_the_lung(bodies, name):
    for body in bodies:
        s, f = paint(body, name)
        assert f.mask.sum() >= 3 and f.size_mm > 2
        lung = np.isin(body.canvas.labels, list(LOBES.values()))
        assert (f.mask & lung).sum() > 0.85 * f.mask.sum(), name
        assert (np.abs(s.canvas.hu - body.canvas.hu)[f.mask] > 20).mean() > 0.6, name


@pytest.mark.parametrize("name", ["Lung nodule", "Consolidation", "Atelectasis", "Bronchiectasis"])
def test_the_named_lobes_are_those_of_the_mask(bodies, name):
    for body in bodies:
        _, f = paint(body, name)
        found = {
            lesions.describe_lobes([i])[1]
            for i in LOBES.values()
            if (body.canvas.labels[f.mask] == i).sum() > 0.35 * f.mask.sum()
        }
        assert found and all(lobe in f.place for lobe in found), (f.place, found)
        assert f.side in ("left", "right", "both sides")


def test_places_outside_the_lung(bodies):
    for body in bodies:
        labels = body.canvas.labels
        heart, vessel = labels == 51, labels == 52
        for name, where in (
            ("Pericardial effusion", near(body, heart, 34)),
            ("Coronary artery wall calcification", near(body, heart, 10)),
            ("Arterial wall calcification", near(body, vessel, 10)),
            ("Cardiomegaly", heart),
        ):
            _, f = paint(body, name)
            assert f.mask.any() and (f.mask & where).sum() > 0.95 * f.mask.sum(), name
        _, hernia = paint(body, "Hiatal hernia")
        x, y, z = body.canvas.points
        assert y[hernia.mask].mean() < y[heart].mean() - 15
        assert abs(x[hernia.mask].mean()) < 40 and -160 < z[hernia.mask].mean() < -60
        _, nodes = paint(body, "Lymphadenopathy")
        assert not np.isin(labels[nodes.mask], (16, 51, 52)).any()
        assert np.abs(x[nodes.mask]).max() < 85


def test_fluid_is_at_the_back_and_no_lung(bodies):
    for body in bodies:
        s, f = paint(body, "Pleural effusion")
        lung = np.isin(body.canvas.labels, list(LOBES.values()))
        y = body.canvas.points[1]
        assert y[f.mask].mean() < y[lung].mean() - 20
        assert (s.canvas.labels[f.mask] == 0).all()
        x = body.canvas.points[0][f.mask]
        assert dict(left=(x < 0).all(), right=(x > 0).all()).get(f.side, True)


HU = {  # name: range of the median inside the mask, without contrast medium
    "Consolidation": (-30, 70),
    "Atelectasis": (-200, 80),
    "Lung nodule": (-60, 700),
    "Lung opacity": (-720, -250),
    "Emphysema": (-1000, -900),
    "Pleural effusion": (-20, 30),
    "Pericardial effusion": (-20, 35),
    "Lymphadenopathy": (-20, 60),
    "Medical material": (1800, 5000),
    "Arterial wall calcification": (180, 1600),
    "Coronary artery wall calcification": (120, 1600),
    "Mosaic attenuation pattern": (-860, -600),
}


def test_hu_are_those_of_the_tissue():
    body = healthy(("test", "plain"), "none")
    for name, (low, high) in HU.items():
        s, f = paint(body, name)
        inner = binary_erosion(f.mask)
        inner = inner if inner.sum() > 10 else f.mask
        assert low < np.median(s.canvas.hu[inner]) < high, (name, np.median(s.canvas.hu[inner]))


def test_medium_brightens_soft_lesions_only():
    plain, venous = (lesions.lesion_values(p, 0) for p in ("none", "venous"))
    for name in ("consolidation", "atelectasis", "nodule", "node"):
        assert venous[name] > plain[name] + 20, name
    for name in ("effusion", "pericardium", "calcium", "metal", "ground_glass"):
        assert abs(venous[name] - plain[name]) < 8, name
    assert 30 < lesions.lesion_values("pulmonary", 0)["clot"] < 70


@pytest.mark.parametrize("mm", [6.0, 12.0, 30.0, 60.0])
def test_a_nodule_has_the_size_of_its_report(bodies, mm):
    s = bodies[0]
    at = np.array([70.0, 0.0, -60.0])
    for i in range(4):
        share, hole = lung_findings._nodule_share(s, rng("test", mm, i), at, mm)
        spiky = share.copy()
        got = lesions.volume_diameter(spiky, SPACING)
        assert 0.72 * mm < got < 1.12 * mm, got


def test_size_words_follow_the_mask(bodies):
    for body in bodies:
        _, f = paint(body, "Pleural effusion")
        depth = -body.wall.cavity[f.mask].max(), -body.wall.cavity[f.mask].min()
        assert abs(depth[1] * body.k - f.size_mm) < 8
        small, large = (paint(body, "Pericardial effusion", q)[1] for q in (0.1, 0.9))
        assert large.size_mm > 2 * small.size_mm and large.mask.sum() > 1.6 * small.mask.sum()
        for name in ("Consolidation", "Lung opacity"):
            _, f = paint(body, name)
            assert abs(lesions.axial_diameter(f.mask, SPACING) - f.size_mm) < 0.1


def test_a_large_heart_is_large():
    small, large = (
        healthy(("test", "heart"), heart=h) for h in (1.0, chest_findings.heart_factor(0.6))
    )
    sizes = [paint(b, "Cardiomegaly")[1].size_mm for b in (small, large)]
    assert sizes[1] > 1.12 * sizes[0]


def test_severity_is_drawn(bodies):
    for name in ("Emphysema", "Lung opacity", "Pleural effusion", "Arterial wall calcification"):
        volume = []
        for q in (0.1, 0.9):
            found = [paint(b, name, q)[1] for b in bodies]
            volume.append(sum(f.mask.sum() for f in found if f))
        assert volume[1] > 1.4 * volume[0], (name, volume)


def test_emboli_lie_in_pulmonary_arteries():
    s = healthy(("test", "clots"), "pulmonary")
    blood = np.isin(s.canvas.tissues, [TISSUE_IDS[n] for n in ("artery", "pulmonary_artery")])
    bright = s.canvas.hu.copy()
    f = chest_findings.paint_embolism(s, rng("test", "clots"), 0.8)
    assert f["mask"].sum() > 10 and not (f["mask"] & ~blood).any() and f["count"] >= 2
    assert bright[f["mask"]].mean() > 180 > 130 > s.canvas.hu[f["mask"]].mean()


def test_covid_is_peripheral_and_other_haze_is_not():
    body = healthy(("test", "covid"), "none")

    def depth(sick):
        s = lesions.copy_scene(body, diseases=sick)
        f = p3.paint_findings(s, ["Lung opacity"])[0]
        return np.median(-s.wall.cavity[f.mask])

    inner, outer = depth(()), depth(("COVID-19",))
    assert outer < 22 and inner > outer


def test_diseases_bring_their_sign():
    names, sick = p3.sample_diseases(0, [], {"COVID-19": 1.0, "common pneumonia": 1.0})
    assert "COVID-19" in sick and "common pneumonia" not in sick
    assert "Lung opacity" in names
    assert p3.sample_diseases(0, [], dict.fromkeys(p3.DISEASES, 0.0)) == ([], ())
    c = p3.synthesize_body_chest(("test", 1), diseases=["common pneumonia"], **COARSE)
    assert list(c.diseases) == ["common pneumonia"] and c.has("Consolidation")


def test_a_lesion_does_not_depend_on_the_grid():
    at = []
    for spacing in ((3.0, 3.0, 4.0), (4.0, 4.0, 6.0)):
        body = healthy(("test", "two grids"), spacing=spacing)
        _, f = paint(body, "Lung nodule", 0.8)
        at.append(body.canvas.points[:, f.mask].mean(1))
    assert np.abs(at[0] - at[1]).max() < 4


def test_what_is_out_of_view_is_no_finding():
    p = sample_patient(("test", "abdomen"))
    view = View(Pose(1.0, p.stretch), (0, 0, -380), 150, 400)
    names = [n for n in ABNORMALITIES if n != "Arterial wall calcification"]
    c = p3.synthesize_body_chest(
        ("test", "abdomen"), None, (6, 6, 10), names, diseases=["COVID-19"], view=view
    )
    assert c.findings == [] and c.diseases == {}


def test_the_same_seed_gives_the_same_bytes():
    a, b = (p3.synthesize_body_chest(("test", "bytes"), **COARSE) for _ in range(2))
    for name in ("hu", "labels", "clean"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
    assert [f.mask.tobytes() for f in a.findings] == [f.mask.tobytes() for f in b.findings]


def test_what_fluid_covers_is_no_finding(bodies):
    s = lesions.copy_scene(bodies[0], 0.95)
    found = {f.name: f for f in p3.paint_findings(s, ["Emphysema", "Lung nodule", FLUID])}
    fluid = found[FLUID].mask
    assert all(not (f.mask & fluid).any() for n, f in found.items() if n != FLUID)
    lumen = s.canvas.tissues == TISSUE_IDS["airway"]
    inside = uniform_filter(fluid.astype(np.float32), 5) > 0.75
    assert (lumen & inside).sum() < 10


def test_distractors_do_not_depend_on_labels():
    a = p3.synthesize_body_chest(("test", 2), present=[], **COARSE)
    b = p3.synthesize_body_chest(("test", 2), present=["Emphysema", "Atelectasis"], **COARSE)
    assert a.distractors == b.distractors
    counts = [len(chest_findings.DISTRACTORS)] + [c for c, _ in chest_findings.DISTRACTORS.values()]
    assert counts[0] >= 8 and all(0 < c < 1 for c in counts[1:])


def test_reports_and_questions_of_page_12_work():
    c = p3.synthesize_body_chest(("test", 3), present=ABNORMALITIES, **COARSE)
    assert {f.name for f in c.findings} >= set(ABNORMALITIES) - {"Cardiomegaly"}
    assert [f.name for f in c.findings] == [n for n in ABNORMALITIES if c.has(n)]
    report = synthesize_report(c, 0)
    assert report.findings.count(".") >= len(c.findings) and "{" not in report.findings
    assert {q["kind"] for q in synthesize_questions(c, 0)} >= {"location", "size", "presence"}


def test_a_case_has_all_fields():
    k = p3.synthesize_body_case(
        "test", "train", 1, (48, 48, 24), (7, 7, 14), 1.0, masks=ABNORMALITIES, diseases=[]
    )
    assert isinstance(k, PhantomCase) and len(k.recons) == 2
    assert set(k.masks) == {n for n, v in k.labels.items() if v}
    assert all(m.shape == k.recons[0].hu.shape for m in k.masks.values())
    assert k.recons[0].hu.dtype == np.int16 and 0 <= k.outcome["severity"] <= 1


def test_an_angiography_has_medium():
    shift = DomainShift(contrast=1.0)
    phases = [p3.sample_phase(i, shift) for i in range(50)]
    assert "none" not in phases and phases.count("pulmonary") > 30
    assert {p3.sample_phase(i) for i in range(50)} >= {"none", "venous"}


def test_wrong_names_are_errors():
    with pytest.raises(ValueError, match="none of the 18"):
        p3.synthesize_body_chest(0, only="Pneumothorax")
    with pytest.raises(ValueError, match="none of the diseases"):
        p3.synthesize_body_chest(0, diseases=["measles"])


def test_a_small_lobe_has_a_branch_of_every_generation(bodies):
    t = bodies[0].trees["airway"]
    s = lesions.copy_scene(bodies[0])
    keep = (t.lobe != 13) | (t.generation != 7)
    own = {n: getattr(t, n) for n in ("start", "end", "radius", "parent", "generation", "lobe")}
    short = type(t)(t.kind, *(v[keep] for v in own.values()))
    s.trees = s.trees | {"airway": short}
    row = lung_findings._branch(s, rng("test", "branch"), 13, 7)
    assert short.lobe[row] == 13 and short.generation[row] == 6


def test_outcomes_follow_the_risk():
    sick = p3.synthesize_body_chest(("test", 4), present=["Consolidation"], **COARSE)
    well = p3.synthesize_body_chest(("test", 4), present=[], **COARSE)
    assert p3.visible_risk(sick) > p3.visible_risk(well)
    days = [[p3.visible_readmission(c, i)[0] for i in range(40)] for c in (sick, well)]
    assert np.mean(days[0]) < np.mean(days[1])
    assert p3.visible_readmission(well, 1) == p3.visible_readmission(well, 1)
