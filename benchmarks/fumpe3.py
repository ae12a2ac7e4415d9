"""A U-Net that segments emboli in angiographies of generation 3: Dice on held-out patients.

The bar is a Dice of 0.45. Each patient is an angiography with emboli (as FUMPE's are), drawn at
2 x 2 x 2.5 mm in a box of 160 mm round the heart and the hila, in a window of -100 to 500 HU.
Patients are kept on disk, the state of the U-Net is written after each epoch: a run that was
stopped goes on. Writes benchmarks/fumpe3.json.

    python benchmarks/fumpe3.py --jobs 1
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

from asap.abnormalities import DomainShift
from asap.core import (
    atomic_write,
    code_hash,
    fingerprint,
    log_message,
    progress_bar,
    project_root,
    rng,
    write_json,
)
from asap.data.cohorts.fumpe import FUMPE
from asap.phantom.abnormalities3 import chest_view, sample_phase, synthesize_body_chest
from asap.phantom.patient import sample_patient

SIZE = (80, 80, 64)  # voxels
SPACING = (2.0, 2.0, 2.5)  # mm
CENTER = (0.0, 5.0, -35.0)  # canonical mm, between the hila
WINDOW = (-100, 500)  # HU
SICK = "pulmonary embolism"
CODE = [f"asap.phantom.{n}" for n in (
    "canvas patient skeleton thorax trees scanner whole_body lesions chest_findings abnormalities3"
).split()]  # fmt: skip


def draw(split: str, i: int) -> tuple:  # HU int16, mask uint8
    "One angiography with emboli"
    seed, shift = ("development", "fumpe", split, i), FUMPE.domain_shift
    p = sample_patient(seed, phase=sample_phase(seed, shift))
    view = replace(chest_view(seed, p), center=CENTER)
    how = dict(shift=DomainShift(noise=shift.noise, contrast=1.0), diseases=[SICK], view=view)
    c = synthesize_body_chest(seed, SIZE, SPACING, **how)
    clots = c.diseases.get(SICK)
    mask = np.zeros(SIZE, np.uint8) if clots is None else clots.mask.astype(np.uint8)
    return np.clip(c.hu, -1024, 3071).astype(np.int16), mask


def keep(path: Path, split: str, i: int) -> Path:
    if not path.exists():
        hu, mask = draw(split, i)
        with atomic_write(path) as tmp, open(tmp, "wb") as f:
            np.savez_compressed(f, hu=hu, mask=mask)
    return path


def cases(folder: Path, split: str, n: int, jobs: int = 1) -> tuple:  # (n,W,H,D) HU, masks
    todo = [folder / code_hash(*CODE) / split / f"{i}.npz" for i in range(n)]
    made = joblib.Parallel(jobs, return_as="generator")(
        joblib.delayed(keep)(path, split, i) for i, path in enumerate(todo)
    )
    parts = [dict(np.load(f)) for f in progress_bar(made, total=n, label=f"{split} angiographies")]
    return np.stack([p["hu"] for p in parts]), np.stack([p["mask"] for p in parts])


def window(hu: np.ndarray) -> torch.Tensor:  # (B,W,H,D) -> (B,1,W,H,D), -1 to 1
    lo, hi = WINDOW
    return ((torch.from_numpy(hu.astype(np.float32)) - lo) / (hi - lo)).clamp(0, 1)[:, None] * 2 - 1


def dice(a: np.ndarray, b: np.ndarray) -> float:  # NaN: both empty
    total = a.sum() + b.sum()
    return float(2 * (a & b).sum() / total) if total else float("nan")


def unet(width: int) -> UNet:
    widths = [width * k for k in (1, 2, 4, 8, 16)]
    return UNet(3, 1, 1, widths, (1, 2, 2, 2), num_res_units=1, norm="batch")


def crops(hu: np.ndarray, masks: np.ndarray, index, key: tuple, size=(48, 48, 48)) -> tuple:
    "Part of each patient, two of three centered on a clot"
    r, out = rng("fumpe crops", *key), []
    for i in index:
        found = np.argwhere(masks[i])
        shape = np.array(hu[i].shape)
        at = (
            found[r.integers(len(found))] if len(found) and r.random() < 0.67 else r.integers(shape)
        )
        low = np.clip(at - np.array(size) // 2 + r.integers(-8, 9, 3), 0, shape - size)
        out.append((i, *(slice(int(a), int(a) + n) for a, n in zip(low, size))))
    x = window(np.stack([hu[o] for o in out]))
    return x + 0.1 * float(r.normal()), torch.from_numpy(np.stack([masks[o] for o in out]))[:, None]


@torch.no_grad()
def predict(net: UNet, hu: np.ndarray) -> np.ndarray:  # bool (n,W,H,D)
    net.eval()
    return np.concatenate([(net(window(v[None]))[:, 0] > 0).numpy() for v in hu])


def mean_dice(net: UNet, hu: np.ndarray, masks: np.ndarray) -> list[float]:  # per patient
    return [dice(p, m > 0) for p, m in zip(predict(net, hu), masks)]


def fit(train: tuple, val: tuple, path: Path, epochs: int, lr: float, width: int) -> tuple:
    "The U-Net of the epoch that is best on val, and the log; goes on from `path`"
    torch.manual_seed(0)
    net = unet(width)
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.PolynomialLR(opt, epochs, 0.9)
    mark = fingerprint(n=len(train[0]), epochs=epochs, lr=lr, width=width)
    state: dict = dict(log=[], best=-1.0, kept=None, seconds=0.0, mark=mark)
    old = torch.load(path, weights_only=False) if path.exists() else {}
    if old.get("mark") == mark:
        for name, part in (("net", net), ("opt", opt), ("rate", rate)):
            part.load_state_dict(old.pop(name))
        state = old
    loss_of = DiceCELoss(sigmoid=True, weight=torch.tensor(5.0), batch=True)
    while len(state["log"]) < epochs:
        start, epoch = time.process_time(), len(state["log"])
        net.train()
        order = rng("fumpe order", epoch).permutation(len(train[0]))
        for k in range(0, len(order) - 1, 2):
            x, y = crops(*train, order[k : k + 2], (epoch, k))
            loss = loss_of(net(x), y.float())
            opt.zero_grad()
            loss.backward()
            opt.step()
        rate.step()
        score = float(np.nanmean(mean_dice(net, *val)))
        state["seconds"] += time.process_time() - start
        state["log"].append(round(score, 4))
        if score >= state["best"]:
            kept = {k: v.clone() for k, v in net.state_dict().items()}
            state |= dict(best=score, kept=kept)
        log_message(f"epoch {epoch + 1}: Dice on val {score:.3f}, {state['seconds'] / 60:.1f} min")
        parts = {n: p.state_dict() for n, p in (("net", net), ("opt", opt), ("rate", rate))}
        with atomic_write(path) as tmp:
            torch.save(parts | state, tmp)
    net.load_state_dict(state["kept"])
    return net, state


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, n in dict(train=60, val=10, test=25, epochs=40, jobs=1, width=12).items():
        p.add_argument(f"--{name}", type=int, default=n)
    p.add_argument("--lr", type=float, default=0.003)
    p.add_argument("--cache", type=Path, default=project_root() / "build/ceiling/fumpe3")
    p.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    a = p.parse_args()
    train, val, test = (
        cases(a.cache, s, n, a.jobs)
        for s, n in (("train", a.train), ("val", a.val), ("test", a.test))
    )
    net, state = fit(train, val, a.cache / "unet.pt", a.epochs, a.lr, a.width)
    each = mean_dice(net, *test)
    found = dict(
        dice=round(float(np.nanmean(each)), 4),
        each=[None if np.isnan(d) else round(d, 4) for d in each],
        clot_ml=[round(float(m.sum() * np.prod(SPACING) / 1000), 2) for m in test[1]],
        cpu_seconds=round(state["seconds"]),
        val=state["log"],
        **{n: getattr(a, n) for n in ("train", "epochs", "lr", "width")},
    )
    write_json(found, a.out)
    log_message(f"Dice {found['dice']:.3f} of {len(each)} held-out patients; the bar is 0.45")


if __name__ == "__main__":
    main()
