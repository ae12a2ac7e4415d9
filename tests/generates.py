"""Answers and reports of untrained models, for tests/test_generation.py.
usage: [torchrun ...] generates.py FOLDER LEFT, which is killed after LEFT batches"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from asap.core import process_rank, read_json
from asap.tasks import report, vqa
from asap.tasks.vqa import VQAConfig
from asap.text import language
from asap.text.encoder import load
from asap.train import get_device

TOKENS = np.random.default_rng(0).normal(size=(12, 9, 8)).astype(np.float16)
QUESTIONS = pd.DataFrame(
    [
        dict(case=f"c{i}", kind=kind, question=question, answer="no", row=i)
        for i in range(len(TOKENS))
        for kind, question in (("presence", "Is there emphysema?"), ("size", "How large is it?"))
    ]
)


def stop_after(left: int, function):
    "The function, which ends the process instead of the call after LEFT"
    calls = []

    def called(*args, **kw):
        if len(calls) == left:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(1)
        return function(*args, **kw)

    return called


def answers(p, folder: Path, left: int) -> list[str]:
    lm, tokenizer = language.load(folder / "language")
    torch.manual_seed(0)
    m = vqa.VQAModel(vqa.build_vqa_config(p, TOKENS.shape[2], False), lm)
    m.resampler.output_scale *= 30  # so that an untrained model answers by the image
    language.generate_from_prompts = stop_after(left, language.generate_from_prompts)
    kept = dict(folder=folder / "answers", fp=dict(of="it"))
    return vqa.generate_answers(m, tokenizer, QUESTIONS, TOKENS, p, many=4, **kept)


def reports(p, tokenizer, folder: Path, left: int) -> list[str]:
    torch.manual_seed(0)
    x = report.pool_tokens(TOKENS, (2, 2, 2), (1, 1, 1))
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
    sizes = dict(num_tokens=x.shape[1], token_dim=x.shape[2], embed_dim=p.projector_dim)
    words = dict(vocab_size=len(tokenizer), special_token_ids=special, max_length=16)
    blocks = dict(num_layers=1, num_heads=2, dropout=0.0, text_only=False, label_prompts=False)
    m = report.ReportDecoder(dict(**sizes, **words, **blocks)).to(get_device()).eval()
    m.generate = stop_after(left, m.generate)
    beams = SimpleNamespace(num_beams=2, no_repeat_ngram_size=0)
    return report.generate_reports(m, x, tokenizer, beams, 2, folder / "reports", dict(of="it"))


if __name__ == "__main__":
    here, left = Path(sys.argv[1]), int(sys.argv[2])
    p = VQAConfig(**read_json(here / "vqa.json"))
    found = answers(p, here, left) + reports(p, load("weights/text").tokenizer, here, left)
    (here / f"found{process_rank()}.json").write_text(json.dumps(found))
