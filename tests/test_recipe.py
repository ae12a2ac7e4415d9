"""What the released code gets wrong, P1 to P21 of the table on nbs/5_model/54_asap.ipynb: each
check fails on the faulty behaviour."""

import subprocess
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny_cases import cases

from asap.anatomy.masks import organ_fractions
from asap.core import project_root
from asap.data.volumes import resample
from asap.model.align import AlignmentHead, inter_report_loss, intra_report_loss
from asap.model.anatomy import soft_cross_entropy
from asap.model.asap import reconstruction_loss
from asap.model.fuse import mlm_loss
from asap.model.vit import ViT3D
from asap.params import load_params
from asap.pretrain.batches import ImageReportDataset, collate
from asap.pretrain.pretrain import add_text_features, build_model
from asap.text.encoder import load, train_text_encoder
from asap.text.sentences import join_report, split_sentences

P = load_params(project_root() / "params/smoke.yaml")


def unit(*s):
    return F.normalize(torch.randn(*s), dim=-1)


def row(name, **k):
    return dict(P.arms[name].model_dump(by_alias=True), **k)


@pytest.fixture(scope="module")
def study(tmp_path_factory):  # six phantoms and their text encoder
    here = tmp_path_factory.mktemp("recipe")
    table = cases(here, "recipe", 6, P.anatomy.groups)
    said = [split_sentences(join_report(f, i)) for f, i in zip(table.findings, table.impression)]
    train_text_encoder(said, said, P.text, 0, here / "text")
    text = load(here / "text")
    data = ImageReportDataset(table, P, text, seed=0)
    return SimpleNamespace(
        text=text,
        data=data,
        batch=add_text_features(collate([data[(0, i)] for i in range(4)], text, 0.75), text, True),
    )


def sentences():  # region, text, frozen, real, patches, k of three reports
    torch.manual_seed(0)
    return (
        unit(3, 5, 8),
        unit(3, 5, 8),
        unit(3, 5, 6),
        torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]).bool(),
        unit(3, 40, 8),
        1 + 3 * torch.rand(3, 5),
    )


def test_P1_the_head_that_sets_k_learns(study):
    m = build_model(P, row("asap"), study.text, 0)
    m(study.batch)[0].backward()
    assert m.alignment.k_head.weight.grad.abs().sum() > 0
    r = build_model(P, row("asap", region_size="released", released_bugs=[]), study.text, 0)
    r(study.batch)[0].backward()
    assert r.alignment.k_head.weight.grad is None


def test_P2_padding_is_no_negative():
    region, text, frozen, real, patches, k = sentences()

    def wide(t):
        return torch.cat([t, torch.randn(3, 7, *t.shape[2:])], 1)

    longer = torch.cat([real, torch.zeros(3, 7).bool()], 1)
    assert torch.allclose(
        intra_report_loss(wide(region), wide(text), wide(frozen), longer, 14.0),
        intra_report_loss(region, text, frozen, real, 14.0),
        atol=1e-5,
    )

    def one(t):
        return t[:1, :3]

    alone = intra_report_loss(one(region), one(text), one(frozen), one(real), 14.0)
    beside = intra_report_loss(
        region[[0, 1]],
        text[[0, 1]],
        frozen[[0, 1]],
        torch.stack([real[0], torch.zeros(5).bool()]),
        14.0,
    )
    assert torch.allclose(alone, beside, atol=1e-5)
    assert torch.allclose(
        inter_report_loss([patches], wide(text), wide(k), wide(frozen), longer, 14.0, 0.95, 0.5, 9),
        inter_report_loss([patches], text, k, frozen, real, 14.0, 0.95, 0.5, 9),
        atol=1e-5,
    )


def test_P3_other_reports_are_negatives():
    _, text, frozen, real, patches, k = sentences()
    first = torch.zeros_like(real)
    first[:, 0] = True  # one sentence each: alone it has no negative
    now = inter_report_loss([patches], text, k, frozen, first, 14.0, 0.95, 0.5, 9)
    other = patches.clone()
    other[1] = unit(40, 8)
    assert (
        now > 0.1
        and (inter_report_loss([other], text, k, frozen, first, 14.0, 0.95, 0.5, 9) - now).abs()
        > 1e-3
    )


