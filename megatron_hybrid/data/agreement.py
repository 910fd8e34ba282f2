"""Agreement of data, tokenizer and model on the vocabulary and the end-of-document token.

Each is stated in several places: `PREFIX.json` next to the tokens, the tokenizer's folder, and `model.vocab_size` and
`model.eos_token_id`. A model trained on documents that end with another token than it believes never stops generating.
No torch here.

- `run_disagreements`: everything that a run states.
- `data_disagreements`, `tokenizer_disagreements`, `made_with_another`: parts of it, for other tools.
- `checkpoint_disagreements`, `evaluation_disagreements`: of a trained model with a tokenizer, or with a dataset.
- `refuse`, `warn`: raise what is fatal, and print the rest.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.summary import StatedData, read_summary
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer, vocabulary_sha256

DEFAULT_TOKENIZER = "byte"


@dataclass(frozen=True)
class Disagreement:
    """Contradiction between two statements about a run."""

    field: str
    """Field or file of one statement: `model.eos_token_id`."""
    message: str
    """Message with both statements and the remedy."""
    fatal: bool
    """True if training would be wrong."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def run_disagreements(model: ModelConfig, data: DataConfig) -> list[Disagreement]:
    """Return the disagreements between the files and fields of a run. Missing statements agree with everything.

    Raises:
        DataError: a summary that is damaged.
    """
    stated = read_summaries(data)
    found = data_disagreements(model, stated)
    if data.tokenizer == DEFAULT_TOKENIZER:
        return found + _default_tokenizer(stated) + _between_sources(stated)
    try:
        tokenizer = load_tokenizer(data.tokenizer)
    except DataError as error:
        text = f"not compared with data and model: {error}. Training does not need it; megatron-hybrid generate does"
        return [*found, Disagreement("data.tokenizer", text, fatal=False), *_between_sources(stated)]
    found += tokenizer_disagreements(model, tokenizer, "data.tokenizer", data.tokenizer)
    return found + made_with_another(stated, tokenizer, "data.tokenizer", data.tokenizer)


def read_summaries(data: DataConfig) -> dict[str, StatedData]:
    """Return the summaries of a run's sources by field. Raises DataError if a summary is damaged."""
    found = {field: read_summary(source.path) for field, source in data.sources().items()}
    return {field: summary for field, summary in found.items() if summary is not None}


def data_disagreements(model: ModelConfig, stated: Mapping[str, StatedData]) -> list[Disagreement]:
    """Compare summaries with the model, and with each other if the model has no end-of-document token."""
    found = []
    for field, summary in stated.items():
        ids = summary.vocab_size
        if not summary.append_eos and summary.eos_token_id == ids - 1:
            ids -= 1  # the last one is not in the data
        if ids > model.vocab_size:
            text = (
                f"{model.vocab_size} is less than the {ids} ids of the tokenizer that made {field} "
                f"({summary.path}: vocab_size); set it to at least {ids}"
            )
            found.append(Disagreement("model.vocab_size", text, fatal=True))
        if model.eos_token_id not in (None, summary.eos_token_id):
            text = (
                f"{model.eos_token_id}, but {_end_of(summary)} {summary.eos_token_id} ({field}, {summary.path}: "
                f"eos_token_id); set it to {summary.eos_token_id}, or tokenize the documents with the model's tokenizer"
            )
            found.append(Disagreement("model.eos_token_id", text, fatal=summary.append_eos))
    ends = {summary.eos_token_id: field for field, summary in stated.items() if summary.append_eos}
    if model.eos_token_id is None and len(ends) > 1:
        (one, first), (other, second) = list(ends.items())[:2]
        text = (
            f"its documents end with token {other} (eos_token_id), those of {first} with {one}; tokenize both with the same "
            "tokenizer"
        )
        found.append(Disagreement(second, text, fatal=True))
    return found


def _end_of(summary: StatedData) -> str:
    return "documents end with token" if summary.append_eos else "the data's tokenizer ends documents with token"


def tokenizer_disagreements(model: ModelConfig, tokenizer: Tokenizer, field: str, name: str) -> list[Disagreement]:
    """Compare a tokenizer with the model. field: configuration field of the tokenizer; name: its value."""
    found = []
    if tokenizer.vocab_size > model.vocab_size:
        text = (
            f"{name} has {tokenizer.vocab_size} ids, more than model.vocab_size {model.vocab_size}; give the model's "
            f"tokenizer, or train with a vocab_size of at least {tokenizer.vocab_size}"
        )
        found.append(Disagreement(field, text, fatal=True))
    if model.eos_token_id not in (None, tokenizer.eos_token_id):
        text = (
            f"{name} ends documents with token {tokenizer.eos_token_id}, but model.eos_token_id is {model.eos_token_id}: "
            "the model stops at that one; give the tokenizer that made the data, or correct model.eos_token_id"
        )
        found.append(Disagreement(field, text, fatal=False))
    return found


