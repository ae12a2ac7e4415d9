"""A full disk under the smoke study, at four sizes of a small tmpfs.

`make full_disk` mounts a tmpfs (root on Linux) that has room for a part of what the study writes,
30, 70, 85 and 95 % of it, and runs `asap study` there until it stops. One line must name the place,
what is free and what to do, and no traceback may be shown. Then the tmpfs is made larger and the
study goes on: what it has written when it ends must be the same bytes as those of an undisturbed
study.

Rows go to build/full_disk/rows.csv at once, and a campaign that was stopped goes on from there;
--save writes benchmarks/full_disk.csv and benchmarks/full_disk.json.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import smoke_study as smoke

from asap.core import log_message, write_json

SHARES = (0.3, 0.7, 0.85, 0.95)
BLOCK = 4096  # bytes
WRITTEN = ("build", "runs", "data", ".dvc")  # folders that a run writes to
SAID = re.compile(
    r"(?P<stage>\S+) stopped: no space is left\. (?P<free>\d+\.\d+) GB are free for "
    r"[^()]+ \((?P<place>[^)]+)\)\..*Make room there.*start again"
)
COLUMNS = (
    "share megabytes stopped stage free place traceback seconds done "
    "ended seconds_after done_after compared different said"
).split()


class NoDiskError(ValueError):
    "No small disk can be mounted"


# ----- the disk


def call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise NoDiskError(done.stderr.strip() or f"{words[0]} ended with {done.returncode}")


def resize(folder: Path, size: int) -> None:  # bytes
    call("mount", "-o", f"remount,size={size}", str(folder))


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:  # bytes
    "A tmpfs over a folder; at the end nothing runs in it, and it is gone"
    folder.mkdir(parents=True, exist_ok=True)
    while os.path.ismount(folder):  # of a campaign that was killed
        call("umount", "-l", str(folder))
    call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        smoke.end_all(folder)
        call("umount", "-l", str(folder))


def space(*folders: Path) -> int:  # bytes
    "What the files in some folders take on a disk; one with several names counts once"
    stats = [f.lstat() for folder in folders for f in smoke.files_below(folder)]
    sizes = {s.st_ino: s.st_size for s in stats}
    return sum(-(-size // BLOCK) * BLOCK for size in sizes.values())


def needed(folder: Path) -> tuple[int, int]:  # bytes
    "What the tree takes, and what a study has written to it"
    written = space(*(folder / top for top in WRITTEN))
    return space(folder) - written, written


# ----- one size


def judge(text: str, folder: Path) -> dict:
    "What a person reads of a run that stopped"
    lines = text.strip().splitlines()
    found = next((m for m in map(SAID.search, lines) if m), None)
    told = found.groupdict() if found else dict(stage="", free="", place="")
    inside = Path(told["place"] or "/").is_relative_to(folder)
    return dict(
        stage=told["stage"],
        free=told["free"],
        place="named" if inside else told["place"],
        traceback=text.count("Traceback (most recent call last)"),
        said=found[0] if found else " | ".join(lines[-3:]),
    )


@dataclass
class Campaign:
    "Runs a study on disks that are too small for it"

    work: Path  # of rows.csv, the disk and the output of the runs
    expected: dict[str, str]  # file -> hash
    make: Callable[[Path], None] = smoke.make_folder
    command: tuple[str, ...] = tuple(smoke.STUDY)
    limit: float = 3600  # s, for one run

    def __post_init__(self):
        self.folder = self.work / "disk"
        self.work.mkdir(parents=True, exist_ok=True)
        self.table = smoke.Rows(self.work / "rows.csv", COLUMNS)
        self.rows = self.table.all

    def run(
        self,
        base: int,  # bytes of the tree
        written: int,  # bytes of a whole study
        shares: tuple[float, ...] = SHARES,
        minutes: float = 0.0,  # of an undisturbed study
    ) -> None:
        "The sizes that are not done"
        for i, share in enumerate(shares, 1):
            if str(share) in [r["share"] for r in self.rows]:
                continue
            size, left = base + int(share * written), 1.3 * minutes * (len(shares) - i + 1)
            log_message(f"{i} of {len(shares)}: {size / 1e6:.0f} MB; about {left:.0f} min left")
            self.table.append(dict(share=share, **self.try_size(size, base + 3 * written)))
            row = self.rows[-1]
            log_message(
                f"{i} of {len(shares)}: {row['megabytes']} MB; stopped in {row['stage'] or '?'}, "
                f"ended with {row['ended']}; {row['different'] or 'no file'} differs"
            )

    def try_size(self, size: int, larger: int) -> dict:  # bytes; -> row
        "Run until the disk is full, make room, run to the end, compare"
        with disk(self.folder, size):
            self.make(self.folder)
            row = dict(megabytes=round(size / 1e6), compared=len(self.expected))
            row["stopped"], row["seconds"], text = self._study("full.log", 1)
            row |= dict(done=text.count(" done; "), **judge(text, self.folder))
            resize(self.folder, larger)
            row["ended"], row["seconds_after"], text = self._study("after.log", 2)
            row["done_after"] = text.count(" done; ")
            found = smoke.outputs(self.folder)
        return row | dict(different=";".join(smoke.differences(found, self.expected)))

    def _study(self, name: str, number: int) -> tuple[int | None, float, str]:
        "Exit code, seconds and output of a run"
        log = self.work / name
        code, seconds = smoke.run_to_end([*self.command], self.folder, number, log, self.limit)
        return code, round(seconds, 1), log.read_text(errors="replace")


# ----- results


def is_fault(row: dict) -> bool:
    "What must not be: no stop, no sentence or place, a traceback, another end, other bytes"
    said = row["stopped"] not in ("0", "None") and row["stage"] and row["place"] == "named"
    went_on = row["ended"] == "0" and not row["different"]
    return not (said and went_on and row["traceback"] == "0")


def summary(rows: list[dict], reference: dict) -> dict:
    return dict(
        sizes_mb=[int(r["megabytes"]) for r in rows],
        stopped_in=[r["stage"] for r in rows],
        named_place_and_remedy=sum(r["place"] == "named" for r in rows),
        tracebacks=sum(int(r["traceback"]) for r in rows),
        went_on_to_the_end=sum(r["ended"] == "0" for r in rows),
        files_compared=len(reference["outputs"]),
        files_that_differ=sum(len(r["different"].split(";")) for r in rows if r["different"]),
        minutes=round(sum(float(r["seconds"]) + float(r["seconds_after"]) for r in rows) / 60, 1),
        minutes_undisturbed=round(reference["seconds"] / 60, 1),
        cores=os.cpu_count(),
        faults=sum(map(is_fault, rows)),
    )


def arguments():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=SHARES,
        help="of what the study writes that there is room for (default: %(default)s)",
    )
    a.add_argument("--work", type=Path, default=smoke.TOP / "build/full_disk")
    a.add_argument("--undisturbed", type=Path, default=smoke.TOP / "build/undisturbed")
    a.add_argument("--save", action="store_true", help="write benchmarks/full_disk.csv and .json")
    return a.parse_args()


def main() -> int:
    a = arguments()
    a.work, a.undisturbed = a.work.resolve(), a.undisturbed.resolve()
    with smoke.guarded(a.work, "make full_disk", [a.work / "disk", a.undisturbed / "study"]):
        try:
            with disk(a.work / "disk", BLOCK):
                pass
        except (NoDiskError, OSError) as e:
            log_message(f"skipped: a small disk can be mounted by root on Linux alone ({e})")
            return 0
        folder, reference = smoke.undisturbed(a.undisturbed)
        smoke.keep_if_same(a.work, {})
        campaign = Campaign(a.work, reference["outputs"])
        campaign.run(*needed(folder), tuple(a.shares), reference["seconds"] / 60)
    found = summary(campaign.rows, reference)
    log_message(json.dumps(found))
    if a.save:
        shutil.copy(a.work / "rows.csv", smoke.TOP / "benchmarks/full_disk.csv")
        write_json(found, smoke.TOP / "benchmarks/full_disk.json")
    return int(found["faults"] > 0)


if __name__ == "__main__":
    sys.exit(smoke.run_campaign(main))
