"Where a voxel lies: transforms that contradict each other, span no volume, or say nothing"

import sys

import nibabel as nib
import numpy as np
import pytest
from files import nifti

from asap.cli import main
from asap.data.checks import load_checked
from asap.data.volumes import Source, open_nifti, read
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("places", 0), (48, 48, 24), (7.0, 7.0, 14.0))
UNIT = np.diag([-1.0, -1, 1, 1])


def header(path, edit, affine=C.affine):
    "A NIfTI with an edited raw header"
    nifti(C.hu, affine, path)
    with open(path, "rb") as f:
        h = nib.Nifti1Header.from_fileobj(f)
    raw = bytearray(path.read_bytes())
    edit(h)
    raw[:348] = h.binaryblock
    path.write_bytes(raw)
    return path


def forms(path, sform, qform, codes=(1, 1), zooms=None):
    def edit(h):
        h.set_sform(sform, codes[0])
        h.set_qform(qform, codes[1])
        if zooms:
            h["pixdim"][1:4] = zooms

    return header(path, edit)


# ----- no volume


def sform_of(value, rows=("srow_x", "srow_y", "srow_z"), qform=0):
    def edit(h):
        for row in rows:
            h[row] = value
        h["sform_code"], h["qform_code"] = 1, qform

    return edit


def two_columns_alike(h):
    h["srow_y"] = h["srow_x"]


