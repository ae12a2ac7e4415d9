"""The study page as a person reads it: where its numbers come from, what it links to, how wide and
how long it is in a browser. Of the smoke study, and of the finished study where there is one"""

import json
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from browser import CHROMIUM, tab
from conftest import TOP
from smoke import clone as clone

pytestmark = pytest.mark.study

NUMBER = re.compile(r"(?<![\w.])([-+]?\d+(?:\.\d+)?)( ?%)?(?![\w.]*\d)")
RESULT = re.compile(r"(?<![\d.])\d+\.\d{3}(?![\d.]| x )|(?<![\d.])(?!99\.9)\d+\.\d ?%")
NO_RESULTS = ("pre", "style", "title")  # params, versions
SCREEN = 800  # pixels


@pytest.fixture(scope="module", params=["smoke", "full"])
def page(request):
    "The page; a full one only where a study of this version has finished"
    if request.param == "smoke":
        return request.getfixturevalue("clone") / "runs/study/index.html"
    made = TOP / "runs/study/index.html"
    if not made.exists() or 'id="menu"' not in made.read_text(encoding="utf8"):
        pytest.skip("runs/study: no finished study of this version")
    return made


class Cited(HTMLParser):
    "The texts of a page, each with the nearest `data-row` around it"

    def __init__(self, text):
        super().__init__()
        self.stack, self.found, self.goes_on = [], [], False
        self.feed(re.sub(r"base64,[^\"]+", "", text))

    def handle_starttag(self, tag, attrs):
        self.goes_on = tag == "wbr"  # a name breaks here
        if tag not in ("img", "br", "meta", "wbr", "link"):
            self.stack.append((tag, dict(attrs).get("data-row")))

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not any(tag in NO_RESULTS for tag, _ in self.stack):
            rows = [row for _, row in self.stack if row]
            if self.goes_on:
                data = self.found.pop()[0] + data
            self.goes_on = False
            self.found.append((data, rows[-1] if rows else None))


def numbers(values) -> list[float]:
    "The numbers of cells, also those within a text"
    found = []
    for v in values:
        if isinstance(v, str):
            found += [float(x) for x, _ in NUMBER.findall(v)]
        elif isinstance(v, int | float) and not isinstance(v, bool) and not math.isnan(v):
            found.append(float(v))
    return found


def row_reader(folder: Path):  # -> function: data-row -> the numbers of its rows
    table = cache(lambda name: pd.read_csv(folder / "data" / f"{name}.csv"))

    @cache
    def read(address: str) -> tuple[float, ...]:
        name, rows = address.rsplit(":", 1)
        t = table(name)
        if rows in ("mean", "min"):
            return tuple(getattr(t.select_dtypes("number"), rows)())
        records = t.to_dict("records")
        return tuple(x for r in rows.split(",") for x in numbers(records[int(r)].values()))

    return read


def is_in(number: str, percent: str, values) -> bool:
    "Does a printed number equal a value, as rounded on the page?"
    digits = len(number.partition(".")[2])
    scales = (100, 1) if percent else (1,)  # texts of a CSV may hold percentages
    close = 0.5 * 10**-digits
    return any(abs(v * s - float(number)) <= close + 1e-5 * s for v in values for s in scales)


def wrong_numbers(text: str, folder: Path) -> list[str]:
    "Numbers that differ from the rows that they name; results that name no row"
    read, bad = row_reader(folder), []
    for data, address in Cited(text).found:
        if address is None:
            bad += [f"{x}: no source, in {data.strip()[:60]!r}" for x in RESULT.findall(data)]
            continue
        for number, percent in NUMBER.findall(data.replace("95 %", "")):
            if not is_in(number, percent, read(address)):
                bad.append(f"{number}{percent}: not in {address}, {data.strip()[:60]!r}")
    return bad


def test_every_number_is_that_of_its_csv(page):
    text = page.read_text(encoding="utf8")
    cited = [d for d, row in Cited(text).found if row and NUMBER.search(d)]
    assert len(cited) > 300
    assert not (bad := wrong_numbers(text, page.parent)), bad[:20]


def test_a_changed_number_is_found(page):
    text = page.read_text(encoding="utf8")
    first = re.search(r'<td class=n data-row="[^"]+">(?:<b>)?(\d\.\d{3})', text)
    other = f"{(float(first[1]) + 0.503) % 1:.3f}"
    changed = text[: first.start(1)] + other + text[first.end(1) :]
    assert any(other in x for x in wrong_numbers(changed, page.parent))
    assert wrong_numbers(text.replace("<h1>", "<h1>0.123 "), page.parent)


