"""Processor time and peak memory of what touches every case, with 1,000 to 50,000 made-up cases.

`python benchmarks/scale.py` writes benchmarks/scale.csv, which nbs/96a_scale.ipynb draws. A row
that is there is not computed again; `--functions` and `--sizes` choose rows, `--again` computes
them anew. Tables, reports, features, manifests and predictions are made up; the functions are the
library's. Each function runs at each size in a process of its own, forked after a run with few
cases that imports what it needs. `seconds` are those of the processor in that process, without
`system_seconds`, which the system takes to give it memory and files; `peak_mb` is its largest
resident memory above that at the start of the call, when the inputs exist, and `process_mb` the
whole of it. The exponents are slopes of a line through the logarithms of the three largest sizes;
there is none where the largest size takes less than `LEAST_SECONDS` or `LEAST_MB`.
"""

import argparse
import csv
import ctypes
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

SIZES = (1_000, 5_000, 20_000, 50_000)
WARM = 60  # cases of the run before
REPLICATES = 1000  # of the bootstrap, as params.yaml
LEAST_SECONDS, LEAST_MB = 0.1, 10
FUNCTIONS: dict[str, tuple[str, Callable, int]] = {}  # name -> group, generator, largest size
COLUMNS = "group function n seconds system_seconds peak_mb process_mb".split()
COLUMNS += ["time_exponent", "memory_exponent"]


def measured(group: str, name: str, most: int = SIZES[-1]) -> Callable:
    def add(f: Callable) -> Callable:
        FUNCTIONS[name] = (group, f, most)
        return f

    return add


def names(n: int) -> list[str]:
    return [f"train_{i}_a_1" for i in range(n)]


def split_of(i: int) -> str:  # as CT-RATE: 6 % are test cases
    return "test" if i % 100 < 6 else "val" if i % 100 < 15 else "train"


def reports(n: int) -> list[str]:  # two cases share a scan and its report
    from asap.core import rng
    from asap.phantom.words import POSITIVE_TEMPLATES, synthesize_report

    def finding(name, r):
        where = dict(side="left lung", place="left lower lobe", count=int(r.integers(1, 4)))
        return SimpleNamespace(name=name, size_mm=9.0, severity=float(r.random()), **where)

    said = []
    for i in range(min(n, 1000)):
        r = rng("scale", i)
        some = [finding(str(k), r) for k in r.choice(list(POSITIVE_TEMPLATES), 4, False)]
        chest = SimpleNamespace(findings=some, has={f.name for f in some}.__contains__)
        said.append(synthesize_report(chest, i).findings)
    return [f"{said[i // 2 % len(said)]} Series {i // 2} was compared." for i in range(n)]