BROKEN = {
    "zeros": sform_of(0),
    "nan": sform_of(np.nan, ["srow_x"]),
    "infinite": sform_of(np.inf, ["srow_z"]),
    "one row of zeros": sform_of(0, ["srow_y"]),
    "two rows alike": two_columns_alike,
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_volume_is_refused(name, tmp_path, capsys):
    "By name, and the scan after it is looked at"
    header(tmp_path / "a.nii", BROKEN[name])
    nifti(C.hu, C.affine, tmp_path / "b.nii.gz")
    assert main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "REFUSED  a: " in out and "spans no volume" in out and "ok       b: " in out


@pytest.mark.parametrize("value", [0, np.nan])
def test_a_sound_qform_beside_it_is_used(value, tmp_path):
    path = forms(tmp_path / "a.nii", C.affine, C.affine)
    raw, h = bytearray(path.read_bytes()), open_nifti(path).header.copy()
    h["srow_x"] = h["srow_y"] = h["srow_z"] = value
    h["vox_offset"] = 352
    raw[:348] = h.binaryblock
    path.write_bytes(raw)
    v, found = load_checked(path)
    assert np.allclose(v.affine, C.affine, atol=1e-3)
    assert "the qform was used" in str(found[0])


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_an_archive_that_spans_no_volume(affine, tmp_path):
    np.savez(tmp_path / "a.npz", hu=C.hu, affine=affine)
    with pytest.raises(ValueError, match="spans no volume|has shape"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "line", ["TransformMatrix = 0 0 0 0 0 0 0 0 0\n", "TransformMatrix = 1 1 0 0 0 0 0 0 1\n"]
)
def test_a_metaimage_that_spans_no_volume(line, tmp_path):
    with pytest.raises(ValueError, match="spans no volume"):
        read(meta(tmp_path / "a.mha", line + "ElementSpacing = 7 7 14\n"))


# ----- two transforms


TILTED = np.eye(4)
TILTED[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
MOVED = np.eye(4)
MOVED[:3, 3] = (0, 0, 30)


@pytest.mark.parametrize("q", [np.diag([-1, 1, 1, 1.0]), np.diag([-1, -1, 1, 1.0]), TILTED, MOVED])
def test_contradictions_are_said(q, tmp_path):
    v, found = load_checked(forms(tmp_path / "a.nii", C.affine, q @ C.affine))
    assert np.allclose(v.affine, C.affine, atol=1e-3)
    assert "sform" in str(found[0]) and "qform" in str(found[0]) and "differ" in str(found[0])


def test_rounding_is_no_contradiction(tmp_path):
    near = C.affine + np.random.default_rng(0).normal(0, 1e-3, (4, 4)) * [[1], [1], [1], [0]]
    _, found = load_checked(forms(tmp_path / "a.nii", C.affine, near))
    assert not found


@pytest.mark.parametrize("codes", [(2, 1), (1, 0), (4, 1)])
def test_a_unit_sform_beside_the_true_spacing(codes, tmp_path):
    "In the image and in what reads its header alone, such as masks"
    lps = C.affine @ np.diag([-1, -1, 1, 1])
    path = forms(tmp_path / "a.nii", UNIT, lps, codes, zooms=C.spacing)
    v, img = read(path, Source("mr", chest=False)), open_nifti(path)
    assert np.allclose(v.spacing, C.spacing) and np.allclose(img.affine, v.affine)
    assert v.axes == "LPS" and "pixdim was used" in v.facts["notes"][0]["do"]


def test_a_volume_of_one_millimetre_stays(tmp_path):
    affine = np.eye(4)
    affine[:3, 3] = (-24, -24, -12)
    v = read(forms(tmp_path / "a.nii", affine, affine))
    assert np.allclose(v.spacing, 1) and not v.facts["notes"]


# ----- axes that the file does not say


def meta(path, lines):
    head = "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
    size = f"DimSize = {' '.join(map(str, C.hu.shape))}\n"
    tail = "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    data = C.hu.astype("<i2").tobytes(order="F")
    path.write_bytes((head + lines + size + tail).encode() + data)
    return path


def nrrd(path, lines):
    sizes = " ".join(map(str, C.hu.shape))
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\n{lines}"
    data = C.hu.astype("<i2").tobytes(order="F")
    path.write_bytes((head + "endian: little\nencoding: raw\n\n").encode() + data)
    return path


DIRECTIONS = "space directions: (7,0,0) (0,7,0) (0,0,14)\n"
UNTOLD = {
    "NRRD, spacings": lambda d: nrrd(d / "a.nrrd", "spacings: 7 7 14\n"),
    "NRRD, directions": lambda d: nrrd(d / "a.nrrd", "space dimension: 3\n" + DIRECTIONS),
    "NRRD, a scanner's": lambda d: nrrd(d / "a.nrrd", "space: scanner-xyz\n" + DIRECTIONS),
    "MetaImage": lambda d: meta(d / "a.mha", "ElementSpacing = 7 7 14\n"),
    "NPZ": lambda d: np.savez(d / "a.npz", hu=C.hu, spacing=C.spacing) or d / "a.npz",
}


@pytest.mark.parametrize("what", UNTOLD)
def test_untold_axes_are_a_warning_or_declared(what, tmp_path):
    path = UNTOLD[what](tmp_path)
    v = read(path)
    assert v.axes == "LPS" and "LPS was assumed" in v.facts["notes"][0]["found"]
    v, found = load_checked(path, Source(axes="RAS"))
    assert (v.axes, found) == ("RAS", []) and np.allclose(v.spacing, C.spacing)


def test_an_identity_says_nothing_about_axes(tmp_path):
    path = nifti(C.hu, np.eye(4), tmp_path / "a.nii.gz")
    v = read(path, Source(spacing=C.spacing))
    assert v.axes == "RAS" and "RAS was assumed" in v.facts["notes"][0]["found"]
    v, found = load_checked(path, Source(spacing=C.spacing, axes="RAS"))
    assert v.axes == "RAS" and not found
    assert read(path, Source(spacing=C.spacing, axes="LPS")).axes == "LPS"


def test_axes_of_a_nifti_without_transforms_can_be_declared(tmp_path):
    path = header(tmp_path / "a.nii", lambda h: h.set_sform(None, 0))
    with pytest.raises(ValueError, match="--axes"):
        load_checked(path)
    v, _ = load_checked(path, Source(axes="RAS"))
    assert v.axes == "RAS" and np.allclose(v.spacing, C.spacing)


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS", "left-posterior-superior"])
def test_told_axes_are_silent(space, tmp_path):
    v = read(nrrd(tmp_path / "a.nrrd", f"space: {space}\n{DIRECTIONS}"))
    assert v.axes == ("LPS" if "left" in space else "RAS") and not v.facts["notes"]


PLAIN_NRRD = {
    "LAS": "space: LAS\nspace directions: (7,0,0) (0,7,0) (0,0,14)\nspace origin: (1,-2,3)\n",
    "RAS, turned": "space: RAS\nspace directions: (0,-7,0) (7,0,0) (0,0.5,14)\n",
    "LPS": "space: left-posterior-superior\nkinds: domain domain domain\n" + DIRECTIONS,
    "no directions": "spacings: 7 7 14\n",
    "a scanner's": "space: scanner-xyz\n" + DIRECTIONS,
}


@pytest.mark.parametrize("what", PLAIN_NRRD)
def test_an_nrrd_is_the_same_without_simpleitk(what, tmp_path, monkeypatch):
    path = nrrd(tmp_path / "a.nrrd", PLAIN_NRRD[what])
    v = read(path)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    w = read(path)
    assert np.allclose(w.affine, v.affine, atol=1e-6) and w.facts == v.facts
    assert w.hu.dtype == v.hu.dtype and np.array_equal(w.hu, v.hu)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("endian: little", "endian: little\nbyte skip: 2", "formats"),
        ("spacings: 7 7 14", "kinds: vector domain domain", "formats"),
        ("type: short", "type: block", "formats"),
        ("spacings: 7 7 14", "spacings: 7 seven 14", "truncated or broken"),
        ("type: short\n", "", "truncated or broken"),
        ("spacings: 7 7 14", "spacings: 7 0 14", "spans no volume"),
    ],
)
def test_other_nrrds_are_refused_without_simpleitk(old, new, message, tmp_path, monkeypatch):
    path = nrrd(tmp_path / "a.nrrd", "spacings: 7 7 14\n")
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode(), 1))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ValueError, match=message):
        read(path)


# ----- names


@pytest.mark.parametrize("name", ["Scan.Nii", "scan.NII", "scan.Nii.Gz", "SCAN.NII.GZ"])
def test_suffixes_of_any_case(name, tmp_path):
    plain = nifti(C.hu, C.affine, tmp_path / f"b{'.nii.gz' if 'z' in name.lower() else '.nii'}")
    plain.rename(tmp_path / name)
    assert np.array_equal(read(tmp_path / name).hu, C.hu)


@pytest.mark.parametrize("name", ["scan.MHA", "scan.Mha"])
def test_metaimages_of_any_case(name, tmp_path):
    path = meta(tmp_path / name, "TransformMatrix = 1 0 0 0 1 0 0 0 1\nElementSpacing = 7 7 14\n")
    assert np.array_equal(read(path).hu, C.hu)
