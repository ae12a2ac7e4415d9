"Values that are no Hounsfield units, pictures as a viewer shows them, and shapes"

import numpy as np
import pytest
from files import nifti, pictures
from PIL import Image

from asap.data.checks import load_checked
from asap.data.volumes import Source, read
from asap.phantom.abnormalities import synthesize_chest

C = synthesize_chest(("values", 0), (64, 64, 32), (5.5, 5.5, 10.0))
HU = C.hu.astype(np.float32)
UNIT = (HU.clip(-1000, 1000) + 1000) / 2000

NO_HU = {  # values, words of the advice
    "negated": (-HU, "negated"),
    "negated and clipped": (-HU.clip(-1000, 1000), "negated"),
    "up by 300": (HU + 300, "shifted|darker"),
    "up by 500": (HU + 500, "no CT|shifted"),
    "down by 300": (HU - 300, "twice"),
    "doubled": (HU * 2, "twice"),
    "halved": (HU / 2, "no CT|shifted"),
    "fractions": (UNIT, "fractions of a display window"),
    "from -1 to 1": (UNIT * 2 - 1, "another program normalized"),
    "z-scores": ((HU - HU.mean()) / HU.std(), "another program normalized"),
    "other byte order": (C.hu.byteswap().astype(np.float32), "expected"),
    "complex": (HU + 1j, "complex"),
}


@pytest.mark.parametrize("what", NO_HU)
def test_no_hounsfield_units(what, tmp_path):
    values, words = NO_HU[what]
    with pytest.raises(ValueError, match=words):
        load_checked(nifti(values, C.affine, tmp_path / "a.nii.gz"))


def test_fractions_of_a_window_are_spread_over_it(tmp_path):
    path = nifti(UNIT.astype(np.float32), C.affine, tmp_path / "a.nii.gz")
    v, _ = load_checked(path, Source(("window", -1000, 1000)))
    assert np.abs(v.hu - HU.clip(-1000, 1000)).max() < 0.1


@pytest.mark.parametrize("values", [UNIT * 2 - 1, UNIT * 300, UNIT * 4095])
def test_values_beyond_a_window(values, tmp_path):
    path = nifti(values.astype(np.float32), C.affine, tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="integers from 0 to 255 or fractions from 0 to 1"):
        read(path, Source(("window", -1000, 1000)))


# ----- padding


X = (np.arange(64) - 31.5) * 5.5
OUTSIDE = np.hypot(*np.meshgrid(X, X, indexing="ij")) > 178


def smeared(value, weights):
    "Padded, then mixed with its neighbors in the plane, as resampling does"
    hu = np.where(OUTSIDE[:, :, None], value, HU)
    mixed = sum(w * np.roll(hu, k, 0) for k, w in enumerate(weights, -1))
    mixed[[0, -1]] = value
    return np.rint(mixed).astype(np.int16)


@pytest.mark.parametrize("value", [-2000, -3024, -1500])
@pytest.mark.parametrize("weights", [(0, 1, 0), (0.3, 0.5, 0.2), (-0.1, 1.2, -0.1)])
def test_resampled_padding_is_no_fault(value, weights, tmp_path):
    load_checked(nifti(smeared(value, weights), C.affine, tmp_path / "a.nii.gz"))


@pytest.mark.parametrize("value", [-2000, -3024, -1024])
def test_rescaled_twice_is_found_with_padding(value, tmp_path):
    hu = smeared(value, (0.3, 0.5, 0.2)).astype(np.float32) - 1024
    with pytest.raises(ValueError, match="applied twice"):
        load_checked(nifti(hu, C.affine, tmp_path / "a.nii.gz"))


@pytest.mark.parametrize("value", [0, 1000, 3071, 62512])
def test_bright_padding_becomes_air(value, tmp_path):
    hu = np.where(OUTSIDE[:, :, None], value, HU)
    v, found = load_checked(nifti(hu.astype(np.float32), C.affine, tmp_path / "a.nii.gz"))
    assert (v.hu[OUTSIDE] == -1024).all() and f"the value {value}" in str(found[0])
    assert np.array_equal(v.hu[~OUTSIDE], HU[~OUTSIDE])


