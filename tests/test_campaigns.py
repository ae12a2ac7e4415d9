"""A part of `make kills`, `make training_kills` and `make full_disk`, on small projects; and that
the campaigns notice what they look for"""

import os
import shlex
import subprocess
import sys
import time

import pytest
import yaml
from conftest import TOP, load_script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

STAGE = """
import sys, time
from asap.processes import lead
lead()
time.sleep(float(sys.argv[2]))
try:
    with open(sys.argv[1], "wb") as f:
        f.write(sys.argv[1].encode() * 500_000)
except OSError as e:
    sys.exit(str(e))
"""
STUDY = "from pathlib import Path; from asap.run import run_study; exit(run_study(Path.cwd(), 1))"
STUDY = [sys.executable, "-c", STUDY]
NAMES = ("runs/a", "runs/b")  # 3 MB each
SLEEP = "import time; time.sleep(300)"
LEAVES = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(TOP / "benchmarks"))
        return [
            load_script(TOP / f"benchmarks/{n}.py")
            for n in ("kills", "full_disk", "training_kills")
        ]


@pytest.fixture(autouse=True)
def this_tree(scripts, monkeypatch):
    "The project of the tests has no asap of its own"
    smoke = scripts[0].smoke
    env = smoke.environment() | dict(PYTHONPATH=str(TOP))
    monkeypatch.setattr(smoke, "environment", lambda: env)


@pytest.fixture
def kills(scripts):
    return scripts[0]


@pytest.fixture
def full_disk(scripts):
    return scripts[1]


def make_project(folder, seconds=1.0):
    "Two stages, one after the other"
    folder.mkdir(exist_ok=True)
    (folder / "runs").mkdir()
    (folder / "stage.py").write_text(STAGE)
    stages = {}
    for name, before in zip(NAMES, (None, NAMES[0])):
        command = f"{shlex.quote(sys.executable)} stage.py {name} {seconds}"
        stages[name[-1]] = dict(cmd=command, deps=[before] if before else [], outs=[name])
    (folder / "dvc.yaml").write_text(yaml.safe_dump(dict(stages=stages)))
    words = [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"]
    subprocess.run(words, cwd=folder, check=True)
    with open(folder / ".dvc/config", "a") as f:
        f.write("[cache]\n    type = hardlink\n")
    (folder / "params.yaml").touch()


@pytest.fixture
def expected(kills, tmp_path):
    "Hashes of what the two stages write"
    for name in NAMES:
        path = tmp_path / "expected" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 500_000)
    return kills.smoke.outputs(tmp_path / "expected")


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)


# ----- kills


def test_kills_of_a_small_study(kills, expected, tmp_path):
    commands = kills.COMMANDS | {"asap study": STUDY}
    options = dict(work=tmp_path / "work", expected=expected, make=make_project, commands=commands)
    steps = [kills.Step("asap study", 2.5, True), kills.Step("dvc repro", 2.5, False)]
    campaign = kills.Campaign(**options)
    campaign.run(steps)
    rows = campaign.rows
    assert [r["command"] for r in rows if r["ended"] == "killed"] == ["asap study", "dvc repro"]
    assert rows[-1]["ended"] == "0" and rows[-1]["compared"] == "2"
    assert not [r for r in rows if kills.is_fault(r)], rows
    again = kills.Campaign(**options)
    again.run(steps)
    assert again.rows == rows, "a campaign goes on from what is kept"


def test_a_process_that_goes_on_is_seen(kills, tmp_path):
    commands = {"asap study": [sys.executable, "-c", LEAVES]}
    campaign = kills.Campaign(tmp_path, {}, os.mkdir, commands)
    run = campaign.start("asap study")
    wait_for(lambda: len(kills.smoke.processes_of(campaign.folder, run.number)) == 2)
    campaign._kill(run, kills.Step("asap study", 0, False))
    row = campaign.rows[0]
    assert SLEEP in row["left"] and kills.is_fault(row)
    wait_for(lambda: not kills.smoke.processes_of(campaign.folder))


