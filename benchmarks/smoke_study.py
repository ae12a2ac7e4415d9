"""The smoke study in folders of its own, for the campaigns that disturb it: kills.py, full_disk.py

The undisturbed study runs once, in build/undisturbed, and is kept until a file that it depends on
changes. Every run has one thread per process and none of the variables of asap and DVC, so that
what it writes can be compared by bytes."""

import contextlib
import csv
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from asap.contents import dvc_stages
from asap.core import (
    file_hash,
    fingerprint,
    first_difference,
    log_message,
    read_json,
    write_json,
)
from asap.processes import LOCKS, BusyError, hold_lock, is_held, lock_holder

TOP = Path(__file__).resolve().parent.parent
STUDY = [sys.executable, "-m", "asap.cli", "study"]
DOCTOR = [sys.executable, "-m", "asap.cli", "doctor"]
MARK = "STUDY_CAMPAIGN"  # environment variable of a run's processes: folder and number of the run
SOURCES = ("asap/", "nbs/stages/", "params/", "weights/", ".dvc/")  # and what dvc.yaml names
ALSO = ("params.yaml", "dvc.yaml", "data.dvc", "tests/smoke.sh")
DATED = ("runs/minutes", "runs/notebooks", "runs/study/notebooks")  # files with times in them
TIMES = re.compile(rb"<details><summary>(Cost by arm|Minutes by stage).*?</details>", re.S)


# ----- folders


def make_folder(folder: Path) -> None:
    "Write the tree at smoke scale to a folder"
    env = environment() | {"PYTHON": sys.executable}
    words = ["bash", "tests/smoke.sh", str(folder)]
    subprocess.run(words, cwd=TOP, env=env, check=True)


def study_files() -> dict[str, str]:  # name -> hash
    "The files that the smoke study depends on"
    sys.path.insert(0, str(TOP / "tests"))
    from project_files import project_files

    graph = (TOP / "dvc.yaml").read_text(encoding="utf8")
    names = [n for n in project_files(TOP) if n.startswith(SOURCES) or n in ALSO or n in graph]
    return {n: file_hash(TOP / n) for n in names}


def is_changed(record: Path, now: dict) -> bool:
    "Whether a fingerprint is not the one in a file; one line says which key differs"
    if not record.exists():
        return True
    why = first_difference(read_json(record), now)
    if why:
        log_message(f"{record.parent}: made anew, because {why}")
    return why is not None


def keep_if_same(
    work: Path,  # of a campaign: its folder `study`, rows.csv
    settings: dict,  # that its rows depend on
) -> None:
    "Remove what a campaign has kept of other files or settings"
    record, now = work / "settings.json", study_fingerprint() | settings
    if is_changed(record, now):
        shutil.rmtree(work / "study", ignore_errors=True)
        (work / "rows.csv").unlink(missing_ok=True)
        write_json(now, record)


def study_fingerprint() -> dict:
    "What the bytes of the smoke study depend on"
    versions = {n: metadata.version(n) for n in ("torch", "numpy", "scikit-learn")}
    return fingerprint(files=study_files(), python=sys.version, versions=versions)


# ----- runs


def environment() -> dict[str, str]:
    "That of a plain terminal, with one thread per process"
    left_out = ("ASAP_", "DVC_", "PYTHON", "ATEN_", "ONEDNN_", MARK)
    own = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
    return own | dict.fromkeys(threads, "1") | {"PATH": path}


def start(command: list[str], folder: Path, number: int, log: Path) -> subprocess.Popen:
    "Start a command in a folder, with both streams in `log`"
    env = environment() | {MARK: f"{folder}#{number}"}
    options = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
    log.unlink(missing_ok=True)  # a process of the run before may still write to it
    with open(log, "w") as f:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=f, **options)


def wait_for(process: subprocess.Popen, seconds: float) -> int | None:
    "The exit code; None: it still runs"
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def processes_of(folder: Path, number: int | None = None) -> list[psutil.Process]:
    "Processes of one run, or of all runs, in a folder"
    found, wanted = [], f"{folder}#" if number is None else f"{folder}#{number}"
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = p.environ().get(MARK, "")
            mine = mark.startswith(wanted) if number is None else mark == wanted
            if mine and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
    return found


def strangers_in(folder: Path) -> list[psutil.Process]:
    "Processes of no run whose folder, words or open files lie in a folder"
    found, inside = [], f"{folder}/"
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if p.pid == os.getpid() or p.environ().get(MARK, "").startswith(f"{folder}#"):
                continue
            places = [p.cwd(), *p.cmdline(), *(f.path for f in p.open_files())]
            if any(inside in f"{place}/" for place in places):
                found.append(p)
    return found


