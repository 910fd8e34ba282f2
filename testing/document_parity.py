"""Compare packed rows of documents with the same model on each document alone."""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.sample import Sample, SampleCounts
from testing.documents import RAGGED, Rows, relative_error, starts_of_rows
from testing.fidelity import BASE, YARN
from testing.jobs import make_engine
from testing.leaks import planted
from testing.peers import transformers_model, true_tensors_of

CASES = {
    "hybrid": BASE,
    "grouped heads": BASE | dict(num_key_value_heads=2, gdn=BASE["gdn"] | dict(num_key_heads=2)),
    "windows and yarn": BASE | dict(layer_pattern="WA", gdn=None, sliding_window=16, rope_scaling=YARN),
    "tied, nope": BASE | dict(layer_pattern="AG", tie_embeddings=True, rope_theta=None),
}
LEAKS_OF = {"state": "hybrid", "taps": "hybrid", "attention column": "hybrid"}
"""The case in which each leak is planted."""


def fill(engine, tensors: dict[str, torch.Tensor]) -> None:
    """Write true tensors into the parameters of an engine."""
    with torch.no_grad():
        for _, parameter, pieces in engine.layout.parameters(engine.chunks):
            for piece in pieces:
                piece.target.narrow(parameter).copy_(piece.source.narrow(tensors[piece.tensor.name]))


def gradients_of(engine) -> dict[str, torch.Tensor]:
    """Return the gradients by true tensor, and zero them."""
    found = {}
    for _, parameter, pieces in engine.layout.parameters(engine.chunks):
        gradient = parameter.main_grad if parameter.grad is None else parameter.grad
        found |= {piece.tensor.name: piece.target.narrow(gradient).clone() for piece in pieces}
        gradient.zero_()
    return found


def parity(model: dict, rows: Rows, tensors: dict[str, torch.Tensor] | None = None, leak: str | None = None) -> dict:
    """Return the relative errors (L2) of logits and gradients of packed rows, from those of each document alone.

    Args:
        tensors: weights; None: initial ones.
        leak: name of a leak between documents to plant (testing/leaks.py).
    """
    length = sum(rows[0])
    engine = make_engine(model, {}, {"steps": 1, "global_batch_size": 1, "dtype": "fp32"}, length)
    if tensors:
        fill(engine, tensors)
    (chunk,) = engine.chunks
    tokens, labels = tokens_and_labels(model["vocab_size"], rows)
    batch = Batch.collate([plain_sample(t, s) for t, s in zip(tokens.numpy(), starts_of_rows(rows), strict=True)])
    vocabulary = slice(model["vocab_size"])  # the rest is padding
    with planted(leak):
        packed = chunk(tokens, documents=batch.documents, cu_seqlens=batch.cu_seqlens)[..., vocabulary]
    _loss(packed, labels).backward()
    found, packed, alone = gradients_of(engine), packed.detach(), torch.empty_like(packed)
    for row, first, last in places(rows):
        logits = chunk(tokens[row : row + 1, first:last])[..., vocabulary]
        _loss(logits, labels[row : row + 1, first:last]).backward()
        alone[row, first:last] = logits[0].detach()
    worst = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max()
    more = {"worst token": float(worst), "values": packed, "gradient values": found}
    return errors(packed, alone, found, gradients_of(engine)) | more


def tokens_and_labels(vocab_size: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens of the rows, and labels."""
    tokens = torch.randint(0, vocab_size, (len(rows), sum(rows[0])), generator=torch.Generator().manual_seed(1))
    return tokens, tokens.flip(1)


def places(rows: Rows) -> list[tuple[int, int, int]]:
    """Return (row, first token, token after the last) of each document."""
    bounds = [np.cumsum([0, *lengths]).tolist() for lengths in rows]
    return [(row, *pair) for row, firsts in enumerate(bounds) for pair in pairwise(firsts)]


def errors(logits: torch.Tensor, expected: torch.Tensor, found: dict, gradients: dict) -> dict:
    """Return the relative errors of the logits and of each gradient."""
    return {
        "logits": relative_error(logits, expected),
        "gradients": {name: relative_error(found[name], gradient) for name, gradient in gradients.items()},
    }


def against_transformers(ranks) -> dict:
    """Return the relative errors of packed rows from transformers' `olmo_hybrid` on each document alone, from the same weights."""
    config = ModelConfig(**BASE)
    peer = transformers_model(config)
    (ours,) = ranks.run(parity, 1, model=BASE, rows=RAGGED, tensors=true_tensors_of(peer, config))
    tokens, labels = tokens_and_labels(config.vocab_size, RAGGED)
    theirs = torch.empty(*tokens.shape, config.vocab_size)
    for row, first, last in places(RAGGED):
        logits = peer(tokens[row : row + 1, first:last]).logits
        _loss(logits, labels[row : row + 1, first:last]).backward()
        theirs[row, first:last] = logits[0].detach()
    expected = true_tensors_of(peer, config, gradients=True)
    return errors(ours["values"], theirs, ours["gradient values"], expected)


def plain_sample(tokens: np.ndarray, starts: np.ndarray) -> Sample:
    """Return a sample of documents in which every label counts."""
    return Sample(tokens, tokens, np.ones(len(tokens), np.float32), starts, SampleCounts())


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return a sum over tokens, so that the losses of the parts add up to that of the whole."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
