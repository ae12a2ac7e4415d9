"The graph: what a stage declares is what it reaches"

import ast
import json
from pathlib import Path

import grimp
import pytest
import yaml
from conftest import STAGES, TOP

from asap.data.adapter import available_adapters, available_cohort_names, get_cohort
from asap.tasks.segment import SEGMENTATION_TASKS

GRAPH = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"]
REACH = grimp.build_graph("asap")
READ = grimp.build_graph("asap")  # without what only the writers of phantoms import
for found in READ.find_matching_direct_imports(
    import_expression="asap.data.cohorts.* -> asap.phantom.*"
):
    READ.remove_import(importer=found["importer"], imported=found["imported"])


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
    graph = REACH if stage.stem == "synthesize" else READ
    direct &= graph.modules
    reached = direct.union(*(graph.find_upstream_modules(m) for m in direct))
    return {m for m in reached if (TOP / f"{m.replace('.', '/')}.py").exists()}


COHORTS = {m for m in REACH.modules if m.startswith("asap.data.cohorts.")}
ADAPTERS = dict(
    synthesize={f"{m.replace('.', '/')}.py" for m in COHORTS},
    prepare={"asap/data/cohorts/${item}.py"},
    segment={f"asap/data/cohorts/{t.cohort}.py" for t in SEGMENTATION_TASKS},
)  # stages that import them by name


def templates(names) -> set[str]:
    "Folders of the templates that modules render"
    return {
        f"{Path(f).parent.as_posix()}/templates"
        for f in names
        if "PackageLoader" in (TOP / f).read_text()
    }


def files(stage) -> set[str]:
    "What a stage reaches, as files; with what adapters reach where it imports them by name"
    found = modules(stage)
    if stage.stem in ADAPTERS:
        graph = REACH if stage.stem == "synthesize" else READ
        named = {f.removesuffix(".py").replace("/", ".") for f in ADAPTERS[stage.stem]}
        named = named if named <= COHORTS else COHORTS
        found = found.union(*(graph.find_upstream_modules(m) for m in named))
    names = {
        f"{m.replace('.', '/')}.py" for m in found if (TOP / f"{m.replace('.', '/')}.py").exists()
    }
    return names | templates(names) | ADAPTERS.get(stage.stem, set())


def test_the_cohorts_of_the_study_are_the_pages():
    "Adapters and pages name the same data sets"
    pages = {p.stem for p in (TOP / "nbs/2_data/cohorts").glob("*.ipynb")}
    assert pages == {m.rsplit(".", 1)[1] for m in COHORTS} == set(available_adapters())
    assert all(get_cohort(n).name == n for n in pages)
    assert pages - {"rex_grounding_ct"} == set(available_cohort_names())


def test_only_writers_import_the_phantom():
    "An edit of the phantom must not rerun what reads real data: imports within functions alone"
    for f in (TOP / "asap/data").rglob("*.py"):
        if f.name == "synthesize.py":
            continue
        top = [n for n in ast.parse(f.read_text()).body if isinstance(n, ast.ImportFrom)]
        assert not [n.module for n in top if "phantom" in (n.module or "")], f


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
