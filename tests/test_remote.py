"A data set behind a URL is prepared as one on a disk, and leaves no scan behind"

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from test_protocols import stage
from test_store import MOTO, s3 as s3

from asap.anatomy.organs import organ_map_reader
from asap.core import is_system_error
from asap.data import adapter as adapters, prepare, remote
from asap.data.adapter import available_cohort_names, get_cohort
from asap.data.volumes import read
from asap.store import StoreError, read_manifest

SIZE = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))
NAMES = [n for n in available_cohort_names() if n not in ("own",)]


@pytest.fixture(autouse=True)
def another_process():
    "Lists the server anew"
    yield
    adapters._mirrored.cache_clear()
    remote._fetched.clear()


def write(name, top):
    "A miniature, beside that of the cohort whose volumes it is about"
    one = get_cohort(name)
    if one.companion_of:
        get_cohort(one.companion_of).write(top / one.companion_of, 0, 3, 2, **SIZE)
    one.write(top / name, 0, 3, 2, **SIZE)


def prepared(name, root):
    adapters._mirrored.cache_clear()
    p = stage(name)
    organs = organ_map_reader(p.anatomy.groups.model_dump(), None)
    prepare.run(get_cohort(name), p, root, organs, lambda table, *_, **__: table)
    cohort = root / f"build/cohorts/{name}"
    tables = {}
    for f in cohort.glob("*.*"):
        said = pd.read_parquet(f).to_csv() if f.suffix == ".parquet" else f.read_text()
        tables[f.name] = said.replace("build/raw/", "data/").replace(str(root), "")
    kinds = [root / f"build/{k}/{name}" for k in ("volumes", "organs")]
    there = [k for k in kinds if (k / "manifest.parquet").exists()]
    return tables, [read_manifest(k)[["name", "key", "hash"]].to_dict() for k in there]


def by_url(name, root, url):
    "A project in which a cohort, and the one with its volumes, lie behind a URL"
    (root / "data").mkdir(parents=True, exist_ok=True)
    for n in filter(None, (name, get_cohort(name).companion_of)):
        (root / f"data/{n}.path").write_text(f"{url}/{n}\n")


def scans(root):
    raw = root / "build/raw"
    files = [f for f in raw.rglob("*") if f.is_file() and f.parent != raw]
    return [f for f in files if remote.is_scan(f.name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_cohort_behind_a_url_is_that_of_a_disk(name, tmp_path, monkeypatch):
    write(name, tmp_path / "disk/data")
    there, server = tmp_path / "there", tmp_path / "server"
    shutil.copytree(tmp_path / "disk/data", server)
    by_url(name, there, f"file://{server}")
    expected, found = prepared(name, tmp_path / "disk"), prepared(name, there)
    assert found == expected and len(expected[1]) >= 1
    own = [f for f in scans(there) if f.is_relative_to(there / "build/raw" / name)]
    assert bool(own) == (name != "radgenome") and not sum(f.stat().st_size for f in own)
    fetched, one = [], remote._fetch_file
    monkeypatch.setattr(remote, "_fetch_file", lambda *a: (fetched.append(a[2]), one(*a)))
    assert prepared(name, there) == expected
    assert not [f for f in fetched if Path(f).suffix != ".mhd"]  # which name their data file


@MOTO
def test_s3(s3, tmp_path, monkeypatch):
    server, again = s3
    store = os.environ.pop("ASAP_STORE")
    bucket = store.removesuffix("/asap")
    write("stoic", tmp_path / "disk/data")
    import s3fs

    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.put(str(tmp_path / "disk/data/stoic"), f"{bucket}/stoic", recursive=True)
    by_url("stoic", tmp_path / "there", bucket)
    assert prepared("stoic", tmp_path / "there") == prepared("stoic", tmp_path / "disk")
    server.stop()
    monkeypatch.setenv("ASAP_STORE_WAIT", "0.1")
    adapters._mirrored.cache_clear()
    with pytest.raises(StoreError, match="stoic cannot be reached, tried for 0.1 s") as e:
        prepared("stoic", tmp_path / "there")
    assert is_system_error(e.value)  # no case is left out for it
    again()


def test_a_scan_that_changed_is_fetched_again(tmp_path):
    write("stoic", tmp_path / "server")
    by_url("stoic", tmp_path, f"file://{tmp_path}/server")
    before = prepared("stoic", tmp_path)
    first, second = sorted((tmp_path / "server/stoic").rglob("*.mha"))[:2]
    shutil.copyfile(second, first)
    after = prepared("stoic", tmp_path)
    hashes = [pd.DataFrame(k[1][0]).set_index("name").hash for k in (before, after)]
    assert (hashes[0] != hashes[1]).sum() == 1
    first.unlink()
    assert len(prepared("stoic", tmp_path)[1][0]["name"]) == len(hashes[0]) - 1


def test_half_a_file_is_none(tmp_path, monkeypatch):
    write("stoic", tmp_path / "server")
    by_url("stoic", tmp_path, f"file://{tmp_path}/server")
    raw = adapters.find_raw_dir("stoic", tmp_path / "data")
    scan = next(raw.rglob("*.mha"))
    get = remote._Server.get

    def half(self, name, target):
        get(self, name, target)
        os.truncate(target, target.stat().st_size // 2)

    monkeypatch.setattr(remote._Server, "get", half)
    with pytest.raises(StoreError, match="start again"):
        read(scan)
    assert scan.stat().st_size == 0 and not [*raw.rglob(".*")]
    monkeypatch.setattr(remote._Server, "get", get)
    assert read(scan).hu.shape and scan.stat().st_size


@pytest.mark.parametrize(
    "url, said", [("file:///nowhere/at/all", "holds no file"), ("s4://a/b", "s4")]
)
def test_a_wrong_url(tmp_path, url, said):
    by_url("stoic", tmp_path, url)
    with pytest.raises((ValueError, StoreError), match=said):
        adapters.find_raw_dir("stoic", tmp_path / "data")
