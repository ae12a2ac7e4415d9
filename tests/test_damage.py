"Damaged files: what a check sum or a size tells is refused, what values tell too"

import gzip
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from files import itk, nifti

from asap.data.checks import load_checked
from asap.data.volumes import Source, read
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("damage", 0), (48, 48, 24), (7.0, 7.0, 14.0))


def packed_itk(path):
    sitk.WriteImage(sitk.ReadImage(str(itk(C.hu, C.affine, path))), str(path), True)
    return path


def npz(path, save):
    save(path, hu=C.hu, affine=C.affine)
    return path


PACKED = {  # writes the file; returns it and the file that is damaged
    "nii.gz": lambda d: [nifti(C.hu, C.affine, d / "a.nii.gz")] * 2,
    "nrrd": lambda d: [packed_itk(d / "a.nrrd")] * 2,
    "mha": lambda d: [packed_itk(d / "a.mha")] * 2,
    "mhd": lambda d: [packed_itk(d / "a.mhd"), d / "a.zraw"],
    "npz": lambda d: [npz(d / "a.npz", np.savez_compressed)] * 2,
    "npz, stored": lambda d: [npz(d / "a.npz", np.savez)] * 2,
}


def flip(data, at):
    data[at] ^= 4


def blank(data, at):
    data[at : at + 300] = bytes(300)


def cut(data, at):
    del data[at:]


def lose(data, at):
    del data[at : at + 17]


@pytest.mark.parametrize("damage", [flip, blank, cut, lose], ids=lambda f: f.__name__)
@pytest.mark.parametrize("form", PACKED)
def test_packed_voxels_are_right_or_refused(form, damage, tmp_path):
    path, file = PACKED[form](tmp_path)
    whole = file.read_bytes()
    assert np.array_equal(read(path).hu, C.hu)
    for at in np.random.default_rng(0).integers(600, len(whole) - 20, 8):
        data = bytearray(whole)
        damage(data, int(at))
        file.write_bytes(data)
        try:
            v = read(path)
        except ValueError as e:
            assert str(path) in str(e) or str(file) in str(e)
        else:
            assert np.array_equal(v.hu, C.hu), f"{damage.__name__} at {at}"


@pytest.mark.parametrize("form", ["nii.gz", "nrrd", "mha", "mhd"])
def test_the_check_sum_itself(form, tmp_path):
    "The last byte lies behind the last voxel"
    path, file = PACKED[form](tmp_path)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="truncated or broken"):
        read(path)


def shorter(img):  # a header that says fewer slices than there are
    img.header["dim"][3] = 20


def longer(img):
    img.header["dim"][3] = 40


def bytes_for_shorts(img):
    img.header["datatype"], img.header["bitpix"] = 2, 8


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("edit", [shorter, longer, bytes_for_shorts], ids=lambda f: f.__name__)
def test_a_header_of_another_size(edit, packed, tmp_path):
    img = nib.Nifti1Image(C.hu, C.affine)
    raw = bytearray(img.to_bytes())
    edit(img)
    raw[:348] = img.header.binaryblock
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(ValueError, match="bytes"):
        read(path)


def test_what_packs_otherwise_is_read(tmp_path):
    "Two members of gzip, a gzip stream in a MetaImage, padding behind the stream"
    raw = nib.Nifti1Image(C.hu, C.affine).to_bytes()
    two = gzip.compress(raw[:50000]) + gzip.compress(raw[50000:])
    (tmp_path / "two.nii.gz").write_bytes(two)
    (tmp_path / "padded.nii.gz").write_bytes(gzip.compress(raw) + bytes(512))
    path = packed_itk(tmp_path / "a.mha")
    head, _, data = path.read_bytes().partition(b"LOCAL\n")
    (tmp_path / "gzip.mha").write_bytes(head + b"LOCAL\n" + gzip.compress(zlib.decompress(data)))
    for name in ("two.nii.gz", "padded.nii.gz", "gzip.mha"):
        assert np.array_equal(read(tmp_path / name).hu, C.hu)


@pytest.mark.parametrize("dtype", [">i2", "<i4", "<u2", "<f4", ">f8", "i1"])
@pytest.mark.parametrize("form", ["nii", "nii.gz", "mha", "nrrd"])
def test_types(form, dtype, tmp_path):
    "Every type of voxel, in either byte order, by `read_stored` and as the library reads it"
    hu = (C.hu // 32 if dtype == "i1" else C.hu.clip(0) if "u" in dtype else C.hu).astype(dtype)
    if form.startswith("nii"):
        img = nib.Nifti1Image(hu, C.affine)
        img.header.set_data_dtype(dtype)
        nib.save(img, tmp_path / f"a.{form}")
    else:
        img = sitk.GetImageFromArray(hu.transpose(2, 1, 0).astype(dtype[-2:]))
        sitk.WriteImage(img, str(tmp_path / f"a.{form}"), True)
    v = read(tmp_path / f"a.{form}")
    assert v.hu.dtype == (np.float32 if "f" in dtype else np.int16)
    assert np.array_equal(v.hu, hu.astype(v.hu.dtype))


# ----- holes


def zero_slices(hu):
    hu[:, :, 8:11] = 0


def zero_end(hu):
    hu[:, :, 14:] = 0


def zero_block(hu):
    hu.T.reshape(-1)[20000:20700] = 0


def air_slices(hu):
    hu[:, :, 8:11] = -1024


@pytest.mark.parametrize("hole", [zero_slices, zero_end, zero_block, air_slices])
@pytest.mark.parametrize("form", ["nii.gz", "nrrd", "npz"])
def test_holes(hole, form, tmp_path):
    hu = np.array(C.hu, order="F")
    hole(hu)
    path = tmp_path / f"a.{form}"
    if form == "npz":
        np.savez(path, hu=hu, affine=C.affine)
    else:
        (nifti if form == "nii.gz" else itk)(hu, C.affine, path)
    with pytest.raises(ValueError, match="block of zeros|hold one value"):
        load_checked(path, Source())


def test_ends_of_air_are_a_warning(tmp_path):
    "Resampling leaves them; an incomplete scan too"
    hu = C.hu.copy()
    hu[:, :, 18:] = -1024
    _, found = load_checked(nifti(hu, C.affine, tmp_path / "a.nii.gz"))
    assert any("6 slices at the ends hold one value each" in str(f) for f in found)
