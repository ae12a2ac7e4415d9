"""Pointing during training, and the params of the alignment that were searched for the cause of
trainings that do not ground: each changes what it says, and none of them anything by default"""

import importlib.util
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TOP
from tiny_cases import cases

from asap.core import project_root
from asap.inference.ground import align_sentences
from asap.model.align import (
    NamedOrgans,
    candidates_by_sentence,
    inter_report_loss,
    select_patches,
    soft_topk,
    weighted_pool,
)
from asap.model.asap import ARM_OVERRIDES, ArmConfig, arm_params, build_asap, build_config
from asap.model.vit import body_candidates
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest
from asap.pretrain.batches import ImageReportDataset, collate, named_organs
from asap.pretrain.checkpoint import model_card
from asap.pretrain.pointing import (
    FOCAL_LESIONS,
    body_patches,
    collect_targets,
    describe_pointing,
    measure_pointing,
)
from asap.pretrain.pretrain import add_text_features, build_model, fit_stem, recipe, run
from asap.text.encoder import load, train_text_encoder
from asap.text.sentences import join_report, split_sentences

P = load_params(project_root() / "params/smoke.yaml")
CHANGES = dict(
    align_position=0.0,
    align_tokens=False,
    align_before_attention=False,
    align_candidates="body",
    nowhere_slot=True,
    rank_noise=0.5,
    soft_selection=0.05,
    stem_init="windows",
    mask_ratio=0.5,
    align_mask_ratio=0.0,
    skip_hidden_lesions=True,
    max_k_ratio=0.4,
    init_k_ratio=0.1,
    temperature=0.2,
)


SEARCH = dict(corpus=None, losses="align", steps=2, patients=[2, 1, 1], stride=None, precision="no")


KNOWN = dict(  # of a study, for `model_card`
    spacing=P.volumes.spacing,
    hu_range=P.volumes.hu_range,
    train=dict(ct_rate=9),
    cohorts=["ct_rate"],
    seed=4001,
    phantom="2",
)


def row(**changes) -> dict:
    return P.arms["asap"].model_dump() | dict(align_candidates=None) | changes


@pytest.fixture(scope="module")
def study(tmp_path_factory):  # nine phantoms, their text encoder, a mask for one sentence of each
    here = tmp_path_factory.mktemp("pointing")
    table = cases(here, "pointing", 9, P.anatomy.groups)
    table["patient"] = table.case
    table["split"] = ["train"] * 5 + ["val"] * 2 + ["test"] * 2
    said = [split_sentences(join_report(f, i)) for f, i in zip(table.findings, table.impression)]
    train_text_encoder(said, said, P.text, 0, here / "text")
    sentences = dict(zip(table.case, said))

    def lesions(r):  # a lesion of one patch at a place of the case
        mask = np.zeros((1, 48, 48, 24), bool)
        i = int(r["case"][-1]) % 3
        mask[:, 12 * i : 12 * i + 12, 12:24, 6:12] = True
        return [sentences[r["case"]][0]], ["Lung nodule"], mask

    text = load(here / "text")
    return SimpleNamespace(table=table, text=text, lesions=lesions, here=here)


def targets(study, lesions):
    parts = [study.table[study.table.split == k].to_dict("records") for k in ("val", "train")]
    return collect_targets(*parts, lesions, P)


def batch(study, p, masks=True):
    data = ImageReportDataset(
        study.table, p, study.text, 0, lesions=(lambda r: study.lesions(r)[::2]) if masks else None
    )
    samples = [data[(0, i)] for i in range(5)]
    return data, add_text_features(collate(samples, study.text, 0.75), study.text, True)


def model_of(study, **changes):
    p = arm_params(P, row(**changes))
    data, b = batch(study, p)
    m = build_model(P, row(**changes), study.text, 0)
    fit_stem(m, data)
    return m, b


