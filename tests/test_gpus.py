"Calls and stages with a GPU each: no machine with several is needed to see who gets which"

import os
import time

import pytest

from asap import core, run
from asap.core import GPUS, parallel_map, visible_gpus


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(core, "_count_gpus", lambda: 3)
    monkeypatch.delenv(GPUS, raising=False)


def call(i, fail=False):
    import os
    import time

    began = time.monotonic()
    if fail:
        raise ValueError(f"call {i} failed")
    time.sleep(0.3)
    return os.environ[GPUS], os.getpid(), began, time.monotonic()


def test_each_process_has_one_gpu_and_no_gpu_two_calls(three):
    done = parallel_map(call, [(i,) for i in range(9)], 1, soon=0, gpus=True)
    assert {g for g, *_ in done} == {"0", "1", "2"}
    assert len({(g, pid) for g, pid, *_ in done}) == 3
    for gpu in "012":
        times = sorted(d[2:] for d in done if d[0] == gpu)
        assert all(a[1] <= b[0] for a, b in zip(times, times[1:]))


def test_an_error_ends_the_workers(three):
    todo = [(i, i == 1) for i in range(30)]
    began = time.monotonic()
    with pytest.raises(ValueError, match="call 1 failed"):
        parallel_map(call, todo, 1, soon=0, gpus=True)
    assert time.monotonic() - began < 60
    assert parallel_map(pow, [(2, 3), (3, 2)], 1, soon=0, cost=[1, 2], gpus=True) == [8, 9]


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "2"}])
def test_one_process_where_there_is_no_gpu_or_torchrun(monkeypatch, variables):
    monkeypatch.setattr(core, "_count_gpus", lambda: 2 * len(variables))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel_map(os.getpid, [()] * 2, 1, soon=0, gpus=True) == [os.getpid()] * 2


def test_stages_share_the_gpus(monkeypatch):
    monkeypatch.setattr(core, "_count_gpus", lambda: 3)
    monkeypatch.setenv(GPUS, "4,5,7")
    assert visible_gpus() == ["4", "5", "7"]
    assert [run._stage_environment(2, i)[GPUS] for i in range(2)] == ["4,7", "5"]
    assert run._stage_environment(1, 0)[GPUS] == "4,5,7"
    assert [run._stage_environment(5, i)[GPUS] for i in range(5)] == ["4", "5", "7", "4", "5"]
    monkeypatch.setattr(core, "_count_gpus", lambda: 0)
    assert run._stage_environment(2, 1)[GPUS] == "4,5,7"
