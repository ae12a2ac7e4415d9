"DICOM folders as they are found: which series is read, and where its slices lie"

import numpy as np
import pydicom
import pytest
from files import dicom, itk
from PIL import Image

from asap.cli import find_scans
from asap.data.checks import check_volume, load_checked
from asap.data.series import even_positions, measure_steps
from asap.data.volumes import read
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("series", 0), (48, 48, 24), (7.0, 7.0, 14.0))
HU, AT = C.hu[::-1, ::-1], np.diag([-1, -1, 1, 1.0]) @ C.affine  # LPS, as scanners write


def edit(folder, change):
    "`change(k, dataset)` of each slice upwards; the slice is removed where it returns False"
    found = [(f, pydicom.dcmread(f)) for f in folder.iterdir()]
    found.sort(key=lambda s: s[1].ImagePositionPatient[2])
    for k, (f, d) in enumerate(found):
        if change(k, d) is False:
            f.unlink()
        else:
            d.save_as(f)
    return [f for f, _ in found]


def series(folder, change=None, **tags):
    dicom(HU, AT, folder, **tags)
    if change:
        edit(folder, change)
    return folder


def same_voxels(path):
    return np.array_equal(read(path).ras().hu, C.hu)


# ----- refused, with the numbers


def other_spacing(k, d):
    d.PixelSpacing = [7.0, 7.0] if k < 12 else [8.0, 8.0]


def sideways(k, d):
    if k >= 12:
        d.ImagePositionPatient = [d.ImagePositionPatient[0] + 40, *d.ImagePositionPatient[1:]]


def other_direction(k, d):
    if k >= 12:
        d.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]


def other_size(k, d):
    if k >= 20:
        d.PixelData = d.pixel_array[:40].tobytes()
        d.Rows = 40


def at_origin(k, d):
    d.ImagePositionPatient = [0, 0, 0]


def no_direction(k, d):
    d.ImageOrientationPatient = [0, 0, 0, 0, 0, 0]


def no_intercept(k, d):
    if 5 <= k < 10:
        del d.RescaleIntercept


def no_slope(k, d):
    if k == 0:
        d.RescaleSlope = None


def zero_slope(k, d):
    d.RescaleSlope = 0


def two_studies(k, d):
    if k % 2:
        d.StudyInstanceUID, d.SeriesInstanceUID = "1.9", "1.9.1"


def two_patients(k, d):
    if k % 2:
        d.PatientID, d.SeriesInstanceUID = "bert", "1.9.1"


def projection(k, d):
    d.ImageType = ["DERIVED", "SECONDARY", "AXIAL", "MINIP"]


def palette(k, d):
    d.PhotometricInterpretation = "PALETTE COLOR"


def a_gap(k, d):
    return k not in (9, 10)


