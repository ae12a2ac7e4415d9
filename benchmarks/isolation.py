"""Processor time of reading good scans with libraries in another process, as a ratio to in-process.

NIfTI never leaves the process. Both ways read by turns; --save writes benchmarks/isolation.json.

usage: python benchmarks/isolation.py [--repeat 5] [--save]
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

from asap.core import project_root, write_json
from asap.data import decode
from asap.data.volumes import Source, read
from asap.isolate import call_isolated

SHAPE = (512, 512, 40)
WINDOW = Source(("window", -1000, 1000), (0.7, 0.7, 5), "RAS")


def call_here(path, function: str, *args, **_):
    "`call_isolated` without another process"
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*args)


def processor_seconds() -> float:
    me = psutil.Process()
    times = [p.cpu_times() for p in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def seconds(path: Path, source: Source, call) -> float:
    decode.call_isolated = call
    start = processor_seconds()
    read(path, source)
    return processor_seconds() - start


def write_scans(folder: Path) -> dict[str, Path]:
    sys.path.insert(0, str(project_root() / "tests"))
    from files import write

    r = np.random.default_rng(0)
    hu = np.rint(r.normal(-300, 200, SHAPE)).clip(-1000, 1000).astype(np.int16)
    forms = ("nii.gz", "mha", "nrrd", "dicom", "dicom-rle", "pictures")
    return {f: write(hu, np.diag([0.7, 0.7, 5, 1]), folder / f, f) for f in forms}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--save", action="store_true")
    a = p.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as tmp:
        for form, path in write_scans(Path(tmp)).items():
            source = WINDOW if form == "pictures" else Source()
            ways = (call_isolated, call_here)
            for way in ways:  # once for the start of the process
                seconds(path, source, way)
            pairs = [[seconds(path, source, way) for way in ways] for _ in range(a.repeat)]
            apart, here = np.median(pairs, 0)
            found[form] = dict(ratio=round(apart / here, 2), seconds=round(float(apart), 2))
            print(form, found[form], flush=True)
    if a.save:
        write_json(
            dict(shape=SHAPE, repeat=a.repeat, formats=found),
            project_root() / "benchmarks/isolation.json",
        )


if __name__ == "__main__":
    main()
