"An archive of the project, unpacked in a path with a blank and an umlaut, on a machine without git"

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP
from project_files import _without_git, project_files

from asap.pretrain import checkpoint
from asap.run import run_study

LEFT_OUT = ("weights/", "nbs/images/", "nbs/tutorials/", "asap/inference/niivue/")
GIT = ("git", "git.exe", "git-upload-pack")
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    "A folder of the machine's programs except git"
    folder = tmp_path_factory.mktemp("tools")
    for place in ("/usr/local/bin", "/usr/bin", "/bin"):
        for f in Path(place).iterdir() if Path(place).is_dir() else ():
            if f.name not in GIT and not (folder / f.name).exists():
                (folder / f.name).symlink_to(f)
    (folder / "python").unlink(missing_ok=True)
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    "What `git archive` would hold, without the heavy files"
    folder = tmp_path_factory.mktemp("archive") / "a b/ä"
    for name in project_files():
        if not name.startswith(LEFT_OUT):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, folder / name)
    return folder


@pytest.fixture
def outside(archive, tools, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(archive.parents[1]))
    return archive


def run(*words, cwd, **env) -> subprocess.CompletedProcess:
    env = os.environ | dict(PYTHONPATH=str(cwd), ASAP_ROOT="") | env
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)


def test_files_are_the_same_with_and_without_git(outside):
    "Also where outputs, caches and settings of a run lie about"
    names = {n for n in project_files(outside)}
    for made in ("build/x", "runs/x", ".venv/x", ".dvc/tmp/x", "asap/__pycache__/x.pyc"):
        (outside / made).parent.mkdir(parents=True, exist_ok=True)
        (outside / made).touch()
    assert set(_without_git(outside)) == names == set(project_files(outside))
    assert "dvc.yaml" in names and ".dvc/config" in names


def test_smoke_copy_and_a_stage_of_it(outside):
    "What `make quick` does, up to a stage that is cheap; then what needs git"
    done = run("bash", "tests/smoke.sh", "build/quick", cwd=outside, PYTHON="python")
    assert done.returncode == 0, done.stderr
    assert "need git" in done.stdout + done.stderr
    quick = outside / "build/quick"
    assert not (quick / ".git").exists()
    assert (quick / "params.yaml").read_text() != (outside / "params.yaml").read_text()
    listed = run("python", "-m", "dvc", "stage", "list", cwd=quick)
    assert "page" in listed.stdout, listed.stderr
    done = run("python", "-m", "dvc", "repro", "-s", "synthesize", "--dry", cwd=quick)
    assert done.returncode == 0, done.stderr
    refused = run("python", "-m", "dvc", "exp", "run", cwd=quick)
    assert refused.returncode and "Only supported for Git repositories" in refused.stderr


def small_study(folder: Path) -> Path:
    "A study of one stage"
    (folder / ".dvc").mkdir(parents=True)
    shutil.copy(TOP / ".dvc/config", folder / ".dvc")
    (folder / "dvc.yaml").write_text("stages:\n  page:\n    cmd: echo 1 > o\n    outs: [o]\n")
    return folder


def test_study_runs_outside_git(tmp_path, tools, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tools))
    folder = small_study(tmp_path / "a b/ä")
    assert run_study(folder, 1) == 0 and (folder / "o").exists()
    assert "need git: git init" in "".join(capsys.readouterr())
    assert run_study(folder, 1) == 0
    assert not (folder / ".dvc/config").read_text().count("no_scm")


@needs_git
def test_study_uses_a_repository_that_is_made_later(tmp_path, capsys):
    folder = small_study(tmp_path / "ä")
    assert run_study(folder, 1) == 0
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    capsys.readouterr()
    assert run_study(folder, 1) == 0 and "need git" not in "".join(capsys.readouterr())
    assert "no_scm" not in (folder / ".dvc/config.local").read_text()


@needs_git
def test_study_in_a_folder_that_the_repository_around_it_ignores(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("/build/\n")
    folder = small_study(tmp_path / "build/a b")
    assert run_study(folder, 1) == 0 and (folder / "o").exists()
    assert "no_scm = true" in (folder / ".dvc/config.local").read_text()


@needs_git
@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="needs root, to change an owner")
def test_study_in_a_clone_of_another_owner(tmp_path, monkeypatch, capsys):
    folder = small_study(tmp_path / "a b")
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    for f in [folder, *folder.rglob("*")]:
        os.chown(f, 12345, 12345)
    monkeypatch.setenv("ASAP_ROOT", str(folder))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert sorted(project_files(folder)) == [".dvc/config", "dvc.yaml"]
    assert run_study(folder, 1) == 0 and (folder / "o").exists()
    assert "safe.directory" in "".join(capsys.readouterr())
    assert checkpoint.git_revision() is None and "needs git" in checkpoint.code_version()


@needs_git
def test_no_commit_of_a_repository_that_holds_something_else(tmp_path, monkeypatch):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").touch()
    for words in (["init", "-q"], ["add", "f"], ["commit", "-qm", "one"]):
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive/f").touch()
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path))
    assert len(checkpoint.git_revision()) == 40
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path / "archive"))
    assert checkpoint.git_revision() is None
