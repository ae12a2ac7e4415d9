"""Development patients of generation 3 with all labels that a task of the study has.

One file a patient in a folder whose name holds the code of the phantom; a drawing that was stopped
goes on where it was. Two kinds of patients alternate: angiographies, half of them with emboli (as
INSPECT and RSPECT are), and scans of a general hospital with COVID-19, other pneumonia or healthy
lungs (as STOIC and CC-CCII are). A label that a patient's data set would not give is NaN.
"""

from pathlib import Path

import joblib
import numpy as np
from scipy.ndimage import label as connected

from asap.abnormalities import ABNORMALITIES, NO_SHIFT, DomainShift
from asap.core import atomic_write, code_hash, progress_bar, rng
from asap.data.cohorts.cc_ccii import CCCCII, class_shift
from asap.data.cohorts.inspect import FLAGS, HORIZONS
from asap.phantom.abnormalities3 import (
    BodyChest,
    lung_involvement,
    synthesize_body_chest,
    visible_outcome,
    visible_readmission,
    visible_risk,
)
from asap.phantom.thorax import LOBES

CODE = [f"asap.phantom.{n}" for n in (
    "canvas patient skeleton thorax trees abdomen scanner whole_body lesions lung_findings "
    "chest_findings abnormalities3 words"
).split()]  # fmt: skip
EMBOLISM = "pulmonary embolism"
OWN = {  # label of a task that is none of the 18: where it comes from
    "PE": "INSPECT, RSPECT: clots in pulmonary arteries, angiographies alone",
    "COVID-19": "STOIC: round foci of ground glass below the pleura",
    "severe": "STOIC: COVID-19 with a severity above 0.5",
    **dict(zip(CCCCII.labels, ("CC-CCII: COVID-19", "CC-CCII: other pneumonia", "CC-CCII: none"))),
    "Calcification": "RadChestCT: of the aorta or the coronary arteries",
    **dict(zip(FLAGS.values(), [f"INSPECT: within {d} days" for d in HORIZONS.values()] * 2)),
}
LABELS = [*ABNORMALITIES, *OWN]
ALIASES = {"nodule": "Lung nodule"}  # LUNA16: the same as one of the 18
MAPS = [*ABNORMALITIES, EMBOLISM, "lung"]  # bits of a patient's map of masks
QUANTITIES = "heart_ratio involvement depth rim foci lobes both solid risk".split()


def recipe(split: str, i: int) -> dict:
    "Arguments of `synthesize_body_chest` for one patient"
    r = rng("ceiling 3", split, i)
    if i % 2:
        sick = [EMBOLISM] if r.random() < 0.5 else []
        return dict(shift=DomainShift(contrast=1.0), diseases=sick)
    u = r.random()
    if u < 0.2:
        normal = class_shift("Normal").odds
        return dict(shift=DomainShift(odds=normal), diseases=[], without=list(normal))
    sick = ["COVID-19"] if u < 0.5 else ["common pneumonia"] if u < 0.8 else []
    return dict(shift=NO_SHIFT, diseases=sick)


def draw(split: str, i: int, **kw: object) -> BodyChest:
    return synthesize_body_chest(("development", split, i), **recipe(split, i) | kw)


def _within(days: int, event: int, horizon: int) -> float:  # NaN: censored before
    return float("nan") if not event and days <= horizon else float(event and days <= horizon)


def _kind(c: BodyChest) -> list:  # NCP, CP, Normal; NaN where the patient is of no class
    normal = not c.diseases and not any(c.has(n) for n in class_shift("Normal").odds)
    own = ["COVID-19" in c.diseases, "common pneumonia" in c.diseases, normal]
    return own if any(own) else [np.nan] * 3


