"A fork of the preloaded process is like a program of its own (tests/preloaded.py, stand_in.py)"

import json
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import TOP
from preloaded import preloaded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are forks on Linux only")

TELLS = """
import json, os, sys
print(json.dumps([sys.argv, sys.path, os.getcwd(), dict(os.environ), __name__]))
print("torch" in sys.modules, sys.stdin.read(), file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def start(*words, **options):
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *words], text=True, **pipe, **options)


@pytest.mark.parametrize("form", ["script", "code"])
def test_folder_environment_arguments_streams_and_exit_code(forks, tmp_path, form):
    (tmp_path / "tells.py").write_text(TELLS)
    program = [tmp_path / "tells.py"] if form == "script" else ["-c", TELLS]
    own, fork = (
        start(*words, *program, "7", "b", cwd=tmp_path, env=forks | dict(NEW="1"))
        for words in ([], [TOP / "tests/stand_in.py"])
    )
    (out, no), (same, yes) = own.communicate("given"), fork.communicate("given")
    assert json.loads(out) == json.loads(same)
    assert (no, yes) == ("False given\n", "True given\n")
    assert own.returncode == fork.returncode == 7


@pytest.mark.parametrize("code, end", [("1/0", 1), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_it_ends_as_the_fork_ends(forks, code, end):
    fork = start(TOP / "tests/stand_in.py", "-c", code, env=forks)
    assert ("ZeroDivisionError" in fork.communicate()[1]) == (end == 1)
    assert fork.returncode == end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_both(forks, number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    fork = start(TOP / "tests/stand_in.py", "-c", code, env=forks)
    child = psutil.Process(int(fork.stdout.readline()))
    fork.send_signal(number)
    fork.communicate()
    child.wait(20)
    assert fork.returncode != 0


def test_a_fork_ends_with_the_preloaded_process(monkeypatch):
    monkeypatch.delenv("ASAP_PRELOADED", raising=False)
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with preloaded() as env:
        fork = start(TOP / "tests/stand_in.py", "-c", code, env=env)
        child = psutil.Process(int(fork.stdout.readline()))
        child.parent().send_signal(signal.SIGTERM)
        child.wait(20)
        assert fork.wait(20) != 0


def test_without_the_preloaded_process_it_is_started_as_usual(forks):
    env = {k: v for k, v in forks.items() if k != "ASAP_PRELOADED"}
    fork = start(TOP / "tests/stand_in.py", "-c", TELLS, "0", env=env)
    assert fork.communicate("x")[1] == "False x\n"
