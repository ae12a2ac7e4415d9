"""Sentences of real reports: fragments with the sentences that a careful reader sees, and what
holds for any text"""

import re
import time

import numpy as np
import pytest
import yaml
from conftest import TOP

from asap.phantom.words import NEGATIVE_TEMPLATES, NORMAL_TEMPLATES, POSITIVE_TEMPLATES
from asap.text.sentences import clean_text, split_sentences

GROUPS = yaml.safe_load((TOP / "tests/sentences.yaml").read_text(encoding="utf8"))
FRAGMENTS = {f"{name}-{i}": f for name, group in GROUPS.items() for i, f in enumerate(group)}
WITH_MARKS = ("list", "afterwards")
MARKS = ["1. ", "2. ", "3) ", "(4) ", "a) ", "- ", "* ", "• "]
TOKENS = [
    "nodule",
    "Nodule",
    "No",
    "no.",
    "the",
    "RUL.",
    "5 mm.",
    "4.",
    "5",
    "4. 5 mm",
    "12 x 8 mm",
    "Th12.",
    "Dr.",
    "e.g.",
    "J.",
    "vs.",
    "approx.",
    "segment",
    "(",
    ")",
    "(see above.)",
    "?",
    "!",
    "...",
    "…",
    ".",
    "..",
    ";",
    ":",
    "FINDINGS:",
    "___.",
    "[**Name**]",
    "İzlenmedi.",
    "мм.",
    "seen.No",
    "Lung-RADS",
    "2019.",
    "10:30",
    "a.m.",
    "-950",
    "ground-",
    '"stable."',
]


def left_out(text, sentences: list) -> list:
    "Words of a text that are in none of its sentences, in order"
    out, said = [], iter(re.findall(r"\w+", " ".join(sentences)))
    want = next(said, None)
    for word in re.findall(r"\w+", clean_text(text)):
        if word == want:
            want = next(said, None)
        else:
            out.append(word)
    assert want is None, f"{want!r} was not in the text"
    return out


def only_marks(words: list) -> bool:
    return all(re.fullmatch(r"\d{1,2}|[a-h]", word) for word in words)


def some(seed: int, marks=()) -> str:
    "A random text of tokens, blanks and line breaks, perhaps with marks of lists"
    r, out = np.random.default_rng(seed), []
    for _ in range(r.integers(1, 40)):
        out.append(str(r.choice(["", "\n", "\n\n", "\r\n"], p=[0.7, 0.2, 0.05, 0.05])))
        if marks and r.random() < 0.1:
            out.append(str(r.choice(marks)))
        out += [str(r.choice(TOKENS)), str(r.choice([" ", "  ", "\t", "\u00a0"]))]
    return "".join(out)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragment(name):
    assert split_sentences(FRAGMENTS[name]["text"]) == FRAGMENTS[name]["sentences"]


def test_fragments_keep_all_but_marks():
    for name, f in FRAGMENTS.items():
        out = left_out(f["text"], f["sentences"])
        assert only_marks(out) if name.startswith(WITH_MARKS) else not out, (name, out)


def test_fragments_hold_no_wording_of_the_phantom():
    wordings = [
        w
        for table in (POSITIVE_TEMPLATES, NEGATIVE_TEMPLATES, NORMAL_TEMPLATES)
        for group in table.values()
        for w in group
    ]
    forms = [
        re.compile(re.sub(r"\\\{\w+\\\}", ".+?", re.escape(w.rstrip("."))), re.I) for w in wordings
    ]
    assert forms[0].search("A left chest wall device with its lead in the right heart is seen."), (
        "the check can fail"
    )
    assert not [
        (form.pattern, name)
        for name, f in FRAGMENTS.items()
        for form in forms
        if form.search(f["text"] or "")
    ]


def test_nan_of_any_kind():
    assert split_sentences(float("nan")) == split_sentences(np.float32("nan")) == []


def test_nothing_lost_and_none_empty():
    for seed in range(1000):
        text, line = some(seed, MARKS), "Scar " + " ".join(some(seed).split())
        assert all(re.search(r"\w", s) and s == s.strip() for s in split_sentences(text)), seed
        assert only_marks(left_out(text, split_sentences(text))), (
            seed,
            left_out(text, split_sentences(text)),
        )
        assert not left_out(line, split_sentences(line)), (
            seed,
            left_out(line, split_sentences(line)),
        )


def test_split_again():
    def letters(sentences):
        return "".join(c for s in sentences for c in s if c.isalpha())

    for seed in range(1000):
        once = split_sentences(some(seed))
        assert letters(split_sentences(" ".join(once))) == letters(once), seed


@pytest.mark.parametrize(
    "text",
    [
        "." * 20_000,
        ". " * 10_000,
        "A. " * 10_000,
        "( " * 10_000,
        "1. A " * 5_000,
        "- a\n" * 5_000,
        "\n" * 20_000 + "x",
        "a.b " * 5_000,
    ],
    ids=["stops", "spaced", "initials", "brackets", "items", "lines", "blank", "glued"],
)
def test_odd_texts_take_no_longer(text):
    start = time.perf_counter()
    split_sentences("x" + text)
    assert time.perf_counter() - start < 2