REFUSED = {
    other_spacing: "12 slices with (7.0, 7.0); 12 slices with (8.0, 8.0)",
    sideways: "shifted sideways by up to",
    other_direction: "different size or direction",
    other_size: "4 of 48 x 40",
    at_origin: "all 24 slices lie at [0.0, 0.0, 0.0]",
    no_direction: "ImageOrientationPatient [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]",
    no_intercept: "5 of 24 slices have no RescaleIntercept",
    no_slope: "1 of 24 slices have no RescaleSlope",
    zero_slope: "RescaleSlope 0",
    two_studies: "2 examinations or patients in one folder",
    two_patients: "2 examinations or patients in one folder",
    projection: "give the original axial series",
    palette: "PALETTE COLOR, expected one, MONOCHROME2",
    a_gap: "2 slices are missing (1 gap",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_refused(change, tmp_path):
    folder = series(tmp_path / "s", change)
    with pytest.raises(ValueError) as e:
        load_checked(folder)
    assert REFUSED[change] in str(e.value) and str(folder) in str(e.value), str(e.value)


# ----- read, whatever lies beside


def by_turns(k, d):
    e = 0.00049 if k % 2 else 0.00051
    d.ImageOrientationPatient = [1, e, 0, -e, 1, 0]


def at_random(k, d):
    x, y = np.random.default_rng(k).uniform(-8e-4, 8e-4, 2)
    d.ImageOrientationPatient = [1, x, y, -x, 1, 0]


def drifting(k, d):
    e = k * 1e-4
    d.ImageOrientationPatient = [1, 0, e, 0, 1, -e]


@pytest.mark.parametrize("change", [by_turns, at_random, drifting])
def test_directions_that_jitter_are_one_series(change, tmp_path):
    assert same_voxels(series(tmp_path / "s", change))


def more(folder, hu=None, **tags):
    "Another series of more slices in the same folder"
    hu = HU.repeat(2, 2) if hu is None else hu
    dicom(hu, AT @ np.diag([1, 1, 0.5, 1]), folder, series="1.9", number=1, **tags)


BESIDE = {
    "MIP": lambda f: more(f, ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"]),
    "derived": lambda f: more(f, ImageType=["DERIVED", "PRIMARY", "AXIAL"]),
    "average by its description": lambda f: more(f, SeriesDescription="Thorax AVERAGE 10 mm"),
    "MIP by its description": lambda f: more(f, SeriesDescription="Thorax 10 mm MIP"),
    "coronal": lambda f: more(f, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
    "localizer": lambda f: more(f, HU[:, :, :1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    "screenshot": lambda f: more(f, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"),
    "bolus test": lambda f: more(f, ImagePositionPatient=[0, 0, 0]),
    "preview": lambda f: Image.new("L", (9, 9)).save(f / "preview.jpg"),
    "mask": lambda f: itk(C.labels, C.affine, f / "lung_mask.nrrd"),
    "notes": lambda f: (f / "README").write_text("made by hand"),
    "index": lambda f: index(f / "DICOMDIR"),
    "report": lambda f: index(f / "report.dcm"),
}


def index(path):
    "A DICOM file without an image"
    d = pydicom.Dataset()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    d.SOPInstanceUID, d.Modality = "1.8", "SR"
    d.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("what", BESIDE)
def test_the_axial_series_is_the_scan(what, tmp_path, capsys):
    folder = series(tmp_path / "s", number=5)
    BESIDE[what](folder)
    assert find_scans([tmp_path]) == [("s", folder)]
    assert same_voxels(folder) and not check_volume(read(folder))
    said = capsys.readouterr().err
    assert what in ("notes", "index", "report") or "read series 5" in said or "not read" in said


def test_folders_without_a_scan_are_left(tmp_path):
    "A disc: its index and a report at the top, a localizer and some icons in other folders"
    folder = series(tmp_path / "cd/DICOM/SE2")
    index(tmp_path / "cd/DICOMDIR")
    index(tmp_path / "cd/summary.dcm")
    dicom(HU[:, :, :1], AT, tmp_path / "cd/DICOM/SE1", ImageType=["ORIGINAL", "LOCALIZER"])
    (tmp_path / "cd/viewer").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "cd/viewer/icon.png")
    assert [path for _, path in find_scans([tmp_path / "cd"])] == [folder]


def test_a_file_stands_for_its_own_series(tmp_path):
    series(tmp_path, series="1.1", PatientID="anna")
    dicom(HU + 5, AT, tmp_path, series="2.1", PatientID="bert")
    anna, bert = (next(tmp_path.glob(f"{n}.1-*")) for n in (1, 2))
    assert same_voxels(anna)
    assert np.array_equal(read(bert).ras().hu, C.hu + 5)
    with pytest.raises(ValueError, match="give one file of the scan that is meant"):
        read(tmp_path)


# ----- files that cannot be read


def empty(f):
    f.write_bytes(b"")


def decimal_comma(f):
    f.write_bytes(f.read_bytes().replace(b"7.0\\7.0", b"7,0\\7,0"))


def unknown_type(f):
    meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\x00"
    f.write_bytes(
        b"\0" * 128 + b"DICM" + meta + b"\x08\x00\x05\x00ZZ\x00\x00\x05\x00\x00\x00abc\0\0"
    )


def no_pixels(f):
    f.write_bytes(f.read_bytes()[:-500])


@pytest.mark.parametrize("spoil", [empty, decimal_comma, unknown_type, no_pixels])
def test_a_broken_slice_at_the_end_is_named(spoil, tmp_path):
    files = edit(series(tmp_path / "s"), lambda k, d: None)
    spoil(files[-1])
    v, found = load_checked(tmp_path / "s")
    assert files[-1].name in "".join(map(str, found))
    assert np.array_equal(v.ras().hu, C.hu[:, :, :23])


@pytest.mark.parametrize("spoil", [empty, decimal_comma, unknown_type, no_pixels])
def test_broken_slices_inside_are_refused(spoil, tmp_path):
    files = edit(series(tmp_path / "s"), lambda k, d: None)
    for f in files[8:11]:
        spoil(f)
    with pytest.raises(ValueError, match="read|decoded|missing"):
        load_checked(tmp_path / "s")


# ----- steps


STEPS = {  # positions, what they are
    "even": (np.arange(0, 100, 5), "even"),
    "rounded": (np.round(np.arange(40) * 0.6667, 1), "even"),
    "fine above": (np.r_[0:100:5, 100:160:2.5], "uneven"),
    "coarse above": (np.r_[0:100:2.5, 100:160:5], "uneven"),
    "three ranges": (np.r_[0:60:5, 60:100:1.25, 100:160:5], "uneven"),
    "drifting": (np.cumsum(np.linspace(4, 6, 40)), "uneven"),
    "one missing": (np.delete(np.arange(0, 100, 5), 7), "missing"),
    "a block missing": (np.delete(np.arange(0, 100, 5), range(7, 12)), "missing"),
    "twice": (np.sort(np.r_[0:100:5, 20, 25]), "twice"),
    "two passes": (np.sort(np.r_[0:200:5, 152:300:5]), "overlap"),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(name):
    positions, what = STEPS[name]
    s, even = measure_steps(positions), even_positions(positions)
    assert s.sound == (what in ("even", "uneven"))
    assert (even is not None) == (what == "uneven")
    if not s.sound:
        assert getattr(s, what)
    if even is not None:
        assert np.allclose(np.diff(even), even[1] - even[0]) and len(even) < 4 * len(positions)


def test_uneven_slices_lie_at_their_positions(tmp_path):
    "Values that are their height: the lower half every 14 mm, the upper half every 28"
    z = np.arange(40) * 14.0
    hu = np.broadcast_to(z.astype(np.int16), (20, 20, 40)) + 0
    at = np.diag([7.0, 7, 14, 1])
    folder = dicom(hu, at, tmp_path / "s")
    edit(folder, lambda k, d: k < 20 or k % 2 == 0)
    v = read(folder)
    height = v.affine[2, 2] * np.arange(v.hu.shape[2]) + v.affine[2, 3]
    assert np.abs(v.hu[5, 5] - height).max() <= 1


# ----- padding


def ring():
    x = np.arange(48) - 23.5
    return np.hypot(*np.meshgrid(x, x, indexing="ij")) > 23.6


def pad(value, tag=None, limit=None, tag_vr="US"):
    "Stored `value` outside the round field of view"

    def change(k, d):
        stored = d.pixel_array.copy()
        stored[ring().T] = value
        d.PixelData = stored.tobytes()
        if tag is not None:
            d.add_new("PixelPaddingValue", tag_vr, tag)
        if limit is not None:
            d.add_new("PixelPaddingRangeLimit", tag_vr, limit)

    return change


PADDINGS = {
    "unsigned -2000": pad(63536, 63536),
    "signed in the tag": pad(63536, -2000, tag_vr="SS"),
    "no tag": pad(63536),
    "the highest value": pad(65535, 65535),
    "a range": pad(60001, 60000, limit=60005),
    "as bright as bone": pad(3000, 3000),
    "as soft tissue": pad(2041, 2041),
    "dark": pad(0, 0),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_is_air(name, tmp_path):
    v, _ = load_checked(series(tmp_path / "s", PADDINGS[name]))
    hu = v.hu[:, :, 5]
    assert hu[ring()].max() <= -900
    assert np.array_equal(hu[~ring()], HU[:, :, 5][~ring()]), "values inside were changed"
