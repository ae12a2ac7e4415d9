"""The smoke study on parts of a cluster that are started on this machine: stages as jobs of SLURM
that are preempted, a store on S3, workspaces and checkouts that see one store"""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from smoke import FORKED, STUDY, clone as clone, digest, ran, run, second_checkout
from test_slurm import SLURM, URGENT, ask, cluster as cluster, job_of
from test_store import MOTO, listing, s3 as s3

from asap.core import list_files
from asap.store import store_of, verify

pytestmark = [pytest.mark.study, pytest.mark.cluster]

RESULTS = (  # tables, features, tokens, weights
    "runs/tables/*.csv",
    "runs/embed/*/*.npy",
    "build/tokens/*/*/manifest.parquet",
    "runs/pretrain/*/checkpoint/*.safetensors",
)
# The whole node, so that one job runs at a time; its processes are no forks (tests/preloaded.py)
EXPORT = f"ALL,PYTHONPATH={os.environ.get('PYTHONPATH', '')}"
JOB = f"{{cpus: 1, memory: 1, minutes: 10, options: {{exclusive: true, export: '{EXPORT}'}}}}"


def results(folder) -> dict[str, str]:  # file -> hash
    files = [f for pattern in RESULTS for f in folder.glob(pattern)]
    return {f.relative_to(folder).as_posix(): digest(f) for f in files}


def check_results(folder, clone):
    "Those of the undisturbed study, byte for byte"
    found, expected = results(folder), results(clone)
    assert {f.split("/")[1] for f in found} == {"tables", "embed", "tokens", "pretrain"}
    assert sorted(found) == sorted(expected)
    assert not [f for f in found if found[f] != expected[f]]


def preparing(clone) -> set[str]:  # stages
    cohorts = yaml.safe_load((clone / "params.yaml").read_text())["study"]["cohorts"]
    return {f"prepare@{c}" for c in cohorts}


def wait_for(find, study, pause=0.005, seconds=300):
    "What is found while the study runs"
    end = time.monotonic() + seconds
    while not (found := find()):
        assert study.poll() is None and time.monotonic() < end
        time.sleep(pause)
    return found


def kernel_of(job):
    "The process that runs the notebook of a job"
    for p in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if "ipykernel_launcher" in (p.info["cmdline"] or ()):
                if p.environ().get("SLURM_JOB_ID") == job:
                    return p
    return None


def preempt(folder, stage, begun, study, env):
    """Suspend a stage when its first files are there, give its node to a job of a higher priority,
    and let it go on once it is asked to stop"""
    kernel = wait_for(lambda: kernel_of(job_of(folder, stage)), study, pause=0.1)
    stop = Path(kernel.environ()["ASAP_STOP_FILE"])
    wait_for(lambda: list(folder.glob(begun)), study)
    kernel.suspend()
    ask("sbatch", *URGENT, env=env)
    wait_for(stop.exists, study)
    with contextlib.suppress(psutil.NoSuchProcess):  # SLURM has let it go on, to end it
        kernel.resume()


@SLURM
def test_jobs_that_are_preempted_twice(clone, cluster, tmp_path):
    "While they train and while they embed; the results are those of a study without jobs"
    folder, log = second_checkout(clone, tmp_path), tmp_path / "log"
    (folder / "cluster.yaml").write_text(f"pretrain: {JOB}\nembed: {JOB}\n")
    env = FORKED | dict(SLURM_CONF=cluster["SLURM_CONF"], ASAP_LAUNCHER="slurm")
    with open(log, "w") as out:
        study = subprocess.Popen(STUDY, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        preempt(folder, "pretrain@asap", "build/resume/pretrain/asap/resume/state.pt", study, env)
        preempt(folder, "embed@asap", "build/features/asap/*/manifest.parquet", study, env)
        code = study.wait(900)
    finally:
        study.kill()
        text = log.read_text()
        print(text[-8000:])
    assert code == 0
    assert "asap: stopped after step" in text and "resumed at step" in text
    for stage in ("pretrain@asap", "embed@asap"):
        assert text.count(f"{stage}: job {job_of(folder, stage)} is RUNNING") == 2
    check_results(folder, clone)


@MOTO
def test_a_store_on_s3(clone, s3, tmp_path):
    "The folder has copies of its volumes; the results are those of a store in a folder"
    folder = second_checkout(clone, tmp_path)
    place = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "ASAP_STORE"))}
    run(*STUDY, cwd=folder, env=FORKED | place)
    store = store_of(folder / "build")
    assert store.place.startswith("s3://") and not verify(store)
    assert len(store.call("list_all")) == len(list_files(clone / "build/store", "*/*/*"))
    assert not list_files(folder / "build/store", "records/*/*")
    check_results(folder, clone)


def test_a_second_checkout(clone, tmp_path):
    "`dvc repro` with the store of the first one writes no volume"
    second, store = second_checkout(clone, tmp_path), clone / "build/store"
    before = listing(store)
    text = run("dvc", "repro", cwd=second, env=FORKED | dict(ASAP_STORE=str(store)))
    assert preparing(clone) <= ran(text)
    assert listing(store) == before and not list_files(second / "build/store", "*/*/*")
    check_results(second, clone)


@pytest.mark.skipif(shutil.which("git") is None, reason="experiments need git")
def test_an_experiment_in_a_folder_of_its_own(clone):
    "`dvc exp run --temp` makes the raw data again, and no volume and no features"
    me = {f"GIT_{who}_{k}": "t@t" for who in ("AUTHOR", "COMMITTER") for k in ("NAME", "EMAIL")}
    env, before = FORKED | me, listing(clone / "build/store")
    run("git", "add", "-A", cwd=clone, env=env)
    run("git", "commit", "-qm", "baseline", cwd=clone, env=env)
    command = ("dvc", "exp", "run", "--temp", "-n", "few", "-S", "tables.n_bootstrap=60")
    text = run(*command, cwd=clone, env=env)
    assert preparing(clone) < ran(text) and {"embed@asap", "tables"} < ran(text)
    assert not ran(text) & {"corpus", "text", "pretrain@asap", "report@asap"}
    assert listing(clone / "build/store") == before
    assert "few" in run("dvc", "exp", "show", "--csv", cwd=clone, env=env)
