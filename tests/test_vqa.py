"Questions and answers: kills, other language models, the same bits, wrong input"

import numpy as np
import pandas as pd
import pytest
import torch

from asap.pretrain import embed
from asap.tasks import metrics, vqa
from asap.tasks.vqa import KindWeights, VQAConfig
from asap.text import language
from asap.text.language import TinyLMConfig

P = VQAConfig(
    arms=["asap", "blind"],
    language_model="build/language",
    tiny_lm=TinyLMConfig(
        vocab_size=300,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        steps=4,
        batch_size=4,
        lr=0.003,
        muon_lr=0.006,
    ),
    num_query_tokens=3,
    query_depth=1,
    query_num_heads=2,
    projector_dim=16,
    lora_rank=2,
    lora_alpha=4,
    lora_dropout=0.1,
    steps=9,
    batch_size=4,
    questions_per_volume=2,
    lr=0.001,
    muon_lr=0.006,
    weight_decay=0.01,
    warmup_steps=1,
    kind_sampling_weights=KindWeights(
        abnormality=0.2, presence=0.2, location=0.2, size=0.2, disorder=0.2
    ),
    kind_loss_weights=KindWeights(abnormality=2, presence=1, location=1.5, size=1, disorder=2),
    finding_weight=2.0,
    no_finding_weight=0.5,
    eval_every=3,
    patience=9,
    max_length=60,
    max_new_tokens=6,
    num_beams=3,
)
TABLE = pd.DataFrame(
    dict(
        case=[f"p{i}_1" for i in range(16)],
        patient=[f"p{i}" for i in range(16)],
        split=["train"] * 9 + ["val"] * 3 + ["test"] * 4,
    )
).assign(scan=lambda t: t.case)
QUESTIONS = pd.DataFrame(
    [
        (c, *row)
        for i, c in enumerate(TABLE.case)
        for row in (
            (
                "disorder",
                "Which disorders does this scan show?",
                ["no findings", "emphysema/lung nodule"][i % 2],
            ),
            ("presence", "Is there emphysema?", ["no", "yes"][i % 2]),
            ("abnormality", "What is seen here: lungs?", ["no findings", "emphysema"][i % 2]),
            ("location", "Where is it: lung nodule?", "left upper lobe"),
            ("size", "How large is it, in mm: lung nodule?", f"{7 + i} mm"),
        )
    ],
    columns=["case", "kind", "question", "answer"],
)
TOKENS = np.random.default_rng(0).normal(size=(16, 9, 8)).astype(np.float16)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "Tokens and a language model"
    at = tmp_path_factory.mktemp("vqa")
    embed.save_tokens(TOKENS, TABLE, at / "build/tokens/asap", "toy", dict(encoder="a"))
    language.build_language_model(
        P, QUESTIONS, dict(zip(TABLE.case, TABLE.split)), 0, at / "language"
    )
    return at


def ask(here, out, arm="asap", tables=None, questions=None, **kw):
    p = P.model_copy(update=dict(language_model=str(here / "language")) | kw)
    return vqa.run_all(
        arm,
        tables or dict(toy=TABLE),
        questions or dict(toy=QUESTIONS),
        p,
        0,
        here / "build/tokens" / arm,
        8,
        out / "runs",
        out / "resume",
    )


def state(folder):
    return (folder / "runs/checkpoint/toy/model.safetensors").read_bytes()


def test_a_killed_training_is_resumed_to_the_same_bits(here, tmp_path, monkeypatch, capsys):
    whole = ask(here, tmp_path / "a")
    forward, count = vqa.VQAModel.forward, []

    def killed(self, b):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return forward(self, b)

    monkeypatch.setattr(vqa.VQAModel, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(here, tmp_path / "b")
    pd.testing.assert_frame_equal(ask(here, tmp_path / "b"), whole)
    assert "resumed at step 3" in capsys.readouterr().err and len(count) == 6 + 6
    assert state(tmp_path / "a") == state(tmp_path / "b")
    again = len(count)
    pd.testing.assert_frame_equal(ask(here, tmp_path / "b"), whole)
    assert len(count) == again and "trained before" in capsys.readouterr().err


def test_test_answers_change_no_given_one(here, tmp_path):
    "Neither what is learnt nor what is answered"
    other = QUESTIONS.copy()
    test = other.case.isin(TABLE.case[TABLE.split == "test"])
    for _, rows in other[test].groupby("kind"):
        other.loc[rows.index, "answer"] = rows.answer.to_numpy()[::-1]
    a, b = ask(here, tmp_path / "a"), ask(here, tmp_path / "b", questions=dict(toy=other))
    assert list(a.prediction) == list(b.prediction) and list(a.answer) != list(b.answer)
    assert state(tmp_path / "a") == state(tmp_path / "b")


def test_what_it_was_made_of_decides_whether_it_is_trained_again(here, tmp_path, capsys):
    ask(here, tmp_path)
    ask(here, tmp_path, num_beams=1)
    assert "trained before" in capsys.readouterr().err, "how it answers is no part of the training"
    ask(here, tmp_path, lr=0.002)
    assert "vqa.lr: 0.001 -> 0.002" in capsys.readouterr().err


def test_threads_and_neighbours_change_no_answer(here, tmp_path):
    ask(here, tmp_path)
    q = vqa.attach_cases(QUESTIONS, TABLE)
    m, t = vqa.load(tmp_path / "runs/checkpoint/toy"), language.load(here / "language")[1]
    p, threads = P.model_copy(update=dict(max_new_tokens=12)), torch.get_num_threads()
    try:
        said = [
            (torch.set_num_threads(n), vqa.generate_answers(m, t, q, TOKENS, p, many=many))[1]
            for n, many in ((1, 64), (2, 3), (2, 64))
        ]
    finally:
        torch.set_num_threads(threads)
    assert said[0] == said[1] == said[2]


def models(folder, kind):
    "A tiny causal language model with its own tokenizer, as one comes from elsewhere"
    import transformers as tr

    t = language.train_bpe_tokenizer([*QUESTIONS.question, *QUESTIONS.answer], 290)
    t.add_special_tokens(dict(additional_special_tokens=["<user>", "<assistant>"]))
    if kind == "chat":
        t.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
    small = dict(
        vocab_size=len(t),
        pad_token_id=t.pad_token_id,
        eos_token_id=t.eos_token_id,
        bos_token_id=None,
    )
    if kind == "gpt2":
        m = tr.GPT2LMHeadModel(
            tr.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, **small)
        )
    else:
        m = tr.Qwen2ForCausalLM(
            tr.Qwen2Config(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                **small,
            )
        )
    m.save_pretrained(folder)
    t.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["chat", "gpt2"])
