"The results page where a task has no score"

import pandas as pd

from asap.registry import get_task
from asap.study.page import _headline_metrics


def test_a_task_without_a_score_leaves_the_results_page_whole():
    "Such as the AUC of test cases of one class"
    rows = [("asap", "classify_stoic", 0.75), ("asap", "classify_luna16", float("nan"))]
    t = pd.DataFrame(rows, columns=["arm", "task", "value"]).assign(
        fraction=1.0, metric=get_task("classify_stoic").metric
    )
    assert _headline_metrics(dict(metrics=t)) == dict(asap=dict(classify_stoic=0.75))
