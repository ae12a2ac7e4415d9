"Each drawn line is read back from the axes: its arm by the legend, its numbers by the CSV"

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from asap.core import rng
from asap.study import figures
from asap.study.grounding import plot_hit_rates

ARMS = ["scratch", "mae", "clip", "simcrop", "asap", "released", "asap_no_organs"]
STYLES = figures.arm_styles([*ARMS, "histogram"])
LABELS = ["Emphysema", "Lung nodule", "Pleural effusion"]
SUPERVISED = pd.DataFrame(
    dict(label=LABELS, cnn_auc=[0.99, 0.7, 1.0], histogram_auc=[0.8, 0.5, 0.8])
)
TASKS = dict(classify_ct_rate="auc", segment_btcv="dice", vqa_radgenome="accuracy, presence")


def with_interval(value: float) -> dict:
    return dict(value=value, lo=value - 0.03, hi=value + 0.04)


def plot_curves(out, r):
    "Arms that lack a loss, as in a study: `scratch` is not trained, `mae` has no organs"
    steps = np.arange(0, 100, 10)
    parts = dict(mae=["loss", "recon"], released=["loss", "organ", "align", "k_ratio"])
    every = ["loss", "recon", "organ", "align", "k_ratio"]
    logs = {
        a: pd.DataFrame(dict(step=steps, lr=1e-3, **{p: r.random(10) for p in parts.get(a, every)}))
        for a in ARMS[1:]
    }
    return figures.plot_loss_curves(logs, STYLES, out)


def plot_labels(out, r):
    rows = [
        dict(label=n, arm=a, **with_interval(v)) for a in ARMS for n, v in zip(LABELS, r.random(3))
    ]
    t = pd.DataFrame(rows).rename(columns=dict(value="auc"))
    return figures.plot_label_auc(t, ARMS[1:6], STYLES, SUPERVISED, out)


def plot_efficiency(out, r):
    rows = [
        dict(arm=a, num_labeled=n, **with_interval(r.random()))
        for a in [*ARMS, "histogram"]
        for n in (9, 90, 900)
    ]
    arms = [*ARMS[2:], "histogram"]
    return figures.plot_label_efficiency(pd.DataFrame(rows), arms, STYLES, SUPERVISED, out)


def ranking(r) -> pd.DataFrame:
    rows = [
        dict(number=i, task=k, metric=m, fraction=1.0, arm=a, **with_interval(r.random()))
        for i, (k, m) in enumerate(TASKS.items(), 1)
        for a in ARMS
    ]
    return pd.DataFrame(rows)


def plot_forest(out, r):
    ranks = ranking(r)
    rows = [
        dict(task=k, metric=m, fraction=f, arm="asap", comparator=a, **with_interval(r.normal()))
        for k, m in TASKS.items()
        for f in (0.1, 1.0)
        for a in ARMS
        if a != "asap" and (k, a) != ("segment_btcv", "clip")
    ]
    against = pd.DataFrame(rows).rename(columns=dict(value="difference"))
    return figures.plot_forest(against, ranks, ["mae", "clip", "released"], STYLES, out)


def plot_radar(out, r):
    return figures.plot_radar(ranking(r), ARMS[1:6], STYLES, out)


def plot_tasks(out, r):
    t = ranking(r).assign(metric="auc")
    return figures.plot_task_auc(t, ARMS[:5], STYLES, out)


def plot_calibration(out, r):
    curves = {
        a: pd.DataFrame(dict(probability=[0.1, 0.5], observed=r.random(2), num_cases=9))
        for a in ARMS[3:]
    }
    return figures.plot_reliability(curves, STYLES, out)


def plot_ablation(out, r):
    rows = [
        dict(evaluation=w, arm=a, difference=d, difference_lo=d - 0.1, difference_hi=d + 0.1)
        for w in ("classify_rad_chest_ct, 10% of the labels", "pointing game, focal_lesions", "x")
        for a, d in zip(ARMS[5:], r.random(2))
    ]
    return figures.plot_ablation(pd.DataFrame(rows), STYLES, out)


