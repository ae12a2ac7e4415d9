"The site that `make docs` builds: links, formulas, API reference, and nothing from a network"

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api
import pytest
from browser import CHROMIUM, tab
from conftest import PAGES, TOP
from markdown import markdown


class Page(HTMLParser):
    "Ids, links and what is loaded, of one page; text outside of code"

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.text, self.inside = set(), [], [], [], []
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag in ("pre", "code", "script", "style"):
            self.inside.append(tag)
        for k in ("href", "src"):
            if a.get(k) is not None and a.get("rel") != "canonical":
                (self.links if tag == "a" else self.loads).append(a[k])

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "-q", "--strict", "-d", out],
        cwd=TOP,
        capture_output=True,
        text=True,
        env=os.environ | dict(NO_MKDOCS_2_WARNING="1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {p: Page(p) for p in site.rglob("*.html")}


def test_every_notebook_is_a_page(site):
    assert [
        p for p in PAGES if not (site / p.relative_to(TOP / "nbs").with_suffix(".html")).exists()
    ] == []


def test_every_public_name_is_in_the_reference(site, pages):
    missing = []
    for module, path in api.modules().items():
        page = pages[site / f"api/{module}.html"]
        names = api.public_names(ast.parse(path.read_text(encoding="utf8")))
        missing += [f"{module}.{name}" for name in names if name not in page.ids]
        back = site / Path(api.notebook(path)).relative_to("nbs").with_suffix(".html")
        if not any(link.endswith(f"api/{module}.html") for link in pages[back].links):
            missing.append(f"{back.name} has no link to {module}")
    assert not missing, missing
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf8"))
    assert "api/asap.core.html#atomic_write" in {d["location"] for d in index["docs"]}


def test_reference_of_a_function():
    source = """
def f(
    x: int,  # of `y`
    *,
    size=(1, 2),  # voxels
) -> str:  # joined
    "Join <both>"
    return ""
"""
    function = ast.parse(source).body[0]
    assert api.arguments(function, source) == [
        api.Argument("x", "int", "", "of `y`"),
        api.Argument("size", "", "(1, 2)", "voxels"),
    ]
    assert api.returned(function, source) == api.Argument("returns", "str", "", "joined")
    text = api.section("f", function, source)
    assert "{ #f }" in text and "Join &lt;both&gt;" in text and "of <code>y</code>" in text


def test_no_link_is_broken(pages):
    bad = []
    for page, it in pages.items():
        if page.name == "404.html":
            continue  # served from anywhere, its links begin at the top
        for link in {*it.links, *it.loads}:
            s = urlsplit(link)
            if s.scheme or s.netloc:
                continue
            to = (page.parent / unquote(s.path)).resolve() if s.path else page
            if not to.is_file():
                bad.append(f"{page.name}: {link}")
            elif s.fragment and to in pages and unquote(s.fragment) not in pages[to].ids:
                bad.append(f"{page.name}: {link} (no such place on that page)")
    assert not bad, bad


def test_nothing_is_loaded_from_a_network(site, pages):
    assert {
        address
        for it in pages.values()
        for address in it.loads
        if urlsplit(address).scheme not in ("", "data") or urlsplit(address).netloc
    } == set()
    for f in site.rglob("*.css"):
        assert not re.search(
            r"(?:@import|url\()\s*['\"(]*\s*(?:https?:)?//", f.read_text(encoding="utf8")
        ), f


def test_formulas_are_read(pages):
    assert not [
        (p.name, t.strip()[:80])
        for p, it in pages.items()
        for t in it.text
        if "$$" in t or re.search(r"\\(?:frac|sum|text|mathrm)\b", t)
    ]
    assert sum("<math" in p.read_text() for p in pages) >= 5


def test_nothing_is_shown_that_only_a_program_reads(site):
    for page in site.rglob("*.html"):
        shown = re.sub(r"<code>#\|.*?</code>", "", page.read_text(encoding="utf8"))
        assert not re.search(r"(?m)^#\|\s?\w|>#\|\s?(export|eval|hide|default_exp)", shown), page
        assert "{ #" not in "".join(Page(page).text), page


def test_a_link_that_leads_nowhere_is_said(caplog):
    import docs

    docs.pages.update(
        {"nbs/a/x.ipynb": "a/x.html", "nbs/a/y.ipynb": "a/y.html", "nbs/index.ipynb": "index.html"}
    )

    def see(link, source="nbs/a/x.ipynb", here="a/x.html"):
        return docs.linked(f'<a class="z" href="{link}">', source, here).split('"')[3]

    assert (
        see("y.ipynb#part"),
        see("../../params.yaml"),
        see("../a"),
        see("https://x.org"),
        see("#here"),
    ) == ("y.html#part", "../files/params.yaml", "y.html", "https://x.org", "#here")
    assert (
        see("nbs/a/x.ipynb", "nbs/index.ipynb", "index.html") == "a/x.html" and not caplog.records
    )
    assert see("gone.ipynb") == "gone.ipynb" and "gone.ipynb leads nowhere" in caplog.text
    caplog.clear()
    docs.formulas("<p>$a \\nonsense b$ and <code>$HOME$</code> at $5</p>", "x")
    assert "\\nonsense" in caplog.text and len(caplog.records) == 1


def test_tutorials_come_first_then_the_book_then_the_reference():
    import docs

    menu = docs.contents(TOP / "nbs")
    assert [next(iter(x)) for x in menu] == ["Overview", "Tutorials", "The book", "API reference"]
    tutorials = menu[1]["Tutorials"]
    order = [Path(next(iter(x.values()))).stem for x in tutorials]
    path = ["000_tour", "one_scan", "own_hospital", "ablation", "own_encoder", "cluster"]
    assert order[:2] == path[:2] and [n for n in order if n in path] == path
    names, titles = [], []

    def walk(items):
        for item in items:
            for text, at in item.items() if isinstance(item, dict) else [("", item)]:
                titles.append(text)
                walk(at) if isinstance(at, list) else names.append(at)

    walk(menu)
    here = [p.relative_to(TOP / "nbs").as_posix() for p in (TOP / "nbs").rglob("*.ipynb")]
    wanted = {n for n in here if ".ipynb_checkpoints" not in n}
    assert wanted == {n for n in names if n.endswith(".ipynb")} and len(names) == len(set(names))
    words = [x for x in titles if x and not x.startswith("asap.")]
    assert not [x for x in words if "_" in x or x[0].isdigit() or x[0].islower()]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found on this machine")
def test_no_line_of_code_is_cut(site):
    "At 1,300 pixels; in every tenth page, those with the longest lines, README and tutorials"
    chosen = [*PAGES[::10], *(p for p in PAGES if p.parent.name == "tutorials")]
    chosen += [TOP / f"nbs/{n}.ipynb" for n in ("9_study/93_page", "98_cli", "index")]
    with tab() as t:
        size = dict(width=1300, height=800, deviceScaleFactor=1, mobile=False)
        t.call("Emulation.setDeviceMetricsOverride", **size)
        for page in chosen:
            name = page.relative_to(TOP / "nbs").with_suffix(".html")
            t.open((site / name).as_uri())
            t.until("document.readyState === 'complete' && document.querySelector('.jp-Cell')")
            cut = t.run(
                "Array.from(document.querySelectorAll('.jp-InputArea pre'))"
                ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"
            )
            assert not cut, (name, cut)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found on this machine")
def test_the_readme_is_one_and_a_half_screens(tmp_path):
    "Of 1,300 x 900 pixels, with a column of 980 as GitHub has"
    style = "body { width: 980px; font: 16px/1.5 sans-serif } pre { font: 13.6px/1.45 monospace }"
    text = (TOP / "README.md").read_text(encoding="utf8")
    body = markdown(text, extensions=["fenced_code", "tables"])
    head = f"<base href='{TOP.as_uri()}/'><style>{style} h1 {{ margin: 0 }}</style>"
    (tmp_path / "readme.html").write_text(head + body, encoding="utf8")
    with tab() as t:
        size = dict(width=1300, height=900, deviceScaleFactor=1, mobile=False)
        t.call("Emulation.setDeviceMetricsOverride", **size)
        t.open((tmp_path / "readme.html").as_uri())
        t.until("document.readyState === 'complete' && document.images.length")
        assert t.run("Array.from(document.images).every(i => i.naturalWidth)")
        assert t.run("document.documentElement.scrollHeight") <= 1.5 * 900


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found on this machine")
def test_from_disk_with_search(site):
    with tab() as t:
        t.call("Emulation.setFocusEmulationEnabled", enabled=True)
        t.open((site / "9_study/92_grounding.html").as_uri())
        t.until("document.readyState === 'complete' && document.querySelector('iframe')")
        t.run(
            "document.querySelector('label[for=__search]').click();"
            " document.querySelector('.md-search__input').focus()"
        )
        t.call("Input.insertText", text="pointing game")
        t.run(
            "document.querySelector('.md-search__input')"
            ".dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}))"
        )
        t.until(
            "document.querySelector('.md-search-result').innerText.includes('matching document')"
        )
        assert [
            u for u in t.requests if not u.startswith(("file:", "data:"))
        ] == [] and t.complaints == []
