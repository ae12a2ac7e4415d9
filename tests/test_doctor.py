"""`asap doctor`: file systems, locks, space, versions, git. File systems that lack something are
mounted by tests/limited_fs.py (FUSE)"""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import TOP

from asap import cli, doctor
from asap.processes import DVC_LOCK_ADVICE, DVC_LOCK_ERROR, LOCKS, BusyError, hold_lock, is_held
from asap.run import run_stage, run_study

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


def test_without_git(tmp_path, monkeypatch, capsys):
    "A folder that was unpacked from an archive is no reason for exit code 1"
    monkeypatch.setattr(cli, "project_root", lambda: tmp_path)
    assert cli.main(["doctor"]) == 0
    assert "note    git         no repository: the study runs; `dvc exp`" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (found,) = doctor.check_git(tmp_path)
    assert found.state == "note" and "not installed" in found.text


@pytest.mark.parametrize("state, code", [("ok", 0), ("note", 0), ("mended", 0), ("problem", 1)])
def test_the_exit_code(state, code, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda root: [doctor.CheckResult("x", state, "y")])
    assert cli.main(["doctor"]) == code


def small_study(root: Path) -> Path:
    "A study of one stage, outside git"
    (root / ".dvc").mkdir(parents=True)
    config = (TOP / ".dvc/config").read_text().replace("[core]", "[core]\n    no_scm = true")
    (root / ".dvc/config").write_text(config)
    (root / "dvc.yaml").write_text("stages:\n  page:\n    cmd: echo 1 > o\n    outs: [o]\n")
    shutil.copy(TOP / "params.yaml", root)
    return root


def dvc(root: Path, *words: str, **env: str) -> subprocess.CompletedProcess:
    words = (sys.executable, "-m", "dvc", *words)
    env = os.environ | env
    return subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, timeout=120)


def local_config(root: Path) -> str:
    path = root / ".dvc/config.local"
    return path.read_text() if path.exists() else ""


