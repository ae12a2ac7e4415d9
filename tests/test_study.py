"""The study end to end at smoke scale, in a temporary clone: it runs, it rests, it reruns what
changed, it survives a kill"""

import json
import re
import shutil
import sys

import nbformat
import pytest
import yaml
from conftest import TOP
from smoke import ENV, change, clone as clone, digest, edited, kill_when, ran, run

pytestmark = pytest.mark.study


def test_the_study_runs(clone):
    assert len(run("dvc", "stage", "list", cwd=clone).splitlines()) <= 45
    page = (clone / "runs/study/index.html").read_text()
    assert len(page) > 20_000 and "phantom" in page.lower()
    metrics = json.loads((clone / "runs/classify/metrics.json").read_text())
    assert {"scratch", "asap", "histogram"} <= set(metrics) and {
        "classify_ct_rate",
        "classify_inspect",
        "external_rspect",
    } <= set(metrics["asap"])
    for family in ("prognosis", "vocabulary", "zero_shot", "retrieve"):
        assert json.loads((clone / f"runs/{family}/metrics.json").read_text())["asap"], family
    for arm in ("asap", "unet"):
        assert "segment_acdc" in json.loads(
            (clone / f"runs/segment/{arm}/metrics.json").read_text()
        )[arm] and list((clone / f"runs/segment/{arm}/masks/segment_acdc").glob("*.nii.gz"))
    assert (
        "<h2>The claims, one by one</h2>" in page
        and "verdict" in (clone / "runs/tables/claims.csv").read_text()
        and "\\toprule" in (clone / "runs/tables/tasks.tex").read_text()
    )
    controls = (clone / "runs/tables/negative_controls.csv").read_text()
    assert all(
        f"{c} dealt out anew,mean of tasks 1 to 6" in controls for c in ("labels", "volumes")
    )
    grounded = json.loads((clone / "runs/grounding/status.json").read_text())
    assert (
        grounded["available"]
        and grounded["arms"] == ["paper", "asap"]
        and grounded["excluded"] == 0
        and "<h2>Grounding</h2>" in page
        and "Not measured" not in page
    )
    assert all(
        (clone / "runs/grounding" / f).exists()
        for f in (
            "hits.parquet",
            "hits.csv",
            "differences.csv",
            "extent_correlation.csv",
            "pointing.png",
        )
    )


def test_the_page_stands_alone(clone):
    page = (clone / "runs/study/index.html").read_text()
    outside = re.findall(
        r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](?!data:|#)([^"']+)""", page
    )
    assert not outside, outside
    links = [
        a
        for a in re.findall(r"""<a[^>]+href=["']([^"'#]+)""", page)
        if not a.startswith(("http", "data:"))
    ]
    assert links and all((clone / "runs/study" / a).exists() for a in links), links


def test_a_second_repro_runs_nothing(clone):
    assert not ran(run("dvc", "repro", cwd=clone))


def test_a_changed_number_reruns_what_depends_on_it(clone):
    with edited(clone, tables__n_bootstrap=60):
        assert ran(run("dvc", "repro", cwd=clone)) == {"tables", "figures", "grounding", "page"}
    run("dvc", "repro", cwd=clone)


def test_tables_and_figures_made_again_are_the_same_bytes(clone):
    kept = {f: digest(f) for d in ("tables", "figures") for f in (clone / "runs" / d).glob("*.csv")}
    for d in ("tables", "figures"):
        shutil.rmtree(clone / "runs" / d)
    for stage in ("tables", "figures"):
        run("dvc", "repro", "-f", "-s", stage, cwd=clone)
    assert kept and {f: digest(f) for f in kept} == kept


def test_an_edited_arm_reruns_alone(clone):
    arm = yaml.safe_load((clone / "params.yaml").read_text())["arms"]["asap"]
    with edited(clone, arms__asap=dict(arm, organ_weight=2)):
        status = ran(run("dvc", "repro", "--dry", "-P", cwd=clone))
    assert "pretrain@asap" in status and not status & {
        "pretrain@scratch",
        "prepare@ct_rate",
        "synthesize",
        "corpus",
        "text",
    }


def fenced(kind, holds) -> str:
    "The block of a kind that holds some words, in the README or in the manual"
    page = nbformat.read(TOP / "nbs/tutorials/manual.ipynb", as_version=4)
    text = "\n".join([(TOP / "README.md").read_text(), *(c.source for c in page.cells)])
    return next(b for b in re.findall(rf"```{kind}\n(.*?)```", text, re.S) if holds in b)


