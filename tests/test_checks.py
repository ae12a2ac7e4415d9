"Each check on files: one that must be refused, and one alike that must pass"

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from files import dicom, itk, nifti, pictures
from PIL import Image

from asap.cli import main
from asap.data.checks import check_mask, load_checked
from asap.data.volumes import Source
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("checks", 11), (96, 96, 48), (3.5, 3.5, 7.0), present=["Lung nodule"])
HU, AT = C.hu[::-1, ::-1], np.diag([-1, -1, 1, 1.0]) @ C.affine  # LPS, as scanners write


def float_with(value):  # one voxel of a float volume
    hu = C.hu.astype(np.float32)
    hu[40, 40, 20] = value
    return hu


def headless(to):  # NIfTI without qform and sform
    img = nib.Nifti1Image(C.hu, None)
    img.header.set_zooms(C.spacing)
    img.header["qform_code"] = img.header["sform_code"] = 0
    nib.save(img, to)
    return to


def head():  # a ball of brain in air
    x = np.stack(
        np.meshgrid(
            *[(np.arange(n) - (n - 1) / 2) * m for n, m in zip(C.hu.shape, C.spacing)],
            indexing="ij",
        )
    )
    return np.where((x**2).sum(0) < 90**2, 40, -1000).astype(np.int16) + np.random.default_rng(
        0
    ).integers(-9, 9, C.hu.shape).astype(np.int16)


def rgb_nifti(to):
    nib.save(
        nib.Nifti1Image(np.zeros((20, 20, 20), [("R", "u1"), ("G", "u1"), ("B", "u1")]), C.affine),
        to,
    )
    return to


def rgb_mha(to):
    sitk.WriteImage(
        sitk.Compose(*[sitk.GetImageFromArray(np.zeros((20, 20, 20), np.uint8))] * 3), str(to)
    )
    return to


def color(folder):
    pictures(C.hu, folder)
    v = np.zeros((96, 96, 3), np.uint8)
    v[..., 0] = 200
    Image.fromarray(v).save(folder / "slice_7.png")
    return folder


def grey_rgb(folder):  # three equal channels are grey
    pictures(C.hu, folder)
    for f in folder.iterdir():
        Image.fromarray(np.stack([np.asarray(Image.open(f))] * 3, -1)).save(f)
    return folder


