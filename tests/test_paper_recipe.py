"""Pre-training at the paper's scale: what one, two, four or eight processes do in a step, one real
step at the paper's sizes, and the choices that make an arm the published one"""

import json
import resource
from types import SimpleNamespace

import huggingface_hub
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import TOP
from tiny_cases import cases

from asap import train as training
from asap.core import fingerprint
from asap.cost import CT_RATE_TRAIN_VOLUMES, count_steps
from asap.data.crops import apply_crop, center_crop, random_cut
from asap.model.asap import arm_params, arm_seed, build_asap, build_config
from asap.model.fuse import similarity_bias
from asap.model.vit import ViT3D
from asap.params import load_params, load_stage_params
from asap.pretrain.batches import ImageReportDataset, collate, report_sentences
from asap.pretrain.checkpoint import load_image_mae
from asap.pretrain.pretrain import add_text_features, build_model, fit_options, recipe, run, train
from asap.pretrain.recipe import CT_RATE_TRAIN, recipe_table
from asap.text.encoder import TextEncoder, load as load_text, train_text_encoder
from asap.text.sentences import join_report, split_sentences
from asap.train import EpochBatchSampler

PAPER = load_params(TOP / "params/paper.yaml")
P = load_params(TOP / "params/smoke.yaml")
PUBLISHED = [a for a in P.arms if a.startswith("paper")]


def row(name, p=P, **k):
    return dict(p.arms[name].model_dump(), **k)


def changed(p, section, **keys):
    return p.model_copy(update={section: getattr(p, section).model_copy(update=keys)})


@pytest.fixture(scope="module")
def study(tmp_path_factory):  # nine phantoms and their text encoder
    here = tmp_path_factory.mktemp("published")
    table = cases(here, "published", 9, P.anatomy.groups).assign(
        split=["train"] * 5 + ["val"] * 2 + ["test"] * 2
    )
    said = [split_sentences(join_report(f, i)) for f, i in zip(table.findings, table.impression)]
    train_text_encoder(said, said, P.text, 0, here / "text")
    return SimpleNamespace(table=table, text=load_text(here / "text"), here=here)


# a step at the paper's scale


class StoppedError(Exception):
    "Ends a training after the steps that a test looks at"