def test_one_number_as_the_readme_says(clone):
    "dvc exp run, show, diff and back: the README's lines, stopped at pre-training"
    if not (clone / ".git").exists():
        pytest.skip("needs git: `dvc exp` compares commits")
    arm, names = clone / "runs/pretrain/asap", ("checkpoint/model.safetensors", "metrics.json")
    before, params = [digest(arm / f) for f in names], (clone / "params.yaml").read_text()
    me = (
        "export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t "
        "GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t; "
    )
    lines = [line.split("#")[0].strip() for line in fenced("sh", "dvc exp run").splitlines()]
    first = ["make quick", "cd build/quick && source ../../.venv/bin/activate"]
    assert lines[:2] == first
    lines = lines[1:]
    assert [line.split()[0] for line in lines] == ["cd", "git", "dvc", "asap", "git"]
    run("bash", "-ec", me + lines[1], cwd=clone)
    text = run("bash", "-ec", f"{me}{lines[2]} pretrain@asap", cwd=clone)
    assert (
        ran(text) == {"pretrain@asap"}
        and json.loads((arm / "metrics.json").read_text())["organs"] == {}
    )
    assert "arms.asap.organ_weight" in run("bash", "-ec", f"python -m {lines[3]}", cwd=clone)
    shown = run("dvc", "exp", "show", "--csv", cwd=clone)
    assert all(name in shown for name in ("no_organs", "arms.asap.organ_weight", "probe"))
    assert json.loads(run("dvc", "params", "diff", "HEAD", "no_organs", "--json", cwd=clone))[
        "params.yaml"
    ] == {"arms.asap.organ_weight": {"old": 1, "new": 0, "diff": -1}}
    text = run("bash", "-ec", f"{lines[4]} pretrain@asap", cwd=clone)
    assert (
        not ran(text)
        and [digest(arm / f) for f in names] == before
        and (clone / "params.yaml").read_text() == params
    )


def test_a_new_arm_is_a_row_and_its_name(clone):
    "The row of the manual: it is read, it alone is trained, and what reads arms reads it too"
    raw, block = (
        yaml.safe_load((clone / "params.yaml").read_text()),
        yaml.safe_load(fenced("yaml", "arms:")),
    )
    with edited(
        clone,
        study__arms=block["study"]["arms"],
        **{f"arms__{name}": row for name, row in block["arms"].items()},
    ):
        assert "fine" in run(sys.executable, "-m", "asap.cli", "params", cwd=clone)
        status = set(json.loads(run("dvc", "status", "--json", cwd=clone)))
    assert {
        "pretrain@asap_more_organs",
        "embed@asap_more_organs",
        "classify",
        "tables",
    } <= status, status
    assert not status & {
        "synthesize",
        "corpus",
        "text",
        *(f"pretrain@{a}" for a in raw["study"]["arms"]),
        *(f"embed@{a}" for a in raw["study"]["arms"]),
    }


def test_a_wrong_key_stops_before_anything_runs(clone):
    with edited(clone, pretrain__step=10):
        text = run("dvc", "repro", "-f", "-s", "tables", cwd=clone, check=False)
    assert "unknown key `pretrain.step`: did you mean `steps`?" in text


def test_the_same_seed_gives_the_same_bytes(clone):
    "Word pieces, text encoder and weights, made again by kernels that are no forks"
    kept = [clone / "build/text" / f for f in ("tokenizer.json", "model.safetensors")] + [
        clone / "runs/pretrain/asap" / f
        for f in ("checkpoint/model.safetensors", "metrics.json", "log.csv")
    ]
    before = [digest(f) for f in kept]
    for stage in ("text", "pretrain@asap"):
        run("dvc", "repro", "-f", "-s", stage, cwd=clone, env=ENV)
    assert before == [digest(f) for f in kept]


def half_trained(clone):
    return lambda: (clone / "build/resume/pretrain/asap/resume/state.pt").exists()


KEPT = ("checkpoint/model.safetensors", "metrics.json", "log.csv")


@pytest.fixture(scope="module")
def whole(clone):
    "What 60 steps of pre-training write, never stopped"
    with edited(clone, pretrain__steps=60):
        run("dvc", "repro", "-f", "-s", "pretrain@asap", cwd=clone)
    return [digest(clone / "runs/pretrain/asap" / f) for f in KEPT]


def test_a_killed_stage_ends_with_the_same_numbers(clone, whole):
    arm = clone / "runs/pretrain/asap"
    with edited(clone, pretrain__steps=60):
        shutil.rmtree(clone / "build/resume", ignore_errors=True)
        kill_when(clone, half_trained(clone), "dvc", "repro", "-f", "-s", "pretrain@asap")
        assert not (arm / "checkpoint/model.safetensors").exists()
        text = run(
            "dvc", "repro", "-f", "-s", "pretrain@asap", cwd=clone
        )  # without -f DVC takes the first run's outputs out of its cache
        assert "resumed at step" in text, text[-3000:]
        assert whole == [digest(arm / f) for f in KEPT]


def test_a_changed_rate_does_not_resume_the_old_weights(clone, whole):
    arm, lr = (
        clone / "runs/pretrain/asap",
        yaml.safe_load((clone / "params.yaml").read_text())["pretrain"]["lr"],
    )
    with edited(clone, pretrain__steps=60, pretrain__lr=2 * lr):
        shutil.rmtree(clone / "build/resume", ignore_errors=True)
        kill_when(clone, half_trained(clone), "dvc", "repro", "-s", "pretrain@asap")
        change(clone, pretrain__lr=lr)
        text = run("dvc", "repro", "-f", "-s", "pretrain@asap", cwd=clone)
        assert f"lr: {2 * lr} -> {lr}" in text, text[-3000:]
        assert digest(arm / KEPT[0]) == whole[0]