@pytest.fixture
def mount(tmp_path, monkeypatch):
    "Mounts a new folder that lacks something"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as e:
        pytest.skip(f"needs mfusepy and libfuse: {e}")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "real").mkdir()
    (place := tmp_path / "mounted").mkdir()
    started = []

    def mount(*options: str) -> Path:
        program = [sys.executable, TOP / "tests/limited_fs.py", tmp_path / "real", place, *options]
        started.append(subprocess.Popen(program, stderr=subprocess.PIPE, text=True))
        while not os.path.ismount(place):
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[0].wait(0.05)
                pytest.skip(f"cannot mount: {started[0].stderr.read().strip()[-300:]}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)
        assert started[0].wait(20) == 0


NO_LOCKS = ("--locks", "ENOLCK")


def test_what_a_file_system_can_do(mount, tmp_path):
    here = doctor.measure_file_system(tmp_path)
    there = doctor.measure_file_system(mount(*NO_LOCKS, "--pause", "0.015"), ("project",))
    assert here.abilities["file locks"] and here.abilities["database locks"]
    assert here.abilities["hard links"] and here.abilities["atomic rename"]
    assert here.kind != there.kind == "fuse.limited"
    lacking = {k for k, v in there.abilities.items() if not v}
    assert lacking - {"atomic rename"} == {"file locks", "database locks", "reflinks"}
    assert there.seconds > 50 * 0.015 > here.seconds
    (found,) = doctor.check_file_systems(tmp_path / "mounted")
    assert found.state == "note" and "no file locks" in found.text and "slow" in found.text
    assert not list((tmp_path / "real").iterdir())


def test_dvc_works_without_locks(mount, tmp_path, monkeypatch, capsys):
    root = small_study(mount(*NO_LOCKS) / "clone")
    failed = dvc(root, "status", DVC_SITE_CACHE_DIR=str(tmp_path / "site"))
    assert failed.returncode and "Unable to acquire lock" in failed.stderr
    monkeypatch.setattr(cli, "project_root", lambda: root)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "mended  DVC lock    core.hardlink_lock is now true in .dvc/config.local" in said
    assert "mended  DVC index   core.site_cache_dir is" in said and "no file locks" in said
    own = Path(doctor._dvc_config(root)["core"]["site_cache_dir"])
    assert own.is_relative_to(tmp_path / "temporary") and own.stat().st_mode & 0o777 == 0o700
    works = dvc(root, "status")
    assert works.returncode == 0 and "page" in works.stdout, works.stderr
    kept = local_config(root)
    assert cli.main(["doctor"]) == 0
    assert "mended" not in capsys.readouterr().out and local_config(root) == kept
    assert "type" not in kept  # of the cache: what the project has works
    assert run_study(root, 1) == 0 and (root / "o").read_text() == "1\n"


def test_the_study_names_the_doctor(mount, capsys, monkeypatch):
    "In place of DVC's words, where there are no locks"
    root = small_study(mount(*NO_LOCKS) / "clone")
    monkeypatch.setenv("ASAP_ROOT", str(root))
    assert cli.main(["study"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"asap: {DVC_LOCK_ADVICE}"


def test_a_stage_names_the_doctor(tmp_path, capsys):
    "Another command holds what DVC does not wait for; the doctor names it"
    from dvc.lock import make_lock

    root = small_study(tmp_path)
    (root / ".dvc/tmp").mkdir()
    with make_lock(str(root / ".dvc/tmp/rwlock.lock")):
        assert run_stage("page", root)
        lock, running = doctor.check_lock(root)
    assert lock.state == running.state == "ok" and lock.text == "made of file locks"
    assert running.text.endswith(f"rwlock.lock: process {os.getpid()}")
    assert len(list(doctor.check_lock(root))) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"page stopped: {DVC_LOCK_ADVICE}"
    assert run_stage("page", root) == 0


def test_a_locked_database_is_recognized(tmp_path):
    "What SQLite says where DVC's index cannot be locked"
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db", timeout=0)) as one:
        one.execute("BEGIN EXCLUSIVE")
        with contextlib.closing(sqlite3.connect(tmp_path / "a.db", timeout=0)) as two:
            with pytest.raises(sqlite3.OperationalError, match=DVC_LOCK_ERROR.pattern):
                two.execute("CREATE TABLE a (b)")


def test_a_folder_that_cannot_be_written_is_a_finding(mount, tmp_path, monkeypatch, capsys):
    "The other checks go on"
    small_study(tmp_path / "real/clone")
    root = mount("--read-only") / "clone"
    monkeypatch.setattr(cli, "project_root", lambda: root)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "problem files       check_file_systems stopped: [Errno 30]" in said
    assert "ok      DVC         nothing is locked" in said and "cannot be written: change" in said


def test_neither_locks_nor_hard_links(mount, monkeypatch, capsys):
    root = small_study(mount(*NO_LOCKS, "--links", "EPERM") / "clone")
    monkeypatch.setattr(cli, "project_root", lambda: root)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "has neither file locks nor hard links: DVC cannot run there; clone the project" in said
    assert "hardlink_lock" not in local_config(root)


def test_hard_links_no_longer_work(mount, tmp_path):
    "A clone that was copied from a file system without locks to one without hard links"
    root = small_study(mount("--links", "EPERM") / "clone")
    (root / ".dvc/config.local").write_text("[core]\n    hardlink_lock = true\n")
    failed = dvc(root, "status", DVC_SITE_CACHE_DIR=str(tmp_path / "site"))
    assert failed.returncode and "Operation not permitted" in failed.stderr
    (found,) = doctor.check_lock(root)
    assert found.state == "mended" and "hardlink_lock is now false" in found.text
    assert dvc(root, "status", DVC_SITE_CACHE_DIR=str(tmp_path / "site")).returncode == 0


def check_out(root: Path, site: Path) -> subprocess.CompletedProcess:
    "Have DVC bring the output from its cache"
    (root / "o").unlink(missing_ok=True)
    return dvc(root, "checkout", DVC_SITE_CACHE_DIR=str(site))


@pytest.mark.parametrize("error, mended", [("EPERM", False), ("EACCES", True)])
def test_the_cache_type_is_changed_where_dvc_stops(error, mended, mount, tmp_path):
    "DVC expects EPERM from a hard link, and copies; on EACCES it stops"
    made = small_study(tmp_path / "real/clone")
    assert dvc(made, "repro", DVC_SITE_CACHE_DIR=str(tmp_path / "site")).returncode == 0
    root = mount("--links", error) / "clone"
    (root / "build").mkdir()
    assert bool(check_out(root, tmp_path / "site").returncode) == mended
    (found,) = doctor.check_cache_type(root)
    assert found.state == ("mended" if mended else "ok"), found
    assert local_config(root).strip() == ("[cache]\n    type = copy" if mended else "")
    assert check_out(root, tmp_path / "site").returncode == 0 and (root / "o").exists()
    (again,) = doctor.check_cache_type(root)
    assert again.state == "ok" and "copy" in again.text


def test_what_lies_about_of_the_other_lock_is_removed(mount, tmp_path):
    "With it, DVC would wait forever"
    root = small_study(mount(*NO_LOCKS) / "clone")
    (root / ".dvc/config.local").write_text("[core]\n    hardlink_lock = true\n")
    (root / ".dvc/tmp").mkdir()
    (root / ".dvc/tmp/lock").write_text(" 17\n")
    assert dvc(root, "status", DVC_SITE_CACHE_DIR=str(tmp_path / "site")).returncode
    (found,) = doctor.check_lock(root)
    assert found.state == "mended" and found.text == ".dvc/tmp/lock, of the other kind, removed"
    assert dvc(root, "status", DVC_SITE_CACHE_DIR=str(tmp_path / "site")).returncode == 0
    (found,) = doctor.check_lock(root)
    assert found.state == "ok"


def test_a_hard_link_that_a_killed_dvc_left_is_named(tmp_path):
    root = small_study(tmp_path)
    (root / ".dvc/config.local").write_text("[core]\n    hardlink_lock = true\n")
    (root / ".dvc/tmp").mkdir()
    hold = "from dvc.lock import make_lock; import os, sys; top = sys.argv[1]\n"
    hold += "make_lock(top + '/lock', tmp_dir=top, hardlink_lock=True).lock(); os._exit(1)"
    subprocess.run([sys.executable, "-c", hold, root / ".dvc/tmp"])
    assert [f.state for f in doctor.check_lock(root)] == ["ok", "ok"]  # it may be at work
    stat = (root / ".dvc/tmp/lock").stat()
    os.utime(root / ".dvc/tmp/lock", (stat.st_atime, stat.st_mtime - 3600))
    _, found = doctor.check_lock(root)
    assert found.state == "problem" and "if there is none, delete it" in found.text


def test_locks_of_the_study_without_locks(mount):
    "A second holder is refused; what a killed one leaves is named"
    root = mount(*NO_LOCKS)
    path = root / LOCKS / "study.lock"
    with hold_lock(path, "the study"):
        with pytest.raises(BusyError, match=f"process {os.getpid()} .*if it was killed, delete"):
            with hold_lock(path, "the study", 0.1):
                pass
        assert [f.state for f in doctor.check_running(root)] == ["ok"]
    assert not is_held(path)
    code = "import sys, os; from pathlib import Path; from asap.processes import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1]), 'x'): os._exit(9)"
    subprocess.run([sys.executable, "-c", code, path])
    (found,) = doctor.check_running(root)
    assert (
        found.state == "problem" and "has ended and left its lock: delete study.held" in found.text
    )
    path.with_suffix(".held").unlink()
    with hold_lock(path, "the study", 0.1):
        pass
