"""Bytes of text that tokens stand for, for losses in bits per byte."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hybrid.data.agreement import made_with_another
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.summary import read_summary
from megatron_hybrid.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class TextBytes:
    """Bytes of text per token, or the reason why they are unknown."""

    table: np.ndarray | None
    """float64 [vocabulary]: NaN for a token that the tokenizer does not have."""
    unknown_reason: str = ""

    @classmethod
    def of(cls, tokenizer: str, vocab_size: int, paths: Sequence[str]) -> "TextBytes":
        """Return the bytes of a tokenizer's tokens.

        Args:
            tokenizer: as `load_tokenizer` takes it.
            paths: sources of tokens. Their summaries must not name another tokenizer.
        """
        try:
            loaded = load_tokenizer(tokenizer)
            known = loaded.token_bytes()
            summaries = {path: summary for path in paths if (summary := read_summary(path)) is not None}
        except DataError as error:
            return cls(None, str(error))
        if contradictions := made_with_another(summaries, loaded, "tokenizer", tokenizer):
            return cls(None, contradictions[0].message)
        table = np.full(vocab_size, np.nan)
        inside = {token: size for token, size in known.items() if token < vocab_size}
        table[list(inside)] = list(inside.values())
        return cls(table)

    def count(self, batch: Batch) -> float:
        """Return the bytes of a batch's counted labels; NaN if they are unknown. The batch is in host memory."""
        if self.table is None:
            return np.nan
        weights = batch.loss_mask.numpy()
        bytes_ = np.where(weights > 0, self.table[batch.labels.numpy()], 0.0)
        return float((weights * bytes_).sum())
