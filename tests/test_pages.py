"Every page runs from top to bottom, its checks hold, and what it stores is what it prints today"

import base64
import io
import json

import pages
import pytest
from conftest import PAGES, TOP
from PIL import Image


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda p: p.relative_to(TOP / "nbs").with_suffix("").as_posix()
)
def test_page(page, tmp_path):
    run = pages.process(page, TOP, tmp_path / "log")
    run.start()
    run.join(600)
    late = run.is_alive()
    if late:
        run.kill()
        run.join()
    assert run.exitcode == 0, (
        f"{'stopped after ten minutes' if late else f'exit code {run.exitcode}'}: "
        f"{(tmp_path / 'log').read_text(errors='replace')[-12000:]}"
    )


# The comparison


def prints(text):
    return {"output_type": "stream", "name": "stdout", "text": text.splitlines(True)}


def shows(**data):
    mimes = {"plain": "text/plain", "html": "text/html", "png": "image/png", "svg": "image/svg+xml"}
    held = {mimes[k]: v for k, v in data.items()}
    return {"output_type": "display_data", "data": held, "metadata": {}}


def table(*cells):
    row = "".join(f"<td>{c}</td>" for c in cells)
    return shows(html=f"<style>#T_1 {{}}</style><table><tr>{row}</tr></table>", plain="a table")


def picture(*wide_high):
    file = io.BytesIO()
    Image.new("L", wide_high).save(file, "png")
    return shows(png=base64.b64encode(file.getvalue()).decode(), plain=f"<Figure {wide_high}>")


def drawing(width, height):
    return shows(svg=f'<svg width="{width}" viewBox="0 0 9 9" height="{height}"><path/></svg>')


TREE = "<tree object at 0x7f01>"


@pytest.mark.parametrize(
    "stored, now",
    [
        ([], [prints("what is not stored is not compared")]),
        ([prints("Dice 0.8312\n")], [prints("Dice   0.8313")]),
        ([prints("one\n"), prints("two\n")], [prints("one\ntwo\n")]),
        ([prints("one")], [{**prints("a warning"), "name": "stderr"}, prints("one")]),
        ([shows(plain="array([ 1., -0., 2e-9])")], [shows(plain="array([1., 0.,\n 3e-8])")]),
        ([shows(plain=TREE)], [shows(plain=TREE.replace("7f01", "55aa"))]),
        ([table("lung", "0.5000")], [table(" lung ", "<b>0.5001</b>")]),
        ([picture(200, 100)], [picture(206, 97)]),
        ([drawing(200, 100)], [drawing("204pt", 100)]),
        ([prints("a"), table("b"), picture(9, 9)], [prints("a"), table("b"), picture(9, 9)]),
    ],
)
def test_equal(stored, now):
    assert pages.difference(stored, now) is None


@pytest.mark.parametrize(
    "stored, now, what",
    [
        ([prints("Dice 0.83")], [prints("Dice 0.84")], "0.84"),
        ([prints("1803 scans")], [prints("1804 scans")], "1804 scans"),  # counts are exact
        ([prints("left lung")], [prints("right lung")], "right lung"),
        ([prints("left lung")], [prints("left lung and heart")], "and heart"),
        ([prints("left lung")], [prints("left")], "left"),
        ([shows(plain="tensor(nan)")], [shows(plain="tensor(1.)")], "1."),
        ([table("lung", "0.5")], [table("lung", "0.6")], "| lung | 0.6"),
        ([table("lung", "0.5")], [table("lung 0.5")], "| lung 0.5"),
        ([table("lung"), prints("a")], [prints("a")], "printed text"),
        ([table("lung")], [], "nothing"),
        ([picture(200, 100)], [picture(200, 120)], "picture of 200 x 120 pixels"),
        ([picture(200, 100)], [prints("a")], "printed text"),
        ([drawing(200, 100)], [drawing(250, 100)], "picture of 250 x 100 pixels"),
        ([prints("a")], [prints("a"), picture(9, 9)], "printed text, picture"),
        ([prints("a"), table("b")], [table("b"), prints("a")], "table, printed text"),
    ],
)
def test_different(stored, now, what):
    assert what in pages.difference(stored, now)[1]