def test_P4_k_is_a_share_of_the_patches_seen():
    _, _, frozen, _, _, _ = sentences()
    a = AlignmentHead(16, 6, 8, max_k_ratio=0.2, temperature=0.07)
    for seen in (100, 400):
        assert torch.allclose(
            (a.predict_k(frozen, seen) - 1) / (0.2 * seen - 1),
            (a.predict_k(frozen, 200) - 1) / 39,
            atol=1e-5,
        )


def test_P5_words_are_asked_where_they_are_hidden(study):
    b, m = study.batch, build_model(P, row("asap"), study.text, 0)
    x = torch.randn(*b["input_ids"].shape, study.text.dim)
    value, other = mlm_loss(m.fusion, x, b["mlm_labels"])[0], x.clone()
    other[b["mlm_labels"] < 0] = 50.0
    assert torch.equal(mlm_loss(m.fusion, other, b["mlm_labels"])[0], value)
    assert (b["mlm_labels"][b["padding_mask"]] == -100).all() and not (
        b["masked_input_ids"][b["padding_mask"]] == study.text.tokenizer.mask_token_id
    ).any()
    assert 0.5 < (b["mlm_labels"] >= 0).float().sum() / (b["token_to_sentence"] >= 0).sum() < 0.95
    faulty = build_model(P, row("asap", released_bugs=["mlm_all_tokens"]), study.text, 0)
    assert abs(faulty(b)[1]["mlm"] - m(b)[1]["mlm"]) > 1e-3


def test_P6_the_frozen_encoder_is_in_eval_mode(study):
    t, b = study.text.train(), study.batch
    assert not any(m.training for m in t.modules()) and not any(
        q.requires_grad for q in t.parameters()
    )
    assert torch.equal(
        t.tokens(b["masked_input_ids"], b["token_to_sentence"]),
        t.tokens(b["masked_input_ids"], b["token_to_sentence"]),
    )
    assert not any("cls" in n or "predictions" in n for n, _ in t.named_modules()), (
        "no head computes logits of words that nobody reads"
    )
    with t.in_training():
        assert not torch.equal(
            t.tokens(b["masked_input_ids"], b["token_to_sentence"]),
            t.tokens(b["masked_input_ids"], b["token_to_sentence"]),
        )
    assert torch.equal(
        t.tokens(b["masked_input_ids"], b["token_to_sentence"]),
        add_text_features(b, t, True)["token_embeds"],
    )
    assert not torch.equal(
        add_text_features(b, t, True, dropout=True)["sentence_embeds"], b["sentence_embeds"]
    )


def test_P7_P8_voxels(study):
    b, m = study.batch, build_model(P, row("mae"), study.text, 0)
    plain = m(b)[1]["recon"]
    m.norm_pix_loss = True
    assert abs(m(b)[1]["recon"] - plain) > 1e-3, "normalised patches are another target"
    hidden = build_model(P, row("mae", released_bugs=["recon_mean_all_patches"]), study.text, 0)
    assert torch.isclose(hidden(b)[1]["recon"], plain * 48 / 64)
    g, t = torch.rand(2, 3, 8), torch.rand(2, 3, 8)
    assert torch.isclose(reconstruction_loss(g, t), ((g - t) ** 2).sum() / 48)


def test_P9_organ_targets_need_no_one_hot():
    organs = np.random.default_rng(0).integers(0, 9, (224, 224, 112)).astype(np.uint8)
    tracemalloc.start()
    s, _ = organ_fractions(organs, (16, 16, 8), 8)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert np.allclose(
        s[0], np.bincount(organs[:16, :16, :8].ravel(), minlength=9) / 2048, atol=1e-6
    )


