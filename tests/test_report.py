"Reports: long, empty and odd ones, a kill, tokens of other cases, a metric with every patient once"

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from asap.abnormalities import ABNORMALITIES
from asap.phantom.abnormalities import synthesize_chest
from asap.phantom.words import synthesize_report
from asap.tasks import metrics, report
from asap.text.tokens import train_wordpiece_tokenizer

GRID = (4, 4, 2)


class P(SimpleNamespace):
    def model_dump(self, exclude_defaults=False):
        return dict(vars(self))


HOW = dict(
    token_pool=[2, 2, 2],
    abnormal_first=True,
    label_prompts=True,
    aux_label_weight=1.0,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    dropout=0.1,
    max_length=200,
    steps=12,
    epochs=50,
    batch_size=4,
    lr=0.003,
    weight_decay=0.05,
    num_beams=3,
    no_repeat_ngram_size=8,
    meteor=False,
)


class Text(SimpleNamespace):
    def fingerprint(self):
        return "words"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Sixteen small phantoms: table, tokens drawn at random, a tokenizer"
    rows = []
    for i in range(16):
        c = synthesize_chest((0, "reports", i), (48, 48, 24), (7, 7, 14))
        r = synthesize_report(c, i)
        rows.append(
            dict(
                case=f"c{i}",
                scan=f"c{i}",
                patient=f"p{i}",
                findings=r.findings,
                impression=r.impression,
                split="train" if i < 9 else "val" if i < 11 else "test",
                **{f"label:{n}": int(c.has(n)) for n in ABNORMALITIES},
            )
        )
    table = pd.DataFrame(rows)
    x = np.random.default_rng(0).normal(size=(16, 33, 8)).astype(np.float16)
    return (
        table,
        x,
        train_wordpiece_tokenizer(table.findings, 400, tmp_path_factory.mktemp("words")),
    )


def go(world, table=None, x=None, arm="asap", resume=None, index=None, **how):
    t = world[0] if table is None else table
    x = world[1] if x is None else x
    text = Text(tokenizer=world[2])
    index = t[["case", "scan", "patient", "split"]] if index is None else index

    def judged(said, tested, text=None, judge=report.score_reports):
        return judge(said, tested, None)  # no encoder for BERTScore here

    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, "score_reports", judged)
        return report.run(
            "report_ct_rate",
            "ct_rate",
            t,
            *((None, None) if arm == "blind" else (x, index)),
            arm,
            GRID,
            text,
            P(**HOW | how),
            0,
            resume,
        )


@pytest.fixture(scope="module")
def found(world):
    return go(world)


def test_the_same_seed_writes_the_same(world, found):
    pd.testing.assert_frame_equal(found, go(world))
    assert set(found.arm) == {"asap", "asap, nearest neighbour"} and list(found) == report.COLUMNS


def test_test_reports_change_no_generated_one(world, found):
    t = world[0].copy()
    asked = ["findings", "impression", *(c for c in t if c.startswith("label:"))]
    t.loc[11:, asked] = t.loc[11:, asked].to_numpy()[::-1]
    d = go(world, t)
    assert list(d.generated) == list(found.generated) and list(d.reference) != list(found.reference)


def test_a_report_longer_than_the_limit_keeps_its_reference(world, capsys, found):
    d = go(world, max_length=24)
    assert list(d.reference) == list(found.reference) == 2 * list(world[0].findings[11:])
    ids = report.tokenize_targets(world[0].findings, world[2], 24, True)
    assert max(map(len, ids)) <= 24 and all(i[-1] == world[2].sep_token_id for i in ids)


def test_the_cut_is_said_with_its_count(world, capsys):
    report.tokenize_targets(world[0].findings, world[2], 24, False, "report_x")
    assert (
        "report_x: 16 of 16 train reports are longer than 24 word pieces" in capsys.readouterr().err
    )
    report.tokenize_targets(world[0].findings, world[2], 500, False)
    assert not capsys.readouterr().err


