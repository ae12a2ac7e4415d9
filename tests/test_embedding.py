"""Features in the store: a second checkout embeds nothing, a damaged shard is embedded anew, a pass
that was killed goes on, two processes give the bytes of one, and `asap forget` removes them"""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import TOP
from embeds import HU, SIZE, Encoder, N, embed_own, project

from asap.core import write_parquet
from asap.data.table import save
from asap.preempt import EXIT_CODE, STOP_FILE
from asap.pretrain import embed
from asap.privacy import forget
from asap.store import (
    drop_unmet_manifests,
    local_file,
    manifest_folders,
    read_entry,
    read_manifest,
    store_of,
    unreachable,
    verify,
)

RESULTS = ("runs/embed/asap/own.npy", "runs/embed/asap/own.json", "build/tokens/asap/own.parquet")
MANIFESTS = ("build/features/asap/own", "build/tokens/asap/own")


@pytest.fixture(autouse=True)
def one_case_a_shard(monkeypatch):
    monkeypatch.setattr(embed, "SHARD", 1)


def results(folder) -> list:
    manifests = [read_manifest(folder / m)[["name", "key", "hash", "rows"]] for m in MANIFESTS]
    return [(folder / f).read_bytes() for f in RESULTS] + [m.to_dict() for m in manifests]


def listing(store) -> dict:
    return {f.name: f.time for f in store.call("list_all")}


def refuse(*args):
    raise AssertionError("a volume is read")


def test_features_are_those_of_the_volumes(tmp_path):
    table = project(tmp_path)
    assert embed_own(tmp_path, table) == N
    f, index = embed.load(tmp_path / "runs/embed/asap", "own")
    tokens, _ = embed.open_tokens(tmp_path / "build/tokens/asap", "own")
    assert index.case.tolist() == table.case.tolist() and tokens.shape == (N, 8, 64)
    for i, path in enumerate(table.image):
        x = embed.load_image(path, SIZE, HU).reshape(8, 64)
        np.testing.assert_array_equal(tokens[i], x.numpy().astype(np.float16))
        np.testing.assert_array_equal(f[i], x[1:].mean(0).numpy())


@pytest.mark.parametrize("rows", [3, slice(1, 5), np.array([4, 0]), [2, 2], np.arange(N) % 2 == 0])
def test_tokens_have_the_rows_of_an_array(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "SHARD", 3)
    embed_own(tmp_path, project(tmp_path))
    tokens, _ = embed.open_tokens(tmp_path / "build/tokens/asap", "own")
    whole = np.concatenate([np.load(local_file(f)) for f in tokens.files])
    found = tokens[rows]
    np.testing.assert_array_equal(found, whole[rows])
    assert type(found) is np.ndarray and len(tokens) == N and found.dtype == tokens.dtype


def test_a_second_checkout_embeds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ASAP_STORE", str(tmp_path / "store"))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert embed_own(one, project(one)) == N
    store = store_of(one / "build")
    before, table = listing(store), project(two)
    monkeypatch.setattr(embed, "load_image", refuse)
    assert embed_own(two, table) == 0
    assert listing(store).keys() == before.keys() and results(one) == results(two)
    assert embed_own(two, table, "features") == 0


def test_a_changed_case_is_embedded_alone(tmp_path):
    embed_own(tmp_path, project(tmp_path))
    assert embed_own(tmp_path, project(tmp_path, [0, 1, 2, 9, 4, 5])) == 1
    assert embed_own(tmp_path, project(tmp_path, [1, 2, 4, 5])) == 0
    assert len(embed.load(tmp_path / "runs/embed/asap", "own")[0]) == 4


def test_tokens_that_are_needed_later(tmp_path):
    table = project(tmp_path)
    assert embed_own(tmp_path, table, "features") == N
    assert embed_own(tmp_path, table) == N
    assert embed_own(tmp_path, table, "features") == 0