# ----- pictures


GRAYS = np.random.default_rng(0).permutation(256).astype(np.uint8)  # index i shows gray GRAYS[i]


def palette(v):
    img = Image.fromarray(np.argsort(GRAYS).astype(np.uint8)[v], "P")
    img.putpalette(GRAYS.repeat(3).tobytes())
    return img


def gray_alpha(v, alpha=255):
    return Image.merge("LA", [Image.fromarray(v), Image.new("L", v.shape[::-1], alpha)])


MODES = {
    "palette": palette,
    "gray and alpha": gray_alpha,
    "RGB": lambda v: Image.fromarray(v).convert("RGB"),
    "RGBA": lambda v: Image.fromarray(v).convert("RGBA"),
    "palette and alpha": lambda v: palette(v).convert("RGBA"),
}
SOURCE = Source(("window", -1000, 1000), (5.5, 5.5, 10), "RAS")


@pytest.mark.parametrize("mode", MODES)
def test_pictures_are_read_as_shown(mode, tmp_path):
    folder = pictures(C.hu, tmp_path / "p")
    plain = read(folder, SOURCE).hu
    for f in folder.iterdir():
        MODES[mode](np.asarray(Image.open(f))).save(f)
    assert np.array_equal(read(folder, SOURCE).hu, plain)


NO_GRAY = {
    "transparent": lambda v: gray_alpha(v, 128),
    "transparent palette": lambda v: Image.fromarray(v).convert("P"),
    "color": lambda v: Image.merge("RGB", [Image.fromarray(c) for c in (v, v // 2, v)]),
    "16 bits": lambda v: Image.fromarray(v.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("mode", NO_GRAY)
def test_pictures_that_are_not_gray(mode, tmp_path):
    folder = pictures(C.hu, tmp_path / "p")
    for f in folder.iterdir():
        options = dict(transparency=0) if mode == "transparent palette" else {}
        NO_GRAY[mode](np.asarray(Image.open(f))).save(f, **options)
    with pytest.raises(ValueError, match="transparent pixels|color picture|expected integers"):
        read(folder, SOURCE)


def test_a_damaged_picture_is_named(tmp_path):
    folder = pictures(C.hu, tmp_path / "p")
    f = folder / "slice_7.png"
    data = bytearray(f.read_bytes())
    data[len(data) // 2] ^= 4
    f.write_bytes(data)
    with pytest.raises(ValueError, match="slice_7.png"):
        read(folder, SOURCE)


# ----- shapes


@pytest.mark.parametrize("axes", [(1,), (1, 1), (1, 1, 1)])
def test_axes_of_one_behind_the_third(axes, tmp_path):
    path = nifti(C.hu.reshape(*C.hu.shape, *axes), C.affine, tmp_path / "a.nii.gz")
    assert np.array_equal(read(path).hu, C.hu)
    np.savez(tmp_path / "b.npz", hu=C.hu.reshape(*C.hu.shape, *axes), affine=C.affine)
    assert np.array_equal(read(tmp_path / "b.npz").hu, C.hu)


def test_a_channel_axis_in_front(tmp_path):
    np.savez(tmp_path / "b.npz", ct=C.hu[None], spacing=C.spacing)
    assert np.array_equal(read(tmp_path / "b.npz").hu, C.hu)


@pytest.mark.parametrize(
    "shape", [(64, 64, 0), (0, 64, 32), (64, 64, 1, 32), (64, 64), (9, 9, 9, 3)]
)
@pytest.mark.parametrize("form", ["nii", "nii.gz", "npz"])
def test_shapes_that_are_no_volume(form, shape, tmp_path):
    data, path = np.zeros(shape, np.int16), tmp_path / f"a.{form}"
    if form == "npz":
        np.savez(path, hu=data, affine=C.affine)
    else:
        nifti(data, C.affine, path)
    with pytest.raises(ValueError) as e:
        read(path)
    assert str(shape) in str(e.value) and "expected" in str(e.value)