def plot_organs(out, r):
    columns = [f"group{c}_{k}" for c in range(4) for k in ("model", "mean", "median")]
    rows = pd.DataFrame(r.random((5, 12)), columns=columns)
    names = ["left lower lobe", "heart", "airway and oesophagus"]
    return figures.plot_organ_error(rows, names, 0.75, "asap", STYLES, out)


def plot_pointing(out, r):
    t = pd.DataFrame(dict(label=LABELS, sentences=9))
    for k in ("hit_rate", "atlas", "organ_atlas", "shuffled_scan", "negated", "random"):
        t[k] = r.random(3)
    status = dict(num_patches=512, patch_mm="42 x 42 x 42")
    return plot_hit_rates(t, "asap", STYLES["asap"], status, out)


PLOTS = {
    f.__name__.removeprefix("plot_"): f
    for f in (
        plot_curves,
        plot_labels,
        plot_efficiency,
        plot_forest,
        plot_radar,
        plot_tasks,
        plot_calibration,
        plot_ablation,
        plot_organs,
        plot_pointing,
    )
}
WITH_LINES = ("curves", "labels", "efficiency", "forest", "radar", "tasks", "calibration")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Name -> figure, CSV; the files are in one folder"
    out = tmp_path_factory.mktemp("figures")
    plots = {n: f(out, rng("test figures", n)) for n, f in PLOTS.items()}
    return out, {n: (fig, pd.read_csv(out / f"{n}.csv")) for n, fig in plots.items()}


def style_of(line) -> tuple[str, str]:
    return to_hex(line.get_color()), str(line.get_marker())


def legend_arms(fig) -> dict[tuple[str, str], str]:
    "(color, marker) -> arm, as a reader of the legend finds it; references are no arms"
    (legend,) = fig.legends
    names = [text.get_text().split(" - ")[-1] for text in legend.get_texts()]
    found = {style_of(h): n for h, n in zip(legend.legend_handles, names)}
    assert len(found) == len(names), "two names with one color and marker"
    return {s: n for s, n in found.items() if n in STYLES}


def drawn_lines(ax, arms) -> dict[str, np.ndarray]:
    "Arm -> (n,2) points of its one line in these axes"
    lines = [(arms[style_of(x)], x) for x in ax.lines if style_of(x) in arms]
    assert len({a for a, _ in lines}) == len(lines), "two lines of one arm"
    return {a: np.column_stack(x.get_data()).astype(float) for a, x in lines}


def drawn_intervals(ax, arms) -> dict[str, list[np.ndarray]]:
    "Arm -> the (2,2) ends of each interval, by color"
    by_color = {color: a for (color, _), a in arms.items()}
    return {
        by_color[to_hex(c.get_color()[0])]: [np.array(s) for s in c.get_segments()]
        for c in ax.collections
    }


def rows_of(t: pd.DataFrame, arms) -> dict[str, pd.DataFrame]:
    column = "other" if "other" in t else "arm"
    return {a: g for a, g in t.groupby(column, sort=False) if a in arms.values()}


def test_legends_show_each_arm_in_its_color_in_all_figures(made):
    _, plots = made
    for name in WITH_LINES:
        arms = legend_arms(plots[name][0])
        assert arms
        for style, arm in arms.items():
            assert style == tuple(STYLES[arm].values()), (name, arm)


def test_curves(made):
    fig, t = made[1]["curves"]
    arms = legend_arms(fig)
    assert set(arms.values()) == set(t.arm) == set(ARMS[1:])
    assert [ax.get_gid() for ax in fig.axes] == [p for p in figures._LOSSES if p in set(t.part)]
    for ax in fig.axes:
        lines, rows = drawn_lines(ax, arms), rows_of(t[t.part == ax.get_gid()], arms)
        assert len(lines) == len(ax.lines) and lines.keys() == rows.keys()
        for a, g in rows.items():
            np.testing.assert_allclose(lines[a], g[["step", "value"]], rtol=1e-12)


