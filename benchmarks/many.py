"""Ratio of the times to prepare many small volumes with one process and with two, in one run.

`python benchmarks/many.py --save` writes benchmarks/many.json. Each variant starts from an empty
folder; the workers of the second
are started beforehand, as they are for all but the first moments of a real run.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import joblib
import pandas as pd

from asap.core import log_message, project_root, write_json
from asap.data.prepare import prepare_cases
from asap.data.volumes import write
from asap.phantom.abnormalities import synthesize_chest

HOW = dict(spacing=[3.5, 3.5, 7.0], hu=[-1000, 1000])


def scans(folder, n, kinds=20):  # n small scans on disk, of `kinds` phantoms
    for i in range(kinds):
        k = synthesize_chest(("many", i), (64, 64, 32), (5.0, 5.0, 10.0))
        write(k.hu, k.affine, folder / f"kind{i}.nii.gz")
    rows = []
    for i in range(n):
        f = folder / f"{i}.nii.gz"
        shutil.copyfile(folder / f"kind{i % kinds}.nii.gz", f)
        rows.append(
            dict(
                case=f"c{i:05d}",
                scan=f"s{i}",
                patient=f"p{i}",
                image=str(f),
                organ_map="",
                target_map="",
                findings="",
                impression="",
                split="train",
                time_days=None,
                event=None,
            )
        )
    return pd.DataFrame(rows)


def seconds(table, folder, jobs):
    start = time.perf_counter()
    prepare_cases(table, folder / f"v{jobs}", folder / "o", HOW, jobs=jobs)
    taken = time.perf_counter() - start
    shutil.rmtree(folder / f"v{jobs}")
    return taken


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("-n", type=int, default=2000, help="volumes (default 2000)")
    a.add_argument(
        "--repeat", type=int, default=3, help="times, by turns; the fastest counts (default 3)"
    )
    a.add_argument("--save", action="store_true", help="write benchmarks/many.json")
    a = a.parse_args()
    with tempfile.TemporaryDirectory() as t:
        table = scans(Path(t), a.n)
        prepare_cases(
            table[:20], Path(t) / "warm", Path(t) / "o", HOW, jobs=2
        )  # starts the workers
        took = {j: [] for j in (1, 2)}
        for _ in range(a.repeat):
            for j in took:
                took[j].append(seconds(table, Path(t), j))
    best = {j: min(s) for j, s in took.items()}
    out = dict(
        volumes=a.n,
        one=round(best[1], 1),
        two=round(best[2], 1),
        ratio=round(best[1] / best[2], 2),
        cores=joblib.cpu_count(),
    )
    log_message(str(out))
    if a.save:
        write_json(out, project_root() / "benchmarks/many.json")


if __name__ == "__main__":
    main()
