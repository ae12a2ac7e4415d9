"""Training in processes of its own: killed at any moment, shared by two, in the precisions there
are."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TOP
from safetensors.torch import load_file

sys.path.insert(0, str(TOP / "tests"))
from trains import cohort

ENV = dict(os.environ, OMP_NUM_THREADS="1", ASAP_ROOT=str(TOP))
SCRIPT = [str(TOP / "tests/stand_in.py"), str(TOP / "tests/trains.py")]


@pytest.fixture(scope="module")
def here(tmp_path_factory, forks):
    d = tmp_path_factory.mktemp("trains")
    (d / "cohort").mkdir()
    cohort(d / "cohort")
    ENV.update(forks, OMP_NUM_THREADS="1", ASAP_ROOT=str(TOP))
    return d


def launch(processes=1):
    if processes == 1:
        return [sys.executable, *SCRIPT]
    port = str(random.randint(20000, 40000))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [sys.executable, *torchrun, "--master_port", port, *SCRIPT]


def run(*args, processes=1, check=True):
    r = subprocess.run(
        [*launch(processes), *map(str, args)], env=ENV, capture_output=True, text=True, timeout=300
    )
    assert not check or r.returncode == 0, r.stderr[-3000:]
    return r


def weights(folder):
    return load_file(folder / "weights.safetensors")


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bits(here):
    run("asap", here / "whole", 24, 2, 1)
    kills, folder = 0, here / "killed"
    for _ in range(
        4
    ):  # a state is written at every step, so many of these fall into the writing of one
        p = subprocess.Popen(
            [sys.executable, *SCRIPT, "asap", str(folder), "24", "2", "1"],
            env=ENV,
            stderr=subprocess.DEVNULL,
        )
        before = state_time(folder)
        while p.poll() is None and state_time(folder) == before:
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        if p.poll() is None:
            p.send_signal(signal.SIGKILL)
            kills += 1
        p.wait()
        if (folder / "weights.safetensors").exists():
            break
    assert kills >= 2
    run("asap", folder, 24, 2, 1)
    a, b = weights(here / "whole"), weights(folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for f in ("log.csv",):
        assert (here / "whole" / f).read_bytes() == (folder / f).read_bytes()
    assert not list((folder / "resume").glob(".*")), "nothing half-written is left"


@pytest.mark.cluster
def test_killed_after_every_slot_it_ends_with_the_same_bits(here):
    """A slot has 4 s of CPU, of which the start takes up to half; in each one the fractions of the
    positional baseline or the steps get more"""
    run("slot", here / "one-slot", 120, 0)
    folder, before, slots = here / "slots", (0, 0), 0
    while code := run("slot", folder, 120, 4, check=False).returncode:
        after = kept(folder)
        assert code == -signal.SIGKILL and after > before and slots < 30
        before, slots = after, slots + 1
    assert slots >= 2
    a, b = weights(here / "one-slot"), weights(folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (here / "one-slot/log.csv").read_bytes() == (folder / "log.csv").read_bytes()


def kept(folder):  # bytes of organ fractions, steps
    state, bytes_ = folder / "resume/state.pt", 0
    for f in folder.rglob("fractions-*"):
        bytes_ += f.stat().st_size
    return bytes_, torch.load(state, weights_only=True)["step"] if state.exists() else 0


def state_time(folder):  # when the state was last written
    try:
        return (folder / "resume/state.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def first_gradient(folder):
    "From the running means after one step: 0.1 of the clipped gradient in AdamW, 0.05 in Muon"
    held = [
        v
        for o in torch.load(folder / "resume/state.pt", weights_only=True)["opts"]
        for v in o["state"].values()
    ]
    return [v["exp_avg"] * 10 if "exp_avg" in v else v["momentum_buffer"] * 20 for v in held]


def test_two_processes_contrast_what_one_does(here):
    """Every sentence meets every image of both, and the gradient is that of one process, to
    fp32's rounding"""
    for n in (1, 2):
        run("contrast", here / f"contrast-{n}", processes=n)
    a, b = (weights(here / f"contrast-{n}") for n in (1, 2))
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6), k


@pytest.mark.parametrize("arm, tolerance", [("asap", 0.02), ("clip", 1e-5)])
def test_two_processes_learn_what_one_does(here, arm, tolerance):
    """The first gradient, over its largest entry. Untrained, all patches are alike, and the
    rounding of another order of sums decides which are a sentence's best: hence 2 % where
    patches are chosen"""
    for n in (1, 2):
        run(arm, here / f"{arm}-{n}", 2, 4, 1, processes=n)
    one, two = (first_gradient(here / f"{arm}-{n}") for n in (1, 2))
    assert max(float((a - b).abs().max()) for a, b in zip(one, two)) <= tolerance * max(
        float(g.abs().max()) for g in one
    )


def test_two_processes_that_encode_one_pair_at_a_time_learn_what_one_does(here):
    "The contrast is that of the whole batch, over processes and micro batches"
    small = ["micro_batch_size=1", "activation_checkpointing=1"]
    run("clip", here / "whole-batch", 2, 4, 1)
    run("clip", here / "by-pairs", 2, 4, 1, *small, processes=2)
    one, two = (first_gradient(here / k) for k in ("whole-batch", "by-pairs"))
    largest = max(float(g.abs().max()) for g in one)
    assert max(float((a - b).abs().max()) for a, b in zip(one, two)) <= 1e-5 * largest


def test_a_batch_that_cannot_be_shared_is_an_error(here):
    r = run("asap", here / "odd", 2, 3, 99, processes=2, check=False)
    assert (
        r.returncode
        and "a batch of 3 cannot be shared by 2 processes: make it a multiple of them" in r.stderr
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_stop_it_saves_and_goes_on_to_the_same_bits(here, processes):
    """SIGTERM during the training: the state is that of the step, no matter when the last regular
    save was"""
    whole, folder = here / f"uninterrupted-{processes}", here / f"stopped-{processes}"
    given = ["24", "2", "5"]
    run("asap", whole, *given, processes=processes)
    p = subprocess.Popen(launch(processes) + ["asap", str(folder), *given], env=ENV)
    while p.poll() is None and state_time(folder) is None:
        time.sleep(0.002)
    p.send_signal(signal.SIGTERM)
    assert p.wait(30) == (75 if processes == 1 else 1)  # torchrun reports a failure as 1
    assert not (folder / "weights.safetensors").exists()
    run("asap", folder, *given, processes=processes)
    a, b = weights(whole), weights(folder)
    assert all(torch.equal(a[k], b[k]) for k in a)