def simulate(
    monkeypatch, options, n, rank, steps
) -> tuple:  # samples by step, options of lr_factor
    "`fit` as process `rank` of `n`, over the indices of CT-RATE's train split"
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: n))
    monkeypatch.setattr(Accelerator, "process_index", property(lambda self: rank))
    monkeypatch.setattr(training, "world_size", lambda: n)
    taken, asked = [], []
    monkeypatch.setattr(
        training, "lr_factor", lambda step, *a: asked.append((step, *a)) or schedule(step, *a)
    )
    per_step = options["accumulate"]

    def loss(model, samples, micro):
        if micro == steps * per_step:
            raise StoppedError
        taken.append((micro // per_step, samples.tolist()))
        return model(torch.zeros(1, 1)).sum(), {}

    net = torch.nn.Linear(1, 1)
    with pytest.raises(StoppedError):
        training.fit(
            net, loss, training.IndexDataset(CT_RATE_TRAIN), seed=0, **options | dict(workers=0)
        )
    return taken, asked[0][1:]


schedule = training.lr_factor


@pytest.fixture(scope="module")
def options():  # of `fit`, from the merged params
    with torch.device("meta"):
        model = build_asap(build_config(PAPER, PAPER.arms["paper"], 768, 30522))
    return fit_options(model, arm_params(PAPER, PAPER.arms["paper"]).pretrain)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_step_has_448_volumes_whatever_the_number_of_processes(monkeypatch, options, n):
    volumes, share = {0: [], 1: []}, set()
    for rank in range(n):
        with monkeypatch.context() as m:
            taken, (steps, warmup) = simulate(m, options, n, rank, 2)
        for step, samples in taken:
            volumes[step] += samples
            share.add(len(samples))
    assert [len(v) for v in volumes.values()] == [448, 448]
    assert len({*volumes[0], *volumes[1]}) == 896, "no volume is read twice"
    assert share == {56 // n}, "of a batch of 56, the pairs of one contrast"
    first = next(s for s in range(steps) if schedule(s, steps, warmup) == 1)
    per_epoch = CT_RATE_TRAIN / len(volumes[0])
    assert round(first / per_epoch, 1) == 20.0
    assert round(steps / per_epoch, 1) == 200.0 and schedule(steps, steps, warmup) == 0


def test_the_sampler_passes_over_the_train_split_200_times(options):
    steps, batches = options["steps"], options["accumulate"]
    sampler = EpochBatchSampler(CT_RATE_TRAIN, options["batch"], steps * batches, 0)
    assert CT_RATE_TRAIN == CT_RATE_TRAIN_VOLUMES
    total, last = 0, None
    for samples in sampler:
        total, last = total + len(samples), samples[-1]
    assert total / steps == 448 and round(total / CT_RATE_TRAIN, 1) == 200.0
    assert 0 <= total - 200 * CT_RATE_TRAIN < 448, "the last step completes the 200th epoch"
    assert last[0] == 200, "and reads the first volumes of another"
    assert count_steps(PAPER)["volumes_a_step"] == 448 and count_steps(PAPER)["pairs_a_gpu"] == 14


def test_the_optimizer_is_the_papers(options):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    keys = ("lr", "weight_decay", "matrices", "muon_lr")
    (opt,) = training.build_optimizers(net, betas=(0.9, 0.95), **{k: options[k] for k in keys})
    assert isinstance(opt, torch.optim.AdamW) and options["clip"] is None
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in opt.param_groups] == [
        (0.00015, 0.05, 1),
        (0.00015, 0.0, 3),
    ]


def test_three_processes_cannot_share_the_batch(monkeypatch, options):
    with pytest.raises(ValueError, match="a batch of 56 cannot be shared by 3 processes"):
        simulate(monkeypatch, options, 3, 0, 1)


@pytest.mark.parametrize("arm", ["paper", "asap", "released", "mae"])
def test_every_difference_from_the_paper_is_stated(arm):
    p = PAPER
    if arm == "mae":
        with pytest.raises(ValueError, match="loss weights of arm `mae` is"):
            recipe_table(p, arm)
        return
    table = recipe_table(p, arm)
    assert not table[~table.equal.astype(bool)].why.eq("").any()
    needed = ["volumes per step", "epochs", "epochs of warm-up", "directions of a contrast"]
    assert table.set_index("setting").equal[needed].all()


def bert_of_base_size(here):  # CXR-BERT's sizes, random weights
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "no", "nodule", "heart", "large"]
    vocab = words + [f"word{i}" for i in range(PAPER.text.vocab_size - len(words))]
    (here / "vocab.txt").write_text("\n".join(vocab))
    config = transformers.BertConfig(vocab_size=len(vocab))
    bert = transformers.BertModel(config, add_pooling_layer=False)
    return TextEncoder(bert, transformers.BertTokenizer(str(here / "vocab.txt")), 512)


def test_one_step_at_the_papers_sizes(tmp_path):
    """The paper's volume, patches, model and text sizes and the arm `asap`, whose contrasts are
    both computed. Cut: a batch of 1 instead of 56, 2 batches instead of 8, no file of a 2-D MAE"""
    p = changed(PAPER, "model", init=None)
    p = changed(p, "pretrain", steps=1, warmup_steps=0, batch_size=1, accum_iter=2, num_workers=0)
    torch.manual_seed(0)
    text, rows = bert_of_base_size(tmp_path), []
    g = np.random.default_rng(0)
    for i in range(2):
        for name, x in (
            ("image", g.integers(-1000, 1000, (240, 230, 100), dtype=np.int16)),
            ("organ_map", g.integers(0, 9, (240, 230, 100), dtype=np.uint8)),
        ):
            nib.save(nib.Nifti1Image(x, np.diag([1.5, 1.5, 3, 1])), tmp_path / f"{i}{name}.nii")
        rows.append(
            dict(
                case=f"c{i}",
                findings="No nodule. Heart large. " + "Word1 word2 word3. " * (30 + 20 * i),
                impression="Heart large.",
                **{k: str(tmp_path / f"{i}{k}.nii") for k in ("image", "organ_map")},
            )
        )
    arm = row("asap", p)
    model = build_model(p, arm, text, 0)
    before = {k: v.clone() for k, v in model.named_parameters() if v.requires_grad}
    log = train(model, ImageReportDataset(pd.DataFrame(rows), p, text, 0), p, 0)
    assert np.isfinite(log[["loss", "recon", "organ", "align", "mlm"]].to_numpy(float)).all()
    still = [k for k, v in model.named_parameters() if k in before and torch.equal(v, before[k])]
    assert not still, still
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 16e6, "kB"


# the objective


@pytest.mark.parametrize("arm", ["asap", "paper", "released", "clip"])
def test_micro_batches_have_the_loss_of_the_batch(study, arm):
    p = arm_params(P, P.arms[arm])
    r = row(arm, fusion_dropout=None if arm == "asap" else 0.0)
    data = ImageReportDataset(study.table, p, study.text, 0)
    b = collate([data[(0, i)] for i in range(5)], study.text, 0.75)
    b = add_text_features(b, study.text, True)
    model, out = build_model(P, r, study.text, 0), []
    for size in (None, 2):
        model.zero_grad()
        total, parts = model(b, size)
        total.backward()
        grads = {k: v.grad.clone() for k, v in model.named_parameters() if v.requires_grad}
        out.append((parts, grads))
    (parts, whole), (parts2, micro) = out
    assert parts.keys() == parts2.keys()
    assert all(torch.isclose(parts[k], parts2[k], rtol=1e-5, atol=1e-6) for k in parts)
    largest = max(float(v.abs().max()) for v in whole.values())
    assert all(float((whole[k] - micro[k]).abs().max()) < 1e-5 * largest for k in whole)


def test_the_published_contrast_adds_nothing(study):
    p = arm_params(P, P.arms["paper"])
    assert (p.pretrain.optimizer, p.model.align_before_attention) == ("adamw", False)
    data = ImageReportDataset(study.table, p, study.text, 0)
    batches = [
        add_text_features(collate([data[(0, i)] for i in ids], study.text, 0.75), study.text, False)
        for ids in ([0, 1], [0, 2])
    ]
    model = build_model(
        P, row("paper", recon_weight=0, organ_weight=0, mlm_weight=0), study.text, 0
    )
    model.eval()

    def alone(b):  # loss of the first report
        first = {k: v[:1] for k, v in b.items()}
        return model(first)[0]

    assert (
        model.alignment.inter_report_weight == 0 and not model.alignment.logit_scale.requires_grad
    )
    assert torch.isclose(alone(batches[0]), alone(batches[1]), atol=1e-5), "no other report matters"
    mean = build_model(
        P,
        row("paper", recon_weight=0, organ_weight=0, mlm_weight=0, align_reduction="mean"),
        study.text,
        0,
    ).eval()
    assert torch.isclose(2 * mean(batches[0])[0], model(batches[0])[0], rtol=1e-5)


def test_a_fixed_temperature_stays(study):
    p = changed(P, "pretrain", steps=2, batch_size=3)
    for learnt in (False, True):
        m = build_model(p, row("asap", learn_temperature=learnt), study.text, 0)
        before = m.alignment.logit_scale.detach().clone()
        train(m, ImageReportDataset(study.table, p, study.text, 0), p, 0)
        assert torch.equal(m.alignment.logit_scale, before) != learnt


@pytest.mark.parametrize("arm", PUBLISHED)
def test_the_published_arms_train(study, tmp_path, arm):
    p = changed(P, "pretrain", steps=2, batch_size=3, eval_every=2)
    model, log, _, rows, metrics = run(arm, row(arm), p, study.table, study.text, tmp_path, {})
    assert np.isfinite(log.loss).all() and metrics["weights_source"] == "trained"
    parts = {"recon", "organ", "align", "mlm"} & {*log}
    assert parts == {
        k for k in ("recon", "organ", "align", "mlm") if P.arms[arm].model_dump()[f"{k}_weight"]
    }
    assert ("intra_report_accuracy" in rows) == (P.arms[arm].contrast_level == "region")
    again = build_asap(json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    for name, q in model.named_parameters():
        assert not q.requires_grad or q.grad is None or q.grad.abs().sum() >= 0, name


def test_dropout_and_feed_forward_are_in_the_fusion_only_where_asked(study):
    plain, published = (build_model(P, row(a), study.text, 0) for a in ("asap", "paper"))
    drops = [sum(isinstance(m, torch.nn.Dropout) for m in x.modules()) for x in (plain, published)]
    assert drops[0] == 0 and drops[1] > 0
    assert plain.fusion.mlp is None and published.fusion.mlp is not None
    x = torch.randn(2, 6, study.text.dim)
    block = published.fusion.blocks[0]
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.normal_(layer.weight)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


# text


def test_findings_alone_are_aligned_and_the_whole_report_is_masked(study):
    both, alone = (
        ImageReportDataset(study.table, changed(P, "pretrain", align_text=t), study.text, 0)
        for t in ("report", "findings")
    )
    for i in range(5):
        r = study.table.iloc[i]
        a, b = both[(0, i)], alone[(0, i)]
        assert b["sentences"] == split_sentences(r.findings)
        assert len(a["sentences"]) > len(b["sentences"])
        assert np.array_equal(a["input_ids"], b["input_ids"])
    assert report_sentences(dict(findings="", impression="Normal."), "findings") == (["Normal."], 1)
    m = build_model(P, row("asap"), study.text, 0)
    b = collate([alone[(0, i)] for i in range(4)], study.text, 0.75)
    total, _ = m(add_text_features(b, study.text, True))
    assert torch.isfinite(total)
    beyond = b["token_to_sentence"] >= b["sentence_mask"].sum(1)[:, None]
    assert beyond.any() and (b["mlm_labels"][beyond] >= 0).any(), "words of the impression too"
    sim = torch.ones(4, b["sentence_mask"].shape[1], 3)
    assert (similarity_bias(sim, torch.full((4, 2), sim.shape[1])) == 0).all()


def test_a_sentence_in_context_is_not_the_sentence_alone(tmp_path, study):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(study.text.tokenizer),
        hidden_size=P.text.embed_dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False)
    text = TextEncoder(bert, study.text.tokenizer, 256)  # reads reports whole
    p = changed(P, "pretrain", sentence_features="context", align_text="findings")
    data = ImageReportDataset(study.table, p, text, 0)
    b = add_text_features(collate([data[(0, i)] for i in range(3)], text, 0.75), text, False)
    first = data[(0, 1)]["sentences"]
    ids = torch.tensor(text.tokenizer(" ".join(first))["input_ids"])[None]
    assert torch.equal(b["align_input_ids"][1, : ids.shape[1]], ids[0])
    hidden = text.tokens(ids)[0]
    n = len(text.tokenizer(first[0], add_special_tokens=False)["input_ids"])
    mean = torch.nn.functional.normalize(hidden[1 : n + 1].mean(0), dim=0)
    assert torch.allclose(b["sentence_embeds"][1, 0], mean, atol=1e-5)
    alone = text.sentences(first)
    assert not torch.allclose(b["sentence_embeds"][1, 0], alone[0], atol=1e-3)
    assert (b["sentence_embeds"][~b["sentence_mask"]] == 0).all()


def cxr_bert(folder):
    "A folder with the published entries that name custom classes; weights random and small"
    folder.mkdir()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] there is no pneumothorax . effusion left".split()
    (folder / "vocab.txt").write_text("\n".join(words))
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            hidden_dropout_prob=0.25,
        )
    )
    bert.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(
        architectures=["CXRBertModel"],
        auto_map=dict(
            AutoConfig="configuration_cxrbert.CXRBertConfig",
            AutoModel="modeling_cxrbert.CXRBertModel",
        ),
        model_type="cxr-bert",
        projection_size=128,
    )
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = dict(
        do_lower_case=True,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        tokenize_chinese_chars=True,
        strip_accents=None,
        model_max_length=512,
        tokenizer_class="CXRBertTokenizer",
        auto_map=dict(AutoTokenizer=["configuration_cxrbert.CXRBertTokenizer", None]),
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for module in ("configuration_cxrbert", "modeling_cxrbert"):
        (folder / f"{module}.py").write_text("raise SystemExit('code of a model was run')")
    return bert.eval()


def test_cxr_bert_is_opened_without_its_code(tmp_path):
    bert = cxr_bert(tmp_path / "cxr")
    text = load_text(tmp_path / "cxr", 64)
    assert type(text.tokenizer).__name__ == "BertTokenizer"
    ids = text.tokenizer("There is NO pneumothorax.")["input_ids"]
    assert ids == [2, 5, 6, 7, 8, 9, 3], "lower-cased, [CLS] and [SEP]"
    x = torch.tensor([ids])
    assert torch.allclose(text.tokens(x), bert.bert(x).last_hidden_state, atol=1e-6)
    assert not text.by_sentence


# the start


SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192)


