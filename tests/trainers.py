"""A short training of every trainer on toy data, whose losses are written down.
usage: [torchrun ...] trainers.py COHORT FOLDER [NAME...]   (COHORT: of tests/trains.py)"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from asap import train
from asap.core import process_rank, project_root
from asap.params import load_params

STEPS, BATCH = 20, 4
FINDINGS = ["emphysema", "lung nodule", "pleural effusion", "cardiomegaly", "atelectasis"]
PLACES = ["in the left lung", "in the right lung", "at the base", "in the upper lobes"]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reports(n):  # lists of sentences of different length
    r = np.random.default_rng(0)
    return [
        [f"There is {r.choice(FINDINGS)} {r.choice(PLACES)}." for _ in range(1 + i % 4)]
        for i in range(n)
    ]


def pretrain(cohort, folder):
    from asap.pretrain.batches import ImageReportDataset
    from asap.pretrain.pretrain import build_model, train
    from asap.text.encoder import load

    p = load_params(project_root() / "params/smoke.yaml")
    # at higher rates, rounding soon decides which of the like patches are a sentence's best
    short = dict(optimizer="adamw", lr=0.0002, warmup_steps=4, precision="no")
    short |= dict(steps=STEPS, batch_size=BATCH, checkpoint_every=99)
    p = p.model_copy(update=dict(pretrain=p.pretrain.model_copy(update=short)))
    table = pd.read_parquet(cohort / "table.parquet")
    for k in ("image", "organ_map"):
        table[k] = [str(cohort / f) for f in table[k]]
    text = load(cohort / "text")
    model = build_model(p, p.arms["asap"].model_dump(by_alias=True), text, 0)
    train(model, ImageReportDataset(table, p, text, 0), p, 0)


def text(cohort, folder):
    from asap.text.encoder import TextConfig, train_text_encoder

    size = dict(vocab_size=200, embed_dim=16, num_layers=1, num_heads=2, max_length=32)
    p = TextConfig(model="build/text", steps=STEPS, batch_size=BATCH, lr=0.001, **size)
    train_text_encoder(reports(12), reports(4), p, 0, folder / "text")


def language_model():
    from asap.text import language

    size = dict(vocab_size=300, embed_dim=16, num_layers=1, num_heads=2)
    p = language.TinyLMConfig(steps=STEPS, batch_size=BATCH, lr=0.003, muon_lr=0.006, **size)
    rows = [
        (f"c{i}", *row)
        for i, r in enumerate(reports(12))
        for row in (
            ("disorder", "Which disorders?", "/".join(r)),
            ("presence", "Is there emphysema?", "yes" if "emphysema" in r[0] else "no"),
        )
    ]
    q = pd.DataFrame(rows, columns=["case", "kind", "question", "answer"])
    return language.train_language_model(language.reading_examples(q), p, 0), q


def language(cohort, folder):
    language_model()


def heads(**more):
    return SimpleNamespace(steps=STEPS, batch_size=BATCH, lr=0.01, embed_dim=8, **more)


def vocabulary(cohort, folder):
    from asap.tasks.vocabulary import train_classifier

    y = (draw(14, 5, seed=1) > 0).astype(float)
    y[:3, 2:] = np.nan  # labels that are not known
    p = heads(weight_decay=1e-4)
    words = torch.from_numpy(draw(5, 2, 8, seed=2))
    train_classifier(draw(14, 16), y, draw(6, 16), y[3:9], words, p, 0)


def retrieve(cohort, folder):
    from asap.tasks.retrieve import train_retrieval

    number = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9])
    pair = draw(12, 16), draw(12, 8, seed=1)
    train_retrieval(*pair, number, *pair, number, heads(weight_decay=1e-4), 0)


def odd(cohort, folder):
    "A batch that processes cannot share: each trains on all of it"
    from asap.tasks.retrieve import train_retrieval

    pair, p = (draw(7, 16), draw(7, 8, seed=1)), heads(weight_decay=1e-4)
    train_retrieval(
        *pair, np.arange(7), *pair, np.arange(7), p.__class__(**vars(p) | dict(batch_size=7)), 0
    )


def segment(cohort, folder):
    from asap.tasks.segment import build_segmentation_model, train_segmentation

    def case(i):
        x = torch.from_numpy(draw(1, 20, 20, 12, seed=i))
        label = (x > 0.5).to(torch.uint8)
        return SimpleNamespace(case=f"c{i}", image=x, label=label, classes=[0, 1], num_classes=1)

    p = dict(encoder_lr_scale=0.1, warmup_fraction=0.1, weight_decay=0.01, max_grad_norm=1.0)
    p |= dict(num_validations=1, patience=9, oversample_foreground=0.5, overlap=0.0)
    p |= dict(translate_range=0.1, rotate_range=0.1, scale_range=0.1)
    row, size = dict(steps=STEPS, batch_size=BATCH, lr=0.003), (16, 16, 8)
    config = dict(encoder_config=None, img_size=size, class_names={1: "x"}, feature_size=8)
    torch.manual_seed(0)
    model = build_segmentation_model(config)
    train_segmentation(model, [*map(case, range(6))], [case(9)], p, row, size, False, 0)


def report(cohort, folder):
    from asap.tasks.report import train_report_decoder
    from asap.text.tokens import train_wordpiece_tokenizer

    texts = [" ".join(r) for r in reports(12)]
    tokenizer = train_wordpiece_tokenizer(texts, 200, folder / "words")
    size = dict(embed_dim=16, num_layers=1, num_heads=2, max_length=64, dropout=0.0)
    p = SimpleNamespace(steps=STEPS, epochs=50, batch_size=BATCH, lr=0.003, weight_decay=0.05)
    p.__dict__.update(size, abnormal_first=True, label_prompts=True, aux_label_weight=1.0)
    split = ["train"] * 9 + ["val"] * 3
    train_report_decoder(draw(12, 5, 8), texts, split, tokenizer, p, False, 0)


def vqa(cohort, folder):
    from test_vqa import QUESTIONS, TABLE, TOKENS, P

    from asap.tasks import vqa

    (lm, tokenizer), _ = language_model()
    changed = dict(steps=STEPS, batch_size=BATCH, lora_dropout=0.0, eval_every=10)
    p = P.model_copy(update=changed)
    torch.manual_seed(0)
    config = vqa.build_vqa_config(p, 8, False) | dict(language_model="toy")
    m = vqa.VQAModel(config, lm.requires_grad_(False))
    q = vqa.attach_cases(QUESTIONS, TABLE)
    vqa.train_vqa(m, tokenizer, q, TOKENS, p, 0)


TRAINERS = (pretrain, text, language, vocabulary, retrieve, odd, segment, report, vqa)


def main():
    cohort, folder = map(Path, sys.argv[1:3])
    logs, write = [], train._write_tables

    def keep(state, folder):
        logs.append(write(state, folder))
        return logs[-1]

    train._write_tables = keep
    train.fit.__kwdefaults__.update(log_every=1, precision_="no")
    for trainer in TRAINERS:
        if sys.argv[3:] and trainer.__name__ not in sys.argv[3:]:
            continue
        trainer(cohort, folder)
        if not process_rank():
            logs[-1].to_csv(folder / f"{trainer.__name__}.csv", index=False)


if __name__ == "__main__":
    main()
