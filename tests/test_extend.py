"Extensions of the study: which files a person edits for each, and that the result runs"

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import TOP
from project_files import project_files

from asap import registry
from asap.params import load_params
from asap.registry import task_families

LEFT_OUT = ("weights/", "benchmarks/", "nbs/images/", "nbs/tutorials/", "asap/inference/niivue/")


class Tree:
    "A copy of the project in git, in which files are edited as a person would"

    def __init__(self, folder, forks):
        self.folder = folder
        self.env = forks | dict(PYTHONPATH=str(folder), ASAP_ROOT=str(folder))
        self.edited: set[str] = set()

    def git(self, *words) -> str:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        call = ["git", *identity, *words]
        return subprocess.run(
            call, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert text.count(old) == 1, (name, old, text.count(old))
        self.write(name, text.replace(old, new))

    def touched(self) -> set[str]:
        "Files that differ from the last commit, before anything is generated"
        status = self.git("status", "--porcelain", "-uall")
        return {line[3:] for line in status.splitlines()}

    def run(self, *exports: str, code: str = "") -> str:
        "Export pages, run `asap params` and `asap graph`, then some code; its output"
        lines = [f"nb_export({page!r}, lib_path='asap')" for page in exports]
        program = "\n".join(
            [
                "from nbdev.export import nb_export",
                *lines,
                "from asap.cli import main",
                "assert main(['params']) == 0 and main(['graph']) == 0",
                "from asap.params import load_params",
                code,
            ]
        )
        done = subprocess.run(
            [sys.executable, TOP / "tests/stand_in.py", "-c", program],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory, forks):
    if not shutil.which("git"):
        pytest.skip("needs git: the edited files are compared with a commit")
    tree = Tree(tmp_path_factory.mktemp("extend"), forks)
    for name in project_files():
        if not name.startswith(LEFT_OUT):
            to = tree.folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes((TOP / name).read_bytes())
    tree.git("init", "-q")
    tree.git("add", "-A")
    tree.git("commit", "-qm", "start")
    return tree


@pytest.fixture
def tree(copy):
    yield copy
    copy.git("reset", "-q", "--hard")
    copy.git("clean", "-fdq")


def notebook(title: str, module: str, *cells: str) -> str:
    "A page; the first exported cell is its imports"
    sources = [f"#| default_exp {module}" if module else "", *cells]
    code = [
        dict(
            cell_type="code",
            id=f"cell{n:04}",
            metadata={},
            execution_count=None,
            outputs=[],
            source=source.strip().splitlines(keepends=True),
        )
        for n, source in enumerate(sources)
        if source
    ]
    head = dict(cell_type="markdown", id="title001", metadata={}, source=[f"# {title}"])
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    return json.dumps(dict(cells=[head, *code], metadata=kernel, nbformat=4, nbformat_minor=5))


def test_a_number_is_its_schema_and_its_value(tree):
    tree.edit(
        "nbs/9_study/90_tables.ipynb",
        '    "    n_bootstrap: Annotated[int, Field(ge=20)]',
        '    "    num_digits: Annotated[int, Field(ge=1)]\\n",\n'
        '    "    n_bootstrap: Annotated[int, Field(ge=20)]',
    )
    tree.edit("params.yaml", "\ntables:\n", "\ntables:\n  num_digits: 3\n")
    assert tree.touched() == {"nbs/9_study/90_tables.ipynb", "params.yaml"}
    tree.run("nbs/9_study/90_tables.ipynb", code="assert load_params().tables.num_digits == 3")


ENCODER = """
import torch


class Mean:
    def forward_features(self, x):
        return x.flatten(1).mean(1)[:, None, None].expand(-1, 2, 4)
"""


def test_an_encoder_is_one_line(tree):
    tree.write("mine.py", ENCODER)
    row = '    mine: {factory: "mine:Mean", code: mine.py}\n'
    tree.edit("params.yaml", "  encoders:", f"  encoders:\n{row}#")
    assert tree.touched() == {"mine.py", "params.yaml"}
    tree.run(
        code="""
import torch
from dvc.repo import Repo
from asap.pretrain.embed import encoder_from_factory
encoder = encoder_from_factory(load_params().study.encoders["mine"].factory)
assert encoder.forward_features(torch.zeros(2, 1, 4, 4, 4)).shape == (2, 2, 4)
with Repo() as repo:
    stage = next(s for s in repo.index.stages if s.addressing == "encode@mine")
    assert "mine.py" in [d.def_path for d in stage.deps]
"""
    )


needs_families = pytest.mark.skipif(not task_families(), reason="no task family is registered")


@needs_families
def test_a_task_of_a_family_is_a_line_of_its_page(tree):
    page = "nbs/7_tasks/71_classify.ipynb"
    line = r'    "    Task(\"classify_own\", \"own\", \"auc\"),\n",'
    tree.edit(page, '    "TASKS = (\\n",', f'    "TASKS = (\\n",\n{line}')
    tree.edit("params.yaml", "[classify_ct_rate,", "[classify_own, classify_ct_rate,")
    assert tree.touched() == {page, "params.yaml"}
    tree.run(
        page,
        code="""
from asap.registry import get_task
assert get_task("classify_own").cohort == "own"
assert "classify_own" in load_params().study.tasks
""",
    )


FAMILY_IMPORTS = """
#| export
import pandas as pd

from asap.registry import Task, TaskFamily, register_family
"""
FAMILY = """
#| export
@register_family
class Age(TaskFamily):
    "Age of the patient from frozen features"

    name = "age"
    title = "Age"
    tasks = (Task("age_own", "own", "error"),)
    reads = ("study.arms", "study.tasks")
    needs = ("build/cohorts", "runs/embed")

    def run(self, ages):
        return pd.DataFrame(dict(task="age_own", probability=ages))
"""
STAGE = """
from asap.core import project_root, write_parquet
from asap.params import load_stage_params
from asap.tasks.age import Age

p = load_stage_params(stage)
write_parquet(Age().run([60.0]), project_root() / "runs/age/predictions.parquet")
"""


@needs_families
def test_a_family_is_a_page_and_a_stage(tree):
    page, stage = "nbs/7_tasks/79a_age.ipynb", "nbs/stages/age.ipynb"
    tree.write(page, notebook("Age", "tasks.age", FAMILY_IMPORTS, FAMILY))
    tree.write(stage, notebook("Age", "", 'stage = "age"', STAGE))
    tree.edit("params.yaml", "[classify_ct_rate,", "[age_own, classify_ct_rate,")
    assert tree.touched() == {page, stage, "params.yaml"}
    tree.run(
        page,
        code="""
import yaml
from asap import registry
from asap.params import load_params
from asap.registry import task_families
stages = yaml.safe_load(open("dvc.yaml"))["stages"]
assert stages["age"]["outs"] == ["runs/age/predictions.parquet", "runs/age/metrics.json"]
assert stages["age"]["params"] == ["study.arms", "study.tasks"]
assert "asap/tasks/age.py" in stages["age"]["deps"]
for name in ("tables", "figures", "page"):
    assert "asap/tasks/age.py" in stages[name]["deps"]
assert "runs/age" in stages["tables"]["deps"]
assert [n for n, s in stages.items() if "asap/tasks/age.py" in s.get("do", s)["deps"]] == [
    "age", "tables", "figures", "page"]
assert len(task_families()["age"].run([60, 70])) == 2
""",
    )


COHORT_IMPORTS = """
#| export
from pathlib import Path

import pandas as pd

from asap.core import Quarantine
from asap.data.adapter import CohortAdapter, register_cohort
from asap.data.table import check_table, cohort_row
"""
COHORT = """
#| export
@register_cohort
class Riverside(CohortAdapter):
    "Scans of a hospital, one file a patient"

    name = "riverside"

    def read(self, root):
        files = sorted(Path(root).glob("*.nii"))
        rows = [cohort_row(f.stem, f, "test") for f in files]
        return check_table(pd.DataFrame(rows), self.name), Quarantine()
"""


def test_a_cohort_is_a_page(tree):
    page = "nbs/2_data/cohorts/riverside.ipynb"
    tree.write(page, notebook("Riverside", "data.cohorts.riverside", COHORT_IMPORTS, COHORT))
    tree.edit("params.yaml", "    [ct_rate, stoic, rad", "    [riverside, ct_rate, stoic, rad")
    tree.edit("params.yaml", "\ncohorts:", "\ncohorts:\n  riverside:     {split_files: null}\n#")
    counts = (tree.folder / "tests/cohorts.csv").read_text()
    tree.write("tests/cohorts.csv", counts + "riverside,2,2,0,0,2,0,0,0,0,\n")
    assert tree.touched() == {page, "params.yaml", "tests/cohorts.csv"}
    out = tree.run(
        page,
        code="""
import tempfile
from pathlib import Path
from asap.data.adapter import get_cohort
raw = Path(tempfile.mkdtemp())
for name in ("a.nii", "b.nii"):
    (raw / name).touch()
table, left_out = get_cohort("riverside").read(raw)
print("cases:", *table.case)
""",
    )
    assert re.search(r"cases: a b$", out, re.M)


def test_what_is_installed_is_read_once(monkeypatch):
    "Each task that params name is looked up: reading all that is installed for each took a second"
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [])
    registry._external_modules.cache_clear()
    load_params()
    load_params()
    registry._external_modules.cache_clear()
    assert asked == ["asap.task_families"]
