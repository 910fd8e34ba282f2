"""Identity of the vocabulary that a run's tokens come from. It is kept in every checkpoint and compared when a stage starts."""

from typing import Any

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.agreement import DEFAULT_TOKENIZER, read_summaries
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import load_tokenizer, vocabulary_sha256


def vocabulary_identity(config: RunConfig) -> dict[str, Any] | None:
    """Return `ids`, the size of the vocabulary, and its `sha256`; None if neither the data nor a tokenizer states it.

    The summaries next to the data take precedence: training reads tokens, not the tokenizer.

    Raises:
        DataError: a summary that is damaged.
    """
    for summary in read_summaries(config.data).values():
        if summary.vocabulary_sha256 is not None:
            return {"ids": summary.vocab_size, "sha256": summary.vocabulary_sha256}
    if config.data.tokenizer == DEFAULT_TOKENIZER:
        return None
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except DataError:  # reported by run_disagreements; training does not need it
        return None
    return {"ids": tokenizer.vocab_size, "sha256": vocabulary_sha256(tokenizer, tokenizer.vocab_size)}
