"""What a study computes without training, into a folder; for tests/test_determinism.py: raw data
of phantoms, volumes, word pieces, tables and figures.  usage: same_bytes.py FOLDER JOBS"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from asap.core import parallel_map, rng, write_csv
from asap.data.adapter import get_cohort
from asap.data.cohorts import own
from asap.data.prepare import prepare_cases, read_raw_cohort
from asap.registry import task_families
from asap.study import figures, tables
from asap.tasks import classify, probe
from asap.text.tokens import train_wordpiece_tokenizer

SIZE = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))


def write_raw(root: Path, jobs: int) -> None:
    "The cohort `own`; the patients in processes of their own where there are several"
    todo = [(s, i, n, root, 3, SIZE) for n, (s, i) in enumerate((("train", 1), ("test", 1)), 1)]
    rows = parallel_map(own._write_patient, todo, jobs, soon=0 if jobs > 1 else 3)
    write_csv(pd.DataFrame([r for patient in rows for r in patient]), root / "cases.csv")


def predictions() -> pd.DataFrame:
    r = rng("same bytes")
    rows = [
        dict(case=f"c{i}", scan=f"s{i}", patient=f"p{i}", label=label, truth=float(i % 3 == 0))
        | dict(task=t, arm=a, fraction=f, num_labeled=int(40 * f), probability=r.random())
        for t in ("classify_ct_rate", "classify_stoic")
        for i in range(40)
        for label in ("Emphysema", "Atelectasis")
        for a in ("scratch", "asap")
        for f in (0.5, 1.0)
    ]
    return pd.DataFrame(rows).assign(threshold=0.5, C=1.0, seed=0)


def write_results(out: Path) -> None:
    "Tables and figures of two arms"
    probed = predictions()
    others = dict.fromkeys(task_families(), pd.DataFrame(columns=probe.COLUMNS))
    first = probed[(probed.arm == "scratch") & (probed.fraction == 1)]
    leaks = pd.concat([first.assign(arm=c) for c in classify.NEGATIVE_CONTROLS])
    acquired = pd.DataFrame(dict(case=sorted(set(probed.case)), slice_mm=5.0, pixel_mm=1.0))
    acquired = acquired.assign(kernel="soft", contrast=np.nan)
    tables.write_tables(
        *(others | dict(classify=probed), dict(classify=leaks)),
        *(dict(ct_rate=acquired, stoic=acquired), {}, "asap", [dict(cohort="own", there=False)]),
        *(100, 0.95, out / "tables"),
    )
    figures.plot_tables(out / "tables", ["scratch", "asap"], [], None, out / "figures")


def main(out: Path, jobs: int) -> None:
    write_raw(out / "data/own", jobs)
    table, bad = read_raw_cohort(get_cohort("own"), out / "data", dict(csv="cases.csv"))
    recipe = dict(spacing=list(SIZE["spacing"]), hu=[-1000, 1000])
    table = table.assign(organ_map="")
    quarantine = out / "cohorts/quarantine.csv"
    prepare_cases(table, out / "volumes", out / "organs", recipe, None, jobs, quarantine, bad)
    table[["case", "findings", "impression"]].to_parquet(out / "cohorts/reports.parquet")
    train_wordpiece_tokenizer(table.findings, 200, out / "text")
    write_results(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