def test_volatile():
    "What is tagged `volatile` keeps its kind and nothing else"
    pair = [prints("3.1 seconds")], [prints("4.5 seconds, once")]
    assert pages.difference(*pair) and not pages.difference(*pair, volatile=True)
    assert pages.difference([prints("3.1 s")], [], volatile=True) == ("printed text", "nothing")


# A page of seven cells, checked and refreshed

CELLS = {
    "same": ("print('a'); 1.0001", [prints("a\n"), shows(plain=["1.0"])]),
    "changed": (
        "print('new')\ndisplay('shown')\nprint('later')",
        [prints("old\n"), shows(plain=["'shown'"]), prints("later\n")],
    ),
    "frame": ("import pandas as pd\npd.DataFrame({'a': [1, 2]})", [table("a", "1")]),
    "figure": (
        "import matplotlib.pyplot as plt\nplt.figure(figsize=(3, 2))\nplt.plot([1, 2]);",
        [picture(30, 20)],
    ),
    "silent": ("print('not stored')", []),
    "show": ("print('to be stored')", []),
    "time": ("import time\nprint(time.time())", [prints("1.5\n")]),
}
TAGS = {"time": ["volatile"], "show": ["show"]}


def notebook():
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": ["# Größe"]}] + [
        {
            "cell_type": "code",
            "execution_count": None,
            "id": name,
            "metadata": {"tags": TAGS[name]} if name in TAGS else {},
            "outputs": outputs,
            "source": source.splitlines(True),
        }
        for name, (source, outputs) in CELLS.items()
    ]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def text(content):
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def run(path, refresh=""):
    log = path.with_suffix(".log")
    process = pages.process(path, path.parent, log, refresh)
    process.start()
    process.join(300)
    return process.exitcode, log.read_text()


def test_a_page_is_checked_and_refreshed(tmp_path):
    page = tmp_path / "page.ipynb"
    page.write_text(text(notebook()))
    before = page.read_text()
    code, log = run(page)
    assert code == 1 and page.read_text() == before
    for line in (
        "cell changed:\n  stored: printed text: old",
        "now:    printed text: new",
        "page.ipynb, cell frame:",
        "stored: picture of 30 x 20 pixels",
        "make refresh NB=page.ipynb",
    ):
        assert line in log
    assert not any(f"cell {name}:" in log for name in ("same", "silent", "show", "time"))

    assert run(page, "stale")[0] == 0
    after = json.loads(page.read_text())
    assert page.read_text() == text(after) and "Größe" in page.read_text()
    outputs = {c["id"]: c.pop("outputs", []) for c in after["cells"]}
    old = notebook()
    assert outputs["same"] == CELLS["same"][1] and outputs["silent"] == []
    assert [c.pop("outputs", None) for c in old["cells"]] and old == after
    assert outputs["changed"][0]["text"] == ["new\n"] and len(outputs["changed"]) == 3
    assert outputs["show"] == [prints("to be stored\n")]
    assert [list(o["data"]) for o in outputs["figure"]] == [["image/png", "text/plain"]]
    assert outputs["frame"][0]["execution_count"] is None

    done = page.read_text()
    assert run(page) == (0, "") and run(page, "stale")[0] == 0 and page.read_text() == done


def test_a_page_that_fails_is_not_refreshed(tmp_path):
    page = tmp_path / "page.ipynb"
    page.write_text(text(notebook()).replace("print('a')", "1/0"))
    before = page.read_text()
    code, log = run(page, "always")
    assert code == 1 and page.read_text() == before
    assert "cell same fails" in log and "ZeroDivisionError" in log