def test_P10_organ_shares_are_one_distribution(study):
    p = torch.tensor([[[0.5, 0.5, 0.0]]])
    one = torch.ones(1, 1).bool()
    logits = torch.tensor([[[20.0, 20.0, -20.0]]])
    assert torch.isclose(
        soft_cross_entropy(logits, p, one), torch.tensor(2.0).log(), atol=1e-4
    ) and torch.isclose(
        soft_cross_entropy(logits + 5, p, one), soft_cross_entropy(logits, p, one), atol=1e-4
    )
    head = build_model(P, row("asap"), study.text, 0).decoder.organ_head
    assert (
        min(q.out_features for q in head.net if isinstance(q, torch.nn.Linear)) == 9
        and head.net[1].out_features == P.model.decoder_embed_dim
    ), "no bottleneck before the last layer"


@pytest.mark.parametrize("switch", ["similarity_bias", "region_prefix", "global_feature"])
def test_P11_every_part_of_the_fusion_is_used(study, switch):
    on, off = (build_model(P, row("asap", **{switch: v}), study.text, 0) for v in (True, False))
    on.fusion.beta.data.fill_(
        50.0
    )  # patches of an untrained encoder are alike: without it the bias moves the sixth digit
    off.load_state_dict(on.state_dict())
    assert abs(on(study.batch)[1]["mlm"] - off(study.batch)[1]["mlm"]) > 1e-5


def test_P11_padding_is_not_in_the_prefix(study):
    b, m = study.batch, build_model(P, row("asap"), study.text, 0)
    loud = b["sentence_embeds"].clone()
    loud[~b["sentence_mask"]] = 9.0
    assert (~b["sentence_mask"]).any() and torch.allclose(
        m(dict(b, sentence_embeds=loud))[1]["mlm"], m(b)[1]["mlm"], atol=1e-5
    )
    faulty = build_model(P, row("asap", released_bugs=["padding_as_negatives"]), study.text, 0)
    seen = torch.randn(4, 16, P.model.embed_dim)
    out = [
        faulty.fusion.pool_regions(faulty.alignment(seen, x, seen))
        for x in (loud, b["sentence_embeds"])
    ]
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_P12_nothing_is_mirrored(study):
    for draw in range(12):
        for i in range(6):
            s = study.data[(draw, i)]["organ_fractions"].reshape(4, 4, 4, 9)
            x = (s * np.arange(4)[:, None, None, None]).sum((0, 1, 2)) / s.sum((0, 1, 2)).clip(1e-6)
            assert x[1:3].max() < x[3:6].min(), "RAS: the left lobes lie at lower x"
            z = (s * np.arange(4)[None, None, :, None]).sum((0, 1, 2)) / s.sum((0, 1, 2)).clip(1e-6)
            assert z[1] > z[2] and z[3] > z[5]


def test_P13_the_crop_holds_the_lungs(study):
    p = P.model_copy(
        update=dict(pretrain=P.pretrain.model_copy(update=dict(crop_scale=[0.4, 0.6])))
    )
    data = ImageReportDataset(pd.DataFrame(study.data.rows), p, study.text, seed=0)
    for draw in range(5):
        for i in range(6):
            organs = data.load_organ_map(data.rows[i])
            how = data.choose_crop(draw, i, organs.shape, organs)
            lo, hi = data.lung_boxes[i]
            assert (how["start"] <= lo).all() and (hi <= how["start"] + how["side"]).all()
    assert "finding_outside_crop" in build_model(P, row("asap"), study.text, 0)(study.batch)[1]


def test_P14_text(study):
    assert "nan" not in join_report(float("nan"), "Normal.").lower()
    assert split_sentences(join_report("Nodule of 4.5 mm", "Follow up")) == [
        "Nodule of 4.5 mm",
        "Follow up",
    ], "no full stop at the end, none inside a number"
    ids = study.data[(0, 0)]["input_ids"]
    t = study.text.tokenizer
    assert ids[0] == t.cls_token_id and ids[-1] == t.sep_token_id
    short = ImageReportDataset(
        pd.DataFrame(study.data.rows),
        P,
        SimpleNamespace(tokenizer=t, max_length=12, dim=study.text.dim),
        seed=0,
    )
    assert short.num_truncated == 6, "what does not fit is counted, and said"
    before = [dict(r) for r in study.data.rows]
    study.data[(3, 0)]
    assert study.data.rows == before


