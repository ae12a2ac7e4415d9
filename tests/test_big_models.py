"""What lets a model or a batch grow: activation checkpointing, `torch.compile`, bf16, readers and
page-locked memory, augmentation on the device. What is learned stays the same"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_vqa import QUESTIONS, TABLE, TOKENS, P as VQA
from torch.utils.checkpoint import checkpoint

from asap import train
from asap.model.asap import complete_arm
from asap.model.vit import ViT3D
from asap.params import load_params
from asap.pretrain.pretrain import fit_options, recipe
from asap.tasks import segment, vqa
from asap.text import language

torch.set_num_threads(1)
P = load_params()
SIZE, BOTH = (24, 24, 12), dict(activation_checkpointing=True, torch_compile=True)


class Images:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index[1])
        return dict(image=torch.rand(1, *SIZE, generator=g), target=torch.tensor(index[1] / 6))


def fit_images(**options):
    "Weights of a small ViT after three steps, and the numbers that a loss kept for its gradient"
    torch.manual_seed(0)
    model, kept = ViT3D(SIZE, (6, 6, 3), 24, 6, 2, None, False), []
    names = list(model.state_dict())

    def loss(m, b, step):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            value = (m(b["image"])[:, 0].mean(-1).float() - b["target"]).square().mean()
        return value, {}

    options = dict(steps=3, batch=3, lr=0.01, seed=0, precision_="no") | options
    log = train.fit(model, loss, Images(), **options)
    assert list(model.state_dict()) == names and log.loss.notna().all()
    for block in model.blocks:
        assert "forward" not in vars(block)
    return model.state_dict(), sum(t.numel() for t in kept)


@pytest.fixture(scope="module")
def plain():
    return fit_images()


def test_checkpointed_blocks_need_less_and_learn_the_same_bits(plain):
    weights, kept = fit_images(activation_checkpointing=True)
    assert all(torch.equal(weights[k], v) for k, v in plain[0].items())
    assert kept < plain[1] / 4, (kept, plain[1])


@pytest.fixture
def compiled(monkeypatch):
    "`torch.compile` without its compiler: the graphs that it finds"
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.parametrize("options", [dict(torch_compile=True), BOTH])
def test_compiled_blocks_learn_the_same(plain, compiled, options):
    weights, _ = fit_images(**options)
    assert 0 < len(compiled) <= 2, "blocks of one kind share a graph"
    assert all(torch.allclose(weights[k], v, atol=1e-6) for k, v in plain[0].items())


def test_bf16_trains_weights_in_fp32(plain):
    weights, _ = fit_images(precision_="bf16")
    assert all(v.dtype == torch.float32 for v in weights.values())
    change = max(float((weights[k] - v).abs().max()) for k, v in plain[0].items())
    assert 0 < change < 0.05, change  # three steps of at most 0.01


def test_page_locked_memory_is_for_gpus():
    sampler = train.EpochBatchSampler(6, 2, 3, 0)
    for kind in ("cpu", "cuda"):
        loader = train._make_loader(Images(), sampler, None, 2, torch.device(kind))
        assert loader.pin_memory == (kind == "cuda") and loader.num_workers == 2


# params


def options_of(monkeypatch, module, call) -> dict:
    "What a trainer passes to `fit`"
    found = {}
    monkeypatch.setattr(module, "fit", lambda *args, **kw: found.update(kw))
    call()
    return {k: found[k] for k in (*BOTH, "workers")}


GIVEN = BOTH | dict(num_workers=3)
PASSED = BOTH | dict(workers=3)
OFF = dict.fromkeys(BOTH, False) | dict(workers=0)


def test_params_of_pretraining_reach_the_loop():
    model = SimpleNamespace(arm=complete_arm(P.arms["asap"]), muon_params=list)
    for changed, expected in (({}, OFF), (GIVEN, PASSED)):
        found = fit_options(model, P.pretrain.model_copy(update=changed))
        assert {k: found[k] for k in expected} == expected


def test_params_of_segmentation_reach_the_loop(monkeypatch):
    row = P.segment.datasets["luna16"].model_dump()
    for changed, expected in (({}, OFF), (GIVEN, PASSED)):
        p = P.segment.model_dump() | changed
        call = partial(segment.train_segmentation, SimpleNamespace(), [], [], p, row, SIZE, False)
        assert options_of(monkeypatch, segment, lambda call=call: call(0)) == expected


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "A small language model and its questions"
    at = tmp_path_factory.mktemp("language")
    language.build_language_model(VQA, QUESTIONS, dict(zip(TABLE.case, TABLE.split)), 0, at)
    return vqa.attach_cases(QUESTIONS, TABLE), at


def train_answers(answers, **changed):  # trained weights
    q, folder = answers
    p = VQA.model_copy(update=dict(steps=3, lora_dropout=0.0, eval_every=9) | changed)
    lm, tokenizer = language.load(folder)
    torch.manual_seed(0)
    m = vqa.VQAModel(vqa.build_vqa_config(p, TOKENS.shape[-1], False), lm)
    vqa.train_vqa(m, tokenizer, q[q.split == "train"], TOKENS, p, 0)
    return m.state_dict()


def test_params_of_question_answering_reach_the_loop(answers, monkeypatch):
    for changed, expected in (({}, OFF), (GIVEN, PASSED)):
        call = partial(train_answers, answers, **changed)
        assert options_of(monkeypatch, vqa, call) == expected


def test_a_frozen_language_model_is_checkpointed_and_learns_the_same_bits(answers, monkeypatch):
    calls = []

    def count(f, *args, **kw):
        calls.append(f.__self__)
        return checkpoint(f, *args, **kw)

    monkeypatch.setattr(train, "checkpoint", count)
    whole = train_answers(answers)
    assert not calls
    again = train_answers(answers, activation_checkpointing=True)
    kinds = {type(block).__name__ for block in calls}
    assert kinds == {"Block", "LlamaDecoderLayer"}
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_they_are_in_no_fingerprint(answers):
    arm, p = P.arms["asap"], P.model_copy(update=dict(pretrain=P.pretrain.model_copy(update=GIVEN)))
    assert recipe(arm.model_dump(), p, {}, 0) == recipe(arm.model_dump(), P, {}, 0)
    lm, tokenizer = language.load(answers[1])
    a, b = (
        vqa._training_fingerprint("asap", answers[0], p, 0, {}, lm, tokenizer)
        for p in (VQA, VQA.model_copy(update=GIVEN))
    )
    assert a == b
    section, row = P.segment.model_dump(), P.segment.datasets["acdc"].model_dump()
    a, b, c = (
        segment.training_fingerprint("acdc", row, [-1, 1], SIZE, dict(segment=s), None, {}, 0)
        for s in (section, section | GIVEN, section | dict(augment_on_device=True))
    )
    assert a == b != c


# augmentation on the device


def make_case(i):
    g = torch.Generator().manual_seed(i)
    image = torch.rand(1, 30, 26, 14, generator=g) * 2 - 1
    return SimpleNamespace(case=f"c{i}", image=image, label=(image > 0.5).to(torch.uint8))


@pytest.mark.parametrize("crops", [1, 3])
def test_augmented_on_the_device_a_crop_is_the_same(crops):
    transform = segment.build_augmentation(P.segment.model_dump(), SIZE, True, crops)
    given = [make_case(i) for i in range(3)], transform, 0
    whole, cut = segment.AugmentedCases(*given), segment.AugmentedCases(*given, segment.NUM_CUTS)
    for epoch in range(3):
        a, b = (segment.collate_crops([d[epoch, i] for i in (2, 0)]) for d in (whole, cut))
        assert a["image"].shape == b["image"].shape == (2 * crops, 1, *SIZE)
        assert not torch.equal(a["image"], b["image"])
        b = segment.augment_on_device(b, transform, crops)
        assert all(torch.equal(a[k], b[k]) for k in ("image", "label"))
        assert a["image"].dtype == b["image"].dtype and a["label"].dtype == b["label"].dtype


def test_a_training_that_augments_on_the_device_is_the_same():
    "In two processes that read, too"
    p = P.segment.model_dump() | dict(feature_size=4, num_validations=1)
    row, found = dict(steps=3, batch_size=2, lr=0.01, crops_per_volume=2), []
    for changed in ({}, dict(augment_on_device=True, num_workers=2)):
        torch.manual_seed(0)
        config = dict(encoder_config=None, img_size=list(SIZE), class_names={1: "x"})
        model = segment.build_segmentation_model(config | dict(feature_size=4))
        data = [make_case(i) for i in range(3)]
        log = segment.train_segmentation(model, data, [], p | changed, row, SIZE, True, 0)
        found.append((log, model.state_dict()))
    (log, weights), (log2, weights2) = found
    assert log.equals(log2) and all(torch.equal(weights2[k], v) for k, v in weights.items())