WINDOW = Source(("window", -1000, 1000), (3.5, 3.5, 7), "RAS")
MRI = (
    np.abs(C.hu.astype(float)) / 3 + 400 + np.random.default_rng(0).integers(0, 8, C.hu.shape)
).astype(np.int16)
REFUSED = {  # what: (writes the file, declared, words of the message)
    "nan": (
        lambda d: nifti(float_with(np.nan), C.affine, d / "a.nii.gz"),
        Source(),
        "1 of 442368 values are NaN",
    ),
    "infinite": (
        lambda d: nifti(float_with(np.inf), C.affine, d / "a.nii"),
        Source(),
        "NaN or infinite",
    ),
    "2-D": (
        lambda d: nifti(C.hu[:, :, 20], C.affine, d / "a.nii.gz"),
        Source(),
        "shape (96, 96), expected three axes",
    ),
    "4-D": (
        lambda d: nifti(np.stack([C.hu] * 2, 3), C.affine, d / "a.nii.gz"),
        Source(),
        "shape (96, 96, 48, 2), expected three axes",
    ),
    "RGB NIfTI": (
        lambda d: rgb_nifti(d / "a.nii.gz"),
        Source(),
        "RGB voxels, expected one value per voxel",
    ),
    "RGB MetaImage": (lambda d: rgb_mha(d / "a.mha"), Source(), "3 values per voxel"),
    "color pictures": (lambda d: color(d / "p"), WINDOW, "a color picture, expected gray"),
    "few slices": (
        lambda d: nifti(C.hu[:, :, :5], C.affine, d / "a.nii.gz"),
        Source(),
        "at least 8 voxels",
    ),
    "HU twice": (lambda d: nifti(C.hu - 1024, C.affine, d / "a.nii.gz"), Source(), "applied twice"),
    "HU never": (
        lambda d: nifti(C.hu + 1024, C.affine, d / "a.nii.gz"),
        Source(),
        "the intercept (-1024) was never applied",
    ),
    "8-bit": (
        lambda d: nifti(np.clip(C.hu / 8 + 125, 0, 255).astype(np.uint8), C.affine, d / "a.nii.gz"),
        Source(),
        "8-bit pictures of a display window",
    ),
    "a mask": (lambda d: nifti(C.labels, C.affine, d / "a.nii.gz"), Source(), "this is a mask"),
    "undeclared pictures": (lambda d: pictures(C.hu, d / "p"), Source(), "declare the window"),
    "MR in a DICOM": (
        lambda d: dicom(HU, AT, d / "s", Modality="MR"),
        Source(),
        "modality MR; expected CT",
    ),
    "MR": (lambda d: nifti(MRI, C.affine, d / "a.nii.gz"), Source(), "this is no CT"),
    "no spacing, NIfTI": (
        lambda d: nifti(C.hu, np.eye(4), d / "a.nii.gz"),
        Source(),
        "gives no spacing",
    ),
    "no spacing, NPZ": (
        lambda d: np.savez(d / "a.npz", ct=C.hu) or d / "a.npz",
        Source(),
        "gives no spacing",
    ),
    "no spacing, NRRD": (
        lambda d: sitk.WriteImage(sitk.GetImageFromArray(C.hu), str(d / "a.nrrd")) or d / "a.nrrd",
        Source(),
        "gives no spacing",
    ),
    "no spacing, DICOM": (
        lambda d: dicom(HU, AT, d / "s", PixelSpacing=None),
        Source(),
        "gives no spacing",
    ),
    "metres": (
        lambda d: nifti(C.hu, C.affine @ np.diag([0.001, 0.001, 0.001, 1]), d / "a.nii.gz"),
        Source(),
        "no believable spacing",
    ),
    "tiny": (
        lambda d: nifti(C.hu, C.affine @ np.diag([0.2, 0.2, 0.2, 1]), d / "a.nii.gz"),
        Source(),
        "does not fit the number of voxels",
    ),
    "missing slices": (
        lambda d: dicom(HU, AT, d / "s", skip=(20, 21)),
        Source(),
        "2 slices are missing (1 gap",
    ),
    "slices twice": (
        lambda d: dicom(HU, AT, d / "s", twice=(10, 11, 12)),
        Source(),
        "3 positions occur twice",
    ),
    "slices repeated": (
        lambda d: nifti(np.repeat(C.hu[:, :, ::2], 2, 2), C.affine, d / "a.nii.gz"),
        Source(),
        "24 slices are the same as their neighbor",
    ),
    "front is back": (
        lambda d: nifti(C.hu, C.affine @ np.diag([1, -1, 1, 1]), d / "a.nii.gz"),
        Source(),
        "front and back are swapped",
    ),
    "head is feet": (
        lambda d: nifti(C.hu, C.affine @ np.diag([1, 1, -1, 1]), d / "a.nii.gz"),
        Source(),
        "head and feet are swapped",
    ),
    "no orientation": (lambda d: headless(d / "a.nii.gz"), Source(), "neither qform nor sform"),
    "no chest": (lambda d: nifti(head(), C.affine, d / "a.nii.gz"), Source(), "this is no chest"),
}
PASSES = {  # what: (writes the file, declared)
    "float": (lambda d: nifti(float_with(-1000.0), C.affine, d / "a.nii.gz"), Source()),
    "a fourth axis of one": (lambda d: nifti(C.hu[..., None], C.affine, d / "a.nii.gz"), Source()),
    "grey pictures in RGB": (lambda d: grey_rgb(d / "p"), WINDOW),
    "padding outside a round field of view": (
        lambda d: nifti(
            np.where(C.hu <= -1020, -3024, C.hu).astype(np.int16), C.affine, d / "a.nii.gz"
        ),
        Source(),
    ),
    "slope and intercept in the header": (lambda d: scaled(d / "a.nii.gz"), Source()),
    "declared pictures": (lambda d: pictures(C.hu, d / "p"), WINDOW),
    "declared MR": (lambda d: nifti(MRI, C.affine, d / "a.nii.gz"), Source("mr")),
    "a CT series": (lambda d: dicom(HU, AT, d / "s"), Source()),
    "a compressed series": (lambda d: dicom(HU, AT, d / "s", rle=True), Source()),
    "declared spacing": (
        lambda d: np.savez(d / "a.npz", ct=C.hu) or d / "a.npz",
        Source(spacing=C.spacing, axes="RAS"),
    ),
    "1 mm with an origin": (
        lambda d: nifti(
            np.kron(C.hu[::2, ::2, ::2], np.ones((6, 6, 12), np.int16))[:, :, :200]
            + np.random.default_rng(0).integers(-3, 3, (288, 288, 200)).astype(np.int16),
            placed1(),
            d / "a.nii",
        ),
        Source(),
    ),
    "LPS": (
        lambda d: nifti(C.hu[::-1, ::-1], C.affine @ np.diag([-1, -1, 1, 1]), d / "a.nii.gz"),
        Source(),
    ),
    "sagittal order": (
        lambda d: nifti(
            np.ascontiguousarray(C.hu.transpose(1, 2, 0)), C.affine[:, [1, 2, 0, 3]], d / "a.nii.gz"
        ),
        Source(),
    ),
    "oblique": (lambda d: itk(C.hu, turned() @ C.affine, d / "a.nrrd"), Source()),
    "qform alone": (lambda d: qform(d / "a.nii.gz"), Source()),
}


