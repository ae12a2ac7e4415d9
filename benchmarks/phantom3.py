"""Time to draw and scan a phantom of generation 3, in CPU seconds and as a ratio to generation 2.

Bars: 0.4 s at 3.5x3.5x7 mm (96x96x48 voxels), 5 s at 1.5x1.5x3 mm (224x224x112 voxels), on one
core. The smallest of several times counts, because other processes only add to it. Prints the
times; writes benchmarks/phantom3.json with --save.

usage: OMP_NUM_THREADS=1 python benchmarks/phantom3.py [--repeat 10] [--save]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from asap.core import write_json
from asap.phantom.abnormalities import synthesize_chest
from asap.phantom.patient import sample_patient
from asap.phantom.whole_body import standard_view, synthesize_whole_body

BARS = dict(coarse=0.4, fine=5.0)  # CPU seconds
SPACINGS = dict(coarse=(3.5, 3.5, 7.0), fine=(1.5, 1.5, 3.0))  # mm


def generation_2(i: int) -> None:
    synthesize_chest(("benchmark", i))


def generation_3(i: int, spacing: tuple) -> None:
    p = sample_patient(("benchmark", i))
    synthesize_whole_body(("benchmark", i), spacing, patient=p, view=standard_view(p))


def seconds(draw: Callable, repeat: int) -> float:
    draw(0)  # tables that are computed once
    times = []
    for i in range(repeat):
        start = time.process_time()
        draw(i)
        times.append(time.process_time() - start)
    return round(min(times), 3)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--repeat", type=int, default=10)
    p.add_argument("--save", action="store_true")
    a = p.parse_args()
    found = dict(generation_2=seconds(generation_2, a.repeat))
    for name, spacing in SPACINGS.items():
        found[name] = seconds(partial(generation_3, spacing=spacing), a.repeat)
        found[f"{name}_bar"] = BARS[name]
    found["ratio"] = round(found["coarse"] / found["generation_2"], 2)
    print(found)
    if a.save:
        write_json(found, Path(__file__).with_suffix(".json"))


if __name__ == "__main__":
    main()
