"""References of classification on the phantoms, on development seeds: a supervised CNN with all
labels, a histogram baseline, twins and, for generation 3, an oracle that knows the masks.

This is the reference for every probe of the study on this data and compute. Writes
benchmarks/supervised.csv (one row per label) and benchmarks/supervised.json (settings). Run it
with `make supervised`. With --generation 3, the labels are the 18 abnormalities and every label of
a task that is none of them, the files are supervised3.csv and supervised3.json, and a run that was
stopped goes on: patients, twins and the state after each epoch lie in --cache.

    python benchmarks/supervised.py --generation 3 --jobs 1
    python benchmarks/supervised.py --generation 3 --epochs 0    # without the CNN
"""

import argparse
import os
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import supervised3_network
import supervised3_oracle
import supervised3_patients
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
    "Per label: logistic regression on the histogram, its C chosen on val; NaN: too few of a class"
    sets = [(histogram(x), y) for x, y in (train, val, test)]
    out = []
    for k in range(train[1].shape[1]):
        own = [(x[known], y[known, k]) for x, y in sets for known in [~np.isnan(y[:, k])]]
        if any(len(np.unique(y)) < 2 for _, y in own):
            out.append(np.nan)
            continue
        (xt, yt), (xv, yv), (xs, ys) = own
        fits = [
            make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(xt, yt)
            for c in (0.01, 0.1, 1, 10)
        ]
        scores = [roc_auc_score(yv, m.decision_function(xv)) for m in fits]
        best = fits[int(np.argmax(scores))]
        out.append(roc_auc_score(ys, best.decision_function(xs)))
    return out


NUM_LABELS = len(ABNORMALITIES)


class SupervisedCNN(torch.nn.Module):
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
    net = SupervisedCNN(widths).to(memory_format=torch.channels_last_3d)
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


SPLITS = ("train", "val", "test")
KEPT = (*SPLITS, "twins", "epochs", "lr", "widths")
DEFAULTS = {  # by generation
    2: dict(train=1000, val=150, test=300, epochs=26, lr=0.002, widths=[16, 32, 64, 128]),
    3: dict(train=500, val=100, test=200, epochs=14, lr=0.003, widths=[16, 32, 64]),
}


def bounds(sets, cache, twins):
    "Every label of generation 3: how often it is known, histogram, twins, oracle"
    labels, test = supervised3_patients.LABELS, sets["test"]
    table = pd.DataFrame(dict(label=labels))
    table["source"] = table.label.map(supervised3_patients.OWN).fillna("CT-RATE")
    table["known"] = (~np.isnan(test["y"])).sum(0)
    table["positive"] = np.nansum(test["y"], 0).astype(int)
    plain = [(np.clip(sets[s]["hu"], -1000, 1000), sets[s]["y"]) for s in SPLITS]
    table["histogram_auc"] = histogram_auc(*plain)
    if twins:
        found = supervised3_oracle.twins(cache, "test", test["y"], twins)
        pairs = supervised3_oracle.plain_twins(cache, twins)
        aucs = {n: supervised3_oracle.twin_auc(p) for n, p in pairs.items()}
        table["twin_auc"] = table.label.map(aucs)
        table["oracle_auc"] = [
            supervised3_oracle.oracle_auc(n, test["y"], test["q"], found) for n in labels
        ]
    return table


def generation_3(a):
    "References, then the CNN; writes supervised3.csv and supervised3.json"
    sizes = dict(test=a.test, val=a.val, train=a.train)
    sets = {s: supervised3_patients.cases(a.cache, s, n, a.jobs) for s, n in sizes.items()}
    table = bounds(sets, a.cache, a.twins)
    log_message(table.drop(columns="source").round(3).to_string())
    how = dict(phantom="3", seeds="development", **{n: getattr(a, n) for n in KEPT})
    if a.epochs:
        settings = dict(epochs=a.epochs, lr=a.lr, size=4, widths=tuple(a.widths))
        training = supervised3_network.Training(
            sets["train"], sets["val"], a.cache / "cnn.pt", **settings
        )
        scores = supervised3_network.predict(training.run(), sets["test"])
        table["cnn_auc"] = supervised3_network.aucs(
            sets["test"]["y"], scores, supervised3_oracle.FEWEST
        )
        how |= dict(cpu_seconds=round(training.seconds), val=training.log)
        log_message(table.drop(columns="source").round(3).to_string())
    high = table[(table.histogram_auc > 0.9) & table.label.isin(ABNORMALITIES)].label
    write_csv(table.round(4), a.out / "supervised3.csv")
    write_json(dict(how, histogram_above_0_9=list(high)), a.out / "supervised3.json")


def generation_2(a):
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
        write_csv(table.round(4), a.out / "supervised.csv")
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
            a.out / "supervised.json",
        )


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--generation", type=int, choices=DEFAULTS, default=2)
    for name in (*SPLITS, "epochs"):
        a.add_argument(f"--{name}", type=int)
    a.add_argument("--lr", type=float)
    a.add_argument("--jobs", type=int, default=os.cpu_count())
    a.add_argument("--widths", type=int, nargs="+")
    a.add_argument("--cache", type=Path, default=project_root() / "build/ceiling/3")
    a.add_argument("--twins", type=int, default=30)
    a.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = a.parse_args()
    for name, value in DEFAULTS[a.generation].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    os.environ["ASAP_PROGRESS"] = "1"
    (generation_3 if a.generation == 3 else generation_2)(a)


if __name__ == "__main__":
    main()
