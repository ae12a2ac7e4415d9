"Volumes written in every format that is read, for the tests"

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

LPS = np.diag([-1.0, -1, 1, 1])


def nifti(hu, affine, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu, affine), path)
    return path


def itk(hu, affine, path):
    a, s = LPS @ affine, np.sqrt((affine[:3, :3] ** 2).sum(0))
    img = sitk.GetImageFromArray(np.ascontiguousarray(hu.transpose(2, 1, 0)))
    img.SetSpacing(s.tolist())
    img.SetOrigin(a[:3, 3].tolist())
    img.SetDirection((a[:3, :3] / s).ravel().tolist())
    sitk.WriteImage(img, str(path))
    return path


def npz(hu, affine, path):
    np.savez(path, hu=hu, affine=affine)
    return path


def dicom(hu, affine, folder, series="1.2.3", number=1, skip=(), twice=(), rle=False, **tags):
    "A series, one file a slice, in an order that is not that of their places"
    folder.mkdir(parents=True, exist_ok=True)
    a, s = LPS @ affine, np.sqrt((affine[:3, :3] ** 2).sum(0))
    for n, k in enumerate([k for k in range(hu.shape[2]) if k not in skip] + list(twice)):
        d = Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.MediaStorageSOPClassUID, d.file_meta.TransferSyntaxUID = (
            CTImageStorage,
            ExplicitVRLittleEndian,
        )
        d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID, d.StudyInstanceUID = (
            CTImageStorage,
            f"{series}.{n + 1}",
            series,
            "1.2",
        )
        d.Modality, d.SeriesNumber, d.InstanceNumber, d.PatientName, d.ImageType = (
            "CT",
            number,
            (n * 7) % 101,
            "Nobody",
            ["ORIGINAL", "PRIMARY", "AXIAL"],
        )
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = (
            hu.shape[1],
            hu.shape[0],
            1,
            "MONOCHROME2",
        )
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.RescaleSlope, d.RescaleIntercept, d.PixelSpacing = 1, -2000, [float(s[1]), float(s[0])]
        d.ImageOrientationPatient = [float(v) for v in np.r_[a[:3, 0] / s[0], a[:3, 1] / s[1]]]
        d.ImagePositionPatient = [float(v) for v in a[:3, 3] + k * a[:3, 2]]
        d.PixelData = np.ascontiguousarray(
            (hu[:, :, k].T.astype(np.int32) + 2000).astype(np.uint16)
        ).tobytes()
        for name, value in tags.items():
            if value is None:
                delattr(d, name)
            else:
                setattr(d, name, value)
        if rle:
            d.compress(RLELossless)
        d.save_as(folder / f"{series}-{(n * 31) % 997:03d}-{n}.dcm", enforce_file_format=True)
    return folder


def pictures(hu, folder, lo=-1000, hi=1000):
    "8-bit slices of a window, numbered without leading zeros"
    folder.mkdir(parents=True, exist_ok=True)
    v = np.rint(np.clip((hu.astype(float) - lo) / (hi - lo), 0, 1) * 255).astype(np.uint8)
    for k in range(hu.shape[2]):
        Image.fromarray(v[:, :, k].T).save(folder / f"slice_{k}.png")
    return folder


def write(hu, affine, folder: Path, form: str):
    "One volume in one format; returns what to read"
    folder.mkdir(parents=True, exist_ok=True)
    if form in ("nii", "nii.gz"):
        return nifti(hu, affine, folder / f"scan.{form}")
    if form in ("nrrd", "mha", "mhd"):
        return itk(hu, affine, folder / f"scan.{form}")
    if form == "npz":
        return npz(hu, affine, folder / "scan.npz")
    if form in ("dicom", "dicom-rle"):
        return dicom(hu, affine, folder / "series", rle=form == "dicom-rle")
    if form == "pictures":
        return pictures(hu, folder / "slices")
    raise ValueError(form)


FORMS = ["nii", "nii.gz", "nrrd", "mha", "mhd", "npz", "dicom", "dicom-rle", "pictures"]