def test_masks_change_no_bit_of_a_training(study):
    args = "asap", row(), P, study.table, study.text
    without = run(*args, study.here / "a", {})
    found = run(*args, study.here / "b", {}, targets=targets(study, study.lesions))
    for a, b in zip(without[0].state_dict().values(), found[0].state_dict().values()):
        assert torch.equal(a, b)
    pd.testing.assert_frame_equal(without[1], found[1])
    pd.testing.assert_frame_equal(without[3], found[3])
    new = {"pointing", "pointing_atlas", "points_outside_body", "distinct_points"}
    assert new <= set(found[2]) and not new & set(without[2])
    pd.testing.assert_frame_equal(without[2], found[2][list(without[2])])
    assert "pointing" not in without[4]
    assert without[4] == {k: v for k, v in found[4].items() if k != "pointing"}
    last = found[2].iloc[-1]
    assert found[4]["pointing"]["pointing"] == last.pointing
    assert found[2].step.tolist() == [5, 10, 12]


def test_the_last_line_names_a_training_below_the_atlas(study, capfd):
    where = {"a": 0}

    def same(r):  # every lesion at one place: the atlas always hits
        sentences, labels, mask = study.lesions(dict(r, case="c0"))
        where["a"] += 1
        return [split_sentences(r["findings"])[0]], labels, mask

    run(
        "asap",
        row(),
        P,
        study.table,
        study.text,
        study.here / "c",
        {},
        targets=targets(study, same),
    )
    lines = [x for x in capfd.readouterr().err.splitlines() if "pointing accuracy" in x]
    assert where["a"] and len(lines) == 1
    assert "atlas 1.000" in lines[0] and "BELOW the atlas by position" in lines[0]


def test_what_cannot_be_measured_is_left_out_and_metrics_stay_valid_json(study):
    m, _ = model_of(study, region_size="fixed")  # k is constant
    found = measure_pointing(m, study.text, targets(study, study.lesions), P)
    assert "pointing" in found and "k_extent_correlation" not in found

    def large(r):
        sentences, labels, masks = study.lesions(r)
        return sentences, ["Pleural effusion"] * len(labels), masks

    no_focal = measure_pointing(m, study.text, targets(study, large), P)
    assert "pointing" not in no_focal and "pointing_all" in no_focal
    json.dumps([found, no_focal], allow_nan=False)
    card = model_card("asap", m.config, dict(steps=9, pointing=no_focal), KNOWN)
    assert "of all points lie outside the body" in card and "Below the atlas" not in card
    assert "no focal lesion" in describe_pointing(no_focal)


def test_arms_without_regions_and_cohorts_without_masks_are_not_measured(study):
    clip = P.arms["clip"].model_dump()
    found = targets(study, study.lesions)
    out = run("clip", clip, P, study.table, study.text, study.here / "d", {}, targets=found)
    assert "pointing" not in out[4] and "pointing" not in out[2]
    assert targets(study, lambda r: None) is None


@pytest.mark.parametrize("key, to", [*CHANGES.items(), ("align_candidates", "organs")])
def test_each_param_changes_the_loss_and_leaves_no_parameter_without_gradient(study, key, to):
    torch.manual_seed(0)
    today, b = model_of(study)
    before = today(b)[0]
    changed, b = model_of(study, **{key: to})
    if key == "skip_hidden_lesions":
        changed.load_state_dict(today.state_dict())
    value = changed(b)[0]
    assert value.isfinite() and value != before
    value.backward()
    for name, q in changed.named_parameters():
        assert q.requires_grad == (q.grad is not None), name
    whole = [q.grad.clone() for q in changed.parameters() if q.grad is not None]
    if key == "rank_noise":  # random
        return
    changed.zero_grad()
    changed(b, 2)[0].backward()
    parts = [q.grad for q in changed.parameters() if q.grad is not None]
    largest = max(float(g.abs().max()) for g in whole)
    assert max(float((g - h).abs().max()) for g, h in zip(whole, parts)) < 1e-4 * largest


@pytest.mark.parametrize("key", [k for k in ARM_OVERRIDES if k in ArmConfig.model_fields])
def test_each_override_reaches_its_section(key):
    section = getattr(P, ARM_OVERRIDES[key])
    now = getattr(section, key)
    other = CHANGES.get(key, dict(steps=7, batch_size=3).get(key))
    if other is None or other == now:
        return
    assert getattr(getattr(arm_params(P, row(**{key: other})), ARM_OVERRIDES[key]), key) == other
    assert recipe(row(**{key: other}), P, {}, 0)["arm"][key] == other


