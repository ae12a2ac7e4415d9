"What the tests share: where the tree is"

from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PAGES = sorted(
    p
    for p in (TOP / "nbs").rglob("*.ipynb")
    if "stages" not in p.parts and ".ipynb_checkpoints" not in p.parts
)
STAGES = sorted((TOP / "nbs/stages").glob("*.ipynb"))

# The longest files: one worker runs the smoke study while the other runs pages; the second file
# that uses the study finds it ready
FIRST = [
    "test_study.py",
    "test_pages.py",
    "test_study_data.py",
]


def pytest_collection_modifyitems(items):
    "The longest files first: the short ones fill what is left of either worker's time"
    items.sort(key=lambda i: FIRST.index(i.path.name) if i.path.name in FIRST else len(FIRST))
