"""DICOM SEG and color tables: read back on the slices of the series, the masks are those of the
NIfTI files; what has no slices or no tags is refused"""

import json
import random
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest

from asap.anatomy import segmenter
from asap.anatomy.segment import MapSource, OrganPrediction
from asap.cli import main
from asap.data.cohorts.own import write_dicom
from asap.data.volumes import RAS_TO_LPS, read
from asap.inference import segments
from asap.inference.api import map_groups
from asap.inference.segments import organ_segments, sentence_segments, write_dicom_seg
from asap.phantom.abnormalities import synthesize_chest

pytest.importorskip("highdicom", reason="highdicom is not installed: pip install highdicom")
SAID = ["There is pleural effusion.", "There is consolidation in the left lower lobe."]
TURN = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def write_series(folder, affine, hu, reverse=False):
    "A series with the tags of a scanner, its files in no order"
    write_dicom(hu, affine, folder, "seg", str(folder.name))
    files = sorted(folder.iterdir())
    names = [f"IM{i}" for i in range(len(files))]
    random.Random(1).shuffle(names)
    for f, name in zip(files, names):
        d = pydicom.dcmread(f)
        d.FrameOfReferenceUID = "2.25.77"
        if reverse:
            d.InstanceNumber = len(files) - int(d.InstanceNumber)
        d.save_as(folder / name, enforce_file_format=True)
        f.unlink()
    return folder


@pytest.fixture(scope="module", params=["axial", "oblique", "feet first"])
def series(request, tmp_path_factory):
    c = synthesize_chest(("seg", 0), (48, 40, 24), (7.0, 7.0, 14.0), only="Consolidation")
    affine, hu = c.affine @ np.diag([-1, -1, 1, 1]), c.hu
    if request.param == "oblique":
        affine = TURN @ affine
    if request.param == "feet first":
        hu = np.ascontiguousarray(hu[:, :, ::-1])
        affine = affine @ np.diag([1, 1, -1, 1])
    folder = tmp_path_factory.mktemp("seg") / "series"
    return write_series(folder, affine, hu, request.param == "feet first")


def read_back(path, series) -> tuple[np.ndarray, pydicom.Dataset]:
    "Masks (S,W,H,D) on the grid of the volume, by the slices that the frames refer to"
    seg, v = pydicom.dcmread(path), read(series)
    slices = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, series.iterdir())}
    out = np.zeros((len(seg.SegmentSequence), *v.hu.shape), bool)
    place = np.linalg.inv(RAS_TO_LPS @ v.affine)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for image, frame in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        assert position == slices[source.ReferencedSOPInstanceUID].ImagePositionPatient
        i, j, k = (place @ [*map(float, position), 1])[:3]
        np.testing.assert_allclose([i, j, k - round(k)], 0, atol=1e-3)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        out[number - 1, :, :, round(k)] = image.T > 0
    shared = seg.SharedFunctionalGroupsSequence[0]
    any_slice = next(iter(slices.values()))
    assert shared.PixelMeasuresSequence[0].PixelSpacing == any_slice.PixelSpacing
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    assert orientation == any_slice.ImageOrientationPatient
    return out, seg


