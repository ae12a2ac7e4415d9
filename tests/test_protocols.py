"""The tasks' settings at the paper's scale: each reaches the training, and a wrong row is named"""

import shutil
from functools import partial
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TOP

from asap.anatomy.organs import map_to_groups, organ_map_reader
from asap.core import rng
from asap.data import prepare
from asap.data.adapter import get_cohort
from asap.data.table import load
from asap.data.volumes import read, resample, write
from asap.model.asap import build_asap, build_config
from asap.model.vit import ViT3D
from asap.params import StageParams, load_params, read_params
from asap.pretrain import checkpoint
from asap.registry import all_tasks
from asap.store import local_file
from asap.study import protocols
from asap.tasks import (
    classify,
    prognosis,
    projection,
    released_probe,
    report,
    retrieve,
    segment,
    unetr,
    vocabulary,
    vqa,
)
from asap.train import build_optimizers, lr_factor

PAPER = load_params(TOP / "params/paper.yaml")
SPEC = protocols.read_protocols()
SEGMENT = protocols.segmentation_params(PAPER) | dict(
    phantoms=dict.fromkeys(segment.TRAINING_COHORTS, True)
)


class CapturedError(Exception):
    "What a task passed to the training loop"


@pytest.fixture
def training(monkeypatch):
    "Call a function; what it passes to `fit`: the model and the keyword arguments"

    def capture(module, call) -> tuple:
        def fit(model, loss, data, **kw):
            raise CapturedError(model, len(data), kw)

        monkeypatch.setattr(module, "fit", fit)
        with pytest.raises(CapturedError) as found:
            call()
        return found.value.args

    return capture


def schedule(model, kw) -> list:
    "Learning rate of each group at the top of the schedule; it is reached once, and ends in zero"
    names = ("lr", "weight_decay", "betas", "matrices", "muon_lr", "slow", "slow_lr")
    given = {"betas": (0.9, 0.95)} | {k: kw[k] for k in names if k in kw}
    opts = build_optimizers(model, **given)
    steps, warmup = kw["steps"], kw["warmup"]
    assert lr_factor(warmup, steps, warmup) == 1 and lr_factor(steps, steps, warmup) < 1e-9
    assert 0 < lr_factor(0, steps, warmup) <= 1 / max(1, warmup)
    return [g["base"] for o in opts for g in o.param_groups if g["params"]]


def cohort(n=60, columns=("label:a", "label:b")):
    r = rng("protocols", n)
    t = pd.DataFrame(dict(case=[f"c{i}" for i in range(n)]))
    t = t.assign(scan=t.case, patient=t.case, time_days=np.nan, event=np.nan)
    t["split"] = np.repeat(["train", "val", "test"], [n - 20, 10, 10])
    return t.assign(**{c: r.integers(0, 2, n).astype(float) for c in columns})


def test_the_table_is_complete_and_explained():
    table = protocols.protocol_table(PAPER)
    assert table.task.unique().tolist() == [n for n, t in all_tasks().items() if t.number]
    lost = protocols.unexplained(table)
    assert not len(lost), lost.to_string()
    assert (table.equal == "yes").sum() > 300 and (table.ours != "").all()
    assert not table.duplicated(["task", "field"]).any()


@pytest.mark.parametrize(
    "section, change",
    [
        ("vqa", dict(lr=0.0001)),
        ("retrieve", dict(batch_size=1024)),
        ("vocabulary", dict(warmup_steps=None)),
        ("report", dict(datasets={})),
        ("segment", dict(overlap=0.5)),
        ("segment", dict(all_labels_seeds=None)),
    ],
)
def test_the_table_notices_a_change(section, change):
    changed = getattr(PAPER, section).model_copy(update=change)
    table = protocols.protocol_table(PAPER.model_copy(update={section: changed}))
    assert len(protocols.unexplained(table))


