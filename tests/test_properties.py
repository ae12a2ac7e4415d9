"""What a study must not get wrong, on any registered task: no test data in a choice, the direction
of every comparison, the level of every interval, disjoint splits; and small offsets"""

import inspect
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TOP

from asap.anatomy.organs import merge_class_masks
from asap.core import rng
from asap.data.adapter import get_cohort
from asap.data.crops import apply_crop
from asap.data.series import even_positions, measure_steps
from asap.data.splits import hold_out, label_subsets
from asap.inference import zero_shot as scan_zero_shot
from asap.model.asap import Decoder
from asap.model.vit import ViT3D
from asap.params import load_params
from asap.registry import all_tasks, task_families
from asap.study import grounding, tables
from asap.tasks import classify, metrics, prognosis, projection, retrieve, vocabulary
from asap.text.tokens import encode_report, train_wordpiece_tokenizer
from asap.train import lr_factor

P = load_params(TOP / "params/smoke.yaml")
N = 90  # cases


# --- no test data in any choice


def synthetic(cohort: str) -> tuple[pd.DataFrame, np.ndarray]:
    "A cohort table with everything that a task asks for, and features that know a little of it"
    g = rng("properties", cohort)
    labels = list(get_cohort(cohort).labels or ["a"])
    split = np.array(["train", "val", "test"])[np.arange(N) % 3]
    t = pd.DataFrame(dict(case=[f"{cohort}{i}" for i in range(N)], split=split))
    t = t.assign(scan=t.case, patient=t.case, image="", organ_map="", target_map="")
    names = labels + [n for n in classify.COHORT_LABELS.get(cohort, []) if n not in labels]
    if cohort == "stoic":
        names = list(dict.fromkeys([*names, "severe"]))
    y = g.integers(0, 2, (N, len(names)))
    if cohort in classify.MULTICLASS_COHORTS:
        y = np.eye(len(names), dtype=int)[g.integers(0, len(names), N)]
    t = t.assign(**{f"label:{n}": y[:, k].astype(float) for k, n in enumerate(names)})
    days = g.uniform(1, 700, N).round()
    t = t.assign(time_days=days, event=g.integers(0, 2, N).astype(float))
    for name, day in prognosis.HORIZON_DAYS.items() if cohort == "inspect" else ():
        t[f"label:{name}"] = np.where(days <= day, t.event, np.where(days > day, 0.0, np.nan))
    t = t.assign(findings=[f"finding {i}." for i in range(N)], impression="")
    noise = g.normal(size=(N, 24))
    noise[:, : y.shape[1]] += 0.5 * y[:, :24]
    return t, noise.astype(np.float32)


def with_other_test_answers(t: pd.DataFrame) -> pd.DataFrame:
    "The same cases; of the test split all that is asked for is another patient's"
    t, test = t.copy(), np.flatnonzero(t.split == "test")
    asked = [c for c in t if c.startswith("label:")]
    for c in [*asked, "time_days", "event", "findings"]:
        t.loc[test, c] = t[c].to_numpy()[np.roll(test, 7)]
    return t


class Words:
    "A text encoder that gives each sentence a fixed vector"

    def sentences(self, texts):
        return torch.tensor(np.stack([rng("w", s).normal(size=16) for s in texts])).float()


def run_classify(family, tables_, embedded):
    return family.run(list(TASKS[family.name]), tables_, embedded, [1.0], [0])


def run_vocabulary(family, tables_, embedded):
    return family.run(list(TASKS[family.name]), tables_, embedded, Words(), P.vocabulary, 0)


def run_retrieve(family, tables_, embedded):
    reports = {
        c: Words().sentences([f"finding {i}." for i in range(N)]).numpy() for c in tables_
    }  # of the first answers: a test report is a candidate, not a choice
    names = list(TASKS[family.name])
    return family.run(names, tables_, embedded, reports, P.retrieve, 0)


RUNNERS = {  # family of frozen features -> how it is run
    "classify": run_classify,
    "prognosis": run_classify,
    "vocabulary": run_vocabulary,
    "retrieve": run_retrieve,
}
TRAINED_NOTHING = {"zero_shot"}
TASKS = {n: [t.name for t in f.tasks] for n, f in task_families().items()}


