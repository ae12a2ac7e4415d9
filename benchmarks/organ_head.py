"""Train an arm on development patients of generation 3, with bodies without a report among its
samples, and measure its organ head on bodies of generation 3b.

    python benchmarks/organ_head.py [--folder build/organ_head] [--seed 4001] [--body-fraction 0.5]

The study's seed is refused: no patient of the study is seen. Patients and bodies are drawn once;
an interrupted training resumes. Writes beside the training the checkpoint, the tables of the
stress tests (shift.csv, partial.csv, no_lung.csv), heldout.csv and summary.json, and with --save a
row of benchmarks/organ_head.csv.
"""

import argparse
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch

from asap.anatomy.organs import map_to_groups
from asap.anatomy.predictors import head_predictor
from asap.anatomy.stress import (
    stress_no_lung,
    stress_partial,
    stress_shift,
    stress_summary,
)
from asap.core import (
    code_hash,
    fingerprint,
    progress_bar,
    project_root,
    reuse_or_set_aside,
    write_csv,
    write_json,
    write_parquet,
)
from asap.data.volumes import write
from asap.params import load_params
from asap.phantom.abnormalities3 import synthesize_body_case
from asap.pretrain import checkpoint
from asap.pretrain.batches import ImageReportDataset
from asap.pretrain.bodies import ReportOrBodyDataset, vary_steps
from asap.pretrain.pretrain import (
    PRETRAIN_MODULES,
    build_model,
    evaluate,
    fit_stem,
    positional_baseline,
    summarize,
    train,
)
from asap.text.encoder import load

SPLITS = {"train": "train", "test": "valid"}  # of the table -> of the phantom
CARD = "Development checkpoint of phantom generation 3, seed {seed}: for no clinical use.\n"
VARIED = ("body_fraction", "max_shift", "max_offset", "visible_prob")


def arguments() -> argparse.Namespace:
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--folder", default="build/organ_head", help="of patients, bodies, trainings")
    a.add_argument("--arm", default="asap", help="row of `arms`")
    a.add_argument("--organ-weight", type=float, help="of the organ loss; default: of the arm")
    a.add_argument("--organs-only", action="store_true", help="the organ loss alone")
    a.add_argument("--seed", type=int, default=4001)
    a.add_argument("--steps", type=int, help="default: pretrain.steps")
    a.add_argument("--train", type=int, default=500, help="patients")
    a.add_argument("--test", type=int, default=48, help="patients")
    a.add_argument("--bodies", type=int, default=300, help="bodies without a report")
    a.add_argument("--body-fraction", type=float, default=0.5, help="of the samples")
    a.add_argument("--max-shift", type=float, default=80.0, help="mm, of the crops of cases")
    a.add_argument("--max-offset", type=float, default=4.0, help="patches, of the positions")
    a.add_argument("--visible-prob", type=float, default=0.5, help="of steps, few patches hidden")
    a.add_argument("--save", action="store_true", help="write a row of benchmarks/organ_head.csv")
    a.add_argument("--bodies-3b", type=int, default=8, help="bodies of each stress test")
    a.add_argument("--jobs", type=int, default=1, help="processes that draw patients")
    return a.parse_args()


def draw_case(seed: int, split: str, i: int, folder: Path, p: Any) -> dict:
    "One patient: volume, organ map and report; the row of the table"
    size, spacing = p.volumes.roi_size, p.volumes.spacing
    case = synthesize_body_case(seed, SPLITS[split], i, size, spacing, second_recon_prob=0.0)
    scan, name = case.recons[0], f"{split}_{i}"
    files = {k: folder / k / f"{name}.nii" for k in ("image", "organ_map")}
    write(np.clip(scan.hu, *p.volumes.hu_range).astype(np.int16), scan.affine, files["image"])
    organs = map_to_groups(scan.labels, dict(p.anatomy.groups))
    write(organs, scan.affine, files["organ_map"])
    return dict(
        dict.fromkeys(("case", "patient", "scan"), name),
        split=split,
        findings=case.report.findings,
        impression=case.report.impression,
        **{k: str(f) for k, f in files.items()},
    )


def draw(a: argparse.Namespace, p: Any, folder: Path) -> pd.DataFrame:
    "The cohort table of the patients, drawn once"
    counts = {s: getattr(a, s) for s in SPLITS}
    modules = ["abnormalities3", "lesions", "lung_findings", "chest_findings", "whole_body"]
    code = code_hash(*(f"asap.phantom.{m}" for m in modules))
    fp = fingerprint(seed=a.seed, counts=counts, volumes=p.volumes, code=code)
    if reuse_or_set_aside(folder, fp):
        return pd.read_parquet(folder / "table.parquet")
    for k in ("image", "organ_map"):
        (folder / k).mkdir(parents=True, exist_ok=True)
    jobs = [(s, i) for s, n in counts.items() for i in range(1, n + 1)]
    rows = joblib.Parallel(a.jobs, return_as="generator")(
        joblib.delayed(draw_case)(a.seed, s, i, folder, p) for s, i in jobs
    )
    table = pd.DataFrame(progress_bar(rows, total=len(jobs), label="patients"))
    write_parquet(table, folder / "table.parquet")
    write_json(fp, folder / "fingerprint.json")  # last: the folder is complete
    return table


