"A run that is killed ends whole: DVC, shells, stages, their children, forks and workers; locks"

import os
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from asap.processes import ABOVE, BusyError, all_run, hold_lock, start_time

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

STAGE = """
import os, subprocess, sys, time
from asap.processes import lead
from below import sleep
lead()
open("stage.pid", "w").write(str(os.getpid()))
subprocess.Popen([sys.executable, "-c", "import below; below.sleep('child')"])
if not os.fork():
    sleep("fork")
import joblib
joblib.Parallel(2)(joblib.delayed(sleep)(f"worker{i}") for i in range(2))
"""
BELOW = """
import time
import asap

def sleep(name):
    open(f"{name}.here", "w").close()
    time.sleep(300)
"""
STUDY = "import sys; from pathlib import Path; from asap.run import run_study; run_study(Path())"
STARTS = {"study": ["-c", STUDY], "dvc": ["-m", "dvc", "repro"], "stage": ["stage.py"]}
PLACES = ("child", "fork", "worker0", "worker1")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "below.py").write_text(BELOW)
    page = dict(cmd=f"{shlex.quote(sys.executable)} stage.py", outs=["page.txt"])
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(dict(stages=dict(page=page))))
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True
    )
    return tmp_path


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)


def family(run):
    return [run, *psutil.Process(run.pid).children(recursive=True)]


def alive(processes):
    return [p for p in processes if start_time(p.pid) is not None]


@linux
@pytest.mark.parametrize("start", STARTS)
def test_a_killed_run_leaves_no_process(project, start):
    env = {k: v for k, v in os.environ.items() if k != ABOVE}
    env["PYTHONPATH"] = os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")])
    run = subprocess.Popen([sys.executable, *STARTS[start]], cwd=project, env=env)
    try:
        wait_for(lambda: all((project / f"{name}.here").exists() for name in PLACES))
        all_of_it = family(run)
        assert len(all_of_it) >= 5
        run.send_signal(signal.SIGKILL)
        run.wait()
        wait_for(lambda: not alive(all_of_it), 10)
    finally:
        for p in alive(all_of_it):
            p.kill()


LATE = """
import os, time
from pathlib import Path
Path("begun").write_text(str(os.getpid()))
while not Path("go").exists():
    time.sleep(0.05)
import asap
time.sleep(300)
"""


@linux
def test_a_stage_whose_dvc_was_killed_before_it_could_look(project):
    "Its parent is another process by then"
    (project / "stage.py").write_text(LATE)
    env = {k: v for k, v in os.environ.items() if k != ABOVE}
    words = [sys.executable, *STARTS["dvc"]]
    run = subprocess.Popen(words, cwd=project, env=env, start_new_session=True)
    wait_for(lambda: (project / "begun").exists() and (project / "begun").read_text())
    stage = psutil.Process(int((project / "begun").read_text()))
    try:
        run.kill()
        run.wait()
        (project / "go").touch()
        wait_for(lambda: not alive([stage]), 10)
    finally:
        for p in alive([stage]):
            p.kill()


@linux
def test_a_number_that_is_used_again_is_another_process():
    own = f"{os.getpid()}:{start_time(os.getpid())}"
    assert all_run(own) and all_run("")
    assert not all_run(f"{os.getpid()}:1") and not all_run(f"{own} 4194303:5")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    name = f"{ended.pid}:{start_time(ended.pid)}"
    wait_for(lambda: not all_run(name))  # a zombie: nobody has waited for it
    ended.wait()


def test_a_second_study_is_refused(project, monkeypatch):
    from asap.run import run_study

    monkeypatch.setattr("asap.run.hold_lock", lambda path, what: hold_lock(path, what, 0.1))
    with hold_lock(project / "build/locks/study.lock", "the study"):
        with pytest.raises(
            BusyError, match=rf"the study is running already \(process {os.getpid()}"
        ):
            run_study(project)


def test_a_second_stage_is_refused(tmp_path, monkeypatch):
    from asap import cli

    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    monkeypatch.setattr(cli, "hold_lock", lambda path, what: hold_lock(path, what, 0.1))
    with hold_lock(tmp_path / "build/locks/embed@asap.lock", "stage embed@asap"):
        with pytest.raises(BusyError, match="stage embed@asap is running already"):
            cli.execute_stage("embed@asap")
    with pytest.raises(FileNotFoundError, match="no stage `embed@asap`"):
        cli.execute_stage("embed@asap")


def test_the_lock_of_a_killed_holder_is_free(tmp_path):
    code = "import sys, time; from pathlib import Path; from asap.processes import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(300)"
    path = tmp_path / "a.lock"
    words = [sys.executable, "-c", code, str(path)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=f"process {holder.pid} on .* since"):
        with hold_lock(path, "x", 0.1):
            pass
    holder.kill()
    holder.wait()
    with hold_lock(path, "x", 0.1):
        pass
