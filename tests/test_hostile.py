"Files and params of strangers: a fault, a hang, a bomb or an absurd claim ends one case, by name"

import gzip
import os
import struct
import sys
import time
import zipfile

import pandas as pd
import pytest
from conftest import TOP, load_script
from files import dicom, itk, write as write_as

from asap.cli import main
from asap.data import decode
from asap.data.checks import load_checked
from asap.data.prepare import prepare_cases
from asap.data.table import cohort_row
from asap.isolate import IsolationError, call_isolated
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("hostile", 1), (48, 48, 24), (7.0, 7.0, 14.0))
META = "NDims = {n}\nDimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"


def meta(path, n=3, sizes="8 8 8"):
    path.write_text(META.format(n=n, sizes=sizes))
    return path


def many_dimensions(folder):
    return meta(folder / "a.mha", 333_333, "8 " * 333_333)


def huge_sizes(folder):
    return meta(folder / "a.mha", 3, "1000000000000 8 8")


def huge_nrrd(folder):
    path = folder / "a.nrrd"
    path.write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 99999 99999 99999\nencoding: raw\n\n"
    )
    return path


def other_file(folder):
    path = folder / "a.mhd"
    path.write_text(META.format(n=3, sizes="8 8 8").replace("LOCAL", "/etc/passwd"))
    return path


def file_above(folder):
    path = folder / "a.nhdr"
    itk(C.hu, C.affine, path)
    path.write_text(path.read_text().replace("data file: ", "data file: ../"))
    return path


def gzip_bomb(folder):
    head = bytearray(gzip.decompress(write_as(C.hu, C.affine, folder, "nii.gz").read_bytes())[:352])
    struct.pack_into("<4h", head, 40, 3, 1000, 1000, 500)
    path = folder / "bomb.nii.gz"
    path.write_bytes(gzip.compress(bytes(head) + bytes(2**20) * 300))
    return path


def far_voxels(folder):
    path = write_as(C.hu, C.affine, folder, "nii.gz")
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", data, 108, 1e12)
    path.write_bytes(gzip.compress(bytes(data)))
    return path


def zip_bomb(folder):
    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("hu.npy", "w", force_zip64=True) as f:
            for _ in range(400):
                f.write(bytes(2**20))
    return path


def nested_sequences(folder):
    dicom(C.hu, C.affine, folder / "series")
    item = (
        struct.pack("<HH", 8, 0x1140)
        + b"SQ\0\0\xff\xff\xff\xff"
        + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    )
    for f in (folder / "series").iterdir():
        b = f.read_bytes()
        at = b.find(struct.pack("<HH", 0x28, 2))
        f.write_bytes(b[:at] + item * 20_000 + b[at:])
    return folder / "series"


def pipe(folder):
    os.mkfifo(folder / "a.nii.gz")
    return folder / "a.nii.gz"


HOSTILE = {
    many_dimensions: "333333 dimensions",
    huge_sizes: "1000000000000 x 8 x 8 voxels",
    huge_nrrd: "99999 x 99999 x 99999 voxels",
    other_file: "names voxels in `/etc/passwd`",
    file_above: "names voxels in `../",
    gzip_bomb: "this is no scan",
    far_voxels: "the voxels at byte 1e",
    zip_bomb: "this is no scan",
    nested_sequences: "RecursionError",
    pipe: "is no file",
}


@pytest.mark.parametrize("make", HOSTILE)
def test_a_hostile_file_is_refused_at_once(make, tmp_path):
    path = make(tmp_path)
    start = time.process_time()
    with pytest.raises(ValueError, match=HOSTILE[make]) as e:
        load_checked(path)
    assert path.name in str(e.value) and time.process_time() - start < 5


def test_a_library_that_dies_ends_its_process_alone(tmp_path):
    "ITK itself, without the check of the header before it"
    path = many_dimensions(tmp_path)
    with pytest.raises(IsolationError, match=r"a\.mha: the library that reads it"):
        call_isolated(
            path,
            "asap.data.decode:_parse_itk_header",
            str(path),
            "meta",
            limits=decode.CallLimits(seconds=3),
        )
    good = itk(C.hu, C.affine, tmp_path / "good.mha")
    assert decode.read_itk_header(good, "meta")["size"] == list(C.hu.shape)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_a_library_that_takes_all_memory(tmp_path):
    path = meta(tmp_path / "a.mha", 3, "3000 3000 300")
    with pytest.raises(IsolationError, match="more than 0.5 GB|cannot be read"):
        call_isolated(path, "numpy:ones", [3000, 3000, 30], limits=decode.CallLimits(gigabytes=0.5))


def test_the_case_is_quarantined_and_the_others_prepared(tmp_path):
    rows = []
    for name, make in {"bomb": gzip_bomb, "good": None, "dims": many_dimensions}.items():
        (tmp_path / name).mkdir()
        form = "nrrd"
        path = make(tmp_path / name) if make else write_as(C.hu, C.affine, tmp_path / name, form)
        rows.append(cohort_row(name, path, "train"))
    out, bad = tmp_path / "out", tmp_path / "quarantine.csv"
    recipe = dict(spacing=[7, 7, 14], hu=[-1000, 1000])
    made = prepare_cases(pd.DataFrame(rows), out, tmp_path / "organs", recipe, None, 1, bad)
    assert list(made.case) == ["good"] and (out / "good.nii").exists()
    listed = pd.read_csv(bad)
    assert list(listed.case) == ["bomb", "dims"] and "no scan" in listed.reason[0]


def test_limits_can_be_raised(tmp_path, monkeypatch):
    path = write_as(C.hu, C.affine, tmp_path, "nii")
    monkeypatch.setenv("ASAP_MAX_VOXELS", "1000")
    with pytest.raises(ValueError, match="expected at most 1000"):
        load_checked(path)
    monkeypatch.setenv("ASAP_MAX_VOXELS", str(C.hu.size))
    load_checked(path)
    monkeypatch.setenv("ASAP_MAX_VOXELS", "many")
    with pytest.raises(ValueError, match="ASAP_MAX_VOXELS is `many`"):
        load_checked(path)


PARAMS = {
    "extra: !!python/object/apply:os.system ['true']\n": "not valid YAML",
    "loop: &a {a: *a}\n": "it holds itself",
    "x0: &x0 [a, a, a, a, a, a, a, a, a, a]\n"
    + "".join(f"x{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 10)}]\n" for k in range(1, 9)): "aliases",
    "extra: " + "[" * 30_000 + "\n": "not valid YAML",
    "base: []\n": "expected a file's name",
    "base: params.yaml\ncohorts: {null: {}}\n": "expected names of cohorts",
    "base: no/such.yaml\n": "which is no file",
}


@pytest.mark.parametrize("text", PARAMS, ids=range(len(PARAMS)))
def test_hostile_params(text, tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    assert main(["params", str(path)]) == 1
    said = capsys.readouterr().err
    assert PARAMS[text] in said and "p.yaml" in said and len(said) < 2000


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"study: \xff\n")
    with pytest.raises(ValueError, match=r"p\.yaml is not valid YAML"):
        load_params(tmp_path / "p.yaml")


def test_a_sample_of_the_campaign(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOP / "benchmarks"))
    hostile = load_script(TOP / "benchmarks/hostile.py")
    results = hostile.campaign(60, 40, tmp_path, seed=1)
    assert len(results) == 100 and not hostile.faults(results), hostile.faults(results)
    assert {r["outcome"] for r in results} == {"accepted", "refused"}
    again = hostile.campaign(60, 40, tmp_path, seed=1)
    assert again == results, "a campaign goes on from what is kept"
