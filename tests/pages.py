"""Run pages from top to bottom and compare what they store with what they print today

`python tests/pages.py [NB...]` reports the differences; `--refresh` stores today's outputs."""

import base64
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from preloaded import INSTRUCTIONS, LOADED

RELATIVE = 1e-3  # numbers: other processors and library builds sum in another order
ABSOLUTE = 1e-6  # numbers next to zero: what is left of a sum that cancels
SIZE = 0.05  # pictures: other fonts change the margins that a tight bounding box cuts

ALONE = {
    "03_train"
}  # what it shows of the memory allocator is true of a process that is nobody's child
multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded", *LOADED, "pages"])


# What an output says


class Text(HTMLParser):
    "The text of HTML: one line a table row, `|` before each table cell, `<img>` for a picture"

    def __init__(self, html):
        super().__init__()
        self.parts = []
        self.mute = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.mute += tag in ("style", "script")
        marks = {"tr": "\n", "td": " | ", "th": " | ", "img": " <img> ", "svg": " <svg> "}
        self.parts.append(marks.get(tag, " "))

    def handle_endtag(self, tag):
        self.mute -= tag in ("style", "script")
        self.parts.append(" ")

    def handle_data(self, data):
        if not self.mute:
            self.parts.append(data)

    def __str__(self):
        return "".join(self.parts)


def joined(text):
    "Notebook files hold a text as a string or as a list of lines"
    return text if isinstance(text, str) else "".join(text)


def size(mime, data):
    "Width and height of a picture in pixels"
    if mime == "image/svg+xml":
        head = re.search(r"<svg[^>]*>", data)[0]
        sides = [re.search(rf'\b{side}="([\d.]+)', head) for side in ("width", "height")]
        if all(sides):
            return tuple(float(s[1]) for s in sides)
        box = re.search(r'viewBox="([^"]*)"', head)[1].replace(",", " ").split()
        return float(box[2]), float(box[3])
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(data))).size


def said(outputs):
    "Kind and content of each output that a reader sees; consecutive prints are one output"
    seen = []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            if output["name"] != "stdout":
                continue
            if seen and seen[-1][0] == "printed text":
                seen[-1] = ("printed text", seen[-1][1] + joined(output["text"]))
            else:
                seen.append(("printed text", joined(output["text"])))
            continue
        if kind == "error":
            seen.append(("error", output["evalue"]))
            continue
        data = {mime: joined(value) for mime, value in output["data"].items()}
        pictures = [mime for mime in data if mime.startswith("image/")]
        if pictures:
            seen.append(("picture", size(pictures[0], data[pictures[0]])))
        elif "text/html" in data:
            kind = "table" if "<table" in data["text/html"] else "HTML"
            seen.append((kind, str(Text(data["text/html"]))))
        elif "text/markdown" in data:
            seen.append(("Markdown", data["text/markdown"]))
        else:
            seen.append(("value", data.get("text/plain", "")))
    return seen


# What differs

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def words(text):
    "Words and numbers in their order; an object's address is no word"
    text = re.sub(r"0x[0-9a-fA-F]+", "0x", text)
    split = re.sub(NUMBER, lambda number: f" {number[0]} ", text)
    return split.split()


