"""What `make docs` adds to mkdocs-jupyter: order and titles, links between pages, MathML, an API
reference.

Notebooks link to notebooks and files by their place in the repository, which is right in
JupyterLab and on a forge. In the site, a link to a notebook becomes a link to its page, a link to a
folder one to its first page, and a linked file is copied into `files/`. Nothing is loaded from a
network.
"""

import functools
import hashlib
import html
import json
import logging
import re
import shutil
from pathlib import Path
from posixpath import join, normpath
from urllib.parse import quote, unquote, urlsplit

import api
import jinja2
from latex2mathml.converter import convert
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url
from nbconvert.exporters import templateexporter

TOP = Path(__file__).resolve().parent.parent
log = logging.getLogger("mkdocs.hooks.docs")  # an error fails `mkdocs build --strict`
copied: dict[str, Path] = {}  # path in the site -> file
written: dict[str, str] = {}  # path in the site -> text
pages: dict[str, str] = {}  # source of a page -> its address
references: dict[str, tuple[str, str]] = {}  # notebook -> module, address of its API page
KEPT = re.compile(r"(?s)(<(pre|code|script|style|svg)\b.*?</\2>)")  # nothing in there is a formula
MATH = re.compile(r"(?s)\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$<>\n]+?)(?<![\s\\])\$(?![\w$])")
LINK = re.compile(r'(<(?:a\b[^>]*?\bhref|img\b[^>]*?\bsrc)=")((?!data:)[^"]*)(")')
SCRIPT = re.compile(
    r'(?s)<script (?:src=""|type="text/x-mathjax-config"|type="module")>'
    r"((?:(?!</script>).)*)</script>"
)
DIRECTIVE = re.compile(r'(?m)<span class="c1">#\|[^<]*</span>\n|(?:(?<=>)|^)#\|[^<\n]*\n')
STYLE = """
.md-grid { max-width: 76rem }
.jupyter-wrapper .jp-InputPrompt, .jupyter-wrapper .jp-OutputPrompt,
.jupyter-wrapper .celltoolbar { display: none !important }
.jupyter-wrapper .jp-Cell, .jupyter-wrapper .jp-Notebook { padding-left: 0; padding-right: 0 }
.jupyter-wrapper .highlight pre { font-size: .62rem }
"""
WORKER = (TOP / "tests/iframe-worker.js").read_text(encoding="utf8")


TUTORIALS = {  # title in the menu; tutorials that are not listed follow with their own
    "000_tour.ipynb": "Get started: a tour in ten minutes",
    "tutorials/one_scan.ipynb": "One scan",
    "tutorials/view_in_lab.ipynb": "One scan in JupyterLab",
    "tutorials/open_results.ipynb": "One scan in 3D Slicer and OHIF",
    "tutorials/real_scans.ipynb": "Real scans",
    "tutorials/own_hospital.ipynb": "Your hospital's data",
    "tutorials/new_cohort.ipynb": "A public data set",
    "tutorials/ablation.ipynb": "An ablation",
    "tutorials/read_the_study.ipynb": "Read the study",
    "tutorials/own_encoder.ipynb": "Your encoder",
    "tutorials/new_task.ipynb": "A new task",
    "tutorials/cluster.ipynb": "A cluster",
    "tutorials/manual.ipynb": "Manual",
    "96_cost.ipynb": "What the paper's scale costs",
    "96a_scale.ipynb": "Fifty thousand cases",
}
CHAPTERS = {
    "1_phantom": "Phantoms",
    "2_data": "Data",
    "2_data/cohorts": "Data sets",
    "3_anatomy": "Anatomy",
    "4_text": "Text",
    "5_model": "Model",
    "6_pretrain": "Pre-training",
    "7_tasks": "Tasks",
    "8_inference": "Inference",
    "9_study": "Study",
    "stages": "Stages, as DVC runs them",
}


def title(path: Path) -> str:
    "The heading of a notebook, without its kind"
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    text = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    words = text.splitlines()[0].lstrip("# ").removeprefix("How to: ")
    return words[0].upper() + words[1:]


def chapter(top: Path, names: list[str]) -> list[dict[str, str]]:
    return [{title(top / name): name} for name in names]


def contents(top: Path) -> list:  # `top`: nbs/
    "The menu: tutorials, the book, the API reference"
    names = sorted(
        p.relative_to(top).as_posix()
        for p in top.rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    )
    left = [n for n in names if n.startswith("tutorials/") and n not in TUTORIALS]
    tutorials = [{text: n} for n, text in TUTORIALS.items()] + chapter(top, left)
    used = {"index.ipynb", *TUTORIALS}
    loose = [n for n in names if "/" not in n and n not in used]
    book = [{"Foundations": chapter(top, [n for n in loose if n < "1"])}]
    for folder, text in CHAPTERS.items():
        inside = [n for n in names if n.rpartition("/")[0] == folder]
        book.append({text: chapter(top, inside)})
    book.append({"Commands": chapter(top, [n for n in loose if n >= "1"])})
    reference = ["api/index.md", *({m: f"api/{m}.md"} for m in api.modules())]
    return [
        {"Overview": "index.ipynb"},
        {"Tutorials": tutorials},
        {"The book": book},
        {"API reference": reference},
    ]


class Compiled(jinja2.BytecodeCache):
    "Compiled templates: nbconvert would compile all of its templates for each notebook"

    def __init__(self):
        self.kept: dict[str, bytes] = {}

    def load_bytecode(self, bucket):
        if bucket.key in self.kept:
            bucket.bytecode_from_string(self.kept[bucket.key])

    def dump_bytecode(self, bucket):
        self.kept[bucket.key] = bucket.bytecode_to_string()


