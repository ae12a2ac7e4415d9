"Reports and answers in several processes, and by a process that goes on where another was killed"

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import TOP
from test_vqa import QUESTIONS, TABLE, P

from asap.core import read_json, write_json
from asap.text import language

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(folder, left, *launcher) -> int:
    env = os.environ | dict(OMP_NUM_THREADS="1", ASAP_ROOT=str(TOP), PYTHONPATH=str(TOP))
    words = [sys.executable, *launcher, str(TOP / "tests/generates.py"), str(folder), str(left)]
    return subprocess.run(words, env=env, cwd=TOP, timeout=300).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Folder of a run without a kill"
    at = tmp_path_factory.mktemp("whole")
    splits = dict(zip(TABLE.case, TABLE.split))
    language.build_language_model(P, QUESTIONS, splits, 0, at / "language")
    write_json(json.loads(P.model_dump_json()), at / "vqa.json")
    assert run(at, 100) == 0
    return at


def test_two_processes_and_a_kill(whole, tmp_path):
    expected = read_json(whole / "found0.json")
    assert len(set(expected)) > 12, "the answers tell nothing"
    for name in ("language", "vqa.json"):
        (tmp_path / name).symlink_to(whole / name)
    assert run(tmp_path, 4) == -signal.SIGKILL
    kept = sorted(tmp_path.glob("answers/0*.json"))
    assert len(kept) == 4
    kept[0].write_text(kept[0].read_text().replace("[", '["not said", ', 1))
    assert run(tmp_path, 3, *TWO) == 0  # of six batches, three were there, and as they were
    assert [read_json(tmp_path / f"found{i}.json") for i in range(2)] == [expected] * 2
    assert not (tmp_path / "answers").exists() and not (tmp_path / "reports").exists()
