"The short and the full budget: they differ in counts alone, and have the same graph"

import logging
import shutil
import subprocess

import pytest
import yaml
from conftest import TOP
from test_rehearsal import allowed, leaves

from asap.params import load_params, read_params

SHORT, FULL = TOP / "params.yaml", TOP / "params/full.yaml"
TRAINED = ("vocabulary", "retrieve", "report", "vqa")
COUNTS = (  # leaves that may differ; * is one key or index
    "phantom.n_patients.*.*",
    "splits.label_fractions.*",
    "splits.label_fraction_seeds.*",
    *(f"{family}.{key}" for family in TRAINED for key in ("steps", "epochs")),
    "vqa.eval_every",  # steps between validations
    "vqa.patience",  # validations
    "segment.label_fractions.*",
    "segment.label_fraction_seeds.*",
    "segment.all_labels_seeds",  # null, or a list
    "segment.all_labels_seeds.*",
    "segment.num_validations",
    "segment.patience",
    "segment.datasets.*.steps",
    "segment.datasets.*.eval_every",
    "segment.datasets.*.patience",
    "tables.n_bootstrap",
)
EXTERNAL = ("rspect", "rider", "covid_ct_seg")  # nothing is trained on them


def changed(a: dict, b: dict) -> list[str]:  # params -> paths that differ
    a, b = leaves(a), leaves(b)
    return [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def other(a: dict, b: dict) -> list[str]:  # paths that differ and are no counts
    return [k for k in changed(a, b) if k != "study.budget" and not allowed(k, COUNTS)]


def test_each_file_names_its_budget():
    assert load_params(SHORT).study.budget == "short" and load_params(FULL).study.budget == "full"
    scales = [load_params(TOP / f"params/{n}.yaml") for n in ("smoke", "paper", "rehearsal")]
    assert [p.study.budget for p in scales] == [None] * 3


def test_they_differ_in_counts_alone():
    short, full = read_params(SHORT), read_params(FULL)
    assert not other(short, full)
    assert len(changed(short, full)) > 30
    full["segment"]["datasets"]["btcv"]["lr"] = 0.1
    full["pretrain"]["steps"] += 1
    assert other(short, full) == ["pretrain.steps", "segment.datasets.btcv.lr"]


def test_the_full_budget_has_no_smaller_count():
    short, full = leaves(read_params(SHORT)), leaves(read_params(FULL))
    for k in changed(read_params(SHORT), read_params(FULL)):
        if k != "study.budget" and short.get(k) is not None:
            assert full[k] > short[k], k


def test_both_use_the_same_weights():
    "Same patients of the cohorts that pre-training reads"
    short, full = (load_params(f) for f in (SHORT, FULL))
    for cohort in full.pretrain.cohorts:
        assert full.phantom.n_patients[cohort] == short.phantom.n_patients[cohort]


def test_sizes():
    p = load_params(FULL)
    test = {c: n.test for c, n in p.phantom.n_patients.items()}
    assert all(n >= 40 for n in test.values())
    assert all(test[c] >= 120 for c in ("stoic", "luna16", "cc_ccii", "inspect", "rspect"))
    trains = {c: n.train for c, n in p.phantom.n_patients.items()}
    assert [c for c, n in trains.items() if n == 0] == sorted(EXTERNAL, key=list(trains).index)
    assert all(f"external_{c}" in p.study.tasks for c in ("rspect", "segment_rider"))


@pytest.fixture
def quiet(monkeypatch):
    "DVC's handlers keep the stream of the first test that loaded DVC, which is closed by now"
    monkeypatch.setattr(logging.getLogger("dvc"), "handlers", [])


def graph(folder, params) -> dict:  # stage -> command, deps, outs
    from dvc.repo import Repo

    folder.mkdir()
    for name in ("dvc.yaml", "data.dvc"):
        shutil.copy(TOP / name, folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(read_params(params), sort_keys=False))
    with Repo.init(folder, no_scm=True) as repo:
        return {
            s.addressing: (s.cmd, [str(d) for d in s.deps], [str(o) for o in s.outs])
            for s in repo.index.stages
        }


def test_the_graph_is_the_same(tmp_path, monkeypatch, quiet):
    graphs = []
    for name, params in dict(short=SHORT, full=FULL).items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        graphs.append(graph(tmp_path / name / "tree", params))
    assert len(graphs[0]) > 60
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    ("budget", "said"),
    [("full", 'cd "{top}/build/full" && python'), ("short", 'cd "{top}" && python')],
)
def test_make_runs_each_in_its_own_folder(budget, said):
    done = subprocess.run(
        ["make", "-n", "study", f"BUDGET={budget}"], cwd=TOP, capture_output=True, text=True
    )
    assert said.format(top=TOP) in done.stdout and done.returncode == 0
    assert ("params/full.yaml" in done.stdout) and f"[ '{budget}' = short ] ||" in done.stdout
