"Trainings in several processes: the losses of one, one document, errors and signals of any of them"

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import TOP
from toy_stage import Run, write_project
from trains import cohort

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    "Folder by number of processes: a table of losses of each trainer"
    here = tmp_path_factory.mktemp("trainers")
    (here / "cohort").mkdir()
    cohort(here / "cohort")
    env = os.environ | dict(OMP_NUM_THREADS="1", ASAP_ROOT=str(TOP), PYTHONPATH=str(TOP))
    for n in (1, 2, 4):  # programs of their own: a fork and the threads of gloo get on badly
        (here / str(n)).mkdir()
        script = [TOP / "tests/trainers.py", here / "cohort", here / str(n)]
        r = subprocess.run(
            [*TORCHRUN, str(n), "--standalone", *map(str, script)],
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert r.returncode == 0, r.stderr[-3000:]
    return here


NAMES = "pretrain text language vocabulary retrieve odd segment report vqa".split()


@pytest.mark.parametrize("name", NAMES)
def test_processes_have_the_losses_of_one(losses, name):
    one, *more = (pd.read_csv(losses / str(n) / f"{name}.csv") for n in (1, 2, 4))
    assert len(one) == 20 and one.loss.iloc[-1] < one.loss.iloc[0]
    for other in more:
        assert ((other.loss - one.loss).abs() <= 1e-3 * one.loss.abs()).all()
        if name == "odd":  # each process trains on the whole batch
            assert (other.loss == one.loss).all()


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path)


def test_a_stage_in_two_processes_has_one_document_and_the_result_of_one(project):
    found = {}
    for n in (1, 2):
        run = Run(project, "steps=20", processes=n)
        assert run.code() == 0, run.said[-3000:]
        found[n] = json.loads((project / "out.json").read_text())
        assert not (project / "run").exists()
        (project / "out.json").unlink()
    assert "text: 2 processes" in run.said
    assert found[2]["rank"] == 0
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert [f.name for f in (project / "runs/notebooks").iterdir()] == ["text.ipynb"]


def test_an_error_in_any_process_ends_the_stage_and_is_shown(project):
    run = Run(project, "fail=1", processes=2)
    assert run.code() == 1
    assert "broken in the second process" in run.said and "process 2 of 2" in run.said
    assert not (project / "out.json").exists()


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_lets_a_stage_save_and_end_with_75(project, number, processes):
    run = Run(project, "steps=1000000", processes=processes)
    run.wait_for("step 5")
    asked = time.monotonic()
    run.process.send_signal(number)
    assert run.code(120) == 75, run.said[-3000:]
    assert time.monotonic() - asked < 30
    assert (project / "run/resume/state.pt").exists()
