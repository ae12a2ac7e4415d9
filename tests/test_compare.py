"`asap compare` and DVC's metrics: what one change did, on the smoke study"

import contextlib
import io
import json
import shutil

import pandas as pd
import pytest
import yaml
from smoke import ENV, clone as clone, ran, run

from asap.cli import main
from asap.study import compare

pytestmark = pytest.mark.study

COLUMNS = 120
ME = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def version(clone, folder, arm):
    "The study as if its reference arm had the predictions of another arm"
    shutil.copytree(clone / "runs", folder / "runs")
    raw = yaml.safe_load((clone / "params.yaml").read_text())
    raw["arms"]["asap"] = raw["arms"][arm]
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    for file in (folder / "runs").glob("*/predictions.parquet"):
        t = pd.read_parquet(file)
        if (t.arm == arm).any():
            t[t.arm == arm].assign(arm="asap").to_parquet(file)
    hits = folder / "runs/grounding/hits.parquet"
    t = pd.read_parquet(hits)
    t[t.arm == arm].assign(arm="asap").to_parquet(hits)
    return folder


@pytest.fixture(scope="module")
def two(clone, tmp_path_factory):
    return [version(clone, tmp_path_factory.mktemp(a), a) for a in ("paper", "asap")]


def test_two_versions_differ_as_two_arms_of_one_study(clone, two):
    "Same patients, same replicates: the difference and its interval are those of the tables"
    _, found = compare.compare_versions(*two, by_task=True)
    tables = pd.read_csv(clone / "runs/tables/differences.csv").query("comparator == 'paper'")
    checked = 0
    for r in tables[tables.tasks == 1].to_dict("records"):
        few = f", {r['fraction']:.0%} of the labels" if r["fraction"] < 1 else ""
        row = found[found.figure == f"{r['task']}, {r['metric']}{few}"]
        if len(row):
            assert row.interval.item() == compare.PAIRED
            got = row[["difference", "lo", "hi"]].iloc[0].to_numpy()
            assert got == pytest.approx([r["difference"], r["lo"], r["hi"]], abs=2e-5, nan_ok=True)
            checked += 1
    assert checked >= 5
    hits = pd.read_csv(clone / "runs/grounding/differences.csv").query("comparator == 'paper'")
    row, wanted = found.set_index("figure").loc["hits"], hits.iloc[0]
    assert row.difference == pytest.approx(wanted.difference, abs=2e-5)
    assert (row.lo, row.hi) == pytest.approx((wanted.lo, wanted.hi), abs=2e-5)


def test_without_predictions_there_is_no_interval(two, tmp_path):
    bare = shutil.copytree(two[0], tmp_path / "bare")
    for file in bare.glob("runs/**/predictions.parquet"):
        file.unlink()
    _, found = compare.compare_versions(bare, two[1])
    rows = found[found.figure != "hits"]
    assert len(rows) and set(rows.interval) == {"none: no predictions of A"}
    assert rows.difference.notna().all() and rows.lo.isna().all()


def test_the_command_prints_figures_and_params(two):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["compare", *map(str, two)]) == 0
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert any(line.startswith("arms.asap.") for line in lines)
    assert any(line.startswith("probe") and "[" in line for line in lines)


def test_headline_figures_are_those_of_the_tables(clone):
    figures = json.loads((clone / "runs/headline.json").read_text())
    metrics = pd.read_csv(clone / "runs/tables/metrics.csv").query("arm == 'asap'")
    (vqa,) = metrics.query("metric == 'accuracy, presence'").value
    assert 2 <= len(figures) <= 10 and figures.get("vqa", round(vqa, 3)) == round(vqa, 3)
    hits = pd.read_csv(clone / "runs/grounding/hits.csv").query("arm == 'asap'")
    assert figures["hits"] == round(hits.hit_rate.iloc[0], 3)


def test_an_experiment_fits_a_terminal(clone):
    "One param: `dvc metrics diff`, `dvc exp show` and `asap compare` print what it did"
    if not (clone / ".git").exists():
        pytest.skip("needs git: `dvc exp` compares commits")
    env = ENV | ME | dict(COLUMNS=str(COLUMNS), ASAP_ROOT=str(clone))
    run("git", "add", "-A", cwd=clone, env=env)
    run("git", "commit", "-qm", "baseline", cwd=clone, env=env)
    steps = ("exp", "run", "-n", "other", "-S", "splits.label_fraction_seeds=[1]", "tables")
    assert {"classify", "tables"} <= ran(run("dvc", *steps, cwd=clone, env=env))
    show = ("exp", "show", "--no-pager", "--only-changed", "--drop", ".*[./]|Created")
    shown = run("dvc", *show, cwd=clone, env=env)
    diff = run("dvc", "metrics", "diff", "HEAD", "other", cwd=clone, env=env)
    command = ("python", "-m", "asap.cli", "compare", "HEAD", "other", "--tasks")
    compared = run(*command, cwd=clone, env=env)
    for text in (shown, diff, compared):
        assert max(map(len, text.splitlines())) <= COLUMNS, text
    assert "…" not in shown and "other" in shown
    assert all(line.startswith(("Path", "runs/headline.json")) for line in diff.splitlines())
    assert "splits.label_fraction_seeds" in compared and "classify_ct_rate, auc, 50%" in compared
    untouched = next(line for line in compared.splitlines() if "vocabulary_ct_rate" in line)
    assert "[+0.000, +0.000]" in untouched
