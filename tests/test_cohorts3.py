"Every adapter with bodies of generation 3: its reader takes them, labels and masks are visible"

import functools

import numpy as np
import pandas as pd
import pytest

from asap.data.adapter import get_cohort
from asap.data.checks import check_mask, load_checked
from asap.data.cohorts import acdc, btcv, fumpe, inspect, rspect, stoic
from asap.data.prepare import hash_contents
from asap.data.synthesize import (
    GENERATOR_MODULES,
    PhantomConfig,
    generator_options,
    run,
    synthesize_cohort,
)
from asap.data.volumes import open_nifti
from asap.phantom import cases
from asap.phantom.abnormalities3 import lung_involvement
from asap.phantom.canvas import TISSUE_IDS
from asap.phantom.words import synthesize_case

SMALL = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0), second_recon_prob=0.0)
THREE = dict(SMALL, version=3)
COUNTS = dict(cc_ccii=(2, 1), luna16=(1, 1), rspect=(0, 2), rider=(0, 1), covid_ct_seg=(0, 1))
WITH_TARGET = {  # cohort -> classes that every case holds
    "luna16": {3, 4, 5},
    "msd_lung": {1},
    "covid_19_20": {1},
    "segthor": {1, 2, 3, 4},
    "fumpe": {1},
    "btcv": {1, 2, 3, 4, 5, 6, 7, 8, 9, 11},
    "acdc": {1, 2, 3},
    "rider": {1},
    "covid_ct_seg": {1},
}
OTHERS = ["ct_rate", "stoic", "rad_chest_ct", "inspect", "cc_ccii", "rspect", "ctrg", "own"]
EXPECTED = ("subset", "8-bit picture", "indeterminate")  # what a miniature leaves out anyway


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A miniature of each, once"
    top = tmp_path_factory.mktemp("three")

    @functools.cache
    def make(name):
        get_cohort(name).write(top / name, 3, *COUNTS.get(name, (1, 1)), **THREE)
        return top / name

    return make


@pytest.mark.parametrize("name", [*WITH_TARGET, *OTHERS])
def test_a_cohort_is_read_as_if_it_were_real(name, made):
    adapter = get_cohort(name)
    table, bad = adapter.read(made(name))
    assert not [r for r in bad.rows if not any(w in r["reason"] for w in EXPECTED)]
    assert len(table) >= 1
    for row in table.itertuples():
        v, found = load_checked(row.image, adapter.source, adapter.open_volume)
        assert not [f for f in found if f.level == "warning"], found
        if name in WITH_TARGET:
            classes, affine = adapter.read_target(row.target_map)
            check_mask(classes.shape, affine, v)
            assert WITH_TARGET[name] <= set(np.unique(classes).tolist())
        if row.organ_map:
            organs = np.asarray(open_nifti(row.organ_map).dataobj)
            assert {10, 11, 12, 14, 51, 52} <= set(np.unique(organs).tolist())


def test_companions_describe_the_parents_bodies(tmp_path):
    counts = dict(ct_rate=dict(train=1, test=1), radgenome=dict(train=1, test=1))
    made = run(counts, tmp_path / "data", tmp_path / "made", 3, 1, THREE)
    assert made == ["ct_rate", "radgenome", "rex_grounding_ct"]
    note = (tmp_path / "data/PHANTOMS.txt").read_text()
    assert "Version of the phantom: 3\n" in note
    for name in ("radgenome", "rex_grounding_ct"):  # the same, each patient drawn once more
        before = hash_contents(tmp_path / "data" / name)
        get_cohort(name).write(tmp_path / "data" / name, 3, 1, 1, **THREE)
        assert hash_contents(tmp_path / "data" / name) == before
    table, bad = get_cohort("radgenome").read(tmp_path / "data/radgenome")
    assert len(table) == 2 and not bad.rows


@pytest.mark.parametrize("name", ["stoic", "fumpe", "acdc"])
def test_the_same_seed_gives_the_same_bytes(name, made, tmp_path):
    get_cohort(name).write(tmp_path / name, 3, *COUNTS.get(name, (1, 1)), **THREE)
    assert hash_contents(tmp_path / name) == hash_contents(made(name))


