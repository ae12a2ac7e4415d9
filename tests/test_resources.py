"""A full disk and too little memory, in each place that a run writes to: one sentence says where,
what is free, what is needed, and what to do"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import TOP
from smoke import ENV

from asap.resources import explain_failure, remove_half_copies, run_disks
from asap.run import run_stage

GRAPH = """
stages:
  fill:
    cmd: python -m asap.cli stage fill
    deps: [nbs/stages/fill.ipynb]
    params: [study.n_jobs, fill.micro_batch_size]
    outs: [runs/fill]
"""
LOCK = "schema: '2.0'\nstages: {fill: {cmd: x, outs: [{path: runs/fill, md5: 0, size: 2500000}]}}\n"
FULL = "open(project_root() / 'runs/fill', 'wb').write(bytes(3_000_000))"


def project(root: Path, code: str) -> Path:
    "A project whose one stage runs some code"
    for folder in ("nbs/stages", "build", "runs", "data", ".dvc"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (root / "params.yaml").write_text("study: {n_jobs: 2}\nfill: {micro_batch_size: 8}\n")
    (root / "dvc.yaml").write_text(GRAPH)
    cells = ['stage = ""', f"from asap.core import project_root\n{code}"]
    cells = [
        dict(cell_type="code", id=f"c{i}", metadata={}, outputs=[], execution_count=None, source=s)
        for i, s in enumerate(cells)
    ]
    cells[0]["metadata"] = dict(tags=["parameters"])
    kernel = dict(name="python3", display_name="Python 3", language="python")
    made = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    (root / "nbs/stages/fill.ipynb").write_text(json.dumps(made))
    return root


def stage(root: Path, **env: str) -> str:
    "What a person reads of a stage that stops"
    own = dict(ASAP_ROOT=str(root), PYTHONPATH=str(TOP), ASAP_STAGES="1")
    env = {**ENV, **own, **env}
    words = [sys.executable, "-m", "asap.cli", "stage", "fill"]
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("asap: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    return said[0]


@pytest.fixture
def small_disk():
    "Mounts a disk of a megabyte over a folder"
    mounted = []

    def mount(folder: Path, size: str = "1m") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


WRITERS = {
    "runs": FULL,
    "build": "from asap.core import write_text\nwrite_text('x' * 3_000_000, 'build/a')",
    "data": "import numpy as np\nnp.save('data/a.npy', np.zeros(10**6))",
    "temporary": "import tempfile\nf = tempfile.TemporaryFile()\nf.write(bytes(3_000_000))",
}


@pytest.mark.parametrize("place", WRITERS)
def test_a_full_disk_is_named(place, small_disk, tmp_path):
    root = project(tmp_path / "project", WRITERS[place])
    folder = small_disk(root / place if place != "temporary" else tmp_path / "tmp")
    (root / "dvc.lock").write_text(LOCK)
    said = stage(root, **(dict(TMPDIR=str(folder)) if place == "temporary" else {}))
    assert said.startswith("asap: fill stopped: no space is left.")
    assert f"are free for {place} ({folder})" in said and "Make room there" in said
    assert ("It wrote 0.00 GB there" in said) == (place == "runs")


def test_a_full_disk_that_pytorch_meets(small_disk, tmp_path):
    code = "import torch\ntorch.save(dict(a=torch.zeros(10**6)), project_root() / 'runs/fill')"
    root = project(tmp_path, code)
    folder = small_disk(root / "runs")
    assert f"no space is left. 0.00 GB are free for runs ({folder})" in stage(root)


def test_a_disk_that_the_error_does_not_name(small_disk, tmp_path):
    "The command of the stage lies in the folder of temporary files, which has room"
    root = project(small_disk(tmp_path / "project"), FULL)
    with pytest.raises(OSError, match="No space left"):
        (root / "runs/fill").write_bytes(bytes(2**21))
    text = f"> {tempfile.gettempdir()}/bin/python stage.py\n[Errno 28] No space left on device"
    assert f"0.00 GB are free for build, runs, data, cache ({root}" in explain_failure(
        "fill", text, root
    )


def test_dvc_finds_no_room_for_its_cache(small_disk, tmp_path, monkeypatch, capsys):
    "Beside the project's disk; half a copy is removed"
    root = project(tmp_path / "project", FULL)
    cache = small_disk(tmp_path / "cache", "2m")
    for name in ("PATH", "ASAP_ROOT", "PYTHONPATH"):
        monkeypatch.setenv(name, {**ENV, "ASAP_ROOT": str(root), "PYTHONPATH": str(TOP)}[name])
    (root / ".dvc/config").open("a").write(f"[cache]\n    dir = {cache}\n    type = copy\n")
    text = (root / "dvc.yaml").read_text()
    writer = "python -c \"open('runs/fill', 'wb').write(bytes(3000000))\""
    (root / "dvc.yaml").write_text(text.replace("python -m asap.cli stage fill", writer))
    assert run_stage("fill", root)
    said = capsys.readouterr().err
    assert f"fill stopped: no space is left. 0.00 GB are free for cache ({cache})" in said, said
    assert not [f for f in cache.rglob("*") if f.suffix == ".tmp"]


def test_half_copies_are_known_by_their_names(tmp_path):
    half = tmp_path / "data/scan.nii.gz.AbCdEfGhIjKlMnOpQrStUv.tmp"
    own = tmp_path / "data/mine.tmp"
    for f in (half, own):
        f.parent.mkdir(exist_ok=True)
        f.touch()
    assert remove_half_copies(tmp_path) == 1 and own.exists() and not half.exists()


def test_too_little_room_is_said_beforehand(tmp_path):
    root = project(tmp_path, FULL)
    size = int(2e9 * run_disks(root)[0].free)
    (root / "dvc.lock").write_text(LOCK.replace("2500000", str(size)))
    env = {**ENV, "ASAP_ROOT": str(root), "PYTHONPATH": str(TOP)}
    call = "from asap.cli import execute_stage; execute_stage('fill')"
    done = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True)
    said = f"warning: fill wrote {size / 1e9:.2f} GB when it last ran, and "
    assert done.returncode == 0 and said in done.stderr, done.stderr


def test_a_limit_of_memory(tmp_path):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
    root = project(tmp_path, f"{code}import numpy as np\nnp.ones(2**30)")
    said = stage(root)
    assert said.startswith("asap: fill stopped: no memory is left. Its processes took 0.")
    assert "lower `fill.micro_batch_size: 8`, `study.n_jobs: 2`, or run one stage" in said


GROUPS = (  # of version 1 and 2
    ("/sys/fs/cgroup/memory/asap-test", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup/asap-test", "memory.max"),
)
LIMITED = """
from pathlib import Path
Path("{group}/cgroup.procs").write_text("0")
held = [bytearray(b"x" * 2**20) for _ in range(600)]
"""


@pytest.fixture
def memory_group():
    "A control group of 300 MB"
    for name, limit in GROUPS:
        group = Path(name)
        with contextlib.suppress(OSError):
            group.mkdir()
            if (group / limit).exists():  # the kernel makes it
                (group / limit).write_text(str(300 * 2**20))
                yield group
                group.rmdir()
                return
            group.rmdir()
    pytest.skip("no control group of memory can be made here")


def test_a_kernel_that_the_system_kills(memory_group, tmp_path):
    said = stage(project(tmp_path, LIMITED.format(group=memory_group)))
    assert "a process was killed, most likely for lack of memory. Its processes took" in said


def test_a_killed_kernel(tmp_path):
    said = stage(project(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))
    assert "fill stopped: a process was killed, most likely for lack of memory." in said
    assert "GB together at most. To need less, lower `fill.micro_batch_size: 8`" in said


def test_another_error_keeps_its_traceback(tmp_path):
    root = project(tmp_path, "raise ValueError('no memory of it')")
    env = {**ENV, "ASAP_ROOT": str(root), "PYTHONPATH": str(TOP)}
    call = "from asap.cli import execute_stage; execute_stage('fill')"
    done = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True)
    assert "PapermillExecutionError" in done.stderr and os.fspath(root) not in done.stdout
