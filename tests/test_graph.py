"The graph: what a stage declares is what it reaches"

import ast
import json

import grimp
import pytest
import yaml
from conftest import STAGES, TOP

from asap.params import CohortName, CohortsConfig

GRAPH = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
REACH = grimp.build_graph("asap")


def body(name):
    return GRAPH[name].get("do", GRAPH[name])


def modules(stage) -> set[str]:
    "Modules of asap that a stage's notebook imports, directly or through others"
    code = "\n".join(
        "".join(c["source"])
        for c in json.loads(stage.read_text())["cells"]
        if c["cell_type"] == "code"
    )
    direct = set()
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.ImportFrom):
            direct |= {n.module, *(f"{n.module}.{a.name}" for a in n.names)}
        if isinstance(n, ast.Import):
            direct |= {a.name for a in n.names}
    direct &= REACH.modules
    reached = direct.union(*(REACH.find_upstream_modules(m) for m in direct))
    return {m for m in reached if (TOP / f"{m.replace('.', '/')}.py").exists()}


COHORTS = {m for m in REACH.modules if m.startswith("asap.data.cohorts.")}
ADAPTERS = dict(
    synthesize={f"{m.replace('.', '/')}.py" for m in COHORTS},
    prepare={"asap/data/cohorts/${item}.py"},
)  # stages that import them by name


def files(stage) -> set[str]:
    "What a stage reaches, as files; with what adapters reach where it imports them by name"
    found = modules(stage)
    if stage.stem in ADAPTERS:
        found = found.union(*(REACH.find_upstream_modules(m) for m in COHORTS))
    return {
        f"{m.replace('.', '/')}.py" for m in found if (TOP / f"{m.replace('.', '/')}.py").exists()
    } | ADAPTERS.get(stage.stem, set())


def test_the_cohorts_of_the_study_are_the_pages():
    "Params, adapters and pages name the same data sets"
    pages = {p.stem for p in (TOP / "nbs/2_data/cohorts").glob("*.ipynb")}
    assert pages == {m.rsplit(".", 1)[1] for m in COHORTS}
    assert (
        pages - {"rex_grounding_ct"} == set(CohortsConfig.model_fields) == set(CohortName.__args__)
    ), "masks beside ct_rate are no cohort"


def test_every_stage_has_its_notebook():
    assert {p.stem for p in STAGES} == set(GRAPH)


@pytest.mark.parametrize("stage", STAGES, ids=lambda p: p.stem)
def test_deps_cover_what_a_stage_reaches(stage):
    declared = {d for d in body(stage.stem)["deps"] if d.startswith("asap/")}
    assert declared == files(stage), (
        f"missing {sorted(files(stage) - declared)}, not needed {sorted(declared - files(stage))}"
    )
    assert f"nbs/stages/{stage.name}" in body(stage.stem)["deps"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda p: p.stem)
def test_a_stage_reads_params_by_its_name(stage):
    code = "\n".join(
        "".join(c["source"])
        for c in json.loads(stage.read_text())["cells"]
        if c["cell_type"] == "code"
    )
    if body(stage.stem).get("params"):
        assert "params(stage)" in code
    assert "load_params" not in code and "params()" not in code, (
        "a stage reads what it declares, through params(stage)"
    )
