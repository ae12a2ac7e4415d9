"The study end to end at smoke scale, in a temporary clone: it runs, it rests, it reruns what changed, it survives a kill"
import contextlib, hashlib, json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil, pytest, yaml
from conftest import TOP

pytestmark = pytest.mark.study
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "ASAP_ROOT": ""}

STUDY = (sys.executable, "-m", "asap.cli", "study") # as `make study` does

def run(*args, cwd, check=True)->str:
    "Output of a command, both streams"
    done = subprocess.run(args, cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not check or done.returncode == 0, done.stdout[-8000:]
    return done.stdout

def ran(text)->set[str]:
    "Stages that a repro executed"
    return set(re.findall(r"Running stage '([^']+)'", text))

def change(clone, **changed):
    "Set section__key in the clone's params.yaml"
    raw = yaml.safe_load((clone/"params.yaml").read_text())
    for name, value in changed.items():
        section, key = name.split("__")
        raw[section][key] = value
    (clone/"params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))

@contextlib.contextmanager
def edited(clone, **changed):
    "The same, until the test ends, well or not"
    old = (clone/"params.yaml").read_text()
    change(clone, **changed)
    try: yield
    finally: (clone/"params.yaml").write_text(old)

def digest(path)->str: return hashlib.sha256(path.read_bytes()).hexdigest()

def kill_when(clone, there, *args):
    "Start a command, wait until `there()` holds, then kill it and all its children at once"
    log = open(clone/"killed.log", "w")
    p = psutil.Popen(args, cwd=clone, env=ENV, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic()+180
    while not there():
        with contextlib.suppress(psutil.TimeoutExpired):
            p.wait(timeout=0.02)
            pytest.fail("it ended before it could be killed: "+(clone/"killed.log").read_text()[-3000:])
        assert time.monotonic() < end
    family = [p, *p.children(recursive=True)] # DVC first, as when a machine goes down: it has no time to clean up
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess): one.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)

@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A clone at smoke scale in which the whole study has run once"
    to = tmp_path_factory.mktemp("smoke")/"asap"
    run("bash", "tests/smoke.sh", str(to), cwd=TOP)
    run(*STUDY, cwd=to)
    return to

def test_the_study_runs(clone):
    assert len(run("dvc", "stage", "list", cwd=clone).splitlines()) <= 45
    page = (clone/"runs/study/index.html").read_text()
    assert len(page) > 20_000 and "phantom" in page.lower()
    metrics = json.loads((clone/"runs/classify/metrics.json").read_text())
    assert {"scratch", "asap", "histogram"} <= set(metrics) and {"classify_ct_rate", "classify_inspect", "external_rspect"} <= set(metrics["asap"])
    for family in ("prognosis", "vocabulary", "zero_shot", "retrieve"): assert json.loads((clone/f"runs/{family}/metrics.json").read_text())["asap"], family
    for arm in ("asap", "unet"):
        assert "segment_acdc" in json.loads((clone/f"runs/segment/{arm}/metrics.json").read_text())[arm] and list((clone/f"runs/segment/{arm}/masks/segment_acdc").glob("*.nii.gz"))
    assert "Claim by claim" in page and "verdict" in (clone/"runs/tables/claims.csv").read_text() and "\\toprule" in (clone/"runs/tables/tasks.tex").read_text()
    controls = (clone/"runs/tables/controls.csv").read_text()
    assert all(f"{c} dealt out anew,mean of tasks 1 to 6" in controls for c in ("labels", "volumes"))
    grounded = json.loads((clone/"runs/grounding/status.json").read_text())
    assert grounded["there"] and grounded["arms"] == ["asap"] and grounded["left_out"] == 0 and "Where sentences point" in page and "Not measured" not in page
    assert all((clone/"runs/grounding"/f).exists() for f in ("hits.parquet", "hits.csv", "against.csv", "extent.csv", "pointing.png"))

def test_the_page_stands_alone(clone):
    page = (clone/"runs/study/index.html").read_text()
    outside = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](?!data:|#)([^"']+)""", page)
    assert not outside, outside
    links = [a for a in re.findall(r"""<a[^>]+href=["']([^"'#]+)""", page) if not a.startswith(("http", "data:"))]
    assert links and all((clone/"runs/study"/a).exists() for a in links), links

def test_a_second_repro_runs_nothing(clone):
    assert not ran(run("dvc", "repro", cwd=clone))

def test_a_changed_number_reruns_what_depends_on_it(clone):
    with edited(clone, tables__bootstrap=60): assert ran(run("dvc", "repro", cwd=clone)) == {"tables", "figures", "grounding", "page"}
    run("dvc", "repro", cwd=clone)

def test_tables_and_figures_made_again_are_the_same_bytes(clone):
    kept = {f: digest(f) for d in ("tables", "figures") for f in (clone/"runs"/d).glob("*.csv")}
    for d in ("tables", "figures"): shutil.rmtree(clone/"runs"/d)
    for stage in ("tables", "figures"): run("dvc", "repro", "-f", "-s", stage, cwd=clone)
    assert kept and {f: digest(f) for f in kept} == kept

def test_an_edited_arm_reruns_alone(clone):
    arm = yaml.safe_load((clone/"params.yaml").read_text())["arms"]["asap"]
    with edited(clone, arms__asap=dict(arm, organs=2)): status = ran(run("dvc", "repro", "--dry", "-P", cwd=clone))
    assert "pretrain@asap" in status and not status & {"pretrain@scratch", "prepare@ct_rate", "synthesize", "corpus", "text"}

def fenced(kind, holds)->str:
    "The README's block of a kind that holds some words"
    return next(b for b in re.findall(rf"```{kind}\n(.*?)```", (TOP/"README.md").read_text(), re.S) if holds in b)

def test_one_number_as_the_readme_says(clone):
    "dvc exp run, show, diff and back: the README's lines, stopped at pre-training"
    arm, names = clone/"runs/pretrain/asap", ("checkpoint/model.safetensors", "metrics.json")
    before, params = [digest(arm/f) for f in names], (clone/"params.yaml").read_text()
    me = "export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t; "
    lines = [line.split("#")[0].strip() for line in fenced("sh", "dvc exp run").splitlines()]
    assert [line.split()[0] for line in lines] == ["cd", "git", "dvc", "dvc", "git"] and lines[0] == "cd build/quick && source ../../.venv/bin/activate"
    run("bash", "-ec", me+lines[1], cwd=clone)
    text = run("bash", "-ec", f"{me}{lines[2]} pretrain@asap", cwd=clone)
    assert ran(text) == {"pretrain@asap"} and json.loads((arm/"metrics.json").read_text())["organs"] == {}
    shown = run("bash", "-ec", f"{lines[3]} --csv", cwd=clone)
    assert "no_organs" in shown and "arms.asap.organs" in shown and "organs.mae.model" in shown
    assert json.loads(run("dvc", "params", "diff", "HEAD", "no_organs", "--json", cwd=clone))["params.yaml"] == {"arms.asap.organs": {"old": 1, "new": 0, "diff": -1}}
    assert any("pretrain/asap" in f for f in json.loads(run("dvc", "metrics", "diff", "HEAD", "no_organs", "--json", cwd=clone)))
    text = run("bash", "-ec", f"{lines[4]} pretrain@asap", cwd=clone)
    assert not ran(text) and [digest(arm/f) for f in names] == before and (clone/"params.yaml").read_text() == params

def test_a_new_arm_is_a_row_and_its_name(clone):
    "The README's row: it is read, it alone is trained, and what reads arms reads it too"
    raw, block = yaml.safe_load((clone/"params.yaml").read_text()), yaml.safe_load(fenced("yaml", "arms:"))
    with edited(clone, study__arms=block["study"]["arms"], **{f"arms__{name}": row for name, row in block["arms"].items()}):
        assert "fine" in run(sys.executable, "-m", "asap.cli", "params", cwd=clone)
        status = set(json.loads(run("dvc", "status", "--json", cwd=clone)))
    assert {"pretrain@asap_more_organs", "embed@asap_more_organs", "classify", "tables"} <= status, status
    assert not status & {"synthesize", "corpus", "text", *(f"pretrain@{a}" for a in raw["study"]["arms"]), *(f"embed@{a}" for a in raw["study"]["arms"])}

def test_a_wrong_key_stops_before_anything_runs(clone):
    with edited(clone, pretrain__step=10): text = run("dvc", "repro", "-f", "-s", "tables", cwd=clone, check=False)
    assert "unknown key `pretrain.step`: did you mean `steps`?" in text

def test_the_same_seed_gives_the_same_bytes(clone):
    "Word pieces, text encoder and weights, made again in processes of their own"
    kept = [clone/"build/text"/f for f in ("tokenizer.json", "model.safetensors")]+[clone/"runs/pretrain/asap"/f for f in ("checkpoint/model.safetensors", "metrics.json", "log.csv")]
    before = [digest(f) for f in kept]
    for stage in ("text", "pretrain@asap"): run("dvc", "repro", "-f", "-s", stage, cwd=clone)
    assert before == [digest(f) for f in kept]

def half_trained(clone): return lambda: (clone/"build/resume/pretrain/asap/resume/state.pt").exists()

def test_a_killed_stage_ends_with_the_same_numbers(clone):
    arm, kept = clone/"runs/pretrain/asap", ("checkpoint/model.safetensors", "metrics.json", "log.csv")
    with edited(clone, pretrain__steps=60):
        run("dvc", "repro", "-f", "-s", "pretrain@asap", cwd=clone)
        whole = [digest(arm/f) for f in kept]
        shutil.rmtree(clone/"build/resume", ignore_errors=True)
        kill_when(clone, half_trained(clone), "dvc", "repro", "-f", "-s", "pretrain@asap")
        assert not (arm/"checkpoint/model.safetensors").exists()
        text = run("dvc", "repro", "-f", "-s", "pretrain@asap", cwd=clone) # without -f DVC takes the first run's outputs out of its cache
        assert "resumed at step" in text, text[-3000:]
        assert whole == [digest(arm/f) for f in kept]

def test_a_changed_rate_does_not_resume_the_old_weights(clone):
    arm = clone/"runs/pretrain/asap"
    with edited(clone, pretrain__steps=60, pretrain__lr=0.0005):
        run("dvc", "repro", "-f", "-s", "pretrain@asap", cwd=clone)
        clean = digest(arm/"checkpoint/model.safetensors")
        shutil.rmtree(clone/"build/resume", ignore_errors=True)
        change(clone, pretrain__lr=0.002)
        kill_when(clone, half_trained(clone), "dvc", "repro", "-s", "pretrain@asap")
        change(clone, pretrain__lr=0.0005)
        text = run("dvc", "repro", "-f", "-s", "pretrain@asap", cwd=clone)
        assert "lr: 0.002 -> 0.0005" in text, text[-3000:]
        assert digest(arm/"checkpoint/model.safetensors") == clean

def listing(folder): return {f.relative_to(folder): (f.stat().st_mtime_ns, f.stat().st_size) for f in folder.rglob("*") if f.is_file()}

def test_other_data_in_and_back_again(clone, tmp_path):
    "The README's three lines: a folder and a line that points to one, run, and back; what did not change is not made again"
    other, far = tmp_path/"mine", tmp_path/"far/ct_rate"
    draw = ("import sys; from importlib import import_module; a = import_module(f'asap.data.cohorts.{sys.argv[1]}'); "
            "a.write(sys.argv[2], 7, 14, 8, size=(48, 48, 24), spacing=(7., 7., 14.), recon_share=0.2)")
    for name, to in (("stoic", other/"stoic"), ("ct_rate", far)): run(sys.executable, "-c", draw, name, str(to), cwd=clone)
    (other/"ct_rate.path").write_text(f"{far}\n")
    for f in (far, *far.rglob("*")): f.chmod(0o555 if f.is_dir() else 0o444)
    run(*STUDY, cwd=clone)
    kept = [clone/"runs"/f for f in ("pretrain/asap/checkpoint/model.safetensors", "classify/metrics.json", "tables/cohorts.csv", "figures/labels.csv")]
    before, volumes, lock, there = [digest(f) for f in kept], listing(clone/"build/volumes"), [(clone/f).read_text() for f in ("data.dvc", "dvc.lock")], listing(far)
    (clone/"data.dvc").write_text(lock[0].replace("path: build/synthetic", f"path: {other}"))
    text = run(*STUDY, cwd=clone)
    assert "acdc: left out, because data/ has neither acdc/ nor acdc.path" in text and listing(far) == there
    page = (clone/"runs/study/index.html").read_text()
    assert "about data that was put in data/</b>: ct_rate, stoic" in page and "Left out, because not in <code>data/</code></b>: inspect, rspect, acdc, radgenome, own" in page
    assert "Not measured</b>: data/ has neither rex_grounding_ct/ nor rex_grounding_ct.path" in page
    assert "Drawn by a program" not in page and "A phantom's report" not in page and str(far) not in page and str(other) not in page
    tables = json.loads((clone/"build/cohorts/ct_rate/status.json").read_text())
    assert tables["there"] and not tables["phantoms"] and tables["patients"] == 22
    for f, s in zip(("data.dvc", "dvc.lock"), lock): (clone/f).write_text(s)
    text = run(*STUDY, cwd=clone)
    assert not ran(text) & {"synthesize", "real", "text", "pretrain@asap", "pretrain@scratch", "embed@asap", "embed@scratch"}, text[-3000:]
    assert [digest(f) for f in kept] == before and listing(clone/"build/volumes") == volumes

def test_a_kill_while_preparing_leaves_nothing_half(clone):
    volumes = clone/"build/volumes/ct_rate"
    run("dvc", "repro", cwd=clone)
    before = {f.name: digest(f) for f in volumes.glob("[!.]*.nii")}
    metrics = (clone/"runs/classify/metrics.json").read_text()
    for f in sorted(volumes.glob("[!.]*.nii"))[5:]: f.unlink()
    kill_when(clone, lambda: len(list(volumes.glob("[!.]*.nii"))) > 8, "dvc", "repro", "-f", "-s", "prepare@ct_rate")
    run("dvc", "repro", cwd=clone)
    assert {f.name: digest(f) for f in volumes.glob("[!.]*.nii")} == before
    assert (clone/"runs/classify/metrics.json").read_text() == metrics

def test_a_killed_study_goes_on(clone):
    with edited(clone, tables__bootstrap=70):
        kill_when(clone, lambda: {"tables", "grounding"} <= ran((clone/"killed.log").read_text()), *STUDY)
        text = run(*STUDY, cwd=clone)
        assert "tables done" in text and "page done" in text and not ran(run("dvc", "repro", cwd=clone))