def thirds(v):
    "A stand-in for a segmenter: three organs in slabs along each slice, one of them oblique"
    i, j, k = np.indices(v.hu.shape)
    return OrganPrediction(((i > 8) * (1 + (i + j + k) // 12 % 8)).astype(np.uint8), "slabs")


def test_ground_writes_what_the_nifti_masks_hold(series, tmp_path):
    said = [x for s in SAID for x in ("--sentence", s)]
    assert main(["ground", str(series), "-o", str(tmp_path), "--seg", *said]) == 0
    masks, seg = read_back(tmp_path / "series_regions.seg.dcm", series)
    for i in range(len(SAID)):
        want = np.asanyarray(nib.load(tmp_path / f"series_{i + 1}_region.nii.gz").dataobj)
        assert want.any()
        np.testing.assert_array_equal(masks[i], want > 0)
    assert [s.SegmentLabel for s in seg.SegmentSequence] == SAID
    assert seg.SegmentationType == "BINARY" and seg.Modality == "SEG"
    source = pydicom.dcmread(next(series.iterdir()))
    for tag in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[tag].value == source[tag].value
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID


def test_organs_writes_what_the_nifti_mask_holds(series, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segmenter, "choose_source", lambda *a: MapSource("slabs", thirds, {}))
    args = ["organs", str(series), "-o", str(tmp_path), "--seg", "--json"]
    assert main(args) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert str(tmp_path / "series_organs.seg.dcm") in files
    masks, seg = read_back(tmp_path / "series_organs.seg.dcm", series)
    want = thirds(read(series)).organs
    np.testing.assert_array_equal((masks * np.arange(1, 9)[:, None, None, None]).sum(0), want)
    assert [s.SegmentLabel for s in seg.SegmentSequence] == list(map_groups())


def test_codes_are_those_of_snomed(series, tmp_path):
    v, groups = read(series), map_groups()
    path = write_dicom_seg(thirds(v).organs, organ_segments(groups), v, tmp_path / "x.dcm", "x")
    found = {}
    for s in pydicom.dcmread(path).SegmentSequence:
        assert s.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
        (kind,) = s.SegmentedPropertyTypeCodeSequence
        assert kind.CodingSchemeDesignator == "SCT" and s.SegmentAlgorithmType == "AUTOMATIC"
        side = kind.get("SegmentedPropertyTypeModifierCodeSequence", [])
        regions = s.get("AnatomicRegionSequence", [])
        found[s.SegmentLabel] = [kind.CodeValue, *(x.CodeValue for x in (*side, *regions))]
    assert found == {
        "left upper lobe": ["45653009", "7771000"],
        "left lower lobe": ["90572001", "7771000"],
        "right upper lobe": ["45653009", "24028007"],
        "right middle lobe": ["72481006"],
        "right lower lobe": ["90572001", "24028007"],
        "heart": ["80891009"],
        "aorta": ["15825003"],
        "airway and oesophagus": ["91723000", "44567001", "32849002"],
    }


def test_every_class_of_the_groups_has_a_code():
    used = {c for classes in map_groups().values() for c in classes}
    assert used == set(segments.CODES)


def test_colors_are_those_of_the_tables(series, tmp_path):
    from highdicom.color import CIELabColor

    v, chosen = read(series), sentence_segments(SAID)
    masks = np.ones((2, *v.hu.shape), bool)
    path = write_dicom_seg(masks, chosen, v, tmp_path / "x.dcm", "x")
    tables = segments.write_color_tables(chosen, tmp_path / "mask.nii.gz")
    slicer = [line.split() for line in tables[0].read_text().splitlines()[2:]]
    itksnap = [line.split(None, 7) for line in tables[1].read_text().splitlines()[3:]]
    for i, (s, segment) in enumerate(zip(pydicom.dcmread(path).SegmentSequence, chosen)):
        lab = CIELabColor.from_dicom_value(s.RecommendedDisplayCIELabValue)
        np.testing.assert_allclose(lab.to_rgb(), segment.color, atol=2)
        rgb = [str(x) for x in segment.color]
        assert slicer[i] == [str(i + 1), SAID[i].replace(" ", "_"), *rgb, "255"]
        assert itksnap[i][:4] == [str(i + 1), *rgb] and itksnap[i][7] == f'"{SAID[i]}"'


def test_a_long_sentence_is_the_description(series, tmp_path):
    v, text = read(series), "There is " + "very " * 20 + "large pleural effusion."
    mask = np.ones((1, *v.hu.shape), bool)
    path = write_dicom_seg(mask, sentence_segments([text]), v, tmp_path / "x.dcm", "x")
    (s,) = pydicom.dcmread(path).SegmentSequence
    assert (s.SegmentLabel, s.SegmentDescription) == (text[:64].strip(), text)


def test_a_region_outside_of_the_scan(series, tmp_path):
    "No voxel: the file is written all the same, and is empty"
    v = read(series)
    masks = np.zeros((1, *v.hu.shape), bool)
    path = write_dicom_seg(masks, sentence_segments(["None."]), v, tmp_path / "x.dcm", "x")
    assert not pydicom.dcmread(path).pixel_array.any()


def test_what_is_no_series_has_no_seg(tmp_path, capsys):
    "A NIfTI is processed, with a warning; a series of uneven steps is refused"
    c = synthesize_chest(("seg", 1), (48, 40, 24), (7.0, 7.0, 14.0), only="Consolidation")
    from asap.data.volumes import write

    write(c.hu, c.affine, tmp_path / "scan.nii.gz")
    args = ["--sentence", SAID[0], "--seg", "--json"]
    out = tmp_path / "out"
    assert main(["ground", str(tmp_path / "scan.nii.gz"), "-o", str(out), *args]) == 0
    row = json.loads(capsys.readouterr().out)
    assert any("no DICOM SEG is written: the scan is NIfTI" in w for w in row["warnings"])
    assert not list(out.glob("*.dcm")) and (out / "scan_1_region.nii.gz").exists()


def test_a_series_with_uneven_steps_has_no_seg(series, tmp_path):
    folder = tmp_path / "uneven"
    shutil.copytree(series, folder)
    files = [pydicom.dcmread(f) for f in folder.iterdir()]
    normal = np.cross(*np.reshape(files[0].ImageOrientationPatient, (2, 3)).astype(float))
    files.sort(key=lambda d: float(np.dot(np.array(d.ImagePositionPatient, float), normal)))
    for d in files[12:]:
        shift = 4.0 * normal
        d.ImagePositionPatient = [round(float(x), 4) for x in d.ImagePositionPatient + shift]
        d.save_as(d.filename)
    v = read(folder)
    assert v.facts["interpolated"]
    masks = np.ones((1, *v.hu.shape), bool)
    with pytest.raises(ValueError, match="slices were interpolated or left out"):
        write_dicom_seg(masks, sentence_segments(["x"]), v, tmp_path / "x.dcm", "x")
    assert not (tmp_path / "x.dcm").exists()


def test_without_highdicom_the_option_says_so(series, tmp_path, monkeypatch, capsys):
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "highdicom" else known(n, *a)
    )
    args = ["ground", str(series), "-o", str(tmp_path), "--seg", "--sentence", SAID[0]]
    assert main(args) == 1
    assert "pip install highdicom" in capsys.readouterr().err
