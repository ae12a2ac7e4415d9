"""Stages as jobs of a real SLURM on this machine (tests/cluster/slurm.py): progress and errors,
preemption, cancellation, a waiting process that is stopped or killed. `make cluster` runs all"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import psutil
import pytest
from conftest import TOP

sys.path.insert(0, str(TOP / "tests/cluster"))
from slurm import missing, slurm

ABSENT = [*missing(), *(["submitit"] if importlib.util.find_spec("submitit") is None else [])]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")

# Each pause ends when the stage is asked to stop: the request falls into that step
COUNT = """
import time

from asap.core import log_message, project_root
from asap.preempt import Preempted, catch_signals, stop_requested

if fail:
    raise ValueError("broken in the job")

def work(step):
    log_message(f"step {step}")
    while str(step) in pauses.split(",") and not stop_requested():
        time.sleep(0.01)

kept = project_root() / "kept"
first = int(kept.read_text()) if kept.exists() else 0
log_message(f"resumed at step {first}")
with catch_signals():
    for step in range(first, 40):
        work(step)
        kept.write_text(str(step + 1))
        if stop_requested():
            raise Preempted("count", step + 1, saved=True)
"""
TRAIN = """
import time

import torch
from safetensors.torch import save_file

from asap.core import log_message, project_root
from asap.preempt import stop_requested
from asap.train import fit

class Points:
    def __len__(self):
        return 16
    def __getitem__(self, index):
        return torch.tensor([index[1] / 8 - 1])

def loss(model, x, step):
    log_message(f"step {step}")
    while str(step) in pauses.split(",") and not stop_requested():
        time.sleep(0.01)
    return ((model(x) - 3 * x) ** 2).mean(), {}

torch.manual_seed(0)
root, model = project_root(), torch.nn.Linear(1, 1)
fit(model, loss, Points(), steps=40, batch=8, lr=0.1, seed=0, folder=root / "run",
    save_every=10**9, precision_="no")
save_file(model.state_dict(), root / "weights.safetensors")
"""
RESOURCES = "text: {cpus: 1, memory: 1, minutes: 10}\n"


@pytest.fixture(scope="module")
def cluster():
    with slurm():
        yield dict(os.environ)


def write_project(folder, code):
    "A project with one stage, `text`"
    first = dict(
        cell_type="code",
        id="a",
        metadata=dict(tags=["parameters"]),
        source="stage = ''\npauses = ''\nfail = ''",
        outputs=[],
        execution_count=None,
    )
    cells = [first, dict(first, id="b", metadata={}, source=code)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    notebook = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
    (folder / "nbs/stages").mkdir(parents=True)
    (folder / "nbs/stages/text.ipynb").write_text(json.dumps(notebook))
    (folder / "cluster.yaml").write_text(RESOURCES)
    return folder


class Run:
    "`asap stage text`, and what it has printed"

    def __init__(self, project, env, *given, launcher="slurm"):
        env = env | dict(ASAP_ROOT=str(project), ASAP_STAGES="1", OMP_NUM_THREADS="1")
        env |= dict(ASAP_LAUNCHER=launcher, ASAP_PROCESSES="1")
        env["PYTHONPATH"] = os.pathsep.join([str(TOP), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "asap.cli", "stage", "text", *given]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        self.said, self.unread = "", deque()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            self.said += line
            self.unread.append(line)

    def wait_for(self, text, seconds=300):
        "Until a line that has not been waited for has the text; the line"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self.unread:
                if text in (line := self.unread.popleft()):
                    return line
            assert self.reader.is_alive(), self.said
            time.sleep(0.05)
        raise TimeoutError(f"no `{text}` in {self.said}")

    def code(self, seconds=300):
        code = self.process.wait(seconds)
        self.reader.join()
        return code


def job_of(project):
    return (project / "build/jobs/text/job").read_text()


def ask(*words, env):
    return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout


def test_a_stage_is_a_job(cluster, tmp_path):
    "It shows its progress, states and errors; what it made is there"
    project = write_project(tmp_path, COUNT)
    run = Run(project, cluster)
    assert run.code() == 0, run.said
    for part in ("text: job ", "is RUNNING", "step 39", "text: 0."):
        assert part in run.said
    assert (project / "kept").read_text() == "40"
    assert (project / "runs/notebooks/text.ipynb").exists()
    run = Run(project, cluster, "fail=1")
    assert run.code() == 1
    assert "ValueError: broken in the job" in run.said


@pytest.mark.cluster
def test_preempted_twice_it_ends_with_the_same_bytes(cluster, tmp_path):
    "By a job of another partition, and by the signal that precedes the end of a slot"
    whole = write_project(tmp_path / "whole", TRAIN)
    run = Run(whole, cluster, launcher="")
    assert run.code() == 0, run.said
    project = write_project(tmp_path / "preempted", TRAIN)
    run = Run(project, cluster, "pauses=11,23")
    run.wait_for("step 11")
    urgent = ["--partition=urgent", "--ntasks=4", "--output=/dev/null", "--wrap=true"]
    ask("sbatch", *urgent, env=cluster)
    run.wait_for("stopped after step 12, its state is saved")
    run.wait_for("is PENDING")
    run.wait_for("step 23")
    ask("scancel", "--signal=USR2", job_of(project), env=cluster)
    run.wait_for("stopped after step 24, its state is saved")
    assert run.code() == 0, run.said
    assert run.said.count("resumed at step") == 2
    a, b = ((p / "weights.safetensors").read_bytes() for p in (whole, project))
    assert a == b


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_waiting_process_ends(cluster, tmp_path, number):
    "Stopped, it cancels its job; killed, the next run does so. The stage saves in either case"
    project = write_project(tmp_path, COUNT)
    run = Run(project, cluster, "pauses=11")
    run.wait_for("step 11")
    job = job_of(project)
    run.process.send_signal(number)
    assert run.code() == (75 if number == signal.SIGTERM else -9), run.said
    run = Run(project, cluster)
    assert run.code() == 0, run.said
    assert (f"job {job} of a run that was killed" in run.said) == (number == signal.SIGKILL)
    assert "resumed at step 12" in run.said and job != job_of(project)


@pytest.mark.cluster
def test_a_job_that_ends_otherwise(cluster, tmp_path):
    "Canceled by somebody, it has saved; killed without a signal before, it has no result"
    project = write_project(tmp_path, COUNT)
    run = Run(project, cluster, "pauses=11")
    run.wait_for("step 11")
    ask("scancel", job_of(project), env=cluster)
    assert run.code() == 75
    assert f"text: job {job_of(project)} is CANCELLED; start again to go on" in run.said
    run = Run(project, cluster, "pauses=20")
    run.wait_for("step 20")
    words = {"submitit.core._submit", str(project / "build/jobs/text")}
    for p in psutil.process_iter(["cmdline"]):
        if words < set(p.info["cmdline"] or []):
            p.kill()
    assert run.code() == 1
    assert "resumed at step 12" in run.said
    assert f"text: job {job_of(project)} is FAILED; its log: " in run.said