# What a label says is in the image ------------------------------------------


def draw(adapter, index, **kw):
    key = (f"{adapter.name} 3", "train", index)
    return cases.synthesize_patient(*key, 3, adapter.domain_shift, **kw, **SMALL)


def test_embolism_is_a_label_of_clots_in_pulmonary_arteries():
    clots, found = "pulmonary embolism", []
    for chance in (0, 1, 1, 1):
        k = draw(inspect.INSPECT, 1 + len(found), diseases={clots: chance}, masks=[clots])
        pe = inspect.sample_pe(k, "any", 1)
        assert pe == int(clots in k.masks) == int(clots in k.chest.diseases)
        assert ("embolism" in k.report.impression) == bool(pe)
        answer = rspect.sample_answer(k, "any", 1)
        assert answer["negative_exam_for_pe"] == int(not pe and not answer["indeterminate"])
        found.append(pe)
    assert found[0] == 0 and 1 in found


def test_clots_of_fumpe_replace_blood_of_pulmonary_arteries():
    for i in (1, 2):
        k = draw(fumpe.FUMPE, i, diseases={"pulmonary embolism": 1}, showing=["pulmonary embolism"])
        mask, r = k.chest.diseases["pulmonary embolism"].mask, k.recons[0]
        assert mask.any() and not np.isin(r.labels[mask], [51, 52]).any()  # heart, aorta
        assert (k.chest.body.tissues[mask] == TISSUE_IDS["thrombus"]).all()
        vessels = np.isin(
            k.chest.body.tissues, [TISSUE_IDS[n] for n in ("artery", "pulmonary_artery")]
        )
        assert k.chest.clean[mask].mean() < k.chest.clean[vessels].mean()


def test_rspect_names_the_slices_with_clots():
    k = draw(
        rspect.RSPECT,
        1,
        diseases={"pulmonary embolism": 1},
        showing=["pulmonary embolism"],
        masks=["pulmonary embolism"],
    )
    columns = rspect._clot_columns(k, 1, k.recons[0].hu.shape[2])
    mask = k.masks["pulmonary embolism"]
    assert (columns["pe_present_on_image"] == mask.any((0, 1))).all()
    assert columns["rightsided_pe"] or columns["leftsided_pe"]


def test_covid_and_its_severity_follow_the_opacity():
    rows = []
    for i in range(1, 9):
        k = draw(stoic.STOIC, i, diseases={"COVID-19": i % 2, "common pneumonia": 0})
        said = stoic.sample_labels(k, "any", i)
        assert said["probCOVID"] == i % 2 == int("COVID-19" in k.chest.diseases)
        assert not said["probCOVID"] or lung_involvement(k.chest) > 0
        assert said["probSevere"] == int(said["probCOVID"] and k.outcome["severity"] > 0.5)
        rows.append(k.outcome["severity"])
    assert len(set(rows)) == len(rows)


def test_death_and_readmission_come_earlier_with_more_findings():
    few, many = [], []
    ill = ["Cardiomegaly", "Pleural effusion", "Consolidation", "Lymphadenopathy"]
    for i in (1, 2, 3):
        for out, odds in ((few, -30), (many, 30)):
            shift = cases.DomainShift(odds=dict.fromkeys(ill, odds))
            k = cases.synthesize_patient("outcome", "train", i, 3, shift, {}, **SMALL)
            days = inspect.sample_readmission(k, "any", i)[0]
            out.append((k.outcome["severity"], k.outcome["time_days"], days))
    few, many = np.mean(few, 0), np.mean(many, 0)
    assert many[0] > few[0] and many[1] < few[1] and many[2] < few[2]


