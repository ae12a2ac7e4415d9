"Intervals for the recipe hold what their level says; patients are drawn together over tasks"

import numpy as np
import pytest

from asap.core import rng
from asap.study import statistics

REPEATS = 400
PATIENTS = 200
LEVEL = 0.95


def simulate(seed, trainings, sds):  # -> one array (trainings,patients) per recipe
    "Differences from the truth: of the training, of the patient, of both"
    r = rng("recipes", seed)
    of_training, of_patient, rest = sds
    patients = r.normal(0, of_patient, PATIENTS)
    return [
        r.normal(0, of_training, (k, 1)) + patients + r.normal(0, rest, (k, PATIENTS))
        for k in trainings
    ]


def intervals(recipes):  # -> of the first minus the second: for these trainings, for the recipe
    values = [x.mean(1) for x in recipes]
    by_patient = recipes[0].mean(0) - recipes[1].mean(0)
    difference, se = by_patient.mean(), by_patient.std() / np.sqrt(PATIENTS)
    sd, df = statistics.pooled_sd(values)
    counts = (len(values[0]), len(values[1]))
    recipe = statistics.recipe_interval(difference, se, sd, df, counts, LEVEL)
    return (difference - 1.96 * se, difference + 1.96 * se), recipe


def coverage(trainings, sds):  # -> shares of intervals that hold 0
    found = [intervals(simulate(seed, trainings, sds)) for seed in range(REPEATS)]
    return [np.mean([pair[i][0] <= 0 <= pair[i][1] for pair in found]) for i in (0, 1)]


@pytest.mark.parametrize("trainings", [(3, 3), (5, 2), (3, 3, 3, 3), (1, 1, 4)])
def test_the_interval_for_the_recipe_covers_the_truth(trainings):
    "Also with the SD of other recipes; the interval over patients misses it most of the time"
    patients, recipe = coverage(trainings, (0.05, 0.1, 0.2))
    assert recipe >= LEVEL - 3 * np.sqrt(LEVEL * (1 - LEVEL) / REPEATS)
    assert patients < 0.6


def test_the_interval_for_the_recipe_is_not_empty_talk():
    "With several degrees of freedom it is hardly wider than needed"
    _, recipe = coverage((5, 5, 5, 5), (0.05, 0.1, 0.05))
    assert 0.91 <= recipe <= 0.985


def test_without_variance_between_trainings_the_patients_decide():
    patients, recipe = coverage((3, 3, 3, 3), (0, 0.1, 0.2))
    assert patients == pytest.approx(LEVEL, abs=0.04) and recipe >= patients


def test_one_training_says_nothing_about_the_recipe():
    _, recipe = intervals(simulate(0, (1, 1), (0.05, 0.1, 0.2)))
    assert np.isnan(recipe).all()


def test_a_side_that_is_not_trained_adds_no_variance():
    both, one = (statistics.recipe_interval(0.1, 0, 0.1, 4, k, LEVEL) for k in ((5, 5), (5, 0)))
    width = [hi - lo for lo, hi in (both, one)]
    assert width[0] == pytest.approx(np.sqrt(2) * width[1])
