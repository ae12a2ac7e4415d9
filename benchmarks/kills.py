"""SIGKILLs at random moments over `asap study` and `dvc repro` at smoke scale.

`make kills` kills the leading process of a run 40 times, and that process alone, as a queue or the
OOM killer does; half of the times the next run starts at once. 2 s after each kill no process of
the run may be there and no lock be held for it; in all that time no stage may have two kernels; and
what a run has written when it ends must be the same bytes as those of an undisturbed study. A study
that ends before all kills is compared and begun again. A run that DVC's list of locks stops is
followed by `asap doctor`.

Rows go to build/kills/rows.csv at once, and a campaign that was stopped goes on from there; --save
writes benchmarks/kills.csv and benchmarks/kills.json. 20 to 30 minutes on two cores.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import smoke_study as smoke

from asap.core import log_message, read_json, rng, write_json
from asap.processes import LOCKS, is_held, start_time

COMMANDS = {"asap study": smoke.STUDY, "dvc repro": [sys.executable, "-m", "dvc", "repro"]}
AFTER = 2.0  # s from a kill to the look at what is left
PATIENCE = (
    10.0  # s in which what is left may end by itself: a row says when, it is a fault all the same
)
LOOKS = 0.2  # s between two looks at the kernels
TRIES = 3  # runs in a row that may stop by themselves
ERRORS = re.compile(r"\bERROR\b|\basap: |Error: |failed; ")
STOPPED_BY_LOCK = re.compile(r"RWLock|acquire lock|is busy|is running already", re.I)
COLUMNS = (
    "round command at_once planned seconds ended stages left gone_after "
    "locks half_lock two_writers mended compared different said"
).split()


# ----- what the system says


def running_stages(folder: Path, number: int) -> list[str]:
    "Stages that have a process in a run"
    found = set()
    for p in smoke.processes_of(folder, number):
        with contextlib.suppress(psutil.Error):
            found.add(p.environ().get("DVC_STAGE", ""))
    return sorted(found - {""})


def kernels(folder: Path) -> dict[str, set[str]]:  # stage -> connection files
    "Kernels of the stages of all runs in a folder; a fork of one has its connection file"
    found: dict[str, set[str]] = {}
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = p.cmdline()
            if "ipykernel_launcher" not in words or p.status() == psutil.STATUS_ZOMBIE:
                continue
            file = words[words.index("-f") + 1]
            variables = p.environ()
            if variables.get(smoke.MARK, "").startswith(f"{folder}#"):
                found.setdefault(variables.get("DVC_STAGE", ""), set()).add(file)
    return found


class Watch(threading.Thread):
    "Looks for stages with two kernels while a block runs"

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.ended = folder, threading.Event()
        self.doubled: set[str] = set()

    def run(self):
        while not self.ended.wait(LOOKS):
            self.doubled |= {k for k, files in kernels(self.folder).items() if len(files) > 1}

    def take(self) -> set[str]:
        "Stages since the last call"
        taken, self.doubled = self.doubled, set()
        return taken

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()


def locks_of_the_dead(folder: Path) -> list[str]:  # their names
    "Locks that are held though the process that took them has ended"
    found = []
    for path in sorted((folder / LOCKS).glob("*.lock")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            holder = json.loads(path.with_suffix(".json").read_text())["pid"]
            if start_time(holder) is None and is_held(path):
                found.append(path.stem)
    return found


def is_half_written(lock: Path) -> bool:
    "Whether DVC's list of locks is there and no JSON"
    try:
        json.loads(lock.read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


# ----- the campaign


@dataclass(frozen=True)
class Step:
    "A run, and when it is killed"

    command: str
    seconds: float
    at_once: bool  # the next run starts without a pause


def draw_steps(n: int, seed: int, low: float, high: float) -> list[Step]:
    "Each pair of runs has both commands, in an order that is drawn; kills after low to high s"
    draw, names, steps = rng("kills", seed), sorted(COMMANDS), []
    for i in range(n):
        if i % 2 == 0:
            pair = [names[k] for k in draw.permutation(2)]
        steps.append(Step(pair[i % 2], draw.uniform(low, high), bool(draw.random() < 0.5)))
    return steps


@dataclass
class Run:
    "A command at work"

    command: str
    number: int
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)

    def lived(self) -> float:  # s
        return round(time.monotonic() - self.began, 1)


@dataclass
class Campaign:
    "Kills runs of a study in one folder, and compares what they have written"

    work: Path  # of rows.csv and the last run's output
    expected: dict[str, str]  # file -> hash
    make: Callable[[Path], None] = smoke.make_folder
    commands: dict[str, list[str]] = field(default_factory=lambda: COMMANDS)
    limit: float = 3600  # s, for a run that nobody kills
    number: int = 0  # of the last run

    def __post_init__(self):
        self.folder, self.log = self.work / "study", self.work / "run.log"
        self.watch = Watch(self.folder)
        self.work.mkdir(parents=True, exist_ok=True)
        self.table = smoke.Rows(self.work / "rows.csv", COLUMNS)
        self.rows = self.table.all

    def killed(self) -> int:
        return sum(r["ended"] == "killed" for r in self.rows)

    def append(self, **row) -> None:
        "Write a row, with what the watch has seen since the last one"
        here = 1 + sum(r["ended"] == "0" for r in self.rows)
        doubled = ";".join(sorted(self.watch.take()))
        self.table.append(dict(row, round=here, two_writers=doubled))

    def start(self, command: str) -> Run:
        "Start a command, in a new folder where there is none"
        if not self.folder.exists():
            new = self.folder.with_name("study.new")
            shutil.rmtree(new, ignore_errors=True)
            self.make(new)
            new.rename(self.folder)
        self.number += 1
        words = self.commands[command]
        return Run(command, self.number, smoke.start(words, self.folder, self.number, self.log))

    def run(self, steps: list[Step]) -> None:
        "All kills that are not done, then to the end"
        with self.watch:
            run = None
            while not self._is_done(steps):
                left = steps[self.killed() :]
                run = run or self.start(left[0].command if left else "asap study")
                code = smoke.wait_for(run.process, left[0].seconds if left else self.limit)
                if code is not None:
                    self._ended(run, code)
                    run = None
                elif left:
                    run = self._kill(run, *left[:2])
                    self._report(steps)
                else:
                    raise SystemExit(f"no end after {self.limit:.0f} s: {self.log}")

    def _is_done(self, steps: list[Step]) -> bool:
        last = self.rows[-1]["ended"] if self.rows else ""
        return self.killed() >= len(steps) and last == "0"

    def _kill(self, run: Run, step: Step, following: Step | None = None) -> Run | None:
        "Kill a run; the next one, if it starts at once"
        lock, next_run = self.folder / ".dvc/tmp/rwlock", None
        stages, seconds = running_stages(self.folder, run.number), run.lived()
        run.process.kill()
        run.process.wait()
        look = time.monotonic() + AFTER
        half = step.at_once and is_half_written(lock)
        if step.at_once and following:
            next_run = self.start(following.command)
        time.sleep(max(0.0, look - time.monotonic()))
        self.append(
            command=run.command,
            at_once=int(next_run is not None),
            planned=round(step.seconds, 1),
            seconds=seconds,
            ended="killed",
            stages=";".join(stages),
            **self._left(run),
            locks=";".join(locks_of_the_dead(self.folder)),
            half_lock=int(half or (not step.at_once and is_half_written(lock))),
        )
        smoke.end_all(self.folder, run.number)
        return next_run

    def _left(self, run: Run) -> dict:  # part of a row
        "Processes that are left of a run, and when the last of them has ended"
        found = smoke.processes_of(self.folder, run.number) + smoke.strangers_in(self.folder)
        words, began = [describe(p) for p in found], time.monotonic()
        alive = psutil.wait_procs(found, timeout=PATIENCE)[1] if found else []
        gone = AFTER + time.monotonic() - began
        return dict(left=";".join(words), gone_after="never" if alive else round(gone, 1))

    def _ended(self, run: Run, code: int) -> None:
        "A run that ended by itself: compare and begin anew, or see what stopped it"
        row = dict(command=run.command, seconds=run.lived(), ended=code)
        if code == 0:
            found = smoke.outputs(self.folder)
            different = smoke.differences(found, self.expected)
            self.append(**row, compared=len(self.expected), different=";".join(different))
            log_message(f"the study ended: {len(different)} of {len(self.expected)} files differ")
            kept = self.work / "differs"  # the last one
            shutil.rmtree(kept if different else self.folder, ignore_errors=True)
            if different:
                self.folder.rename(kept)
            return
        said = read_errors(self.log.read_text(errors="replace"))
        self.log.rename(self.work / f"stopped-{len(self.rows) + 1}.log")
        self.append(**row, said=said, mended=self._doctor())
        log_message(f"{run.command} stopped by itself ({code}): {said}")
        if sum(r["ended"] not in ("killed", "0") for r in self.rows[-TRIES:]) == TRIES:
            raise SystemExit(
                f"{TRIES} runs in a row stopped by themselves: {self.work}/stopped-*.log"
            )

    def _doctor(self) -> int:  # lines with `mended`
        "`asap doctor`, as a person calls it after a run that stopped"
        options = dict(cwd=self.folder, env=smoke.environment(), capture_output=True, text=True)
        done = subprocess.run(smoke.DOCTOR, **options)
        return sum(line.startswith("mended") for line in done.stdout.splitlines())

    def _report(self, steps: list[Step]) -> None:
        row, done = self.rows[-1], self.killed()
        left = sum(s.seconds + AFTER for s in steps[done:])
        log_message(
            f"{done} of {len(steps)}: {row['command']} killed after {row['seconds']} s "
            f"({row['stages'] or 'between stages'}); left: {row['left'] or 'nothing'}; "
            f"{left / 60:.0f} min to the last kill"
        )


def read_errors(text: str) -> str:
    "The lines of a run's output that say what stopped it, or the last ones"
    lines = text.strip().splitlines()
    return " | ".join([line for line in lines if ERRORS.search(line)][:5] or lines[-3:])


def describe(p: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        age = time.time() - p.create_time()
        return f"{p.pid}, {age:.1f} s old, {' '.join(p.cmdline())[:160]}"
    return f"{p.pid}"


# ----- results


def is_fault(row: dict) -> bool:
    "What must not be: something left, two writers, other bytes, a run that no lock stopped"
    stopped = row["ended"] not in ("killed", "0")
    unexplained = stopped and not STOPPED_BY_LOCK.search(row["said"])
    return bool(
        unexplained or row["left"] or row["locks"] or row["two_writers"] or row["different"]
    )


def summary(rows: list[dict], reference: dict) -> dict:
    kills = [r for r in rows if r["ended"] == "killed"]
    whole = [r for r in rows if r["ended"] == "0"]
    return dict(
        kills={k: sum(r["command"] == k for r in kills) for k in COMMANDS},
        restarted_at_once=sum(int(r["at_once"]) for r in kills),
        in_a_stage=sum(bool(r["stages"]) for r in kills),
        kills_that_left_a_process=sum(bool(r["left"]) for r in kills),
        kills_that_left_a_lock=sum(bool(r["locks"]) for r in kills),
        half_written_lists=sum(int(r["half_lock"]) for r in kills),
        rows_with_two_writers=sum(bool(r["two_writers"]) for r in rows),
        stopped_by_themselves=len(rows) - len(kills) - len(whole),
        mended_by_doctor=sum(int(r["mended"] or 0) for r in rows),
        studies_compared=len(whole),
        files_compared=len(reference["outputs"]),
        files_that_differ=sum(len(r["different"].split(";")) for r in whole if r["different"]),
        minutes=round(sum(float(r["seconds"]) for r in rows) / 60, 1),
        minutes_undisturbed=round(reference["seconds"] / 60, 1),
        cores=os.cpu_count(),
        faults=sum(map(is_fault, rows)),
    )


def longest_stage(folder: Path) -> float:  # s
    "Of an undisturbed study"
    return 60 * max(read_json(f)["minutes"] for f in (folder / "runs/minutes").glob("*.json"))


def arguments():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--kills", type=int, default=40)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument(
        "--seconds",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="a run's life (default: 8 to 40, or longer where stages take longer)",
    )
    a.add_argument("--work", type=Path, default=smoke.TOP / "build/kills")
    a.add_argument("--undisturbed", type=Path, default=smoke.TOP / "build/undisturbed")
    a.add_argument("--save", action="store_true", help="write benchmarks/kills.csv and .json")
    return a.parse_args()


def main() -> int:
    a = arguments()
    if sys.platform != "linux":
        raise SystemExit("needs /proc: Linux alone")
    a.work, a.undisturbed = a.work.resolve(), a.undisturbed.resolve()
    with smoke.guarded(a.work, "make kills", [a.work / "study", a.undisturbed / "study"]):
        folder, reference = smoke.undisturbed(a.undisturbed)
        low, high = a.seconds or (8.0, max(40.0, 15 + 1.2 * longest_stage(folder)))
        smoke.keep_if_same(a.work, dict(seed=a.seed))
        campaign = Campaign(a.work, reference["outputs"])
        campaign.run(draw_steps(a.kills, a.seed, low, high))
    found = summary(campaign.rows, reference)
    log_message(json.dumps(found))
    if a.save:
        shutil.copy(a.work / "rows.csv", smoke.TOP / "benchmarks/kills.csv")
        write_json(found, smoke.TOP / "benchmarks/kills.json")
    return int(found["faults"] > 0)


if __name__ == "__main__":
    sys.exit(smoke.run_campaign(main))