def test_a_2d_mae_starts_blocks_and_norm(tmp_path, study):
    torch.manual_seed(0)
    mae = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **SMALL,
            image_size=32,
            patch_size=16,
            decoder_hidden_size=24,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=48,
        )
    ).eval()
    mae.save_pretrained(tmp_path / "mae")
    vit = ViT3D((8, 18, 8), (4, 6, 2), 48, 2, 3)
    kept = {k: v.clone() for k, v in vit.state_dict().items() if "embed" in k or "cls" in k}
    assert load_image_mae(vit, tmp_path / "mae") is vit
    assert all(torch.equal(vit.state_dict()[k], v) for k, v in kept.items())
    x = torch.randn(2, 5, 48)
    h = x
    for layer in mae.vit.layers:
        out = layer(h)
        h = out[0] if isinstance(out, tuple) else out
    assert torch.allclose(vit.forward_blocks(x), mae.vit.layernorm(h), atol=1e-4)
    with pytest.raises(ValueError, match="take a ViT of 3 blocks of width 48"):
        load_image_mae(ViT3D((8, 18, 8), (4, 6, 2), 48, 3, 3), tmp_path / "mae")
    with pytest.raises(ValueError, match=r"has 3 heads, expected 4 \(model.num_heads\)"):
        load_image_mae(ViT3D((8, 18, 8), (4, 6, 2), 48, 2, 4), tmp_path / "mae")


