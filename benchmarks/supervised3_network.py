"""A supervised network with every label of generation 3, and with the masks of the findings.

Three windows of HU go in. A small pyramid of MONAI's blocks draws a map of each finding at half the
resolution; the head reads the maps and the pooled features and answers every label. Without the
masks, a few hundred scans do not teach it a nodule of 10 mm. The state is written after each epoch,
so a training that was stopped goes on.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution, ResidualUnit
from sklearn.metrics import roc_auc_score
from supervised3_patients import CODE, LABELS, MAPS
from torch import nn

from asap.core import (
    atomic_write,
    code_hash,
    file_hash,
    fingerprint,
    log_message,
    progress_bar,
    rng,
)

WINDOWS = ((-1050, -250), (-150, 350), (-1000, 1500))  # HU: lung, mediastinum, all
SHIFT = (4, 4, 2)  # voxels
MAP_FACTOR = 4.0  # of the loss of the maps, a mean over all findings, against that of the labels


class Finder(nn.Module):
    "Maps of the findings at half the resolution, and labels"

    def __init__(self, widths: tuple = (16, 32, 64)):
        super().__init__()
        a, b, c = widths
        both = dict(norm="batch", act="relu")
        self.stem = Convolution(3, len(WINDOWS), a, kernel_size=(5, 5, 3), strides=2, **both)
        self.top = Convolution(3, a, a, **both)
        self.middle = ResidualUnit(3, a, b, strides=2, subunits=2, **both)
        self.deep = ResidualUnit(3, b, c, strides=2, subunits=2, **both)
        self.up = nn.ModuleList([nn.Conv3d(c, b, 1), nn.Conv3d(b, a, 1)])
        self.join = nn.ModuleList([Convolution(3, b, b, **both), Convolution(3, a, a, **both)])
        self.maps = nn.Conv3d(a, len(MAPS), 1)
        nn.init.constant_(self.maps.bias, -4.0)
        n = 3 * len(MAPS) + 2 * c
        self.head = nn.Sequential(
            nn.LayerNorm(n),
            nn.Dropout(0.2),
            nn.Linear(n, 96),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(96, len(LABELS)),
        )

    def forward(self, x: torch.Tensor) -> tuple:  # (B,3,W,H,D) -> labels (B,n), maps (B,m,...)
        fine = self.top(self.stem(x))
        half = self.middle(fine)
        deep = self.deep(half)
        half = self.join[0](half + F.interpolate(self.up[0](deep), half.shape[2:]))
        fine = self.join[1](fine + F.interpolate(self.up[1](half), fine.shape[2:]))
        maps = self.maps(fine)
        flat, far = maps.flatten(2), deep.flatten(2)
        parts = [
            flat.amax(-1),
            flat.topk(24, -1)[0].mean(-1),
            flat.sigmoid().mean(-1).add(1e-5).log(),
        ]
        return self.head(torch.cat([*parts, far.mean(-1), far.amax(-1)], 1)), maps


def windows(hu: np.ndarray, key: tuple | None = None) -> torch.Tensor:  # (B,W,H,D) -> (B,3,W,H,D)
    "Windows of HU in [-1,1]; other contrast and brightness with a key"
    x = torch.from_numpy(hu.astype(np.float32))[:, None]
    if key is not None:
        r = rng("ceiling 3 brightness", *key)
        x = x * float(r.uniform(0.95, 1.05)) + float(r.normal(0, 12))
    out = torch.cat([((x - lo) / (hi - lo)).clamp(0, 1) * 2 - 1 for lo, hi in WINDOWS], 1)
    return out.contiguous(memory_format=torch.channels_last_3d)


def bits(maps: np.ndarray) -> torch.Tensor:  # uint32 (B,...) -> float32 (B,m,...)
    one = (maps[:, None] >> np.arange(len(MAPS), dtype=np.uint32).reshape(1, -1, 1, 1, 1)) & 1
    return torch.from_numpy(one.astype(np.float32))


def batch(d: dict, index: np.ndarray, key: tuple) -> tuple:  # image, maps, labels
    "Patients, each shifted by an even number of voxels, so that the maps follow"
    r = rng("ceiling 3 shift", *key)
    moves = [[int(r.integers(-s // 2, s // 2 + 1)) for s in SHIFT] for _ in index]
    hu = [np.roll(d["hu"][i], [2 * k for k in m], (0, 1, 2)) for i, m in zip(index, moves)]
    maps = [np.roll(d["maps"][i], m, (0, 1, 2)) for i, m in zip(index, moves)]
    return windows(np.stack(hu), key), bits(np.stack(maps)), torch.from_numpy(d["y"][index])


def label_loss(logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    "Binary cross entropy of the known labels"
    known = ~y.isnan()
    each = F.binary_cross_entropy_with_logits(
        logits, y.nan_to_num(), pos_weight=weight, reduction="none"
    )
    return (each * known).sum() / known.sum()


def map_loss(logits: torch.Tensor, maps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, maps, pos_weight=weight.view(-1, 1, 1, 1))


@torch.no_grad()
def predict(net: nn.Module, d: dict) -> np.ndarray:  # (n, labels), probabilities
    net.eval()
    parts = [net(windows(d["hu"][i : i + 8]))[0] for i in range(0, len(d["hu"]), 8)]
    return torch.cat(parts).sigmoid().numpy()


def aucs(y: np.ndarray, s: np.ndarray, fewest: int = 3) -> np.ndarray:  # (labels,), NaN: too few
    "AUC of each label among the patients where it is known"
    out = []
    for own, score in zip(y.T, s.T):
        ok = ~np.isnan(own)
        rare = min((own[ok] == 1).sum(), (own[ok] == 0).sum()) < fewest
        out.append(np.nan if rare else roc_auc_score(own[ok], score[ok]))
    return np.array(out)


def positive_weights(d: dict) -> tuple:  # of labels, of maps
    share = np.clip(np.nanmean(d["y"], 0), 0.02, 0.98)
    filled = np.array([((d["maps"] >> np.uint32(k)) & 1).mean() for k in range(len(MAPS))])
    maps = np.clip(np.sqrt((1 - filled) / np.maximum(filled, 1e-6)), 1, 30)
    return (torch.tensor(v, dtype=torch.float32) for v in (np.sqrt((1 - share) / share), maps))


class Training:
    "A training that can be stopped after any epoch and goes on"

    def __init__(self, train: dict, val: dict, path: Path, **settings: object):
        self.train, self.val, self.path, self.settings = train, val, path, settings
        torch.manual_seed(0)
        self.net = Finder(settings["widths"]).to(memory_format=torch.channels_last_3d)
        self.opt = torch.optim.AdamW(self.net.parameters(), settings["lr"], weight_decay=0.01)
        self.per_epoch = len(train["hu"]) // settings["size"]
        steps = settings["epochs"] * self.per_epoch
        self.rate = torch.optim.lr_scheduler.OneCycleLR(
            self.opt, settings["lr"], steps, pct_start=0.2
        )
        self.weights = tuple(positive_weights(train))
        self.log: list = []
        self.kept, self.best, self.seconds = None, 0.0, 0.0
        code = (code_hash(*CODE), file_hash(__file__))
        self.mark = fingerprint(n=len(train["hu"]), val=len(val["hu"]), code=code, **settings)
        if path.exists():
            self.resume()

    def resume(self) -> None:
        "Take up the state of an equal training"
        old = torch.load(self.path, weights_only=False)
        if old["mark"] != self.mark:
            log_message(f"{self.path} is of other settings: training begins anew")
            return
        for name in ("net", "opt", "rate"):
            getattr(self, name).load_state_dict(old[name])
        self.log, self.kept, self.best = old["log"], old["kept"], old["best"]
        self.seconds = old["seconds"]
        torch.set_rng_state(old["random"])

    def save(self) -> None:
        parts = {n: getattr(self, n).state_dict() for n in ("net", "opt", "rate")}
        plain = {n: getattr(self, n) for n in ("log", "kept", "best", "seconds", "mark")}
        with atomic_write(self.path) as tmp:
            torch.save(dict(parts, **plain, random=torch.get_rng_state()), tmp)

    def epoch(self, number: int) -> float:  # mean loss
        self.net.train()
        order = rng("ceiling 3 order", number).permutation(len(self.train["hu"]))
        size, total = self.settings["size"], 0.0
        for k in progress_bar(range(self.per_epoch), label=f"epoch {number + 1}"):
            index = order[k * size : (k + 1) * size]
            x, maps, y = batch(self.train, index, (number, k))
            labels, drawn = self.net(x)
            loss = label_loss(labels, y, self.weights[0])
            loss = loss + MAP_FACTOR * map_loss(drawn, maps, self.weights[1])
            self.opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 5.0)
            self.opt.step()
            self.rate.step()
            total += loss.item()
        return total / self.per_epoch

    def run(self) -> nn.Module:
        "The network of the epoch that is best on val"
        while len(self.log) < self.settings["epochs"]:
            start = time.process_time()
            loss = self.epoch(len(self.log))
            found = aucs(self.val["y"], predict(self.net, self.val))
            score = float(np.nanmean(found))
            self.seconds += time.process_time() - start
            self.log.append(round(score, 4))
            if score > self.best:
                self.best = score
                self.kept = {k: v.clone() for k, v in self.net.state_dict().items()}
            self.save()
            low = LABELS[int(np.nanargmin(found))]
            log_message(
                f"epoch {len(self.log)}: loss {loss:.3f}, macro AUC on val {score:.3f}, lowest "
                f"{low} {np.nanmin(found):.3f}, {self.seconds / 60:.1f} CPU-minutes"
            )
        self.net.load_state_dict(self.kept)
        return self.net
