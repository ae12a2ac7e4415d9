"Reading and checking takes at most 3 bytes a voxel above the volume's own array"

import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from files import dicom, nifti

from asap.data.checks import check_volume
from asap.data.volumes import read, standardize
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("memory", 0), (48, 48, 24), (7.0, 7.0, 14.0))
NOISE = np.random.default_rng(0).integers(-9, 9, (192, 192, 96), np.int16)
HU = np.kron(C.hu, np.ones((4, 4, 4), np.int16)) + NOISE
AFFINE = C.affine @ np.diag([0.25, 0.25, 0.25, 1])
FIXED = 12e6  # bytes, whatever the size of the volume


def with_intercept(path, slope=1.0):
    img = nib.Nifti1Image((HU.astype(np.int32) + 1100).clip(0).astype(np.uint16), AFFINE)
    img.header.set_slope_inter(slope, -1100 * slope)
    nib.save(img, path)
    return path


def packed(path, dtype):
    sitk.WriteImage(sitk.GetImageFromArray(HU.transpose(2, 1, 0).astype(dtype)), str(path), True)
    return path


def archive(path):
    np.savez_compressed(path, hu=HU, affine=AFFINE)
    return path


FILES = {
    "intercept": lambda d: with_intercept(d / "a.nii"),
    "intercept, packed": lambda d: with_intercept(d / "a.nii.gz"),
    "slope": lambda d: with_intercept(d / "a.nii.gz", 1.25),
    "double": lambda d: nifti(HU.astype(np.float64), AFFINE, d / "a.nii.gz"),
    "MetaImage": lambda d: packed(d / "a.mha", np.int32),
    "NRRD": lambda d: packed(d / "a.nrrd", np.float64),
    "NPZ": lambda d: archive(d / "a.npz"),
    "DICOM": lambda d: dicom(HU, AFFINE, d / "s"),
}


def peak(f, *args):
    "What a call returns, and the bytes it had at most"
    tracemalloc.start()
    out = f(*args)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return out, most


@pytest.mark.parametrize("what", FILES)
def test_reading_and_checking(what, tmp_path):
    path = FILES[what](tmp_path)

    def look():
        v = read(path)
        return v, check_volume(v)

    (v, _), most = peak(look)
    assert most - FIXED < v.hu.nbytes + 3 * v.hu.size, f"{most / v.hu.size:.1f} bytes a voxel"


@pytest.mark.parametrize("turn", [0, 0.1])
def test_the_standard_volume(turn, tmp_path):
    "To a grid as fine as the scan's: its own 2 bytes, and 3 more at most"
    t = np.eye(4)
    t[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    v = read(nifti(HU, t @ AFFINE, tmp_path / "a.nii"))
    s, most = peak(standardize, v, v.spacing)
    assert turn or most - FIXED < s.hu.nbytes + 3 * s.hu.size, f"{most / s.hu.size:.1f}"
