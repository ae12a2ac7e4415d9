"""A marker in every text that comes from strangers: case names, labels, reports, sentences. Nothing
runs it: no browser, spreadsheet, LaTeX, Markdown, picture, shell or viewer of masks"""

import re
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import mistune
import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, tab
from conftest import TOP

from asap.core import rng, write_json, write_parquet, write_sheet, write_text
from asap.data import review
from asap.data.adapter import get_cohort
from asap.data.prepare import CaseStore, prepare_cases, save_acquisition
from asap.data.table import cohort_row
from asap.data.volumes import Volume, write
from asap.inference import ground, segments, viewer
from asap.params import load_params
from asap.phantom.abnormalities import synthesize_chest
from asap.registry import task_families
from asap.study import figures, grounding, page, tables
from asap.tasks import classify, probe, report

MARK = (
    "=1+1 $\\input{/etc/passwd}$ & 5 % of_it <img src=x onerror=leaked=1> | **a** "
    "[b](javascript:leaked=1) </script><script>leaked=1</script>"
)
SIZE, SPACING = (48, 48, 24), (7.0, 7.0, 14.0)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium was found on this machine")
    with tab() as t:
        yield t


def show(t, path, ready="document.body"):
    "Open a file and wait until its pictures have loaded or failed; a page may add a fragment"
    t.open(path.as_uri())
    opened = f"location.href.split('#')[0] === {path.as_uri()!r}"
    t.until(f"{opened} && document.readyState === 'complete' && {ready}")


# --- what a study writes


def probe_rows(task: str) -> pd.DataFrame:
    "Predictions of two arms for two labels, one of them the marker"
    r = rng("markers", task)
    rows = [
        dict(case=f"c{i}", scan=f"s{i}", patient=f"p{i}", label=label, truth=float(i % 3 == 0))
        | dict(arm=a, fraction=f, num_labeled=int(40 * f), probability=r.random())
        for i in range(30)
        for label in (MARK, "Emphysema")
        for a in ("scratch", "asap")
        for f in (0.5, 1.0)
    ]
    return pd.DataFrame(rows).assign(task=task, threshold=0.5, C=1.0, seed=0)


def pointing_rows(labels: list[str]) -> pd.DataFrame:
    "hits.csv of the pointing game"
    names = [*page._HIT_HEADINGS, "patients", "lift_lo", "lift_hi"]
    names += [f"{k}{end}" for k in ("hit_rate", "dice") for end in ("_lo", "_hi")]
    names += [f"diff_{k}{end}" for k in page._BASELINES for end in ("", "_lo", "_hi")]
    names += ["dice_shuffled_scan"]
    row = dict.fromkeys(names, 0.2) | dict(arm="asap", patch_mm=MARK)
    return pd.DataFrame([row | dict(label=n) for n in labels])


def write_study(runs):
    "runs/ with tables, figures, pointing game and reports that hold the marker"
    probed = pd.concat([probe_rows(t) for t in ("classify_ct_rate", "classify_stoic")])
    predictions = {
        f: probed if f == "classify" else pd.DataFrame(columns=probe.COLUMNS)
        for f in task_families()
    }
    leaks = pd.concat(
        [
            probed[(probed.arm == "scratch") & (probed.fraction == 1)].assign(arm=c)
            for c in classify.NEGATIVE_CONTROLS
        ]
    )
    cases = dict(case=[f"c{i}" for i in range(30)], slice_mm=5.0, pixel_mm=1.0, contrast=np.nan)
    acquired = pd.DataFrame(cases).assign(kernel=MARK)
    statuses = [dict(cohort=MARK, there=False)]
    tables.write_tables(
        *(predictions, dict(classify=leaks), dict(ct_rate=acquired, stoic=acquired), {}),
        *("asap", statuses, 20, 0.95, runs / "tables"),
    )
    return probed, write_pointing(runs)


def write_pointing(runs):
    hits = pointing_rows([MARK, "large_lesions"])
    write_sheet(hits, runs / "grounding/hits.csv")
    differences = dict(label=MARK, arm="asap", comparator="clip", difference=0.1, lo=0.0, hi=0.2)
    write_sheet(pd.DataFrame([differences]), runs / "grounding/differences.csv")
    none = pd.DataFrame(columns=["arm", "rho"])
    write_sheet(none, runs / "grounding/extent_correlation.csv")
    status = dict(available=True, reference_arm="asap", num_patches=8, patch_mm=MARK)
    status |= dict(num_body_patches=5.0, large_lesions=[MARK], sentences=3, patients=2)
    status |= dict(num_atlas_masks=2, excluded=0, outside_crop=0)
    write_json(status, runs / "grounding/status.json")
    return hits, status


