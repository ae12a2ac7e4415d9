"""Does the histogram of a phantom of generation 3 decide its labels?

For each abnormality: cross-validated AUC of a logistic regression on the histogram of the scan
inside the body, over patients whose labels are sampled as in a cohort. The bar: more than 0.9 on
at most 2 of 18.

    python benchmarks/phantom3_histograms.py --patients 200 --jobs 2
"""

import argparse
import json
from pathlib import Path

import joblib
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from asap.abnormalities import ABNORMALITIES
from asap.phantom.abnormalities3 import synthesize_body_chest

EDGES = np.r_[
    -1100, np.arange(-1000, 0, 50), np.arange(0, 400, 25), 500, 700, 1000, 1500, 2500, 3100
]
LABELS = [*ABNORMALITIES, "COVID-19", "common pneumonia", "pulmonary embolism"]


def features(hu: np.ndarray) -> np.ndarray:
    "Log of the share of voxels in each bin"
    counts = np.histogram(hu, EDGES)[0]
    return np.log(1e-5 + counts / max(counts.sum(), 1))


def one(i: int, **kw) -> tuple[np.ndarray, np.ndarray]:
    "Features and labels of one patient"
    c = synthesize_body_chest(("development", "histogram", i), **kw)
    have = [int(c.has(n)) for n in ABNORMALITIES] + [int(n in c.diseases) for n in LABELS[18:]]
    return features(c.hu), np.array(have)


def auc_of_histograms(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    "AUC of each label, by five folds"
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    out = {}
    for name, label in zip(LABELS, y.T):
        if min(label.sum(), (1 - label).sum()) >= 5:
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            score = cross_val_predict(model, x, label, cv=folds, method="predict_proba")[:, 1]
            out[name] = round(float(roc_auc_score(label, score)), 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    a = parser.parse_args()
    done = joblib.Parallel(a.jobs)(joblib.delayed(one)(i) for i in range(a.patients))
    x, y = (np.stack(part) for part in zip(*done))
    aucs = auc_of_histograms(x, y)
    high = [n for n in ABNORMALITIES if aucs.get(n, 0) > 0.9]
    table = dict(patients=a.patients, auc=aucs, above_0_9=high)
    a.out.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
