"A byte search over what a study has written, for the words of a planted patient"

import gzip
import zipfile
from pathlib import Path

import pandas as pd

REPORT_PLACES = ("build/", "runs/embed/", ".dvc/cache/")  # where a report may lie
READ_BY_PEOPLE = (".html", ".ipynb", ".md", ".svg", ".log", ".tex", ".csv")


def texts(path: Path) -> bytes:
    "What a file holds, with what is compressed in it"
    data = path.read_bytes()
    if data[:4] == b"PAR1":
        data += pd.read_parquet(path).to_csv().encode()
    if data[:2] == b"\x1f\x8b":
        data += gzip.decompress(data)
    if data[:4] == b"PK\3\4" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            data += b"".join(map(z.read, z.namelist()))
    return data


def search(root: Path, *words: str) -> list[str]:
    "What a study has written that holds a word in any case, or has it in its name"
    raw, words = root / "build/synthetic", [w.lower() for w in words]
    files = [f for top in ("build", "runs", ".dvc") for f in sorted((root / top).rglob("*"))]
    found = []
    for f in (f for f in [*root.iterdir(), *files] if f.is_file() and not f.is_relative_to(raw)):
        name, held = f.relative_to(root).as_posix(), texts(f).lower()
        if any(w in name.lower() or w.encode() in held for w in words):
            found.append(name)
    return found


def shown(found: list[str], *more: str) -> list[str]:
    "Files with words of a report that are not where it may lie (or in `more`), or that people read"
    places = (*REPORT_PLACES, *more)
    return [f for f in found if not f.startswith(places) or f.endswith(READ_BY_PEOPLE)]