def same_word(stored, now):
    "Equal, or both numbers and close; whole numbers count something and are equal or not"
    if stored == now:
        return True
    if None in (stored, now) or not (NUMBER.fullmatch(stored) and NUMBER.fullmatch(now)):
        return False
    if re.fullmatch(r"[-+]?\d+", stored) and re.fullmatch(r"[-+]?\d+", now):
        return int(stored) == int(now)
    return math.isclose(float(stored), float(now), rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def first_difference(stored, now):
    "Two excerpts that begin shortly before the first word that differs, or None"
    stored, now = words(stored), words(now)
    for i, pair in enumerate(itertools.zip_longest(stored, now)):
        if not same_word(*pair):
            part = slice(max(0, i - 5), i + 6)
            return " ".join(stored[part]) or "(end)", " ".join(now[part]) or "(end)"
    return None


def difference(stored, now, volatile=False):
    "What is stored and what is printed now where they first differ, or None"
    if not said(stored):
        return None
    stored, now = said(stored), said(now)
    kinds = [", ".join(kind for kind, _ in outputs) or "nothing" for outputs in (stored, now)]
    if kinds[0] != kinds[1]:
        return tuple(kinds)
    if volatile:
        return None
    for (kind, before), (_, after) in zip(stored, now, strict=True):
        if kind == "picture":
            if any(abs(a - b) > SIZE * b for a, b in zip(after, before, strict=True)):
                return tuple(f"picture of {w:g} x {h:g} pixels" for w, h in (before, after))
        elif found := first_difference(before, after):
            return tuple(f"{kind}: {excerpt}" for excerpt in found)
    return None


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def stale(notebook, made):
    "Cell id and difference of each cell whose stored outputs are not what it printed (`made`)"
    for cell in notebook["cells"]:
        if cell["id"] in made:
            volatile = tagged(cell, "volatile")
            if found := difference(cell["outputs"], made[cell["id"]], volatile):
                yield cell["id"], found


def refreshed(notebook, made):
    """The notebook with the outputs in `made`, where outputs are stored or the cell is tagged
    `show`

    Text that says the same stays as it is stored, digit for digit."""
    cells = []
    for cell in notebook["cells"]:
        now = made.get(cell["id"])
        if now is not None and (cell["outputs"] or tagged(cell, "show")):
            kept = (
                said(cell["outputs"])
                and not difference(cell["outputs"], now)
                and "picture" not in dict(said(now))
            )
            if not kept:
                cell = {**cell, "outputs": [o for o in now if o.get("name") != "stderr"]}
        cells.append(cell)
    return {**notebook, "cells": cells}


# What a page prints


class Printed(io.TextIOBase):
    "Standard output that becomes a cell's outputs, in order with its tables and pictures"

    def __init__(self, outputs):
        self.outputs = outputs

    def writable(self):
        return True

    def write(self, text):
        if text and self.outputs and self.outputs[-1]["output_type"] == "stream":
            self.outputs[-1]["text"] += text
        elif text:
            self.outputs.append({"name": "stdout", "output_type": "stream", "text": text})
        return len(text)


def bundle(kind, data, metadata):
    "An output as JupyterLab stores it"
    held = {}
    for mime, value in data.items():
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode()
        held[mime] = value.splitlines(True) if mime.startswith("text/") else value
        if mime.startswith("image/"):
            held[mime] = value.splitlines(True) if "svg" in mime else value.rstrip()
    output = {"data": held, "metadata": metadata or {}, "output_type": kind}
    return {**output, "execution_count": None} if kind == "execute_result" else output


def shell(path):
    "An IPython shell that keeps what each cell prints, with the figures that JupyterLab shows"
    import pandas  # noqa: F401, asks at import whether it prints to a terminal: before there is one
    from execnb.shell import CaptureShell
    from IPython.core.displayhook import DisplayHook
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell

    class Value(DisplayHook):
        def quiet(self):
            return self.semicolon_at_end_of_expression(self.shell.source)

        def write_output_prompt(self):
            pass

        def log_output(self, format_dict):
            pass

        def write_format_data(self, format_dict, md_dict=None):
            self.shell.made.append(bundle("execute_result", format_dict, md_dict))

    class Display(DisplayPublisher):
        def publish(self, data, metadata=None, **more):
            self.shell.made.append(bundle("display_data", data, metadata))

        def clear_output(self, wait=False):
            self.shell.made.clear()

    class Shell(CaptureShell):
        displayhook_class = Value
        display_pub_class = Display
        source = ""  # the cell that runs
        made = None  # its outputs

        def outputs(self, source):
            "What one cell prints; an exception is raised"
            self.source = source
            self.made = []
            with contextlib.redirect_stdout(Printed(self.made)):
                result = InteractiveShell.run_cell(self, source)
            result.raise_error()
            for output in self.made:
                if output["output_type"] == "stream":
                    output["text"] = output["text"].splitlines(True)
            return self.made

    # `retina`, which execnb takes, doubles the pixels
    return Shell(path, mpl_format="png")


def run(path):
    "The page as it is stored, and what each of its code cells prints; None where a cell fails"
    notebook = json.loads(path.read_text())
    made = {}
    os.environ["IN_TEST"] = "1"  # as nbdev sets it
    ip = shell(path)
    with contextlib.chdir(path.parent):
        for cell in notebook["cells"]:
            source = joined(cell["source"])
            if cell["cell_type"] != "code" or re.search(
                r"^#\|\s*eval:\s*false", source, re.MULTILINE
            ):
                continue
            try:
                made[cell["id"]] = ip.outputs(source)
            except BaseException:  # a page may also exit or be interrupted
                import traceback

                print(f"{path.name}, cell {cell['id']} fails:\n{source}\n", file=sys.stderr)
                traceback.print_exc()
                return notebook, None
    return notebook, made


def process(path, top, log, refresh=""):
    "The page as a process that has yet to be started"
    return multiprocessing.get_context("spawn" if path.stem in ALONE else "forkserver").Process(
        target=page, args=(path, top, log, refresh)
    )


def page(path, top, log, refresh=""):
    """Exit code 0 where every cell runs, every check holds, and what is stored is what is printed

    With `refresh` (`stale` or `always`) a page that runs is stored with today's outputs."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(top)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a kernel: a loader's workers know the page's classes
    from joblib.externals.loky import get_reusable_executor

    notebook, made = run(path)
    # Otherwise this process waits until the workers have been idle for five minutes
    get_reusable_executor().shutdown(kill_workers=True)
    if made is None:
        sys.exit(1)
    found = list(stale(notebook, made))
    if refresh == "always" or (refresh and found):
        text = json.dumps(refreshed(notebook, made), indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n")
    name = path.relative_to(top)
    for cell, (before, after) in found:
        print(f"{name}, cell {cell}:\n  stored: {before}\n  now:    {after}")
    if found and not refresh:
        print(
            f"Read the differences. Where the new output is right, "
            f"store it: `make refresh NB={name}`."
            " Where it differs from run to run (times), tag the cell `volatile`."
        )
    sys.exit(1 if found and not refresh else 0)


def main(arguments):
    "Check or refresh pages, one at a time"
    from conftest import PAGES, TOP

    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false")
    os.environ.update(INSTRUCTIONS)
    named = [Path(a).resolve() for a in arguments if a != "--refresh"]
    refresh = "" if "--refresh" not in arguments else "always" if named else "stale"
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        for path in named or PAGES:
            work = process(path, TOP, log, refresh)
            work.start()
            work.join()
            text = log.read_text(errors="replace")
            failed += work.exitcode != 0
            print(f"{path.relative_to(TOP)}: {'ok' if not work.exitcode else 'not ok'}", flush=True)
            if work.exitcode or refresh:
                print(text[-12000:], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