def test_defaults_enter_neither_recipe_nor_config():
    found = recipe(row(), P, {}, 0)
    config = build_config(P, row(), 20, 50)
    for part in (found["arm"], found["model"], found["pretrain"]):
        assert not {*CHANGES} & {*part} - {"mask_ratio", "max_k_ratio", "init_k_ratio"} - {
            "temperature",
            "align_before_attention",
        }
    assert "align_mask_ratio" not in config["pretrain"] and "stem_init" not in config["model"]


def test_candidates_are_the_only_patches_that_are_selected(study):
    m, b = model_of(study, align_candidates="body")
    m.eval()
    encoded = m.encode(b["image"])
    assert 0 < encoded.candidates.float().mean() < 1
    similarity = []
    for hard in (True, False):
        a = m.forward_alignment(encoded, b["sentence_embeds"], b["sentence_mask"], hard=hard)
        outside = ~encoded.candidates[:, None].expand_as(a.weights)
        assert (a.weights[outside] == 0).all()
        assert (a.selectable_similarity[outside] == -1).all()
        similarity.append(a.similarity)
    assert torch.equal(*similarity), "the fusion reads the same at use as in training"
    sim = align_sentences(m, b["image"], b["sentence_embeds"][0]).similarity
    assert encoded.candidates.gather(1, sim.argmax(-1)).all()


def test_in_training_a_sentence_selects_within_the_organs_that_it_names(study):
    m, b = model_of(study, align_candidates="organs")
    assert b["sentence_organs"].shape[:2] == b["sentence_mask"].shape
    named = b["sentence_organs"] & b["sentence_mask"][..., None]
    assert named.any(), "no sentence names an organ"
    encoded = m.forward_encoder(b["image"], b["patch_order"])
    a = m.align_sentences(b, encoded)
    index = encoded.ids_keep[..., None].expand(-1, -1, named.shape[-1])
    share = b["organ_fractions"][..., 1:].gather(1, index)
    checked = 0
    for i, s in named.any(-1).nonzero().tolist():
        inside = (share[i][:, named[i, s]] >= 0.05).any(-1) & encoded.candidates[i]
        if inside.any():
            assert (a.weights[i, s][~inside] == 0).all() and a.weights[i, s][inside].max() > 0
            checked += 1
    assert checked
    m.eval()  # at use there are no organ maps
    body = m.align_sentences(b, encoded)
    today = m.forward_alignment(encoded, b["sentence_embeds"], b["sentence_mask"])
    assert body.organs is None and torch.equal(body.weights, today.weights)


def test_without_organ_maps_a_sentence_selects_in_the_body(study):
    losses = []
    for candidates in ("organs", "body"):
        torch.manual_seed(0)
        m, b = model_of(study, align_candidates=candidates)
        b["organ_fractions"] = torch.zeros_like(b["organ_fractions"])
        b["organ_valid"] = torch.zeros_like(b["organ_valid"])
        losses.append(float(m(b)[1]["align"]))
    assert losses[0] == losses[1]


def test_the_contrast_across_reports_compares_the_same_organ_in_every_image():
    "Against a loop over sentences and images"
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize
    x, t = unit(torch.randn(3, 10, 8), dim=-1), unit(torch.randn(3, 2, 8), dim=-1)
    frozen, real = unit(torch.randn(3, 2, 6), dim=-1), torch.ones(3, 2).bool()
    organs = NamedOrgans(torch.rand(3, 10, 2).gt(0.6).float(), torch.rand(3, 2, 2) > 0.4)
    args = t, torch.full((3, 2), 2.0), frozen, real, 5.0, 2.0, 0.0, 10  # no duplicates
    found = float(inter_report_loss([x], *args, None, organs))
    scores = torch.zeros(3, 2, 3)  # report, sentence, image
    for r in range(3):
        for s in range(2):
            for image in range(3):
                one = NamedOrgans(organs.fractions[[image]], organs.named[[r], s : s + 1])
                allowed = candidates_by_sentence(None, one)[0, 0].nonzero()[:, 0]
                best = allowed[(x[image, allowed] @ t[r, s]).argsort(descending=True)[:2]]
                scores[r, s, image] = unit(x[image, best].sum(0), dim=-1) @ t[r, s] * 5
    total = 0.0
    for r in range(3):
        for s in range(2):
            own = scores[r, s, r]
            others = torch.stack([own, *scores[[q for q in range(3) if q != r], :, r].flatten()])
            total += scores[r, s].logsumexp(0) + others.logsumexp(0) - 2 * own
    assert abs(found - float(total) / 12) < 1e-4
    assert abs(found - float(inter_report_loss([x], *args))) > 1e-3


