"""Freeze weights, and score frozen weights on the real scans, once for each generation.

    python benchmarks/real_looks.py                      how many looks there were
    python benchmarks/real_looks.py freeze --generation 3 \\
        organs:1=weights/organs asap:0=weights/asap \\
        untrained:0=untrained:weights/organs atlas:0=atlas
    git commit benchmarks/real_frozen.csv
    python benchmarks/real_looks.py look --generation 3

A model is NAME:SEED=SOURCE; a source is a folder of weights, `untrained:` and such a folder, or
`atlas` (organ maps of the study's train phantoms). `freeze` adds to benchmarks/real_frozen.csv and
scores nothing. `look` needs a clean working tree, build/real (`dvc repro real_scans`) and, for an
atlas, build/corpus; it appends to benchmarks/real_looks.csv. A generation is scored once: the same
weights again are the same look, and other weights need a new generation number.
"""

import argparse
import datetime
import re
from functools import partial

import pandas as pd

from asap.core import project_root
from asap.params import load_params
from asap.pretrain.checkpoint import git_revision
from asap.study import real_looks


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = a.add_subparsers(dest="step")
    freeze = steps.add_parser("freeze", help="list weights that may be scored")
    look = steps.add_parser("look", help="score what is frozen, once")
    freeze.add_argument("models", nargs="+", help="NAME:SEED=SOURCE")
    for s in (freeze, look):
        s.add_argument("--generation", required=True, help="what is frozen together")
    return a.parse_args(words)


def parse_model(text: str) -> dict:
    "NAME:SEED=SOURCE as a row"
    found = re.fullmatch(r"([\w.-]+):(\d+)=(.+)", text)
    if not found:
        raise SystemExit(f"{text!r} is no model, expected NAME:SEED=SOURCE")
    return dict(model=found[1], seed=found[2], source=found[3].rstrip("/"))


def clean_commit() -> str:
    "The commit, which must hold all that is scored"
    commit = git_revision()
    if commit is None:
        raise SystemExit("a look needs the commit of the code: run it in a git clone")
    if commit.endswith("-dirty"):
        raise SystemExit(f"the working tree is at {commit}: commit what is frozen before a look")
    return commit


def describe(ledger: pd.DataFrame) -> str:
    said = f"{real_looks.count_looks(ledger)} looks (scans times weights) so far"
    return said if ledger.empty else f"{said}\n{ledger.drop(columns='commit').to_string()}"


def main(words: list[str] | None = None) -> None:
    a, root = arguments(words), project_root()
    frozen, ledger = root / "benchmarks/real_frozen.csv", root / "benchmarks/real_looks.csv"
    p = load_params(sections=["volumes", "anatomy", "model"])
    load = partial(real_looks.load_real_model, root=root, p=p)
    today = datetime.date.today().isoformat()
    if a.step == "freeze":
        rows = [parse_model(m) for m in a.models]
        commit = git_revision() or ""
        t = real_looks.freeze(rows, a.generation, frozen, ledger, load, root, today, commit)
        print(t.to_string())
        print("Commit this list, then run `look`.")
        return
    if a.step == "look":
        groups, when = real_looks.organ_groups(p), (today, clean_commit())
        folder = root / "build/real"
        real_looks.take_look(a.generation, frozen, ledger, load, folder, groups, *when)
    print(describe(real_looks.read_looks(ledger, real_looks.LEDGER)))


if __name__ == "__main__":
    main()
