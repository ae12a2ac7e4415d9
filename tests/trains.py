"""A short pre-training of one arm on six phantoms, for tests/test_train.py.  usage: [torchrun ...] trains.py ARM FOLDER STEPS BATCH SAVE_EVERY"""
import sys
from pathlib import Path

import numpy as np, pandas as pd, torch
from safetensors.torch import save_file

from asap.anatomy.organs import group_map
from asap.core import load_params, root
from asap.data.volumes import write
from asap.phantom.abnormalities import chest
from asap.phantom.words import report
from asap.pretrain.batches import Pairs
from asap.pretrain.pretrain import build, train
from asap.text.encoder import load, train_encoder
from asap.text.sentences import join, split

def cohort(folder): # six phantoms on disk, with a text encoder
    p, rows = load_params(root()/"params/smoke.yaml"), []
    for i in range(6):
        c = chest((0, "trains", i), (48, 48, 24), (7, 7, 14)); r = report(c, i)
        write(np.clip(c.hu, -1000, 1000), c.affine, folder/f"{i}.nii"); write(group_map(c.labels, p.anatomy.groups), c.affine, folder/f"{i}_organs.nii.gz")
        rows.append(dict(case=f"c{i}", patient=f"p{i}", image=f"{i}.nii", organ_map=f"{i}_organs.nii.gz", findings=r.findings, impression=r.impression))
    said = [split(join(r["findings"], r["impression"])) for r in rows]
    train_encoder(said, said, p.text, 0, folder/"text")
    pd.DataFrame(rows).to_parquet(folder/"table.parquet")

if __name__ == "__main__":
    arm, folder, steps, batch, save_every = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    data = folder.parent/"cohort"
    p = load_params(root()/"params/smoke.yaml")
    p = p.model_copy(update=dict(pretrain=p.pretrain.model_copy(update=dict(steps=steps, batch=batch, save_every=save_every, warmup=1, precision="no"))))
    table = pd.read_parquet(data/"table.parquet")
    for k in ("image", "organ_map"): table[k] = [str(data/f) for f in table[k]]
    text = load(data/"text")
    model = build(p, p.arms[arm].model_dump(by_alias=True), text, 0)
    train(model, Pairs(table, p, text, 0), p, 0, folder)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0: save_file(model.state_dict(), folder/"weights.safetensors")
