"""Names and places of scans, batches that lose nothing, results that follow their files, and the
interpreter that a stage runs in"""

import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import TOP
from files import FORMS, dicom, itk, nifti, pictures, write as write_as

from asap import cli
from asap.cli import find_scans, main
from asap.core import MAX_NAME_BYTES, atomic_write, fit_name, list_files
from asap.data import prepare
from asap.data.prepare import CaseStore, quick_hash
from asap.data.volumes import read
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("scans", 0), (48, 48, 24), (7.0, 7.0, 14.0), present=[])
OTHER = np.ascontiguousarray(np.where(C.hu > -900, C.hu + 7, C.hu)).astype(np.int16)
TO = ["--to", "7", "7", "14"]


def good(path):
    return nifti(C.hu, C.affine, path)


def names(*paths, **kw):
    return [n for n, _ in find_scans(list(paths), **kw)]


def standardize(paths, out):
    code = main(["standardize", *map(str, paths), "-o", str(out), *TO])
    return code, {f.stem: np.asanyarray(nib.load(f).dataobj) for f in list_files(out, "*.nii")}


def verdicts(out) -> dict:  # name -> verdict, of `asap check`
    lines = [x.split(": ")[0].split(maxsplit=1) for x in out.splitlines()]
    return {x[1]: x[0] for x in lines if x[0] in ("ok", "warning", "REFUSED")}


# names


def pair(folder, how):
    "Two scans that would be called the same, of different voxels"
    a = good(folder / "p1/case.nii.gz")
    if how == "a format":
        return [a, itk(OTHER, C.affine, folder / "p1/case.mha")]
    if how == "packed or not":
        return [a, nifti(OTHER, C.affine, folder / "p1/case.nii")]
    if how == "a folder":
        return [a, dicom(OTHER, C.affine, folder / "p1/case")]
    if how == "a place":
        return [a, nifti(OTHER, C.affine, folder / "p2/case.nii.gz")]
    if how == "upper case":
        return [a, nifti(OTHER, C.affine, folder / "p1/CASE.nii.gz")]
    if how == "an accent":
        a = a.rename(a.with_name("\u00fc.nii.gz"))
        return [a, nifti(OTHER, C.affine, folder / "p1/u\u0308.nii.gz")]
    return [a, nifti(OTHER, C.affine, folder / "p1_case/x/case.nii.gz")]


HOW = ["a format", "packed or not", "a folder", "a place", "upper case", "an accent", "a mixture"]