def end_all(folder: Path, number: int | None = None) -> None:
    "End one run, or all that the campaign has started in a folder"
    for _ in range(5):  # one that was about to start another
        found = processes_of(folder, number)
        for p in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                p.kill()
        psutil.wait_procs(found, timeout=20)


def run_to_end(
    command: list[str],
    folder: Path,
    number: int,  # of the run
    log: Path,
    limit: float,  # s
) -> tuple[int | None, float]:  # exit code, None: it did not end in time; s
    "Run a command in a folder"
    began = time.monotonic()
    code = wait_for(start(command, folder, number, log), limit)
    if code is None:
        end_all(folder)
    return code, time.monotonic() - began


# ----- rows


@dataclass
class Rows:
    "A table that is written row by row, and read again by the next call"

    path: Path  # CSV
    columns: list[str]

    def __post_init__(self):
        self.all = []  # dicts of strings
        if self.path.exists():
            with open(self.path, newline="") as f:
                self.all = list(csv.DictReader(f))

    def append(self, row: dict) -> None:
        "Write a row at once"
        row, new = {k: str(row.get(k, "")) for k in self.columns}, not self.all
        with open(self.path, "w" if new else "a", newline="") as f:
            out = csv.DictWriter(f, self.columns, lineterminator="\n")
            if new:
                out.writeheader()
            out.writerow(row)
        self.all.append(row)


# ----- outputs


def files_below(path: Path) -> list[Path]:  # itself, or all in the folder
    return sorted(f for f in (path, *path.rglob("*")) if f.is_file())


def output_hash(path: Path) -> str:
    "Hash of a file; of the study page, without its tables of minutes and memory"
    if path.name != "index.html":
        return file_hash(path)
    return hashlib.sha256(TIMES.sub(b"", path.read_bytes())).hexdigest()


def outputs(folder: Path) -> dict[str, str]:  # file -> hash
    "What the study in a folder has written: runs/, data/ and the outputs that dvc.lock lists"
    stages = dvc_stages(folder / "dvc.lock").values()
    listed = {o["path"] for s in stages for o in s.get("outs", ())}
    places = {"runs", "data", *(p for p in listed if not p.startswith("runs/"))}
    files = {f for p in places for f in files_below(folder / p)}
    names = {f.relative_to(folder).as_posix(): f for f in sorted(files)}
    return {n: output_hash(f) for n, f in names.items() if not n.startswith(DATED)}


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:  # names
    "Files that are missing, too many, or not the same"
    return [n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n)]


def undisturbed(
    work: Path,  # folder for it
) -> tuple[Path, dict]:  # its folder; seconds, outputs: file -> hash
    "A study that nothing disturbs; run unless there is one of the same files"
    folder, record, now = work / "study", work / "study.json", study_fingerprint()
    if is_changed(record, now):
        log_message("the undisturbed study runs: some minutes")
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        code, seconds = run_to_end(STUDY, folder, 0, work / "study.log", 7200)
        if code != 0:
            raise SystemExit(f"the undisturbed study ended with {code}: {work / 'study.log'}")
        write_json(dict(seconds=seconds, outputs=outputs(folder)), work / "outputs.json")
        write_json(now, record)
    return folder, read_json(work / "outputs.json")


# ----- the campaign as a whole


def refuse_running(folder: Path) -> None:
    "Stop with a sentence where a study runs in a folder"
    for path in sorted((folder / LOCKS).glob("*.lock")):
        if is_held(path):
            said = f"{path.stem} runs in {folder} ({lock_holder(path)})"
            raise SystemExit(f"{said}: wait until it ends, or stop it")


def refuse_others(folder: Path) -> None:
    "Stop with a sentence where a process is at work in a folder of the campaign"
    for p in [*processes_of(folder), *strangers_in(folder)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            said = f"process {p.pid} ({p.name()}) is at work in {folder}"
            raise SystemExit(f"{said}: wait until it ends, or stop it")


@contextlib.contextmanager
def guarded(
    work: Path,  # of the campaign
    name: str,  # such as `make kills`
    folders: list[Path],  # of its studies
) -> Iterator[None]:
    "Refuse where a study runs; at the end, also after Ctrl-C, end what was started"
    with hold_lock(work / "campaign.lock", name):
        for folder in (*folders, TOP):
            refuse_running(folder)
        for folder in folders:
            refuse_others(folder)
        try:
            yield
        finally:
            for folder in folders:
                end_all(folder)


def run_campaign(main: Callable[[], int]) -> int:  # exit code
    "Call a campaign; what stops it is one line; SIGTERM is as Ctrl-C"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except BusyError as e:
        log_message(str(e))
        return 1
    except KeyboardInterrupt:
        log_message("stopped; what is done is kept: start again to go on")
        return 130
