"What the tests share: where the tree is"
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (TOP/"nbs").rglob("*.ipynb") if "stages" not in p.parts and ".ipynb_checkpoints" not in p.parts)
STAGES = sorted((TOP/"nbs/stages").glob("*.ipynb"))

def pytest_collection_modifyitems(items):
    "The longest file first: with two workers, one runs the study while the other runs the rest"
    items.sort(key=lambda i: i.path.name != "test_study.py")
