"""Peak memory of stages with N and with 2 N cases, each run in a process of its own.

`python benchmarks/memory.py --save` writes benchmarks/memory.json, which nbs/96_cost.ipynb compares
with its formulas. The inputs are made beforehand in another process. All cases of a stage share one
volume on disk, which is read for each case; their tokens and features are random. Peak is VmHWM of
/proc/self/status, in MiB; `start` is that value when the modules of the stage are imported.

`--activations` counts the bytes that a forward pass of the segmentation models keeps for the
backward pass, on PyTorch's device `meta`, without the attention weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = dict(report=300, segment=24, embed=128, retrieve=10_000, classify=20_000)  # N
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2  # of ten cases


def resident_peak() -> float:  # MB
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def cohort(n: int, **columns):  # a cohort table of n cases
    import pandas as pd

    names = [f"case{i}" for i in range(n)]
    split = [SPLITS[i % len(SPLITS)] for i in range(n)]
    return pd.DataFrame(dict(case=names, scan=names, patient=names, split=split, **columns))


def texts(n: int) -> list[str]:  # n reports of three sentences
    from asap.abnormalities import ABNORMALITIES
    from asap.core import rng

    r, names = rng("memory"), list(ABNORMALITIES)
    return [" ".join(f"There is {k.lower()}." for k in r.choice(names, 3)) for _ in range(n)]


def make_volume(folder: Path) -> None:
    import numpy as np

    from asap.data.cohorts.luna16 import lung_labels
    from asap.data.volumes import write
    from asap.phantom.abnormalities import synthesize_chest

    c = synthesize_chest(("memory", 0), (48, 48, 24), (7.0, 7.0, 14.0))
    affine = c.affine @ np.diag([1 / 3, 1 / 3, 1 / 3, 1])
    fine = np.ones((3, 3, 3), np.int16)  # 144 x 144 x 72 voxels
    write(np.kron(c.hu, fine), affine, folder / "volume.nii")
    write(np.kron(lung_labels(c.labels), fine.astype(np.uint8)), affine, folder / "mask.nii.gz")


def make_report(folder: Path, n: int) -> None:
    import numpy as np

    from asap.params import load_params
    from asap.text.tokens import train_wordpiece_tokenizer

    p, r = load_params(), np.random.default_rng(0)
    patches = np.prod([s // q for s, q in zip(p.volumes.roi_size, p.model.patch_size)])
    shape = (n, 1 + int(patches), p.model.embed_dim)
    out = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float16, shape)
    for i in range(n):
        out[i] = r.normal(size=shape[1:])
    train_wordpiece_tokenizer(texts(n), 200, folder / "tokenizer")


def run_report(folder: Path, n: int) -> None:
    import numpy as np
    from sklearn.preprocessing import StandardScaler  # noqa: F401, part of `start`
    from transformers import AutoTokenizer, BertConfig, BertModel

    from asap.params import load_params
    from asap.tasks import report
    from asap.text.encoder import TextEncoder

    p = load_params()
    changed = dict(token_pool=[1, 1, 1], steps=20, epochs=100, embed_dim=32, num_layers=1)
    changed |= dict(num_heads=2, max_length=32, num_beams=1, batch_size=8)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes), add_pooling_layer=False)
    grid = [s // q for s, q in zip(p.volumes.roi_size, p.model.patch_size)]
    table = cohort(n, findings=texts(n), impression="")
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    config = p.report.model_copy(update=changed)
    yield
    text = TextEncoder(bert, tokenizer, 64)
    names = "report_ct_rate", "ct_rate"
    report.run(*names, table, tokens, table, "asap", grid, text, config, 0, folder / "resume")


def run_segment(folder: Path, n: int) -> None:
    import monai.inferers
    import monai.losses
    import monai.metrics
    import monai.transforms  # noqa: F401, part of `start`

    from asap.params import load_params
    from asap.tasks import segment

    p = load_params()
    row = dict(low_label=False, steps=8, batch_size=2, lr=0.001)
    row |= dict(hu_window=None, roi_size=[48, 48, 24])
    changed = dict(feature_size=4, num_validations=1, overlap=0.25, datasets=dict(luna16=row))
    settings = dict(
        segment=p.segment.model_dump() | changed,
        volumes=dict(spacing=[7 / 3, 7 / 3, 14 / 3], roi_size=[48, 48, 24], hu_range=[-1000, 1000]),
        phantoms=dict(luna16=True),
    )
    files = dict(image=str(folder / "volume.nii"), target_map=str(folder / "mask.nii.gz"))
    table = cohort(n, **files, findings="", impression="", organ_map="")
    yield
    segment.run_all("unet", ["segment_luna16"], dict(luna16=table), settings, folder)


def run_embed(folder: Path, n: int) -> None:
    from asap.model.vit import ViT3D
    from asap.params import load_params
    from asap.pretrain import embed
    from asap.store import store_of

    p = load_params()
    m, size, hu = p.model, p.volumes.roi_size, p.volumes.hu_range
    vit = ViT3D(size, m.patch_size, m.embed_dim, 1, m.num_heads, m.stem.model_dump())
    table, store = cohort(n, image=str(folder / "volume.nii")), store_of(folder / "build").create()
    folders = {k: folder / "build" / k / "vit" for k in ("features", "tokens")}
    yield
    embed.embed_cohort(vit, table, "ct_rate", folders, folder / "e", size, hu, {}, store)


def run_retrieve(folder: Path, n: int) -> None:
    import numpy as np

    from asap.params import load_params
    from asap.tasks import retrieve

    p, r = load_params(), np.random.default_rng(0)
    config = p.retrieve.model_copy(update=dict(steps=20, batch_size=64))
    f, t = (r.normal(size=(n, p.model.embed_dim)).astype(np.float32) for _ in range(2))
    findings = [f"Report {i}." for i in range(n)]
    table = cohort(n, findings=findings, impression="")
    yield
    retrieve.fit_predict(f, t, table, config, 0, stranger=True)


def run_classify(folder: Path, n: int) -> None:
    import numpy as np
    from sklearn.linear_model import LogisticRegression  # noqa: F401, part of `start`

    from asap.params import load_params
    from asap.tasks import probe

    r = np.random.default_rng(0)
    f = r.normal(size=(n, load_params().model.embed_dim)).astype(np.float32)
    table = cohort(n).assign(**{"label:Emphysema": r.integers(0, 2, n).astype(float)})
    yield
    chosen = (table.split == "train").to_numpy()
    probe.fit_predict(f, table, chosen, ["label:Emphysema"])


def saved_bytes_per_voxel() -> dict:  # of the segmentation models at the paper's size, fp32
    import torch

    from asap.model.vit import ViT3D
    from asap.params import load_params
    from asap.tasks.unetr import Unetr, build_unet

    p, size = load_params("params/paper.yaml"), (96, 96, 48)
    m, width = p.model, p.segment.feature_size
    with torch.device("meta"):
        vit = ViT3D(size, m.patch_size, m.embed_dim, m.depth, m.num_heads)
        models = dict(unetr=Unetr(vit, 4, width), unet=build_unet(4, size, width))
        x = torch.zeros(1, 1, *size)
    return {k: round(saved_bytes(model, x) / x.numel()) for k, model in models.items()}


def saved_bytes(model, x) -> int:
    import torch

    held = [*model.parameters(), *model.buffers()]
    skip, seen = {v.untyped_storage()._cdata for v in held}, {}

    def pack(t):
        storage = t.untyped_storage()
        attention = t.ndim in (3, 4) and t.shape[-1] == t.shape[-2]
        if storage._cdata not in skip and not attention:
            seen[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    del out
    return sum(seen.values())


def measure(stage: str, folder: Path, n: int) -> None:
    "Run one stage in this process and print its peak"
    import torch

    torch.set_num_threads(1)
    steps = globals()[f"run_{stage}"](folder, n)
    next(steps)
    start = resident_peak()
    next(steps, None)
    print(json.dumps(dict(start=round(start, 1), peak=round(resident_peak(), 1))))


def call(*arguments: object) -> str:  # the last line of a new process
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return (done.stdout.strip().splitlines() or [""])[-1]


def compare(stage: str, n: int) -> dict:  # cases, start_mb, peak_mb, growth
    found = []
    for cases in (n, 2 * n):
        with tempfile.TemporaryDirectory() as t:
            call("--make", stage, "--folder", t, "--cases", cases)
            found.append(json.loads(call("--run", stage, "--folder", t, "--cases", cases)))
    a, b = (k["peak"] for k in found)
    growth = round(b / a - 1, 4)
    return dict(cases=[n, 2 * n], start_mb=found[0]["start"], peak_mb=[a, b], growth=growth)


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--stages", nargs="*", default=list(CASES), choices=list(CASES))
    a.add_argument("--scale", type=int, default=1, help="factor of the numbers of cases")
    a.add_argument("--activations", action="store_true", help="nothing else is measured")
    a.add_argument("--save", action="store_true", help="write benchmarks/memory.json")
    for hidden in ("--make", "--run", "--folder", "--cases"):
        a.add_argument(hidden, help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.make:
        if a.make in ("segment", "embed"):
            make_volume(Path(a.folder))
        elif a.make == "report":
            make_report(Path(a.folder), int(a.cases))
        return
    if a.run:
        return measure(a.run, Path(a.folder), int(a.cases))
    file = Path(__file__).with_suffix(".json")
    out = json.loads(file.read_text()) if file.exists() else dict(stages={})
    if a.activations:
        out["saved_bytes_per_voxel"] = saved_bytes_per_voxel()
    else:
        out["stages"] |= {s: compare(s, CASES[s] * a.scale) for s in a.stages}
    print(json.dumps(out, indent=1))
    if a.save:
        file.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
