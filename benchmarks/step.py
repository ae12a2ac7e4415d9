"""Time and memory of one training step of `asap` at the paper's size, compared with the released
recipe at the same widths and depths, in alternation, and time of a step of the built-in size.
Seconds depend on the machine; compare the ratios. bf16 is timed where the CPU supports it natively.

A run's frozen text encoder encodes each sentence once and caches it (`asap.text.encoder`); a second
variant encodes all sentences in every step. The released code pads reports of 250 and 312 tokens to
512 and encodes the padding too; ours, of 312, pads to the longest of a batch, as its loader does.

usage: python benchmarks/step.py [--repeat 5] [--threads 2] [--save]   (writes benchmarks/step.json)
       python benchmarks/step.py --profile   (profile of our step at the paper's size)
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import plain
import torch
import torch.nn.functional as F

from asap.core import log_message, project_root
from asap.model.asap import build_asap, build_config
from asap.params import load_params
from asap.train import resolve_precision, retain_freed_memory

DTYPES = (
    dict(fp32=torch.float32, bf16=torch.bfloat16)
    if resolve_precision() == "bf16"
    else dict(fp32=torch.float32)
)  # the fast ones, the fastest last
TOKENS = 512  # of a report with padding
REAL = 312  # of a report without padding; `plain` encodes one of 250 tokens and one of 312
SENTENCES = 12  # of a report


TOKEN_KEYS = (
    "input_ids",
    "token_to_sentence",
    "padding_mask",
    "masked_input_ids",
    "mlm_labels",
)


class Ours(torch.nn.Module):
    """The model of an arm with its frozen text encoder, which encodes the masked report in each
    step, and the sentences once, or in each step with `anew`"""

    def __init__(self, p, arm="asap", vocab=30522, text=None, anew=False):
        super().__init__()
        from transformers import BertConfig, BertModel

        self.text = (
            BertModel(BertConfig(**text or {}, vocab_size=vocab), add_pooling_layer=False)
            .eval()
            .requires_grad_(False)
        )
        self.anew, self.known = anew, None
        self.model = build_asap(
            build_config(p, p.arms[arm].model_dump(), self.text.config.hidden_size, vocab)
        )

    def forward(self, b):
        longest = int((~b["padding_mask"]).sum(1).max())  # as `asap.pretrain.batches.collate` pads
        b = dict(b, **{k: b[k][:, :longest] for k in TOKEN_KEYS})
        mask, of = (~b["padding_mask"]).long(), b["token_to_sentence"]
        with torch.no_grad():
            if self.anew or self.known is None:
                hidden = self.text(b["input_ids"], attention_mask=mask).last_hidden_state.float()
                out = torch.zeros(len(hidden), SENTENCES, hidden.shape[-1]).scatter_add(
                    1,
                    of.clamp(min=0)[..., None].expand_as(hidden),
                    hidden * (of >= 0)[..., None],
                )
                self.known = F.normalize(out, dim=-1)
            words = self.text(b["masked_input_ids"], attention_mask=mask).last_hidden_state
        return self.model(dict(b, token_embeds=words, sentence_embeds=self.known))[0]


def batch(p, n, vocab, tokens=TOKENS, real=REAL):
    "Random volumes and reports in the shape of real ones"
    g = torch.Generator().manual_seed(0)
    patches = int(
        torch.tensor([s // q for s, q in zip(p.volumes.roi_size, p.model.patch_size)]).prod()
    )
    ids = torch.randint(5, vocab, (n, tokens), generator=g)
    at = torch.arange(tokens).expand(n, -1)
    of = torch.where(
        (at > 0) & (at < real - 1), (at * SENTENCES // real).clamp(max=SENTENCES - 1), -1
    )
    hide = (torch.rand(n, tokens, generator=g) < 0.75) & (of >= 0)
    return dict(
        image=torch.rand(n, 1, *p.volumes.roi_size, generator=g) * 2 - 1,
        organ_fractions=torch.rand(n, patches, 9, generator=g).softmax(-1),
        organ_valid=torch.ones(n, patches).bool(),
        patch_order=torch.rand(n, patches, generator=g).argsort(1),
        input_ids=ids,
        token_to_sentence=of,
        padding_mask=at >= real,
        masked_input_ids=ids.masked_fill(hide, 4),
        mlm_labels=ids.masked_fill(~hide, -100),
        sentence_mask=torch.ones(n, SENTENCES).bool(),
    )


def step(model, opt, b, dtype):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        value = model(b)
    value.backward()
    torch.nn.utils.clip_grad_norm_([q for q in model.parameters() if q.grad is not None], 1.0)
    opt.step()
    opt.zero_grad()


def ours(p, n=1, vocab=30522, text=None, anew=False, **k):
    model = Ours(p, vocab=vocab, text=text, anew=anew)
    opt = torch.optim.AdamW(
        [q for q in model.parameters() if q.requires_grad],
        1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=True,
    )
    b = batch(p, n, vocab, **k)
    return model, lambda dtype: step(model, opt, b, dtype)


def released():
    model = plain.Plain()
    opt, b = plain.optimiser(model), model.batch(0)
    return model, lambda dtype: plain.step(
        model, opt, b, torch.bfloat16 if dtype == "bf16" else torch.float32
    )


def paper():
    return load_params(project_root() / "params/paper.yaml")


def memory(which, dtype) -> float:  # GB
    "Peak memory of one step beyond weights, gradients and optimizer state, in a separate process"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        f"import step; print(step.peak({which!r}, {dtype!r}))"
    )
    return float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # bytes


def peak(which, dtype):
    torch.set_num_threads(2)
    bare, top = resident(), [0]
    model, run = ours(paper()) if which == "ours" else released()
    run(dtype)  # now the optimizer's state exists
    held = sum(
        q.numel() * q.element_size() * (4 if q.requires_grad else 1) for q in model.parameters()
    )  # weight, gradient, two moments
    done = threading.Event()

    def look():
        while not done.wait(0.005):
            top[0] = max(top[0], resident())

    thread = threading.Thread(target=look)
    thread.start()
    run(dtype)
    done.set()
    thread.join()
    return (top[0] - bare - held) / 1e9


def products(threads) -> dict:  # GFLOP/s of this machine's matrix products
    out = {}
    for name, dtype in DTYPES.items():
        a, b = torch.randn(2745, 768).to(dtype), torch.randn(3072, 768).to(dtype)
        best = min(clock(partial(F.linear, a, b)) for _ in range(20))
        out[name] = round(2 * 2745 * 768 * 3072 / best / 1e9)
    return out


def clock(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--repeat", type=int, default=5)
    a.add_argument("--threads", type=int, default=2)
    a.add_argument("--save", action="store_true")
    a.add_argument("--profile", action="store_true")
    a.add_argument("--no-memory", action="store_true")
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    retain_freed_memory()  # as `fit` does; in one process the plain arm has it too
    if a.profile:
        return profile()
    steps = {
        "ours": ours(paper())[1],
        "ours, sentences anew": ours(paper(), anew=True)[1],
        "released": released()[1],
    }
    best = {(w, d): float("inf") for w in steps for d in DTYPES}
    for r in range(a.repeat + 1):  # the first turn warms up
        for which, dtype in best:
            t = clock(partial(steps[which], dtype))
            if r:
                best[which, dtype] = min(best[which, dtype], t)
            log_message(f"turn {r}: {which} {dtype} {t:.2f} s")
    fastest = {w: min(best[w, d] for d in DTYPES) for w in steps}
    out = dict(
        seconds={f"{w} {d}": round(t, 3) for (w, d), t in best.items()},
        ratio=round(fastest["ours"] / fastest["released"], 3),
        ratio_anew=round(fastest["ours, sentences anew"] / fastest["released"], 3),
        ratio_fp32=round(best["ours", "fp32"] / best["released", "fp32"], 3),
        products_gflops=products(a.threads),
        threads=a.threads,
    )
    del steps
    if not a.no_memory:
        out["memory_gb"] = {
            f"{w} {d}": round(memory(w, d), 2) for w in ("ours", "released") for d in DTYPES
        }
        out["memory_ratio"] = {
            d: round(out["memory_gb"][f"ours {d}"] / out["memory_gb"][f"released {d}"], 3)
            for d in DTYPES
        }
    p = load_params(project_root() / "params.yaml")
    small = ours(
        p,
        16,
        1000,
        dict(
            hidden_size=p.text.embed_dim,
            num_hidden_layers=p.text.num_layers,
            num_attention_heads=p.text.num_heads,
            intermediate_size=4 * p.text.embed_dim,
        ),
        tokens=160,
        real=140,
    )[1]
    out["built_in_batch_16"] = {
        d: round(min(clock(partial(small, d)) for _ in range(8)), 3) for d in DTYPES
    }
    print(json.dumps(out, indent=1))
    if a.save:
        Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")


def profile():
    from torch.profiler import ProfilerActivity, profile as record

    run, fastest = ours(paper())[1], [*DTYPES][-1]
    run(fastest)
    with record(activities=[ProfilerActivity.CPU]) as r:
        run(fastest)
    print(
        r.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=44
        )
    )


if __name__ == "__main__":
    main()
