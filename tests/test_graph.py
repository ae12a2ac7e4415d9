"The graph: dvc.yaml is fresh, and an edit reruns what it changes and nothing else"

import ast
import json

import pytest
import yaml
from conftest import STAGES, TOP

from asap.data.adapter import available_adapters, available_cohort_names, get_cohort
from asap.graph import import_graph, update_graph
from asap.registry import task_families

GRAPH = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
COHORTS = {m for m in import_graph().modules if m.startswith("asap.data.cohorts.")}
RESULTS = {"tables", "figures", "page"}


def body(name):
    return GRAPH[name].get("do", GRAPH[name])


def stages_with(dep: str) -> set[str]:
    return {name for name in GRAPH if dep in body(name)["deps"]}


def test_the_graph_is_fresh():
    text = (TOP / "dvc.yaml").read_text()
    assert update_graph(text, TOP) == text, "dvc.yaml is stale: run `make graph`"


def test_lines_are_short_and_lists_are_blocks():
    lines = (TOP / "dvc.yaml").read_text().splitlines()
    assert not [n for n, line in enumerate(lines, 1) if len(line) > 100]
    assert not [line for line in lines if line.strip().startswith(("deps: [", "params: ["))]


def test_no_dependency_twice():
    assert not [n for n in GRAPH if len(set(body(n)["deps"])) < len(body(n)["deps"])]


def test_the_cohorts_of_the_study_are_the_pages():
    "Adapters and pages name the same data sets"
    pages = {p.stem for p in (TOP / "nbs/2_data/cohorts").glob("*.ipynb")}
    assert pages == {m.rsplit(".", 1)[1] for m in COHORTS} == set(available_adapters())
    assert all(get_cohort(n).name == n for n in pages)
    assert pages - {"rex_grounding_ct"} == set(available_cohort_names())


def test_only_synthesize_depends_on_the_phantom():
    "An edit of the phantom must not rerun what reads real data"
    phantom = {d for name in GRAPH for d in body(name)["deps"] if d.startswith("asap/phantom/")}
    assert phantom and set.union(*map(stages_with, phantom)) == {"synthesize"}
    for f in (TOP / "asap/data").rglob("*.py"):
        if f.name != "synthesize.py":
            top = [n for n in ast.parse(f.read_text()).body if isinstance(n, ast.ImportFrom)]
            assert not [n.module for n in top if "phantom" in (n.module or "")], f


SUPPORT = {"report": {"report_blind"}, "vqa": {"language"}}  # baseline, language model


@pytest.mark.parametrize("name", task_families())
def test_an_edit_of_a_family_reruns_that_family_and_the_results(name):
    module = type(task_families()[name]).__module__
    page = f"{module.replace('.', '/')}.py"
    together = {n for n, f in task_families().items() if type(f).__module__ == module}
    assert {name, *RESULTS} <= stages_with(page) <= {*together, *RESULTS, *SUPPORT.get(name, ())}


def test_every_stage_has_its_notebook():
    assert {p.stem for p in STAGES} == set(GRAPH)


@pytest.mark.parametrize("stage", STAGES, ids=lambda p: p.stem)
def test_a_stage_reads_params_by_its_name(stage):
    code = "\n".join(
        "".join(c["source"])
        for c in json.loads(stage.read_text())["cells"]
        if c["cell_type"] == "code"
    )
    if body(stage.stem).get("params"):
        assert "load_stage_params(stage)" in code
    assert " load_params" not in code, "a stage reads what it declares, by load_stage_params(stage)"


def test_what_an_encoder_writes_are_outputs_of_its_stage():
    "Reports, questions and segmentation read them, so their stages come after it"
    stages = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
    listed = stages["encode"]["do"]["outs"]  # names, and {name: options}
    outs = {(o if isinstance(o, str) else next(iter(o))).replace("key", "item") for o in listed}
    assert set(stages["report"]["do"]["deps"]) & outs == {"build/tokens/${item}"}
    for stage, folder in (("vqa", "build/tokens"), ("segment", "runs/pretrain")):
        assert folder in stages[stage]["do"]["deps"]
        assert any(o.startswith(f"{folder}/") for o in outs)