def test_an_arm_starts_from_it(tmp_path, study, monkeypatch):
    q = P.model.embed_dim
    g = torch.Generator().manual_seed(3)
    names = ViT3D((4, 4, 4), (2, 2, 2), q, P.model.depth, P.model.num_heads).state_dict()
    weights = {}
    for k, v in names.items():
        if k.startswith(("blocks", "norm")) and ".attn.kv" not in k:
            k, n = k.replace(".attn.q", ".attn.qkv"), 3 if ".attn.q" in k else 1
            weights[k] = torch.randn(n * len(v), *v.shape[1:], generator=g)
    weights |= dict(cls_token=torch.zeros(1, 1, q), pos_embed=torch.zeros(1, 5, q))
    torch.save(dict(model=weights), tmp_path / "mae_pretrain.pth")
    p = changed(P, "model", init=str(tmp_path / "mae_pretrain.pth"))
    a, b = (build_model(x, row("paper"), study.text, 0).state_dict() for x in (p, P))
    for k in a:
        loaded = k.startswith(("vit.blocks", "vit.norm"))
        assert torch.equal(a[k], b[k]) != loaded or not loaded, k
    assert torch.equal(a["vit.norm.bias"], weights["norm.bias"])
    assert torch.equal(a["vit.blocks.1.attn.kv.weight"], weights["blocks.1.attn.qkv.weight"][q:])
    scratch = build_model(p, row("scratch"), study.text, 0).state_dict()
    assert torch.equal(scratch["vit.norm.bias"], b["vit.norm.bias"]), "untrained, so random"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as e:
        build_model(changed(P, "model", init="no/such-model"), row("paper"), study.text, 0)
    for part in ("mae_pretrain_vit_base.pth", "facebook/vit-mae-base", "model.init: null"):
        assert part in str(e.value)