def test_the_organs_that_a_sentence_names():
    groups = ["left upper lobe", "right upper lobe", "heart", "airway and oesophagus"]
    for text, expected in {
        "A nodule in the Left Upper Lobe.": [True, False, False, False],
        "Emphysema in both upper lobes.": [True, True, False, False],
        "Consolidation in the left upper lobe and right upper lobe.": [True, True, False, False],
        "The oesophagus is dilated.": [False, False, False, True],
        "No nodule.": [False] * 4,
    }.items():
        assert named_organs(text, groups) == expected, text


def test_the_body_in_a_batch_is_that_of_the_connected_component():
    hu = np.stack([synthesize_chest((0, "body", i)).hu for i in range(3)]).astype(np.float32)
    x = torch.from_numpy(hu.clip(-1000, 1000) / 1000)[:, None]
    found = body_candidates(x, (12, 12, 6)).numpy()
    exact = np.stack([body_patches(v, (12, 12, 6)) for v in hu])
    assert (found == exact).mean() > 0.95 and found.mean() < 0.9


def test_equal_patches_are_equally_similar_without_positions(study):
    for factor, same in ((0.0, True), (1.0, False)):
        m, b = model_of(study, align_position=factor)
        m.eval()
        image = torch.full_like(b["image"], -1.0)  # air everywhere
        sim = align_sentences(m, image, b["sentence_embeds"][0]).similarity[0]
        assert (sim.std(-1).max() < 1e-5) == same


def test_the_slot_is_there_in_training_and_gone_at_use(study):
    m, b = model_of(study, nowhere_slot=True)
    encoded = m.encode(b["image"])
    n = encoded.embedded.shape[1] - 1
    soft = m.forward_alignment(encoded, b["sentence_embeds"], b["sentence_mask"])
    hard = m.forward_alignment(encoded, b["sentence_embeds"], b["sentence_mask"], hard=True)
    assert (soft.weights.shape[-1], soft.similarity.shape[-1]) == (n + 1, n)
    assert (hard.weights.shape[-1], hard.similarity.shape[-1]) == (n, n)


def test_sentences_whose_lesion_is_hidden_enter_no_contrast(study):
    m, b = model_of(study, skip_hidden_lesions=True)
    encoded = m.forward_encoder(b["image"], b["patch_order"])
    mask = m.forward_parts(b)["aligned"][0].contrast_mask
    lesions = b["lesion_patches"]
    assert lesions.any(-1).sum() == 5 and lesions.any(1).sum(1).max() <= 4
    for i in range(5):
        for s in range(lesions.shape[1]):
            seen = {*encoded.ids_keep[i].tolist()} & {*lesions[i, s].nonzero()[:, 0].tolist()}
            expected = bool(b["sentence_mask"][i, s]) and (bool(seen) or not lesions[i, s].any())
            assert mask[i, s] == expected
    assert (mask != b["sentence_mask"]).any(), "no lesion is hidden"


def test_masks_that_are_missing_are_named(study):
    args = "asap", row(skip_hidden_lesions=True), P, study.table, study.text, study.here / "f", {}
    with pytest.raises(ValueError, match="skip_hidden_lesions is true, but a study trains without"):
        run(*args)


def test_an_own_pass_sees_its_own_share_of_patches(study):
    m, b = model_of(study, align_mask_ratio=0.0)
    out = m.forward_parts(b)
    n = len(m.vit.pos_embed)
    local, tokens = out["aligned"]
    assert out["encoded"].ids_keep.shape[1] == tokens.num_patches == n // 4
    assert local.num_patches == n and len(local.patch_embeds) == 1
    assert (local.first_pooled, tokens.first_pooled) == (0, 1)
    only, b = model_of(study, align_mask_ratio=0.0, align_tokens=False)
    assert len(only.forward_parts(b)["aligned"]) == 1


