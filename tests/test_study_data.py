"The smoke study with other data, and killed while it runs"

import json
import sys

import pytest
from smoke import STUDY, clone as clone, digest, edited, kill_when, ran, run

pytestmark = pytest.mark.study


def listing(folder):
    return {
        f.relative_to(folder): (f.stat().st_mtime_ns, f.stat().st_size)
        for f in folder.rglob("*")
        if f.is_file()
    }


def test_other_data_in_and_back_again(clone, tmp_path):
    """The README's three lines: a folder and a line that points to one, run, and back; what did
    not change is not made again"""
    other, far = tmp_path / "mine", tmp_path / "far/ct_rate"
    draw = (
        "import sys; from asap.data.adapter import get_cohort; a = get_cohort(sys.argv[1]); "
        "a.write(sys.argv[2], 7, 14, 8, size=(48, 48, 24), "
        "spacing=(7., 7., 14.), "
        "second_recon_prob=0.2)"
    )
    for name, to in (("stoic", other / "stoic"), ("ct_rate", far)):
        run(sys.executable, "-c", draw, name, str(to), cwd=clone)
    (other / "ct_rate.path").write_text(f"{far}\n")
    for f in (far, *far.rglob("*")):
        f.chmod(0o555 if f.is_dir() else 0o444)
    run(*STUDY, cwd=clone)
    kept = [
        clone / "runs" / f
        for f in (
            "pretrain/asap/checkpoint/model.safetensors",
            "classify/metrics.json",
            "tables/cohorts.csv",
            "figures/labels.csv",
        )
    ]
    before, volumes, lock, there = (
        [digest(f) for f in kept],
        listing(clone / "build/volumes"),
        [(clone / f).read_text() for f in ("data.dvc", "dvc.lock")],
        listing(far),
    )
    (clone / "data.dvc").write_text(lock[0].replace("path: build/synthetic", f"path: {other}"))
    text = run(*STUDY, cwd=clone)
    assert (
        "acdc: left out, because data/ has neither acdc/ nor acdc.path" in text
        and listing(far) == there
    )
    page = (clone / "runs/study/index.html").read_text()
    assert (
        "about data that was put in data/</b>: ct_rate, stoic" in page
        and "Left out, because not in <code>data/</code></b>: inspect, rspect, acdc, radgenome, own"
        in page
    )
    assert "Not measured</b>: data/ has neither rex_grounding_ct/ nor rex_grounding_ct.path" in page
    assert (
        "Drawn by a program" not in page
        and "A phantom's report" not in page
        and str(far) not in page
        and str(other) not in page
    )
    tables = json.loads((clone / "build/cohorts/ct_rate/status.json").read_text())
    assert tables["there"] and not tables["phantoms"] and tables["patients"] == 22
    for f, s in zip(("data.dvc", "dvc.lock"), lock):
        (clone / f).write_text(s)
    text = run("dvc", "repro", cwd=clone)
    assert not ran(text) & {
        "synthesize",
        "real",
        "text",
        "pretrain@asap",
        "pretrain@scratch",
        "embed@asap",
        "embed@scratch",
    }, text[-3000:]
    assert [digest(f) for f in kept] == before and listing(clone / "build/volumes") == volumes


def test_a_kill_while_preparing_leaves_nothing_half(clone):
    volumes = clone / "build/volumes/ct_rate"
    run("dvc", "repro", cwd=clone)
    before = {f.name: digest(f) for f in volumes.glob("[!.]*.nii")}
    metrics = (clone / "runs/classify/metrics.json").read_text()
    for f in sorted(volumes.glob("[!.]*.nii"))[5:]:
        f.unlink()
    kill_when(
        clone,
        lambda: len(list(volumes.glob("[!.]*.nii"))) > 8,
        "dvc",
        "repro",
        "-f",
        "-s",
        "prepare@ct_rate",
    )
    run("dvc", "repro", cwd=clone)
    assert {f.name: digest(f) for f in volumes.glob("[!.]*.nii")} == before
    assert (clone / "runs/classify/metrics.json").read_text() == metrics


def test_a_killed_study_goes_on(clone):
    with edited(clone, tables__n_bootstrap=70):
        kill_when(
            clone,
            lambda: {"tables", "grounding"} <= ran((clone / "killed.log").read_text()),
            *STUDY,
        )
        text = run(*STUDY, cwd=clone)
        assert (
            "tables done" in text
            and "page done" in text
            and not ran(run("dvc", "repro", cwd=clone))
        )
