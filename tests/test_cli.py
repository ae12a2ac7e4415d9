"""`asap zero-shot`, `ground` and `embed`: what is written, where it lies, and that nothing is
written for what is no CT"""

import resource
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import TOP
from files import dicom, write as write_as
from scipy.ndimage import label

from asap.abnormalities import ABNORMALITIES
from asap.cli import main
from asap.data import real
from asap.data.volumes import read, write
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("cli", 0), (48, 48, 24), (7.0, 7.0, 14.0), only="Consolidation")
SAID = "There is pleural effusion."
COMMANDS = {
    "zero-shot": lambda out: ["-o", str(out / "all.csv")],
    "ground": lambda out: ["-o", str(out), "--sentence", SAID],
    "embed": lambda out: ["-o", str(out / "all.npz")],
}


def call(command, out, *paths):
    return main([command, *map(str, paths), *COMMANDS[command](out)])


def mr(path, scale=0.7):  # magnitudes, none below 0, dark where a CT has air
    write((np.maximum(C.hu + 1000, 0) * scale).astype(np.float32), C.affine, path)
    return path


def truncated(path):
    write(C.hu, C.affine, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def text(path):
    path.write_text("The heart is normal.\n" * 99)
    return path


def mask(path):
    write((C.labels == 1).astype(np.uint8), C.affine, path)
    return path


def twice(path):
    write((C.hu - 1024).astype(np.int16), C.affine, path)
    return path


def foreign(path):
    return dicom(C.hu, C.affine, path, Modality="MR")


BAD = dict(
    truncated=(truncated, "a.nii.gz", "truncated"),
    words=(text, "a.nii.gz", "cannot be read as NIfTI"),
    nrrd=(text, "a.nrrd", "truncated or broken"),
    txt=(text, "a.txt", "is no supported format"),
    mr=(mr, "a.nii.gz", "nothing is darker than"),
    faint_mr=(lambda p: mr(p, 0.1), "a.nii.gz", "8-bit pictures"),
    bright_mr=(lambda p: mr(p, 3), "a.nii.gz", "nothing is darker than"),
    series=(foreign, "a", "modality MR, expected|modality MR; expected"),
    mask=(mask, "a.nii.gz", "this is a mask"),
    twice=(twice, "a.nii.gz", "applied twice"),
    missing=(lambda p: p, "a.nii.gz", "is missing"),
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD)
def test_nothing_is_written_for_what_is_no_ct(command, bad, tmp_path, capsys):
    make, name, why = BAD[bad]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in" / name)
    assert call(command, tmp_path / "out", path) == 1
    said = capsys.readouterr().err
    assert any(w in said for w in why.split("|")) and name in said, said
    assert (
        sorted(f.name for f in tmp_path.iterdir()) == ["in"]
        and len(list((tmp_path / "in").iterdir())) == path.exists()
    )
    if command != "embed" and bad == "mr":
        assert "an MR is refused with --mr too" in said


@pytest.mark.parametrize("command", ["zero-shot", "ground"])
def test_a_declared_mr_is_refused_too(command, tmp_path, capsys):
    path = mr(tmp_path / "a.nii.gz")
    assert main([command, str(path), "--mr", *COMMANDS[command](tmp_path / "out")]) == 1
    assert "an MR has none" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_broken_scan_does_not_stop_the_others(tmp_path, capsys):
    for n in ("one", "two"):
        write(C.hu, C.affine, tmp_path / f"in/{n}.nii.gz")
    text(tmp_path / "in/broken.nii.gz")
    for command in COMMANDS:
        assert call(command, tmp_path / command, tmp_path / "in") == 1
    z = pd.read_csv(tmp_path / "zero-shot/all.csv")
    assert z.groupby("scan").label.apply(list).to_dict() == dict(
        one=ABNORMALITIES, two=ABNORMALITIES
    )
    assert z.probability.between(0, 1).all()
    assert np.allclose(z.score, z.positive_similarity - z.negative_similarity, atol=2e-5)
    assert np.load(tmp_path / "embed/all.npz")["cases"].tolist() == ["one", "two"]
    assert sorted(f.name for f in (tmp_path / "ground").iterdir()) == [
        "one.csv",
        "one_1.png",
        "one_1_heat.nii.gz",
        "one_1_region.ctbl",
        "one_1_region.nii.gz",
        "one_1_region_itksnap.txt",
        "one_field.nii.gz",
        "quarantine.csv",
        "two.csv",
        "two_1.png",
        "two_1_heat.nii.gz",
        "two_1_region.ctbl",
        "two_1_region.nii.gz",
        "two_1_region_itksnap.txt",
        "two_field.nii.gz",
    ]
    listed = [
        tmp_path / "zero-shot/all.quarantine.csv",
        tmp_path / "embed/all.quarantine.csv",
        tmp_path / "ground/quarantine.csv",
    ]
    assert all(pd.read_csv(f).case.tolist() == ["broken"] for f in listed)
    err = capsys.readouterr().err
    assert err.count("not for patients") == 3 and err.count("refused broken") == 3, "once a command"
    (tmp_path / "in/broken.nii.gz").unlink()
    before = {f: f.read_bytes() for command in COMMANDS for f in (tmp_path / command).iterdir()}
    for command in COMMANDS:
        assert call(command, tmp_path / command, tmp_path / "in") == 0
    assert all(len(pd.read_csv(f)) == 0 for f in listed), "who is refused no more is listed no more"
    assert all(f.read_bytes() == b for f, b in before.items() if f not in listed), (
        "twice the same bytes"
    )


def grounded(tmp_path, path, name, *more) -> tuple:  # heat, region, row of the CSV
    assert main(["ground", str(path), "-o", str(tmp_path / "out"), "--sentence", SAID, *more]) == 0
    return (
        nib.load(tmp_path / f"out/{name}_1_heat.nii.gz"),
        nib.load(tmp_path / f"out/{name}_1_region.nii.gz"),
        pd.read_csv(tmp_path / f"out/{name}.csv").iloc[0],
    )


def turned():  # 0.2 rad about z
    a = np.eye(4)
    a[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    return a @ C.affine


@pytest.mark.parametrize("form", ["nii.gz", "nrrd", "mha", "npz", "dicom", "flipped", "oblique"])
def test_heat_and_region_lie_on_the_scan(form, tmp_path):
    hu, affine = C.hu, C.affine
    if form == "flipped":
        hu, affine = (
            C.hu[::-1, :, ::-1].transpose(1, 2, 0),
            C.affine
            @ np.array(
                [
                    [0, 0, -1, C.hu.shape[0] - 1],
                    [1, 0, 0, 0],
                    [0, -1, 0, C.hu.shape[2] - 1],
                    [0, 0, 0, 1.0],
                ]
            ),
        )
    if form == "oblique":
        affine = turned()
    path = write_as(hu, affine, tmp_path, form if form not in ("flipped", "oblique") else "nii")
    v, name = read(path), path.name.split(".")[0]
    heat, region, row = grounded(tmp_path, path, name)
    for img in (heat, region):
        assert img.shape == v.hu.shape and np.allclose(img.affine, v.affine, atol=1e-3)
    assert heat.get_data_dtype() == np.float32 and region.get_data_dtype() == np.uint8
    h, r = np.asanyarray(heat.dataobj), np.asanyarray(region.dataobj) > 0
    top = h.max()
    assert abs(top - row.max_similarity) < 1e-4 and np.isfinite(h).all()
    peak = (v.affine @ [*np.argwhere(h == top).mean(0), 1])[:3]  # the patch is 42 mm wide
    assert np.abs(peak - row[["peak_x_mm", "peak_y_mm", "peak_z_mm"]].to_numpy(float)).max() < (
        8 if form != "oblique" else 21
    )
    if form not in ("oblique",):
        table = pd.read_csv(tmp_path / f"out/{name}.csv")
        assert (table.inside_fraction == 1).all() and len(table) == label(r)[1]
        for place in table[["x_mm", "y_mm", "z_mm"]].to_numpy():
            at = np.rint(np.linalg.inv(v.affine) @ [*place, 1])[:3].astype(int)
            assert r[tuple(at)], "each piece's position lies in the region"
        same, _, first = grounded(
            tmp_path / "plain", write_as(C.hu, C.affine, tmp_path / "plain", "nii"), "scan"
        )
        assert (
            np.abs(
                row[["max_similarity", "x_mm", "y_mm", "z_mm"]].to_numpy(float)
                - first[["max_similarity", "x_mm", "y_mm", "z_mm"]].to_numpy(float)
            ).max()
            < 0.2
        )


def test_a_larger_box(tmp_path, capsys):
    "What lies outside of the box is said, and seen with a larger one"
    write(np.concatenate([C.hu] * 2, 2), C.affine, tmp_path / "long.nii.gz")
    heat, _, row = grounded(tmp_path, tmp_path / "long.nii.gz", "long")
    assert (
        "give a larger --size" in capsys.readouterr().err and (heat.get_fdata() == 0).mean() == 0.5
    )
    field = np.asanyarray(nib.load(tmp_path / "out/long_field.nii.gz").dataobj)
    assert np.array_equal(field == 0, heat.get_fdata() == 0), "0 and a mask outside of the field"
    heat, _, row = grounded(tmp_path, tmp_path / "long.nii.gz", "long", "--size", "96", "96", "96")
    err = capsys.readouterr().err
    assert (
        "give a larger" not in err
        and "position table" in err
        and np.isfinite(heat.get_fdata()).all()
        and row.num_patches <= 0.2 * 1024
    )
    assert (
        main(
            [
                "zero-shot",
                str(tmp_path / "long.nii.gz"),
                "-o",
                str(tmp_path / "a.csv"),
                "--size",
                "96",
                "96",
                "50",
            ]
        )
        == 1
    )
    assert (
        "not a whole number of patches" in capsys.readouterr().err
        and not (tmp_path / "a.csv").exists()
    )


def spoil(folder, how):
    made = shutil.copytree(
        TOP / "weights" / ("text" if how == "text" else "asap"), folder / "checkpoint"
    )
    if how == "truncated":
        f = made / "model.safetensors"
        f.write_bytes(f.read_bytes()[: 10**6])
    if how == "config":
        (made / "config.json").write_text("{")
    if how == "absent":
        shutil.rmtree(made)
    if how == "file":
        shutil.rmtree(made)
        made.write_text("x")
    return made


@pytest.mark.parametrize(
    "how, why",
    [
        ("truncated", "is truncated or broken"),
        ("config", "not valid JSON"),
        ("absent", "is missing"),
        ("text", "does not describe a model"),
        ("file", "give a checkpoint folder"),
    ],
)
def test_a_checkpoint_that_is_none(how, why, tmp_path, capsys):
    write(C.hu, C.affine, tmp_path / "a.nii.gz")
    assert (
        main(
            [
                "zero-shot",
                str(tmp_path / "a.nii.gz"),
                "-o",
                str(tmp_path / "out/a.csv"),
                "--checkpoint",
                str(spoil(tmp_path, how)),
            ]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert why in err and "checkpoint" in err and not (tmp_path / "out").exists()


def test_models_and_encoders_that_do_not_fit(tmp_path, capsys):
    write(C.hu, C.affine, tmp_path / "a.nii.gz")
    shutil.copytree(TOP / "weights/text", tmp_path / "text")
    f = tmp_path / "text/tokenizer.json"
    f.write_text(f.read_text().replace('"heart"', '"haert"'))
    for arm, text_, why in (
        ("mae", "text", "trained without sentences"),
        ("asap", tmp_path / "text", "was trained with c"),
        ("asap", tmp_path / "none", "none"),
    ):
        assert (
            call(
                "ground",
                tmp_path / "out",
                tmp_path / "a.nii.gz",
                "--checkpoint",
                TOP / "weights" / arm,
                "--text",
                TOP / "weights" / text_,
            )
            == 1
        )
        assert why in capsys.readouterr().err and not (tmp_path / "out").exists()
    for arm in ("clip", "simcrop", "released"):
        assert (
            call(
                "ground",
                tmp_path / arm,
                tmp_path / "a.nii.gz",
                "--checkpoint",
                TOP / "weights" / arm,
            )
            == 0
            == call(
                "zero-shot",
                tmp_path / arm,
                tmp_path / "a.nii.gz",
                "--checkpoint",
                TOP / "weights" / arm,
            )
        )
    assert (
        call("embed", tmp_path / "mae", tmp_path / "a.nii.gz", "--checkpoint", TOP / "weights/mae")
        == 0
    )


@pytest.mark.parametrize(
    "given, why",
    [
        (["zero-shot", "{}", "-o", "{}"], "ends in .csv"),
        (["embed", "{}", "-o", "{}"], "is a scan that is read"),
        (["ground", "{}", "-o", "{}", "--sentence", SAID], "is a file, expected a folder"),
        (["ground", "{}", "-o", "out", "--sentence", " "], "is empty"),
        (
            ["zero-shot", "{}", "-o", "a.csv", "--labels", "Nodule", "{}"],
            "for a label: give the scans before",
        ),
        (["zero-shot", "{}", "-o", "a.csv", "--labels", ""], "is empty"),
        (["embed", "{}", "-o", "."], "is a folder"),
    ],
)
def test_what_cannot_be_meant(given, why, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ASAP_ROOT", str(TOP))
    monkeypatch.chdir(tmp_path)
    write(C.hu, C.affine, tmp_path / "a.nii.gz")
    before = (tmp_path / "a.nii.gz").read_bytes()
    assert main([g.format("a.nii.gz") for g in given]) == 1
    assert (
        why in capsys.readouterr().err
        and [f.name for f in tmp_path.iterdir()] == ["a.nii.gz"]
        and (tmp_path / "a.nii.gz").read_bytes() == before
    )


def test_a_project_without_weights(tmp_path, capsys, monkeypatch):
    write(C.hu, C.affine, tmp_path / "a.nii.gz")
    for f in ("params.yaml", "dvc.yaml"):
        shutil.copy(TOP / f, tmp_path)
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path))
    for command in COMMANDS:
        assert call(command, tmp_path / "out", tmp_path / "a.nii.gz") == 1
        assert (
            "give a folder with --checkpoint" in capsys.readouterr().err
            and not (tmp_path / "out").exists()
        )


def test_words_that_nobody_taught_are_said(tmp_path, capsys):
    write(C.hu, C.affine, tmp_path / "a.nii.gz")
    assert (
        main(
            [
                "zero-shot",
                str(tmp_path / "a.nii.gz"),
                "-o",
                str(tmp_path / "a.csv"),
                "--labels",
                "肺結節",
                "Lung nodule",
                "Lung nodule",
            ]
        )
        == 0
    )
    out = capsys.readouterr()
    assert (
        "the text encoder does not know `肺結節`: the reports" in out.err
        and out.out.count("Lung nodule") == 1
        and pd.read_csv(tmp_path / "a.csv").label.tolist() == ["肺結節", "Lung nodule"]
    )


@pytest.mark.parametrize(
    "command", ["check", "standardize", "organs", "embed", "zero-shot", "ground"]
)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    assert e.value.code == 0 and f"example: asap {command} " in capsys.readouterr().out


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    found, why = real.fetch_scans(load_params().real, tmp_path_factory.mktemp("real"))
    if len(found) < len(real.SCANS):
        pytest.skip(f"the real scans could not be fetched: {'; '.join(why)}")
    return {n: found[n] / s.image for n, s in real.SCANS.items()}


@pytest.mark.parametrize(
    "name, command", [("totalsegmentator_chest", "ground"), ("pyradiomics_lung1", "zero-shot")]
)
def test_real_chests_in_time(scans, name, command, tmp_path):
    """Less than 25 s of one processor from the shell, libraries loaded; their places are checked
    above"""

    def spent():
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    start = spent()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "asap.cli",
            command,
            str(scans[name]),
            *COMMANDS[command](tmp_path / "out"),
        ],
        cwd=TOP,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and spent() - start < 25, (done.stderr, spent() - start)


def test_real_chests_in_both_formats(scans, tmp_path):
    "The CTs as they are published; no label and no place of theirs is claimed"
    paths = [scans[n] for n in ("totalsegmentator_chest", "pyradiomics_lung1", "pyradiomics_lung2")]
    for command in COMMANDS:
        assert call(command, tmp_path / "out", *paths) == 0
    assert len(pd.read_csv(tmp_path / "out/all.csv")) == 3 * 18
    for path in paths:
        v, name = read(path), path.name.split(".")[0]
        region = nib.load(tmp_path / f"out/{name}_1_region.nii.gz")
        assert (
            region.shape == v.hu.shape
            and np.allclose(region.affine, v.affine, atol=1e-3)
            and (tmp_path / f"out/{name}_1.png").stat().st_size > 5e4
        )


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch, capsys):
    "pandas raises an error that has no name of a module"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("asap.cli.load_params", lambda _: pd.read_parquet(tmp_path / "a.parquet"))
    assert main(["params"]) == 1
    assert "params needs pyarrow, which is not installed" in capsys.readouterr().err
