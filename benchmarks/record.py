"""Keep what stands for a finished run of the full budget: `results/full`.

Copies the study page, its CSVs and metrics.json from build/full, and writes record.json: commit,
hash of the params, machine, date, and for each arm its minutes by stage and its trainings. Links to
the executed notebooks and to the viewer, which are not kept, become plain text. Refused: changes
that are not committed, a copy in build/full of other files or params, a study that has not
finished, a page of more than 6 MB.

    make study BUDGET=full && make record
"""

import contextlib
import filecmp
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from asap.core import log_message, project_root, read_json, write_json, write_text
from asap.html import DATA
from asap.params import load_params
from asap.study.page import RECORD, arm_cost_table, hash_params

FULL = "build/full"
MAX_PAGE = 6_000_000  # bytes
OWN = ("params.yaml", "dvc.lock", "data.dvc")  # files that the copy in build/full has of its own
NOT_KEPT = re.compile(
    r"""<a\b[^>]*href=["'](?:notebooks/[^"']*|viewer\.html)["'][^>]*>(.*?)</a>""", re.S
)
RELATIVE = re.compile(r"""<a\b[^>]*href=["'](?![a-z]+:|#)([^"'#]+)""")


def git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def changed_files(root: Path, folder: Path) -> list[str]:
    "Files of the project that differ in the copy that ran"
    names = [n for n in git(root, "ls-files", "-z").split("\0") if n and n not in OWN]
    code = [n for n in names if not n.startswith(f"{RECORD}/")]
    return [
        n
        for n in code
        if not (folder / n).exists() or not filecmp.cmp(root / n, folder / n, shallow=False)
    ]


def stale_stages(folder: Path) -> list[str]:
    "Stages of the study that have not run, or not with what is there now"
    from dvc.repo import Repo

    with contextlib.chdir(folder), Repo() as repo:
        return sorted(repo.status(["page"], with_deps=True))


def refusal(root: Path, folder: Path) -> str | None:  # None: it may be kept
    "Why a study cannot be the record"
    page = folder / "runs/study/index.html"
    if dirty := git(root, "status", "--porcelain", "--", ".", f":!{RECORD}"):
        return f"changes are not committed: {dirty.splitlines()[0]}"
    if not page.exists():
        return f"{FULL} has no study page: make study BUDGET=full"
    if hash_params(folder / "params.yaml") != hash_params(root / "params/full.yaml"):
        return f"{FULL}/params.yaml differs from params/full.yaml: make study BUDGET=full"
    if other := changed_files(root, folder):
        return f"{FULL} ran with another {other[0]}: make study BUDGET=full"
    if stale := stale_stages(folder):
        return f"the study has not finished: {', '.join(stale[:3])}"
    if page.stat().st_size > MAX_PAGE:
        return f"the page has {page.stat().st_size / 1e6:.1f} MB, more than {MAX_PAGE / 1e6:g}"
    return None


def machine() -> str:
    "Kind of processor and number of cores"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(FileNotFoundError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf8")
        if found := re.search(r"^model name\s*: (.+)$", text, re.M):
            name = found[1].strip()
    return f"{name}, {os.cpu_count()} cores"


def count_trainings(p, folder: Path, arm: str) -> int:
    "Trainings of an arm that the study knows: none of an arm that starts from random weights"
    if read_json(folder / f"runs/pretrain/{arm}/metrics.json")["weights_source"] == "none":
        return 0
    t = pd.read_csv(folder / "benchmarks/trainings.csv")
    candidates = p.arms[arm].align_candidates or p.model.align_candidates
    return max(1, int(((t.arm == arm) & (t.candidates == candidates)).sum()))


def describe_arms(folder: Path) -> dict[str, dict]:  # arm -> minutes by stage, trainings
    "What each arm cost"
    p = load_params(folder / "params.yaml")
    t = arm_cost_table(p, folder / "runs").set_index("arm")
    stages = [c for c in t if c not in ("parameters", "encoder", "peak GB")]
    return {
        arm: dict(
            minutes={k: round(float(v), 1) for k, v in t.loc[arm, stages].dropna().items()},
            trainings=count_trainings(p, folder, arm),
        )
        for arm in t.index
    }


def copy_page(folder: Path, out: Path) -> None:
    "The page, its CSVs and metrics; no link leads to what is not kept"
    study = folder / "runs/study"
    shutil.rmtree(out / DATA, ignore_errors=True)
    shutil.copytree(study / DATA, out / DATA)
    shutil.copy(study / "metrics.json", out)
    page = NOT_KEPT.sub(r"\1", (study / "index.html").read_text(encoding="utf8"))
    if lost := [a for a in RELATIVE.findall(page) if not (out / a).exists()]:
        raise ValueError(f"the page links to {lost[0]}, which is not kept")
    write_text(page, out / "index.html")


def keep(root: Path) -> Path:  # record.json
    "Write results/full"
    folder, out = root / FULL, root / RECORD
    if why := refusal(root, folder):
        sys.exit(f"not kept: {why}")
    copy_page(folder, out)
    minutes = [read_json(f)["minutes"] for f in sorted((folder / "runs/minutes").glob("*.json"))]
    record = dict(
        commit=git(root, "rev-parse", "HEAD"),
        params_hash=hash_params(folder / "params.yaml"),
        machine=machine(),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        stage_minutes=round(sum(minutes), 1),
        arms=describe_arms(folder),
    )
    write_json(record, out / "record.json")
    return out / "record.json"


if __name__ == "__main__":
    log_message(f"kept: {keep(project_root()).relative_to(project_root())}; next: make readme")