def placed1():  # a volume of 1 mm whose origin is not 0
    a = np.eye(4)
    a[:3, 3] = (-150, -140, -100)
    return a


def turned():
    t = np.eye(4)
    t[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    return t


def scaled(to):  # stored as unsigned numbers, with the intercept in the NIfTI header
    img = nib.Nifti1Image((C.hu.astype(np.int32) + 1024).astype(np.uint16), C.affine)
    img.header.set_slope_inter(1, -1024)
    nib.save(img, to)
    raw = nib.load(to).dataobj
    assert raw.inter == -1024 and raw.get_unscaled().min() >= 0
    return to


def qform(to):
    img = nib.Nifti1Image(C.hu, C.affine)
    img.set_sform(None, 0)
    img.set_qform(C.affine, 1)
    nib.save(img, to)
    return to


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, tmp_path):
    make, source, words = REFUSED[what]
    path = make(tmp_path)
    with pytest.raises(ValueError) as e:
        load_checked(path, source)
    assert words in str(e.value) and (path.name in str(e.value) or path.is_dir()), str(e.value)


@pytest.mark.parametrize("what", PASSES)
def test_passes(what, tmp_path):
    make, source = PASSES[what]
    v, warnings = load_checked(make(tmp_path), source)
    assert v.hu.ndim == 3 and not [w for w in warnings if w.level == "error"]


def test_masks():
    """A mask of the same grid, of a part of it, with its axes turned; one whose header was lost,
    and one of another scan"""
    v = read_phantom()
    check_mask(C.labels.shape, C.affine, v)
    part = C.affine.copy()
    part[:3, 3] = (C.affine @ [10, 10, 5, 1])[:3]
    check_mask((30, 30, 20), part, v)
    for shape, affine, words in (
        (C.labels.shape, np.eye(4), "but another affine"),
        (C.labels.shape, part, "but another affine"),
        ((90, 90, 40), part, "sticks out"),
        ((96, 96), C.affine, "expected three axes"),
    ):
        with pytest.raises(ValueError, match=words):
            check_mask(shape, affine, v, "mask.nii.gz")


def read_phantom():
    from asap.data.volumes import Volume

    return Volume(C.hu, C.affine)


def test_the_command(tmp_path, capsys):
    "One line a scan, refused ones by name, and an exit code that says so"
    nifti(C.hu, C.affine, tmp_path / "in/good.nii.gz")
    nifti(C.hu - 1024, C.affine, tmp_path / "in/sub/twice.nii.gz")
    dicom(HU, AT, tmp_path / "in/series")
    assert main(["check", str(tmp_path / "in/good.nii.gz"), str(tmp_path / "in/series")]) == 0
    assert main(["check", str(tmp_path / "in")]) == 1
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "twice" in line or "good" in line or "series" in line
    ]
    assert (
        sum(line.startswith("REFUSED  twice: ") for line in lines) == 1
        and sum(
            line.startswith("ok       good: NIfTI 96x96x48, 3.5x3.5x7 mm, RAS") for line in lines
        )
        == 2
    )
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    with pytest.raises(SystemExit) as e:
        main(["check"])
    assert e.value.code == 2