def test_P15_labels_are_not_blurred():
    m = np.zeros((12, 12, 6), np.uint8)
    m[3:8] = 6
    assert set(
        np.unique(
            resample(
                m,
                np.diag([2.0, 2, 4, 1]),
                (17, 17, 9),
                np.diag([1.4, 1.4, 2.7, 1]),
                order=0,
                fill=0,
            )
        )
    ) <= {0, 6}


def test_P17_resuming_brings_back_the_optimiser(tmp_path):
    from asap.train import fit

    data = [dict(x=torch.randn(3), y=torch.randn(1)) for _ in range(8)]

    class Data:
        def __len__(self):
            return 8

        def __getitem__(self, at):
            return data[at[1]]

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))

    def loss(m, b, step):
        if step == stop:
            raise KeyboardInterrupt
        return ((m(b["x"]) - b["y"]) ** 2).mean(), {}

    def go(m, where):
        return fit(
            m,
            loss,
            Data(),
            steps=12,
            batch=4,
            lr=0.1,
            seed=0,
            folder=tmp_path / where,
            save_every=4,
            precision_="no",
            matrices=[m[0].weight],
            muon_lr=0.1,
        )

    stop = None
    whole = model()
    go(whole, "whole")
    stop = 9
    with pytest.raises(KeyboardInterrupt):
        go(model(), "killed")
    state = torch.load(tmp_path / "killed/resume/state.pt", weights_only=True)
    assert state["step"] == 8 and all(
        float(s[k].abs().sum()) > 0
        for o, k in zip(state["opts"], ("exp_avg", "momentum_buffer"), strict=True)
        for s in o["state"].values()
    )
    stop = None
    again = model()
    go(again, "killed")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters()))


def test_P18_one_case_any_grid_any_device(study):
    m = build_model(P, row("asap"), study.text, 0)
    one = add_text_features(collate([study.data[(0, 2)]], study.text, 0.75), study.text, True)
    assert torch.isfinite(m(one)[0]) and one["image"].shape[:2] == (1, 1)
    assert ViT3D((24, 36, 6), (12, 12, 6), 24, 1, 2).forward_features(
        torch.zeros(1, 1, 24, 36, 6)
    ).shape == (
        1,
        7,
        24,
    )
    assert not subprocess.run(
        ["grep", "-rnF", ".cuda(", str(project_root() / "asap")], capture_output=True, text=True
    ).stdout


def test_P19_no_worker_repeats_a_crop(study):
    from torch.utils.data import DataLoader

    from asap.train import EpochBatchSampler

    def read_(n):
        return [
            b["image"]
            for b in DataLoader(
                study.data,
                batch_sampler=EpochBatchSampler(6, 3, 8, seed=0),
                collate_fn=lambda r: collate(r, study.text, 0.75),
                num_workers=n,
            )
        ]

    alone, many = read_(0), read_(2)
    assert (
        all(torch.equal(a, b) for a, b in zip(alone, many))
        and len({x.numpy().tobytes() for b in many for x in b}) == 24
    )


@pytest.mark.parametrize("arm", [a for a in P.arms if a != "scratch"])
def test_P20_no_dead_weight(study, arm):
    m = build_model(P, row(arm), study.text, 0)
    m(study.batch)[0].backward()
    for name, q in m.named_parameters():
        assert q.requires_grad == (q.grad is not None), name


def test_P21_the_affine_is_that_of_the_grid():
    from asap.data.volumes import standard_grid

    old = np.diag([0.77, 0.77, 2.9, 1])
    old[:3, 3] = -30, 12, 5
    shape, new = standard_grid((141, 140, 97), old, (1.5, 1.5, 3.0))
    assert np.allclose(np.diag(new)[:3], (1.5, 1.5, 3.0))

    def middle(shape, affine):
        return affine[:3] @ [*(np.array(shape) - 1) / 2, 1]

    assert np.abs(middle(shape, new) - middle((141, 140, 97), old)).max() < 0.01, (
        "rounding the size moves nothing and scales nothing"
    )