def test_efficiency(made):
    fig, t = made[1]["efficiency"]
    (ax,) = fig.axes
    arms = legend_arms(fig)
    lines, bars, rows = drawn_lines(ax, arms), drawn_intervals(ax, arms), rows_of(t, arms)
    assert set(t.arm) == lines.keys() == bars.keys() == rows.keys() == {*ARMS[2:], "histogram"}
    for a, g in rows.items():
        np.testing.assert_allclose(lines[a], g[["num_labeled", "value"]], rtol=1e-12)
        np.testing.assert_allclose([s[:, 1] for s in bars[a]], g[["lo", "hi"]], rtol=1e-9)


@pytest.mark.parametrize(
    "name, row, value", [("labels", "label", "auc"), ("forest", "row", "difference")]
)
def test_points_and_intervals(made, name, row, value):
    fig, t = made[1][name]
    (ax,) = fig.axes
    arms, titles = legend_arms(fig), [x.get_text() for x in ax.get_yticklabels()]
    lines, bars, rows = drawn_lines(ax, arms), drawn_intervals(ax, arms), rows_of(t, arms)
    assert set(arms.values()) == lines.keys() == bars.keys() == rows.keys()
    assert sum(map(len, rows.values())) == len(t)
    for a, g in rows.items():
        assert [titles[round(y)] for y in lines[a][:, 1]] == g[row].tolist()
        np.testing.assert_allclose(lines[a][:, 0], g[value], rtol=1e-12)
        np.testing.assert_allclose([s[:, 0] for s in bars[a]], g[["lo", "hi"]], rtol=1e-9)
        np.testing.assert_allclose([s[0, 1] for s in bars[a]], lines[a][:, 1])


def test_forest_says_what_is_subtracted(made):
    texts = [x.get_text() for x in made[1]["forest"][0].legends[0].get_texts()]
    assert texts == ["asap - mae", "asap - clip", "asap - released"]


def test_bars_have_the_colors_of_their_arms(made):
    fig, t = made[1]["ablation"]
    for ax in fig.axes:
        colors = [to_hex(p.get_facecolor()) for p in ax.patches]
        assert colors == [STYLES[a]["color"] for a in dict.fromkeys(t.arm)]
    arms_colors = {s["color"] for s in STYLES.values()}
    for name in ("organs", "pointing"):
        bars = made[1][name][0].axes[0].containers
        colors = [to_hex(b.patches[0].get_facecolor()) for b in bars]
        assert colors[0] == STYLES["asap"]["color"] and not arms_colors & set(colors[1:]), name


@pytest.mark.parametrize("name", PLOTS)
def test_no_title_or_legend_covers_another(made, name):
    fig = made[1][name][0]
    renderer = FigureCanvasAgg(fig).get_renderer()
    fig.draw(renderer)
    panels = [ax.get_tightbbox(renderer) for ax in fig.axes]
    for legend in fig.legends:
        box = legend.get_window_extent(renderer)
        assert not any(box.overlaps(p) for p in panels), "the legend covers a panel"
    titles = [ax.title.get_window_extent(renderer) for ax in fig.axes if ax.get_title()]
    for i, box in enumerate(titles):
        assert not any(box.overlaps(other) for other in titles[:i]), "titles overlap"
        assert box.ymin >= fig.axes[i].get_window_extent(renderer).ymax
    for ax in fig.axes:
        assert ax.get_visible() and ax.axison and ax.has_data(), "a hidden panel"
        assert ax.get_legend() is None


@pytest.mark.parametrize("name", PLOTS)
def test_png_vector_and_table_stand_side_by_side(made, name):
    out, plots = made
    assert len(plots[name][1])
    assert (out / f"{name}.png").stat().st_size > 1000
    assert "<svg" in (out / f"{name}.svg").read_text()[:1000]


def test_an_arm_more_changes_no_other():
    more = figures.arm_styles([*ARMS, *(f"own_{i}" for i in range(20))])
    assert {a: more[a] for a in ARMS} == {a: STYLES[a] for a in ARMS}
    assert len({tuple(s.values()) for s in more.values()}) == len(more)
