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

sys.path.insert(0, str(TOP / "tests"))
from trains import cohort

STAND_IN = str(TOP / "tests/stand_in.py")
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


NOTEBOOK = """
import pandas as pd
import torch

from asap.core import log_message, process_rank, project_root, write_json
from asap.train import discard, fit

class Points:
    def __len__(self):
        return 16
    def __getitem__(self, index):
        return torch.tensor([index[1] / 8 - 1])

def loss(model, x, step):
    if step == 5:
        log_message("step 5")
    if fail and step == 5 and process_rank():
        raise ValueError("broken in the second process")
    return ((model(x) - 3 * x) ** 2).mean(), {}

torch.manual_seed(0)
root, model = project_root(), torch.nn.Linear(1, 1)
fit(model, loss, Points(), steps=int(steps), batch=8, lr=0.1, seed=0, folder=root / "run",
    save_every=10**9, precision_="no")
table = pd.read_csv(root / "run/log.csv")
write_json(dict(rank=process_rank(), loss=table.loss.tolist()), root / "out.json")
discard(root / "run")
"""


@pytest.fixture
def project(tmp_path):
    "A project whose stage `text` is a toy training"
    parameters = dict(
        cell_type="code",
        id="a",
        metadata=dict(tags=["parameters"]),
        source="stage, steps, fail = '', '20', ''",
        outputs=[],
        execution_count=None,
    )
    cells = [parameters, dict(parameters, id="b", metadata={}, source=NOTEBOOK)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    notebook = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
    (tmp_path / "nbs/stages").mkdir(parents=True)
    (tmp_path / "nbs/stages/text.ipynb").write_text(json.dumps(notebook))
    return tmp_path


def start(project, processes, *given):
    env = dict(os.environ, ASAP_ROOT=str(project), ASAP_STAGES="1", OMP_NUM_THREADS="1")
    env |= dict(ASAP_PROCESSES=str(processes), PYTHONPATH=str(TOP))
    command = [sys.executable, "-m", "asap.cli", "stage", "text", *given]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_a_stage_in_two_processes_has_one_document_and_the_result_of_one(project):
    found = {}
    for n in (1, 2):
        run = start(project, n)
        said = run.communicate(timeout=300)[1]
        assert run.returncode == 0, said[-3000:]
        found[n] = json.loads((project / "out.json").read_text())
        assert not (project / "run").exists()
        (project / "out.json").unlink()
    assert "text: 2 processes" in said
    assert found[2]["rank"] == 0
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert [f.name for f in (project / "runs/notebooks").iterdir()] == ["text.ipynb"]


def test_an_error_in_any_process_ends_the_stage_and_is_shown(project):
    run = start(project, 2, "fail=1")
    said = run.communicate(timeout=300)[1]
    assert run.returncode == 1
    assert "broken in the second process" in said and "process 2 of 2" in said
    assert not (project / "out.json").exists()


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_lets_a_stage_save_and_end_with_75(project, number, processes):
    run = start(project, processes, "steps=1000000")
    for line in run.stderr:
        if "step 5" in line:
            break
    asked = time.monotonic()
    run.send_signal(number)
    assert run.wait(timeout=120) == 75, run.stderr.read()[-3000:]
    assert time.monotonic() - asked < 30
    run.stderr.close()
    assert (project / "run/resume/state.pt").exists()