def test_an_empty_report_is_left_out_by_name(world, capsys):
    t = world[0].copy()
    t.loc[[2, 12], "findings"] = ["", "  "]
    d = go(world, t)
    assert "2 of 16 cases have no findings and are left out: c2, c12" in capsys.readouterr().err
    assert "c12" not in set(d.case) and d.case.nunique() == 4


def test_no_report_at_all(world, capsys):
    d = go(world, world[0].assign(findings=""))
    assert (
        not len(d) and "no train case has findings: the task is left out" in capsys.readouterr().err
    )


def test_unknown_characters_are_counted_and_stay_in_the_reference(world, capsys):
    t = world[0].copy()
    t.loc[0, "findings"] = "病変 is seen. " + t.findings[0]
    t.loc[12, "findings"] += " Ωλ 病."
    d = go(world, t)
    assert "unknown to the tokenizer" in capsys.readouterr().err
    assert "病" in d.reference[d.case == "c12"].iloc[0] and "[UNK]" not in "".join(d.generated)


def test_tokens_of_other_cases(world):
    with pytest.raises(
        ValueError, match="of other cases than cohort ct_rate: rerun `dvc repro embed@asap`"
    ):
        go(world, index=world[0].iloc[::-1])
    with pytest.raises(ValueError, match="expected 32"):
        go(world, x=world[1][:, :20])


def test_blind_sees_nothing(world):
    d = go(world, arm="blind")
    assert (
        set(d.arm) == {"blind", "most frequent"}
        and (d.groupby("arm").generated.nunique() == 1).all()
    )
    assert set(d.generated[d.arm == "most frequent"]) <= set(world[0].findings[:9])


def test_a_killed_training_resumes_to_the_same_words(world, found, tmp_path, monkeypatch):
    "Killed after the eighth step, resumed, then found finished"
    real, count = report.ReportDecoder.forward, []

    class Kill(BaseException):
        pass

    def dying(self, *a):
        if self.training:
            count.append(1)
        if len(count) == 9 and self.training:
            raise Kill
        return real(self, *a)

    from asap import train

    fit = train.fit
    monkeypatch.setattr(report, "fit", lambda *a, **k: fit(*a, **k | dict(save_every=4)))
    monkeypatch.setattr(report.ReportDecoder, "forward", dying)
    with pytest.raises(Kill):
        go(world, resume=tmp_path)
    assert (tmp_path / "report_ct_rate/resume/state.pt").exists()
    count[:] = [1] * 9
    again = go(world, resume=tmp_path)
    assert len(count) == 9 + 4, "eight steps are not done again"
    pd.testing.assert_frame_equal(again, found)
    pd.testing.assert_frame_equal(go(world, resume=tmp_path), found)
    assert len(count) == 13, "a finished decoder is not trained again"
    go(world, resume=tmp_path, lr=0.001)
    assert len(count) == 25, "another rate is another decoder"


def test_a_checkpoint_is_a_folder(world, tmp_path):
    go(world, resume=tmp_path)
    folder = tmp_path / "report_ct_rate/model"
    assert {"model.safetensors", "config.json", "card.md"} <= {f.name for f in folder.iterdir()}
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        report.load(folder)


def test_figures_of_all_cases_are_those_of_weights_of_one(found):
    "Clinical F1 by scikit-learn; a corpus's BLEU from sums"
    from sklearn.metrics import f1_score, precision_score

    d = found[found.arm == "asap, nearest neighbour"]
    f = report.metrics(d, 20, 0)
    t, c = report.parse_labels(d.truth), report.parse_labels(d.predicted)
    assert f["clinical F1"][0] == pytest.approx(f1_score(t, c, average="micro")) and f[
        "clinical precision"
    ][0] == pytest.approx(precision_score(t, c, average="micro"))
    assert (
        all(v[1].shape == (20,) for v in f.values())
        and {"BLEU-4", "ROUGE-L", "CIDEr"} <= set(f)
        and "METEOR" not in f
    )
    diff = metrics.compare_arms(
        metrics.bootstrap(found, report.metrics, 20), "asap", ["asap, nearest neighbour"], 0.95
    )
    assert "clinical F1" in set(diff.metric)