def made_with_another(
    stated: Mapping[str, StatedData], tokenizer: Tokenizer, field: str, name: str
) -> list[Disagreement]:
    """Compare a tokenizer with the tokenizers of the data: common ids must have the same text.

    A tokenizer that has more tokens than the one that made the data, at the end, agrees with it.
    """
    found = []
    for source, summary in stated.items():
        if summary.vocabulary_sha256 is None:
            differs = summary.vocab_size > tokenizer.vocab_size
        else:
            differs = summary.vocabulary_sha256 != vocabulary_sha256(tokenizer, summary.vocab_size)
        if differs:
            text = (
                f"{source} was made with another tokenizer than {name} ({summary.path}: tokenizer {summary.tokenizer}, "
                f"{summary.vocab_size} ids; {name} has {tokenizer.vocab_size}): their ids mean different text. Give the "
                "tokenizer that made the data, or tokenize the documents again"
            )
            found.append(Disagreement(field, text, fatal=True))
    return found


def _default_tokenizer(stated: Mapping[str, StatedData]) -> list[Disagreement]:
    """Return the disagreement that `data.tokenizer` has its default value but the data names another tokenizer."""
    for field, summary in stated.items():
        if summary.tokenizer != DEFAULT_TOKENIZER:
            text = (
                f"{DEFAULT_TOKENIZER}, but {field} was made with {summary.tokenizer} ({summary.path}); set it, for "
                "megatron-hybrid generate"
            )
            return [Disagreement("data.tokenizer", text, fatal=False)]
    return []


def _between_sources(stated: Mapping[str, StatedData]) -> list[Disagreement]:
    """Return the disagreements between sources that were tokenized with different tokenizers."""
    if not stated:
        return []
    (first, one), *others = stated.items()
    for field, other in others:
        hashes = {one.vocabulary_sha256, other.vocabulary_sha256} - {None}
        if one.vocab_size != other.vocab_size or len(hashes) > 1:
            text = (
                f"made with tokenizer {other.tokenizer} of {other.vocab_size} ids, {first} with {one.tokenizer} of "
                f"{one.vocab_size}: their ids may mean different text. Tokenize both with one tokenizer; if one only has more "
                "tokens at its end, set data.tokenizer to that one"
            )
            return [Disagreement(field, text, fatal=True)]
    return []


def checkpoint_disagreements(
    model: ModelConfig, run: object, tokenizer: str | None, field: str = "--tokenizer"
) -> list[Disagreement]:
    """Compare a tokenizer with a checkpoint's model, and both with the data that the model was trained on.

    A model that is trained already is not refused for the data that it was trained on.

    Args:
        run: configuration of the run that made the checkpoint, as far as it has one.
        tokenizer: as `load_tokenizer` takes it; None: only the data is compared.
    """
    data = _data_of(run)
    stated = read_summaries(data) if data else {}
    found = [replace(told, fatal=False) for told in data_disagreements(model, stated)]
    if tokenizer is None:
        return found
    try:
        loaded = load_tokenizer(tokenizer)
    except DataError as error:
        return [*found, Disagreement(field, f"not compared with the model: {error}", fatal=False)]
    found += tokenizer_disagreements(model, loaded, field, tokenizer)
    found += made_with_another(stated, loaded, field, tokenizer)
    runs = _tokenizer_of(data)
    if runs is not None and data is not None and not _same_text(loaded, runs):
        text = f"{tokenizer} is another tokenizer than the run's, {data.tokenizer}: their ids mean different text"
        found.append(Disagreement(field, text, fatal=True))
    return found


def evaluation_disagreements(model: ModelConfig, run: object, path: str) -> list[Disagreement]:
    """Compare a dataset with a checkpoint's model and with the tokenizer that its run names, or its run's data.

    Another end-of-document token is not fatal: the loss of all other tokens is right.

    Raises:
        DataError: a summary that is damaged.
    """
    summary = read_summary(path)
    if summary is None:
        return []
    stated, data = {path: summary}, _data_of(run)
    found = [replace(told, fatal=told.field != "model.eos_token_id") for told in data_disagreements(model, stated)]
    tokenizer = _tokenizer_of(data)
    if tokenizer is not None and data is not None:
        return found + made_with_another(stated, tokenizer, "data.tokenizer", data.tokenizer)
    return found + _between_sources((read_summaries(data) if data else {}) | stated)


def _data_of(run: object) -> DataConfig | None:
    """Return the data section of a checkpoint's run. None: there is none, or it is not valid."""
    section = run.get("data") if isinstance(run, dict) else None
    try:
        return DataConfig.model_validate(section) if section is not None else None
    except ValidationError:
        return None


def _tokenizer_of(data: DataConfig | None) -> Tokenizer | None:
    """Return the tokenizer of a data section if it is not the default and exists on this machine."""
    if data is None or data.tokenizer == DEFAULT_TOKENIZER:
        return None
    try:
        return load_tokenizer(data.tokenizer)
    except DataError:
        return None


def _same_text(one: Tokenizer, other: Tokenizer) -> bool:
    size = min(one.vocab_size, other.vocab_size)
    return vocabulary_sha256(one, size) == vocabulary_sha256(other, size)


def refuse(found: Iterable[Disagreement]) -> list[str]:
    """Raise the disagreements that are fatal, and return the others as warnings.

    Raises:
        DataError: all that are fatal, a line each.
    """
    told = list(dict.fromkeys(found))
    if fatal := [str(disagreement) for disagreement in told if disagreement.fatal]:
        raise DataError("\n".join(fatal))
    return [str(disagreement) for disagreement in told]


def warn(lines: Iterable[str]) -> None:
    """Print warnings."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)
