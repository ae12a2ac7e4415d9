"""Stages as jobs of a real SLURM on this machine (tests/cluster/slurm.py): progress and errors,
preemption, cancellation, a waiting process that is stopped or killed. `make cluster` runs all"""

import importlib.util
import os
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import TOP
from toy_stage import TRAIN, Run, write_project

sys.path.insert(0, str(TOP / "tests/cluster"))
from slurm import missing, slurm

ABSENT = [*missing(), *(["submitit"] if importlib.util.find_spec("submitit") is None else [])]
SLURM = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
pytestmark = SLURM
URGENT = ("--partition=urgent", "--ntasks=4", "--output=/dev/null", "--wrap=true")

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
RESOURCES = "text: {cpus: 1, memory: 1, minutes: 10}\n"


@pytest.fixture(scope="module")
def cluster():
    with slurm():
        yield dict(os.environ)


def write(folder, code):
    "A project whose stage is a job"
    write_project(folder, code)
    (folder / "cluster.yaml").write_text(RESOURCES)
    return folder


def start(project, env, *given):
    return Run(project, *given, env=env, launcher="slurm")


def job_of(project, stage="text"):  # "": it has none yet
    number = project / f"build/jobs/{stage}/job"
    return number.read_text() if number.exists() else ""


def ask(*words, env):
    return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout


def test_a_stage_is_a_job(cluster, tmp_path):
    "It shows its progress, states and errors; what it made is there"
    project = write(tmp_path, COUNT)
    run = start(project, cluster)
    assert run.code() == 0, run.said
    for part in ("text: job ", "is RUNNING", "step 39", "text: 0."):
        assert part in run.said
    assert (project / "kept").read_text() == "40"
    assert (project / "runs/notebooks/text.ipynb").exists()
    run = start(project, cluster, "fail=1")
    assert run.code() == 1
    assert "ValueError: broken in the job" in run.said


@pytest.mark.cluster
def test_preempted_twice_it_ends_with_the_same_bytes(cluster, tmp_path):
    "By a job of another partition, and by the signal that precedes the end of a slot"
    whole = write(tmp_path / "whole", TRAIN)
    run = Run(whole)
    assert run.code() == 0, run.said
    project = write(tmp_path / "preempted", TRAIN)
    run = start(project, cluster, "pauses=11,23")
    run.wait_for("step 11")
    ask("sbatch", *URGENT, env=cluster)
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
    project = write(tmp_path, COUNT)
    run = start(project, cluster, "pauses=11")
    run.wait_for("step 11")
    job = job_of(project)
    run.process.send_signal(number)
    assert run.code() == (75 if number == signal.SIGTERM else -9), run.said
    run = start(project, cluster)
    assert run.code() == 0, run.said
    assert (f"job {job} of a run that was killed" in run.said) == (number == signal.SIGKILL)
    assert "resumed at step 12" in run.said and job != job_of(project)


@pytest.mark.cluster
def test_a_job_that_ends_otherwise(cluster, tmp_path):
    "Canceled by somebody, it has saved; killed without a signal before, it has no result"
    project = write(tmp_path, COUNT)
    run = start(project, cluster, "pauses=11")
    run.wait_for("step 11")
    ask("scancel", job_of(project), env=cluster)
    assert run.code() == 75
    assert f"text: job {job_of(project)} is CANCELLED; start again to go on" in run.said
    run = start(project, cluster, "pauses=20")
    run.wait_for("step 20")
    words = {"submitit.core._submit", str(project / "build/jobs/text")}
    for p in psutil.process_iter(["cmdline"]):
        if words < set(p.info["cmdline"] or []):
            p.kill()
    assert run.code() == 1
    assert "resumed at step 12" in run.said
    assert f"text: job {job_of(project)} is FAILED; its log: " in run.said
