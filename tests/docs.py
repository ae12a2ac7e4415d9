"""What `make docs` does to each page beside mkdocs-jupyter: links between notebooks lead to pages, formulas are MathML, nothing comes from a network.

A notebook links to notebooks and files as they lie in the repository, which is right in JupyterLab and on a forge. Here a link to a notebook
becomes one to its page, a link to a folder one to its first page, and a linked file of the repository is copied into `files/`.
"""

import hashlib
import html
import logging
import re
import shutil
from pathlib import Path
from posixpath import join, normpath
from urllib.parse import quote, unquote, urlsplit

from latex2mathml.converter import convert
from mkdocs.utils import get_relative_url

TOP, log = (
    Path(__file__).resolve().parent.parent,
    logging.getLogger("mkdocs.hooks.docs"),
)  # fails `mkdocs build --strict`
copied, written, pages = (
    {},
    {},
    {},
)  # place in the site -> file; place in the site -> text; source of a page -> its address
KEPT = re.compile(r"(?s)(<(pre|code|script|style|svg)\b.*?</\2>)")  # nothing in there is a formula
MATH = re.compile(r"(?s)\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$<>\n]+?)(?<![\s\\])\$(?![\w$])")
LINK = re.compile(r'(<(?:a\b[^>]*?\bhref|img\b[^>]*?\bsrc)=")((?!data:)[^"]*)(")')
WORKER = """// A page that is opened from disk may not start a worker, which the search is: it runs in a frame instead
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe"); frame.hidden = true; document.body.append(frame);
    this.scope = frame.contentWindow; this.waiting = [];
    this.scope.postMessage = data => { const e = new MessageEvent("message", {data}); this.dispatchEvent(e); this.onmessage?.(e) };
    this.scope.importScripts = (...urls) => Promise.all(urls.map(u => this.load(u)));
    this.load(url).then(() => { const late = this.waiting; this.waiting = null; late.forEach(d => this.postMessage(d)) });
  }
  load(url) { return new Promise((done, fail) => { const s = this.scope.document.createElement("script"); s.src = url; s.onload = done; s.onerror = fail; this.scope.document.body.append(s) }) }
  postMessage(data) { this.waiting ? this.waiting.push(data) : this.scope.dispatchEvent(new MessageEvent("message", {data})) }
};
"""


def on_files(files, config):
    pages.clear()
    copied.clear()
    written.clear()
    written["assets/iframe-worker.js"] = WORKER
    pages.update({f"nbs/{f.src_uri}": f.url for f in files if f.src_uri.endswith(".ipynb")})


def target(
    source: str, path: str
) -> str | None:  # address in the site of what a page's link names in the repository
    base = (
        "" if source == "nbs/index.ipynb" else str(Path(source).parent)
    )  # the index is the README, which lies at the top
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
        if s.fragment and not (
            s.scheme or s.netloc or s.path
        ):  # Jupyter names a heading as it is written, the site in small letters
            return m[0] if f'id="{s.fragment}"' in body else f"{m[1]}#{s.fragment.lower()}{m[3]}"
        if s.scheme or s.netloc or not s.path:
            return m[0]
        to = target(source, unquote(s.path))
        if to is None:
            log.error(f"{source}: its link {m[2]} leads nowhere")
            return m[0]
        return (
            m[1]
            + html.escape(
                quote(get_relative_url(to, here), safe="/.#")
                + (f"#{s.fragment}" if s.fragment else "")
            )
            + m[3]
        )

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
    "The 0.6 MB of style that every notebook carries, once for all pages; scripts that would fetch MathJax or Mermaid, not at all"

    def one(m):
        if len(m[1]) < 4000:
            return m[0]
        name = f"assets/notebook-{hashlib.sha256(m[1].encode()).hexdigest()[:12]}.css"
        written[name] = m[1]
        return f'<link rel="stylesheet" href="{get_relative_url(name, here)}">'

    body = re.sub(r"(?s)<style[^>]*>((?:(?!</style>).)*)</style>", one, body)
    return re.sub(
        r'(?s)<script (?:src=""|type="text/x-mathjax-config"|type="module")>((?:(?!</script>).)*)</script>',
        lambda m: "" if not m[1].strip() or re.search("mathjax|mermaid", m[1], re.I) else m[0],
        body,
    )


def on_page_content(body, page, config, files):
    source = f"nbs/{page.file.src_uri}"
    return (
        shared(formulas(linked(body, source, page.url), source), page.url)
        if source in pages
        else body
    )


def on_post_build(config):
    site = Path(config["site_dir"])
    for name, file in copied.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, site / name)
    for name, text in written.items():
        (site / name).write_text(text, encoding="utf8")
