"The dress rehearsal: it differs from the paper's params in counts alone, and what it extrapolates"

import re
import subprocess
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from conftest import TOP, load_script

from asap.cost import Cases, count_units, count_windows, paper_cases, rehearsal_table
from asap.params import load_params, read_params

PAPER, REHEARSAL = TOP / "params/paper.yaml", TOP / "params/rehearsal.yaml"
COUNTS = (  # leaves that may differ; * is one key or index
    "study.arms.*",
    "study.n_jobs",
    "study.encoders.released_checkpoint.*",
    "phantom.n_patients.*.*",
    "splits.val_fraction",  # of a handful of patients
    "splits.label_fraction_seeds.*",
    "cohorts.radgenome.train_volumes",
    "pretrain.steps",
    "pretrain.batch_size",
    "pretrain.micro_batch_size",
    "pretrain.accum_iter",
    "pretrain.warmup_steps",
    "pretrain.*_every",
    "pretrain.num_eval_cases",
    "pretrain.num_workers",
    *(
        f"{family}.datasets.*.*.{key}"
        for family in ("classify", "prognosis")
        for key in ("steps", "warmup_steps", "patience", "start_epoch")
    ),
    "vocabulary.steps",
    "vocabulary.warmup_steps",
    "retrieve.steps",
    "retrieve.warmup_steps",
    "segment.arms.*",
    "segment.label_fractions.*",
    "segment.*_seeds.*",
    "segment.overlap",  # number of windows
    "segment.patience",
    "segment.datasets.*.label_fractions.*",
    "segment.datasets.*.crops_per_volume",
    *(f"segment.datasets.*.{key}" for key in ("steps", "warmup_steps", "eval_every", "patience")),
    "segment.datasets.*.fractions.*.*",
    "report.arms.*",
    "report.epochs",
    "report.datasets.*.epochs",
    "vqa.arms.*",
    "vqa.steps",
    "vqa.batch_size",
    "vqa.micro_batch_size",
    "vqa.warmup_steps",
    "vqa.eval_every",
    "vqa.patience",
    "tables.n_bootstrap",
)
PHANTOM_GRID = ("phantom.size.*", "phantom.spacing.*")  # the phantoms replace real volumes
MODELS = ("text.model", "model.init", "vqa.language_model")  # folders that are made on the spot


def leaves(tree, at=()) -> dict:  # path -> value
    if not isinstance(tree, (dict, list)):
        return {".".join(map(str, at)): tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, x in items for k, v in leaves(x, (*at, key)).items()}


def allowed(path: str, patterns=(*COUNTS, *PHANTOM_GRID, *MODELS)) -> bool:
    return any(re.fullmatch(re.escape(q).replace(r"\*", r"[^.]+"), path) for q in patterns)


def test_it_differs_in_counts_alone():
    a, b = (leaves(read_params(f)) for f in (PAPER, REHEARSAL))
    changed = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    assert not [k for k in changed if not allowed(k)]
    assert set(MODELS) <= set(changed), "nothing is downloaded"


def test_its_file_holds_only_what_differs():
    a = leaves(read_params(PAPER))
    own = yaml.safe_load(REHEARSAL.read_text())
    own.pop("base")
    for section, keys in own.items():
        for key, value in keys.items():
            same = all(a.get(k) == v for k, v in leaves(value, (section, key)).items())
            whole = {k for k in a if k.startswith(f"{section}.{key}.") or k == f"{section}.{key}"}
            assert not same or whole != set(leaves(value, (section, key))), f"{section}.{key}"


def test_every_task_runs_and_the_released_checkpoint_with_it():
    a, b = load_params(PAPER), load_params(REHEARSAL)
    assert b.study.tasks == a.study.tasks and b.study.cohorts == a.study.cohorts
    row = b.study.encoders["released_checkpoint"]
    assert row.released_weights and row.factory is None
    for section in (b.segment, b.report, b.vqa):
        assert "released_checkpoint" in section.arms
    assert [b.phantom.size, b.phantom.spacing] == [b.volumes.roi_size, b.volumes.spacing]


