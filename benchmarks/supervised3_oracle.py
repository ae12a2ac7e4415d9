"""What the best reader could say of generation 3: the bound of every label.

A finding: a matched filter that knows the finding. Its signal is the patient minus the twin without
the finding (same seed, same other findings), seen through the scanner's kernel, in units of the
scanner's noise: d = sqrt(sum of (signal / noise)^2). The reader searches PLACES places of pure
noise, so that a signal of d = 2 is lost among them and one of d = 6 is found: a finding that the
painter hides (clots without contrast medium, a nodule under fluid) has an AUC near 0.5. Limit of
this definition: the reader knows the healthy twin, so it bounds noise, resolution and what is
covered, not the variety of healthy anatomy.

Cardiomegaly is a size: the bound is the AUC of the true width of the heart over that of the lungs.
COVID-19, other pneumonia, healthy lungs: five folds of a logistic regression on what a reader with
the true masks measures (depth, foci, lobes, sides, share of solid). Mortality and readmission: the
AUC of the true risk. Severe: the probability of COVID-19 of that regression times the severity.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from supervised3_patients import CODE, EMBOLISM, LABELS, QUANTITIES, draw, recipe

from asap.abnormalities import ABNORMALITIES
from asap.core import code_hash, progress_bar, read_json, rng, write_json
from asap.phantom.abnormalities import region_features
from asap.phantom.abnormalities3 import BodyChest, chest_view, paint_findings, sample_phase
from asap.phantom.chest_findings import heart_factor, paint_distractors
from asap.phantom.lesions import Scene, copy_scene, draw_scene
from asap.phantom.patient import sample_patient
from asap.phantom.scanner import kernel_response, sample_settings, scan_body, scanner_noise

PLACES = 1000  # that a reader looks at
FEWEST = 8  # of both classes; with fewer an AUC says nothing
SEEN = {n: [n] for n in ABNORMALITIES} | {
    "PE": [EMBOLISM],
    "Calcification": [n for n in ABNORMALITIES if n.endswith("wall calcification")],
}  # label: findings that show it
PATTERN = [QUANTITIES.index(n) for n in "involvement depth rim foci lobes both solid".split()]


def twin_of(split: str, i: int, name: str) -> BodyChest:
    "The same patient without one finding"
    how = recipe(split, i)
    if name == EMBOLISM:
        return draw(split, i, diseases=[n for n in how["diseases"] if n != name])
    return draw(split, i, without=[*how.get("without", ()), name])


def detectability(c: BodyChest, twin: BodyChest) -> float:  # d, in units of noise
    "Strength of what tells a patient from its twin"
    s, spacing = c.body.settings, c.body.spacing
    fx, fy = (np.fft.fftfreq(n, d) for n, d in zip(c.hu.shape[:2], spacing))
    kernel = kernel_response(np.hypot(fx[:, None], fy[None]), s)[..., None]
    change = np.fft.fft2(c.clean - twin.clean, axes=(0, 1)) * kernel
    signal = np.fft.ifft2(change, axes=(0, 1)).real
    noise = scanner_noise(c.clean, spacing, s)
    return float(np.sqrt((signal**2 / (gaussian_filter(noise**2, 3) + 1)).sum()))


def strengths(split: str, i: int, names: list) -> dict:  # name -> d
    "Strength of some findings of one patient"
    c = draw(split, i)
    return {n: detectability(c, twin_of(split, i, n)) for n in names}


def twins(folder: Path, split: str, y: np.ndarray, count: int) -> dict:  # name -> {i: d}
    "The first patients with each finding and their twins; one file a patient"
    names = {n: LABELS.index("PE" if n == EMBOLISM else n) for n in [*ABNORMALITIES, EMBOLISM]}
    first = {n: np.flatnonzero(y[:, k] == 1)[:count] for n, k in names.items()}
    where = folder / code_hash(*CODE) / "twins" / split
    found: dict = {n: {} for n in names}
    for i in progress_bar(sorted({int(i) for v in first.values() for i in v}), label="twins"):
        path, asked = where / f"{i}.json", [n for n in names if i in first[n]]
        have = read_json(path) if path.exists() else {}
        if lost := [n for n in asked if n not in have]:
            have |= strengths(split, i, lost)
            write_json(have, path)
        for n in asked:
            found[n][i] = have[n]
    return found


def _pair(base: Scene, s: Scene, name: str, scan: Callable) -> list | None:
    "Features of the region with and without one finding, in an otherwise healthy body"
    found = paint_findings(s, [name])
    if not found:
        return None
    return [[float(v) for v in region_features(scan(x), found[0].mask)] for x in (s, base)]


def plain_pairs(i: int) -> dict:  # name -> features with, without; None: out of view
    "The twins of page 11 in one body of generation 3: each abnormality alone against none"
    seed = ("development", "twin", i)
    p = sample_patient(seed, phase=sample_phase(seed))
    view, st = chest_view(seed, p), sample_settings(seed, 7.0)
    severity = float(rng("twin severity", seed).beta(1.6, 1.4))

    def scan(s: Scene) -> np.ndarray:
        return scan_body(copy_scene(s).canvas, st)

    grid = ((3.5, 3.5, 7.0), (96, 96, 48), st.thickness)
    base = draw_scene(seed, p, view, *grid)
    paint_distractors(base)
    large = draw_scene(seed, p, view, *grid, heart=heart_factor(severity))
    paint_distractors(large)
    bodies = {n: large if n == "Cardiomegaly" else base for n in ABNORMALITIES}
    return {n: _pair(base, copy_scene(s, severity), n, scan) for n, s in bodies.items()}


def plain_twins(folder: Path, count: int) -> dict:  # name -> features (n,2,4)
    "Twins of some bodies; one file a body"
    where, rows = folder / code_hash(*CODE) / "twins/plain", []
    for i in progress_bar(range(count), label="plain twins"):
        path = where / f"{i}.json"
        if not path.exists():
            write_json(plain_pairs(i), path)
        rows.append(read_json(path))
    return {n: np.array([r[n] for r in rows if r[n]]) for n in ABNORMALITIES}


def twin_auc(pairs: np.ndarray) -> float:  # (n,2,4): features with, without
    "Best of four features of the region between patients and twins"
    if not len(pairs):
        return float("nan")
    y = np.repeat([1, 0], len(pairs))
    aucs = [roc_auc_score(y, np.r_[a, b]) for a, b in zip(pairs[:, 0].T, pairs[:, 1].T)]
    return max(max(a, 1 - a) for a in aucs)


def search_auc(d: np.ndarray, absent: int, key: object) -> float:
    "AUC of a reader who searches: signals of strength d against as many patients of noise"
    r = rng("reader", key)
    places = r.standard_normal((len(d) + absent, PLACES)).max(1)
    seen = np.maximum(np.asarray(d) + r.standard_normal(len(d)), places[: len(d)])
    return float(roc_auc_score(np.repeat([1, 0], [len(d), absent]), np.r_[seen, places[len(d) :]]))


def _pattern(q: np.ndarray, y: np.ndarray) -> np.ndarray:  # (n,), probability
    "What a reader of the masks says of a class, by five folds"
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
    x = np.log1p(np.maximum(q[:, PATTERN], 0))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return cross_val_predict(model, x, y, cv=folds, method="predict_proba")[:, 1]


def oracle_auc(
    label: str,  # of LABELS
    y: np.ndarray,  # (n, labels), NaN unknown
    q: np.ndarray,  # (n, quantities)
    found: dict,  # of `twins`
) -> float:  # NaN: too few of a class
    "Bound of one label"
    own = y[:, LABELS.index(label)]
    known = ~np.isnan(own)
    own, q = own[known], q[known]
    if min(own.sum(), (1 - own).sum()) < FEWEST:
        return float("nan")
    risk = q[:, QUANTITIES.index("risk")]
    if label == "Cardiomegaly":
        return float(roc_auc_score(own, q[:, QUANTITIES.index("heart_ratio")]))
    if label in SEEN:
        rows = [found[n] for n in SEEN[label]]
        d = [max(r[i] for r in rows if i in r) for i in sorted({i for r in rows for i in r})]
        return search_auc(np.array(d), int((own == 0).sum()), label)
    if label.startswith(("mortality", "readmission")):
        return float(roc_auc_score(own, risk))
    if label == "severe":
        covid = _pattern(q, y[known, LABELS.index("COVID-19")])
        return float(roc_auc_score(own, covid / (1 + np.exp(1.6 - risk))))
    return float(roc_auc_score(own, _pattern(q, own)))