def arm_row(a: argparse.Namespace, p: Any) -> dict:
    "The row of the arm with the weights that are given"
    changes = {} if a.organ_weight is None else dict(organ_weight=a.organ_weight)
    if a.organs_only:
        changes |= dict(recon_weight=0.0, align_weight=0.0, mlm_weight=0.0)
    return p.arms[a.arm].model_dump() | changes


def train_arm(a: argparse.Namespace, p: Any, table: pd.DataFrame, folder: Path) -> tuple:
    "The model of the arm, trained, and its errors on held-out patients"
    text, row = load(project_root() / "weights/text"), arm_row(a, p)
    parts = {s: table[table.split == s].reset_index(drop=True) for s in SPLITS}
    model = build_model(p, row, text, a.seed)
    args = parts["train"], p, text, a.seed
    plain = ImageReportDataset(*args, False)
    fit_stem(model, ImageReportDataset(args[0].head(16), *args[1:], False))
    how = dict(body_fraction=a.body_fraction, max_shift=a.max_shift)
    data = ReportOrBodyDataset(*args, folder=folder / "bodies", **how)
    if a.max_offset or a.visible_prob:
        vary_steps(model, a.max_offset, a.visible_prob)
    varied = {k: getattr(a, k) for k in VARIED}
    values = row["organ_weight"], p.pretrain.steps, *varied.values()
    name = "organs" if a.organs_only else a.arm
    run = folder / "_".join(map(str, (name, a.seed, *(f"{v:g}" for v in values))))
    options = dict(pretrain=p.pretrain, model=p.model, row=row, **varied)
    fp = fingerprint(**options, patients=len(data), code=code_hash(*PRETRAIN_MODULES))
    log = train(model, data, p, a.seed, run, fp, label=f"{a.arm} {a.seed}")
    write_csv(log, run / "training.csv")
    checkpoint.save(model, run / "checkpoint", CARD.format(seed=a.seed))
    held_out = ImageReportDataset(parts["test"], p, text, a.seed, False)
    guesses = positional_baseline(plain)
    t = p.pretrain
    rows = evaluate(model, held_out, guesses, t.mask_ratio, t.mlm_probability)
    write_csv(rows, run / "heldout.csv")
    return model, summarize(rows), run


def run_stress(model: Any, p: Any, n: int, run: Path) -> dict:
    "The stress tests of the organ head"
    groups = {g: list(names) for g, names in dict(p.anatomy.groups).items()}
    predictor = head_predictor(model.eval().cpu(), p.volumes.spacing, p.volumes.hu_range, groups)
    seeds = [("organs", "stress", i) for i in range(n)]
    tests = dict(shift=stress_shift, partial=stress_partial, no_lung=stress_no_lung)
    tables = {name: test(predictor, groups, seeds) for name, test in tests.items()}
    for name, t in tables.items():
        write_csv(t.round(4), run / f"{name}.csv")
    return stress_summary(**tables)


def save_row(a: argparse.Namespace, summary: dict, p: Any) -> None:
    "Add a training to benchmarks/organ_head.csv, or replace that with the same options"
    path, row = project_root() / "benchmarks/organ_head.csv", arm_row(a, p)
    options = dict(losses="organs" if a.organs_only else a.arm, organ_weight=row["organ_weight"])
    options |= dict(seed=a.seed, steps=p.pretrain.steps) | {k: getattr(a, k) for k in VARIED}
    mae = summary["held_out"]["organs"]["mae"]
    measured = summary["stress"] | dict(mae=mae["model"], mae_guess=mae["guess"])
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    others = [r for r in rows if any(r[k] != v for k, v in options.items())]
    new = options | {k: round(v, 4) for k, v in measured.items()}
    write_csv(pd.DataFrame([*others, new]), path)


def main() -> None:
    a = arguments()
    torch.set_num_threads(1)
    p = load_params()
    if a.seed == p.study.seed:
        raise SystemExit(f"--seed {a.seed} is study.seed: give a development seed, such as 4001")
    steps = dict(steps=a.steps) if a.steps else {}
    organs = p.organs.model_copy(update=dict(num_phantoms=a.bodies))
    p = p.model_copy(update=dict(organs=organs, pretrain=p.pretrain.model_copy(update=steps)))
    folder = Path(a.folder)
    table = draw(a, p, folder / f"patients_{a.seed}")
    model, held_out, run = train_arm(a, p, table, folder)
    summary = dict(held_out=held_out, stress=run_stress(model, p, a.bodies_3b, run))
    write_json(summary, run / "summary.json")
    if a.save:
        save_row(a, summary, p)
    print(run, summary)


if __name__ == "__main__":
    main()
