"Write README.md from nbs/index.ipynb; with --check only say whether it is fresh"
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

top = Path(__file__).resolve().parent.parent

def readme()->str:
    "The index page as Markdown: prose and shown code, no outputs, no hidden cells"
    nb = nbformat.read(top/"nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and c.source.startswith("#| hide"))]
    for c in nb.cells:
        if c.cell_type == "code": c.update(outputs=[], source="\n".join(x for x in c.source.splitlines() if not x.startswith("#|")))
    nb.metadata.language_info = dict(name="python")
    body, _ = MarkdownExporter().from_notebook_node(nb)
    lines = [line.rstrip() for line in body.strip().splitlines()]
    return "<!-- made from nbs/index.ipynb by `make readme`: edit that page, not this file -->\n" + "\n".join(lines) + "\n"

if __name__ == "__main__":
    if "--check" not in sys.argv: (top/"README.md").write_text(readme(), encoding="utf8")
    elif (top/"README.md").read_text(encoding="utf8") != readme(): sys.exit("README.md is stale: run `make readme`")