@pytest.mark.parametrize("zero", [True, False])
def test_blocks_start_as_the_identity_or_not(study, zero):
    m = build_model(changed(P, "model", zero_init_residual=zero), row("paper"), study.text, 0)
    x = torch.randn(1, 4, P.model.embed_dim)
    assert torch.equal(m.vit.blocks[0](x), x) == zero
    assert (m.fusion.blocks[0].mlp.fc2.weight == 0).all() == zero
    assert (m.decoder.blocks[0].attn.proj.weight == 0).all() == zero


# crops


def test_a_cut_crop_is_not_resampled():
    r = np.random.default_rng(0)
    volume = r.integers(-1000, 1000, (30, 28, 12)).astype(np.int16)
    box = (np.array([5, 6, 2]), np.array([20, 20, 9]))
    sides = []
    for _ in range(50):
        crop = random_cut(r, volume.shape, (24, 24, 12), box, (0.8, 1.0))
        sides.append(crop["side"])
        assert (crop["start"] <= box[0]).all() and (box[1] <= crop["start"] + crop["side"]).all()
        assert (crop["start"] >= 0).all() and (crop["start"] + crop["side"] <= volume.shape).all()
        x = apply_crop(volume, crop, (24, 24, 12), -1000, resize=False)
        assert x.shape == (24, 24, 12) and np.isin(x, [*np.unique(volume), -1000]).all()
        inside = tuple(slice(a, a + n) for a, n in zip(crop["start"], crop["side"]))
        before = (np.array([24, 24, 12]) - crop["side"]) // 2
        at = tuple(slice(a, a + n) for a, n in zip(before, crop["side"]))
        assert np.array_equal(x[at], volume[inside])
    sides = np.array(sides)
    assert (sides <= [24, 24, 12]).all() and sides[:, 2].min() == 10, "0.8 of 12 voxels and up"


