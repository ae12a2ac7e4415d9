"""A short pre-training of one arm on six phantoms, for tests/test_train.py.  usage: [torchrun
...] trains.py ARM FOLDER STEPS BATCH SAVE_EVERY [KEY=VALUE of `pretrain`...], or trains.py slot
FOLDER STEPS SECONDS, which is killed after some seconds of its CPU (0: never)"""

import resource
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from asap.anatomy.organs import map_to_groups
from asap.core import project_root
from asap.data.volumes import write
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest
from asap.phantom.words import synthesize_report
from asap.pretrain.batches import ImageReportDataset
from asap.pretrain.pretrain import build_model, run, train
from asap.text.encoder import load, train_text_encoder
from asap.text.sentences import join_report, split_sentences


def cohort(folder):  # six phantoms on disk, with a text encoder
    p, rows = load_params(project_root() / "params/smoke.yaml"), []
    for i in range(6):
        c = synthesize_chest((0, "trains", i), (48, 48, 24), (7, 7, 14))
        r = synthesize_report(c, i)
        write(np.clip(c.hu, -1000, 1000), c.affine, folder / f"{i}.nii")
        write(map_to_groups(c.labels, p.anatomy.groups), c.affine, folder / f"{i}_organs.nii.gz")
        rows.append(
            dict(
                case=f"c{i}",
                patient=f"p{i}",
                image=f"{i}.nii",
                organ_map=f"{i}_organs.nii.gz",
                findings=r.findings,
                impression=r.impression,
            )
        )
    said = [split_sentences(join_report(r["findings"], r["impression"])) for r in rows]
    train_text_encoder(said, said, p.text, 0, folder / "text")
    pd.DataFrame(rows).to_parquet(folder / "table.parquet")


def contrast(folder, n=4):
    """The inter-report loss and its gradient, on similarities without ties; each process holds its
    share of n reports"""
    from accelerate import PartialState

    from asap.model.align import inter_report_loss, intra_report_loss

    state, g = PartialState(cpu=True), torch.Generator().manual_seed(0)

    def unit(*s):
        return torch.nn.functional.normalize(torch.randn(*s, generator=g), dim=-1)

    own = slice(
        state.process_index * n // state.num_processes,
        (state.process_index + 1) * n // state.num_processes,
    )
    whole = [unit(n, 9, 8), unit(n, 5, 8), 1 + 3 * torch.rand(n, 5, generator=g)]
    frozen, real = unit(n, 5, 6), torch.rand(n, 5, generator=g) < 0.7
    real[:, 0] = True
    longest = int(real[own].sum(1).max())  # processes have reports of different length
    patches = whole[0][own].clone().requires_grad_()
    order = (
        real[own].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    )  # real sentences first

    def pick(t):
        return t.gather(
            1, order.reshape(*order.shape, *[1] * (t.ndim - 2)).expand(-1, -1, *t.shape[2:])
        )

    text, k = (pick(t[own]).clone().requires_grad_() for t in whole[1:])
    f, r = pick(frozen[own]), pick(real[own])
    value = inter_report_loss([patches], text, k, f, r, 14.0, 0.95, 0.5, 9) + intra_report_loss(
        text, text.roll(1, -1), f, r, 14.0, 0.95
    )
    value.backward()
    out = dict(patches=patches.grad, k=torch.stack([x[m].sum() for x, m in zip(k.grad, r)]))
    from asap.train import all_gather

    save = {
        name: all_gather(v[:, None]) / state.num_processes for name, v in out.items()
    }  # as DDP averages
    if state.is_main_process:
        folder.mkdir()
        save_file(save, folder / "weights.safetensors")


def slot(folder, steps, seconds):
    """Arm `asap` with all that comes before its first step, on 300 cases. As in a slot of ten
    minutes with a save every five, there are saves by the clock alone, twice a slot"""
    if seconds:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = round(spent.ru_utime + spent.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    short = dict(steps=steps, batch_size=2, checkpoint_every=10**6, warmup_steps=1, precision="no")
    short |= dict(checkpoint_minutes=max(1, seconds) / 120, num_eval_cases=2, eval_every=10**6)
    p = load_params(project_root() / "params/smoke.yaml")
    p = p.model_copy(update=dict(pretrain=p.pretrain.model_copy(update=short)))
    data = folder.parent / "cohort"
    table = pd.read_parquet(data / "table.parquet")
    for k in ("image", "organ_map"):
        table[k] = [str(data / f) for f in table[k]]
    few = table.assign(split=["val", "val", "test", "test", "test", "test"])
    table = pd.concat([*[table.assign(split="train")] * 50, few])
    row = p.arms["asap"].model_dump(by_alias=True)
    model, log, *_ = run("asap", row, p, table, load(data / "text"), folder, {})
    log.to_csv(folder / "log.csv", index=False)
    save_file(model.state_dict(), folder / "weights.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "slot":
        slot(Path(sys.argv[2]), *map(int, sys.argv[3:5]))
        sys.exit()
    if sys.argv[1] == "contrast":
        contrast(Path(sys.argv[2]))
        sys.exit()
    arm, folder, steps, batch, save_every = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    data = folder.parent / "cohort"
    p = load_params(project_root() / "params/smoke.yaml")
    short = dict(steps=steps, batch_size=batch, checkpoint_every=save_every)
    short |= dict(warmup_steps=1, precision="no")
    short |= {k: int(v) for k, v in (pair.split("=") for pair in sys.argv[6:])}
    p = p.model_copy(update=dict(pretrain=p.pretrain.model_copy(update=short)))
    table = pd.read_parquet(data / "table.parquet")
    for k in ("image", "organ_map"):
        table[k] = [str(data / f) for f in table[k]]
    text = load(data / "text")
    model = build_model(p, p.arms[arm].model_dump(by_alias=True), text, 0)
    train(model, ImageReportDataset(table, p, text, 0), p, 0, folder)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_file(model.state_dict(), folder / "weights.safetensors")
