"What the tests share: where the tree is"

from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PAGES = sorted(
    p
    for p in (TOP / "nbs").rglob("*.ipynb")
    if "stages" not in p.parts and ".ipynb_checkpoints" not in p.parts
)
STAGES = sorted((TOP / "nbs/stages").glob("*.ipynb"))

FIRST = [
    "test_study.py",
    "test_pages.py",
    "test_study_data.py",
]  # the longest files: one worker makes the smoke study while the other runs pages; the second file on it finds it made


def pytest_collection_modifyitems(items):
    "The longest files first: the short ones fill what is left of either worker's time"
    items.sort(key=lambda i: FIRST.index(i.path.name) if i.path.name in FIRST else len(FIRST))