@pytest.mark.parametrize("how", HOW)
def test_two_scans_of_one_name_keep_their_results(how, tmp_path):
    paths = pair(tmp_path / "in", how)
    if len(list_files(paths[0].parent)) < 2 and how in ("upper case", "an accent"):
        pytest.skip("this file system takes the two names for one")
    for given in (paths, paths[::-1], [tmp_path / "in"]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, made = standardize(given, tmp_path / "out")
        assert code == 0 and len({n.casefold() for n in made}) == 2, made.keys()
        for hu in (C.hu, OTHER):
            assert any(np.array_equal(v, hu.clip(-1000, 1000)) for v in made.values())


def test_names_of_three_and_of_files_that_commands_write(tmp_path):
    for f in ("a/s.nii", "a/s.mha", "b/s.nii", "b/quarantine.nii", "a_s/s.nii"):
        good(tmp_path / f) if f.endswith(".nii") else itk(C.hu, C.affine, tmp_path / f)
    found = names(tmp_path)
    assert len(set(found)) == 5 and "quarantine" not in found, found


@pytest.mark.parametrize("raw", [b"\xfcber", b"a\nb", b"tab\there", b"%s {x} $1$ #", b"\xff\xfe"])
def test_a_name_that_cannot_be_printed(raw, tmp_path):
    good(tmp_path / "in/z_good.nii.gz")
    odd = os.fsencode(tmp_path / "in") + b"/" + raw + b".nii.gz"
    shutil.copy(os.fsencode(tmp_path / "in/z_good.nii.gz"), odd)
    look = ["--pictures", str(tmp_path / "look")]
    run = subprocess.run(
        [sys.executable, "-m", "asap.cli", "check", str(tmp_path / "in"), *look],
        capture_output=True,
        cwd=TOP,
        env=dict(os.environ, PYTHONIOENCODING="ascii:strict"),
    )
    assert run.returncode == 0 and b"Traceback" not in run.stderr, run.stderr[-800:]
    assert run.stdout.count(b"\n") == 2 and len(list_files(tmp_path / "look")) == 2
    code, made = standardize([tmp_path / "in"], tmp_path / "out")
    assert code == 0 and len(made) == 2


def test_a_name_that_cannot_be_printed_is_quarantined(tmp_path):
    good(tmp_path / "in/good.nii.gz")
    with open(os.fsencode(tmp_path / "in") + b"/\xfc.nii", "wb") as f:
        f.write(b"no volume")
    code, made = standardize([tmp_path / "in"], tmp_path / "out")
    assert code == 1 and list(made) == ["good"]
    assert pd.read_csv(tmp_path / "out/quarantine.csv").case.tolist() == ["ü"]


@pytest.mark.parametrize("letter, n", [("n", 240), ("n", 245), ("n", 251), ("ü", 120)])
def test_a_very_long_name(letter, n, tmp_path):
    path = good(tmp_path / "in" / f"{letter * n}.nii")
    code, made = standardize([path], tmp_path / "out")
    assert code == 0 and len(made) == 1
    assert main(["check", str(path), "--pictures", str(tmp_path / "look")]) == 0
    found = names(path, ending="_12_region.nii.gz")[0] + "_12_region.nii.gz"
    assert len(os.fsencode(found)) <= MAX_NAME_BYTES
    with atomic_write(tmp_path / (letter * n + ".txt")) as tmp:
        tmp.write_text("whole")
    assert fit_name("x" * n + "1", "." * 30) != fit_name("x" * n + "2", "." * 30)


@pytest.mark.parametrize(
    "ending", ["Nii", "NII", "Nii.gz", "nii.GZ", "MHA", "Mha", "NRRD", "Nrrd", "NPZ", "MHD"]
)
def test_an_ending_in_any_case(ending, tmp_path):
    form = ending.lower()
    plain = write_as(C.hu, C.affine, tmp_path / "in", form)
    odd = plain.rename(plain.with_name(f"Scan.{ending}"))
    assert np.array_equal(read(odd).ras().hu, C.hu) and names(tmp_path / "in") == ["Scan"]


@pytest.mark.parametrize("ending", [".dicom", ".DCM", ".IMA", ".Dicom", ""])
def test_slices_under_another_ending(ending, tmp_path):
    folder = dicom(C.hu, C.affine, tmp_path / "series")
    for n, f in enumerate(list(folder.iterdir())):
        f.rename(folder / f"IM{n:04d}{ending}")
    assert names(folder) == ["series"]
    one = list_files(folder)[3]
    assert names(one) == ["IM0003"] and np.array_equal(read(one).ras().hu, C.hu)


# links


@pytest.mark.parametrize("how", ["itself", "above", "a file", "a folder", "each other", "a chain"])
def test_a_scan_counts_once_whatever_links_lead_to_it(how, tmp_path, capsys):
    top = tmp_path / "scans"
    good(top / "b/chest.nii.gz")
    if how == "itself":
        (top / "latest").symlink_to(".")
    elif how == "above":
        (top / "b/up").symlink_to(top)
    elif how == "a file":
        (top / "a_link.nii.gz").symlink_to("b/chest.nii.gz")
    elif how == "a folder":
        (top / "a_link").symlink_to("b")
    elif how == "each other":
        (top / "c").mkdir()
        (top / "c/b").symlink_to(top / "b")
        (top / "b/c").symlink_to(top / "c")
    else:
        (top / "l1").symlink_to("l2")
        (top / "l2").symlink_to("b")
    assert main(["check", str(top)]) == 0
    assert verdicts(capsys.readouterr().out) == dict(chest="ok")


def test_a_link_out_of_the_folder_is_followed(tmp_path):
    good(tmp_path / "disk/chest.nii.gz")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/all").symlink_to(tmp_path / "disk")
    assert names(tmp_path / "scans") == ["chest"]


@pytest.mark.parametrize("what", ["lost.nii.gz", "lost.nrrd", "lost", "series/s05.dcm", "loop.nii"])
def test_what_was_not_fetched_is_named(what, tmp_path, capsys):
    top = tmp_path / "scans"
    good(top / "there.nii.gz")
    (top / what).parent.mkdir(exist_ok=True)
    if "/" in what:
        dicom(C.hu, C.affine, top / "series", skip=[23])
    (top / what).symlink_to("loop.nii" if "loop" in what else "../.git/annex/objects/x")
    assert main(["check", str(top)]) == 1
    found = capsys.readouterr()
    name = what.split("/")[0].split(".")[0]
    assert verdicts(found.out) == {"there": "ok", name: "REFUSED"} and "is a link to" in found.out


def test_one_path_of_several_is_missing(tmp_path, capsys):
    paths = [tmp_path / "gone.nii.gz", good(tmp_path / "here.nii.gz"), tmp_path / "away"]
    code, made = standardize(paths, tmp_path / "out")
    assert code == 1 and list(made) == ["here"]
    assert "gone.nii.gz is missing" in capsys.readouterr().err
    assert main(["check", *map(str, paths[::2])]) == 1
    assert "gone.nii.gz is missing" in capsys.readouterr().err


# slices one by one


def test_slices_given_one_by_one(tmp_path, capsys):
    one, two = (dicom(C.hu, C.affine, tmp_path / n, series=f"1.{n}") for n in "12")
    assert names(*one.iterdir()) == ["1"]
    assert names(*one.iterdir(), *two.iterdir()) == ["1", "2"]
    assert main(["check", *map(str, one.iterdir()), str(two)]) == 0
    assert verdicts(capsys.readouterr().out) == {"1": "ok", "2": "ok"}


def test_two_series_in_one_folder(tmp_path):
    flat = dicom(C.hu, C.affine, tmp_path / "flat", series="1.2")
    dicom(OTHER, C.affine, flat, series="1.3")
    dicom(C.hu[:, :, :1], C.affine, flat, series="1.4", ImageType=["DERIVED", "LOCALIZER"])
    found = find_scans(list_files(flat))
    assert len(found) == 2
    for (_, path), hu in zip(found, (C.hu, OTHER)):
        assert np.array_equal(read(path).ras().hu, hu)
    slice_of_other = next(f for f in list_files(flat) if f.name.startswith("1.3"))
    assert np.array_equal(read(slice_of_other).ras().hu, OTHER)


def test_pictures_given_one_by_one(tmp_path):
    folder = pictures(C.hu, tmp_path / "slices")
    assert find_scans(list_files(folder)) == [("slices", folder)]


def test_what_is_no_image_beside_a_series(tmp_path):
    folder = dicom(C.hu, C.affine, tmp_path / "disc/series")
    dicom(C.hu[:, :, :1], C.affine, tmp_path / "disc", Rows=None)  # a dose report
    (tmp_path / "disc/DICOMDIR").write_bytes(list_files(folder)[0].read_bytes())
    nifti((C.hu > 0).astype(np.uint8), C.affine, folder / "lung_mask.nii.gz")
    nifti(C.hu, C.affine, folder / "retest.nii.gz")
    assert names(tmp_path / "disc") == ["series", "retest"]


# batches


def hostile(folder):
    "Files that a reader trips over in ways that nobody listed"
    good(folder / "a_good.nii.gz")
    good(folder / "z_good.nii.gz")
    (folder / "m_npz.npz").write_bytes(b"PK\x03\x04" + bytes(50))
    (folder / "m_words.nrrd").write_text("NRRD0004\nsizes: a b c\n")
    raw = bytearray(good(folder / "m_nan.nii").read_bytes())
    raw[280:328] = np.full(12, np.nan, np.float32).tobytes()  # the rows of the sform
    (folder / "m_nan.nii").write_bytes(bytes(raw))
    series = dicom(C.hu, C.affine, folder / "m_series")
    f = list_files(series)[0]
    f.write_bytes(f.read_bytes().replace(b"CS", b"ZZ", 3))
    return folder


def test_check_goes_on_whatever_is_raised(tmp_path, monkeypatch, capsys):
    """Every refusal is one line with file and reason; also where a reader raises what nobody
    listed"""
    hostile(tmp_path / "in")
    from asap.data import checks

    def broken(v):
        if "m_words" in v.facts["path"] or "m_nan" in v.facts["path"]:
            raise KeyError("two\nlines")
        return []

    monkeypatch.setattr(checks, "check_volume", broken)
    assert main(["check", str(tmp_path / "in")]) == 1
    out = capsys.readouterr().out
    found = verdicts(out)
    assert found["a_good"] == found["z_good"] == "ok" and len(found) == 6
    refused = [x for x in out.splitlines() if x.startswith("REFUSED")]
    assert refused and all("in/m_" in x for x in refused), refused


ERRORS = [KeyError("x"), MemoryError("8 TiB"), RuntimeError("a\nb"), ZeroDivisionError(), OSError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_standardize_goes_on_whatever_is_raised(error, tmp_path, monkeypatch, capsys):
    for n in ("a", "m", "z"):
        good(tmp_path / f"in/{n}.nii.gz")
    load = prepare.load_checked

    def broken(path, *a):
        if path.endswith("m.nii.gz"):
            raise error
        return load(path, *a)

    monkeypatch.setattr(prepare, "load_checked", broken)
    code, made = standardize([tmp_path / "in"], tmp_path / "out")
    assert code == 1 and list(made) == ["a", "z"]
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("refused m")]
    assert len(lines) == 1 and "m.nii.gz" in lines[0]
    assert pd.read_csv(tmp_path / "out/quarantine.csv").case.tolist() == ["m"]


COMMANDS = {
    "embed": ["-o", "all.npz"],
    "zero-shot": ["-o", "all.csv"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_results_are_written_as_they_come(command, tmp_path, monkeypatch):
    "A batch that is stopped at its third scan has the results of two on disk"
    for n in "abc":
        good(tmp_path / f"in/{n}.nii.gz")
    one = cli._embed_one if command == "embed" else cli._on_ct
    out = tmp_path / COMMANDS[command][1]

    def stop(*a, **kw):
        if any(str(x).endswith("c.nii.gz") for x in a):
            assert out.exists(), "nothing was written before the end"
            raise KeyboardInterrupt
        return one(*a, **kw)

    monkeypatch.setattr(cli, one.__name__, stop)
    monkeypatch.chdir(tmp_path)
    assert main([command, str(tmp_path / "in"), *COMMANDS[command]]) == 130
    if command == "embed":
        with np.load(out) as z:
            assert z["cases"].tolist() == ["a", "b"] and len(z["features"]) == 2
    else:
        assert pd.read_csv(out).scan.unique().tolist() == ["a", "b"]


def test_a_scan_is_never_written_over(tmp_path, capsys):
    path = good(tmp_path / "in/scan.nii")
    before = path.read_bytes()
    assert main(["standardize", str(path), "-o", str(tmp_path / "in"), *TO]) == 1
    assert path.read_bytes() == before and "is a scan that is read" in capsys.readouterr().err


# stale results


def correct(path, form):
    "Change the middle of a scan, with its size and the time of its file"
    if form == "mhd":
        path = path.with_suffix(".raw") if path.with_suffix(".raw").exists() else path
    files = list_files(path) if path.is_dir() else [path]
    before = {f: f.stat() for f in files}
    middle = files[len(files) // 3]
    data = bytearray(middle.read_bytes())
    at = len(data) // 2
    data[at : at + 400] = bytes(b ^ 1 for b in data[at : at + 400])
    middle.write_bytes(bytes(data))
    for f, s in before.items():
        os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))
        assert f.stat().st_size == s.st_size


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("dicom-rle",)])
def test_a_correction_in_place_changes_the_hash(form, tmp_path):
    path = write_as(C.hu, C.affine, tmp_path, form)
    known: dict = {}
    before = quick_hash(path, known)
    assert quick_hash(path) == before and quick_hash(path, known) == before
    correct(path, form)
    assert quick_hash(path, known) != before


