"""Damaged copies of a scan in every format through `asap check`, in one batch.

`python benchmarks/fuzz.py --save` writes benchmarks/fuzz.json. Bits, bytes and blocks of headers
and voxels are changed at seeded places. A copy that `asap check` accepts is read again and compared
with the scan: voxels that differ by more than 1 HU must lie where the format has no check sum.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from asap.core import log_message, project_root, rng, write_json
from asap.data.volumes import read
from asap.phantom.abnormalities import synthesize_chest

HEADER = 600  # bytes that half of the mutations go to
VERDICT = re.compile(r"^(ok|warning|REFUSED)\s+(case\d+)\b")


@dataclass(frozen=True)
class Mutation:
    "One damaged copy"

    case: str
    form: str
    path: Path  # what `asap check` reads
    protected: bool  # a check sum of the format covers the changed bytes


# ----- the scan in every format


def write_dicom(hu, affine, folder):
    "A series by the writer of the tests"
    sys.path.insert(0, str(project_root() / "tests"))
    from files import dicom

    return dicom(hu, affine, folder)


def itk_image(hu, affine):
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    size = np.sqrt((affine[:3, :3] ** 2).sum(0))
    img = sitk.GetImageFromArray(np.ascontiguousarray(hu.transpose(2, 1, 0)))
    img.SetSpacing(size.tolist())
    img.SetOrigin(lps[:3, 3].tolist())
    img.SetDirection((lps[:3, :3] / size).ravel().tolist())
    return img


def write_all(folder: Path) -> dict:  # format -> (file or folder, first byte that is protected)
    "A phantom in every format; None: nothing in the file is protected by a check sum"
    c = synthesize_chest(("fuzz", 0), (48, 48, 24), (7.0, 7.0, 14.0))
    img = nib.Nifti1Image(c.hu, c.affine)
    nib.save(img, folder / "plain.nii")
    nib.save(img, folder / "packed.nii.gz")
    for name in ("plain.nrrd", "packed.nrrd", "plain.mha", "packed.mha"):
        sitk.WriteImage(itk_image(c.hu, c.affine), str(folder / name), name.startswith("packed"))
    np.savez(folder / "plain.npz", hu=c.hu, affine=c.affine)
    np.savez_compressed(folder / "packed.npz", hu=c.hu, affine=c.affine)
    write_dicom(c.hu, c.affine, folder / "dicom")
    nrrd, mha = ((folder / f"packed.{s}").read_bytes() for s in ("nrrd", "mha"))
    start = {"plain.npz": 0, "packed.npz": 0, "packed.nii.gz": 10}  # a gzip header has no sum
    start |= {"packed.nrrd": nrrd.index(b"\n\n") + 12, "packed.mha": mha.index(b"LOCAL\n") + 6}
    return {f.name: (f, start.get(f.name)) for f in sorted(folder.iterdir())}


# ----- damage


def flip_bit(b: bytearray, at: int, r) -> None:
    b[at] ^= 1 << int(r.integers(8))


def set_byte(b: bytearray, at: int, r) -> None:
    b[at] = int(r.integers(256))


def zero_block(b: bytearray, at: int, r) -> None:
    end = min(len(b), at + int(r.integers(64, 8192)))
    b[at:end] = bytes(end - at)


def cut_off(b: bytearray, at: int, r) -> None:
    del b[at:]


def delete_bytes(b: bytearray, at: int, r) -> None:
    del b[at : at + int(r.integers(1, 512))]


def insert_bytes(b: bytearray, at: int, r) -> None:
    b[at:at] = r.integers(0, 256, int(r.integers(1, 512)), np.uint8).tobytes()


def swap_digit(b: bytearray, at: int, r) -> None:
    "Another digit in the next number of a text header"
    digits = [i for i in range(at, min(at + 200, len(b))) if chr(b[i]).isdigit()]
    b[digits[0] if digits else at] = ord(str(r.integers(10)))


DAMAGE = [flip_bit, set_byte, zero_block, cut_off, delete_bytes, insert_bytes, swap_digit]


def mutate(n: int, sources: dict, folder: Path) -> list[Mutation]:
    "`n` damaged copies, by turns of every format"
    made = []
    for i in range(n):
        r = rng("fuzz", i)
        form = list(sources)[i % len(sources)]
        source, start = sources[form]
        case = f"case{i:05d}"
        target = folder / (case + form[form.index(".") :] if source.is_file() else case)
        damaged = target
        if source.is_dir():
            shutil.copytree(source, target)
            damaged = sorted(target.iterdir())[int(r.integers(24))]
        data = bytearray((source if source.is_file() else damaged).read_bytes())
        at = int(r.integers(min(HEADER, len(data)) if r.random() < 0.5 else len(data)))
        DAMAGE[int(r.integers(len(DAMAGE)))](data, at, r)
        damaged.write_bytes(data)
        made.append(Mutation(case, form, target, start is not None and at >= start))
    return made


# ----- the batch and what came out


def check(folder: Path, timeout: float) -> subprocess.CompletedProcess:
    "One `asap check` over all copies"
    command = [sys.executable, "-m", "asap.cli", "check", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def outcome(m: Mutation, verdict: str | None, truth: dict) -> str:
    "refused, same, moved (same voxels at another place), or differs"
    if verdict is None:
        return "lost"
    if verdict == "REFUSED":
        return "refused"
    v, good = read(m.path), truth[m.form]
    same = v.hu.shape == good.hu.shape and (np.abs(v.hu.astype(np.float64) - good.hu).max() <= 1)
    if not same:
        return "differs, check sum" if m.protected else "differs, no check sum"
    return "same" if np.allclose(v.affine, good.affine, atol=1e-3) else "moved"


def fuzz(
    n: int,  # damaged copies
    timeout: float = 3600,  # s
) -> dict:  # figures
    "Damage, check and compare"
    with tempfile.TemporaryDirectory() as t:
        clean, folder = Path(t) / "clean", Path(t) / "damaged"
        clean.mkdir()
        folder.mkdir()
        sources = write_all(clean)
        truth = {form: read(path) for form, (path, _) in sources.items()}
        copies = mutate(n, sources, folder)
        start = time.perf_counter()
        run = check(folder, timeout)
        seconds = time.perf_counter() - start
        lines = [m for m in map(VERDICT.match, run.stdout.splitlines()) if m]
        said = {m[2]: m[1] for m in lines}
        found = {m: outcome(m, said.get(m.case), truth) for m in copies}
    for m, what in found.items():
        if what in ("lost", "differs, check sum"):
            log_message(f"{m.case} ({m.form}): {what}")
    by_form = {f: dict(Counter(o for m, o in found.items() if m.form == f)) for f in sources}
    return dict(
        mutations=n,
        exit_code=run.returncode,
        tracebacks=run.stderr.count("Traceback (most recent call last)"),
        said_twice=len(lines) - len(said),
        total=dict(Counter(found.values())),
        by_format=by_form,
        seconds=round(seconds, 1),
    )


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("-n", type=int, default=2000, help="damaged copies (default 2000)")
    a.add_argument("--save", action="store_true", help="write benchmarks/fuzz.json")
    a = a.parse_args()
    out = fuzz(a.n)
    log_message(str(out))
    if a.save:
        write_json(out, project_root() / "benchmarks/fuzz.json")


if __name__ == "__main__":
    main()
