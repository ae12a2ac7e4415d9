"`asap doctor`: locks, space, versions, git"

import shutil
from collections import namedtuple

import pytest

from asap import cli, doctor
from asap.processes import LOCKS, hold_lock

Usage = namedtuple("Usage", "total used free")


def states(found):
    return {f.check: f.state for f in found}


def test_the_command_mends_the_lock_of_dvc(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    lock.write_text('{"read": {')
    cli.main(["doctor"])
    assert "mended  DVC" in capsys.readouterr().out and not lock.exists()
    lock.write_text("{}")
    cli.main(["doctor"])
    assert "ok      DVC" in capsys.readouterr().out and lock.exists()


def test_a_run_is_named(tmp_path):
    with hold_lock(tmp_path / LOCKS / "prepare@stoic.lock", "stage prepare@stoic"):
        told = next((tmp_path / LOCKS).glob("*.json")).read_bytes()
        (found,) = doctor.check_running(tmp_path)
    assert found.text.startswith("stage prepare@stoic runs: process ")
    assert next((tmp_path / LOCKS).glob("*.json")).read_bytes() == told
    assert not list(doctor.check_running(tmp_path))


def test_little_space_is_a_problem(tmp_path, monkeypatch):
    assert states(doctor.check_space(tmp_path)) == dict(disk="ok")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 3 * 10**8))
    first, *_ = doctor.check_space(tmp_path)
    assert first.state == "problem" and "0.3 GB free for build" in first.text


def test_other_versions_are_named(tmp_path):
    (tmp_path / "constraints.txt").write_text("numpy==0.1\nno_such_thing==1\n# comment\n")
    found = {f.check: f for f in doctor.check_versions(tmp_path)}
    assert found["versions"].state == "problem"
    assert "numpy " in found["versions"].text and "no_such_thing" not in found["versions"].text


def test_without_git(tmp_path, monkeypatch):
    (found,) = doctor.check_git(tmp_path)
    assert found.state == "problem" and "`dvc exp` does not" in found.text
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (found,) = doctor.check_git(tmp_path)
    assert "not installed" in found.text


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(doctor, "hold_lock", fail)
    (found,) = doctor.check_file_locks(tmp_path)
    assert found.state == "problem" and "core.hardlink_lock" in found.text


@pytest.mark.parametrize("state, code", [("ok", 0), ("mended", 0), ("problem", 1)])
def test_the_exit_code(state, code, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda root: [doctor.CheckResult("x", state, "y")])
    assert cli.main(["doctor"]) == code