def plot_study(runs, hits, status):
    "The figures with labels, sentences and titles"
    out, styles = runs / "figures", figures.arm_styles(["scratch", "paper", "asap"])
    figures.plot_tables(runs / "tables", ["scratch", "asap"], [], None, out)
    figures.plot_phantoms([np.zeros((8, 8, 8))], [MARK], SPACING, out)
    organs = {f"group{c}_{k}": [0.1] for c in (0, 1) for k in ("model", "mean", "median")}
    figures.plot_organ_error(pd.DataFrame(organs), [MARK], 0.75, "asap", styles, out)
    grounding.plot_hit_rates(hits, "asap", styles["asap"], status | dict(patch_mm="4"), out)


def write_others(runs):
    "What the page reads beside tables: metrics, a report, the looks at real scans"
    for a in ("scratch", "paper", "asap"):
        m = dict(num_parameters=1, num_encoder_parameters=1, weights_source="trained")
        write_json(m, runs / f"pretrain/{a}/metrics.json")
    write_json(dict(encoder=MARK), runs / "text/metrics.json")
    said = dict(case=MARK, task="report_ct_rate", arm="asap", truth=MARK, predicted=MARK)
    written = pd.DataFrame([said | dict(generated=MARK, reference=MARK)])
    write_parquet(written, runs / "report/asap/predictions.parquet")
    looks = dict(looks=1, frozen=1, scans=[MARK], reasons=[MARK], skipped=[MARK])
    write_json(looks, runs / "real/status.json")
    scores = pd.DataFrame([dict.fromkeys(page._SCORE_COLUMNS, MARK)])
    write_sheet(scores, runs / "real/scores.csv")


def real_status() -> dict:
    scan = dict(what=MARK, format=MARK, shape=[1, 2, 3], spacing=[1, 1, 1], masks=MARK)
    scan |= dict(lesion=False, warnings=[MARK])
    return dict(scans={MARK: scan}, reasons=[MARK], sources=dict(a=MARK))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "runs/ of a small study, with its page"
    root = tmp_path_factory.mktemp("study")
    runs = root / "runs"
    _, (hits, status) = write_study(runs)
    plot_study(runs, hits, status)
    write_others(runs)
    p = load_params(TOP / "params/smoke.yaml")
    p = p.model_copy(update=dict(page=page.PageConfig(title=MARK)))
    sample = dict(findings=MARK, impression=MARK)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("ASAP_ROOT", str(root))
        page.write_page(p, runs, sample, real_status(), None, None)
    examples = report._render_examples(runs / "report", ["report_ct_rate"])
    write_text(
        f"<title>{review.TEMPLATES.from_string('{{x}}').render(x=MARK)}</title>{examples}",
        runs / "study/examples.html",
    )
    return runs


def is_inert(t) -> bool:
    "Nothing of the marker has become a part of the page or has run"
    parts = "img[src='x'], [onerror], a[href^='javascript']"
    return t.run(f"typeof leaked === 'undefined' && !document.querySelector(\"{parts}\")")


def read_text(t) -> str:
    return t.run("document.documentElement.textContent")


def test_pages_show_the_marker_as_text(study, browser):
    for path, least in ((study / "study/index.html", 20), (study / "study/examples.html", 4)):
        show(browser, path)
        assert is_inert(browser)
        assert read_text(browser).count("<img src=x onerror=leaked=1>") >= least
    for picture in sorted(study.rglob("*.svg")):
        show(browser, picture, "document.documentElement")
        assert is_inert(browser)


def test_the_browser_notices(tmp_path, browser):
    (tmp_path / "a.html").write_text(f"<body>{MARK}")
    show(browser, tmp_path / "a.html")
    assert not is_inert(browser)