def labels_of(c: BodyChest, key: object, angiography: bool) -> np.ndarray:  # float32, as LABELS
    "All labels of one patient; NaN where its data set gives none"
    out, back = visible_outcome(c, key), visible_readmission(c, key)
    covid = "COVID-19" in c.diseases
    died = (out["time_days"], out["event"])
    arteries = [c.has(n) for n in ABNORMALITIES if n.endswith("wall calcification")]
    return np.array(
        [
            *(c.has(n) for n in ABNORMALITIES),
            EMBOLISM in c.diseases if angiography else np.nan,
            covid,
            covid and out["severity"] > 0.5,
            *_kind(c),
            any(arteries),
            *(_within(*times, d) for times in (died, back) for d in HORIZONS.values()),
        ],
        np.float32,
    )


def quantities_of(c: BodyChest) -> np.ndarray:  # float32, as QUANTITIES
    "What a reader with the true masks measures at the image's resolution"
    lung = np.isin(c.labels, list(LOBES.values()))
    width = [np.ptp(np.flatnonzero(m.any((1, 2)))) for m in (c.labels == 51, lung)]
    dense = [f.mask & lung for f in c.findings if f.name in ("Lung opacity", "Consolidation")]
    filled = np.any(dense, 0) if dense else np.zeros_like(lung)
    if not filled.any():
        return np.array([width[0] / width[1], *[0.0] * 7, visible_risk(c)], np.float32)
    depth = -c.body.wall.cavity[filled]
    sides = [(filled & (c.body.canvas.points[0] * s > 0)).sum() for s in (1, -1)]
    parts = [filled & (c.labels == i) for i in LOBES.values()]
    lobes = sum(p.sum() > 0.03 * (c.labels == i).sum() for p, i in zip(parts, LOBES.values()))
    found = [
        width[0] / width[1],
        lung_involvement(c),
        np.median(depth),
        (depth < 15).mean(),
        connected(filled)[1],
        lobes,
        min(sides) / max(sides),
        (c.clean[filled] > -300).mean(),
        visible_risk(c),
    ]
    return np.array(found, np.float32)


def half(mask: np.ndarray) -> np.ndarray:  # (W/2,H/2,D/2)
    "Whether any of 2 x 2 x 2 voxels is in a mask"
    a, b, c = (n // 2 for n in mask.shape)
    return mask.reshape(a, 2, b, 2, c, 2).any((1, 3, 5))


def maps_of(c: BodyChest) -> np.ndarray:  # uint32 (W/2,H/2,D/2), a bit a name of MAPS
    "Masks at half the resolution; the heart is marked in every patient"
    masks = {f.name: f.mask for f in [*c.findings, *(f for f in c.diseases.values() if f)]}
    masks |= {"Cardiomegaly": c.labels == 51, "lung": np.isin(c.labels, list(LOBES.values()))}
    out = np.zeros([n // 2 for n in c.hu.shape], np.uint32)
    for bit, name in enumerate(MAPS):
        if name in masks:
            out |= half(masks[name]).astype(np.uint32) << np.uint32(bit)
    return out


def keep(path: Path, split: str, i: int, **kw: object) -> Path:
    "Draw one patient unless its file is there"
    if not path.exists():
        c = draw(split, i, **kw)
        y = labels_of(c, ("development", split, i), bool(i % 2))
        hu = np.clip(c.hu, -1024, 3071).astype(np.int16)
        with atomic_write(path) as tmp, open(tmp, "wb") as f:
            np.savez(f, hu=hu, maps=maps_of(c), y=y, q=quantities_of(c))
    return path


def cases(folder: Path, split: str, n: int, jobs: int = 1, **kw: object) -> dict:
    "Patients of a split: hu (n,W,H,D), maps, y (n, labels), q (n, quantities)"
    todo = [folder / code_hash(*CODE) / split / f"{i}.npz" for i in range(n)]
    made = joblib.Parallel(jobs, return_as="generator")(
        joblib.delayed(keep)(path, split, i, **kw) for i, path in enumerate(todo)
    )
    parts = [dict(np.load(p)) for p in progress_bar(made, total=n, label=f"{split} patients")]
    return {k: np.stack([p[k] for p in parts]) for k in ("hu", "maps", "y", "q")}