def test_two_kernels_of_a_stage_are_seen(kills, tmp_path, monkeypatch):
    "A fork of a kernel, which has its connection file, is no second one"
    env = kills.smoke.environment() | dict(DVC_STAGE="one")
    monkeypatch.setattr(kills.smoke, "environment", lambda: env)
    words = [sys.executable, "-c", SLEEP, "ipykernel_launcher", "-f"]

    def start(number, file):
        kills.smoke.start([*words, file, "--more"], tmp_path, number, tmp_path / "log")
        wait_for(lambda: len(kills.smoke.processes_of(tmp_path)) == number)

    try:
        start(1, "a.json")
        start(2, "a.json")
        assert kills.kernels(tmp_path) == {"one": {"a.json"}}
        with kills.Watch(tmp_path) as watch:
            start(3, "b.json")
            wait_for(lambda: watch.doubled == {"one"})
    finally:
        kills.smoke.end_all(tmp_path)
    assert not kills.smoke.processes_of(tmp_path)


def test_a_campaign_refuses_a_folder_at_work(kills, tmp_path):
    smoke, folder = kills.smoke, tmp_path / "work/study"
    folder.mkdir(parents=True)
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP], cwd=folder)
    with pytest.raises(SystemExit, match=f"process {stranger.pid} .* is at work in {folder}"):
        with smoke.guarded(tmp_path / "work", "a try", [folder]):
            pass
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    lock = folder / kills.LOCKS / "study.lock"
    with smoke.hold_lock(lock, "the study"):
        with pytest.raises(SystemExit, match=f"study runs in {folder} .process {os.getpid()}"):
            with smoke.guarded(tmp_path / "work", "a try", [folder]):
                pass


@pytest.mark.parametrize("text, half", [('{"a": {}}', False), ('{"a": {', True), (None, False)])
def test_a_half_written_list_of_locks(kills, tmp_path, text, half):
    if text:
        (tmp_path / "rwlock").write_text(text)
    assert kills.is_half_written(tmp_path / "rwlock") == half


def test_what_is_a_fault(kills):
    good = dict.fromkeys(kills.COLUMNS, "") | dict(ended="killed")
    assert not kills.is_fault(good)
    for change in (dict(locks="study"), dict(two_writers="text"), dict(different="runs/a")):
        assert kills.is_fault(good | change)
    assert kills.is_fault(good | dict(ended="1", said="KeyError: 'text'"))
    assert not kills.is_fault(good | dict(ended="255", said="ERROR: Unable to read RWLock-file"))


def test_steps_are_drawn(kills):
    steps = kills.draw_steps(40, 0, 8, 40)
    assert steps == kills.draw_steps(40, 0, 8, 40) and steps[:9] == kills.draw_steps(9, 0, 8, 40)
    assert steps != kills.draw_steps(40, 1, 8, 40)
    assert sum(s.command == "dvc repro" for s in steps) == 20
    assert {s.at_once for s in steps} == {True, False}
    assert all(8 <= s.seconds <= 40 for s in steps)


# ----- bytes


def test_bytes_are_compared_but_for_times(kills, tmp_path):
    smoke, page = kills.smoke, "<p>0.71</p><details><summary>Minutes by stage, last run</summary>"
    (tmp_path / "runs/study").mkdir(parents=True)
    (tmp_path / "runs/minutes").mkdir()

    def written(number="0.71", minutes="1.5", other="a"):
        (tmp_path / "runs/study/index.html").write_text(
            f"{page.replace('0.71', number)}{minutes}</details><p>{other}</p>"
        )
        (tmp_path / "runs/minutes/a.json").write_text(minutes)
        return smoke.outputs(tmp_path)

    first = written()
    assert not smoke.differences(written(minutes="2.5"), first)
    for change in (dict(number="0.72"), dict(other="b")):
        assert smoke.differences(written(**change), first) == ["runs/study/index.html"]
    (tmp_path / "runs/b.csv").touch()
    assert (
        smoke.differences(written(), first) == ["runs/b.csv"] == smoke.differences(first, written())
    )