def test_one_slice_stands_for_its_series(tmp_path):
    folder = dicom(C.hu, C.affine, tmp_path / "series")
    one, other = list_files(folder)[0], list_files(folder)[9]
    before = quick_hash(one)
    other.write_bytes(other.read_bytes()[:-1] + b"\1")
    assert quick_hash(one) != before


@pytest.mark.parametrize("form", ["nii", "mha", "dicom"])
def test_what_was_made_of_the_former_file_is_made_anew(form, tmp_path):
    path = write_as(C.hu, C.affine, tmp_path, form)
    _, first = standardize([path], tmp_path / "out")
    correct(path, form)
    _, second = standardize([path], tmp_path / "out")
    assert [n for n in first] == [n for n in second]
    assert not np.array_equal(*[list(x.values())[0] for x in (first, second)])


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    path = good(tmp_path / "scan.nii.gz")
    store = CaseStore(tmp_path, tmp_path, hashes=tmp_path / "hashes")
    monkeypatch.setattr(prepare, "SETTLED_NS", -1)
    before = store.hash_raw("scan", image=str(path))
    hashed = []
    monkeypatch.setattr(prepare, "file_hash", lambda f: hashed.append(f) or "x")
    assert store.hash_raw("scan", image=str(path)) == before and not hashed
    path.touch()
    assert store.hash_raw("scan", image=str(path)) != before and hashed == [path]
    (tmp_path / "hashes/scan.json").write_text("{half a fi")
    assert store.hash_raw("scan", image=str(path))["image"][0] == path.stat().st_size