@pytest.mark.parametrize("task", SPEC["classify"]["tasks"])
def test_a_probe_trains_with_its_row(task, training):
    spec = SPEC["classify"]["tasks"][task]
    t, p = cohort(), PAPER.classify.model_dump()
    multiclass = spec["cohort"] in classify.MULTICLASS_COHORTS
    for fraction, (lr, batch, steps, warmup, decay, patience, start) in spec["rows"].items():
        fitted = classify.choose_probe(p, spec["cohort"])(fraction, 0)
        given = (np.ones((60, 6)), t, t.split == "train", ["label:a", "label:b"], multiclass)
        model, n, kw = training(released_probe, partial(fitted, *given))
        assert n == 40 and kw["batch"] == min(batch, 40) and kw["betas"] == (0.9, 0.999)
        assert (kw["steps"], kw["warmup"], kw["weight_decay"]) == (steps, warmup, decay)
        epoch = -(-40 // batch)
        assert kw["validate_every"] == epoch and kw["patience"] == patience
        assert kw["validate_from"] == start * epoch
        assert set(schedule(model, kw)) == {lr}
        assert model.weight.shape == (2, 6) and 0 < model.weight.abs().max() < 2e-4


def test_a_fraction_without_a_row_takes_the_next(training):
    fitted = classify.choose_probe(PAPER.classify.model_dump(), "luna16")(0.01, 0)
    assert fitted.keywords["row"]["steps"] == 500


def test_prognosis_trains_with_its_rows(training):
    flags = [f"label:{n}" for n in prognosis.HORIZON_DAYS]
    t = cohort(columns=[*flags, "label:severe"])
    t[flags] = np.maximum.accumulate(t[flags].to_numpy(), 1)
    data = dict(inspect=dict(a=(np.ones((60, 6)), t)), stoic=dict(a=(np.ones((60, 6)), t)))
    for task, spec in SPEC["prognosis"]["tasks"].items():
        c = spec["cohort"]
        for fraction, (lr, _, steps, *_) in spec["rows"].items():
            if fraction < 0.1:
                continue  # of 40 patients, too few for both classes

            def call(c=c, task=task, fraction=fraction):
                settings = PAPER.prognosis.model_dump()
                prognosis.run_all([task], {c: t}, data, [fraction], [0], settings)

            model, _, kw = training(released_probe, call)
            assert (kw["steps"], set(schedule(model, kw))) == (steps, {lr})
            outputs = [m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
            assert outputs == ([6, 3] if c == "inspect" else [1])


def test_the_exact_probe_needs_no_rows():
    built_in = load_params(TOP / "params.yaml")
    assert classify.choose_probe(built_in.classify.model_dump(), "ct_rate") is None
    assert built_in.prognosis.probe == "exact"


@pytest.mark.parametrize("task", SPEC["segment"]["tasks"])
def test_a_segmentation_trains_with_its_row(task, training):
    spec = SPEC["segment"]["tasks"][task]
    p = SEGMENT["segment"]
    for fraction, published in spec["rows"].items():
        row, _, size = segment.dataset_settings(spec["cohort"], SEGMENT, fraction)
        model = torch.nn.Module()
        model.vit, model.decoder = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        args = (model, [None] * 4, [], p, row, size, False, 0)
        _, n, kw = training(segment, lambda a=args: segment.train_segmentation(*a))
        lr, volumes, crops, *rest = protocols.published_segmentation(published)
        assert [kw[k] for k in ("steps", "warmup", "validate_every", "patience")] == rest
        assert kw["batch"] == volumes and kw["collate"] is segment.collate_crops
        assert set(schedule(model, kw)) == {lr} and size == tuple(spec["size"])
        assert row["crops_per_volume"] == crops
    assert segment._label_subsets(p, spec["cohort"]) == [
        (f, d) for f in spec["rows"] for d in range(5)
    ], "each fraction of the paper, five seeds"


def test_the_number_of_steps():
    assert [segment.dataset_settings("luna16", SEGMENT, f)[0]["steps"] for f in (0.01, 0.1, 1)] == [
        6_000,
        62_000,
        621_000,
    ]


def test_crops_are_on_the_foreground_as_published(monkeypatch):
    "Three of four for ACDC; all crops of a volume are in the batch"
    seen = {}

    def build(p, size, flip, crops):
        seen.update(sampling=p["oversample_foreground"], crops=crops, size=size)
        raise CapturedError

    monkeypatch.setattr(segment, "build_augmentation", build)
    row, _, size = segment.dataset_settings("acdc", SEGMENT)
    with pytest.raises(CapturedError):
        segment.train_segmentation(None, [], [], SEGMENT["segment"], row, size, False, 0)
    assert seen == dict(sampling=0.75, crops=16, size=(192, 192, 32))


def test_acdc_has_its_own_patch_and_spacing(tmp_path):
    p = load_params(TOP / "params/paper.yaml")
    small = p.model.model_copy(
        update=dict(embed_dim=24, depth=3, num_heads=2, decoder_embed_dim=24, decoder_depth=3)
        | dict(decoder_num_heads=2, proj_dim=24, mlm_depth=1, mlm_num_heads=2)
    )
    small = p.model_copy(
        update=dict(
            model=small,
            volumes=p.volumes.model_copy(update=dict(roi_size=[32, 32, 16])),
        )
    )
    config = build_config(small, p.arms["asap"], 24, 50)
    checkpoint.save(build_asap(config), tmp_path / "checkpoint", "# a card\n")
    vit = unetr.load_encoder(tmp_path / "checkpoint", (192, 192, 32), [24, 24, 4])
    assert (vit.patch_size, vit.grid_size) == ((24, 24, 4), (8, 8, 8))
    assert all(q.requires_grad for q in vit.parameters()) and vit.training
    before = checkpoint.load(tmp_path / "checkpoint")
    assert torch.equal(vit.blocks[1].attn.q.weight, before.blocks[1].attn.q.weight)
    parts = dict(train=[None])
    model, config = segment.init_model(
        "asap", "acdc", None, parts, SEGMENT, tmp_path / "checkpoint", 0
    )
    assert config["spacing"] == [1.0, 1.0, 1.5] and config["img_size"] == [192, 192, 32]
    again = unetr.build_from_config(config)
    again.load_state_dict(model.state_dict(), strict=True)
    assert isinstance(again.vit, ViT3D) and again.vit.patch_size == (24, 24, 4)


def test_reports_train_with_their_row(training):
    for task, spec in SPEC["report"]["tasks"].items():
        one, inner = report.report_settings(PAPER.report, spec["cohort"])
        assert inner is None
        model = torch.nn.Linear(2, 2)
        data, train = SimpleNamespace(batch=None), np.arange(100)
        call = partial(report._fit_decoder, model, data, train, train[:0], one, seed=0, label=task)
        _, _, kw = training(report, call)
        lr, batch, epochs = spec["values"]
        assert (kw["batch"], kw["steps"]) == (batch, epochs * 100 // batch)
        assert set(schedule(model, kw)) == {lr}


def test_a_stage_overrides_like_the_file():
    tree = PAPER.report.model_dump()
    one, _ = report.report_settings(StageParams(tree, "report", "report."), "ctrg")
    assert (one.lr, one.batch_size, one.embed_dim) == (0.0001, 4, 512)
    assert one.model_dump()["datasets"] == {}, "rows of other data sets retrain nothing"


def test_reports_within_the_owners_validation():
    row = report.ReportRow(inner_split=dict(val_fraction=0.1, test_fraction=0.2))
    p = PAPER.report.model_copy(update=dict(datasets=dict(ct_rate=row)))
    _, inner = report.report_settings(p, "ct_rate")
    t = report.split_within_test(
        cohort(200).assign(split=["train"] * 100 + ["test"] * 100), inner, 0
    )
    assert t.split[:100].eq("unused").all()
    assert t.split[100:].value_counts().to_dict() == dict(train=70, test=20, val=10)


def test_vqa_has_two_rates():
    m = torch.nn.Module()
    m.resampler = vqa.QueryResampler(12, 2, 4, 1, 8, 6, 1.0, False)
    m.lm = torch.nn.Module()
    m.lm.frozen, m.lm.lora = torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 3)
    kw = vqa.optimizer_options(m, PAPER.vqa) | dict(steps=PAPER.vqa.steps)
    assert set(schedule(m, kw)) == {0.00005, 0.00001}
    (opt,) = build_optimizers(
        m,
        betas=(0.9, 0.95),
        **{k: v for k, v in kw.items() if k in ("lr", "weight_decay", "slow", "slow_lr")},
    )
    rate = {id(q): g["base"] for g in opt.param_groups for q in g["params"]}
    assert {rate[id(q)] for q in m.resampler.projector.parameters()} == {0.00005}
    assert {rate[id(q)] for q in m.resampler.query_params()} == {0.00001}
    assert rate[id(m.lm.lora.weight)] == 0.00001 and id(m.lm.frozen.weight) not in rate
    assert (kw["steps"], kw["warmup"]) == (5075, 500)


def test_vocabulary_and_retrieval_train_as_published(training):
    p, x, y = PAPER.vocabulary, np.ones((40, 6)), np.ones((40, 2))
    words = torch.ones(2, 2, 5)
    call = partial(vocabulary.train_classifier, x, y, x[:0], y[:0], words, p, 0)
    model, _, kw = training(projection, call)
    assert [kw[k] for k in ("steps", "batch", "warmup", "weight_decay")] == [58940, 16, 5894, 1e-4]
    assert set(schedule(model, kw)) == {0.001}
    numbers = np.arange(40)
    call = partial(
        retrieve.train_retrieval, x, x, numbers, x[:0], x[:0], numbers[:0], PAPER.retrieve, 0
    )
    model, _, kw = training(projection, call)
    assert [kw[k] for k in ("steps", "batch", "warmup", "weight_decay")] == [235720, 8, 5894, 1e-4]
    prompts = vocabulary.build_prompts(["Emphysema"], p.positive_templates, p.negative_templates)
    assert prompts == [(["Emphysema."], ["not emphysema."])]


WRONG = {
    "classify.datasets.luna": dict(classify=dict(datasets=dict(luna=[]))),
    "`classify.datasets.stoic.0.label_fraction` is 0.05": dict(
        classify=dict(
            probe="exact",
            datasets=dict(
                stoic=[
                    dict(
                        label_fraction=0.05,
                        lr=0.1,
                        batch_size=2,
                        steps=3,
                        warmup_steps=1,
                        weight_decay=0.1,
                        patience=2,
                    )
                ]
            ),
        )
    ),
    "unknown key `classify.datasets.stoic.0.rate`": dict(
        classify=dict(datasets=dict(stoic=[dict(label_fraction=0.1, rate=1)]))
    ),
    "`classify.datasets.ct_rate` has no row of `label_fraction: 1.0`": dict(
        classify=dict(datasets={})
    ),
    "`prognosis.datasets.inspect` has no row": dict(prognosis=dict(datasets={})),
    "prognosis.datasets.luna16": dict(prognosis=dict(datasets=dict(luna16=[]))),
    "segment.datasets.pleThora": dict(segment=dict(datasets=dict(pleThora={}))),
    "`segment.datasets.luna16.fractions.0.label_fraction` is 0.3": dict(
        segment=dict(
            datasets=dict(
                luna16=dict(
                    low_label=True,
                    steps=1,
                    batch_size=1,
                    lr=0.1,
                    fractions=[dict(label_fraction=0.3)],
                )
            )
        )
    ),
    "is not a multiple of `segment.datasets.acdc.patch_size` [24, 24, 4]": dict(
        segment=dict(
            datasets=dict(
                acdc=dict(
                    low_label=False,
                    steps=1,
                    batch_size=1,
                    lr=0.1,
                    roi_size=[96, 96, 46],
                    patch_size=[24, 24, 4],
                )
            )
        )
    ),
    "`cohorts.luna16.spacing` is [1.0, 1.0, 1.0], but task `classify_luna16`": dict(
        cohorts=dict(luna16=dict(spacing=[1.0, 1.0, 1.0]))
    ),
    "report.datasets.mimic": dict(report=dict(datasets=dict(mimic={}))),
    "`vqa.lora_lr` is 1e-05 and `vqa.muon_lr` is 0.001": dict(vqa=dict(muon_lr=0.001)),
    "`cohorts.ct_rate.organ_maps` is 'own'": dict(cohorts=dict(ct_rate=dict(organ_maps="own"))),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_row_is_named(said, tmp_path):
    raw = read_params(TOP / "params/paper.yaml")
    for section, keys in WRONG[said].items():
        raw[section] = {**raw[section], **keys}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError) as error:
        load_params(tmp_path / "params.yaml")
    assert said in str(error.value)


def test_a_model_does_not_test_volumes_of_another_spacing(tmp_path, monkeypatch):
    p = SEGMENT | dict(spacings=dict(rider=[1.0, 1.0, 1.0]))
    model = torch.nn.Linear(1, 1)
    trained = (model, dict(class_names={1: "cancer"}, num_train=1))
    monkeypatch.setattr(segment, "train_or_load", lambda *a: trained)
    with pytest.raises(ValueError, match="those of rider are at"):
        segment.run_one(
            "asap",
            "msd_lung",
            1.0,
            0,
            ["external_segment_rider"],
            dict(msd_lung=None, rider=None),
            p,
            tmp_path,
        )


SMOKE = load_params(TOP / "params/smoke.yaml")


def stage(name, **options):
    tree = SMOKE.model_dump(by_alias=True)
    tree["cohorts"][name] |= options
    tree["study"]["n_jobs"] = 1
    return StageParams(tree, "prepare")


def prepared(name, root, **options):
    p = stage(name, **options)
    organs = organ_map_reader(p.anatomy.groups.model_dump(), options.get("organ_maps"))
    status = prepare.run(get_cohort(name), p, root, organs, lambda table, *_, **__: table)
    t = load(root / f"build/cohorts/{name}/{name}.parquet", root)
    t[["image", "organ_map"]] = t[["image", "organ_map"]].map(lambda f: f and str(local_file(f)))
    return status, t


@pytest.fixture
def project(tmp_path):
    (tmp_path / "data").mkdir()
    size = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))
    get_cohort("ct_rate").write(tmp_path / "data/ct_rate", 0, 3, 2, second_recon_prob=0.0, **size)
    return tmp_path


