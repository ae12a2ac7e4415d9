"""A marker at a known place in the world is there after reading, standardising and writing, in
every format"""

import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from files import FORMS, dicom, write as write_as
from hypothesis import HealthCheck, given, settings, strategies as st

from asap.data.volumes import Source, make_affine, read, standardize, write
from asap.phantom.abnormalities import synthesize_chest

SHAPE = (34, 38, 30)


def turned(angles) -> np.ndarray:
    "Rotation about z, then y, then x"
    (a, b, c), r = angles, np.eye(3)
    for t, (i, j) in ((a, (0, 1)), (b, (0, 2)), (c, (1, 2))):
        m = np.eye(3)
        m[i, i] = m[j, j] = np.cos(t)
        m[i, j], m[j, i] = -np.sin(t), np.sin(t)
        r = r @ m
    return r


angle = st.one_of(st.just(0.0), st.floats(-0.4, 0.4))


@st.composite
def layouts(draw):
    """A format, an affine with flips, swapped axes, other spacing along each and a turn, and
    where the marker is"""
    form = draw(st.sampled_from(FORMS))
    spacing = [draw(st.floats(0.7, 4)) for _ in range(3)]
    order = draw(st.permutations(range(3)))
    signs = [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    at = [draw(st.floats(0.3, 0.7)) for _ in range(3)]
    if form == "pictures":
        return form, spacing, signs, None, at
    affine = np.eye(4)
    affine[:3, :3] = (
        turned([draw(angle) for _ in range(3)]) @ np.diag(signs)[:, list(order)]
    ) * spacing
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return form, spacing, signs, affine, at


def marker(affine, at):
    "A bright ball, as wide as six of the widest voxels, in air"
    ijk = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    far = np.linalg.norm(ijk @ affine[:3, :3].T + affine[:3, 3] - at, axis=-1)
    wide = 2 * np.sqrt((affine[:3, :3] ** 2).sum(0)).max()
    return np.rint(-1000 + 1900 * np.exp(-((far / wide) ** 2) / 2)).astype(np.int16)


def middle(hu, affine):
    w = np.maximum(hu.astype(float) + 900, 0)
    ijk = [
        (w * g).sum() / w.sum()
        for g in np.meshgrid(*map(np.arange, hu.shape), indexing="ij", sparse=True)
    ]
    return (affine @ [*ijk, 1])[:3]


@settings(
    max_examples=260, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(layouts(), st.tuples(*[st.floats(1, 3)] * 3))
def test_a_marker_stays_where_it_is(layout, to):
    form, spacing, signs, affine, at = layout
    source = Source()
    if form == "pictures":
        axes = "".join(pair[s < 0] for pair, s in zip(("RL", "AP", "SI"), signs))
        affine, source = (
            make_affine(SHAPE, spacing, axes),
            Source(("window", -1000, 1000), tuple(spacing), axes),
        )
    world = (affine @ [*(np.array(SHAPE) * at), 1])[:3]
    hu = marker(affine, world)
    before = middle(
        hu, affine
    )  # what lies near a border loses a little of its ball: the file itself says where it is
    with tempfile.TemporaryDirectory() as tmp:
        s = standardize(read(write_as(hu, affine, Path(tmp), form), source), to)
        write(s.hu, s.affine, Path(tmp) / "standard.nii")
        img = nib.load(Path(tmp) / "standard.nii")
        after = middle(np.asanyarray(img.dataobj), img.affine)
    assert nib.aff2axcodes(img.affine) == ("R", "A", "S") and np.allclose(
        img.header.get_zooms(), to, atol=1e-5
    )
    assert (np.abs(after - before) <= 0.5 * np.array(to)).all(), (form, after - before, to)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_voxels(form, tmp_path):
    c = synthesize_chest(("formats", 0), (48, 48, 24), (7.0, 7.0, 14.0))
    source = Source(("window", -1000, 1000), c.spacing, "RAS") if form == "pictures" else Source()
    v = read(write_as(c.hu, c.affine, tmp_path, form), source).ras()
    near = 1000 / 255 + 0.6 if form == "pictures" else 0
    assert (
        v.hu.shape == c.hu.shape
        and np.abs(
            v.hu.astype(float) - np.clip(c.hu, *((-1000, 1000) if near else (-2000, 9999)))
        ).max()
        <= near
    )
    assert form == "pictures" or np.allclose(v.affine, c.affine, atol=1e-3)


def test_one_series_of_several_is_chosen_and_named(tmp_path, capsys):
    "CT before others, no localizer, most slices"
    c = synthesize_chest(("formats", 1), (48, 48, 24), (7.0, 7.0, 14.0))
    dicom(c.hu, c.affine, tmp_path, series="1.1", number=1, Modality="PT")
    dicom(c.hu[:, :, :20], c.affine, tmp_path, series="1.2", number=2)
    dicom(c.hu, c.affine, tmp_path, series="1.3", number=3)
    dicom(
        c.hu,
        c.affine,
        tmp_path,
        series="1.4",
        number=4,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    assert np.array_equal(read(tmp_path).ras().hu, c.hu)
    said = capsys.readouterr().err
    assert "4 series; read series 3 (CT, 24 slices)" in said and "series 1 (PT, 24 slices)" in said


def test_a_tilted_gantry_is_not_ignored(tmp_path):
    "Slices that are shifted against each other make a sheared affine, and the marker stays"
    affine = np.diag([2.0, 2, 3, 1])
    affine[:3, 2] = (0, 0.6, 3)
    world = (affine @ [17, 19, 15, 1])[:3]
    hu = marker(affine, world)
    v = read(dicom(hu, affine, tmp_path / "tilted"))
    assert abs(abs(v.affine[1, 2]) - 0.6) < 1e-3
    s = standardize(v, (2, 2, 2))
    assert np.abs(middle(s.hu, s.affine) - world).max() < 1


def test_no_name_is_read(tmp_path):
    c = synthesize_chest(("formats", 2), (48, 48, 24), (7.0, 7.0, 14.0))
    v = read(dicom(c.hu, c.affine, tmp_path / "series"))
    assert "Nobody" not in repr(v.facts)