def on_startup(command, dirty):
    once = functools.partial(jinja2.Environment, bytecode_cache=Compiled())
    templateexporter.Environment = once


def on_config(config):
    config["nav"] = contents(Path(config["docs_dir"]))
    return config


def on_files(files, config):
    for kept in (pages, copied, written, references):
        kept.clear()
    written["assets/iframe-worker.js"] = WORKER
    written["assets/pages.css"] = STYLE
    pages.update({f"nbs/{f.src_uri}": f.url for f in files if f.src_uri.endswith(".ipynb")})
    modules = api.modules()
    files.append(File.generated(config, "api/index.md", content=api.index(modules)))
    for module, path in modules.items():
        file = File.generated(config, f"api/{module}.md", content=api.page(module, path))
        files.append(file)
        if source := api.notebook(path):
            references[source] = (module, file.url)
    return files


def target(source: str, path: str) -> str | None:
    "Address in the site of what a page's link names in the repository"
    # the index is the README, which lies at the top
    base = "" if source == "nbs/index.ipynb" else str(Path(source).parent)
    name = normpath(join(base, path))
    if name in pages:
        return pages[name]
    if inside := sorted(p for p in pages if p.startswith(f"{name}/") and p != source):
        return pages[inside[0]]
    if name.startswith("..") or not (TOP / name).is_file():
        return None
    copied[f"files/{name}"] = TOP / name
    return f"files/{name}"


def linked(body: str, source: str, here: str) -> str:
    def one(m):
        s = urlsplit(html.unescape(m[2]))
        # Jupyter names a heading as it is written, the site in small letters
        if s.fragment and not (s.scheme or s.netloc or s.path):
            return m[0] if f'id="{s.fragment}"' in body else f"{m[1]}#{s.fragment.lower()}{m[3]}"
        if s.scheme or s.netloc or not s.path:
            return m[0]
        to = target(source, unquote(s.path))
        if to is None:
            log.error(f"{source}: its link {m[2]} leads nowhere")
            return m[0]
        address = quote(get_relative_url(to, here), safe="/.#")
        if s.fragment:
            address += f"#{s.fragment}"
        return m[1] + html.escape(address) + m[3]

    return LINK.sub(one, body)


def formulas(body: str, source: str) -> str:
    def one(m):
        tex = html.unescape(m[1] or m[2]).strip()
        out = convert(tex, display="block" if m[1] else "inline")
        if rest := re.findall(r"\\[a-zA-Z]+", re.sub(r"(?s)<annotation.*?</annotation>", "", out)):
            log.error(f"{source}: {' '.join(rest)} in ${tex}$ is not understood")
        return out

    parts = KEPT.split(body)  # text, kept, its tag, text, ...
    return "".join(
        MATH.sub(one, p) if i % 3 == 0 else p if i % 3 == 1 else "" for i, p in enumerate(parts)
    )


def shared(body: str, here: str) -> str:
    "Store the 0.6 MB of style of each notebook once; drop scripts that fetch MathJax or Mermaid"

    def one(m):
        if len(m[1]) < 4000:
            return m[0]
        name = f"assets/notebook-{hashlib.sha256(m[1].encode()).hexdigest()[:12]}.css"
        written[name] = m[1]
        return f'<link rel="stylesheet" href="{get_relative_url(name, here)}">'

    body = re.sub(r"(?s)<style[^>]*>((?:(?!</style>).)*)</style>", one, body)

    def unless_fetching(m):
        return "" if not m[1].strip() or re.search("mathjax|mermaid", m[1], re.I) else m[0]

    return SCRIPT.sub(unless_fetching, body)


CODE_CELL = '<div class="jp-Cell jp-CodeCell jp-Notebook-cell jp-mod-noOutputs">'


def without_directives(body: str) -> str:
    "Leave out what only nbdev reads: the cell that names a module, and lines such as `#| export`"
    at = body.find('<span class="c1">#| default_exp')
    if at >= 0:
        start, end = body.rfind(CODE_CELL, 0, at), body.find('<div class="jp-Cell ', at)
        body = body[:start] + body[end:]
    return DIRECTIVE.sub("", body)


def with_reference(body: str, source: str, here: str) -> str:
    "A link from a notebook's page to the API page of its module, below the title"
    if source not in references:
        return body
    module, url = references[source]
    link = f'<a href="{get_relative_url(url, here)}"><code>{module}</code></a>'
    return body.replace("</h1>", f'</h1>\n<p class="api-reference">API: {link}</p>', 1)


def with_source(body: str, here: str) -> str:
    "A link from an API page to the notebook that explains its module"
    for source, (_, url) in references.items():
        if url == here and source in pages:
            link = f'<a href="{get_relative_url(pages[source], here)}">the page with examples</a>'
            return body.replace("</h1>", f"</h1>\n<p>Exported from {link}.</p>", 1)
    return body


def on_page_content(body, page, config, files):
    source = f"nbs/{page.file.src_uri}"
    if source not in pages:
        return with_source(body, page.url)
    body = formulas(linked(body, source, page.url), source)
    return shared(without_directives(with_reference(body, source, page.url)), page.url)


def on_post_build(config):
    site = Path(config["site_dir"])
    for name, file in copied.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, site / name)
    for name, text in written.items():
        (site / name).write_text(text, encoding="utf8")
