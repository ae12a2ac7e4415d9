"""Weights that were trained once: taken where their recipe is still the recipe, else trained
from nothing"""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny_cases import cases

from asap.core import project_root, write_csv, write_json
from asap.params import load_params
from asap.pretrain.checkpoint import export_weights, load, model_card, save
from asap.pretrain.pretrain import run
from asap.text.encoder import build_text_encoder, load as load_text

P = load_params(project_root() / "params/smoke.yaml")
ROW = P.arms["asap"].model_dump(by_alias=True)


@pytest.fixture(scope="module")
def study(
    tmp_path_factory,
):  # nine phantoms, a text encoder and an arm trained from nothing, kept as the stages keep them
    here = tmp_path_factory.mktemp("shipped")
    table = cases(here, "shipped", 9, P.anatomy.groups).assign(
        split=["train"] * 5 + ["val"] * 2 + ["test"] * 2
    )
    write_json(
        build_text_encoder(P.text, table, 0, here / "build/text", here / "resume/text"),
        here / "runs/text/metrics.json",
    )
    text, out = load_text(here / "build/text"), here / "runs/pretrain/asap"
    model, log, watched, _, metrics = run(
        "asap",
        ROW,
        P,
        table,
        text,
        here / "resume/asap",
        dict(corpus="1", mean_hu=[-500.0, -510.0]),
    )
    about = dict(
        spacing=P.volumes.spacing,
        hu_range=P.volumes.hu_range,
        train=dict(ct_rate=5),
        seed=0,
        phantom=2,
    )
    save(model, out / "checkpoint", model_card("asap", model.config, metrics, about))
    write_csv(log, out / "log.csv")
    write_csv(watched, out / "eval.csv")
    write_json(metrics["recipe"], out / "recipe.json")
    write_json(metrics, out / "metrics.json")
    for stage in ("text", "pretrain-asap"):
        write_json(dict(minutes=7.2), here / f"runs/minutes/{stage}.json")
    return SimpleNamespace(
        here=here,
        table=table,
        text=text,
        model=model,
        log=log,
        watched=watched,
        metrics=metrics,
        kept=export_weights("asap", here),
        words=export_weights("text", here),
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def again(study, to, row=ROW, p=P, corpus="1", hu=(-500.0, -510.0)):
    return run(
        "asap",
        row,
        p,
        study.table,
        study.text,
        to,
        dict(corpus=corpus, mean_hu=list(hu)),
        study.kept,
    )


def test_an_arm_trained_from_nothing_is_taken_again(study, tmp_path):
    assert (
        study.metrics["weights_source"] == "trained"
        and len(study.log)
        and "in 7 minutes" in (study.kept / "card.md").read_text()
    )
    model, log, watched, rows, metrics = again(study, tmp_path)
    assert (
        metrics["weights_source"] == "shipped"
        and same(model, study.model)
        and not (tmp_path / "resume").exists()
        and not (tmp_path / "log.csv").exists()
    ), "nothing was trained"
    assert dict(metrics, weights_source="") == dict(study.metrics, weights_source=""), (
        "it is asked again what it learnt, and says the same"
    )
    pd.testing.assert_frame_equal(log, study.log, check_dtype=False)
    pd.testing.assert_frame_equal(watched, study.watched, check_dtype=False)
    x = torch.zeros(1, 1, *P.volumes.roi_size)
    assert torch.equal(
        load(study.kept).forward_features(x), study.model.eval().vit.forward_features(x)
    )


@pytest.mark.parametrize("what", ["row", "rate", "params", "data", "voxels"])
def test_an_edited_recipe_trains_anew(study, tmp_path, capfd, what):
    change = dict(
        row=dict(row=dict(ROW, organ_weight=0.0)),
        rate=dict(row=dict(ROW, lr_scale=2.0)),
        params=dict(
            p=P.model_copy(update=dict(pretrain=P.pretrain.model_copy(update=dict(lr=0.0005))))
        ),
        data=dict(corpus="2"),
        voxels=dict(hu=(-500.0, -510.1)),
    )[what]
    model, _, _, _, metrics = again(study, tmp_path, **change)
    said, key = (
        capfd.readouterr(),
        dict(
            row="arm",
            rate="pretrain",
            params="pretrain",
            data="inputs.corpus",
            voxels="inputs.mean_hu",
        )[what],
    )
    assert (
        metrics["weights_source"] == "trained"
        and "of another recipe" in said.out + said.err
        and key in said.out + said.err
    )
    assert what in ("data", "voxels") or not same(model, study.model)


def test_what_changes_nothing_that_is_learnt_trains_nothing(study, tmp_path):
    p = P.model_copy(
        update=dict(
            pretrain=P.pretrain.model_copy(
                update=dict(checkpoint_every=7, eval_every=9, num_workers=1)
            )
        )
    )
    assert again(study, tmp_path, p=p)[-1]["weights_source"] == "shipped"
    assert again(study, tmp_path, hu=(-500.004, -510.0))[-1]["weights_source"] == "shipped", (
        "another processor's phantoms"
    )


def test_the_text_encoder_too(study, tmp_path, capfd):
    scores = build_text_encoder(P.text, study.table, 0, tmp_path / "a", tmp_path / "r", study.words)
    assert (
        scores["weights_source"] == "shipped"
        and load_text(tmp_path / "a").fingerprint() == study.text.fingerprint()
    )
    scores = build_text_encoder(P.text, study.table, 1, tmp_path / "b", tmp_path / "r", study.words)
    assert scores["weights_source"] == "trained" and "of another recipe" in "".join(
        capfd.readouterr()
    )


def test_a_broken_file_is_named(study, tmp_path):
    import shutil

    shutil.copytree(study.kept, tmp_path / "shipped")
    f = tmp_path / "shipped/model.safetensors"
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors"):
        run(
            "asap",
            ROW,
            P,
            study.table,
            study.text,
            tmp_path,
            dict(corpus="1", mean_hu=[-500.0, -510.0]),
            tmp_path / "shipped",
        )
