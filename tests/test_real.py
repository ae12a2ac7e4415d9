"The real scans: nothing is refused, and what ships with them lies where it belongs"

import numpy as np
import pytest

from asap.anatomy.organs import merge_class_masks, read_multilabel_map
from asap.cli import main
from asap.data import real
from asap.data.checks import body_mask, check_mask, load_checked
from asap.data.volumes import open_nifti, read, standardize
from asap.params import load_params

P = load_params()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    found, why = real.fetch_scans(P.real, tmp_path_factory.mktemp("real"))
    if len(found) < len(real.SCANS):
        pytest.skip(f"the real scans could not be fetched: {'; '.join(why)}")
    return found


@pytest.mark.parametrize("name", real.SCANS)
def test_no_false_refusal(scans, name):
    s, files = real.SCANS[name], scans[name]
    v, warnings = load_checked(files / s.image)
    std = standardize(v, P.volumes.spacing)
    assert (
        -1000 <= std.hu.min() < -900
        and std.hu.max() > 500
        and np.allclose(std.spacing, P.volumes.spacing)
    )
    for f in [
        *real.find_masks(files / m for m in s.masks).values(),
        *([files / s.labels] if s.labels else []),
    ]:
        check_mask(open_nifti(f).shape, open_nifti(f).affine, v, f.name)
    expected = dict(
        totalsegmentator_dicom=["covers 40 mm"],
        totalsegmentator_part=["covers 90 mm"],
        totalsegmentator_abdomen=["0.60 liters"],
    )
    assert [str(w)[: len(e)] for w, e in zip(warnings, expected.get(name, []))] == expected.get(
        name, []
    ) and len(warnings) == len(expected.get(name, []))


def test_the_command_refuses_none(scans, capsys):
    assert main(["check", *[str(scans[n] / s.image) for n, s in real.SCANS.items()]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6, lines
    assert not any(line.startswith("REFUSED") for line in lines)
    assert (
        sum(
            "DICOM 512x512x20, 0.977x0.977x2 mm" in line and "covers 40 mm" in line
            for line in lines
        )
        == 1
    )


def test_organs_lie_on_the_chest(scans):
    """Heart and aorta of the masks are solid and in the middle; the lobes, which nobody
    segmented, are unknown"""
    s, files = real.SCANS["totalsegmentator_chest"], scans["totalsegmentator_chest"]
    std = standardize(load_checked(files / s.image)[0], P.volumes.spacing)
    m = merge_class_masks(
        real.find_masks(files / f for f in s.masks),
        P.anatomy.groups,
        std.hu.shape,
        std.affine,
        std.hu,
    )
    number = {g: i for i, g in enumerate(P.anatomy.groups, 1)}
    for group in ("heart", "aorta"):
        inside = std.hu[m == number[group]]
        assert len(inside) > 300 and np.median(inside) > 100, "blood with contrast"
    air = body_mask(std.hu) & (std.hu < -700)
    assert not (m == number["left upper lobe"]).any() and (m[air] == 255).mean() > 0.9


def test_two_ways_to_bring_masks_agree(scans):
    """A multi-label file and a folder of one file a class, of one segmentation, give the same
    organ map"""
    s, files = real.SCANS["totalsegmentator_part"], scans["totalsegmentator_part"]
    std = standardize(load_checked(files / s.image)[0], (3, 3, 3))
    groups = dict(liver=["liver"], aorta=["aorta"], bowel=["colon", "small_bowel"])
    a = read_multilabel_map(files / s.labels, groups, std.hu.shape, std.affine)
    b = merge_class_masks(
        real.find_masks(files / f for f in s.masks), groups, std.hu.shape, std.affine
    )
    assert len(np.unique(a)) == 4 and (a == b).mean() > 0.999


@pytest.mark.parametrize(
    "name, ml, side", [("pyradiomics_lung1", 1.4, "right"), ("pyradiomics_lung2", 48.4, "left")]
)
def test_lesions(scans, name, ml, side):
    s, files = real.SCANS[name], scans[name]
    (said,) = real.scan_sentences(s, files, read(files / s.image))
    assert f"{ml} ml in the {side} lung" in said["sentence"] and said["source"].endswith(
        "_label.nrrd"
    )


def test_measurements(scans):
    s, files = real.SCANS["totalsegmentator_chest"], scans["totalsegmentator_chest"]
    said = [r["sentence"] for r in real.scan_sentences(s, files, read(files / s.image))]
    assert "The aorta measures 33 mm at the mid aortic arch." in said and len(said) == 15