def test_a_cohort_has_its_own_spacing(tmp_path):
    (tmp_path / "data").mkdir()
    get_cohort("acdc").write(
        tmp_path / "data/acdc", 0, 3, 2, size=(48, 48, 24), spacing=(7.0, 7.0, 14.0)
    )
    status, t = prepared("acdc", tmp_path, spacing=[6.0, 6.0, 10.0])
    assert status["spacing"] == [6.0, 6.0, 10.0]
    zooms = {tuple(np.round(nib.load(f).header.get_zooms(), 3)) for f in t.image}
    assert zooms == {(6.0, 6.0, 10.0)}
    shutil.rmtree(tmp_path / "build")
    status, t = prepared("acdc", tmp_path)
    assert "spacing" not in status and nib.load(t.image[0]).header.get_zooms() == (7.0, 7.0, 14.0)


def released_mask(row, groups) -> np.ndarray:
    "A mask as the released code would write it: RAS, 1.5x1.5x3 mm, values 0 to 8"
    v, m = read(row.image).ras(), read(row.organ_map).ras()
    organs = map_to_groups(m.hu.astype(np.int16), groups)
    shape = tuple(int(n * s / t) for n, s, t in zip(v.hu.shape, v.spacing, (1.5, 1.5, 3.0)))
    grid = v.affine @ np.diag([*(np.array(v.hu.shape) / shape), 1])
    half = (np.array(v.hu.shape) / shape - 1) / 2
    grid[:3, 3] = v.affine[:3, :3] @ half + v.affine[:3, 3]
    return resample(organs, m.affine, shape, grid, order=0, fill=0)


