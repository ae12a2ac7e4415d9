"Page numbers and imports agree: the contracts of import-linter are the order of the pages"

import json
import re
import tomllib

import pytest
from conftest import TOP

CONTRACTS = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS = {c["containers"][0]: c["layers"] for c in CONTRACTS}


def module(page) -> str | None:
    "The module that a page exports"
    for cell in json.loads(page.read_text())["cells"]:
        if m := re.search(r"^#\s*\|\s*default_exp (\S+)", "".join(cell["source"]), re.M):
            return m[1]
    return None


def exporting(folder) -> list[str]:
    "Modules that the pages of a folder export, by page number"
    return [m for p in sorted(folder.glob("*.ipynb")) if (m := module(p))]


FOLDERS = {
    exporting(f)[0].split(".")[0]: f for f in sorted((TOP / "nbs").glob("[0-9]_*")) if exporting(f)
}


def test_rooms_are_in_the_order_of_the_folders():
    pages = sorted((TOP / "nbs").glob("[0-9][0-9]*_*.ipynb"))
    low = [m for p in pages if p.name.startswith("0") and (m := module(p))]
    high = [m for p in pages if not p.name.startswith("0") and (m := module(p))]
    assert LAYERS["asap"] == [*low, *FOLDERS, *high][::-1]


@pytest.mark.parametrize("room", FOLDERS)
def test_modules_are_in_the_order_of_the_pages(room):
    expected = [m.split(".")[1] for m in exporting(FOLDERS[room])]
    if (FOLDERS[room] / "cohorts").is_dir():  # they build on the protocol, 26_adapter
        expected.insert(expected.index("adapter") + 1, "cohorts")
    assert LAYERS[f"asap.{room}"] == expected[::-1]


def test_every_contract_is_exhaustive():
    missing = [c["name"] for c in CONTRACTS if not c.get("exhaustive")]
    assert not missing, missing
