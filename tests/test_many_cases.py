"""Memory does not grow with the number of cases: what is held at a time is counted, and what is
computed by parts equals the whole"""

import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from asap import train
from asap.abnormalities import ABNORMALITIES
from asap.core import Quarantine
from asap.data.cohorts.luna16 import LUNA16, lung_labels
from asap.data.volumes import write
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest
from asap.pretrain import embed, pretrain
from asap.study import grounding
from asap.tasks import masks, report, retrieve, segment, unetr, vqa
from asap.text import encoder, language, scores
from asap.text.tokens import train_wordpiece_tokenizer

torch.set_num_threads(1)
P = load_params()
SIZE = (24, 24, 12)  # voxels of the models' input
SEGMENT = P.segment.model_dump() | dict(feature_size=4, num_validations=1, overlap=0.25)


class Held:
    "Counts the arrays of a function that are alive at the same time"

    def __init__(self, function, count=lambda a: 1):
        self.function, self.count, self.alive, self.most = function, count, {}, 0

    def __call__(self, *args, **kw):
        out = self.function(*args, **kw)
        key = object()
        weakref.finalize(out, self.alive.pop, key)
        self.alive[key] = self.count(out)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def cohort(n, **columns):
    names = [f"c{i}" for i in range(n)]
    split = [("train", "train", "train", "val", "test")[i % 5] for i in range(n)]
    return pd.DataFrame(dict(case=names, scan=names, patient=names, split=split, **columns))


@pytest.fixture(scope="module")
def lungs(tmp_path_factory):
    "A volume and its lung mask on disk"
    here = tmp_path_factory.mktemp("lungs")
    c = synthesize_chest(("many", 0), (48, 48, 24), (7.0, 7.0, 14.0))
    write(c.hu, c.affine, here / "volume.nii")
    write(lung_labels(c.labels), c.affine, here / "mask.nii.gz")
    return dict(image=str(here / "volume.nii"), target_map=str(here / "mask.nii.gz"))


def test_report_holds_some_scans_at_a_time(tmp_path, monkeypatch):
    n, grid = 160, (4, 4, 2)
    names = list(ABNORMALITIES)
    findings = [f"There is {names[i % len(names)].lower()}." for i in range(n)]
    tokens = np.random.default_rng(0).normal(size=(n, 33, 8)).astype(np.float16)
    np.save(tmp_path / "tokens.npy", tokens)
    table = cohort(n, findings=findings, impression="")
    tokenizer = train_wordpiece_tokenizer(findings, 200, tmp_path / "tokenizer")
    changed = dict(embed_dim=16, num_layers=1, num_heads=2, max_length=20, steps=6, batch_size=4)
    p = P.report.model_copy(update=changed | dict(token_pool=[1, 1, 1], num_beams=1))
    held = Held(report.pool_tokens, len)
    monkeypatch.setattr(report, "pool_tokens", held)
    monkeypatch.setattr(report, "BLOCK_BYTES", 8 * 35 * 8 * 4)  # 8 scans
    text = SimpleNamespace(tokenizer=tokenizer, fingerprint=lambda: "words")
    monkeypatch.setattr(report, "score_reports", lambda said, t, text: t.assign(generated=said))
    on_disk = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    names = "report_ct_rate", "ct_rate"
    out = report.run(*names, table, on_disk, table, "asap", grid, text, p, 0)
    assert len(out) == 2 * n // 5
    assert held.most <= 32 + 8, f"{held.most} of {n} scans were in memory at the same time"


