"""Twelve headline figures of a finished study, recomputed from its predictions without `asap`:
`python tests/recompute.py [FOLDER]` prints them beside those of runs/tables"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.preprocessing import MultiLabelBinarizer


def label_aucs(t):
    unit = "case" if "time" in t and t.time.notna().any() else "scan"
    t = t.groupby([unit, "label"], sort=False, as_index=False)
    t = t.agg(truth=("truth", "max"), p=("probability", "mean")).dropna()
    groups = {k: g for k, g in t.groupby("label", sort=False) if g.truth.nunique() == 2}
    return {k: roc_auc_score(g.truth, g.p) for k, g in groups.items()}


def dice(t):
    t = t[t.reference == "target"].groupby(["case", "label"]).dice.mean()
    return t.groupby("case").mean().mean()


def c_index(t):
    t = t.drop_duplicates("case")
    time, died = t.time.clip(upper=365).to_numpy(), ((t.event == 1) & (t.time <= 365)).to_numpy()
    pairs = died[:, None] & ((time > time[:, None]) | ((time == time[:, None]) & ~died))
    lead = t.risk.to_numpy()[:, None] - t.risk.to_numpy()
    return ((lead > 0) + (lead == 0) / 2)[pairs].mean()


def clinical_f1(t):
    sets = [c.str.split(";").map(lambda names: {*names} - {""}) for c in (t.truth, t.predicted)]
    binary = MultiLabelBinarizer().fit(pd.concat(sets))
    return f1_score(*map(binary.transform, sets), average="micro", zero_division=0)


METRICS = {
    "auc": lambda t: np.mean([*label_aucs(t).values()]),
    "c_index": c_index,
    "clinical F1": clinical_f1,
    "accuracy, presence": lambda t: t[t.kind == "presence"].exact.mean(),
    "R@10 image to report": lambda t: (t[t.direction == "image to report"]["rank"] <= 10).mean(),
    "dice": dice,
}
SINGLE = dict(zip(METRICS, ("classify_ct_rate", "prognosis_inspect", "report_ct_rate")))
SINGLE |= dict(zip([*METRICS][3:], ("vqa_radgenome", "retrieve_ct_rate", "segment_acdc")))


def recompute(folder):  # -> figure: (recomputed, of the tables)
    names = ("*/predictions.parquet", "*/*/predictions.parquet")
    files = [f for n in names for f in folder.glob(f"runs/{n}")]
    rows = {k: g for f in files for k, g in pd.read_parquet(f).groupby(["task", "arm", "fraction"])}
    tables = {f.stem: pd.read_csv(f) for f in folder.glob("runs/tables/*.csv")}

    def score(task, arm, metric, fraction=1.0):
        return np.mean([METRICS[metric](g) for _, g in rows[task, arm, fraction].groupby("seed")])

    def tabled(table, column, **where):
        t = tables[table]
        return t[np.logical_and.reduce([t[k] == v for k, v in where.items()])][column].item()

    known = dict(task=SINGLE["auc"], arm="asap")
    metrics = [(m, t, "asap") for m, t in SINGLE.items()] + [("dice", SINGLE["dice"], "unet")]
    found = {}
    for m, t, arm in metrics:
        of_table = tabled("metrics", "value", task=t, arm=arm, metric=m, fraction=1)
        found[f"{m}, {t}, {arm}"] = score(t, arm, m), of_table
    for name, value in [*label_aucs(rows[*known.values(), 1.0]).items()][:2]:
        found[f"AUC, {name}"] = value, tabled("per_label", "auc", **known, label=name)
    drop = score("classify_inspect", "asap", "auc") - score("external_rspect", "asap", "auc")
    of_table = tabled("external_drop", "external_drop", task="external_rspect", arm="asap")
    found["drop, RSPECT"] = drop, of_table
    solved = tables["tasks"][~tables["tasks"].task.isin(tables["unsolved"].task)]
    of = {(r.task, r.arm): score(r.task, r.arm, r.metric, r.fraction) for r in solved.itertuples()}
    six = np.mean([v for (t, a), v in of.items() if a == "asap" and t.startswith("classify")])
    mean = dict(task="mean of tasks 1 to 6", arm="asap", fraction=1)
    found["mean of tasks 1 to 6"] = six, tabled("metrics", "value", **mean)
    lead = np.mean([of[t, "asap"] - v for (t, a), v in of.items() if a == "scratch"])
    every = dict(outcome="mean of all tasks that both have", comparator="scratch")
    return found | {"lead over all tasks": (lead, tabled("claims", "difference", **every))}


if __name__ == "__main__":
    for name, (value, of_table) in recompute(Path([*sys.argv, "."][1])).items():
        print(f"{name:50} {value:9.6f} {of_table:9.5f}")