# ----- a full disk


def test_a_small_study_on_a_small_disk(full_disk, expected, tmp_path):
    campaign = full_disk.Campaign(
        tmp_path, expected, lambda f: make_project(f, 0.0), tuple(STUDY), limit=120
    )
    try:
        row = campaign.try_size(5_000_000, 30_000_000)
    except full_disk.NoDiskError as e:
        pytest.skip(f"no small disk can be mounted here: {e}")
    row = {k: str(v) for k, v in row.items()}
    assert not full_disk.is_fault(row), str(row)
    assert (row["stage"], row["done"], row["done_after"]) == ("b", "1", "1")
    assert not os.path.ismount(campaign.folder)


SENTENCE = (
    "text stopped: no space is left. 0.00 GB are free for build, runs ({}/build). Make room there, "
    "or move the project or TMPDIR to a larger disk, and start again: finished stages stay"
)


def test_what_a_person_reads(full_disk, tmp_path):
    told = full_disk.judge(f"text | asap: {SENTENCE.format(tmp_path)}\n", tmp_path)
    told |= dict(stopped="1", ended="0", different="", traceback="0")
    assert (told["stage"], told["free"], told["place"]) == ("text", "0.00", "named")
    assert not full_disk.is_fault(told)
    other = full_disk.judge(SENTENCE.format("/another"), tmp_path)
    assert other["place"] == "/another/build" and full_disk.is_fault(told | other)
    silent = full_disk.judge("Traceback (most recent call last):\nOSError: [Errno 28]", tmp_path)
    assert silent["traceback"] == 1 and not silent["stage"] and full_disk.is_fault(told | silent)


def test_a_file_with_two_names_takes_its_space_once(full_disk, tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build/a").write_bytes(bytes(5000))
    (tmp_path / "build/b").hardlink_to(tmp_path / "build/a")
    (tmp_path / "asap.py").write_bytes(bytes(10))
    assert full_disk.needed(tmp_path) == (4096, 8192)


# ----- kills of a training


TRAINING = """
import sys, time
from pathlib import Path
from asap.processes import lead
lead()
made, kept = Path("runs/pretrain/asap"), Path("build/resume/pretrain/asap/state")
kept.parent.mkdir(parents=True, exist_ok=True)
for step in range(int(kept.read_text()) if kept.exists() else 0, 8):
    time.sleep(0.25)
    kept.write_text(str(step + 1))
(made / "checkpoint").mkdir(parents=True)
for name in sys.argv[1:]:
    (made / name).write_text("{}")
"""


@pytest.mark.parametrize("spoiled", ["", "other weights", "a process"])
def test_kills_of_a_training(scripts, tmp_path, monkeypatch, spoiled):
    one = scripts[2]
    text = TRAINING.replace("lead()\n", f"{LEAVES}\n") if spoiled == "a process" else TRAINING
    words = [sys.executable, "-c", text.format("5"), *one.COMPARED]
    monkeypatch.setattr(one, "command", lambda n: words)
    study, work = tmp_path / "study", tmp_path / "work"
    study.mkdir(), work.mkdir()
    options = one.argparse.Namespace(work=work, kills=2, seed=0, processes=1)
    expected = {n: one.smoke.hashlib.sha256(b"5").hexdigest()[:16] for n in one.COMPARED}
    if spoiled == "other weights":
        expected["checkpoint/model.safetensors"] = "0"
    rows = one.campaign(options, study, expected, 2.0).all if spoiled != "a process" else []
    if not rows:
        process = one.smoke.start(words, study, 1, work / "run.log")
        wait_for(lambda: len(one.smoke.processes_of(study, 1)) == 2)
        assert len(one.kill(study, process, 1)) == 1
        return
    assert rows[-1]["ended"] == "0"
    assert sum(r["ended"] == "killed" for r in rows) == 2 and not any(r["left"] for r in rows)
    assert bool(rows[-1]["different"]) == bool(spoiled)