def test_padding_is_air_or_a_reflection():
    volume = np.arange(4 * 4 * 4).reshape(4, 4, 4).astype(np.int16)
    crop = center_crop(volume.shape, (6, 4, 4))
    air = apply_crop(volume, crop, (6, 4, 4), -7)
    mirror = apply_crop(volume, crop, (6, 4, 4), -7, padding="reflect")
    assert (air[0] == -7).all() and (air[-1] == -7).all()
    assert np.array_equal(mirror[0], volume[1]) and np.array_equal(mirror[-1], volume[-2])
    assert np.array_equal(mirror[1:-1], volume) and mirror.dtype == volume.dtype


def test_a_sample_is_cut_where_the_params_ask_for_it(study):
    p = changed(P, "pretrain", crop_mode="cut", crop_padding="reflect", crop_scale=[0.8, 1.0])
    data = ImageReportDataset(study.table, p, study.text, 0)
    s = data[(0, 0)]
    assert s["image"].shape == tuple(P.volumes.roi_size)
    assert np.allclose(s["organ_fractions"].sum(-1), 1, atol=1e-5)
    zoomed = ImageReportDataset(study.table, P, study.text, 0)[(0, 0)]
    assert not np.array_equal(zoomed["image"], s["image"])


# fingerprints


def test_a_key_at_its_default_is_in_no_fingerprint():
    p, part = load_params(), load_stage_params("pretrain@asap")
    assert fingerprint(model=p.model) == fingerprint(model=part.model)
    assert "init" not in fingerprint(model=p.model)["model"]
    other = changed(p, "model", init="a.pth")
    assert fingerprint(model=other.model)["model"]["init"] == "a.pth"
    same = part.model.model_copy(update=dict(init="a.pth"))
    assert fingerprint(model=same) == fingerprint(model=other.model)
    a, b = (recipe(row(name, p), p, {}, 0) for name in ("asap", "paper"))
    assert "optimizer" not in a["arm"] and b["arm"]["optimizer"] == "adamw"
    c = recipe(
        dict(row("asap", p), fusion_mlp=True), changed(p, "pretrain", micro_batch_size=2), {}, 0
    )
    assert c["arm"].pop("fusion_mlp") is True and c == a


def test_overriding_keys_of_an_arm_are_keys_of_their_section():
    from asap.model.asap import ARM_OVERRIDES, ArmConfig

    for key, section in ARM_OVERRIDES.items():
        assert key in type(getattr(P, section)).model_fields and key in ArmConfig.model_fields
    assert arm_params(P, P.arms["simcrop"]) is P


def test_an_arm_can_have_a_seed_of_its_own():
    asap = P.arms["asap"].model_dump()
    assert arm_seed(P, asap | dict(seed=None)) == P.study.seed
    assert arm_seed(P, asap | dict(seed=P.study.seed + 1)) == P.study.seed + 1
    assert recipe(asap | dict(seed=7), P, {}, 7) == recipe(asap | dict(seed=None), P, {}, 7)
