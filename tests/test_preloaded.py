"A fork of the preloaded process is like a program of its own (tests/preloaded.py, stand_in.py)"

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import TOP
from preloaded import kernels, preloaded
from ruamel.yaml import YAML

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


# Programs that become forks by their names (tests/kernels/sitecustomize.py)


@pytest.fixture
def project(tmp_path):
    "A folder with a command line that tells what it is, in a repository of DVC's"
    (tmp_path / "asap").mkdir()
    (tmp_path / "asap/__init__.py").touch()
    (tmp_path / "asap/cli.py").write_text(TELLS)
    return tmp_path


def test_a_module_is_a_fork_with_the_same_arguments(forks, project):
    words = ["-m", "asap.cli", "7", "b"]
    own, fork = (start(*words, cwd=project, env=env) for env in (forks, kernels(forks)))
    (out, no), (same, yes) = own.communicate("given"), fork.communicate("given")
    (argv, path, folder, _, name), tells = json.loads(out), json.loads(same)
    assert [tells[0], tells[2], tells[4]] == [argv, folder, name]
    assert [p for p in tells[1] if p not in path] == [str(TOP / "tests/kernels")]
    assert (no, yes) == ("False given\n", "True given\n")
    assert own.returncode == fork.returncode == 7


@pytest.mark.parametrize("form", ["module", "script"])
def test_dvc_is_a_fork_that_writes_the_lock_that_dvc_reads(forks, project, form):
    program = ["-m", "dvc"] if form == "module" else [str(Path(sys.executable).with_name("dvc"))]
    (project / "params.yaml").write_text("rate: 1e-05\nnote: null\nyes: 'no'\n")
    (project / "dvc.yaml").write_text(
        "stages:\n  one:\n    cmd: echo 1 > out\n    params: [rate, note, 'yes']\n    outs: [out]\n"
    )
    (project / "asap/cli.py").write_text("print('no part of this')")
    for words in (["init", "-q", "--no-scm"], ["repro"]):
        fork = start(*program, *words, cwd=project, env=kernels(forks))
        assert fork.communicate()[1] == "" and fork.returncode == 0
    lock = (project / "dvc.lock").read_text()
    assert json.loads(start(*program, "status", "--json", cwd=project).communicate()[0]) == {}
    start(*program, "repro", "-f", cwd=project).communicate()
    yaml = YAML(typ="safe")
    assert yaml.load(lock) == yaml.load(project / "dvc.lock")
    fork = start(*program, "repro", "two", cwd=project, env=kernels(forks))
    assert "two" in fork.communicate()[1] and fork.returncode == 255
