"What tutorials tell to write down by hand: it parses, and names what is there"

import ast
import json
import re

import pytest
import yaml
from conftest import TOP

from asap.params import SECTIONS, load_params, section_type
from asap.registry import all_tasks

HOW_TO = sorted((TOP / "nbs/tutorials").glob("*.ipynb"))


def prose(name) -> str:
    return "\n".join(
        "".join(c["source"])
        for c in json.loads((TOP / f"nbs/tutorials/{name}.ipynb").read_text())["cells"]
        if c["cell_type"] == "markdown"
    )


def code(name) -> str:
    return "\n".join(
        "".join(c["source"])
        for c in json.loads((TOP / f"nbs/tutorials/{name}.ipynb").read_text())["cells"]
        if c["cell_type"] == "code"
    )


def fenced(text, kind) -> list:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    links = [a for a in re.findall(r"\]\(([^)#]+)\)", prose(page.stem)) if not a.startswith("http")]
    assert not [a for a in links if not (page.parent / a).exists()]


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_params_as_written_are_params(page):
    "A block of YAML with sections of params.yaml, laid over it, is accepted; encoders and rows are the reader's own"
    for block in fenced(prose(page.stem), "yaml"):
        part = yaml.safe_load(block)
        if not set(part) <= set(SECTIONS):
            continue
        raw = yaml.safe_load((TOP / "params.yaml").read_text())
        for section, keys in part.items():
            assert set(keys) <= set(raw[section]) or section == "arms", (section, keys)


def test_every_how_to_says_what_is_invented():
    for p in HOW_TO:
        assert re.search(r"phantom|invented|real people", prose(p.stem)), p.stem


def test_an_ablations_row_is_accepted(tmp_path):
    raw, part = (
        yaml.safe_load((TOP / "params.yaml").read_text()),
        next(yaml.safe_load(b) for b in fenced(prose("ablation"), "yaml")),
    )
    raw["study"]["arms"] = [*raw["study"]["arms"], "asap_more_organs"]
    raw["arms"] |= part["arms"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    row = load_params(tmp_path / "params.yaml").arms["asap_more_organs"]
    assert (
        row.model_dump() | dict(organs=1)
        == load_params(TOP / "params.yaml").arms["asap"].model_dump()
    ), "it differs from asap in one number"


def test_a_new_tasks_stage_fits_the_graph():
    "The stage as written: what it reads is made by somebody, declared and imported"
    graph, new = (
        yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"],
        yaml.safe_load(fenced(prose("new_task"), "yaml")[-1])["measure"],
    )
    made = {
        str(next(iter(o)) if isinstance(o, dict) else o).split("/${")[0]
        for s in graph.values()
        for o in s.get("do", s).get("outs", [])
    }
    for d in new["deps"]:
        assert d in made or "measure" in d or d == "mine/lungs.csv", d
    text = fenced(prose("new_task"), "python")[0]
    ast.parse(text)
    read = {m for m in re.findall(r"\bp\.(\w+\.\w+)", text)}
    assert read == set(new["params"]) and all(
        k.split(".")[1] in section_type(k.split(".")[0]).model_fields for k in read
    )
    assert "def run(cohort" in code("new_task") and "def answers(" in code("new_task")


def test_what_a_new_cohort_or_task_is_called_is_not_taken():
    assert (
        "measure_own" not in all_tasks()
        and not (TOP / "nbs/2_data/cohorts/riverside.ipynb").exists()
    )