def test_links_lead_to_each_table_figure_and_notebook(page):
    text, folder = page.read_text(encoding="utf8"), page.parent
    links = [
        unquote(a)
        for a in re.findall(r"""<a[^>]+href=["']([^"']+)""", text)
        if not a.startswith(("#", "http", "data:"))
    ]
    assert not [a for a in links if not (folder / a).exists()]
    runs = folder.parent
    tables = [f"data/{f.parent.name}/{f.name}" for f in runs.glob("tables/*.csv")]
    figures = [f"data/figures/{f.stem}.csv" for f in runs.glob("figures/*.png")]
    stages = [f"notebooks/{f.stem}.html" for f in runs.glob("notebooks/*.ipynb")]
    stages.remove("notebooks/page.html")
    wanted = {*tables, *figures, *stages, "notebooks/read_the_study.html"}
    assert tables and figures and stages and not wanted - set(links)
    for caption in re.findall(r"<figcaption>(.*?)</figcaption>", text):
        outlines = "outline" in caption or "reference" in caption  # pictures of masks
        assert outlines or 'class="csv"' in caption, caption
    for anchor in re.findall(r"""href=["']#([^"']+)""", text):
        assert f'id="{anchor}"' in text or f"id='{anchor}'" in text, anchor


def test_what_matters_comes_first(page):
    text = page.read_text(encoding="utf8")
    order = [text.index(f'<section id="{i}"') for i in ("summary", "tasks", "claims", "grounding")]
    assert order == sorted(order)
    summary = text[order[0] : order[1]]
    assert "supervised CNN" in summary and summary.count("<li>") >= 1 and "paired 95 %" in summary
    assert "What" in summary and "<b>Bold</b>" in text[order[1] : order[2]]
    rows = re.findall(r"<tr[^>]*><td class=n>\d+</td>", text[order[1] : order[2]])
    assert rows and text.count('class="n oracle"') == len(rows)


def test_metrics_are_kept_by_task_and_metric(page):
    "Two metrics of one task do not overwrite each other"
    found = json.loads((page.parent / "metrics.json").read_text())
    table = pd.read_csv(page.parent / "data/tables/metrics.csv").query("fraction == 1")
    values = table.set_index(["arm", "task", "metric"]).value
    kept = {
        (arm, task, metric): value
        for arm, tasks in found.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }
    assert kept and all(abs(values[k] - v) < 1e-9 for k, v in kept.items())
    both = {"R@10 image to report", "R@10 report to image"}
    assert both <= set(found["asap"]["retrieve_ct_rate"])


def test_no_red_bars_in_the_notebooks(page):
    bad = {
        f.name: o["text"]
        for f in (page.parent.parent / "notebooks").glob("*.ipynb")
        for c in json.loads(f.read_text(encoding="utf8"))["cells"]
        for o in c.get("outputs", [])
        if o.get("name") == "stderr"
    }
    assert not bad, bad


def test_size(page):
    assert page.stat().st_size < 5e6


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found on this machine")
@pytest.mark.parametrize("width", [1300, 390])
def test_nothing_is_wider_than_the_window(page, width):
    """At 1,300 pixels no table scrolls either, and the page has less than 15 screens; on a phone
    a table scrolls in its own box"""
    with tab() as t:
        size = dict(width=width, height=SCREEN, deviceScaleFactor=1, mobile=False)
        t.call("Emulation.setDeviceMetricsOverride", **size)
        t.open(page.as_uri())
        t.until("document.readyState === 'complete' && document.querySelector('#menu')")
        root = "document.documentElement"
        assert t.run(f"{root}.scrollWidth") <= width
        assert not t.run("document.querySelectorAll('details[open]').length")
        if width > 1000:
            assert t.run(f"{root}.scrollHeight") < 15 * SCREEN
        t.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert t.run(f"{root}.scrollWidth") <= width
        wide = (
            "Array.from(document.querySelectorAll('main *')).filter(e => !e.closest('.wide')"
            " && e.getBoundingClientRect().right > innerWidth + 1)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert not t.run(wide)
        t.run("window.scrollTo({top: 3000, behavior: 'instant'})")
        assert t.run("document.querySelector('#menu').getBoundingClientRect().top") == 0
        assert t.complaints == [] and not [
            u for u in t.requests if not u.startswith(("file:", "data:"))
        ]
