"Twelve headline figures of the smoke study, recomputed by a script that knows nothing of `asap`"

import ast

import numpy as np
import pandas as pd
import pytest
from conftest import TOP, load_script
from smoke import clone as clone

pytestmark = pytest.mark.study

SCRIPT = TOP / "tests/recompute.py"
DIGITS = 5  # of the tables


def wrong(folder):  # -> figure: (recomputed, of the tables), where they differ
    found = load_script(SCRIPT).recompute(folder)
    assert len(found) == 12
    return {k: (a, b) for k, (a, b) in found.items() if not abs(np.round(a, DIGITS) - b) < 1e-6}


def test_the_script_is_independent():
    nodes = [*ast.walk(ast.parse(SCRIPT.read_text()))]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert names == {"sys", "pathlib", "numpy", "pandas", "sklearn"}


def test_the_tables_agree(clone):
    assert not wrong(clone)


def test_another_prediction_is_seen(clone):
    file = clone / "runs/classify/predictions.parquet"
    kept, t = file.read_bytes(), pd.read_parquet(file)
    t.loc[(t.arm == "asap") & (t.task == "classify_ct_rate"), "probability"] *= -1
    t.to_parquet(file)
    assert {"auc, classify_ct_rate, asap", "lead over all tasks"} <= set(wrong(clone))
    file.write_bytes(kept)
