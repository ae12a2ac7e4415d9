"The record of the full budget: what is refused, what is kept, and what README and page say of it"

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import readme
from conftest import TOP, load_script

from asap.core import write_csv, write_json
from asap.study import page

record = load_script(TOP / "benchmarks/record.py")
KEPT = TOP / "results/full/record.json"
CLAIM = dict(
    claim="transfer",
    outcome="mean of all tasks",
    arm="asap",
    comparator="clip",
    difference=0.1,
    lo=0.05,
    hi=0.15,
    tasks=22,
    verdict="supported",
)


@pytest.fixture
def tree(tmp_path):
    "A repository with a finished full budget"
    (tmp_path / "params").mkdir()
    (tmp_path / "params/full.yaml").write_text("study: {budget: full}\n")
    (tmp_path / ".gitignore").write_text("/build/\n")
    (tmp_path / "code.py").write_text("a = 1\n")
    study = tmp_path / "build/full/runs/study"
    write_csv(pd.DataFrame([CLAIM]), study / "data/tables/claims.csv")
    (study / "metrics.json").write_text("{}")
    (study / "index.html").write_text(
        '<a href="notebooks/text.html">text</a> <a href="#top">up</a>'
    )
    for name in (".gitignore", "code.py"):
        shutil.copy(tmp_path / name, tmp_path / "build/full" / name)
    shutil.copytree(tmp_path / "params", tmp_path / "build/full/params")
    shutil.copy(tmp_path / "params/full.yaml", tmp_path / "build/full/params.yaml")
    for call in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *call], cwd=tmp_path, check=True)
    return tmp_path


@pytest.fixture
def finished(monkeypatch):
    monkeypatch.setattr(record, "stale_stages", lambda folder: [])


def refuse(root):
    return record.refusal(root, root / "build/full")


def test_a_finished_study_is_kept(tree, finished):
    assert refuse(tree) is None


def test_what_is_not_committed(tree, finished):
    (tree / "code.py").write_text("a = 2\n")
    assert "not committed: M code.py" in refuse(tree)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("code.py", "a = 2\n", "ran with another code.py"),
        ("params.yaml", "study: {budget: short}\n", "params.yaml differs from params/full.yaml"),
        ("runs/study/index.html", "x" * 6_000_001, "6.0 MB, more than 6"),
        ("runs/study/index.html", None, "has no study page"),
    ],
)
def test_another_study(tree, finished, file, text, said):
    path = tree / "build/full" / file
    path.unlink() if text is None else path.write_text(text)
    assert said in refuse(tree)


def test_a_study_that_has_not_finished(tree):
    "DVC says it: a stage without outputs, and the same one after it has run"
    full = tree / "build/full"
    (full / "dvc.yaml").write_text("stages: {page: {cmd: echo a > out, outs: [out]}}\n")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "-q", "--no-scm"], cwd=full, check=True)
    assert refuse(tree) == "the study has not finished: page"
    subprocess.run([*dvc, "repro", "-q"], cwd=full, check=True)
    assert refuse(tree) is None


def test_the_page_links_to_nothing_that_is_not_kept(tree, tmp_path):
    out = tmp_path / "kept"
    out.mkdir()
    record.copy_page(tree / "build/full", out)
    assert (out / "index.html").read_text() == 'text <a href="#top">up</a>'
    assert (out / "data/tables/claims.csv").exists() and (out / "metrics.json").exists()
    index = tree / "build/full/runs/study/index.html"
    index.write_text('<a href="elsewhere.html">x</a>')
    with pytest.raises(ValueError, match="links to elsewhere.html"):
        record.copy_page(tree / "build/full", out)


def test_trainings_of_an_arm(tmp_path):
    row = SimpleNamespace(align_candidates=None)
    p = SimpleNamespace(
        arms=dict(asap=SimpleNamespace(align_candidates="organs"), mae=row, scratch=row),
        model=SimpleNamespace(align_candidates="all"),
    )
    for arm, source in dict(asap="shipped", mae="trained", scratch="none").items():
        write_json(dict(weights_source=source), tmp_path / f"runs/pretrain/{arm}/metrics.json")
    known = [("asap", "organs")] * 3 + [("asap", "all")]
    t = pd.DataFrame(known, columns=["arm", "candidates"])
    write_csv(t, tmp_path / "benchmarks/trainings.csv")
    found = {a: record.count_trainings(p, tmp_path, a) for a in p.arms}
    assert found == dict(asap=3, mae=1, scratch=0)


def keep(tree) -> dict:
    "A record of the tree, as `keep` writes it"
    out = tree / "results/full"
    out.mkdir(parents=True)
    record.copy_page(tree / "build/full", out)
    known = dict(commit="0123456789abcdef", machine="a CPU, 2 cores", date="2026-01-31")
    now = page.hash_params(tree / "params/full.yaml")
    write_json(known | dict(params_hash=now), out / "record.json")
    return page.read_record(tree)


def test_readme_and_page_say_of_which_version_it_is(tree):
    assert page.read_record(tree) is None and readme.record(tree) == ""
    assert keep(tree)["current"]
    for text in (readme.record(tree), page.render_record(page.read_record(tree))):
        assert "with the params of this version" in text and "older version" not in text
        assert "+0.100 [+0.050, +0.150]" in text and "commit 0123456789," in text
        assert "results/full/index.html" in text
    (tree / "params/full.yaml").write_text("study: {budget: full, seed: 2}\n")
    for text in (readme.record(tree), page.render_record(page.read_record(tree))):
        assert "of an older version" in text and "of this version" not in text


def test_a_param_of_the_base_changes_the_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("ASAP_ROOT", str(tmp_path))
    (tmp_path / "dvc.yaml").touch()
    base, full = tmp_path / "params.yaml", tmp_path / "full.yaml"
    full.write_text("base: params.yaml\nstudy: {budget: full}\n")
    base.write_text("study: {seed: 1}\n")
    before = page.hash_params(full)
    base.write_text("# a comment\nstudy: {seed: 1}\n")
    assert page.hash_params(full) == before
    base.write_text("study: {seed: 2}\n")
    assert page.hash_params(full) != before


def test_the_record_in_this_tree():
    "Where one is kept: its page is small, and README says of which version it is"
    if not KEPT.exists():
        pytest.skip("results/full holds no record")
    assert (KEPT.parent / "index.html").stat().st_size <= record.MAX_PAGE
    found = page.read_record(TOP)
    assert page.describe_record(found) in (TOP / "README.md").read_text(encoding="utf8")
    assert {"arms", "stage_minutes", "params_hash"} <= set(found)
