"""What each part of phantom generation 3 is worth to the organ segmenter, by leaving it out.

    python benchmarks/organs_ablation.py [--steps 300] [--phantoms 80] [--seeds 1 2]

Trains one segmenter on all parts and one without each part of `asap.anatomy.organ_bodies.PARTS`,
with the same seeds and steps, and measures Dice on bodies of generation 3b in random views and on
phantoms of generation 2, and the stress tests on generation 3b. No scan is refused, so that a model
of low confidence is measured as well. A row is added to the table as soon as it is measured; rows
that are there already are kept, and an interrupted training resumes.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from asap.anatomy.organ_bodies import GENERATOR, PARTS
from asap.anatomy.organ_training import (
    OrgansConfig,
    train_segmenter,
    validate_on_bodies3b,
    validate_on_chests,
)
from asap.anatomy.predictors import segmenter_predictor
from asap.anatomy.segmenter import Segmenter
from asap.anatomy.stress import (
    stress_no_lung,
    stress_partial,
    stress_shift,
    stress_summary,
)
from asap.core import code_hash, fingerprint, project_root, write_csv
from asap.params import load_params

TABLE = "benchmarks/organs_ablation.csv"
NONE = "nothing"
CODE = [
    *GENERATOR,
    "asap.anatomy.organ_training",
    "asap.anatomy.predictors",
    "asap.anatomy.randomize",
    "asap.anatomy.segmenter",
    "asap.anatomy.stress",
    "asap.phantom.bodies3b",
    "asap.phantom.body",
]  # code on which a row depends


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--steps", type=int, default=300, help="of each training")
    a.add_argument("--phantoms", type=int, default=80, help="bodies of each training")
    a.add_argument("--seeds", type=int, nargs="+", help="of the trainings; default: study.seed")
    a.add_argument("--leave-out", nargs="+", default=[NONE, *PARTS], choices=[NONE, *PARTS])
    a.add_argument("--bodies-3b", type=int, default=16, help="random views of generation 3b")
    a.add_argument("--chests", type=int, default=8, help="phantoms of generation 2")
    a.add_argument("--stress", type=int, default=2, help="bodies of each stress test; 0: none")
    a.add_argument("--folder", default="build/organs_ablation", help="of the trainings")
    a.add_argument("--table", default=str(project_root() / TABLE), help="CSV")
    a.add_argument("--threads", type=int, default=1)
    return a.parse_args(given)


def row_fingerprint(a: argparse.Namespace, c: OrgansConfig, groups: dict, seed: int) -> str:
    "Hash of all on which a row depends"
    sizes = (a.bodies_3b, a.chests, a.stress)
    parts = fingerprint(organs=c, groups=groups, seed=seed, sizes=sizes, code=code_hash(*CODE))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def accept_all(s: Segmenter) -> Segmenter:
    "A segmenter that refuses only a scan in which it finds no lung at all"
    c = s.config.model_copy(update=dict(min_lung=1e-6, min_confidence=1e-6))
    return replace(s, config=c)


def measure(s: Segmenter, a: argparse.Namespace) -> dict[str, float]:
    "Dice on both generations and the summary of the stress tests"
    tables = {
        "3b": validate_on_bodies3b(s, a.bodies_3b, "ablation"),
        "2": validate_on_chests(s, a.chests, "ablation"),
    }
    out = {}
    for name, t in tables.items():
        means = t.reindex(columns=list(s.groups)).mean()
        out[f"dice_{name}"] = means.mean()
        out |= {f"dice_{name} {group}": value for group, value in means.items()}
    if a.stress:
        seeds = [("organs", "ablation stress", i) for i in range(a.stress)]
        args = (segmenter_predictor(s), s.groups, seeds)
        found = stress_summary(stress_shift(*args), stress_partial(*args), stress_no_lung(*args))
        out |= {f"stress_{k}": v for k, v in found.items()}
    return {k: round(float(v), 4) for k, v in out.items()}


def read_table(path: Path) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame(columns=["left_out", "seed", "fingerprint"])
    return pd.read_csv(path, dtype=dict(fingerprint=str))


def add_row(path: Path, row: dict) -> None:
    "Append a row; one of the same part and seed with another fingerprint is replaced"
    t = read_table(path)
    same = (t.left_out == row["left_out"]) & (t.seed == row["seed"])
    write_csv(pd.DataFrame([*t[~same].to_dict("records"), row]), path)


def todo(a: argparse.Namespace, c: OrgansConfig, groups: dict) -> Iterator[tuple]:
    "Part, seed, config and fingerprint of each row that the table lacks"
    have = set(read_table(Path(a.table)).fingerprint)
    for seed in a.seeds:
        for part in a.leave_out:
            own = c.model_copy(update=dict(leave_out=[] if part == NONE else [part]))
            fp = row_fingerprint(a, own, groups, seed)
            if fp not in have:
                yield part, seed, own, fp


def bodies_folder(a: argparse.Namespace, c: OrgansConfig) -> Path:
    "Trainings whose bodies are the same share a folder"
    key = hashlib.sha256(json.dumps(c.bodies(), sort_keys=True).encode()).hexdigest()[:8]
    return Path(a.folder) / f"bodies_{c.bodies_seed}_{key}"


def run(a: argparse.Namespace) -> None:
    p = load_params(sections=["study", "anatomy", "organs"])
    a.seeds = a.seeds or [p.study.seed]
    groups = {g: list(names) for g, names in p.anatomy.groups.items()}
    c = p.organs.model_copy(update=dict(steps=a.steps, num_phantoms=a.phantoms))
    rows, started = list(todo(a, c, groups)), time.monotonic()
    print(f"{len(rows)} of {len(a.seeds) * len(a.leave_out)} rows to train", flush=True)
    for i, (part, seed, own, fp) in enumerate(rows):
        print(f"row {i + 1} of {len(rows)}: without {part}, seed {seed}", flush=True)
        bodies = bodies_folder(a, own)
        folder = Path(a.folder) / f"{part}_{seed}"
        s = train_segmenter(own, groups, seed, folder, bodies=bodies)
        row = dict(left_out=part, seed=seed, steps=a.steps, phantoms=a.phantoms, fingerprint=fp)
        add_row(Path(a.table), row | measure(accept_all(s), a))
        if all(bodies_folder(a, other) != bodies for _, _, other, _ in rows[i + 1 :]):
            shutil.rmtree(bodies)
        left = (time.monotonic() - started) / (i + 1) * (len(rows) - i - 1) / 60
        print(f"without {part}: done; about {left:.0f} min left", flush=True)
    shown = ["left_out", "seed", "dice_3b", "dice_2"]
    stress = [k for k in read_table(Path(a.table)).columns if k.startswith("stress_")]
    print(read_table(Path(a.table))[[*shown, *stress]].to_string(index=False))


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    run(a)


if __name__ == "__main__":
    main()
