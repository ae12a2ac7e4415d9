"""Search for the cause of trainings that do not ground: one change of the recipe at a time, on
development patients.

Each variant is a row of `arms` (asap with the changes of VARIANTS; `hard_negatives` changes the
loss in this script). For every variant and development seed one process trains it on one core and
measures it on development patients; its row is appended to benchmarks/grounding_causes.csv at once,
and rows that are there are not computed again. With `--losses all` the hits of every sentence go to
benchmarks/grounding_hits_CORPUS.csv. What the variants of a seed share (volumes, organ maps, lesion
masks, sentence features) is kept in --cache, outside the repository. The generation of phantoms is
that of the params file (phantom.version). The study's seed is refused: no patient of the study is
seen.

    python benchmarks/grounding_causes.py --cache /data/causes --seeds 4001 4002 4003
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from asap.core import log_message, write_csv, write_parquet

SPLITS = {"train": "train", "val": "valid", "test": "valid"}  # of the cache -> of the phantom


def save_lesions(k, key: tuple, grid: tuple, path: Path) -> None:  # grid: shape, affine
    "The lesion masks of a phantom on a grid, with their sentences and labels"
    from asap.core import rng
    from asap.data.cohorts.rex_grounding_ct import LABEL_RULES
    from asap.data.volumes import resample
    from asap.phantom.words import finding_sentence

    words = rng("report", key)  # as `synthesize_report` draws
    pairs = [(f, finding_sentence(f, words)) for f in k.findings]
    pairs = [(f, s) for f, s in pairs if f.name in LABEL_RULES]
    boxes = [f.mask.astype(np.uint8) for f, _ in pairs]
    masks = [resample(m, k.chest.affine, *grid, order=0, fill=0) for m in boxes]
    flat = np.array(masks, bool).reshape(len(pairs), int(np.prod(grid[0])))
    np.savez_compressed(
        path,
        masks=np.packbits(flat, axis=1),
        shape=np.array(grid[0]),
        sentences=np.array([s for _, s in pairs], dtype=str),
        labels=np.array([f.name for f, _ in pairs], dtype=str),
    )


def draw_case(seed: int, split: str, i: int, folder: Path, p) -> dict:  # row of the table
    "One patient: standard volume, organ map, lesion masks and report"
    from asap.anatomy.organs import map_to_groups
    from asap.data.synthesize import generator_options
    from asap.data.volumes import Volume, resample, standardize, write
    from asap.phantom.cases import synthesize_patient

    key = (seed, SPLITS[split], i)
    options = generator_options(p.phantom) | dict(second_recon_prob=0.0)
    k = synthesize_patient(*key, **options)
    r, groups = k.recons[0], dict(p.anatomy.groups)
    v = standardize(Volume(r.hu, r.affine), p.volumes.spacing, p.volumes.hu_range)
    grid = (v.hu.shape, v.affine)
    organs = resample(map_to_groups(r.labels, groups), r.affine, *grid, order=0, fill=0)
    name = f"{split}_{i}"
    files = {n: folder / n / f"{name}.nii" for n in ("volumes", "organs")}
    write(v.hu, v.affine, files["volumes"])
    write(organs, v.affine, files["organs"])
    lesions = folder / f"lesions/{name}.npz"
    save_lesions(k, key, grid, lesions)
    labels = {f"label:{n}": float(x) for n, x in k.labels.items()}
    return dict(
        dict.fromkeys(("case", "patient", "scan"), name),
        split=split,
        image=str(files["volumes"]),
        organ_map=str(files["organs"]),
        lesions=str(lesions),
        findings=k.report.findings,
        impression=k.report.impression,
        **labels,
    )


def patients_folder(seed: int, cache: Path, p) -> Path:
    "Where the patients of a seed and a generation of phantoms are"
    return cache / f"seed_{seed}_phantom_{p.phantom.version}"


def draw(seed: int, counts: dict, cache: Path, p) -> pd.DataFrame:  # cohort table
    "The patients of a development seed; drawn once"
    folder = patients_folder(seed, cache, p)
    path = folder / "table.parquet"
    wanted = [(s, i) for s, n in counts.items() for i in range(1, n + 1)]
    if path.exists():
        t = pd.read_parquet(path)
        if t.split.value_counts().to_dict() == counts:
            return t
    for n in ("volumes", "organs", "lesions"):
        (folder / n).mkdir(parents=True, exist_ok=True)
    offset = {"test": counts["val"]}  # val and test are patients of the same split
    rows = []
    for s, i in wanted:
        rows.append(draw_case(seed, s, i + offset.get(s, 0), folder, p))
        if len(rows) % 100 == 0:
            log_message(f"seed {seed}: {len(rows)} of {len(wanted)} patients drawn")
    t = pd.DataFrame(rows)
    write_parquet(t, path)
    return t


# What `asap` was before the search; each variant changes this row
BEFORE = dict(align_candidates="all")

# name -> hypothesis, written before the measurement; changes of that row
VARIANTS: dict[str, tuple[str, dict]] = {
    "today": ("hits between none and as many as the atlas, by the first weights", {}),
    "all_visible": (
        "a lesion of one to four patches is hidden in most steps, and its sentence must choose "
        "another patch, whose vector is pulled to the sentence; where the embeddings of all "
        "patches are ranked (tokens: those of the quarter that is seen), every positive pair "
        "holds its lesion: more hits, fewer failures",
        dict(align_mask_ratio=0.0),
    ),
    "half_visible": (
        "as all_visible, at less cost: half of its effect",
        dict(align_mask_ratio=0.5),
    ),
    "skip_hidden": (
        "only pairs whose lesion is visible enter the contrasts (uses masks): an upper bound for "
        "what visibility gives at a quarter of the patches",
        dict(skip_hidden_lesions=True),
    ),
    "nowhere": (
        "a sentence whose lesion is hidden can select the slot; but the slot is the same vector "
        "in every image, so selecting it always is a stationary point as an empty patch is: no "
        "better than today",
        dict(nowhere_slot=True),
    ),
    "body": (
        "an empty patch has the same vector in every image, so that the contrast of images gives "
        "it no gradient and a sentence that selected it stays there; without empty candidates "
        "fewer trainings fail, but constant patches within the body remain",
        dict(align_candidates="body"),
    ),
    "no_position": (
        "without positions no patch can be owned by its place: equal patches have equal "
        "similarities, and only content separates sentences of a report: no failures; sentences "
        "that name a lobe lose that cue",
        dict(align_position=0.0),
    ),
    "embeddings": (
        "tokens after attention carry the answer at any patch, which lowers the loss wherever a "
        "sentence points; with embeddings alone an empty patch earns nothing: more hits, but the "
        "blocks learn nothing from the reports",
        dict(align_tokens=False),
    ),
    "tokens": (
        "ranked after attention: registers, hits near zero",
        dict(align_before_attention=False),
    ),
    "large_regions": (
        "more patches receive a gradient at the start, so that the first choice is not final",
        dict(init_k_ratio=0.1),
    ),
    "fixed_k": ("k is not the cause: as today", dict(region_size="fixed")),
    "rank_noise": (
        "random ranks let a sentence try other patches: fewer failures",
        dict(rank_noise=0.1),
    ),
    "temperature_fixed": (
        "a learned temperature sharpens while selection is still arbitrary: small gain",
        dict(learn_temperature=False),
    ),
    "no_intra_report": (
        "the contrast within a report is won by position; its weight is small already: as today",
        dict(intra_report_weight=0.0),
    ),
    "soft_selection": (
        "a patch that a sentence does not select receives no gradient, so that the first choice is "
        "kept; where weights depend on the similarity, both contrasts change the ranking itself: "
        "fewer failures; but at first all similarities are alike, so that a region is wide and a "
        "small lesion is diluted: hits come later",
        dict(soft_selection=0.05),
    ),
    "stem_windows": (
        "kernels that respond to edges from the start make content weigh more than position",
        dict(stem_init="windows"),
    ),
    "all_visible_body": (
        "both effects; the stem is not run on air, so that a step costs less than with all patches",
        dict(align_mask_ratio=0.0, align_candidates="body"),
    ),
    "all_visible_embeddings": (
        "both effects",
        dict(align_mask_ratio=0.0, align_tokens=False),
    ),
    "all_visible_no_position": (
        "both effects: no patch can be owned by its place, and each lesion is there",
        dict(align_mask_ratio=0.0, align_position=0.0),
    ),
    "all_visible_body_no_position": (
        "the three together: what a repair could be made of",
        dict(align_mask_ratio=0.0, align_candidates="body", align_position=0.0),
    ),
    "all_visible_small_k": (
        "k and the soft border are shares of the visible patches, so that with four times as many "
        "a region starts with eight patches and dilutes a small lesion: k in patches as today",
        dict(align_mask_ratio=0.0, max_k_ratio=0.05, init_k_ratio=0.00125),
    ),
    "tenth_position": (
        "positions stay as a weak cue that breaks ties between equal patches: between today and "
        "no_position",
        dict(align_position=0.1),
    ),
    "soft_body": (
        "gradients reach the ranking, and no empty patch can be selected: fewer failures than "
        "either alone",
        dict(soft_selection=0.05, align_candidates="body"),
    ),
    "soft_body_no_position": (
        "as soft_body, and no patch is owned by its place: no failures, at today's cost",
        dict(soft_selection=0.05, align_candidates="body", align_position=0.0),
    ),
    "all_visible_soft_body_no_position": (
        "the four together, at four times the cost of the stem: an upper bound without masks",
        dict(
            align_mask_ratio=0.0,
            soft_selection=0.05,
            align_candidates="body",
            align_position=0.0,
        ),
    ),
    "organs": (
        "in every image of the batch a sentence selects within the organs that it names, so that "
        "position wins no contrast and a small lesion is one of forty patches, not of hundreds: "
        "no failures, more hits than the atlas; labels whose sentences name no organ gain nothing",
        dict(align_candidates="organs"),
    ),
    "organs_no_position": (
        "as organs; positions add nothing once the organ is known",
        dict(align_candidates="organs", align_position=0.0),
    ),
    "soft_organs": (
        "as organs; gradients that reach the ranking find the lesion sooner",
        dict(align_candidates="organs", soft_selection=0.05),
    ),
    "half_visible_organs": (
        "as organs, and every second lesion is there in place of every fourth",
        dict(align_candidates="organs", align_mask_ratio=0.5),
    ),
    "more_steps": ("failures are final: twice the steps change nothing", dict(steps=1920)),
    "four_times_steps": ("as more_steps: failures are final", dict(steps=3840)),
    "hard_negatives": (
        "only a region that shows the finding separates a sentence from the denial of its finding; "
        "but a patch that the sentence has made its own separates them as well: small gain",
        {},
    ),
    "with_tokens": (
        "where only embeddings are contrasted, tokens after attention are added, as in the whole "
        "recipe: they carry the answer at any patch, so that hits become fewer",
        dict(align_tokens=True),
    ),
    "large_batch": ("more negatives separate images sooner: small gain", dict(batch_size=32)),
}


def opposite(sentence: str) -> str:  # "" where it is about no abnormality, or several
    "The denial of an abnormality that a sentence states, or the statement of one that it denies"
    from asap.study.grounding import negate_finding
    from asap.text.labels import find_mentions

    found = {(m.label, m.state) for m in find_mentions(sentence)}
    if len(found) != 1:
        return ""
    ((label, state),) = found
    opposites = dict(present=negate_finding(label), absent=f"There is {label.lower()}.")
    return opposites.get(state, "")


def add_hard_negatives(head, text, sentences: list[str]) -> None:  # head: of the alignment
    """Add to its loss the contrast of each sentence with its opposite, in the region of the
    sentence; with the same weight as the others together"""
    from torch.nn.functional import normalize, softplus

    pairs = {s: o for s in dict.fromkeys(sentences) if (o := opposite(s))}
    stated, others = (text.sentences(list(x)) for x in (pairs, pairs.values()))
    contrasts = head.loss

    def loss(aligned, embeds, mask, *args):
        cosine, which = (embeds.float() @ stated.to(embeds).T.float()).max(-1)
        total, known = contrasts(aligned, embeds, mask, *args), mask & (cosine > 0.9999)
        if not known.any():
            return total
        other = normalize(head.text_proj(others.to(embeds)[which]).float(), dim=-1)
        margin = ((other - aligned.text_embeds) * aligned.region_embeds).sum(-1)
        return (total + softplus(margin * head.similarity_scale)[known].mean()) / 2

    head.loss = loss


def load_masks(row: dict) -> tuple:  # sentences, labels, masks (F,W,H,D) bool
    "The lesions of a case of `draw`"
    z = np.load(row["lesions"])
    n = int(np.prod(z["shape"]))
    masks = np.unpackbits(z["masks"], axis=1, count=n).reshape(-1, *z["shape"])
    return z["sentences"].tolist(), z["labels"].tolist(), masks


def shared_targets(table: pd.DataFrame, split: str, folder: Path, p):  # of `collect_targets`
    "Lesion targets of all cases of a split, kept in the cache"
    import pickle

    from asap.pretrain.pointing import collect_targets

    path = folder / f"lesions_{split}_{len(table)}.pkl"
    if not path.exists():
        rows = {k: table[table.split == k].to_dict("records") for k in (split, "train")}
        made = collect_targets(rows[split], rows["train"], load_masks, p, most=len(table))
        path.write_bytes(pickle.dumps(made))
    return pickle.loads(path.read_bytes())  # own file of the line above


def arm_row(changes: dict, losses: str, p) -> dict:
    """The row of a variant; `align`: without the losses of voxels, organs and words; `embeddings`:
    with the contrasts of embeddings before attention alone, which need no blocks and are fast"""
    from asap.model.asap import complete_arm

    row = p.arms["asap"].model_dump() | BEFORE | changes
    if losses == "embeddings":
        row |= dict(align_tokens=False) | changes
    if losses != "all":
        row |= dict(recon_weight=0, organ_weight=0, mlm_weight=0)
    return complete_arm(row)


def settings(a, p):  # params of a training
    "The params with the steps and patients of the search"
    t = p.pretrain
    warmup = min(t.warmup_steps, a.steps // 10)
    update = dict(steps=a.steps, warmup_steps=warmup, eval_every=a.eval_every)
    update["precision"] = a.precision
    stem = p.model.stem.model_copy(update=dict(stride=list(a.stride or p.model.stem.stride)))
    model = p.model.model_copy(update=dict(stem=stem))
    return p.model_copy(update=dict(pretrain=t.model_copy(update=update), model=model))


def probe_auc(model, table: pd.DataFrame, p) -> float:  # macro AUC
    "A linear probe with all labels on the development patients"
    from asap.pretrain import embed
    from asap.tasks.classify import task_label_columns
    from asap.tasks.metrics import auc, nan_mean
    from asap.tasks.probe import average_by_scan, fit_predict

    f = embed.extract_features(model.vit, table.image, p.volumes.roi_size, p.volumes.hu_range)
    columns = task_label_columns(table, "ct_rate")
    found = average_by_scan(fit_predict(f, table, table.split == "train", columns))
    parts = found.dropna(subset="truth").groupby("label")
    return nan_mean([auc(g.truth, g.probability) for _, g in parts])


def measure(model, text, targets, p, path: Path | None = None) -> dict:  # path: of the sentences
    "Pointing with all patches visible"
    from asap.pretrain.pointing import predict_points, score_points, summarize_points

    points = predict_points(model, text, targets, p)
    rows = score_points(targets, points, p.anatomy.groups)
    if path:
        write_parquet(rows, path)
    by_label = rows.groupby("label")[["hit", "random"]].mean()
    above = int((by_label.hit > by_label.random).sum())
    return summarize_points(rows) | dict(labels=len(by_label), labels_above_guess=above)


def keep_hits(rows: pd.DataFrame, name: str, path: Path) -> None:  # rows: of `score_points`
    "Add the hits of a training as a column of a table with one row per sentence"
    own = rows[["case", "label", "atlas", "organ_atlas"]].reset_index(drop=True)
    t = pd.read_csv(path) if path.exists() else own
    if t[["case", "label"]].to_numpy().tolist() != own[["case", "label"]].to_numpy().tolist():
        raise ValueError(f"{path} holds the sentences of other patients: move it away")
    write_csv(t.assign(**{name: rows.hit.astype(int).to_numpy()}), path)


def untrained_correlation(model, text, targets, seed: int) -> float:
    "Rank correlation of k with the extent, the mean over untrained heads"
    from asap.pretrain.pointing import rank_correlation
    from asap.study.grounding import predict_untrained_k

    features = text.sentences(targets.table.sentence.tolist())
    k = predict_untrained_k(model.config, features, targets.share.shape[1], seed)
    return float(rank_correlation(k, targets.share.sum(1)).mean())


def train_one(variant: str, seed: int, a) -> dict:  # row of the table
    "One training of a variant on the patients of a seed"
    import torch

    from asap.model.asap import arm_params
    from asap.params import load_params
    from asap.pretrain.batches import ImageReportDataset
    from asap.pretrain.pretrain import build_model, fit_stem, train
    from asap.text import encoder

    torch.set_num_threads(1)
    base = settings(a, load_params(a.params))
    corpus = a.corpus or seed
    folder = patients_folder(corpus, a.cache, base)
    table = draw(corpus, dict(zip(SPLITS, a.patients)), a.cache, base)
    row = arm_row(VARIANTS[variant][1], a.losses, base)
    p = arm_params(base, row)
    text = encoder.load(a.text, p.text.max_length)
    parts = table[table.split == "train"].reset_index(drop=True)
    masks = (lambda r: load_masks(r)[::2]) if p.pretrain.skip_hidden_lesions else None
    data = ImageReportDataset(parts, p, text, seed, lesions=masks)
    model = build_model(base, row, text, seed)
    fit_stem(model, ImageReportDataset(parts.head(16), p, text, seed, augment=False))
    if variant == "hard_negatives":
        add_hard_negatives(model.alignment, text, [s for x in data.sentences for s in x])
    watched, final = (shared_targets(table, k, folder, p) for k in ("val", "test"))

    def on_eval(m, step):
        out = measure(m, text, watched, p)
        log_message(
            f"{variant} {seed} step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in out.items())
        )
        return out

    cpu = time.process_time()
    log = train(model, data, base, seed, on_eval=on_eval, label=f"{variant} {seed}")
    cpu = time.process_time() - cpu
    name = "_".join(map(str, key(variant, seed, a, base).values()))
    points = a.cache / f"points/{name}.parquet"
    points.parent.mkdir(parents=True, exist_ok=True)
    found = measure(model.eval(), text, final, p, points)
    found |= dict(k_extent_untrained=untrained_correlation(model, text, final, seed))
    found |= dict(loss=float(log.loss.tail(5).mean()), cpu_seconds=round(cpu))
    if a.losses == "all":
        found["macro_auc"] = probe_auc(model.eval(), table, p)
        hits = a.out.with_name(f"grounding_hits_{a.corpus or seed}.csv")
        keep_hits(pd.read_parquet(points), f"{variant}_{seed}", hits)
    return found


def key(variant: str, seed: int, a, p) -> dict:  # identifies a row
    return dict(
        variant=variant,
        seed=seed,
        corpus=a.corpus or seed,
        losses=a.losses,
        steps=a.steps,
        train=a.patients[0],
        stride="x".join(map(str, a.stride or [])) or "params",
        phantom=p.phantom.version,
        precision=a.precision,
    )


def is_done(k: dict, out: Path) -> bool:
    if not out.exists():
        return False
    t = pd.read_csv(out)
    return bool(np.logical_and.reduce([t[c].astype(str) == str(v) for c, v in k.items()]).any())


def append(row: dict, out: Path) -> None:
    old = [pd.read_csv(out)] if out.exists() else []
    write_csv(pd.concat([*old, pd.DataFrame([row])], ignore_index=True), out)


def arguments() -> argparse.Namespace:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--cache", type=Path, required=True, help="folder outside the repository")
    a.add_argument("--seeds", type=int, nargs="+", default=[4001, 4002, 4003])
    a.add_argument("--corpus", type=int, help="draw the patients with this seed for all of --seeds")
    a.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    a.add_argument("--patients", type=int, nargs=3, default=[600, 40, 160], help="train val test")
    a.add_argument("--steps", type=int, default=300)
    a.add_argument("--eval-every", type=int, default=100)
    a.add_argument("--stride", type=int, nargs=3, help="of the stem; larger is faster")
    a.add_argument("--params", type=Path, help="a params file; default: the study's")
    a.add_argument("--losses", choices=["embeddings", "align", "all"], default="align")
    a.add_argument("--precision", choices=["no", "bf16"], default="no")
    a.add_argument("--text", default="weights/text")
    a.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    a.add_argument("--draw", action="store_true", help="draw the patients and stop")
    a.add_argument("--one", action="store_true", help="train in this process")
    return a.parse_args()


def main():
    from asap.params import load_params

    a = arguments()
    p = load_params(a.params)
    if p.study.seed in {*a.seeds, a.corpus}:
        raise SystemExit(f"{p.study.seed} is the study's own seed: use others, such as 4001")
    env = dict(os.environ, OMP_NUM_THREADS="1")
    for variant in a.variants:
        for seed in a.seeds:
            if a.draw:
                draw(seed, dict(zip(SPLITS, a.patients)), a.cache, p)
            elif is_done(k := key(variant, seed, a, p), a.out):
                continue
            elif a.one:
                append(k | {n: round(v, 4) for n, v in train_one(variant, seed, a).items()}, a.out)
            else:  # one process for each training
                again = [x for x in sys.argv[1:] if x != "--one"]
                only = ["--variants", variant, "--seeds", str(seed), "--one"]
                subprocess.run([sys.executable, __file__, *again, *only], env=env, check=True)


if __name__ == "__main__":
    main()
