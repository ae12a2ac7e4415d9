"""Scans in every format, and hostile copies of them, from a seed."""

import contextlib
import gzip
import io
import os
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from asap.core import project_root, rng
from asap.phantom.abnormalities import synthesize_chest

SHAPE, SPACING = (48, 48, 24), (7.0, 7.0, 14.0)
PICTURES = "--window -1000 1000 --spacing 7 7 14 --axes RAS".split()
ODD_NUMBERS = (
    *("0", "-1", "1", "2", "333333", "1000000000000", "18446744073709551616", "1e308", "1e-300"),
    *("nan", "inf", "-inf", "2147483647", "-2147483648", "65535", "0x41414141", "9" * 400, "", "a"),
)


# ----- a scan in every format


def write_sources(folder: Path) -> dict[str, Path]:  # format -> file or folder
    "The scan in each format, written once"
    sys.path.insert(0, str(project_root() / "tests"))
    from files import dicom, itk, nifti, npz, pictures

    if (folder / "done").exists():
        return _listed(folder)
    shutil.rmtree(folder, ignore_errors=True)
    c = synthesize_chest(("hostile", 0), SHAPE, SPACING)
    hu, affine = c.hu, c.affine
    for name in ("nii", "nii.gz"):
        nifti(hu, affine, folder / name / f"scan.{name}")
    for name in ("nrrd", "nhdr", "mha", "mhd"):
        (folder / name).mkdir()
        itk(hu, affine, folder / name / f"scan.{name}")
    (folder / "npz").mkdir()
    npz(hu, affine, folder / "npz/scan.npz")
    (folder / "npz-packed").mkdir()
    np.savez_compressed(folder / "npz-packed/scan.npz", hu=hu, affine=affine)
    for name in ("dicom", "rle", "jpegls", "jpeg2000", "deflated"):
        dicom(hu[:, :, 6:18], affine, folder / name / "series", rle=name == "rle")
        for f in (folder / name / "series").iterdir():
            _repack(f, name)
    pictures(hu, folder / "png/slices")
    shutil.copytree(folder / "png/slices", folder / "jpeg/slices")
    for f in (folder / "jpeg/slices").iterdir():
        Image.open(f).save(f.with_suffix(".jpg"), quality=95)
        f.unlink()
    (folder / "done").touch()
    return _listed(folder)


def _listed(folder: Path) -> dict[str, Path]:
    found = {}
    for f in sorted(p for p in folder.iterdir() if p.is_dir()):
        inside = sorted(f.iterdir(), key=lambda p: p.suffix in (".raw", ".gz") and len(p.name) > 8)
        found[f.name] = next(
            (p for p in inside if p.is_dir() or p.suffix in (".nhdr", ".mhd")), inside[0]
        )
    return found


def _repack(f: Path, how: str) -> None:
    "A slice with its pixels, or the whole of it, packed"
    import pydicom
    from pydicom.encaps import encapsulate
    from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

    d = pydicom.dcmread(f)
    if how == "jpegls":
        d.compress(JPEGLSLossless, generate_instance_uid=False)
    elif how == "jpeg2000":
        picture = io.BytesIO()
        Image.fromarray(d.pixel_array).save(picture, "JPEG2000", irreversible=False)
        d.PixelData = encapsulate([picture.getvalue()])
        d["PixelData"].VR = "OB"
        d.file_meta.TransferSyntaxUID = JPEG2000Lossless
    elif how == "deflated":
        d.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    else:
        return
    d.save_as(f, enforce_file_format=True)


# ----- damage to bytes


def flip_bits(b: bytearray, r) -> None:
    for _ in range(int(r.integers(1, 30))):
        b[_place(b, r)] ^= 1 << int(r.integers(8))


def set_bytes(b: bytearray, r) -> None:
    at = _place(b, r)
    n = int(r.choice([1, 2, 4, 8, 64]))
    b[at : at + n] = bytes([int(r.choice([0, 255, 127, 128, int(r.integers(256))]))]) * n


def set_number(b: bytearray, r) -> None:
    "A field of a header becomes an extreme number"
    at = _place(b, r)
    n = int(r.choice([-1, 0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1])) % 2**64
    size = int(r.choice([2, 4, 8]))
    b[at : at + size] = n.to_bytes(8, "little")[:size]


