"""The store of volumes: writers that are killed, a store that goes away, one on S3, and a second
checkout that prepares nothing"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import TOP
from smoke import ENV, clone as clone, digest, ran, run, second_checkout
from tiny_cases import toy_table

from asap.cli import main
from asap.core import list_files
from asap.data.prepare import prepare_cases
from asap.store import (
    Store,
    StoreError,
    find_entry,
    local_file,
    manifest_folders,
    read_manifest,
    store_of,
    unreachable,
    verify,
)

HOW = dict(spacing=[7, 7, 14], hu=[-1000, 1000])
MOTO = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("moto", "flask", "s3fs"))),
    reason="needs s3fs and moto[server], which are not installed",
)
WRITER = """
import sys
from pathlib import Path
from asap.store import Store, add_entry
here = Path(sys.argv[1])
store = Store(str(here / "store"), here / "copies")
for i in range(10**6):
    (here / f"{sys.argv[2]}.nii").write_bytes(bytes([i % 40]) * 3_000_000)
    add_entry(store, dict(image=i % 40), dict(volume=here / f"{sys.argv[2]}.nii"), {})
"""


def put(project: Path, table: pd.DataFrame, name: str = "own", **options) -> pd.DataFrame:
    "Prepare a table as the study does"
    folders = (project / "build" / kind / name for kind in ("volumes", "organs"))
    return prepare_cases(
        table, *folders, HOW, shared=store_of(project / "build").create(), **options
    )


def listing(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.*") if f.is_file()}


def test_killed_writers_leave_no_half(tmp_path):
    "Three at a time on the same entries; what has a record is whole"
    store = Store(str(tmp_path / "store"), tmp_path / "copies").create()
    for turn in range(3):
        some = [
            psutil.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], cwd=TOP)
            for i in range(3)
        ]
        end, least = time.monotonic() + 120, 6 * (turn + 1)
        while len(list((tmp_path / "store/records").rglob("*.json"))) < least:
            assert time.monotonic() < end
        for p in some:
            p.kill()
            p.wait()
        assert not verify(store)
        keys = [f.stem for f in (tmp_path / "store/records").rglob("[!.]*.json")]
        assert len(keys) >= least and all(find_entry(store, k) for k in keys)


def test_a_second_project_prepares_nothing(tmp_path, monkeypatch):
    "On one store; the files of the first are not written again, and both read the same bytes"
    monkeypatch.setenv("ASAP_STORE", str(tmp_path / "store"))
    t = toy_table(tmp_path / "raw", 5)
    first = put(tmp_path / "a", t)
    before = listing(tmp_path / "store")
    second = put(tmp_path / "b", t)
    assert listing(tmp_path / "store") == before
    assert not [*(tmp_path / "b").rglob("*.nii*")]
    a, b = (read_manifest(tmp_path / p / "build/volumes/own") for p in "ab")
    pd.testing.assert_frame_equal(a, b)
    for x, y in zip(first.image, second.image):
        assert local_file(x).samefile(local_file(y))


def test_a_store_that_is_away_for_a_moment(tmp_path, monkeypatch, capsys):
    "While volumes are written; then for longer than is waited, after which a run goes on"
    monkeypatch.setenv("ASAP_STORE", str(tmp_path / "store"))
    t = toy_table(tmp_path / "raw", 24)
    whole = put(tmp_path / "undisturbed", t[:1]).image[0]
    store, hidden = tmp_path / "store", tmp_path / "hidden"

    def hide() -> None:
        while len(list(store.rglob("*.nii"))) < 4:
            time.sleep(0.01)
        store.rename(hidden)
        time.sleep(1)
        hidden.rename(store)

    away = threading.Thread(target=hide)
    away.start()
    done = put(tmp_path / "a", t)
    away.join()
    assert "cannot be reached" in capsys.readouterr().err
    assert len(done) == 24 and not verify(store_of(tmp_path / "a/build"))
    assert local_file(done.image[0]).samefile(local_file(whole))
    monkeypatch.setenv("ASAP_STORE_WAIT", "0.3")
    store.rename(hidden)
    more = toy_table(tmp_path / "more", 26)
    with pytest.raises(StoreError, match=f"the store {store} cannot be reached"):
        put(tmp_path / "a", more)
    assert not store.exists()  # a mount point stays empty
    hidden.rename(store)
    assert len(put(tmp_path / "a", more)) == 26


def test_gc_removes_what_no_checkout_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ASAP_STORE", str(tmp_path / "store"))
    t = toy_table(tmp_path / "raw", 6)
    put(tmp_path / "a", t[:2])
    put(tmp_path / "b", t[1:4])
    used = listing(tmp_path / "store")
    put(tmp_path / "c", t[3:])
    shutil.rmtree(tmp_path / "c/build")
    store = store_of(tmp_path / "a/build")
    roots = [tmp_path / "a", tmp_path / "b"]
    assert len(unreachable(store, roots, 0)) == 3 and not unreachable(store, roots)
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path / "a"))
    words = ["store", "gc", *map(str, roots), "--hours", "0"]
    assert main(words) == 0 and "3 files" in capsys.readouterr().out
    assert len(listing(tmp_path / "store")) == len(used) + 3
    assert main([*words, "--delete"]) == 0
    assert listing(tmp_path / "store") == used
    assert main(["store", "gc", str(tmp_path / "c")]) == 1  # no manifest: nothing would be kept
    assert main(["store", "info"]) == 0 and "entries     4," in capsys.readouterr().out


def test_a_flipped_byte_fails_verify_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path))
    done = put(tmp_path, toy_table(tmp_path / "raw", 2))
    assert main(["store", "verify"]) == 0
    path = local_file(done.image[1])
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    assert main(["store", "verify"]) == 1
    assert f"{path.name} is not what its name says (own/c001.nii)" in capsys.readouterr().out
    assert main(["store", "verify", "--remove"]) == 0
    assert not path.exists() and not manifest_folders(tmp_path)


PREPARE = """
import sys
from functools import partial
from pathlib import Path
import pandas as pd
from asap.core import parallel_backend, parallel_map
from asap.data import prepare
from test_store import put
prepare.parallel_map = partial(parallel_map, soon=0)
with parallel_backend("dask"):
    put(Path(sys.argv[1]), pd.read_parquet(sys.argv[2]), jobs=2)
