"""Long-context tasks in the style of RULER (arXiv 2404.06654), generated locally for a length in tokens.

- `needle`: the number that a sentence in a long text gives for a word. As many other words have numbers as `distractors` says.
- `variables`: all variables that a chain of assignments gives a value.
- `common_words`: the words that a long list repeats most often.

A document is as long as fits into the length with its answer. The same seed, length and tokenizer give the same documents. The metric
is `recall`, the share of answers that the model's text contains.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.evaluation.task_folders import new_folder, write_task

FILLER = (
    "The tide was out and the boats lay on the sand.",
    "Nobody could say who had planted the old trees.",
    "A letter arrived in the morning and was read twice.",
    "The shop on the corner sold bread, rope and lamps.",
    "In winter the road over the pass was closed.",
    "They counted the sheep and went home before dark.",
)
CHAIN, COMMON, OFTEN, SELDOM, DISTRACTORS = 5, 10, 30, 3, 3
"""Variables in a chain; common words; how often these and the others occur in the list; other words with numbers."""
Make = Callable[[random.Random, int], tuple[str, list[str]]]
"""Makes (prompt, answers) with an amount of filler."""


def write_long_context_tasks(
    folder: Path, tokenizer: Tokenizer, lengths: list[int], documents: int, seed: int = 0
) -> None:
    """Write a task per kind and length.

    Raises:
        UserError: a length that is too short for a task, or a folder that is not empty.
    """
    written = {}
    for length in lengths:
        for name, (make, answer_tokens) in TASKS.items():
            room = length - answer_tokens
            rows = [_document(f"{seed}/{name}/{length}/{i}", name, make, tokenizer, room) for i in range(documents)]
            written[f"{name}_{length}"] = (rows, answer_tokens)
    new_folder(folder)
    for task, (rows, answer_tokens) in written.items():
        write_task(folder, _config(task, answer_tokens), rows)


def _config(task: str, answer_tokens: int) -> dict[str, Any]:
    return {
        "task": task,
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answers",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": answer_tokens},
        "metric_list": [{"metric": "recall"}],
    }


def _document(key: str, name: str, make: Make, tokenizer: Tokenizer, room: int) -> dict[str, Any]:
    """Return the document with the most filler that fits, found by bisection."""

    def tokens(amount: int) -> int:
        return len(tokenizer.encode(make(random.Random(key), amount)[0]))

    if tokens(0) > room:
        raise UserError(f"{name}: a length with {room} tokens for the prompt is too short; it needs {tokens(0)}")
    fits, too_many = 0, 1
    while tokens(too_many) <= room:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if tokens(middle) <= room else (fits, middle)
    prompt, answers = make(random.Random(key), fits)
    return {"prompt": prompt, "answers": answers, "filler": fits}


def needle(draw: random.Random, amount: int) -> tuple[str, list[str]]:
    """Return a text that gives numbers for words among `amount` sentences, and the number that is asked for."""
    words = _words(draw, 1 + DISTRACTORS)
    numbers = [str(draw.randrange(1_000_000, 10_000_000)) for _ in words]
    sentences = [FILLER[i % len(FILLER)] for i in range(amount)]
    for word, number in zip(words, numbers, strict=True):
        sentences.insert(draw.randint(0, len(sentences)), f"The secret number of {word} is {number}.")
    text = " ".join(sentences)
    question = f"Question: what is the secret number of {words[0]}?\nAnswer: the secret number of {words[0]} is"
    return f"Remember the secret numbers in this text.\n{text}\n{question}", [numbers[0]]


def variables(draw: random.Random, amount: int) -> tuple[str, list[str]]:
    """Return a text with two chains of assignments among `amount` sentences, and the variables of the first."""
    names = [word.upper() for word in _words(draw, 2 * CHAIN)]
    chains = [names[:CHAIN], names[CHAIN:]]
    values = [str(number) for number in draw.sample(range(10_000, 100_000), 2)]
    lines = [FILLER[i % len(FILLER)] for i in range(amount)]
    for chain, value in zip(chains, values, strict=True):
        places = sorted(draw.randint(0, len(lines)) for _ in chain)
        sources = [value, *chain[:-1]]
        for place, (name, source) in reversed(list(zip(places, zip(chain, sources, strict=True), strict=True))):
            lines.insert(place, f"VAR {name} = {source}")
    text = "\n".join(lines)
    question = f"Question: which variables have the value {values[0]}?\nAnswer: the {CHAIN} variables are"
    return f"Follow the assignments in this text.\n{text}\n{question}", chains[0]


def common_words(draw: random.Random, amount: int) -> tuple[str, list[str]]:
    """Return a shuffled list of words with `amount` seldom ones, and the words that it repeats most often."""
    words = _words(draw, COMMON + amount)
    often, seldom = words[:COMMON], words[COMMON:]
    listed = often * OFTEN + seldom * SELDOM
    draw.shuffle(listed)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    question = f"Question: which {COMMON} words are the most common in the list?\nAnswer: the words are"
    return f"Count the words of this list.\n{text}\n{question}", often


def _words(draw: random.Random, count: int) -> list[str]:
    """Return different words of three or four syllables, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(3, 4))]
        found["".join(syllables)] = None
    return list(found)


TASKS: dict[str, tuple[Make, int]] = {
    "needle": (needle, 32),
    "variables": (variables, 64),
    "common_words": (common_words, 128),
}
"""Each kind of task, and the tokens of its answer."""