def test_released_masks(project):
    "Values 0 to 8 on a grid without position give the organ maps of the owners' masks"
    groups = SMOKE.anatomy.groups
    _, ours = prepared("ct_rate", project)
    expected = {c: read(f).hu for c, f in zip(ours.case, ours.organ_map)}
    raw, _ = get_cohort("ct_rate").read(project / "data/ct_rate")
    folder = project / "data/ct_rate/dataset/released_masks/train"
    for row in list(raw.itertuples())[1:]:
        write(
            released_mask(row, groups), np.diag([1.5, 1.5, 3.0, 1.0]), folder / f"{row.case}.nii.gz"
        )
    shutil.rmtree(project / "build")
    _, t = prepared("ct_rate", project, organ_maps="released")
    maps = dict(zip(t.case, t.organ_map))
    assert maps[raw.case[0]] == "", "a volume without a mask has none"
    for case in raw.case[1:]:
        found = read(maps[case]).hu
        assert (found == expected[case]).mean() > 0.97 and (found > 0).any()


def test_a_released_mask_of_another_scan(project):
    raw, _ = get_cohort("ct_rate").read(project / "data/ct_rate")
    folder = project / "data/ct_rate/dataset/released_masks"
    for row in raw.itertuples():
        mask = released_mask(row, SMOKE.anatomy.groups)
        mask = mask[:20, :20, :20] if row.case == raw.case[0] else mask
        write(mask, np.diag([1.5, 1.5, 3.0, 1.0]), folder / f"{row.case}.nii.gz")
    _, t = prepared("ct_rate", project, organ_maps="released")
    bad = pd.read_csv(project / "build/cohorts/ct_rate/quarantine.csv")
    assert bad.case.tolist() == [raw.case[0]] and "does not fill its scan" in bad.reason[0]
    assert raw.case[0] not in set(t.case)


def test_a_subset_of_the_train_volumes(project):
    size = dict(size=(48, 48, 24), spacing=(7.0, 7.0, 14.0))
    get_cohort("radgenome").write(
        project / "data/radgenome", 0, 3, 2, second_recon_prob=0.0, **size
    )
    status, t = prepared("radgenome", project, train_volumes=2)
    assert t.split.isin(["train", "val"]).sum() == 2 and (t.split == "test").sum() == 2
    questions = pd.read_parquet(project / "build/cohorts/radgenome/radgenome.questions.parquet")
    assert set(questions.case) <= set(t.case) and len(questions)
    bad = pd.read_csv(project / "build/cohorts/radgenome/quarantine.csv")
    assert len(bad) == 1 and "cohorts.radgenome.train_volumes" in bad.reason[0]
