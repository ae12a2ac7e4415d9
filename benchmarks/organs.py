"""Train the organ segmenter on bodies of generation 3 and measure it on generations 2 and 3b.

    python benchmarks/organs.py [--folder build/organs] [--seed 1] [--leave-out randomization]

An interrupted training resumes. Writes weights/organs (where --keep) and, beside the training,
dice.csv (generation 2), shift.csv, partial.csv, no_lung.csv (stress tests on generation 3b) and
summary.json; with --keep also benchmarks/organs.csv and benchmarks/organs_stress.json.
"""

import argparse
import time
from pathlib import Path

import torch

from asap.anatomy.organ_bodies import PARTS
from asap.anatomy.organ_training import train_segmenter, validate_on_bodies3b, validate_on_chests
from asap.anatomy.predictors import segmenter_predictor
from asap.anatomy.segmenter import save_segmenter
from asap.anatomy.stress import (
    stress_no_lung,
    stress_partial,
    stress_shift,
    stress_summary,
)
from asap.core import project_root, write_csv, write_json
from asap.params import load_params
from asap.pretrain.checkpoint import code_version

CARD = """# Organ segmenter

A 3-D U-Net for CT: organ groups and the body at {spacing} mm, RAS, HU -1000 to 1000 mapped to \
[-1, 1]; {size:,} parameters.

- Trained for {steps} steps of {batch} {samples} on {n} bodies of phantom generation 3 alone, half \
of them with domain randomization: these weights know no patient. For no clinical use.
- Dice on {m} phantoms of generation 2, which it has not seen: {groups}.
- Stress tests on {k} bodies of generation 3b, whose shapes share no code: a shift of 84 mm costs \
at most {worst_loss:.2f} Dice of an organ; predicted over true lung volume in partial fields \
{ratio_min:.2f} to {ratio_max:.2f}; at most {false_lung:.4f} of a box without lung is called lung.
- Licence of code and weights: Apache-2.0.
- Load: `asap.anatomy.segmenter.load_segmenter()`.
- Trained by `make organs`; {code}.
"""


def arguments():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--folder", default="build/organs", help="of the training")
    a.add_argument("--bodies", help="folder of the drawn bodies; default: in --folder")
    a.add_argument("--keep", action="store_true", help="write weights/organs")
    a.add_argument("--chests", type=int, default=24, help="phantoms of generation 2")
    a.add_argument("--bodies-3b", type=int, default=8, help="bodies of each stress test")
    a.add_argument("--seed", type=int, help="of the training; default: study.seed")
    a.add_argument("--leave-out", nargs="+", default=[], choices=PARTS, help="of the generator")
    a = a.parse_args()
    if a.keep and (a.leave_out or a.seed is not None):
        raise SystemExit("--keep is for study.seed and all parts: drop --seed and --leave-out")
    return a


def write_card(s, c, dice, m, stress, k, code) -> str:
    return CARD.format(
        spacing="x".join(f"{x:g}" for x in c.spacing),
        size=sum(q.numel() for q in s.model.parameters()),
        steps=c.steps,
        batch=c.batch_size,
        samples="sample" if c.batch_size == 1 else "samples",
        n=c.num_phantoms,
        m=m,
        groups=", ".join(f"{name} {v:.2f}" for name, v in dice.items()),
        code=code,
        k=k,
        **stress,
    )


def run_stress(s, n: int, folder: Path) -> dict:  # summary
    "The stress tests, on bodies that no choice saw"
    predictor, seeds = segmenter_predictor(s), [("organs", "stress", i) for i in range(n)]
    tables = dict(
        shift=stress_shift(predictor, s.groups, seeds),
        partial=stress_partial(predictor, s.groups, seeds),
        no_lung=stress_no_lung(predictor, s.groups, seeds),
    )
    for name, t in tables.items():
        write_csv(t.round(4), folder / f"{name}.csv")
    return stress_summary(**tables)


def main() -> None:
    a = arguments()
    torch.set_num_threads(1)
    p = load_params(sections=["study", "anatomy", "organs"])
    c = p.organs.model_copy(update=dict(leave_out=a.leave_out))
    started, code = time.monotonic(), code_version()  # before anything is written

    def on_eval(s):
        return validate_on_chests(s, 3).mean().to_dict()

    groups = {g: list(names) for g, names in p.anatomy.groups.items()}
    seed = p.study.seed if a.seed is None else a.seed
    s = train_segmenter(c, groups, seed, a.folder, on_eval, 200, a.bodies)
    print(f"trained in {(time.monotonic() - started) / 60:.0f} min")
    table = validate_on_chests(s, a.chests)
    print(table.describe().round(3).to_string())
    write_csv(table.round(4), Path(a.folder) / "dice.csv")
    summary = run_stress(s, a.bodies_3b, Path(a.folder))
    other = validate_on_bodies3b(s, a.chests).mean().round(4).to_dict()
    summary |= dict(seed=seed, leave_out=a.leave_out, dice_3b=other)
    write_json(summary, Path(a.folder) / "summary.json")
    print(summary)
    if a.keep:
        write_csv(table.round(4), project_root() / "benchmarks/organs.csv")
        write_json(summary, project_root() / "benchmarks/organs_stress.json")
    place = project_root() / "weights/organs" if a.keep else Path(a.folder) / "organs"
    save_segmenter(s, place, write_card(s, c, table.mean(), len(table), summary, a.bodies_3b, code))
    print(place)


if __name__ == "__main__":
    main()