"""


@pytest.fixture
def dask(tmp_path):
    "A scheduler and two workers, processes of their own: their environment, the workers"
    here = "tcp://127.0.0.1"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"{here}:{s.getsockname()[1]}"
    env = os.environ | dict(DASK_SCHEDULER_ADDRESS=address, OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(TOP), str(TOP / "tests")])

    def start(program, *words):
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", "--no-dashboard"]
        return subprocess.Popen(
            [*command, *words], env=env, cwd=tmp_path, stderr=subprocess.DEVNULL
        )

    alone = ["--no-nanny", "--nthreads", "1", "--memory-limit", "0"]
    started = [start("scheduler", "--host", address)]
    started += [start("worker", address, "--host", "127.0.0.1", *alone) for _ in range(2)]
    yield env, started[1:]
    for p in started:
        p.kill()
        p.wait()


def test_a_dask_worker_is_killed(dask, tmp_path):
    "One of two, while they prepare: the other makes its cases too, as one process would"
    env, workers = dask
    t = toy_table(tmp_path / "raw", 50, kinds=50)
    t.to_parquet(tmp_path / "t.parquet")
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "b"), str(tmp_path / "t.parquet")]
    run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    end, records = time.monotonic() + 120, tmp_path / "b/build/store/records"
    while len(list_files(records, "*/*.json")) < 8:
        assert time.monotonic() < end and run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    workers[0].kill()
    made = len(list_files(records, "*/*.json"))
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 0, said
    assert made < 50 and workers[1].poll() is None
    put(tmp_path / "a", t)
    a, b = (read_manifest(tmp_path / p / "build/volumes/own") for p in "ab")
    pd.testing.assert_frame_equal(a, b)
    assert len(a) == 50 and not verify(store_of(tmp_path / "b/build"))


@pytest.fixture
def s3(monkeypatch, tmp_path):
    "A server on this machine with an empty bucket; gives a function that starts it again"
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    import s3fs

    bucket = f"asap-{time.time_ns()}"  # the servers of a process share their buckets
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    monkeypatch.setenv("ASAP_STORE", f"s3://{bucket}/asap")
    servers = [server]

    def again():
        servers.append(ThreadedMotoServer("127.0.0.1", port, verbose=False))
        servers[-1].start()

    yield server, again
    servers[-1].stop()


@MOTO
def test_a_store_on_s3(s3, tmp_path, monkeypatch):
    "Two projects; the second copies only what it reads, and a damaged object is refused"
    t = toy_table(tmp_path / "raw", 3)
    a, b = put(tmp_path / "a", t), put(tmp_path / "b", t)
    assert not [*(tmp_path / "b").rglob("*.nii")]
    assert local_file(a.image[0]).read_bytes() == local_file(b.image[0]).read_bytes()
    assert len([*(tmp_path / "b").rglob("*.nii")]) == 1
    copy = local_file(b.image[0])
    whole = copy.read_bytes()
    copy.write_bytes(bytes(len(whole)))
    monkeypatch.setattr("asap.store._LOOKED_AT", {})  # as another process has it
    assert local_file(b.image[0]).read_bytes() == whole
    store = store_of(tmp_path / "b/build")
    assert not verify(store) and not unreachable(store, [tmp_path / "a"], 0)
    f = find_entry(store, read_manifest(tmp_path / "b/build/volumes/own").key[1]).files["volume"]
    (tmp_path / "other").write_bytes(bytes(f.size))
    store.call("put", tmp_path / "other", f.name)
    assert [*verify(store)] == [f.name]
    with pytest.raises(StoreError, match=f"{f.name} is damaged"):
        local_file(b.image[1])


@MOTO
def test_s3_goes_away_for_a_moment(s3, tmp_path, monkeypatch):
    server, again = s3
    t = toy_table(tmp_path / "raw", 3)
    store = store_of(tmp_path / "a/build").create()
    server.stop()
    monkeypatch.setenv("ASAP_STORE_WAIT", "0.1")
    with pytest.raises(StoreError, match=f"the store {store.place} cannot be reached"):
        put(tmp_path / "a", t)
    monkeypatch.delenv("ASAP_STORE_WAIT")
    back = threading.Timer(1, again)
    back.start()
    assert len(put(tmp_path / "a", t)) == 3 and not verify(store)
    back.join()


@MOTO
@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.cluster)])
def test_s3_goes_away_while_volumes_are_read_and_written(s3, tmp_path, seconds):
    "One project writes, another one reads again and again; none notices but by the time it takes"
    server, again = s3
    t = toy_table(tmp_path / "raw", 24, kinds=24)
    known = put(tmp_path / "b", t[:6])
    whole = {p: local_file(p).read_bytes() for p in known.image}
    turns, ended = [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            shutil.rmtree(tmp_path / "b/build/store/objects")
            turns.append(all(local_file(p).read_bytes() == d for p, d in whole.items()))

    def go_away() -> None:
        while len(list_files(tmp_path / "a/build/store/objects", "*/*")) < 10 or not turns:
            time.sleep(0.01)
        server.stop()
        time.sleep(seconds)
        again()

    others = [threading.Thread(target=f) for f in (read, go_away)]
    for thread in others:
        thread.start()
    done = put(tmp_path / "a", t)
    others[1].join()
    ended.set()
    others[0].join()
    assert len(turns) > 1 and all(turns)
    assert len(done) == 24 and not verify(store_of(tmp_path / "a/build"))


@MOTO
def test_the_copies_have_a_limit(s3, tmp_path, monkeypatch):
    "Those that were used longest ago go; what the store does not have stays"
    t = toy_table(tmp_path / "raw", 6, kinds=6)
    put(tmp_path / "a", t)
    images = put(tmp_path / "b", t).image
    size = local_file(images[0]).stat().st_size
    copies = tmp_path / "b/build/store"
    own = copies / "objects/00/own.nii"
    own.parent.mkdir(exist_ok=True)
    own.write_bytes(bytes(size))
    os.utime(own, (0, 0))
    monkeypatch.setattr("asap.store.IN_USE", 0)
    monkeypatch.setenv("ASAP_STORE_CACHE_GB", str(4.5 * size / 1e9))
    for i in (1, 2, 0, 3):
        local_file(images[i])
    names = {local_file(images[i]).name for i in (0, 3)}  # 1 was used longest ago, then 2
    assert names < {f.name for f in list_files(copies, "objects/*/*")}
    assert own.exists() and len(list_files(copies, "objects/*/*")) == 4
    for image, raw in zip(images, put(tmp_path / "a", t).image):
        assert local_file(image).read_bytes() == local_file(raw).read_bytes()
        assert sum(f.stat().st_size for f in list_files(copies, "objects/*/*")) <= 4.5 * size


@pytest.mark.study
def test_a_second_checkout_prepares_nothing(clone, tmp_path):
    "It sees the store of the first: no volume is written, and its tables are the same"
    second, store = second_checkout(clone, tmp_path), clone / "build/store"
    before = listing(store)
    env = dict(ENV, ASAP_STORE=str(store))
    text = run("dvc", "repro", "corpus", cwd=second, env=env)
    assert {s for s in ran(text) if s.startswith("prepare@")} >= {"prepare@ct_rate"}
    assert listing(store) == before
    assert not list_files(second / "build/volumes", "*/*.nii")
    for f in clone.glob("build/*/*/manifest.parquet"):
        assert digest(second / f.relative_to(clone)) == digest(f)
    corpus = "build/corpus/corpus.parquet"
    assert digest(second / corpus) == digest(clone / corpus)