def test_any_language_model_by_one_param(kind, here, tmp_path):
    models(tmp_path / "lm", kind)
    lm, t = language.load(tmp_path / "lm")
    put = t.decode(language.encode_questions(t, ["Is there emphysema?"])[0])
    assert put == (
        "<user>Is there emphysema?<assistant>" if kind == "chat" else "Is there emphysema?\n"
    )
    d = ask(here, tmp_path, language_model=str(tmp_path / "lm"))
    assert len(d) == 2 * 20 and d.prediction.map(lambda s: isinstance(s, str)).all()
    learnt = vqa.load(tmp_path / "runs/checkpoint/toy").state_dict()
    assert not [k for k in learnt if k.startswith("lm.") and "lora" not in k], (
        "nothing of the frozen model is kept"
    )


def test_a_language_model_that_does_not_fit_is_said(here, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder build/nowhere"):
        language.load("build/nowhere")
    ask(here, tmp_path)
    models(tmp_path / "lm", "gpt2")
    with pytest.raises(ValueError, match="its weights do not fit"):
        vqa.load(tmp_path / "runs/checkpoint/toy", language.load(tmp_path / "lm")[0])
    f = tmp_path / "runs/checkpoint/toy/model.safetensors"
    f.write_bytes(f.read_bytes()[:200])
    with pytest.raises(ValueError, match="model.safetensors is truncated or broken"):
        vqa.load(tmp_path / "runs/checkpoint/toy")


def test_what_is_missing_or_wrong_is_named(here, tmp_path):
    with pytest.raises(FileNotFoundError, match="embed@simcrop"):
        ask(here, tmp_path, "simcrop")
    with pytest.raises(ValueError, match="p4_1 is asked about .* has no volume"):
        ask(here, tmp_path, tables=dict(toy=TABLE[TABLE.case != "p4_1"]))
    with pytest.raises(ValueError, match="tokens of arm `asap` are of other cases"):
        ask(here, tmp_path, tables=dict(toy=TABLE[::-1]))
    with pytest.raises(ValueError, match="kind 'color'"):
        ask(here, tmp_path, questions=dict(toy=QUESTIONS.replace("size", "color")))
    with pytest.raises(
        ValueError, match=r"p0_1, disorder: question and answer take \d+ tokens, expected at most 5"
    ):
        ask(here, tmp_path, max_length=5)
    with pytest.raises(ValueError, match="vqa.query_num_heads is 3"):
        ask(here, tmp_path, query_num_heads=3)


def test_an_answer_without_a_number_counts():
    rows = pd.DataFrame(
        [("size", "30 mm", s) for s in ("30 mm", "3 cm", "large", "")],
        columns=["kind", "answer", "prediction"],
    )
    d = vqa.score_answers(rows, 20).assign(
        task="vqa_toy", arm="a", fraction=1.0, seed=0, patient=list("abcd")
    )
    found = metrics.point_estimates(d, vqa.metrics)["a"]["vqa_toy"]["1.0"]
    assert found == {
        "L1 mm, size": 5.0,
        "RMSE mm, size": round(50**0.5, 5),
        "share with a number, size": 0.5,
    }


def test_no_cohort_no_rows(here, tmp_path):
    d = vqa.run_all(
        "asap", {}, {}, P, 0, here / "build/tokens/asap", 8, tmp_path / "runs", tmp_path / "resume"
    )
    assert list(d) == vqa.COLUMNS and not len(d) and metrics.point_estimates(d, vqa.metrics) == {}
    assert (
        language.build_language_model(P, QUESTIONS[:0], {}, 0, tmp_path / "language") == {}
        and (tmp_path / "language/elsewhere.json").exists()
    )


def test_blind_sees_nothing_and_brings_the_majority(here, tmp_path):
    d = ask(here, tmp_path, "blind")
    assert set(d.arm) == {"blind", "majority"}
    assert (d[d.arm == "blind"].groupby(["kind", "question"]).prediction.nunique() == 1).all(), (
        "the same question has one answer, whoever's scan it is"
    )
    assert d[(d.arm == "majority") & (d.kind == "presence")].prediction.unique().tolist() == [
        "no"
    ], "5 of 9 train cases"