TRAINED = {  # families that train a model -> the test of the same in their file
    "segment": "test_test_masks_change_no_prediction",
    "report": "test_test_reports_change_no_generated_one",
    "vqa": "test_test_answers_change_no_given_one",
}


def test_every_family_is_checked():
    assert set(task_families()) - TRAINED_NOTHING == {*RUNNERS, *TRAINED}
    for family, name in TRAINED.items():
        assert f"def {name}(" in (TOP / f"tests/test_{family}.py").read_text()


@pytest.mark.parametrize("name", RUNNERS)
def test_predictions_do_not_depend_on_test_answers(name):
    family = task_families()[name]
    cohorts = list(dict.fromkeys(t.cohort for t in family.tasks))
    made = {c: synthetic(c) for c in cohorts}
    found = []
    for change in (lambda t: t, with_other_test_answers):
        now = {c: change(t) for c, (t, _) in made.items()}
        embedded = {c: {"a": (f, now[c])} for c, (_, f) in made.items()}
        found.append(RUNNERS[name](family, now, embedded))
    keys = ["task", "arm", "fraction", "case", *({"label", "direction"} & set(found[0]))]
    chosen = {"probability", "threshold", "C", "risk", "rank"} & set(found[0])
    assert chosen and {t.name for t in family.tasks} <= set(found[0].task)
    a, b = (f.sort_values(keys).reset_index(drop=True) for f in found)
    for c in chosen:
        pd.testing.assert_series_equal(a[c], b[c])
    if "truth" in a:
        assert not a.truth.equals(b.truth)  # the answers were others


def test_the_penalty_is_the_best_one_on_validation():
    "On features with noise, the strengths differ between labels, as validation says"
    from asap.tasks import probe

    g = rng("penalty")
    x, xv = g.normal(size=(2, 60, 20))
    y, yv = ((a[:, 0] + 2 * g.normal(size=60) > 0).astype(float) for a in (x, xv))
    model, c = probe.fit_linear_probe(x, y, xv, yv)
    from sklearn.linear_model import LogisticRegression

    fits = [LogisticRegression(C=k, max_iter=3000).fit(x, y) for k in probe.C_GRID]
    scores = [metrics.auc(yv, m.predict_proba(xv)[:, 1]) for m in fits]
    assert c == probe.C_GRID[int(np.argmax(scores))] and len(set(scores)) > 1
    np.testing.assert_allclose(model.coef_, fits[int(np.argmax(scores))].coef_)


def test_splits_are_disjoint():
    t = synthetic("own")[0].assign(split="train")
    t = t.assign(patient=[f"p{i // 3}" for i in range(N)])
    held = hold_out(t, 0.3, 5)
    assert {*held.split} == {"train", "val"}
    patients = held.groupby("split").patient.agg(set)
    assert not patients["train"] & patients["val"]
    for _, chosen in label_subsets(held, [0.1, 0.5, 1.0], 0).items():
        assert set(held[chosen].split) == {"train"}


# --- the direction of every comparison


def replicates(value: float) -> tuple[float, np.ndarray]:
    return value, np.full(50, value)


def scores_of(home: float, away: float) -> dict:
    "The same value of each internal and of each external task, for an arm that is better abroad"
    scores = {}
    for name, internal in tables.external_tasks().items():
        metric = all_tasks()[internal].metric if internal in all_tasks() else "dice"
        for arm, lead in (("asap", 0.04), ("mae", 0.0)):
            scores[internal, arm, 1.0, metric] = replicates(home + lead / 4)
            scores[name, arm, 1.0, metric] = replicates(away + lead)
    return scores


def test_the_external_drop_is_internal_minus_external():
    scores = scores_of(0.9, 0.7)
    t = tables.external_drop_table(scores, ["mae"], 0.95)
    assert set(t.task) == set(tables.external_tasks())
    assert np.allclose(t.internal, 0.9) and np.allclose(t.external, 0.7)
    for c in ("external_drop", "lo", "hi"):
        assert np.allclose(t[c], 0.2)


