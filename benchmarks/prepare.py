"""Time to prepare a CT of 512x512x300, as ratios to a plain version of the released script, in one
run on one machine.

The plain version: read gzip NIfTI as floating point, reorient to RAS, clip, resize the whole volume
trilinearly, int16, gzip NIfTI. Ours: read, check, standardize (asap.data), uncompressed NIfTI. Then
a crop of 224x224x112 from either. Prints a table; writes benchmarks/prepare.json with --save.

usage: python benchmarks/prepare.py [--slices 300] [--repeat 5] [--save]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from asap.core import write_json
from asap.data.checks import check_volume
from asap.data.volumes import read, read_crop, standardize, write

SPACING, HU, CROP = (1.5, 1.5, 3.0), (-1000, 1000), (224, 224, 112)


def scan(slices, to):  # a phantom on a scanner's grid, with noise in every voxel
    from scipy.ndimage import zoom

    from asap.phantom.abnormalities import synthesize_chest

    c = synthesize_chest(("benchmark", 0))
    size = (512, 512, slices)
    big = zoom(c.clean, [n / m for n, m in zip(size, c.hu.shape)], order=1)
    big = np.rint(big + np.random.default_rng(0).normal(0, 15, size)).astype(np.int16)
    affine = np.diag([-0.66, -0.66, 336 / slices, 1])
    affine[:3, 3] = (169, 169, -168)
    nib.save(nib.Nifti1Image(big, affine), to)


def decompressed(path):  # (array, affine), as nibabel gives it
    img = nib.load(path)
    return np.asanyarray(img.dataobj), img.affine


def plain_resize(data, affine):
    import torch

    img = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    v = np.clip(img.get_fdata(), *HU)
    size = [int(n * s / t) for n, s, t in zip(v.shape, img.header.get_zooms(), SPACING)]
    v = torch.nn.functional.interpolate(
        torch.from_numpy(v)[None, None].float(), size, mode="trilinear"
    )
    return v[0, 0].numpy().astype(np.int16)


def plain_write(v, to):
    nib.save(nib.Nifti1Image(v, np.diag([*SPACING, 1])), to)


def plain(path, to):
    plain_write(plain_resize(*decompressed(path)), to)


def ours_rest(v, to):
    errors = [f for f in check_volume(v) if f.level == "error"]
    assert not errors, errors
    s = standardize(v, SPACING, HU)
    write(s.hu, s.affine, to)


def ours(path, to):
    ours_rest(read(path), to)


def plain_crop(path):
    v = np.asanyarray(nib.load(path).dataobj)
    a = [max((n - m) // 2, 0) for n, m in zip(v.shape, CROP)]
    return v[tuple(slice(x, x + m) for x, m in zip(a, CROP))].copy()


def our_crop(path):
    shape = nib.load(path).shape
    return read_crop(path, [(n - m) // 2 for n, m in zip(shape, CROP)], CROP)


def timed(f, *args, repeat):
    t = []
    for _ in range(repeat):
        start = time.perf_counter()
        f(*args)
        t.append(time.perf_counter() - start)
    return t


def pair(a, b, repeat):  # alternately, so that both see the same machine; medians and their ratio
    ta, tb = [], []
    for _ in range(repeat):
        tb += timed(*b, repeat=1)
        ta += timed(*a, repeat=1)
    return dict(
        ours=round(float(np.median(ta)), 4),
        plain=round(float(np.median(tb)), 4),
        ratio=round(float(np.median(ta) / np.median(tb)), 3),
    )


def memory(path, out):  # GB of a worker, measured in a process of its own
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import prepare; "
        f"prepare.ours({str(path)!r}, {str(out)!r}); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return round(int(done.stdout.split()[-1]) / 2**20, 2)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--slices", type=int, default=300)
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--save", action="store_true")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        here = Path(tmp)
        scan(a.slices, here / "scan.nii.gz")
        scan(2 * a.slices, here / "long.nii.gz")
        ours(here / "scan.nii.gz", here / "ours.nii")
        plain(here / "scan.nii.gz", here / "plain.nii.gz")
        data, affine = decompressed(here / "scan.nii.gz")
        v = read(here / "scan.nii.gz")

        def rest():
            return plain_write(plain_resize(data, affine), here / "plain.nii.gz")

        out = dict(
            whole=pair(
                (ours, here / "scan.nii.gz", here / "ours.nii"),
                (plain, here / "scan.nii.gz", here / "plain.nii.gz"),
                a.repeat,
            ),
            without_decompression=pair((ours_rest, v, here / "ours.nii"), (rest,), a.repeat),
            crop=pair(
                (our_crop, here / "ours.nii"), (plain_crop, here / "plain.nii.gz"), 4 * a.repeat
            ),
            worker_gb_at_twice_the_slices=memory(here / "long.nii.gz", here / "long.nii"),
            slices=a.slices,
        )
    print(json.dumps(out, indent=1))
    if a.save:
        write_json(out, Path(__file__).with_name("prepare.json"))


if __name__ == "__main__":
    main()