def test_air_is_not_embedded_where_it_is_no_candidate(study):
    m, b = model_of(study, align_mask_ratio=0.0, align_candidates="body")
    m.eval()
    every = m.encode(b["image"])
    own = m.forward_encoder(b["image"], b["patch_order"], 0.0, blocks=False)
    body = every.candidates
    assert torch.allclose(own.embedded[:, 1:][body], every.embedded[:, 1:][body], atol=1e-5)
    assert (own.embedded[:, 1:] == m.vit.pos_embed)[~body].all()


def test_noise_is_drawn_in_training_alone(study):
    m, b = model_of(study, rank_noise=0.5)
    a = [float(m(b)[1]["align"]) for _ in range(3)]
    m.eval()
    e = [float(m(b)[1]["align"]) for _ in range(3)]
    assert len({*a}) == 3 and len({*e}) == 1
    today, b = model_of(study)
    state = torch.get_rng_state()
    today(b)
    assert torch.equal(state, torch.get_rng_state())


def test_soft_selection_reaches_the_similarity_and_its_default_changes_no_bit():
    torch.manual_seed(0)
    k, x = torch.full((3, 4), 2.6, requires_grad=True), torch.randn(3, 20, 8)
    sim = (2 * torch.rand(3, 4, 20) - 1).requires_grad_()
    today = select_patches(sim, k, 0.5, 6)
    assert torch.equal(today, soft_topk(sim, k, 0.5, 6))
    assert torch.equal(select_patches(sim, k, 0.0, 6, temperature=0.1), soft_topk(sim, k, 0.0, 6))
    assert torch.autograd.grad(today.sum(), sim, allow_unused=True, retain_graph=True)[0] is None
    soft = select_patches(sim, k, 0.5, 6, temperature=0.1)
    assert torch.equal(soft, select_patches(sim, k, 0.5, temperature=0.1)), "`most` saves time only"
    for_sim, for_k = torch.autograd.grad(weighted_pool(x, soft)[..., 0].sum(), (sim, k))
    assert for_sim.abs().amax(-1).min() > 0 and for_k.abs().min() > 0
    assert torch.equal(soft.detach().argsort(-1), sim.detach().argsort(-1))
    assert ((soft > 0.5).sum(-1) == 3).all()  # 2.6 patches


def test_soft_selection_among_few_candidates_is_finite():
    sim = torch.tensor([[0.1, 0.9, 0.5, 0.3]], requires_grad=True)
    some = torch.tensor([[True, False, True, False]])
    w = select_patches(sim, torch.tensor([3.0]), 0.5, None, some, temperature=0.05)
    assert w[0, 1] == w[0, 3] == 0 and w[0, [0, 2]].min() > 0.99
    w.sum().backward()
    assert sim.grad.isfinite().all() and (sim.grad[~some] == 0).all()


def test_kernels_are_windows_and_keep_their_size(study):
    random, windows = (
        model_of(study, stem_init=k)[0].vit.patch_embed for k in ("random", "windows")
    )
    a, b = random.fc1.weight, windows.fc1.weight
    assert torch.allclose(b.norm(dim=1), a.norm(dim=1).mean().expand(len(b)), rtol=1e-4)
    assert not torch.allclose(a, b)