def test_the_readers_notice(tmp_path):
    "Each finds a marker that is not escaped"
    (tmp_path / "a.csv").write_text(f'a\n"{MARK}"\n')
    (tmp_path / "a.md").write_text(f"| a |\n|---|\n| {MARK} |\n")
    (tmp_path / "a.tex").write_text(MARK)
    assert run_cells(tmp_path / "a.csv") and live_parts(tmp_path / "a.md")
    assert commands(tmp_path / "a.tex")


# --- tables and pictures


def run_cells(path) -> list[str]:
    "Cells that a spreadsheet would run"
    t = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
    number = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?$")
    return [c for c in t.to_numpy().ravel() if c[:1] in tuple("=+-@\t\r") and not number.match(c)]


def live_parts(path) -> list[str]:
    "HTML, links and pictures of a Markdown file; rows with too many cells"
    text = path.read_text(encoding="utf8")
    read = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])
    rows = {line.count("|") for line in text.splitlines() if line}
    found = re.findall(r"<(?:img|script|a)\b[^>]*>", read(text))
    return found + ([f"{rows} separators"] if len(rows) > 1 else [])


KNOWN_COMMANDS = set("begin end toprule midrule bottomrule textbf textbackslash".split())
KNOWN_COMMANDS |= {"textasciitilde", "textasciicircum", "space"}


def commands(path) -> list[str]:
    "Commands and math of a LaTeX file that are not of the table itself"
    text = path.read_text(encoding="utf8").replace("\\\\", "")
    found = [c for c in re.findall(r"\\([a-zA-Z]+)", text) if c not in KNOWN_COMMANDS]
    return found + re.findall(r"(?<!\\)[$#%]", text)


def test_tables_hold_nothing_that_runs(study):
    sheets, marked = sorted(study.rglob("*.csv")), 0
    for f in sheets:
        assert not run_cells(f), f
        marked += "onerror" in f.read_text(encoding="utf8")
    assert marked >= 10
    planted = [f for f in study.rglob("*.md") if "onerror" in f.read_text(encoding="utf8")]
    assert len(planted) >= 2 and not [f for f in planted if live_parts(f)]
    planted = [f for f in study.rglob("*.tex") if "onerror" in f.read_text(encoding="utf8")]
    assert planted and not [(f, c) for f in study.rglob("*.tex") if (c := commands(f))]


def test_pictures_hold_text_only(study):
    allowed = {"svg", "metadata", "RDF", "Work", "type", "format", "title", "defs", "style"}
    allowed |= {"g", "path", "use", "clipPath", "rect", "image", "Agent", "creator", "text"}
    pictures = sorted(study.rglob("*.svg"))
    for f in pictures:
        root = ET.parse(f).getroot()  # noqa: S314, of our own
        assert {e.tag.rpartition("}")[2] for e in root.iter()} <= allowed
        links = [v for e in root.iter() for k, v in e.items() if k.endswith("href")]
        assert not [v for v in links if not v.startswith(("#", "data:image/png"))]
    assert len([f for f in pictures if "onerror" in f.read_text(encoding="utf8")]) >= 3


def test_no_file_is_named_by_a_text(study):
    assert not [
        f
        for f in study.rglob("*")
        if "onerror" in f.name or "input" in f.name.lower() and f.stem != "inputs"
    ]


# --- a data set of strangers


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    "A data set with the marker in names, labels, reports, splits and paths"
    root = tmp_path_factory.mktemp("marked") / "hospital"
    get_cohort("own").write(root, 3, 4, 1, size=SIZE, spacing=SPACING)
    t = pd.read_csv(root / "cases.csv", dtype=str, keep_default_na=False)
    known = list(get_cohort("own").labels)
    t = t.rename(columns={known[0]: MARK}).assign(report=f"FINDINGS: {MARK}")
    t.loc[0, "case"] = t.loc[1, "split"] = t.loc[2, "image"] = t.loc[3, known[1]] = MARK
    t.to_csv(root / "cases.csv", index=False)
    return root, [MARK, known[1]]


@pytest.fixture(scope="module")
def reviewed(hospital):
    root, labels = hospital
    r = review.review_cohort(root, "own", dict(columns=dict(labels=labels)), jobs=1, pictures=1)
    r.warnings.loc[0] = [r.table.case[0], MARK, MARK, MARK]
    return r


def test_a_case_is_refused_by_its_name(reviewed):
    assert len(reviewed.refused) == 4 and MARK in set(reviewed.refused.case)
    assert len(reviewed.table) and MARK in set(review.count_labels(reviewed).label)


