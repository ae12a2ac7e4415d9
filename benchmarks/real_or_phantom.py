"""Can a small CNN tell patches of phantoms from patches of real scans? For generation 2 and 3.

An AUC of 0.5 would mean that a patch does not show where it comes from, 1 that it always does. The
real scans are few: each is left out once, the CNN is trained on the others and on phantoms, and
scored on the patches of the scan that was left out against phantoms that were left out with it.
Every scan is a row; n is stated. Nothing may be chosen by this figure: no painter, no weights, no
setting. It looks at real scans, so a run belongs in the list of looks.

Real scans are folders with `image.nii`, such as stage `real` writes them to build/real (3.5 x 3.5
x 7 mm, RAS, HU clipped to -1000 and 1000). Phantoms are drawn on the same grid and clipped alike.
As a control, other phantoms of generation 3 take the place of the real scans (0.5 is right there).

    python benchmarks/real_or_phantom.py --out benchmarks/real_or_phantom.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from sklearn.metrics import roc_auc_score
from torch import nn

from asap.core import log_message, project_root, rng, write_json
from asap.data.volumes import read
from asap.phantom.abnormalities import synthesize_chest
from asap.phantom.abnormalities3 import synthesize_body_chest

CHESTS = ("totalsegmentator_chest", "pyradiomics_lung1", "pyradiomics_lung2")
PATCH = (24, 24, 12)  # voxels, 84 mm each way
DRAW = {2: synthesize_chest, 3: synthesize_body_chest}


def real_volumes(folder: Path, names: Sequence[str]) -> dict:  # name -> HU
    "Volumes of the scans, one a patient"
    lost = [n for n in names if not (folder / n / "image.nii").is_file()]
    if lost:
        raise FileNotFoundError(
            f"{folder / lost[0] / 'image.nii'} is missing: expected a scan of stage `real`; run "
            "`python -m asap.cli stage real`"
        )
    return {n: read(folder / n / "image.nii").hu for n in names}


def phantom_volumes(generation: int, n: int, key: str) -> dict:  # name -> HU
    draw = DRAW[generation]
    return {f"{key} {i}": draw(("development", key, i)).hu for i in range(n)}


def patches(hu: np.ndarray, n: int, key: object) -> np.ndarray:  # (n, *PATCH), -1 to 1
    "Random patches, none of air alone"
    if any(a < b for a, b in zip(hu.shape, PATCH)):
        raise ValueError(f"{key}: {hu.shape} voxels, expected {PATCH} or more")
    r, out = rng("real or phantom", key), []
    v = np.clip(hu.astype(np.float32), -1000, 1000) / 1000
    for _ in range(100 * n):
        at = [int(r.integers(a - b + 1)) for a, b in zip(v.shape, PATCH)]
        one = v[tuple(slice(a, a + b) for a, b in zip(at, PATCH))]
        if (one > -0.6).mean() > 0.15:
            out.append(one)
        if len(out) == n:
            return np.stack(out)
    raise ValueError(f"{key}: {len(out)} of {n} patches hold tissue: is this a body in HU?")


def folds(names: Sequence[str], count: int) -> list:  # a set of names per fold
    "Whole scans dealt to folds"
    order = rng("real or phantom folds").permutation(len(names))
    return [{names[i] for i in order[k::count]} for k in range(count)]


def small_cnn() -> nn.Module:
    def block(a, b):
        return Convolution(3, a, b, strides=2, kernel_size=3, norm="batch", act="relu")

    return nn.Sequential(
        block(1, 16), block(16, 32), block(32, 64), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(64, 1),
    )  # fmt: skip


def train(x: np.ndarray, y: np.ndarray, steps: int) -> nn.Module:
    "A CNN on patches (n,...) and 1 for real; as many of both in each batch"
    torch.manual_seed(0)
    net = small_cnn()
    opt = torch.optim.AdamW(net.parameters(), 0.002, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 0.002, steps)
    r = rng("real or phantom batches")
    sides = [np.flatnonzero(y == k) for k in (0, 1)]
    net.train()
    for _ in range(steps):
        index = np.concatenate([r.choice(side, 16) for side in sides])
        v = torch.from_numpy(x[index])[:, None] + 0.005 * torch.randn(len(index), 1, *PATCH)
        loss = F.binary_cross_entropy_with_logits(
            net(v)[:, 0], torch.from_numpy(y[index].astype(np.float32))
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
    return net.eval()


@torch.no_grad()
def score(net: nn.Module, x: np.ndarray) -> np.ndarray:  # (n,)
    parts = [net(torch.from_numpy(x[i : i + 64])[:, None])[:, 0] for i in range(0, len(x), 64)]
    return torch.cat(parts).numpy()


def compare(real: dict, phantoms: dict, n: int, steps: int) -> list[dict]:
    "A row per real scan: AUC on its patches against those of left-out phantoms"
    cut = {name: patches(hu, n, name) for name, hu in [*real.items(), *phantoms.items()]}
    rows = []
    for name, out in zip(real, folds(list(phantoms), len(real))):
        held = {name, *out}
        kept = [k for k in cut if k not in held]
        x = np.concatenate([cut[k] for k in kept])
        y = np.repeat([k in real for k in kept], n).astype(int)
        net = train(x, y, steps)
        a, b = score(net, cut[name]), score(net, np.concatenate([cut[k] for k in sorted(out)]))
        auc = roc_auc_score(np.repeat([1, 0], [len(a), len(b)]), np.r_[a, b])
        rows.append(dict(scan=name, auc=round(float(auc), 3), patches=[len(a), len(b)]))
        log_message(f"{name}: AUC {auc:.3f} on {len(a)} and {len(b)} patches")
    return rows


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--real", type=Path, default=project_root() / "build/real")
    p.add_argument("--scans", nargs="+", default=CHESTS, help="folders, one a patient")
    p.add_argument("--phantoms", type=int, default=24)
    p.add_argument("--patches", type=int, default=80, help="of each scan")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    a = p.parse_args()
    if len(a.scans) < 2:
        p.error(f"--scans names {len(a.scans)} scan, expected 2 or more: one is left out")
    real = real_volumes(a.real, a.scans)
    found: dict = dict(scans=len(real), phantoms=a.phantoms, patches_of_each=a.patches)
    for generation in DRAW:
        drawn = phantom_volumes(generation, a.phantoms, f"patches {generation}")
        found[f"generation {generation}"] = compare(real, drawn, a.patches, a.steps)
    other = phantom_volumes(3, len(real), "patches control")
    found["control"] = compare(other, drawn, a.patches, a.steps)
    write_json(found, a.out)


if __name__ == "__main__":
    main()