def driver():
    spec = importlib.util.spec_from_file_location("causes", TOP / "benchmarks/grounding_causes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_of_the_search_is_one_row_of_arms():
    causes, p = driver(), load_params()
    for name, (why, changes) in causes.VARIANTS.items():
        found = causes.arm_row(changes, "all", p)
        assert why and {k for k in found if found[k] != causes.arm_row({}, "all", p)[k]} == {
            *changes
        }
        build_asap(build_config(p, found, 20, 50))
        assert name in ("today", "hard_negatives") or changes


def test_hard_negatives_contrast_a_sentence_with_its_opposite(study):
    causes = driver()
    assert causes.opposite("No pleural effusion.") == "There is pleural effusion."
    assert causes.opposite("There is pleural effusion.") == "There is no pleural effusion."
    assert not causes.opposite("No pleural effusion or consolidation.")
    (model, b), (data, _) = model_of(study), batch(study, P)
    before, again = (model(b)[1]["align"] for _ in range(2))
    sentences = [s for of in data.sentences for s in of]
    causes.add_hard_negatives(model.alignment, study.text, sentences)
    assert before == again != model(b)[1]["align"]


def test_the_search_goes_on_where_it_stopped_and_refuses_the_studys_seed(tmp_path, monkeypatch):
    causes, out = driver(), tmp_path / "x.csv"
    argv = ["x", "--cache", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    args = causes.arguments(), load_params()
    k = causes.key("today", 4001, *args)
    assert not causes.is_done(k, out)
    causes.append(k | dict(pointing=0.1), out)
    causes.append(causes.key("body", 4001, *args) | dict(pointing=0.2), out)
    assert causes.is_done(k, out) and len(pd.read_csv(out)) == 2
    assert not causes.is_done(causes.key("today", 4002, *args), out)
    monkeypatch.setattr("sys.argv", [*argv, "--seeds", "1"])
    with pytest.raises(SystemExit, match="the study's own seed"):
        causes.main()


def test_the_card_states_how_sentences_point():
    config = build_config(P, row(), 20, 50)
    found = dict(
        pointing=0.1,
        pointing_atlas=0.2,
        points_outside_body=0.34,
        distinct_points=7,
        k_extent_correlation=0.5,
    )
    card = model_card("asap", config, dict(steps=9, pointing=found), KNOWN)
    assert "0.100 of the sentences about focal lesions hit (an atlas by position: 0.200)" in card
    assert "34.0% of all points lie outside the body, 7 different patches" in card
    assert "Below the atlas" in card
    above = model_card("asap", config, dict(steps=9, pointing=found | dict(pointing=0.3)), KNOWN)
    assert "Below the atlas" not in above
    assert "Pointing on validation" not in model_card("asap", config, dict(steps=9), KNOWN)


def test_one_row_of_the_search_from_the_draw_to_the_table(study, tmp_path, monkeypatch):
    causes, out = driver(), tmp_path / "x.csv"
    small = ["--patients", "4", "2", "2", "--steps", "2", "--losses", "all", "--eval-every", "1"]
    places = ["--cache", str(tmp_path), "--out", str(out), "--text", str(study.here / "text")]
    which = ["--variants", "all_visible_body", "--seeds", "4001", "--one", "--params"]
    argv = ["x", *places, *small, *which, str(TOP / "params/smoke.yaml")]
    monkeypatch.setattr("sys.argv", argv)
    causes.main()
    before = out.read_bytes()
    found = pd.read_csv(out).iloc[0]
    assert found.variant == "all_visible_body" and found.points_outside_body == 0
    assert 0 <= found.pointing <= 1 and found.cpu_seconds >= 0
    table = pd.read_parquet(tmp_path / "seed_4001_phantom_2/table.parquet")
    assert table.split.value_counts().to_dict() == dict(train=4, val=2, test=2)
    hits = pd.read_csv(tmp_path / "grounding_hits_4001.csv")
    assert {"case", "label", "atlas", "organ_atlas"} < {*hits} and len(hits)
    focal = hits[hits.label.isin(FOCAL_LESIONS)].all_visible_body_4001
    assert np.isclose(focal.mean(), found.pointing, atol=1e-4) or focal.empty
    with pytest.raises(ValueError, match="other patients"):
        causes.keep_hits(hits.assign(hit=0)[1:], "x", tmp_path / "grounding_hits_4001.csv")
    causes.main()  # nothing is left to do
    assert out.read_bytes() == before


@pytest.mark.parametrize("version", [2, 3])
def test_lesions_of_the_search_are_those_of_the_report(tmp_path, version):
    causes, p = driver(), P
    phantom = p.phantom.model_copy(update=dict(version=version))
    p = p.model_copy(update=dict(phantom=phantom))
    assert causes.key("today", 4001, SimpleNamespace(**SEARCH), p)["phantom"] == version
    table = causes.draw(4001, dict(train=2, val=1, test=1), tmp_path, p)
    found = [(r, *causes.load_masks(r)) for r in table.to_dict("records")]
    assert any(len(labels) for _, _, labels, _ in found)
    for r, sentences, labels, masks in found:
        assert all(s in r["findings"] for s in sentences)
        assert all(r[f"label:{k}"] for k in labels) and len(masks) == len(sentences)
        assert masks.shape[1:] == nib.load(r["image"]).shape and masks.any((1, 2, 3)).all()
