"What the tests share: where the tree is, the order of files, programs that are forks"

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from preloaded import preloaded

TOP = Path(__file__).resolve().parent.parent
PAGES = sorted(
    p
    for p in (TOP / "nbs").rglob("*.ipynb")
    if "stages" not in p.parts and ".ipynb_checkpoints" not in p.parts
)
STAGES = sorted((TOP / "nbs/stages").glob("*.ipynb"))

# The longest files: one worker runs the smoke study while the other runs what follows; the last of
# these uses the study too, and finds it ready
FIRST = [
    "test_study.py",
    "test_docs.py",
    "test_checkpoint.py",
    "test_train.py",
    "test_cohorts.py",
    "test_study_data.py",
]
LAST = "test_pages.py"  # short ones: what fills either worker's time (tests/run.py)


def load_script(path: Path) -> ModuleType:
    "A script that is in no package, such as those of benchmarks/, as a module"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def place(item) -> int:
    name = item.path.name
    return FIRST.index(name) if name in FIRST else len(FIRST) + (name == LAST)


def pytest_collection_modifyitems(items):
    "The longest files first, the pages last"
    items.sort(key=place)


@pytest.fixture(scope="session")
def forks():
    "Environment of programs that tests/stand_in.py runs as forks"
    with preloaded() as env:
        yield env