def test_a_file_that_was_just_written_is_read_again(tmp_path):
    "Two changes within the clock's step leave one time"
    path = good(tmp_path / "scan.nii.gz")
    known: dict = {}
    quick_hash(path, known)
    assert known["files"] is None


# the interpreter of a stage


def kernel(folder, argv):
    spec = folder / "kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(dict(argv=argv, display_name="x", language="python")))
    return str(folder)


@pytest.mark.parametrize("where", ["JUPYTER_PATH", "JUPYTER_DATA_DIR", "no kernel"])
def test_a_stage_runs_in_the_interpreter_of_asap(where, tmp_path):
    env = dict(os.environ, ASAP_ROOT=str(tmp_path), PYTHONPATH=str(TOP))
    if where != "no kernel":
        env[where] = kernel(tmp_path / "jupyter", ["/bin/false", "-f", "{connection_file}"])
    else:
        env["JUPYTER_PATH"] = str(tmp_path)
    stage = tmp_path / "nbs/stages/where.ipynb"
    stage.parent.mkdir(parents=True)
    cells = [
        dict(cell_type="code", id="a", metadata=dict(tags=["parameters"]), source="stage = ''"),
        dict(cell_type="code", id="b", metadata={}, source="import sys\nprint(sys.executable)"),
    ]
    nb = dict(cells=[dict(c, outputs=[], execution_count=None) for c in cells], metadata={})
    stage.write_text(json.dumps(dict(nb, nbformat=4, nbformat_minor=5)))
    code = "from asap.cli import execute_stage; print(execute_stage('where'))"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-1500:]
    done = json.loads((tmp_path / "runs/notebooks/where.ipynb").read_text())
    said = [o["text"] for c in done["cells"] for o in c.get("outputs", []) if "text" in o]
    assert sys.executable in "".join("".join(s) for s in said)


def test_without_ipykernel_a_sentence_says_so(monkeypatch):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda n: None if n == "ipykernel" else real(n)
    )
    with pytest.raises(ValueError, match="has no ipykernel"):
        cli._own_kernel()