def set_float(b: bytearray, r) -> None:
    at = _place(b, r)
    value = float(r.choice([np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-38, 0.0]))
    b[at : at + 4] = struct.pack("<f", value)


def cut_off(b: bytearray, r) -> None:
    del b[_place(b, r) :]


def delete_bytes(b: bytearray, r) -> None:
    at = _place(b, r)
    del b[at : at + int(r.integers(1, 512))]


def insert_bytes(b: bytearray, r) -> None:
    at = _place(b, r)
    b[at:at] = r.integers(0, 256, int(r.integers(1, 512)), np.uint8).tobytes()


def repeat_bytes(b: bytearray, r) -> None:
    at = _place(b, r)
    b[at:at] = bytes(b[at : at + int(r.integers(1, 256))]) * int(r.integers(1, 200))


def append_bytes(b: bytearray, r) -> None:
    b += r.integers(0, 256, int(r.integers(1, 100_000)), np.uint8).tobytes()


def _place(b: bytearray, r) -> int:
    return int(r.integers(min(600, len(b)) if r.random() < 0.7 else len(b)))


BYTES = [
    *(flip_bits, set_bytes, set_number, set_float, cut_off, delete_bytes, insert_bytes),
    *(repeat_bytes, append_bytes),
]


# ----- damage to what a format says


def text_number(b: bytearray, r) -> None:
    "A number of a text header, or all of one line"
    lines, rest = _text(b)
    i = int(r.integers(len(lines)))
    key, mark, value = lines[i].partition("=" if "=" in lines[i] else ":")
    words = value.split() or [""]
    words[int(r.integers(len(words)))] = str(r.choice(ODD_NUMBERS))
    lines[i] = f"{key}{mark} {' '.join(words)}"
    _set_text(b, lines, rest)


def text_line(b: bytearray, r) -> None:
    "A line twice, away, very long, or many"
    lines, rest = _text(b)
    i, what = int(r.integers(len(lines))), int(r.integers(4))
    lines[i : i + 1] = [
        [lines[i]] * 2,
        [],
        [lines[i] + " 1" * int(r.integers(1, 300_000))],
        [f"Comment{k} = {k}" for k in range(int(r.integers(1, 30_000)))] + [lines[i]],
    ][what]
    _set_text(b, lines, rest)


def text_file(b: bytearray, r) -> None:
    "Voxels somewhere else"
    lines, rest = _text(b)
    name = str(
        r.choice(["/dev/zero", "/etc/passwd", "../scan.raw", "LIST", "%d.raw 1 1000000000 1", "."])
    )
    found = [i for i, x in enumerate(lines) if "file" in x.lower()]
    if found:
        key, mark, _ = lines[found[-1]].partition("=" if "=" in lines[found[-1]] else ":")
        lines[found[-1]] = f"{key}{mark} {name}"
    _set_text(b, lines, rest)


def _text(b: bytearray) -> tuple[list[str], bytes]:  # lines of the header, voxels
    end = b.find(b"\n\n") if b.startswith(b"NRRD") else b.find(b"\n", b.find(b"ElementDataFile"))
    end = len(b) if end < 0 else end
    return bytes(b[:end]).decode("latin1").split("\n"), bytes(b[end:])


def _set_text(b: bytearray, lines: list[str], rest: bytes) -> None:
    b[:] = "\n".join(lines).encode("latin1") + rest


def gzip_bomb(b: bytearray, r) -> None:
    "The header of the scan, and zeros without end"
    head = bytearray(gzip.decompress(b)[:352] if b[:2] == b"\x1f\x8b" else b[:352])
    struct.pack_into(
        "<8h", head, 40, 3, *(int(n) for n in r.choice([64, 1024, 32767], 3)), *[1] * 4
    )
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = [packer.compress(bytes(2**20)) for _ in range(int(r.integers(1, 400)))]
    b[:] = packer.compress(bytes(head)) + b"".join(zeros) + packer.flush()


def npy_header(b: bytearray, r) -> None:
    "An array that says something else of itself"
    depth = int(r.integers(1, 4000))
    shape = str(
        r.choice(["(1000000000000,)", "(-1, 2)", "(48, 48, 24)", "(2147483647, 2147483647)", "()"])
    )
    kind = str(r.choice(["'|O'", "'<f8'", "'<i2'", "'S0'", "'V1000000000'", "[('a', '<f8')]"]))
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}"
    header = "(" * depth + header if r.random() < 0.2 else header
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        size = struct.pack("<I", len(header) + 1)
        z.writestr("hu.npy", b"\x93NUMPY\x02\x00" + size + header.encode() + b"\n" + bytes(110592))
    b[:] = out.getvalue()


