"""SIGKILLs at random moments over a pre-training in several processes.

`make training_kills` runs the stage `pretrain@asap` of the smoke study, with 48 steps and not 12,
in two processes of torchrun, and kills the process that a person has started, and that one alone,
20 times. 2 s after each kill no process of the run may be there. A run that ends is compared with
one that nothing disturbed: the weights and the log must be the same bytes; then it begins again.

Rows go to build/training_kills/rows.csv at once, and a campaign that was stopped goes on from
there; --save writes benchmarks/training_kills.json."""

import argparse
import shutil
import sys
import time
from pathlib import Path

import psutil
import smoke_study as smoke

from asap.core import file_hash, list_files, log_message, read_json, rng, write_json

STAGE = "pretrain@asap"
OWN = ("runs/pretrain/asap", "build/resume/pretrain/asap")  # what the stage writes
COMPARED = ("checkpoint/model.safetensors", "log.csv", "eval.csv", "heldout.csv")
AFTER = 2.0  # s from a kill to the look at what is left
LIMIT = 1800.0  # s of a run that nobody kills
COLUMNS = "round planned seconds ended kept left different".split()


def command(processes: int) -> list[str]:
    return ["env", f"ASAP_PROCESSES={processes}", sys.executable, "-m", "asap.cli", "stage", STAGE]


def make_folder(folder: Path, undisturbed: Path, steps: int) -> None:
    "A copy of the undisturbed study, without the pre-training, and with more steps"
    new = folder.with_name("study.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(undisturbed, new, symlinks=True)
    params = new / "params.yaml"
    text, old = params.read_text(encoding="utf8"), "pretrain:\n  steps: 12\n"
    if old not in text:
        raise SystemExit(f"{params} has another number of steps than 12: correct this script")
    params.write_text(text.replace(old, f"pretrain:\n  steps: {steps}\n"), encoding="utf8")
    forget(new)
    new.rename(folder)


def forget(folder: Path) -> None:
    "Remove what the stage has written"
    for name in OWN:
        shutil.rmtree(folder / name, ignore_errors=True)


def hashes(folder: Path) -> dict[str, str]:
    files = {n: folder / OWN[0] / n for n in COMPARED}
    return {n: file_hash(f) for n, f in files.items() if f.exists()}


def kept_files(folder: Path) -> str:
    "Names of what a run has kept for the next one"
    kept = folder / OWN[1]
    return ";".join(f.relative_to(kept).as_posix() for f in list_files(kept, "**/*") if f.is_file())


def kill(folder: Path, process, number: int) -> list[str]:  # what is left, after 2 s
    "Kill the leading process of a run"
    process.kill()
    process.wait()
    time.sleep(AFTER)
    left = []
    for p in smoke.processes_of(folder, number):
        try:
            left.append(f"{p.pid} {' '.join(p.cmdline())[:120]}")
        except psutil.Error:
            continue
    smoke.end_all(folder, number)
    return left


def campaign(a: argparse.Namespace, folder: Path, expected: dict, whole: float) -> smoke.Rows:
    table = smoke.Rows(a.work / "rows.csv", COLUMNS)
    number = len(table.all)
    while True:
        killed = sum(r["ended"] == "killed" for r in table.all)
        if killed >= a.kills and table.all[-1]["ended"] == "0":
            return table
        number += 1
        moment = rng("training kills", a.seed, number).uniform(0.15, 0.95) * whole
        planned = moment if killed < a.kills else LIMIT
        process, began = (
            smoke.start(command(a.processes), folder, number, a.work / "run.log"),
            time.monotonic(),
        )
        code = smoke.wait_for(process, planned)
        row = dict(round=1 + sum(r["ended"] == "0" for r in table.all), planned=round(planned, 1))
        row["seconds"] = round(time.monotonic() - began, 1)
        if code is None:
            left = kill(folder, process, number)
            table.append(row | dict(ended="killed", kept=kept_files(folder), left=";".join(left)))
        elif code == 0:
            different = smoke.differences(hashes(folder), expected)
            table.append(row | dict(ended=0, different=";".join(different)))
            forget(folder)
        else:
            raise SystemExit(f"the stage stopped by itself with {code}: {a.work / 'run.log'}")
        log_message(f"{killed} of {a.kills} kills: {table.all[-1]}")


def arguments() -> argparse.Namespace:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--kills", type=int, default=20)
    a.add_argument("--processes", type=int, default=2)
    a.add_argument("--steps", type=int, default=48)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--work", type=Path, default=smoke.TOP / "build/training_kills")
    a.add_argument("--undisturbed", type=Path, default=smoke.TOP / "build/undisturbed")
    a.add_argument("--save", action="store_true", help="write benchmarks/training_kills.json")
    return a.parse_args()


def reference(a: argparse.Namespace, folder: Path) -> dict:  # hashes, seconds
    "Of a training that nothing disturbs"
    record = a.work / "whole.json"
    if not record.exists():
        forget(folder)
        log = a.work / "whole.log"
        code, seconds = smoke.run_to_end(command(a.processes), folder, 0, log, LIMIT)
        if code != 0:
            raise SystemExit(f"the stage ended with {code}: {log}")
        write_json(dict(hashes=hashes(folder), seconds=seconds), record)
        forget(folder)
    return read_json(record)


def main() -> int:
    a = arguments()
    a.work, a.undisturbed = a.work.resolve(), a.undisturbed.resolve()
    folder = a.work / "study"
    with smoke.guarded(a.work, "make training_kills", [folder, a.undisturbed / "study"]):
        undisturbed, _ = smoke.undisturbed(a.undisturbed)
        smoke.keep_if_same(a.work, dict(processes=a.processes, steps=a.steps, seed=a.seed))
        if not folder.exists():
            (a.work / "whole.json").unlink(missing_ok=True)
            make_folder(folder, undisturbed, a.steps)
        whole = reference(a, folder)
        if set(whole["hashes"]) != set(COMPARED):
            raise SystemExit(f"the stage wrote {sorted(whole['hashes'])}, expected {COMPARED}")
        rows = campaign(a, folder, whole["hashes"], whole["seconds"]).all
    kills = [r for r in rows if r["ended"] == "killed"]
    found = dict(
        kills=len(kills),
        processes=a.processes,
        steps=a.steps,
        with_a_kept_state=sum("resume" in r["kept"] or "state" in r["kept"] for r in kills),
        kills_that_left_a_process=sum(bool(r["left"]) for r in kills),
        trainings_compared=len(rows) - len(kills),
        trainings_that_differ=sum(bool(r["different"]) for r in rows),
        seconds_undisturbed=round(whole["seconds"], 1),
    )
    log_message(str(found))
    if a.save:
        write_json(found, smoke.TOP / "benchmarks/training_kills.json")
    return int(bool(found["kills_that_left_a_process"] or found["trainings_that_differ"]))


if __name__ == "__main__":
    sys.exit(smoke.run_campaign(main))