def test_the_models_are_made_where_the_params_look():
    b = load_params(REHEARSAL)
    made = (TOP / "benchmarks/rehearsal.py").read_text()
    files = [b.text.model, b.model.init, b.vqa.language_model]
    for path in (*files, b.study.encoders["released_checkpoint"].released_weights):
        folder, name = path.rsplit("/", 1)
        assert folder == "build/models" and f'folder / "{name}"' in made


def test_make_help_names_it_and_the_release_runs_it():
    said = subprocess.run(["make", "help"], cwd=TOP, capture_output=True, text=True).stdout
    assert re.search(r"^rehearsal\b.*paper's sizes", said, re.M)
    release = (TOP / "CONTRIBUTING.md").read_text().split("## Release")[1]
    assert "`make rehearsal` before every release" in release


@pytest.mark.parametrize(
    ("shape", "size", "overlap"),
    [((56, 56, 28), (24, 24, 12), 0.75), ((56, 56, 28), (24, 24, 12), 0.25),
     ((75, 25, 12), (24, 24, 12), 0.5), ((15, 15, 7), (24, 24, 12), 0.5)],
)  # fmt: skip
def test_windows_are_those_of_monai(shape, size, overlap):
    import torch
    from monai.inferers import sliding_window_inference

    seen = []

    def network(x):
        seen.append(len(x))
        return x

    sliding_window_inference(torch.zeros(1, 1, *shape), size, 4, network, overlap)
    assert count_windows(shape, size, overlap) == sum(seen)


def test_the_table_of_a_small_record():
    p = SimpleNamespace(
        study=SimpleNamespace(arms=["a", "b"], cohorts=["x", "y", "z"], encoders={}),
        segment=SimpleNamespace(arms=["a"]),
        report=SimpleNamespace(arms=["a"]),
        vqa=SimpleNamespace(arms=["a"]),
    )
    record = pd.DataFrame(
        [
            ("prepare@x", 12, 10, 1),
            ("prepare@y", 32, 30, 2),
            ("embed@a", 9, 8, 3),
            ("embed@b", 5, 4, 1),
            ("page", 5, 3, 1),
        ],
        columns=["stage", "cpu_seconds", "work_seconds", "total_gb"],
    )
    here = dict(prepare=("voxel", 4), embed=("volume", 2))
    paper = dict(prepare=("voxel", 40), embed=("volume", 3600))
    t = rehearsal_table(record, here, paper, p)
    assert list(t.index) == ["prepare", "embed", "page"]
    assert t.seconds_per_unit.tolist() == [5, 4, 5], "mean of the cohorts, slowest of the arms"
    assert t.peak_gb.tolist() == [2, 3, 1]
    hours = [3 * 5 * 40 / 3600, 2 * 4, 5 / 3600]
    assert t.core_hours.tolist() == pytest.approx(hours)


def test_the_papers_work_is_counted():
    p = load_params(PAPER)
    cases = paper_cases(p)
    units = count_units(p, cases, 78.6, (360, 360, 330), 55)
    steps = p.pretrain.steps * p.pretrain.batch_size * p.pretrain.accum_iter
    assert units["pretrain"][1] == pytest.approx(3 * steps, rel=0.01)
    small = {k: Cases(2, 1, 1) for k in cases}
    fewer = count_units(load_params(REHEARSAL), small, 5.7, (336, 336, 336), 20)
    assert units.keys() == fewer.keys()
    assert all(units[k][1] > fewer[k][1] > 0 for k in units)
    assert (cases["radgenome"].train + cases["radgenome"].val, cases["radgenome"].test) == (
        p.cohorts["radgenome"].train_volumes,
        1_564,
    )


def test_a_task_without_predictions_is_named(tmp_path):
    names = ["classify_ct_rate", "zero_shot_own", "external_segment_covid_ct_seg"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(dict(study=dict(tasks=names))))
    found = dict(classify=names[:1] * 2, segment=[f"{names[2]}_lung"])
    for folder, tasks in found.items():
        (tmp_path / "runs" / folder).mkdir(parents=True)
        table = pd.DataFrame(dict(task=tasks))
        table.to_parquet(tmp_path / "runs" / folder / "predictions.parquet")
    script = load_script(TOP / "benchmarks/rehearsal.py")
    assert script.tasks_without_predictions(tmp_path) == [names[1], f"{names[2]}_lesion"]