def test_the_abdomen_has_btcvs_organs_at_their_own_places():
    k = draw(btcv.BTCV, 1, region="abdomen", phase="venous")
    classes, labels = btcv.organ_labels(k.recons[0].labels), k.recons[0].labels
    assert ((classes == 6) == (labels == 5)).all() and ((classes == 8) == (labels == 52)).all()
    x = [np.argwhere(classes == c)[:, 0].mean() for c in (2, 3)]  # kidneys: right is at larger x
    assert x[0] > x[1]


def test_ventricles_contract_and_groups_differ():
    drawn = {g: acdc._phases_3(("test", 1), 56, g)[0] for g in ("NOR", "DCM", "HCM")}
    cavity = {g: {p: (m == 3).sum() for p, (_, m) in d.items()} for g, d in drawn.items()}
    assert all(c["ES"] < c["ED"] for c in cavity.values())
    assert cavity["DCM"]["ED"] > cavity["NOR"]["ED"] > cavity["HCM"]["ED"]
    image, m = drawn["NOR"]["ED"]
    assert image[m == 3].mean() > 1.5 * image[m == 2].mean()


# The choice of the generation ------------------------------------------------


def section(**kw):
    counts = dict(stoic=dict(train=1, test=0))
    grid = dict(size=[48, 48, 24], spacing=[7.0, 7.0, 14.0], second_recon_prob=0.0)
    return PhantomConfig(n_patients=counts, **grid, **kw)


def test_generation_2_is_the_default_and_leaves_no_trace():
    p = section()
    assert p.version == 2 and "version" not in generator_options(p)
    p.check(None)
    three = section(version=3)
    three.check(None)
    assert generator_options(three)["version"] == 3
    with pytest.raises(ValueError, match="2 or 3"):
        section(version=4)


def test_generation_2_is_drawn_as_before():
    kw = dict(SMALL, masks=["Lung nodule"])
    own = dict(diseases={"COVID-19": 1}, showing=["COVID-19"], region="abdomen", phase="venous")
    a, b = (
        cases.synthesize_patient("x", "train", 1, **own, **kw),
        synthesize_case("x", "train", 1, **kw),
    )
    assert (a.recons[0].hu == b.recons[0].hu).all() and a.report == b.report
    assert (a.outcome, a.labels, a.questions) == (b.outcome, b.labels, b.questions)
    assert cases.generation(a) == 2 and cases.synthesize_full_report(
        a.chest, ("x", "train", 1)
    ) == (b.report)


def test_a_record_of_one_generation_is_not_kept_for_the_other(tmp_path):
    where = (tmp_path / "data", tmp_path / "made", dict(train=1, test=0), 3, 1)
    assert synthesize_cohort("stoic", *where, SMALL)
    assert not synthesize_cohort("stoic", *where, SMALL)
    assert synthesize_cohort("stoic", *where, THREE)
    assert not synthesize_cohort("stoic", *where, THREE)


def test_the_code_of_generation_2_does_not_include_generation_3():
    assert set(GENERATOR_MODULES[2]) < set(GENERATOR_MODULES[3])
    new = {m for m in GENERATOR_MODULES[3] if m not in GENERATOR_MODULES[2]}
    assert {"asap.phantom.abnormalities3", "asap.phantom.cases", "asap.phantom.canvas"} <= new


def test_the_list_of_generation_3_is_what_its_cases_import():
    from asap.graph import import_graph

    graph = import_graph(with_phantom=True)
    for module in ("asap.phantom.cases", "asap.phantom.heart_mri"):
        reached = {m for m in graph.find_upstream_modules(module) if m.startswith("asap.phantom.")}
        assert reached <= set(GENERATOR_MODULES[3])


def test_radgenome_lists_emboli_among_the_disorders():
    from asap.data.cohorts.radgenome import _question_rows

    shift = cases.DomainShift(contrast=1.0)
    clots = "pulmonary embolism"
    kw = dict(diseases={clots: 1}, showing=[clots], **SMALL)
    k = cases.synthesize_patient("q", "train", 1, 3, shift, **kw)
    rows = pd.DataFrame(_question_rows(k.chest, ("q", "train", 1))["disorder"])
    assert clots in rows.Disorders[0]