def claims_of(scores, level: float) -> pd.DataFrame:
    "Claims of asap against mae, one training of each"
    recipes = dict(asap=["asap"], mae=["mae"])
    compared = tables.compared_parts(scores, "asap", recipes)
    return tables.claim_table(scores, compared, {}, "asap", level, recipes)


def test_a_lead_elsewhere_is_the_lead_there_minus_the_lead_at_home():
    t = claims_of(scores_of(0.9, 0.7), 0.95)
    (row,) = t[t.claim == "domain_shift"].itertuples()
    assert np.isclose(row.difference, 0.04 - 0.01) and row.arm == "asap"


def test_a_difference_is_the_first_minus_the_second():
    d = metrics.paired_difference(replicates(0.8), replicates(0.5), 0.95)
    assert np.allclose([d["difference"], d["lo"], d["hi"]], 0.3)


def test_a_label_that_is_affirmed_is_more_probable():
    "In each task by words: with trained maps, without, and on one scan"
    heads = projection.ProjectionHeads(4, 4, 4)
    for p in heads.image_proj, heads.text_proj:
        p.weight.data, p.bias.data = torch.eye(4), torch.zeros(4)
    words = torch.eye(4)[None, :2]  # one label: present, absent
    present, absent = vocabulary.prompt_proba(heads, np.eye(4)[:2], words)[:, 0]
    assert present > 0.99 and absent < 0.01
    model = SimpleNamespace(alignment=SimpleNamespace(similarity_scale=torch.tensor(10.0)))
    present, absent = vocabulary.zero_shot_proba(model, np.array([[0.5, 0.1], [0.1, 0.5]]))
    assert present > 0.9 and absent < 0.1


def test_prompts_are_affirming_first():
    prompts = vocabulary.build_prompts(["X"], ["There is {label}."], ["No {label}."])
    assert prompts == [(["There is X."], ["No X."])]
    words = vocabulary.embed_prompts(Words(), prompts)
    expected = torch.nn.functional.normalize(Words().sentences(["There is X."])[0], dim=0)
    assert torch.allclose(words[0, 0], expected)


# --- the level of every interval


def test_an_interval_holds_what_its_level_says():
    values = rng("ci").normal(size=20001)
    for level in (0.5, 0.9, 0.95):
        lo, hi = metrics.ci(values, level)
        assert abs(((values >= lo) & (values <= hi)).mean() - level) < 1e-3
        assert abs((values < lo).mean() - (1 - level) / 2) < 1e-3
    assert metrics.ci(values) == metrics.ci(values, 0.95)


def test_the_level_is_95_percent_unless_params_say_otherwise():
    assert load_params(TOP / "params.yaml").tables.confidence_level == 0.95
    modules = [tables, grounding, scan_zero_shot, metrics, classify, retrieve, vocabulary]
    found = {
        (m.__name__, n): parameter.default
        for m in modules
        for n, f in inspect.getmembers(m, inspect.isfunction)
        if (parameter := inspect.signature(f).parameters.get("level"))
    }
    assert len(found) > 10
    assert set(found.values()) <= {0.95, inspect.Parameter.empty}, found


def test_tables_use_the_level_that_they_are_given():
    wide = rng("levels").normal(size=4000)
    scores = {k: (v, v + wide * (k[1] == "mae")) for k, (v, _) in scores_of(0.9, 0.7).items()}
    scores = {k: (v, np.resize(r, 4000)) for k, (v, r) in scores.items()}
    for level in (0.5, 0.95):
        t = claims_of(scores, level)
        row = t[t.claim == "transfer"].iloc[0]
        lo, hi = np.percentile(wide, [50 * (1 - level), 50 * (1 + level)])
        assert np.isclose(row.hi - row.lo, hi - lo, rtol=0.01)


# --- offsets


