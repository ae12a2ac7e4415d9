"Generation 3b: independent of generation 3, the same body in every box, the same bytes"

import ast

import numpy as np
import pytest
from conftest import TOP

from asap.phantom.bodies3b import Box, sample_box, synthesize_other_body
from asap.phantom.body import ORGAN_IDS

LUNGS = [k for n, k in ORGAN_IDS.items() if n.startswith("lung")]
COARSE = (6.0, 6.0, 6.0)


def test_its_shapes_come_from_no_page_of_generation_3():
    tree = ast.parse((TOP / "asap/phantom/bodies3b.py").read_text())
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    found |= {
        n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "asap" in n.module
    }
    assert found <= {"asap.core", "asap.phantom.body", "core", "body"}, found


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    a, b, c = (synthesize_other_body(s, COARSE) for s in ("x", "x", "y"))
    assert a.hu.tobytes() == b.hu.tobytes() and a.labels.tobytes() == b.labels.tobytes()
    assert a.hu.shape != c.hu.shape or (a.hu != c.hu).any()


@pytest.mark.parametrize("axis", range(3))
def test_a_moved_box_shows_the_same_organs(axis):
    step = 60.0  # mm, ten voxels
    center = np.array(Box().center)
    a = synthesize_other_body("moved", COARSE, Box())
    b = synthesize_other_body("moved", COARSE, Box(tuple(center + step * np.eye(3)[axis])))
    first, second = [slice(None)] * 3, [slice(None)] * 3
    first[axis], second[axis] = slice(10, None), slice(None, -10)
    one, two = a.labels[tuple(first)], b.labels[tuple(second)]
    assert one.any() and (one == two).mean() > 0.999


def test_organs_have_the_size_of_organs():
    ml = 6.0**3 / 1000
    for seed in range(4):
        o = synthesize_other_body(("size", seed), COARSE, Box())
        volume = {n: (o.labels == k).sum() * ml for n, k in ORGAN_IDS.items()}
        lungs = np.isin(o.labels, LUNGS).sum() * ml
        assert 1800 < lungs < 7500
        assert 300 < volume["heart"] < 1100
        assert 60 < volume["aorta"] < 500
        assert all(volume[n] > 50 for n in ORGAN_IDS if n.startswith("lung")), volume
        assert 5 < volume["trachea"] < 120 and 8 < volume["esophagus"] < 120


def test_hu_of_organs_are_those_of_ct():
    o = synthesize_other_body("hu", (3.0, 3.0, 3.0), Box())
    assert -920 < np.median(o.hu[np.isin(o.labels, LUNGS)]) < -700
    assert 20 < np.median(o.hu[o.labels == ORGAN_IDS["liver"]]) < 180
    assert np.median(o.hu[o.labels == ORGAN_IDS["trachea"]]) < -850
    assert np.median(o.hu[~o.body]) < -950


def test_boxes_vary_and_some_lie_below_the_lungs():
    boxes = [sample_box(i) for i in range(200)]
    low = sum(b.center[2] < -290 for b in boxes)
    assert 5 < low < 40
    assert min(b.extent[2] for b in boxes) < 110 and max(b.extent[2] for b in boxes) > 370
    below = next(i for i, b in enumerate(boxes) if b.center[2] < -290)
    o = synthesize_other_body("below", COARSE, boxes[below])
    assert not np.isin(o.labels, LUNGS).any() and o.body.any()


def test_outside_a_round_field_is_padding_and_no_organ():
    box = Box(extent=(250.0, 250.0, 100.0), padding=-2000)
    o = synthesize_other_body("round", COARSE, box)
    padded = o.hu == -2000
    assert padded[0, 0].all() and not padded[20, 20].any()
    assert not o.labels[padded].any() and not o.body[padded].any()
