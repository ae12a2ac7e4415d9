"""A patient planted in an `own` cohort, followed through a whole study: what is found where, who
can read it, and what is left after `asap forget`"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pydicom
import pytest
import yaml
from search import search, shown
from smoke import ENV, FORKED, STUDY, clone as clone, run

from asap.data.volumes import write
from asap.phantom.abnormalities import synthesize_chest
from asap.privacy import make_private, private_umask

NAME, NUMBER = "Quuxbury^Zebedee", "PID-5550123-QX"  # of DICOM headers and further columns
CASE, FOLDER = "case-qx-7731", "folder-qx-9917"
REPORT = "A planted qx-nodule of 7 mm lies in the left apex."
TEST_REPORT = "A planted qy-mass of 31 mm lies in the right base."  # of a patient in the test split
FINDING, TEST_FINDING = "qx-nodule", "qy-mass"  # words of the two reports, and of no other
SECRET = (NAME.split("^")[0], NUMBER)
ITS_PLACES = ("build/", "runs/embed/", "runs/vocabulary/", "runs/retrieve/", ".dvc/")


def plant(raw: Path) -> None:
    "Give the first case with a DICOM folder another name, header, columns and report; break a file"
    own = raw / "own"
    table = pd.read_csv(own / "cases.csv", dtype=str, keep_default_na=False)
    dicom = [i for i, p in enumerate(table.image) if (own / p).is_dir()]
    first, second = dicom[0], next(i for i in range(len(table)) if i not in dicom)
    scan = own / table.image[first]
    for f in scan.glob("*.dcm"):
        d = pydicom.dcmread(f)
        d.PatientName, d.PatientID, d.PatientBirthDate = NAME, NUMBER, "19010203"
        d.save_as(f)
    (own / FOLDER).mkdir()
    scan.rename(own / FOLDER / CASE)
    table.loc[first, ["case", "image", "report", "split"]] = [
        CASE,
        f"{FOLDER}/{CASE}",
        f"FINDINGS:\n{REPORT}\nIMPRESSION:\n{REPORT}",
        "train",
    ]
    table.loc[first, "patient"] = "patient-qx"
    other = next(i for i in range(len(table)) if table.split[i] == "test" and i != second)
    its_rows = table.patient == table.patient[other]
    table.loc[its_rows, "report"] = f"FINDINGS:\n{TEST_REPORT}\nIMPRESSION:\n{TEST_REPORT}"
    # a report in the wrong column, such as a table with a shifted row has: an error names the cell
    shifted = dict(table.loc[other], case="case-qz-1", patient="patient-qz", time_days=REPORT)
    table = pd.concat([table, pd.DataFrame([shifted])], ignore_index=True)
    table["surname"] = [NAME.split("^")[0]] * len(table)
    table["insurance"] = NUMBER
    broken = own / table.image[second]
    broken.write_bytes(broken.read_bytes()[:2000])
    table.to_csv(own / "cases.csv", index=False)


@pytest.fixture(scope="module")
def planted(clone):
    "The clone with a patient in `own`, after a whole study under a lax umask"
    raw = clone / "raw"
    shutil.copytree(clone / "build/synthetic", raw)
    plant(raw)
    entry = yaml.safe_load((clone / "data.dvc").read_text())
    entry["deps"] = [dict(path="raw")]
    (clone / "data.dvc").write_text(yaml.safe_dump(entry))
    old = os.umask(0)
    try:
        text = run(*STUDY, cwd=clone, env=FORKED)
    finally:
        os.umask(old)
    return clone, text


@pytest.mark.study
def test_a_planted_patient(planted):
    clone, text = planted
    quarantine = "build/cohorts/own/quarantine.csv"
    assert not {*search(clone, *SECRET)} - {quarantine}
    listed = {f for f in search(clone, FOLDER) if not f.startswith(".dvc/")}
    assert listed <= {quarantine}  # DVC lists the names of what it imports to data/
    said = (*SECRET, FOLDER, CASE, FINDING, TEST_FINDING)
    assert not [w for w in said if w in text]
    found = search(clone, CASE, FINDING)
    assert found and not [f for f in found if not f.startswith(ITS_PLACES)]
    assert not [f for f in found if f.endswith((".html", ".ipynb", ".md", ".svg", ".log"))]
    kept = [f for f in found if not f.startswith(".dvc/cache")]
    assert not [f for f in kept if stat.S_IMODE((clone / f).stat().st_mode) & 0o077]
    for folder in ("build", "runs", ".dvc/cache", ".dvc/tmp"):
        assert stat.S_IMODE((clone / folder).stat().st_mode) == 0o700


@pytest.mark.study
def test_a_report_is_where_the_study_needs_it(planted):
    """In no message, executed notebook, metric, page or card; in the wrong column it is refused
    without its words"""
    clone, _ = planted
    found = search(clone, FINDING, TEST_FINDING)
    assert "build/cohorts/own/own.parquet" in found and not shown(found)
    refused = pd.read_csv(clone / "build/cohorts/own/quarantine.csv").set_index("case").reason
    assert f"a text of {len(REPORT)} characters" in refused["case-qz-1"]


@pytest.mark.study
def test_forget(planted):
    clone, _ = planted
    told = run(sys.executable, "-m", "asap.cli", "forget", f"own/{CASE}", cwd=clone, env=ENV)
    assert "rewritten build/cohorts/own/own.parquet" in told
    assert f"removed   build/volumes/own/{CASE}.nii" in told
    assert "raw data, still there: data/own/cases.csv" in told
    assert not search(clone, CASE, FINDING)
    index = pd.read_parquet(clone / "runs/embed/asap/own.parquet")
    assert len(index) == len(pd.read_parquet(clone / "build/cohorts/own/own.parquet"))


def test_a_group_may_share(tmp_path):
    (tmp_path / ".dvc").mkdir()
    assert private_umask(tmp_path) == private_umask(None) == 0o077
    (tmp_path / ".dvc/config").write_text("[cache]\n    shared = group\n")
    assert private_umask(tmp_path) == 0o007
    make_private(tmp_path)
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o770


def test_a_command_on_scans_writes_for_its_owner(tmp_path):
    "Also where the folder and the umask are lax"
    c = synthesize_chest(0, (48, 48, 24), (7, 7, 14))
    write(c.hu, c.affine, tmp_path / "scan.nii.gz")
    words = [sys.executable, "-m", "asap.cli", "standardize", "scan.nii.gz", "-o", "out"]
    old = os.umask(0)
    try:
        subprocess.run(words, cwd=tmp_path, env=ENV, check=True, capture_output=True)
    finally:
        os.umask(old)
    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(made) > 1 and not [f for f in made if f.stat().st_mode & 0o077]
