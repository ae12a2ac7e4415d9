"""Upper bound of classification on the phantoms, on development seeds: a supervised CNN with all
labels, a histogram baseline, and twins.

This is the reference for every probe of the study on this data and compute. Writes
benchmarks/ceiling.csv (one row per label) and benchmarks/ceiling.json (settings). Run it with
`make ceiling`.
"""

import argparse
import os
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from monai.networks.blocks import Convolution, ResidualUnit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from asap.abnormalities import ABNORMALITIES
from asap.core import code_hash, log_message, progress_bar, project_root, rng, write_csv, write_json
from asap.phantom.abnormalities import synthesize_chest, twin_auc
from asap.phantom.body import VERSION


def draw(split, i):  # other patients than the study's: the key says so
    c = synthesize_chest(("development", split, i))
    return np.clip(c.hu, -1000, 1000), np.array([c.has(n) for n in ABNORMALITIES], np.float32)


def cases(split, n, jobs):
    "Volumes (n,96,96,48) int16 and labels (n,18), kept in build/ceiling"
    code = code_hash("asap.phantom.body", "asap.phantom.abnormalities")
    kept = project_root() / f"build/ceiling/{split}-{n}-{code}.npz"
    if not kept.exists():
        done = joblib.Parallel(jobs, return_as="generator")(
            joblib.delayed(draw)(split, i) for i in range(n)
        )
        x, y = zip(*progress_bar(done, total=n, label=f"{split} phantoms"))
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, x=np.stack(x), y=np.stack(y))
    z = np.load(kept)
    return z["x"], z["y"]


def histogram(x):  # 64 bins of HU over the volume, as shares
    edges = np.linspace(-1000, 1000, 65)
    return np.stack([np.histogram(v, edges)[0] / v.size for v in x])


def histogram_auc(train, val, test):
    "Per label: logistic regression on the histogram, its C chosen on val"
    (xt, yt), (xv, yv), (xs, ys) = [(histogram(x), y) for x, y in (train, val, test)]
    out = []
    for k in range(yt.shape[1]):
        fits = [
            make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(
                xt, yt[:, k]
            )
            for c in (0.01, 0.1, 1, 10)
        ]
        best = max(fits, key=lambda m: roc_auc_score(yv[:, k], m.decision_function(xv)))
        out.append(roc_auc_score(ys[:, k], best.decision_function(xs)))
    return out


NUM_LABELS = len(ABNORMALITIES)


class Ceiling(torch.nn.Module):
    "MONAI residual units; the head sees mean and maximum of the last map"

    def __init__(self, widths, labels=NUM_LABELS):
        super().__init__()
        w = widths
        self.stem = Convolution(3, 1, w[0], strides=2, kernel_size=3, norm="batch", act="relu")
        self.body = torch.nn.Sequential(
            *[
                ResidualUnit(
                    3, a, b, strides=s, kernel_size=3, subunits=2, norm="batch", act="relu"
                )
                for a, b, s in zip(w[:-1], w[1:], [2] * len(w))
            ]
        )
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(2 * w[-1], labels))

    def forward(self, x):
        f = self.body(self.stem(x)).flatten(2)
        return self.head(torch.cat([f.mean(-1), f.amax(-1)], 1))


def batch(
    x, index, seed=None
):  # (B,1,96,96,48), channels last, in [-1,1]; shifted by a few voxels when a seed is given
    v = torch.from_numpy(x[index].astype(np.float32) / 1000)[:, None]
    if seed is None:
        return v.to(memory_format=torch.channels_last_3d)
    r = rng("ceiling", *seed)
    v = torch.stack(
        [torch.roll(a, [int(k) for k in r.integers(-3, 4, 3)], (1, 2, 3)) for a in v]
    ) + 0.02 * float(r.normal())
    return v.to(memory_format=torch.channels_last_3d)


@torch.no_grad()
def predict(net, x):
    net.eval()
    return (
        torch.cat([net(batch(x, slice(i, i + 16))) for i in range(0, len(x), 16)]).sigmoid().numpy()
    )


