"""Select the learning rate of each arm: the study's rate or twice that, on development patients.
The better one is the arm's `lr_scale` in params.yaml.

Run it in a clone whose params.yaml sets a development seed and whose `corpus` stage has run. Every
arm trains for the same number of steps at each rate; the criterion is a linear probe with all
labels on the test patients of that seed. Writes benchmarks/rates.csv, one row per arm
and rate; existing rows are kept.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from asap.core import log_message, project_root, write_csv
from asap.data.table import load
from asap.params import load_params
from asap.pretrain import embed
from asap.pretrain.batches import ImageReportDataset
from asap.pretrain.pretrain import build_model, fit_stem, train
from asap.tasks.classify import task_label_columns
from asap.tasks.metrics import auc, nan_mean
from asap.tasks.probe import average_by_scan, fit_predict
from asap.text import encoder


def probe(model, table, p) -> float:  # macro AUC
    f = embed.extract_features(
        model.vit.eval(), table.image, p.volumes.roi_size, p.volumes.hu_range
    )
    columns = task_label_columns(table, "ct_rate")
    found = average_by_scan(fit_predict(f, table, table.split == "train", columns))
    return nan_mean(
        [auc(g.truth, g.probability) for _, g in found.dropna(subset="truth").groupby("label")]
    )


def one(arm, factor, steps, p, table, text) -> dict:
    t = p.pretrain.model_copy(
        update=dict(steps=steps, warmup_steps=min(p.pretrain.warmup_steps, steps // 10))
    )
    q = SimpleNamespace(
        study=p.study, volumes=p.volumes, model=p.model, anatomy=p.anatomy, pretrain=t
    )
    parts = table[table.split == "train"].reset_index(drop=True)
    model = build_model(q, dict(p.arms[arm].model_dump(), lr_scale=factor), text, p.study.seed)
    fit_stem(model, ImageReportDataset(parts.head(16), q, text, p.study.seed, augment=False))
    log = train(
        model,
        ImageReportDataset(parts, q, text, p.study.seed),
        q,
        p.study.seed,
        label=f"{arm} x {factor:g}",
    )
    return dict(
        arm=arm,
        factor=factor,
        lr=t.lr * factor,
        muon_lr=t.muon_lr * factor,
        steps=steps,
        loss=round(float(log.loss.tail(5).mean()), 4),
        auc=round(float(probe(model, table, p)), 4),
        seed=p.study.seed,
        train=len(parts),
    )


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--arms", nargs="+", default=["asap", "simcrop", "clip", "mae"])
    a.add_argument("--factors", nargs="+", type=float, default=[1.0, 2.0])
    a.add_argument("--steps", type=int, default=240)
    a.add_argument("--text", default="weights/text")
    a.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    a = a.parse_args()
    p, text = load_params(), encoder.load(a.text, load_params().text.max_length)
    if p.study.seed == 1:
        raise SystemExit(
            "study.seed is 1, the study's own: choose on a development seed, such as 4001"
        )
    table = load(project_root() / "build/corpus/corpus.parquet", project_root())
    done = (
        pd.read_csv(a.out) if a.out.exists() else pd.DataFrame(columns=["arm", "factor", "steps"])
    )
    for factor in a.factors:
        for arm in a.arms:
            if len(done.query("arm == @arm and factor == @factor and steps == @a.steps")):
                continue
            done = pd.concat(
                [done, pd.DataFrame([one(arm, factor, a.steps, p, table, text)])], ignore_index=True
            )
            write_csv(done, a.out)
            log_message(done.tail(1).to_string(index=False, header=False))


if __name__ == "__main__":
    main()
