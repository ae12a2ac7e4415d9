"""Time of one training sample at the paper's size on one core: what a process of the data loader
does, from the files of a case to its part of a batch (`ImageReportDataset`, `collate`).

`zoom` stretches the box (`pretrain.crop_mode: zoom`), `cut` does not; `first` is a case that the
process has not met before, whose lungs it has yet to find. `zoom_scipy` is the same sample with
SciPy's general resampler, by turns with ours in one run.

usage: python benchmarks/loader.py [--repeat 12] [--save]   (writes benchmarks/loader.json)
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from asap.anatomy.organs import map_to_groups
from asap.core import project_root, write_json
from asap.data import crops
from asap.data.volumes import write
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest
from asap.phantom.words import synthesize_report
from asap.pretrain.batches import ImageReportDataset, collate
from asap.text import encoder
from asap.train import retain_freed_memory

SIZE = (240, 240, 110)  # voxels of a scan of 360 x 360 x 330 mm


def write_case(p, folder) -> pd.DataFrame:  # a table of one case
    "A phantom on the standard grid, with noise in every voxel, and its organ map"
    from scipy.ndimage import zoom

    c = synthesize_chest(("loader", 0))
    factor = [n / m for n, m in zip(SIZE, c.hu.shape)]
    noise = np.random.default_rng(0).normal(0, 15, SIZE)
    hu = np.clip(np.rint(zoom(c.clean, factor, order=1) + noise), *p.volumes.hu_range)
    organs = map_to_groups(zoom(c.labels, factor, order=0), p.anatomy.groups)
    affine = np.diag([*p.volumes.spacing, 1])
    write(hu.astype(np.int16), affine, folder / "v.nii")
    write(organs, affine, folder / "o.nii.gz")
    r = synthesize_report(c, 0)
    row = dict(case="c", patient="p", findings=r.findings, impression=r.impression)
    files = dict(image=str(folder / "v.nii"), organ_map=str(folder / "o.nii.gz"))
    return pd.DataFrame([row | files])


def scipy_zoom(box, size, order):  # as `asap.data.crops` did
    from scipy.ndimage import affine_transform

    k = np.array(box.shape) / np.array(size)
    return affine_transform(
        box, k, (k - 1) / 2, tuple(size), order=order, mode="nearest", output=box.dtype
    )


def make_sample(data, draw):
    return collate([data[(draw, 0)]], data.text_encoder, data.params.pretrain.mlm_probability)


def make_first(data, draw):
    data.lung_boxes.clear()
    data.organ_sizes.clear()
    return make_sample(data, draw)


def make_by_scipy(data, draw):
    with patch.object(crops, "_zoom", scipy_zoom):
        return make_sample(data, draw)


def measure(data, repeat) -> dict:  # seconds by kind, medians of turns
    zoom, cut = data["zoom"], data["cut"]
    kinds = dict(
        zoom=(make_sample, zoom),
        zoom_scipy=(make_by_scipy, zoom),
        first=(make_first, zoom),
        cut=(make_sample, cut),
    )
    seconds = {k: [] for k in kinds}
    for draw in range(repeat + 1):  # the first round reads files and embeds the sentences
        for k, (make, source) in kinds.items():
            start = time.process_time()
            make(source, draw)
            seconds[k].append(time.process_time() - start)
    return {k: round(float(np.median(v[1:])), 4) for k, v in seconds.items()}


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--repeat", type=int, default=12)
    a.add_argument("--save", action="store_true")
    a = a.parse_args()
    torch.set_num_threads(1)
    retain_freed_memory()
    p = load_params(project_root() / "params/paper.yaml")
    text = encoder.load(project_root() / "weights/text")
    with tempfile.TemporaryDirectory() as tmp:
        table, data = write_case(p, Path(tmp)), {}
        for mode, scale in (("zoom", [0.9, 0.98]), ("cut", p.pretrain.crop_scale)):
            t = dict(crop_mode=mode, crop_scale=scale, sentence_features="alone")
            q = p.model_copy(update=dict(pretrain=p.pretrain.model_copy(update=t)))
            data[mode] = ImageReportDataset(table, q, text, 0)
        assert nib.load(table.image[0]).shape == SIZE
        found = measure(data, a.repeat)
        organ_map = (Path(tmp) / "o.nii.gz").stat().st_size
    out = dict(
        seconds=found,
        ratio=round(found["zoom_scipy"] / found["zoom"], 1),
        samples_a_second=round(1 / found["first"], 1),
        organ_map_mb=round(organ_map / 1e6, 2),
    )
    print(json.dumps(out, indent=1))
    if a.save:
        write_json(out, Path(__file__).with_suffix(".json"))


if __name__ == "__main__":
    main()