@pytest.mark.parametrize("kind", ["features", "tokens"])
@pytest.mark.parametrize("how", ["changed", "cut off", "gone"])
def test_a_damaged_object_is_made_anew(kind, how, tmp_path):
    table = project(tmp_path)
    embed_own(tmp_path, table)
    before, store = results(tmp_path), store_of(tmp_path / "build")
    path = local_file(tmp_path / f"build/{kind}/asap/own/00002.npy")
    data = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(data[:-1] + bytes(how == "changed"))
    assert verify(store)
    assert embed_own(tmp_path, table) == 1
    assert results(tmp_path) == before and not verify(store)


def test_gc_keeps_what_a_checkout_names(tmp_path):
    table = project(tmp_path)
    embed_own(tmp_path, table)
    store = store_of(tmp_path / "build")
    assert len(manifest_folders(tmp_path)) == 3 and not unreachable(store, [tmp_path], hours=0)
    embed_own(tmp_path, table.drop(index=2))
    free = {f.name.split("/")[0] for f in unreachable(store, [tmp_path], hours=0)}
    assert free == {"objects", "records"}


def test_forget(tmp_path):
    table = project(tmp_path)
    text = dict.fromkeys(("organ_map", "target_map", "findings", "impression"), "")
    whole = table.assign(**text, time_days=np.nan, event=np.nan)
    save(whole, None, tmp_path / "build/cohorts/own", "own", tmp_path)
    embed_own(tmp_path, table)
    keys = [k for m in MANIFESTS for k in read_manifest(tmp_path / m).key]
    done, store = forget("own/c2", tmp_path), store_of(tmp_path / "build")
    assert done.entries == 2 and not done.shared  # its volume and its shard
    assert [read_entry(store, k) is None for k in keys] == [i % N == 2 for i in range(2 * N)]
    assert {f"{m}/manifest.parquet" for m in MANIFESTS} <= set(done.removed)
    left = embed.load(tmp_path / "runs/embed/asap", "own")[1].case.tolist()
    assert left == ["c0", "c1", "c3", "c4", "c5"] and not verify(store)
    assert embed_own(tmp_path, table.drop(index=2)) == 0
    assert not drop_unmet_manifests(tmp_path)


def run(folder, left, *launcher) -> int:
    env = os.environ | dict(OMP_NUM_THREADS="1", ASAP_ROOT=str(TOP), PYTHONPATH=str(TOP))
    words = [sys.executable, *launcher, str(TOP / "tests/embeds.py"), str(folder), str(left)]
    return subprocess.run(words, env=env, timeout=300).returncode


def test_a_killed_pass_and_two_processes(tmp_path):
    "Each process embeds its shards, what a killed one has stored stays, and the bytes are the same"
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write_parquet(project(folder), folder / "table.parquet")
    assert run(one, 4) == -signal.SIGKILL
    assert not (one / "runs").exists()
    assert run(one, N) == 0 and (one / "seen0").read_text() == str(N - 4)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert run(two, N, *torchrun) == 0
    assert [(two / f"seen{i}").read_text() for i in range(2)] == [str(N // 2)] * 2
    assert results(one) == results(two)


def test_a_request_to_stop_ends_a_pass_between_two_shards(tmp_path, monkeypatch):
    table, stop, forward = project(tmp_path), tmp_path / "stop", Encoder.forward_features

    def stopping(self, x):
        if self.seen == 2:
            stop.touch()
        return forward(self, x)

    monkeypatch.setenv(STOP_FILE, str(stop))
    monkeypatch.setattr(Encoder, "forward_features", stopping)
    with pytest.raises(SystemExit) as end:
        embed_own(tmp_path, table)
    assert end.value.code == EXIT_CODE and not (tmp_path / "runs").exists()
    stop.unlink()
    monkeypatch.setattr(Encoder, "forward_features", forward)
    assert 0 < embed_own(tmp_path, table) < N
