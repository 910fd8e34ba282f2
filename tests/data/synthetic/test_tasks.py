"""Generated texts are Python programs: Python itself runs their assertions."""

import re

import numpy as np
import pytest

from megatron_hybrid.config.generators import generator_kinds

OPTIONS = {
    "state_tracking": [{}, {"gap": None}, {"gap": 3, "variables": 3, "strict_share": 0.5}],
    "recall": [{}, {"questions": 5}],
    "state_based_recall": [{}, {"strict_share": 1.0}, {"gaps": [1, 2], "variables": 2, "strict_share": 0.0}],
}
CASES = [(task, options) for task, several in OPTIONS.items() for options in several]
SIZES = (5, 8, 33, 128)


def generator(task: str, **options):
    return generator_kinds()[task].model_validate({"size": 8} | options)


def draw(maker, size: int, seed: int):
    return maker.generate(size, np.random.Generator(np.random.Philox(key=seed)))


def program(maker, tokens) -> str:
    """The text as Python, in which an array has brackets and commas."""
    text = " ".join(maker.vocabulary[token] for token in tokens)
    array = re.match(r"bits = ([01b ]*)", text)
    return text.replace(array[1], f"[{','.join(array[1].split())}]", 1) if array else text


@pytest.mark.parametrize(("task", "options"), CASES)
def test_assertions_hold_in_python_and_are_the_answers(task, options):
    maker = generator(task, **options)
    for size in SIZES:
        for seed in range(20):
            text = draw(maker, size, seed)
            exec(program(maker, text.tokens).replace("\n ", "\n"), {})
            last_words = [i for i, token in enumerate(text.tokens) if maker.vocabulary[token] == "=="]
            assert [i + 1 for i in last_words] == [*text.answers] and text.answers[-1] == len(text.tokens) - 1
            assert len(text.tokens) <= maker.length(size) and text.tokens.min() > 0


@pytest.mark.parametrize("task", OPTIONS)
def test_a_wrong_answer_fails_in_python(task):
    maker = generator(task)
    text = draw(maker, 8, 1)
    others = {int(token) for seed in range(9) for s in [draw(maker, 8, seed)] for token in s.tokens[[*s.answers]]}
    for wrong in others - {int(text.tokens[-1])}:
        text.tokens[-1] = wrong
        with pytest.raises(AssertionError):
            exec(program(maker, text.tokens).replace("\n ", "\n"), {})


@pytest.mark.parametrize(
    ("task", "expected"), [("state_tracking", 1 / 5), ("recall", 1 / 2), ("state_based_recall", 1 / 2)]
)
def test_answers_are_balanced(task, expected):
    maker = generator(task)
    answers = np.array([draw(maker, 8, seed).tokens[-1] for seed in range(2000)])
    shares = np.unique(answers, return_counts=True)[1] / len(answers)
    assert shares == pytest.approx(expected, abs=0.04)


def test_swaps_are_of_two_different_variables_and_all_pairs_occur():
    maker = generator("state_tracking", gap=None)
    lines = program(maker, draw(maker, 128, 0).tokens).split("\n")
    pairs = [tuple(line.split("=")[0].replace(" ", "").split(",")) for line in lines if "," in line]
    assert len(pairs) == 128 and all(a != b for a, b in pairs) and len({frozenset(pair) for pair in pairs}) == 10


def test_assertions_are_where_the_options_put_them():
    maker = generator("state_tracking", gap=3)
    kinds = [
        "assert" if "assert" in line else "swap" for line in program(maker, draw(maker, 8, 0).tokens).split("\n")[5:]
    ]
    assert kinds == ["swap"] * 3 + ["assert"] + ["swap"] * 3 + ["assert"] + ["swap"] * 2 + ["assert"]
    many = generator("state_based_recall", strict_share=0.25)
    counts = [len(draw(many, 64, seed).answers) for seed in range(400)]
    assert np.mean(np.array(counts) == 1) == pytest.approx(0.25, abs=0.07) and max(counts) <= 64 // 4
