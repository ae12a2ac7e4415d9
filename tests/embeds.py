"""A cohort of six volumes in the store of a project, and its features, for tests/test_embedding.py.
usage: [torchrun ...] embeds.py FOLDER LEFT, which is killed after LEFT volumes"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from asap.core import process_rank
from asap.data.volumes import write
from asap.pretrain import embed
from asap.store import add_entry, manifest_row, store_of, write_manifest

SIZE, HU, N = (8, 8, 8), (-1000, 1000), 6


class Encoder:
    "Eight tokens, of an eighth of the voxels each"

    def __init__(self, left=10**6):
        self.left, self.seen = left, 0

    def forward_features(self, x):
        if self.seen >= self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += len(x)
        return x.reshape(len(x), 8, -1)


def project(folder: Path, seeds=range(N)) -> pd.DataFrame:
    "Write volumes, as the stage `prepare` does; the cohort's table"
    store, volumes, rows = store_of(folder / "build").create(), folder / "build/volumes/own", []
    for i in seeds:
        hu = np.random.default_rng(i).integers(*HU, SIZE).astype(np.int16)
        write(hu, np.eye(4), folder / "volume.nii")
        entry = add_entry(store, dict(image=[i]), dict(volume=folder / "volume.nii"), {})
        rows.append(manifest_row(f"c{i}.nii", f"c{i}", entry, "volume"))
    write_manifest(rows, volumes)
    cases = [r["case"] for r in rows]
    images = [str(volumes / r["name"]) for r in rows]
    return pd.DataFrame(dict(case=cases, scan=cases, patient=cases, split="train", image=images))


def embed_own(folder: Path, table: pd.DataFrame, *kinds: str, left=10**6) -> int:
    "Embed as the stage `embed` does; volumes that were embedded"
    encoder = Encoder(left)
    folders = {k: folder / "build" / k / "asap" for k in kinds or ("features", "tokens")}
    to, store = folder / "runs/embed/asap", store_of(folder / "build").create()
    made = dict(arm="asap")
    embed.embed_cohort(encoder, table, "own", folders, to, SIZE, HU, made, store, batch=1)
    return encoder.seen


if __name__ == "__main__":
    embed.SHARD = 1  # a shard is one case
    here = Path(sys.argv[1])
    seen = embed_own(here, pd.read_parquet(here / "table.parquet"), left=int(sys.argv[2]))
    (here / f"seen{process_rank()}").write_text(str(seen))
