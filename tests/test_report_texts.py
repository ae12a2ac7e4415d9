"Messages never hold a report's text: each error that reads one names the case, not what it says"

import pandas as pd
import pytest

from asap.core import Quarantine, hide_text, write_sheet
from asap.data.cohorts import own
from asap.tasks import vqa
from asap.text import scores
from asap.text.labels import extract_labels, label_reports

PLANTED = "Marker of a planted patient with pleural effusion."


def questions(**columns):
    row = dict(case="c1", kind="presence", question=PLANTED, answer=PLANTED) | columns
    return pd.DataFrame([row])


ERRORS = {
    "a question without a volume": lambda: vqa._check_questions(questions(), pd.Series(["c2"])),
    "a kind that is a text": lambda: vqa._check_questions(
        questions(kind=PLANTED), pd.Series(["c1"])
    ),
    "an answer that is none": lambda: vqa._check_questions(
        questions(answer=[PLANTED]), pd.Series(["c1"])
    ),
    "a report that is a list": lambda: extract_labels([PLANTED]),
    "one report for many": lambda: label_reports(PLANTED),
    "a label that is a text": lambda: own._parse_number("label:Nodule", PLANTED, (0, 1)),
    "a time that is a text": lambda: own._parse_number("time_days", PLANTED),
    "texts that are lists": lambda: scores._check_pairs([[PLANTED]], [PLANTED]),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_holds_no_text(what):
    with pytest.raises((ValueError, TypeError)) as e:
        ERRORS[what]()
    assert "Marker" not in str(e.value) and "effusion" not in str(e.value), str(e.value)


def test_a_cell_is_shown_by_its_length():
    assert hide_text(PLANTED) == f"a text of {len(PLANTED)} characters"
    assert hide_text("maybe") == "'maybe'" and hide_text(2.0) == "2.0"


def test_a_spreadsheet_runs_nothing(tmp_path):
    "Formulas in case names and reasons, in the tables that people open"
    hostile = ["=cmd|' /C calc'!A0", '+HYPERLINK("http://a.b")', "@SUM(1)", "-2+3", "\t=1"]
    bad = Quarantine(tmp_path / "quarantine.csv")
    for name in hostile:
        bad.add(name, name)
    bad.save()
    table = pd.read_csv(tmp_path / "quarantine.csv", dtype=str)
    assert [*table.case] == [f"'{x}" for x in hostile] and [*table.reason] == [*table.case]
    write_sheet(pd.DataFrame({"=a": [-0.5, 2]}), tmp_path / "n.csv")
    assert (tmp_path / "n.csv").read_text() == "'=a\n-0.5\n2.0\n"
