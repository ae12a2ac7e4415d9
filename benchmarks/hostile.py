"""Hostile files and params through the code that takes them, each in a process that may die.

`make fuzz` runs 3,000 files and 1,000 params files and writes benchmarks/hostile.json. What is done
is kept in build/fuzz/results.jsonl: a run that was stopped goes on from there. Counted are
tracebacks, deaths of the process, and files that take more than 10 s of the processor, 60 s by the
clock or 2 GB.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from hostile_files import mutate_scan, write_sources
from hostile_params import mutate_params

from asap.core import log_message, project_root, write_json

MAX_SECONDS, MAX_GB = 10, 2  # of the processor
HANGS_AFTER = 60  # s


# ----- one file, in the process that may die


def reset_peak(pids) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_gb(pids) -> float:  # sum of the highest of each; 0 where it is not known
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    return total / 1e6


def family() -> list[int]:  # this process and the one that decodes
    import psutil

    me = psutil.Process()
    return [me.pid, *(c.pid for c in me.children(recursive=True))]


def read_scan(path: str, words: list[str]) -> str:  # outcome
    "`asap check`, and what the prepare stage does with the file"
    from asap.cli import main
    from asap.data.prepare import CaseStore, prepare_case
    from asap.data.volumes import Source

    code = main(["check", path, path, *words])  # of two paths none is a data set's folder
    made = Path(path).parent / "made"
    made.mkdir(exist_ok=True)
    source = Source(("window", -1000, 1000), (7, 7, 14), "RAS") if words else Source()
    recipe = dict(spacing=[3, 3, 6], hu=[-1000, 1000])
    row = dict(case="case", image=path, organ_map="")
    result = prepare_case(row, CaseStore(made, made), recipe, None, source)
    for f in made.iterdir():
        f.unlink()
    refused = result.error is not None
    if refused != (code == 1):
        return f"check and prepare disagree: {code}, {result.error}"
    return "refused" if refused else "accepted"


def read_params_file(path: str) -> str:  # outcome
    from asap.cli import main

    return "refused" if main(["params", path]) else "accepted"


def processor_seconds() -> float:  # of this process and the one that decodes
    import psutil

    me = psutil.Process()
    times = [p.cpu_times() for p in (me, *me.children(recursive=True))]
    ended = times[0].children_user + times[0].children_system
    return sum(t.user + t.system for t in times) + ended


def try_one(task: dict) -> dict:
    "Outcome, seconds and memory of one file"
    out = io.StringIO()
    reset_peak(family())
    start, used = time.perf_counter(), processor_seconds()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            outcome = (
                read_scan(task["path"], task["words"])
                if task["kind"] == "scan"
                else read_params_file(task["path"])
            )
    except BaseException:
        outcome = traceback.format_exc()
    seconds = time.perf_counter() - start
    text = out.getvalue()
    if "Traceback (most recent call last)" in outcome + text:
        outcome = "traceback: " + (outcome + text)[-1500:]
    said = text.strip().splitlines()
    return dict(
        outcome=outcome,
        said=said[-1][:300] if said else "",
        seconds=round(processor_seconds() - used, 2),
        wall=round(seconds, 2),
        gb=round(peak_gb(family()), 2),
    )


def serve() -> None:
    import asap.cli
    import asap.data.prepare  # noqa: F401

    out = sys.stdout
    for line in sys.stdin:
        result = try_one(json.loads(line))
        print(json.dumps(result), file=out, flush=True)


# ----- the campaign


class Child:
    "The process that reads hostile files; started anew after it died"

    def __init__(self):
        self.process = None

    def ask(self, task: dict) -> dict:
        if self.process is None:
            command = [sys.executable, __file__, "--serve"]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes)
        process = self.process
        hung = threading.Event()
        timer = threading.Timer(HANGS_AFTER, lambda: (hung.set(), process.kill()))
        timer.start()
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self.process = None
        code = process.wait()
        return dict(
            outcome="hung" if hung.is_set() else f"died ({code})", said="", seconds=0, wall=0, gb=0
        )

    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()


def campaign(
    n_scans: int,
    n_params: int,
    folder: Path,  # of the results; what is there is kept
    seed: int = 0,
) -> list[dict]:  # results
    "Make, try and remove one hostile file after another"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"results-{seed}.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {(r["kind"], r["i"]): r for r in map(json.loads, lines)}
    sources = write_sources(folder / "sources")
    wanted = [("scan", i) for i in range(n_scans)] + [("params", i) for i in range(n_params)]
    child, results = Child(), []
    with open(kept, "a") as f, tempfile.TemporaryDirectory() as now:
        for kind, i in wanted:
            if (kind, i) not in done:
                made = mutate_scan if kind == "scan" else mutate_params
                with made(i, seed, sources, Path(now) / "now") as task:
                    row = dict(kind=kind, i=i, **task, **child.ask(dict(task, kind=kind)))
                row.pop("path")
                print(json.dumps(row), file=f, flush=True)
                done[kind, i] = row
            results.append(done[kind, i])
    child.close()
    return results


def faults(results: list[dict]) -> list[dict]:
    "Those that are not simply refused or accepted, or take too much"
    return [
        r
        for r in results
        if r["outcome"] not in ("refused", "accepted")
        or r["seconds"] > MAX_SECONDS
        or r["gb"] > MAX_GB
    ]


def summary(results: list[dict], kind: str) -> dict:
    rows = [r for r in results if r["kind"] == kind]
    bad = faults(rows)
    by_form: dict = {}
    for r in rows:
        by_form.setdefault(r["form"], Counter())[r["outcome"].split(":")[0]] += 1
    return dict(
        files=len(rows),
        faults=len(bad),
        most_seconds=max(r["seconds"] for r in rows),
        most_wall_seconds=max(r["wall"] for r in rows),
        most_gb=max(r["gb"] for r in rows),
        by_form={k: dict(v) for k, v in sorted(by_form.items())},
    )


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--scans", type=int, default=3000)
    a.add_argument("--params", type=int, default=1000)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--save", action="store_true", help="write benchmarks/hostile.json")
    a.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.serve:
        return serve()
    results = campaign(a.scans, a.params, project_root() / "build/fuzz", a.seed)
    for r in faults(results):
        log_message(json.dumps(r))
    out = {kind: summary(results, kind) for kind in ("scan", "params")}
    log_message(
        json.dumps({k: {x: y for x, y in v.items() if x != "by_form"} for k, v in out.items()})
    )
    if a.save:
        write_json(out, project_root() / "benchmarks/hostile.json")
    return int(any(v["faults"] for v in out.values()))


if __name__ == "__main__":
    sys.exit(main())