def zip_bomb(b: bytearray, r) -> None:
    "Members that unpack to much, or many of them"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        if r.random() < 0.5:
            with z.open("hu.npy", "w", force_zip64=True) as f:
                for _ in range(int(r.integers(1, 600))):
                    f.write(bytes(2**20))
        else:
            for k in range(int(r.integers(1, 20_000))):
                z.writestr(f"../{k}.npy", b"")
    b[:] = out.getvalue()


def dicom_tag(b: bytearray, r) -> None:
    "A tag of the header with a value or a length that cannot be"
    tags = [(0x28, t) for t in (0x2, 0x8, 0x10, 0x11, 0x100, 0x101, 0x103)] + [(0x7FE0, 0x10)]
    group, element = tags[int(r.integers(len(tags)))]
    at = b.find(struct.pack("<HH", group, element))
    if at < 0:
        return set_number(b, r)
    n = int(r.choice([0, 1, 2**15, 2**16 - 1]))
    b[at + 8 : at + 10] = struct.pack("<H", n)
    if r.random() < 0.3:
        b[at + 6 : at + 8] = struct.pack("<H", 2**16 - 1)


def dicom_nest(b: bytearray, r) -> None:
    "Sequences in sequences, or in themselves, before the image"
    at = b.find(struct.pack("<HH", 0x28, 0x2))
    if at < 0:
        return set_number(b, r)
    depth = int(r.choice([10, 900, 20_000]))
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    begin = struct.pack("<HH", 0x8, 0x1140) + b"SQ\0\0\xff\xff\xff\xff" + item
    end = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    b[at:at] = begin * depth + (end * depth if r.random() < 0.5 else b"")


def dicom_syntax(b: bytearray, r) -> None:
    "Pixels that claim to be packed in another way"
    old = b.find(b"1.2.840.10008.1.2")
    new = str(r.choice(["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"]))
    length = int.from_bytes(b[old - 2 : old], "little")
    b[old : old + length] = new.encode()[:length].ljust(length, b"\0")


def picture_size(b: bytearray, r) -> None:
    "Another size in the header of a PNG, its check sum made anew"
    if b[1:4] != b"PNG":
        return set_number(b, r)
    n = [int(x) for x in r.choice([0, 1, 48, 9000, 60_000, 2**31 - 1], 2)]
    b[16:24] = struct.pack(">II", *n)
    b[29:33] = struct.pack(">I", zlib.crc32(b[12:29]))


TEXT = [text_number, text_number, text_line, text_file]
DICOM = [dicom_tag, dicom_tag, dicom_nest, dicom_syntax]
OWN = {
    **dict.fromkeys(("nrrd", "nhdr", "mha", "mhd"), TEXT),
    **dict.fromkeys(("nii", "nii.gz"), [gzip_bomb, set_number, set_float]),
    **dict.fromkeys(("npz", "npz-packed"), [npy_header, npy_header, zip_bomb]),
    **dict.fromkeys(("dicom", "rle", "jpegls", "jpeg2000", "deflated"), DICOM),
    **dict.fromkeys(("png", "jpeg"), [picture_size]),
}


# ----- one hostile copy


@contextlib.contextmanager
def mutate_scan(i: int, seed: int, sources: dict[str, Path], folder: Path):
    "Hostile copy number `i`: its form, damage, path and options of `asap check`"
    r = rng("hostile", seed, i)
    form = list(sources)[i % len(sources)]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources[form].parent, folder)
    path = folder / sources[form].name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    own = r.random() < 0.5
    damage = (OWN[form] if own else BYTES)[int(r.integers(len(OWN[form] if own else BYTES)))]
    name = damage.__name__
    for f in files if r.random() < 0.3 else files[int(r.integers(len(files))) :][:1]:
        data = bytearray(f.read_bytes())
        damage(data, r)
        f.write_bytes(data)
    if not path.is_dir() and r.random() < 0.01:
        name = "pipe"
        path.unlink()
        os.mkfifo(path)
    words = PICTURES if form in ("png", "jpeg") else []
    yield dict(form=form, damage=name, path=str(path), words=words)
    shutil.rmtree(folder)
