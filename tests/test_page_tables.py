"The results page where a task has no score"

import pandas as pd

from asap.registry import get_task
from asap.study.page import _metrics_by_task


def test_a_task_without_a_score_leaves_the_results_page_whole():
    "Such as the AUC of test cases of one class"
    rows = [("asap", "classify_stoic", 0.75), ("asap", "classify_luna16", float("nan"))]
    t = pd.DataFrame(rows, columns=["arm", "task", "value"]).assign(
        fraction=1.0, metric=get_task("classify_stoic").metric
    )
    assert _metrics_by_task(dict(metrics=t)) == dict(asap=dict(classify_stoic=dict(auc=0.75)))


def test_two_metrics_of_a_task_are_both_kept():
    metrics = ("R@10 image to report", "R@10 report to image")
    t = pd.DataFrame(dict(arm="asap", task="retrieve_own", metric=metrics, value=[0.5, 0.4]))
    found = _metrics_by_task(dict(metrics=t.assign(fraction=1.0)))
    assert found["asap"]["retrieve_own"] == dict(zip(metrics, (0.5, 0.4)))