def cohort(n: int, texts: bool = False):  # a cohort table
    import numpy as np
    import pandas as pd

    from asap.abnormalities import ABNORMALITIES

    r, case = np.random.default_rng(0), names(n)
    scan = [case[i // 2 * 2] for i in range(n)]
    split = [split_of(i // 2) for i in range(n)]
    t = pd.DataFrame(dict(case=case, scan=scan, patient=scan, split=split))
    t = t.assign(image=[f"volumes/{c}.nii" for c in case], organ_map="", target_map="")
    t = t.assign(findings=reports(n) if texts else "", impression="", time_days=None, event=None)
    labels = r.integers(0, 2, (n, len(ABNORMALITIES))).astype(float)
    return t.assign(**{f"label:{k}": labels[:, j] for j, k in enumerate(ABNORMALITIES)})


def predictions(n: int, labels: list[str], arms: tuple[str, ...] = ("asap",), **more):
    "Predictions of a task with labels, all labels given"
    import numpy as np
    import pandas as pd

    r, t, rows = np.random.default_rng(0), cohort(n)[["case", "scan", "patient"]], []
    for arm in arms:
        for name in labels:
            truth = r.integers(0, 2, n // 2 + 1).astype(float)[np.arange(n) // 2]
            rows.append(t.assign(label=name, truth=truth, probability=r.random(n), arm=arm))
    keys = dict(task="classify_ct_rate", fraction=1.0, seed=0, threshold=0.5, num_labeled=n)
    return pd.concat(rows, ignore_index=True).assign(**(keys | more))


@measured("tables", "table.save")
def save_table(folder: Path, n: int) -> Iterator:
    from asap.data import table

    t = cohort(n, texts=True)
    yield
    table.save(t, None, folder, "ct_rate", folder)


@measured("tables", "table.load")
def load_table(folder: Path, n: int) -> Iterator:
    from asap.data import table

    table.save(cohort(n, texts=True), None, folder, "ct_rate", folder)
    yield
    table.load(folder / "ct_rate.parquet", folder)


@measured("tables", "table.find_duplicates")
def duplicates(folder: Path, n: int) -> Iterator:
    from asap.data.table import find_duplicates

    t = cohort(n, texts=True)
    t = t.assign(scan=t.case)  # half of the reports are duplicates
    voxels = {c: f"{i:016x}" for i, c in enumerate(t.case)}
    yield
    find_duplicates(t, voxels)


@measured("tables", "splits.hold_out")
def hold_out(folder: Path, n: int) -> Iterator:
    from asap.data.splits import hold_out

    t = cohort(n)
    yield
    hold_out(t, 0.1, 0)


@measured("tables", "splits.label_subsets")
def label_subsets(folder: Path, n: int) -> Iterator:
    from asap.data.splits import label_subsets

    t = cohort(n)
    yield
    label_subsets(t, [0.01, 0.1, 1.0], 0)


@measured("tables", "splits.limit_train")
def limit_train(folder: Path, n: int) -> Iterator:
    from asap.data.splits import limit_train

    t = cohort(n)
    yield
    limit_train(t, 2000)


@measured("tables", "core.Quarantine")
def quarantine(folder: Path, n: int) -> Iterator:
    from asap.core import Quarantine

    cases = names(n)
    yield
    bad = Quarantine(folder / "quarantine.csv")
    for c in cases:
        bad.add(c, ValueError(f"{c}: 3 slices are missing (1 gap); expected a slice every 1.5 mm"))
    bad.save()


def manifest_rows(n: int) -> list[dict]:
    def digest(i: int) -> str:
        return hashlib.sha256(str(i).encode()).hexdigest()

    return [
        dict(name=f"{c}.nii", case=c, key=digest(-i)[:32], hash=digest(i), size=12_672_352)
        | dict(voxels=digest(i)[:16])
        for i, c in enumerate(names(n))
    ]


@measured("manifests", "store.write_manifest")
def write_manifest(folder: Path, n: int) -> Iterator:
    from asap.store import write_manifest

    rows = manifest_rows(n)
    yield
    write_manifest(rows, folder)


@measured("manifests", "store.find_row, every case")
def find_rows(folder: Path, n: int) -> Iterator:
    from asap.store import find_row, write_manifest

    write_manifest(manifest_rows(n), folder)
    paths = [folder / f"{c}.nii" for c in names(n)]
    yield
    for path in paths:
        find_row(path)


def project_with_store(folder: Path, n: int):  # n objects of some bytes, records, a manifest
    from asap.store import Entry, StoredFile, manifest_row, record_name, store_of, write_manifest

    store, rows = store_of(folder / "build").create(), []
    for i, c in enumerate(names(n)):
        data = str(i).encode()
        f = StoredFile(hashlib.sha256(data).hexdigest(), len(data), ".nii")
        e = Entry(dict(image=f.hash), dict(volume=f), dict(warnings=[]))
        for name, content in ((f.name, data), (record_name(e.key), e.text().encode())):
            path = store.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        rows.append(manifest_row(f"{c}.nii", c, e, "volume"))
    write_manifest(rows, folder / "build/volumes/ct_rate")
    return store


@measured("manifests", "store.verify")
def verify(folder: Path, n: int) -> Iterator:
    from asap.store import verify

    store = project_with_store(folder, n)
    yield
    assert not verify(store)


@measured("manifests", "store.unreachable")
def unreachable(folder: Path, n: int) -> Iterator:
    from asap.store import unreachable

    store = project_with_store(folder, n)
    yield
    assert not unreachable(store, [folder], 0)


@measured("manifests", "store.drop_unmet_manifests")
def unmet(folder: Path, n: int) -> Iterator:
    from asap.store import drop_unmet_manifests

    project_with_store(folder, n)
    yield
    assert not drop_unmet_manifests(folder)


@measured("corpus and pre-training", "corpus.load_corpus")
def load_corpus(folder: Path, n: int) -> Iterator:
    import numpy as np

    from asap.core import write_json
    from asap.data import table
    from asap.data.corpus import load_corpus
    from asap.data.volumes import write
    from asap.store import write_manifest

    small = np.zeros((8, 8, 4), np.int16)
    write(small, np.eye(4), folder / "a.nii")
    write(small.astype(np.uint8), np.eye(4), folder / "a.nii.gz")
    cases, rows = names(n), manifest_rows(n)
    for kind, suffix in (("volumes", ".nii"), ("organs", ".nii.gz")):
        (folder / "build" / kind / "ct_rate").mkdir(parents=True)
        for c in cases:
            os.link(folder / f"a{suffix}", folder / "build" / kind / f"ct_rate/{c}{suffix}")
    write_manifest(rows, folder / "build/volumes/ct_rate")
    t = cohort(n, texts=True)
    files = dict(image=("volumes", ".nii"), organ_map=("organs", ".nii.gz"))
    paths = {k: [f"build/{d}/ct_rate/{c}{s}" for c in cases] for k, (d, s) in files.items()}
    out = folder / "build/cohorts/ct_rate"
    table.save(t.assign(**paths), None, out, "ct_rate", folder)
    write_json(dict(there=True, phantoms=False), out / "status.json")
    yield
    load_corpus(["ct_rate"], folder)


@measured("corpus and pre-training", "corpus.corpus_digest")
def digest(folder: Path, n: int) -> Iterator:
    from asap.data.corpus import corpus_digest

    t = cohort(n, texts=True).assign(voxels="", organs="", mean_hu=0.5, mean_organ=0.5)
    yield
    corpus_digest(t)


def dataset(folder: Path, table):  # of pre-training, the built-in params
    from transformers import BertTokenizer

    from asap.core import resource_path
    from asap.params import load_params
    from asap.pretrain.batches import ImageReportDataset

    words = BertTokenizer.from_pretrained(resource_path("weights/text"))
    text = SimpleNamespace(tokenizer=words, max_length=512)
    return ImageReportDataset(table, load_params(), text, 0, augment=False)


@measured("corpus and pre-training", "ImageReportDataset, reports")
def read_reports(folder: Path, n: int) -> Iterator:
    t = cohort(n, texts=True)
    dataset(folder, t[:1])
    yield
    dataset(folder, t)


@measured("corpus and pre-training", "positional_baseline, with maps of 96 x 96 x 48", 5000)
def positional_baseline(folder: Path, n: int) -> Iterator:
    import numpy as np

    from asap.data.volumes import write
    from asap.params import load_params
    from asap.pretrain.pretrain import positional_baseline

    shape = load_params().volumes.roi_size
    organs = np.indices(shape).sum(0) // 24 % 9
    write(organs.astype(np.uint8), np.eye(4), folder / "organs.nii.gz")
    data = dataset(folder, cohort(n).assign(organ_map=str(folder / "organs.nii.gz")))
    yield
    positional_baseline(data, folder)


@measured("corpus and pre-training", "positional_baseline, mean and median of 2,744 patches")
def mean_and_median(folder: Path, n: int) -> Iterator:
    import numpy as np

    from asap.pretrain.pretrain import _mean_and_median

    some = np.random.default_rng(0).random((97, 2744, 9), np.float32)
    yield
    _mean_and_median(some[i % len(some)] for i in range(n))


def text_encoder():  # the real class; its network gives the same features to every token
    import torch
    from transformers import BertTokenizer

    from asap.core import resource_path
    from asap.text.encoder import TextEncoder

    class Ones(torch.nn.Module):
        config = SimpleNamespace(hidden_size=768)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, ids, attention_mask):
            return SimpleNamespace(last_hidden_state=torch.ones(*ids.shape, 768))

    return TextEncoder(Ones(), BertTokenizer.from_pretrained(resource_path("weights/text")), 512)


@measured("text and features", "retrieve.report_features")
def report_features(folder: Path, n: int) -> Iterator:
    from asap.tasks.retrieve import report_features

    t, text = cohort(n, texts=True), text_encoder()
    yield
    report_features(t, text)


@measured("text and features", "pretrain.embed_sentences")
def embed_sentences(folder: Path, n: int) -> Iterator:
    from asap.pretrain.pretrain import embed_sentences

    said, text = reports(n), text_encoder()
    yield
    embed_sentences(text, {s for r in said for s in r.split(". ")}, folder)


@measured("text and features", "embed.save and embed.load")
def features(folder: Path, n: int) -> Iterator:
    import numpy as np

    from asap.pretrain import embed

    f, t = np.random.default_rng(0).random((n, 768), np.float32), cohort(n)
    yield
    embed.save(f, t, folder, "ct_rate")
    embed.load(folder, "ct_rate")


@measured("text and features", "layer_norm and standardize_features")
def standardize(folder: Path, n: int) -> Iterator:
    import numpy as np

    from asap.tasks.features import layer_norm, standardize_features

    f = np.random.default_rng(0).random((n, 768), np.float32)
    yield
    standardize_features(layer_norm(f), np.arange(n) % 10 < 7)


@measured("retrieval", "retrieve.fit_predict, 6 % test cases")
def fit_retrieval(folder: Path, n: int) -> Iterator:
    import numpy as np

    from asap.params import load_params
    from asap.tasks.retrieve import fit_predict

    r = np.random.default_rng(0)
    f, t = (r.standard_normal((n, 768), np.float32) for _ in range(2))
    config = load_params().retrieve.model_copy(update=dict(steps=20, batch_size=64))
    table = cohort(n, texts=True)
    yield
    fit_predict(f, t, table, config, 0)


def embedded_pairs(n: int) -> tuple:  # (n,128) of both sides, table, number of each report
    import torch

    from asap.tasks.retrieve import report_ids

    torch.manual_seed(0)
    u, v = (torch.nn.functional.normalize(torch.randn(n, 128), dim=1) for _ in range(2))
    table = cohort(n, texts=True)
    return u, v, table, report_ids(table)


@measured("retrieval", "retrieve.rank_embeddings, every case a candidate")
def rank_all(folder: Path, n: int) -> Iterator:
    from asap.tasks.retrieve import rank_embeddings

    u, v, table, number = embedded_pairs(n)
    yield
    rank_embeddings(u, v, table, number)


@measured("retrieval", "retrieve.rank_embeddings, 3,039 candidates")
def rank_pool(folder: Path, n: int) -> Iterator:
    from asap.tasks.retrieve import rank_embeddings

    u, v, table, number = embedded_pairs(n)
    yield
    for i in range(0, n, 3039):
        part = slice(i, i + 3039)
        rank_embeddings(u[part], v[part], table[part].reset_index(drop=True), number[part])


@measured("retrieval", "retrieve.metrics")
def retrieval_metrics(folder: Path, n: int) -> Iterator:
    import numpy as np
    import pandas as pd

    from asap.tasks.retrieve import DIRECTIONS, metrics

    t = cohort(n)[["case", "scan", "patient"]].assign(num_relevant=2, pool_size=n)
    t["rank"] = np.random.default_rng(0).permutation(n) + 1.0
    both = pd.concat([t.assign(direction=d) for d in DIRECTIONS], ignore_index=True)
    yield
    metrics(both, REPLICATES, "retrieve_ct_rate")


@measured("predictions", "metrics.bootstrap_weights, drawn together")
def draws(folder: Path, n: int) -> Iterator:
    from asap.tasks.metrics import JointDraws, bootstrap_weights

    patients = cohort(n).patient
    joint = JointDraws("ct_rate", tuple(sorted(set(patients))))
    yield
    bootstrap_weights(patients.to_numpy(), REPLICATES, joint)


@measured("predictions", "classify.metrics, 18 labels")
def classify_metrics(folder: Path, n: int) -> Iterator:
    from asap.abnormalities import ABNORMALITIES
    from asap.tasks.classify import metrics

    d = predictions(n, list(ABNORMALITIES))
    yield
    metrics(d, REPLICATES, "classify_ct_rate")


@measured("predictions", "prognosis.metrics, 12 % died")
def prognosis_metrics(folder: Path, n: int) -> Iterator:
    import numpy as np
    import pandas as pd

    from asap.tasks.prognosis import HORIZON_DAYS, metrics

    r, t = np.random.default_rng(0), cohort(n)[["case", "scan", "patient"]]
    time, event = r.integers(1, 1500, n).astype(float), r.random(n) < 0.5
    t = t.assign(time=time, event=event.astype(float), risk=r.random(n), ipcw=1.0)
    rows = [
        t.assign(label=k, truth=(event & (time <= day)).astype(float), probability=r.random(n))
        for k, day in HORIZON_DAYS.items()
    ]
    d = pd.concat(rows, ignore_index=True).assign(task="prognosis_inspect", arm="asap")
    yield
    metrics(d, REPLICATES, "prognosis_inspect")


def text_scores(n: int) -> dict:  # columns of scored texts
    import numpy as np

    from asap.text.scores import BLEU_COLUMNS, METRIC_NAMES

    r = np.random.default_rng(0)
    return {k: r.integers(20, 90, n).astype(float) for k in BLEU_COLUMNS} | {
        k: r.random(n) for k in METRIC_NAMES
    }


@measured("predictions", "report.metrics")
def report_metrics(folder: Path, n: int) -> Iterator:
    from asap.tasks.report import metrics

    d = cohort(n)[["case", "scan", "patient"]].assign(**text_scores(n))
    d = d.assign(truth="Atelectasis;Lung nodule", predicted="Lung nodule;Consolidation")
    yield
    metrics(d, REPLICATES, "report_ct_rate")


@measured("predictions", "vqa.metrics, a question a case")
def vqa_metrics(folder: Path, n: int) -> Iterator:
    import numpy as np

    from asap.tasks.vqa import QUESTION_KINDS, SCORE_COLUMNS, metrics

    r = np.random.default_rng(0)
    d = cohort(n)[["case", "patient"]].assign(**text_scores(n))
    d = d.assign(**{k: r.random(n) for k in SCORE_COLUMNS if k not in d})
    d = d.assign(kind=[QUESTION_KINDS[i % 5] for i in range(n)])
    yield
    metrics(d, REPLICATES, "vqa_radgenome")


@measured("predictions", "zero-shot scores, 18 labels")
def zero_shot(folder: Path, n: int) -> Iterator:
    import numpy as np
    import pandas as pd
    import torch

    from asap.abnormalities import ABNORMALITIES
    from asap.tasks import vocabulary

    t, labels = cohort(n), list(ABNORMALITIES)
    model = SimpleNamespace(alignment=SimpleNamespace(similarity_scale=torch.tensor(14.0)))
    said = np.random.default_rng(0).random((n, len(labels), 2))
    keys = dict(task="zero_shot_ct_rate", arm="asap", fraction=1.0, seed=0)
    yield
    probability = vocabulary.zero_shot_proba(model, said)
    rows = vocabulary._zero_shot_predictions(t, labels, said, probability, **keys)
    vocabulary.add_mismatched_control(pd.concat(rows, ignore_index=True), "asap", 0)


@measured("tables", "tables.write_tables, 2 arms, 4 labels")
def write_tables(folder: Path, n: int) -> Iterator:
    import numpy as np
    import pandas as pd

    from asap.abnormalities import ABNORMALITIES
    from asap.study.tables import write_tables

    d = predictions(n, list(ABNORMALITIES)[:4], ("asap", "clip"))
    r = np.random.default_rng(0)
    acquired = pd.DataFrame(dict(case=names(n), slice_mm=r.choice([1.0, 1.5, 3.0], n)))
    acquired = acquired.assign(pixel_mm=0.7, kernel="", contrast=r.integers(0, 2, n))
    empty = dict.fromkeys(("segment", "prognosis", "vocabulary", "retrieve"), d[:0])
    yield
    write_tables(
        dict(classify=d) | empty,
        dict(classify=d[d.arm == "clip"].assign(arm="labels dealt out anew")),
        dict(ct_rate=acquired),
        {},
        "asap",
        [],
        REPLICATES,
        0.95,
        folder,
    )


def status(key: str) -> float:  # MB, of /proc/self/status
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) / 1024


def start_of_peak() -> float:  # MB; what is free goes back to the system, and the peak starts anew
    import gc

    import pyarrow

    gc.collect()
    pyarrow.default_memory_pool().release_unused()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def warm_up(name: str) -> None:
    "Import what a function needs"
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="asap-") as folder:
        list(FUNCTIONS[name][1](Path(folder), WARM))


def measure(name: str, n: int) -> dict:
    "Run one function in this process; the pages of libraries that it needs are there before"
    warm_up(name)
    with tempfile.TemporaryDirectory(prefix="asap-") as folder:
        steps = FUNCTIONS[name][1](Path(folder), n)
        next(steps)
        start, before = start_of_peak(), getrusage(RUSAGE_SELF)
        next(steps, None)
        after, peak = getrusage(RUSAGE_SELF), status("VmHWM")
    out = dict(seconds=round(after.ru_utime - before.ru_utime, 3))
    out["system_seconds"] = round(after.ru_stime - before.ru_stime, 3)
    return out | dict(peak_mb=round(peak - start, 1), process_mb=round(peak))


def call(name: str, n: int) -> dict:  # of `measure` in a process of its own
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: there.send(measure(name, n)))
    child.start()
    there.close()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{name}, {n} cases: the process ended with {child.exitcode}")
    return here.recv()


def exponent(sizes: list[int], values: list[float], least: float) -> float | str:  # "": none
    import numpy as np

    if len(sizes) < 3 or values[-1] < least:
        return ""
    logs = np.log(np.maximum([sizes, values], 1e-3))
    return round(float(np.polyfit(*logs[:, -3:], 1)[0]), 2)


def save(rows: list[dict], path: Path) -> None:
    "All rows in order, with the exponents of their functions"
    out = []
    for name, (group, _, _) in FUNCTIONS.items():
        one = sorted((r for r in rows if r["function"] == name), key=lambda r: int(r["n"]))
        sizes = [int(r["n"]) for r in one]
        for column, of, least in (
            ("time_exponent", "seconds", LEAST_SECONDS),
            ("memory_exponent", "peak_mb", LEAST_MB),
        ):
            found = exponent(sizes, [float(r[of]) for r in one], least)
            one = [r | {column: found} for r in one]
        out += [r | dict(group=group) for r in one]
    with open(path, "w", newline="", encoding="utf8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(out)


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--functions", nargs="*", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    a.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    a.add_argument("--again", action="store_true", help="compute rows that are there")
    a = a.parse_args()
    path = Path(__file__).with_suffix(".csv")
    rows = list(csv.DictReader(path.open(encoding="utf8"))) if path.exists() else []
    for name in a.functions:
        sizes = [n for n in a.sizes if n <= FUNCTIONS[name][2]]
        known = {int(r["n"]) for r in rows if r["function"] == name}
        todo = [n for n in sizes if a.again or n not in known]
        if todo:
            warm_up(name)
        for n in todo:
            found = dict(function=name, n=str(n)) | call(name, n)
            print(found, flush=True)
            rows = [r for r in rows if (r["function"], r["n"]) != (name, str(n))] + [found]
            save(rows, path)


if __name__ == "__main__":
    main()