@pytest.mark.parametrize("side, size", [(12, 8), (6, 8), (9, 6)])
def test_a_stretched_crop_keeps_centers_of_voxels(side, size):
    "Half a voxel of the box is half a voxel of the crop: a ramp stays the ramp"
    ramp = np.broadcast_to(np.arange(40.0)[:, None, None], (40, 40, 40)).copy()
    crop = dict(start=np.array([10, 10, 10]), side=np.array([side] * 3))
    got = apply_crop(ramp, crop, (size,) * 3, fill=0)[:, 3, 3]
    k = side / size
    expected = 10 + (np.arange(size) + 0.5) * k - 0.5
    inside = (expected >= 10) & (expected <= 10 + side - 1)
    np.testing.assert_allclose(got[inside], expected[inside], atol=1e-6)
    assert np.isclose(got.mean(), 10 + (side - 1) / 2)  # centered


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_decoder_predicts_the_wanted_patches(depth):
    torch.manual_seed(0)
    vit = ViT3D((8, 8, 8), (4, 4, 4), embed_dim=12, depth=1, num_heads=2)
    d = Decoder(vit, 12, depth, 2, 3, zero_init_residual=False).eval()
    keep, hidden = torch.tensor([[1, 4, 6]]), torch.tensor([[0, 2, 3, 5, 7]])
    latent = torch.randn(1, 4, 12)
    with torch.no_grad():
        _, got = d(latent, keep, hidden)
        x = d.embed(latent)
        full = d.mask_token.expand(1, 8, -1).clone()
        full[0, keep[0]] = x[0, 1:]
        x = torch.cat([x[:, :1], full + d.pos_embed], 1)
        for b in d.blocks:
            x = b(x)
        want = d.pred(d.norm(x[:, 1:]))[:, hidden[0]]
    torch.testing.assert_close(got, want)


def test_an_earlier_organ_group_wins():
    "Where masks of two groups overlap, as TotalSegmentator's do at borders"
    groups = dict(left=["lung_upper_lobe_left"], heart=["heart"])
    a, b = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    a[:3], b[1:] = True, True
    for masks in (dict(lung_upper_lobe_left=a, heart=b), dict(heart=b, lung_upper_lobe_left=a)):
        out = merge_class_masks(masks, groups, a.shape, np.eye(4))
        assert out[:, 0, 0].tolist() == [1, 1, 1, 2]


def test_a_sentence_that_just_fits_is_kept(tmp_path):
    tokenizer = train_wordpiece_tokenizer(
        ["heart size is normal.", "no effusion is seen."], 100, tmp_path
    )
    sentences = ["heart size is normal.", "no effusion is seen."]
    n = len(encode_report(tokenizer, sentences, 100)[0])
    ids, of, lost = encode_report(tokenizer, sentences, n)
    assert (len(ids), max(of), lost) == (n, 1, 0)
    ids, of, lost = encode_report(tokenizer, sentences, n - 1)
    assert (max(of), lost) == (0, 1) and len(ids) < n


def test_uneven_slices_are_seen_beyond_a_tenth_of_a_step():
    even = np.arange(20.0) * 5
    assert even_positions(even) is None
    for shift, is_even in ((0.8, True), (1.2, False), (1.6, False), (2.4, False)):
        z = even.copy()
        z[10:] += shift  # half of it on either side of an even grid
        assert (even_positions(z) is None) == is_even, shift
        assert np.isclose(measure_steps(z).off, shift / 2, rtol=0.1)
    gap = np.delete(even, 7)
    assert (measure_steps(gap).missing, measure_steps(gap).first_gap) == (1, 30)


def test_tokens_have_their_norm():
    torch.manual_seed(0)
    vit = ViT3D((8, 8, 8), (4, 4, 4), embed_dim=12, depth=2, num_heads=2).eval()
    vit.norm.weight.data = torch.rand(12) + 2
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        before, after = vit.forward_features(x, norm=False), vit.forward_features(x)
        torch.testing.assert_close(after, vit.norm(before))
        torch.testing.assert_close(vit(x), after)
    assert not torch.allclose(before, after)


def test_the_first_step_of_a_warm_up_moves():
    for warmup in (1, 5, 100):
        rates = [lr_factor(s, 1000, warmup) for s in range(warmup + 1)]
        steps = np.arange(1, warmup + 2) / (warmup + 1)
        np.testing.assert_allclose(rates, steps)
    assert lr_factor(0, 10) == 1 and lr_factor(10, 10) == 0
