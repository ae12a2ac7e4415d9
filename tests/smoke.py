"""The smoke study, made once for all test files that change something in it, and what they run
it with"""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import TOP
from filelock import FileLock
from preloaded import kernels

ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "ASAP_ROOT": "",
    "OMP_NUM_THREADS": "1",  # with other numbers, what is trained differs in its last digits
    "OPENBLAS_NUM_THREADS": "1",
}
FORKED = dict(ENV)  # the same; DVC, stages and kernels are forks (tests/preloaded.py, kernels/)

STUDY = (sys.executable, "-m", "asap.cli", "study")  # as `make study` does


def run(*args, cwd, check=True, env=FORKED) -> str:
    "Output of a command, both streams"
    done = subprocess.run(
        args, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert not check or done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def ran(text) -> set[str]:
    "Stages that a repro executed"
    return set(re.findall(r"Running stage '([^']+)'", text))


def change(clone, **changed):
    "Set section__key in the clone's params.yaml"
    raw = yaml.safe_load((clone / "params.yaml").read_text())
    for name, value in changed.items():
        section, key = name.split("__")
        raw[section][key] = value
    (clone / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


@contextlib.contextmanager
def edited(clone, **changed):
    "The same, until the test ends, well or not"
    old = (clone / "params.yaml").read_text()
    change(clone, **changed)
    try:
        yield
    finally:
        (clone / "params.yaml").write_text(old)


def second_checkout(clone, folder) -> Path:
    "A folder of its own, in which nothing has run but what made the raw data"
    second = folder / "second"
    run("bash", "tests/smoke.sh", str(second), cwd=TOP)
    for raw in ("build/synthetic", "build/made"):
        shutil.copytree(clone / raw, second / raw)
    return second


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_when(clone, there, *args):
    "Start a command, wait until `there()` holds, then kill it and all its children at once"
    log = open(clone / "killed.log", "w")
    p = psutil.Popen(args, cwd=clone, env=ENV, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + 180
    while not there():
        with contextlib.suppress(psutil.TimeoutExpired):
            p.wait(timeout=0.02)
            pytest.fail(
                "it ended before it could be killed: " + (clone / "killed.log").read_text()[-3000:]
            )
        assert time.monotonic() < end
    family = [
        p,
        *p.children(recursive=True),
    ]  # DVC first, as when a machine goes down: it has no time to clean up
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)


@pytest.fixture(scope="module")
def clone(tmp_path_factory, worker_id, forks):
    """A clone at smoke scale in which the whole study has run once; each file of tests has a
    copy of its own"""
    FORKED.update(kernels({**forks, **ENV}))
    shared = (
        tmp_path_factory.getbasetemp()
        if worker_id == "master"
        else tmp_path_factory.getbasetemp().parent
    )  # of all workers
    made, to = shared / "smoke/made", tmp_path_factory.mktemp("smoke") / "asap"
    with FileLock(shared / "smoke.lock"):
        if not (shared / "smoke/done").exists():
            shutil.rmtree(made, ignore_errors=True)
            run("bash", "tests/smoke.sh", str(made), cwd=TOP)
            run(*STUDY, cwd=made)
            (shared / "smoke/done").touch()
    shutil.copytree(made, to, symlinks=True)
    return to
