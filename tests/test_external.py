"External tests of classification: labels of CT-RATE for RAD-ChestCT, zero-shot, and in the params"

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TOP

from asap.abnormalities import ABNORMALITIES
from asap.data.cohorts.rad_chest_ct import LABEL_SOURCES
from asap.params import load_params
from asap.registry import get_task
from asap.tasks import vocabulary
from asap.tasks.external import PUBLISHED_AUC, map_labels

P = SimpleNamespace(positive_templates=["{label}."], negative_templates=["No {label}."])


def table(n, labels, split="test"):
    names = [f"c{i}" for i in range(n)]
    keys = dict(case=names, scan=names, patient=names, split=split, image=names)
    truth = {f"label:{k}": np.arange(n) % 2 for k in labels}
    return pd.DataFrame(keys | truth)


def test_the_published_map_covers_all_sixteen_labels(capsys):
    pairs = map_labels("ct_rate", "rad_chest_ct", ABNORMALITIES, LABEL_SOURCES)
    assert list(pairs) == list(LABEL_SOURCES) and len(pairs) == 16
    merged = pairs.pop("Calcification")
    assert merged == ["Arterial wall calcification", "Coronary artery wall calcification"]
    assert all(sources == [name] for name, sources in pairs.items())
    said = capsys.readouterr().err
    assert "Mosaic attenuation pattern of ct_rate is left out" in said


def test_zero_shot_names_the_models_labels_and_scores_the_tests_own(monkeypatch):
    asked = {}

    def similarity(model, text, paths, prompts, size, hu, batch, label):
        asked["prompts"] = [positive[0] for positive, _ in prompts]
        said = np.zeros((len(paths), len(prompts), 2))
        said[:, :, 0] = np.linspace(0.1, 0.9, len(prompts)) + np.arange(len(paths))[:, None]
        return said

    monkeypatch.setattr(vocabulary, "contrast_level", lambda model, arm: "region")
    monkeypatch.setattr(vocabulary, "zero_shot_similarity", similarity)
    monkeypatch.setattr(vocabulary, "zero_shot_proba", lambda model, said: said[..., 0] / 10)
    tables = dict(ct_rate=table(4, ABNORMALITIES), rad_chest_ct=table(6, LABEL_SOURCES))
    volumes = SimpleNamespace(roi_size=(8, 8, 8), hu_range=(-1000, 1000))
    tasks = ["zero_shot_ct_rate", "zero_shot_rad_chest_ct"]
    found = vocabulary.run_all_zero_shot(tasks, tables, dict(m=None), None, P, volumes)
    assert "Mosaic attenuation pattern." not in asked["prompts"] and len(asked["prompts"]) == 17
    away = found[found.task == "zero_shot_rad_chest_ct"]
    assert set(away.label) == set(LABEL_SOURCES) and len(away) == 6 * 16
    assert set(found[found.task == "zero_shot_ct_rate"].label) == set(ABNORMALITIES)
    both = [i for i, k in enumerate(asked["prompts"]) if "wall calcification" in k]
    one = away[away.label == "Calcification"].set_index("case")
    highest = np.linspace(0.1, 0.9, 17)[both].max()
    assert one.probability["c2"] == pytest.approx((highest + 2) / 10)
    assert one.truth.tolist() == [0, 1, 0, 1, 0, 1]
    metrics = vocabulary.zero_shot_metrics(away, 20, 0)
    assert PUBLISHED_AUC in metrics
    near = found[found.task == "zero_shot_ct_rate"]
    assert PUBLISHED_AUC not in vocabulary.zero_shot_metrics(near, 20, 0)


def test_the_papers_params_list_the_external_tests_and_the_built_in_study_does_not():
    names = {"external_rad_chest_ct", "zero_shot_rad_chest_ct"}
    paper = yaml.safe_load((TOP / "params/paper.yaml").read_text())["study"]["tasks"]
    base = load_params(TOP / "params.yaml").study.tasks
    assert set(paper) == {*base, *names} and not names & {*base}
    assert get_task("external_rad_chest_ct").internals == ["classify_ct_rate"]
    assert get_task("zero_shot_rad_chest_ct").internals == ["zero_shot_ct_rate"]