@pytest.mark.parametrize("pool", [(2, 2, 2), (1, 1, 1)])
def test_rows_that_are_pooled_when_read_are_those_of_the_whole(pool, tmp_path):
    r = np.random.default_rng(0)
    np.save(tmp_path / "t.npy", r.normal(size=(40, 65, 16)).astype(np.float16))
    tokens, rows = np.load(tmp_path / "t.npy", mmap_mode="r"), r.permutation(40)[:31]
    whole, lazy = (
        report.pool_tokens(tokens, (4, 4, 4), pool)[rows],
        report.PooledTokens(tokens, (4, 4, 4), pool, rows),
    )
    some = r.permutation(31)[:20]
    assert np.array_equal(lazy[some], whole[some]) and lazy.shape == whole.shape
    assert np.array_equal(lazy.select(some)[3:4], whole[some[3:4]])
    t = torch.as_tensor(whole)[some]
    for a, b in zip(report.token_statistics(lazy, some), (t.mean(0), t.std(0, correction=0))):
        assert torch.equal(a, b)
    for a, b in zip(
        report.token_statistics(lazy, some, most=1), report.token_statistics(whole, some)
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_segmentation_holds_some_cases_at_a_time(lungs, tmp_path, monkeypatch):
    n = 30
    table = cohort(n, **lungs, findings="", impression="", organ_map="")
    row = dict(
        low_label=False, steps=4, batch_size=2, lr=0.001, hu_window=None, roi_size=list(SIZE)
    )
    settings = dict(
        segment=SEGMENT | dict(datasets=dict(luna16=row)),
        volumes=dict(spacing=[7, 7, 14], roi_size=list(SIZE), hu_range=[-1000, 1000]),
        phantoms=dict(luna16=True),
    )
    held = [Held(segment.scale_intensity), Held(segment.to_class_indices), Held(segment.resample)]
    for name, function in zip(("scale_intensity", "to_class_indices", "resample"), held):
        monkeypatch.setattr(segment, name, function)
    args = "unet", ["segment_luna16"], dict(luna16=table), settings, tmp_path
    found = segment.run_all(*args)
    assert found.case.nunique() == n // 5
    assert max(h.most for h in held) <= 4, f"{[h.most for h in held]} of {n} arrays were in memory"
    assert not (tmp_path / "build/resume/segment/unet/luna16-1-0").exists()


def test_a_case_that_is_read_again_is_the_same(lungs, tmp_path):
    q = segment.select_tasks(["segment_luna16"], "luna16")[0]
    (row,) = cohort(1, **lungs).itertuples()
    c, kept = (
        segment.SegmentationCase(row, q, (-1000, 1000), folder=f) for f in (None, tmp_path / "l")
    )
    for a in (kept, kept):  # resampled, then read from the folder
        assert torch.equal(a.label, c.label) and torch.equal(a.image, c.image)
    assert len(list((tmp_path / "l").iterdir())) == 1
    assert c.classes == c.label.unique().tolist() and c.shape == c.label.shape[1:]
    assert c.reference_shape == c.reference_mask.shape


def test_a_broken_volume_is_found_before_the_training(lungs, tmp_path):
    q, bad = segment.select_tasks(["segment_luna16"], "luna16")[0], Quarantine()
    short = tmp_path / "short.nii"
    whole = open(lungs["image"], "rb").read()
    short.write_bytes(whole[: len(whole) // 2])
    table = cohort(2, **lungs)
    table.loc[1, "image"] = str(short)
    cases = segment.load_cases(table, q, (-1000, 1000), bad)
    assert [c.case for c in cases] == ["c0"] and [r["case"] for r in bad.rows] == ["c1"]


def test_scores_class_by_class_are_those_of_all_at_once():
    from monai.metrics import compute_dice

    r = np.random.default_rng(0)
    truth, predicted = (r.integers(0, 4, (20, 18, 12)).astype(np.uint8) for _ in range(2))
    truth[truth == 3] = 0
    f, t = (torch.from_numpy(masks.one_hot(m, 4))[None] for m in (predicted, truth))
    d = compute_dice(f, t, include_background=False, ignore_empty=True)[0].numpy()
    rows = masks.score_mask(predicted, truth, np.diag([2.0, 2, 3, 1]), "abc")
    np.testing.assert_array_equal([k["dice"] for k in rows], d.astype(float))
    assert [k["reference_ml"] for k in rows] == [float(t[0, k].sum() * 0.012) for k in (1, 2, 3)]


class Recorder(torch.optim.SGD):
    "Keeps the gradients of each step"

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.param_groups[0]["base"] = 0.0
        self.seen = []

    def step(self, *args, **kw):
        self.seen.append(
            torch.cat(
                [q.grad.flatten() for q in self.param_groups[0]["params"] if q.grad is not None]
            )
        )
        return super().step(*args, **kw)


def gradients(monkeypatch, fit):
    "Gradients of the steps of a training"
    made = []

    def build(model, *args, **kw):
        made.append(Recorder(model))
        return made[:1]

    monkeypatch.setattr(train, "build_optimizers", build)
    fit()
    return torch.stack(made[0].seen)


def test_the_gradient_of_micro_batches_in_segmentation(lungs, monkeypatch):
    q, table = segment.select_tasks(["segment_luna16"], "luna16")[0], cohort(5, **lungs)
    cases = segment.load_cases(table, q, (-1000, 1000), Quarantine())

    def fit(most):
        torch.manual_seed(0)
        model = unetr.build_from_config(
            dict(
                encoder_config=None,
                img_size=list(SIZE),
                class_names=LUNA16.targets,
                feature_size=4,
            )
        )
        row = dict(steps=2, batch_size=4, lr=0.001)
        p = SEGMENT | dict(micro_batch_size=most, max_grad_norm=1e9)
        segment.train_segmentation(model, cases, [], p, row, SIZE, False, 0)

    monkeypatch.setattr(train, "resolve_precision", lambda wanted="auto": "no")
    whole, *split = (gradients(monkeypatch, partial(fit, most)) for most in (None, 1, 3))
    assert len(whole) == 2 and whole.abs().max() > 1e-3
    for g in split:
        torch.testing.assert_close(g, whole, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "Questions with unequal loss weights, and a small language model"
    from test_vqa import QUESTIONS, TABLE, TOKENS, P as CONFIG

    at = tmp_path_factory.mktemp("language")
    split = dict(zip(TABLE.case, TABLE.split))
    language.build_language_model(CONFIG, QUESTIONS, split, 0, at)
    p = CONFIG.model_copy(update=dict(steps=2, batch_size=8, lora_dropout=0.0, muon_lr=None))
    return p, vqa.attach_cases(QUESTIONS, TABLE), TOKENS, at


def test_the_gradient_of_micro_batches_in_question_answering(answers, monkeypatch):
    p, q, tokens, folder = answers

    def fit(most):
        lm, tokenizer = language.load(folder)
        torch.manual_seed(0)
        m = vqa.VQAModel(vqa.build_vqa_config(p, tokens.shape[-1], False), lm)
        changed = p.model_copy(update=dict(micro_batch_size=most))
        vqa.train_vqa(m, tokenizer, q[q.split == "train"], tokens, changed, 0)

    monkeypatch.setattr(train, "resolve_precision", lambda wanted="auto": "no")
    whole, *split = (gradients(monkeypatch, partial(fit, most)) for most in (None, 2, 1))
    assert len(whole) == 2 and whole.abs().max() > 1e-3
    for g in split:
        torch.testing.assert_close(g, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch, processes, most, parts", [(32, 1, None, 1), (32, 4, 3, 4)])
def test_a_batch_is_split_equally(batch, processes, most, parts):
    assert train.count_micro_batches(batch, processes, most) == parts


def test_a_new_key_that_is_null_leaves_fingerprints_as_they_were(answers):
    from asap.core import fingerprint, first_difference

    old = answers[0].model_dump(exclude_defaults=True)
    old = {k: v for k, v in old.items() if k != "micro_batch_size"}
    assert first_difference(fingerprint(vqa=old), fingerprint(vqa=answers[0])) is None
    limited = answers[0].model_copy(update=dict(micro_batch_size=2))
    assert first_difference(fingerprint(vqa=old), fingerprint(vqa=limited))


def test_a_new_key_at_its_default_leaves_trained_answers_as_they_were(answers, monkeypatch):
    class NewConfig(type(answers[0])):
        new_key: int = 3

    p, q, _, folder = answers
    lm, tokenizer = language.load(folder)

    def found(config):
        return vqa._training_fingerprint("asap", q, config, 0, {}, lm, tokenizer)

    old = found(p)
    monkeypatch.setattr(vqa, "VQAConfig", NewConfig)
    dumped = p.model_dump()
    assert found(NewConfig(**dumped)) == old == found(dumped | dict(new_key=3))
    assert found(NewConfig(**dumped, new_key=4)) != old != found(dumped | dict(new_key=4))
    assert found(p.model_copy(update=dict(lr=0.5))) != old


def test_a_new_key_at_its_default_leaves_trained_segmentations_as_they_were(monkeypatch):
    class NewConfig(segment.SegmentConfig):
        new_key: int = 3

    class NewDataset(segment.SegmentDatasetConfig):
        new_key: float = 0.5

    section = load_params().segment.model_dump()
    row = segment.dataset_settings(
        "acdc", dict(segment=section, volumes={"hu_range": [-1, 1], "roi_size": [8, 8, 8]})
    )[0]

    def found(section, row):
        p = dict(segment=section)
        return segment.training_fingerprint("acdc", row, [-1, 1], [8] * 3, p, None, {}, 0)

    old = found(section, row)
    monkeypatch.setattr(segment, "SegmentConfig", NewConfig)
    monkeypatch.setattr(segment, "SegmentDatasetConfig", NewDataset)
    assert found(section | dict(new_key=3), row | dict(new_key=0.5)) == old
    assert found(section | dict(new_key=4), row) != old
    assert found(section, row | dict(new_key=0.7)) != old


def ranks_of_the_whole(score, table, number):
    "As retrieval ranked before it did so by blocks"
    scan, scans = pd.factorize(table.scan)
    first, kept = (np.unique(a, return_index=True)[1] for a in (number, scan))
    by_scan = (np.eye(len(scans))[scan].T @ score[:, first]) / np.bincount(scan)[:, None]
    right = number[kept][:, None] == number[first]
    both = (by_scan, right, kept), (by_scan.T, right.T, first)
    return [
        (retrieve.retrieval_ranks(s, r), r.sum(1), s.shape[1], table.case.to_numpy()[rows])
        for s, r, rows in both
    ]


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_by_blocks_are_those_of_the_whole(ties):
    n, r = 240, np.random.default_rng(0)
    u, v = (r.integers(-2, 3, (n, 3)) if ties else r.normal(size=(n, 48)) for _ in range(2))
    u, v = (torch.from_numpy(a.astype(np.float32)) for a in (u, v))
    names = np.arange(n)
    table = pd.DataFrame(dict(case=names, scan=r.integers(0, 200, n), patient=names))
    number = r.integers(0, 180, n)
    expected = ranks_of_the_whole((u @ v.T).double().numpy(), table, number)
    for block in (1, 17, 100, n, 1024):
        found = retrieve.rank_embeddings(u, v, table, number, block)
        for direction, parts in zip(retrieve.DIRECTIONS, expected):
            g = found[found.direction == direction]
            for column, values in zip(("rank", "num_relevant", "pool_size", "case"), parts):
                np.testing.assert_array_equal(g[column], values)
        assert retrieve.reciprocal_rank(u, v, number, block) == retrieve.reciprocal_rank(
            u, v, number, n
        )


def test_ranking_never_computes_the_whole_matrix(monkeypatch):
    n, most = 400, 0
    cosines = retrieve._cosines

    def counted(u, v):
        nonlocal most
        most = max(most, len(u) * len(v))
        return cosines(u, v)

    monkeypatch.setattr(retrieve, "_cosines", counted)
    u = torch.randn(n, 4)
    table = pd.DataFrame(dict(case=range(n), scan=range(n), patient=range(n)))
    retrieve.rank_embeddings(u, u, table, np.arange(n), 50)
    retrieve.reciprocal_rank(u, u, np.arange(n), 50)
    assert most == 50 * n


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_positional_baseline_is_the_mean_and_median_of_all_cases(n):
    maps = np.random.default_rng(n).random((n, 27, 9)).astype(np.float32)
    for most in (2**26, 4 * n * 50, 1):
        found = pretrain._mean_and_median(iter(maps), most)
        np.testing.assert_array_equal(found["mean"], maps.mean(0))
        np.testing.assert_array_equal(found["median"], np.median(maps, 0))
        assert found["mean"].dtype == found["median"].dtype == np.float32


def test_the_positional_baseline_holds_some_cases_at_a_time():
    make = Held(lambda i: np.full((50, 9), i, np.float32))
    found = pretrain._mean_and_median(map(make, range(30)))
    assert make.most <= 2 and found["median"][0, 0] == 14.5


def test_the_atlas_of_case_by_case_is_that_of_all_masks():
    r = np.random.default_rng(0)
    share = np.where(r.random((60, 30)) > 0.7, r.random((60, 30)), 0).astype(np.float32)
    labels = r.choice(["Emphysema", "Lung nodule", "Pleural effusion", ""], 60).tolist()
    atlas = grounding.Atlas(["left lung", "right lung"])
    said = r.choice(["In the left lung.", "In the right lung.", "No organ."], 60).tolist()
    for i in range(0, 60, 7):
        atlas.add(share[i : i + 7], labels[i : i + 7], said[i : i + 7])
    whole: dict = {}
    grounding.add_to_atlas(whole, grounding.hit_patches(share), labels, said, atlas.groups)
    assert set(atlas.maps) == set(whole) and "Emphysema in left lung" in whole
    for label, counts in whole.items():
        np.testing.assert_array_equal(atlas.maps[label], counts)
    assert atlas.large_labels() == grounding.large_lesion_labels(share, labels)


class Elsewhere(torch.nn.Module):
    "An encoder that knows on which device its weights and its input lie"

    img_size, hu_range, max_length = SIZE, (-1000, 1000), 16

    def __init__(self, tokenizer=None):
        super().__init__()
        self.weight, self.tokenizer = torch.nn.Parameter(torch.zeros(1)), tokenizer

    @property
    def device(self):
        return self.weight.device

    def check(self, x):
        assert self.weight.device.type == x.device.type == "meta"

    def forward_features(self, x):
        self.check(x)
        return torch.zeros(len(x), 3, 4)

    def tokens(self, ids, of):
        self.check(ids)
        self.check(of)
        return torch.ones(*ids.shape, 4)


@pytest.fixture
def other_device(monkeypatch):
    "As if Accelerate gave another device"
    for module in (embed, encoder, train):
        monkeypatch.setattr(module, "get_device", lambda: torch.device("meta"))


def test_embedding_uses_the_device(other_device, lungs, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kw: nullcontext())  # none for `meta`
    f = embed.extract_features(Elsewhere(), [lungs["image"]] * 3, SIZE, (-1000, 1000))
    assert f.shape == (3, 4)


def test_text_encoding_uses_the_device(other_device, tmp_path):
    from transformers import BertConfig, BertModel

    train_wordpiece_tokenizer(["There is emphysema."], 100, tmp_path)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(BertConfig(vocab_size=100, **sizes), add_pooling_layer=False).save_pretrained(
        tmp_path
    )
    assert encoder.load(tmp_path).device.type == "meta"


def test_bert_score_uses_the_device_of_its_encoder(tmp_path):
    tokenizer = train_wordpiece_tokenizer(["There is emphysema."], 100, tmp_path)
    e = Elsewhere(tokenizer).to("meta")
    said, true = ["There is emphysema.", ""], ["Emphysema.", "Emphysema."]
    assert scores.bert_score(said, true, e)[:, 2].round(5).tolist() == [1, 0]
