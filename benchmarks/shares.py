"""Organ fractions per patch: time and peak memory, compared with the one-hot of every voxel, in one
run on one machine.

The plain versions average an int64 one-hot over each patch, in NumPy and in PyTorch; the faster one
counts. Our own steps in PyTorch are timed, too. Variants alternate, the fastest repetition counts,
one thread. Memory is what NumPy allocates beyond its input. Prints a table; writes
benchmarks/shares.json with --save.

usage: python benchmarks/shares.py [--repeat 7] [--save]
"""

import argparse
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from asap.anatomy.masks import organ_fractions
from asap.anatomy.organs import map_to_groups
from asap.core import write_json
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest

AXES = "(h p) (w q) (d r) c -> (h w d) (p q r) c"
SIZES = dict(built_in=((96, 96, 48), (12, 12, 6)), paper=((224, 224, 112), (16, 16, 8)))


def onehot(organs, patch, n):
    p, q, r = patch
    return rearrange(np.eye(n + 1, dtype=np.int64)[organs], AXES, p=p, q=q, r=r).mean(1)


def onehot_torch(organs, patch, n):
    p, q, r = patch
    hot = torch.nn.functional.one_hot(torch.from_numpy(organs).long(), n + 1)
    return rearrange(hot, AXES, p=p, q=q, r=r).float().mean(1).numpy()


def ours(organs, patch, n):
    return organ_fractions(organs, patch, n)[0]


def ours_torch(organs, patch, n):
    (p, q, r), m = patch, torch.from_numpy(organs)
    rows = [
        [(slab == c).view(torch.uint8).sum(0, dtype=torch.uint8) for c in range(n + 1)]
        for slab in m.split(p)
    ]
    rows = rearrange(
        torch.stack([torch.stack(x) for x in rows]), "h c (w q) d -> h c w q d", q=q
    ).sum(3, dtype=torch.int16)
    count = rearrange(rows, "h c w (d r) -> r (h w d) c", r=r).sum(0)
    return (count / count.sum(1, keepdim=True)).numpy()


def megabytes(f, *args):  # at the peak
    tracemalloc.start()
    f(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return round(peak / 1e6, 1)


def measure(organs, patch, n, repeat):
    ways = (onehot, onehot_torch, ours, ours_torch)
    took = {f.__name__: [] for f in ways}
    want = organ_fractions(organs, patch, n)[0]
    for _ in range(repeat):
        for f in ways:
            start = time.perf_counter()
            got = f(organs, patch, n)
            took[f.__name__].append(time.perf_counter() - start)
            assert np.abs(got - want).max() < 1e-6, f.__name__
    ms = {k: round(1e3 * min(v), 2) for k, v in took.items()}
    mb = {f.__name__: megabytes(f, organs, patch, n) for f in (onehot, ours)}
    return dict(
        ms=ms,
        mb=mb,
        times_faster=round(min(ms["onehot"], ms["onehot_torch"]) / ms["ours"], 1),
        numpy_over_torch=round(ms["ours_torch"] / ms["ours"], 1),
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--repeat", type=int, default=7)
    p.add_argument("--save", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(1)
    groups = load_params().anatomy.groups
    small, out = map_to_groups(synthesize_chest(("shares", 0)).labels, groups), {}
    for name, (size, patch) in SIZES.items():
        organs = small[np.ix_(*[np.arange(m) * k // m for m, k in zip(size, small.shape)])]
        out[name] = dict(size=size, patch=patch, **measure(organs, patch, len(groups), a.repeat))
    print(json.dumps(out, indent=1))
    if a.save:
        write_json(out, Path(__file__).with_name("shares.json"))


if __name__ == "__main__":
    main()
