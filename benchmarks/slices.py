"""Time of `asap check` on the slices of a series given one by one, as a ratio to its folder.

A phantom of 500 slices of 256x256 is written as DICOM; both calls are processes of their own.
Prints the times; writes benchmarks/slices.json with --save.

usage: python benchmarks/slices.py [--slices 500] [--repeat 3] [--save]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import zoom

from asap.core import write_json
from asap.data.cohorts.own import write_dicom
from asap.phantom.abnormalities import synthesize_chest


def series(folder: Path, slices: int) -> Path:
    c = synthesize_chest(("benchmark", 0), present=[])
    size = (256, 256, slices)
    hu = zoom(c.clean, [n / m for n, m in zip(size, c.hu.shape)], order=1)
    noise = np.random.default_rng(0).normal(0, 15, size)
    affine = np.diag([336 / 256, 336 / 256, 336 / slices, 1])
    write_dicom(np.rint(hu + noise).astype(np.int16), affine, folder, "benchmark")
    return folder


def seconds(paths: list) -> float:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "asap.cli", "check", *map(str, paths)],
        capture_output=True,
        text=True,
    )
    took = time.monotonic() - start
    lines = [x for x in done.stdout.splitlines() if x.startswith(("ok", "warning", "REFUSED"))]
    if len(lines) != 1:
        raise RuntimeError(f"{len(lines)} scans for one series: {done.stdout[-500:]}")
    return took


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--slices", type=int, default=500)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--save", action="store_true")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = series(Path(tmp) / "series", a.slices)
        files = sorted(folder.iterdir())
        pairs = [(seconds([folder]), seconds(files)) for _ in range(a.repeat)]
    whole, single = (float(np.median(t)) for t in zip(*pairs))
    found = dict(
        slices=a.slices,
        folder_s=round(whole, 2),
        one_by_one_s=round(single, 2),
        ratio=round(single / whole, 2),
    )
    print(json.dumps(found, indent=1))
    if a.save:
        write_json(found, Path(__file__).with_suffix(".json"))


if __name__ == "__main__":
    main()