def test_the_page_of_the_check(reviewed, tmp_path, browser):
    write_text(review.render_review(reviewed), tmp_path / "page.html")
    show(browser, tmp_path / "page.html")
    assert is_inert(browser) and read_text(browser).count(MARK) >= 4


def test_tables_of_prepared_cases(tmp_path):
    c = synthesize_chest(("markers", 0), SIZE, SPACING)
    rows = []
    for name in ("a", "b"):
        write(c.hu, c.affine, tmp_path / f"{name}.nii")
        rows.append(cohort_row(name, tmp_path / f"{name}.nii", "train"))
    recipe = dict(spacing=list(SPACING), hu=[-1000, 1000])
    out = tmp_path / "out"
    prepare_cases(pd.DataFrame(rows), out, tmp_path / "maps", recipe, None, 1, out / "bad.csv")
    known = pd.DataFrame(dict(case=["a", "b"], kernel=MARK, contrast=np.nan))
    store = CaseStore(out, tmp_path / "maps")
    save_acquisition(known, ["a", "b"], store, out / "acquired.csv")
    sheets = sorted(out.glob("*.csv"))
    assert len(sheets) >= 4 and not [f for f in sheets if run_cells(f)]


# --- a sentence that a person types


def test_the_viewer_shows_the_marker_as_text(tmp_path, browser):
    c = synthesize_chest(("markers", 1), SIZE, SPACING)
    write(c.hu, c.affine, tmp_path / "scan.nii")
    affine = viewer.crop_affine(c.affine, c.hu.shape, SIZE)
    place = dict(grid=[4, 4, 4], patch_affine=ground.patch_affine(affine, (12, 12, 6)).tolist())
    found = dict(k=1, point=0, heat=np.linspace(0, 1, 64).tolist(), region=[0])
    sentences = [dict(text=MARK, kind="tried", outside=0, unknown=[MARK]) | found]
    scan = dict(name=MARK, what=MARK, files=dict(image="scan.nii"), sentences=sentences) | place
    write_json(dict(arm=MARK, patch_mm=MARK, text=None, scans=[scan]), tmp_path / "v.json")
    viewer.write_viewer(tmp_path / "v.json", tmp_path, MARK, tmp_path / "v.html")
    said = len(browser.complaints)
    show(browser, tmp_path / "v.html", "document.body.dataset.state")
    assert browser.run("document.body.dataset.state") == f"{MARK}/0" and is_inert(browser)
    assert read_text(browser).count(MARK) >= 6 and browser.complaints[said:] == []


def grounded() -> tuple:
    heat = np.linspace(0, 1, 64).reshape(1, 4, 4, 4)
    affine = np.diag([3.0, 3, 3, 1])
    g = ground.GroundingResult([MARK], heat, heat > 0.9, np.array([9.0]), affine)
    return g, Volume(np.zeros((12, 12, 12), np.int16), np.eye(4))


def test_a_sentence_in_pictures_masks_and_tables(tmp_path):
    g, v = grounded()
    fig = ground.plot_grounding(g, 0, v, note=MARK)
    fig.savefig(tmp_path / "a.svg")
    plt.close(fig)
    fig, ax = plt.subplots()
    flat = np.arange(16.0).reshape(4, 4)
    gray = dict(aspect=1, cmap="gray")
    grounding.plot_heatmap(
        *(ax, flat, flat, flat > 9, MARK, 3, gray, np.zeros((4, 4), int), np.zeros((4, 4), bool))
    )
    fig.savefig(tmp_path / "b.svg")
    plt.close(fig)
    for name in "ab":
        text = (tmp_path / f"{name}.svg").read_text()
        assert "onerror" in text and "<img" not in text and "<script" not in text
    write_sheet(ground.region_table(g, v), tmp_path / "a.csv")
    assert not run_cells(tmp_path / "a.csv")
    for f in segments.write_color_tables(segments.sentence_segments([MARK]), tmp_path / "m.nii.gz"):
        lines = [line for line in f.read_text().splitlines() if "onerror" in line]
        assert len(lines) == 1 and lines[0].count('"') in (0, 2)
    assert (
        "\\"
        not in segments._describe_segment(
            1, segments.sentence_segments([MARK])[0], "1"
        ).SegmentLabel
    )  # where it separates values
