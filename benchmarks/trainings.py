"""Trainings of an arm with other seeds, on the study's patients.

Each training is the stage `pretrain` with another seed for first weights, crops and masks;
patients, steps and rate stay. It resumes where it stopped and is kept in
build/trainings/<arm>_<seed>. Each is measured as the study measures arms: the pointing game on
held-out sentences, and a linear probe with all labels of CT-RATE; its row goes to
benchmarks/trainings.csv. `--keep` puts the training that ships to runs/pretrain/<arm>, from where
`make weights` takes it: the median by pointing on validation phantoms. That rule was written
before the trainings; no test figure enters it.

    dvc repro corpus text && python benchmarks/trainings.py --arms asap --seeds 1 2 3 --keep
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
from grounding_causes import probe_auc

from asap.core import Quarantine, log_message, project_root, read_json, write_csv, write_json

TABLE = Path(__file__).with_suffix(".csv")
KEYS = ["arm", "candidates", "training"]


def train_seed(arm: str, seed: int, p, folder: Path) -> None:
    "The stage `pretrain` with another seed; nothing where it is done"
    from asap.data.corpus import corpus_digest
    from asap.data.table import load
    from asap.pretrain import checkpoint
    from asap.pretrain.pointing import read_targets
    from asap.pretrain.pretrain import run
    from asap.text import encoder

    if (folder / "metrics.json").exists():
        return
    root, start = project_root(), time.monotonic()
    row = p.arms[arm].model_dump() | dict(seed=seed)
    corpus = root / "build/corpus/corpus.parquet"
    table = load(corpus, root)
    text = encoder.load(p.text.model, p.text.max_length)
    inputs = dict(corpus_digest(pd.read_parquet(corpus)), text=text.fingerprint())
    resume = root / f"build/resume/trainings/{folder.name}"
    targets = read_targets(corpus.parent, root)
    trained = run(arm, row, p, table, text, resume, inputs, None, targets)
    phantom = read_json(corpus.with_name("status.json"))["phantom"]
    facts = checkpoint.training_facts(p, row, table, inputs["corpus"], phantom)
    card = checkpoint.model_card(arm, trained[0].config, trained[-1], facts)
    write_json(dict(minutes=(time.monotonic() - start) / 60), folder / "minutes.json")
    checkpoint.save_training(trained, card, folder)


def held_out(p, models: dict):  # hits, of `evaluate_arms`; body (n,N) bool
    "The pointing game of the study, for some models"
    from asap.data.table import load
    from asap.study.grounding import (
        Atlas,
        evaluate_arms,
        load_lesion_sentences,
        load_lesion_targets,
    )
    from asap.text import encoder

    root, last = project_root(), next(iter(models.values()))
    cohort = load(root / "build/cohorts/ct_rate/ct_rate.parquet", root)
    said, _ = load_lesion_sentences(["ct_rate"], root)
    atlas, size = Atlas(p.anatomy.groups), (p.volumes.roi_size, last.vit.patch_size)
    hu = p.volumes.hu_range
    held, share, body, _ = load_lesion_targets(said, cohort, *size, hu, Quarantine(), atlas)
    text = encoder.load(p.text.model, p.text.max_length)
    return evaluate_arms(models, text, held, share, body, atlas.maps, p), body


def measure(arm: str, seed: int, folder: Path, p) -> dict:  # row of the table
    "Figures of a training on the test patients, and its pointing on validation phantoms"
    from asap.data.table import load
    from asap.model.asap import arm_params
    from asap.pretrain.checkpoint import load_model
    from asap.pretrain.pointing import FOCAL_LESIONS
    from asap.study.grounding import hit_rate_table

    model, t = load_model(folder / "checkpoint"), p.tables
    hits, body = held_out(p, {arm: model})
    rates = hit_rate_table(hits, [], "", t.n_bootstrap, t.confidence_level).set_index("label")
    labeled = (hits.label != "").to_numpy()
    inside = body[np.arange(len(hits)), hits.peak_patch]
    root, last = project_root(), pd.read_csv(folder / "eval.csv").iloc[-1]
    table = load(root / "build/cohorts/ct_rate/ct_rate.parquet", root)
    four = hits.label.isin(FOCAL_LESIONS)
    row = dict(
        arm=arm,
        candidates=arm_params(p, p.arms[arm]).model.align_candidates,
        training=f"seed {seed}",
        pointing=rates.hit_rate["focal_lesions"],
        pointing_lo=rates.hit_rate_lo["focal_lesions"],
        pointing_hi=rates.hit_rate_hi["focal_lesions"],
        lung_nodule=rates.hit_rate["Lung nodule"],
        consolidation=rates.hit_rate["Consolidation"],
        outside_body=1 - inside[labeled].mean(),
        macro_auc=probe_auc(model, table, p),
        inter_report=last.inter_report_accuracy,
        intra_report=last.intra_report_accuracy,
        validation_pointing=read_json(folder / "metrics.json")["pointing"]["pointing"],
        atlas=hits.atlas[four].mean(),
        organ_atlas=hits.organ_atlas[four].mean(),
    )
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def add_row(row: dict) -> None:
    "Add a row to the table, or replace that of the same training"
    t = pd.read_csv(TABLE)
    old = t[(t[KEYS] != pd.Series(row)[KEYS]).any(axis=1)]
    write_csv(pd.concat([pd.DataFrame([row]), old], ignore_index=True), TABLE)


def keep_median(arm: str, folders: dict[int, Path]) -> int:  # seed of the training that is kept
    "Put the median training by validation pointing where the stage `pretrain` has its outputs"
    points = {s: read_json(f / "metrics.json")["pointing"] for s, f in folders.items()}
    ranked = sorted(folders, key=lambda s: points[s]["pointing"])
    seed = ranked[(len(ranked) - 1) // 2]
    out = project_root() / f"runs/pretrain/{arm}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folders[seed], out)
    minutes = project_root() / f"runs/minutes/pretrain-{arm}.json"
    minutes.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folders[seed] / "minutes.json", minutes)
    log_message(f"{arm}: seed {seed} is kept; set arms.{arm}.seed in params.yaml to it")
    return seed


def main() -> None:
    from asap.params import load_params

    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--arms", nargs="+", default=["asap"])
    a.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    a.add_argument("--keep", action="store_true", help="put the median training to runs/pretrain")
    a = a.parse_args()
    p = load_params()
    for arm in a.arms:
        folders = {s: project_root() / f"build/trainings/{arm}_{s}" for s in a.seeds}
        for seed, folder in folders.items():
            train_seed(arm, seed, p, folder)
            add_row(measure(arm, seed, folder, p))
        if a.keep:
            keep_median(arm, folders)


if __name__ == "__main__":
    main()
