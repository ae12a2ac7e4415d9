"""Cost of one training step of `asap` at the paper's size: floating-point operations as PyTorch
counts them, seconds on this machine, and the fraction of the machine's matrix-product throughput.
The page nbs/96_cost.ipynb uses the result.

usage: python benchmarks/cost.py [--repeat 3] [--threads 1] [--save]   (writes benchmarks/cost.json)
"""

import argparse
import json
from pathlib import Path

import step
import torch
from torch.utils.flop_counter import FlopCounterMode

from asap.core import project_root
from asap.params import load_params
from asap.train import retain_freed_memory


def counted(model, b) -> dict:  # GFLOP of one volume, forward and whole; attention and products
    with FlopCounterMode(display=False, depth=1) as f, torch.autocast("cpu", torch.bfloat16):
        value = model(b)
        forward = f.get_total_flops()
        value.backward()
    return dict(forward=round(forward / 1e9, 1), whole=round(f.get_total_flops() / 1e9, 1))


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--repeat", type=int, default=3)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--save", action="store_true")
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    retain_freed_memory()
    p = load_params(project_root() / "params/paper.yaml")
    model, run = step.ours(p, vocab=p.text.vocab_size)
    gflop = counted(model, step.batch(p, 1, p.text.vocab_size))
    model.zero_grad()
    run("bf16")
    seconds = min(step.clock(lambda: run("bf16")) for _ in range(a.repeat))
    products = step.products(a.threads)
    out = dict(
        gflop=gflop,
        seconds_bf16=round(seconds, 2),
        threads=a.threads,
        products_gflops=products,
        reached=round(gflop["whole"] / seconds / products["bf16"], 3),
        parameters={
            k: sum(q.numel() for q in m.parameters())
            for k, m in (("asap", model.model), ("encoder", model.model.vit), ("text", model.text))
        },
    )
    print(json.dumps(out, indent=1, sort_keys=True))
    if a.save:
        Path(__file__).with_suffix(".json").write_text(
            json.dumps(out, indent=1, sort_keys=True) + "\n"
        )


if __name__ == "__main__":
    main()