def macro(y, s):
    return np.mean([roc_auc_score(y[:, k], s[:, k]) for k in range(y.shape[1])])


def cnn(train, val, test, epochs, widths, lr, size=8, minutes=20.0):
    "Per label AUC on test of the epoch that is best on val"
    (xt, yt), (xv, yv), (xs, ys) = train, val, test
    torch.manual_seed(0)
    net = Ceiling(widths).to(memory_format=torch.channels_last_3d)
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    steps = epochs * (len(xt) // size)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, lr, steps, pct_start=0.15)
    weight = torch.from_numpy((1 - yt.mean(0)) / yt.mean(0)).sqrt()
    best, kept, start, log = 0, None, time.monotonic(), []
    bar = progress_bar(total=steps, label="CNN")
    for epoch in range(epochs):
        net.train()
        order = rng("ceiling order", epoch).permutation(len(xt))
        for i in range(0, len(order) - size + 1, size):
            index = np.sort(order[i : i + size])
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(batch(xt, index, (epoch, i))).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, torch.from_numpy(yt[index]), pos_weight=weight
            )
            opt.zero_grad()
            loss.backward()
            opt.step()
            rate.step()
            bar.update()
        score = macro(yv, predict(net, xv))
        log.append(score)
        log_message(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, macro AUC on val {score:.3f}, "
            f"{(time.monotonic() - start) / 60:.1f} min"
        )
        if score > best:
            best, kept = score, {k: v.clone() for k, v in net.state_dict().items()}
        if time.monotonic() - start > 60 * minutes:
            break
    net.load_state_dict(kept)
    seconds = time.monotonic() - start
    s = predict(net, xs)
    return [roc_auc_score(ys[:, k], s[:, k]) for k in range(ys.shape[1])], dict(
        seconds=round(seconds), epochs=len(log), val=[round(v, 4) for v in log]
    )


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--train", type=int, default=1000)
    a.add_argument("--val", type=int, default=150)
    a.add_argument("--test", type=int, default=300)
    a.add_argument("--epochs", type=int, default=26)
    a.add_argument("--lr", type=float, default=0.002)
    a.add_argument("--jobs", type=int, default=os.cpu_count())
    a.add_argument("--widths", type=int, nargs=4, default=[16, 32, 64, 128])
    a.add_argument("--twins", type=int, default=30)
    a.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = a.parse_args()
    os.environ["ASAP_PROGRESS"] = "1"
    sets = [cases(s, n, a.jobs) for s, n in (("train", a.train), ("val", a.val), ("test", a.test))]
    table = pd.DataFrame(
        dict(label=ABNORMALITIES, prevalence=sets[2][1].mean(0), histogram_auc=histogram_auc(*sets))
    )
    if a.twins:
        jobs = joblib.Parallel(a.jobs, return_as="generator")(
            joblib.delayed(twin_auc)(n, [("development", "twin", i) for i in range(a.twins)])
            for n in ABNORMALITIES
        )
        table["twin_auc"] = list(progress_bar(jobs, total=len(ABNORMALITIES), label="twins"))
    log_message(table.round(3).to_string())
    if a.epochs:
        table["cnn_auc"], how = cnn(*sets, a.epochs, a.widths, a.lr)
        log_message(table.round(3).to_string())
        log_message(f"CNN: macro {table.cnn_auc.mean():.3f}, lowest {table.cnn_auc.min():.3f}")
        write_csv(table.round(4), a.out / "ceiling.csv")
        write_json(
            dict(
                how,
                phantom=VERSION,
                seeds="development",
                train=a.train,
                val=a.val,
                test=a.test,
                widths=a.widths,
                lr=a.lr,
                twins=a.twins,
                threads=torch.get_num_threads(),
                macro=round(float(table.cnn_auc.mean()), 4),
            ),
            a.out / "ceiling.json",
        )


if __name__ == "__main__":
    main()
