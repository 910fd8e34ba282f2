"""Correct predictions: tokens whose label has the highest logit, counted without materializing all logits.

Suffixes: n tokens that count, h hidden size, v rows of the vocabulary.
"""

import torch

from hybrid_kernels.collectives import VocabParallel

_TOKENS, _ROWS = 1024, 16384
"""Tokens and rows of the vocabulary whose logits are held at a time."""


@torch.no_grad()
def count_correct(
    x_sbh: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_sb: torch.Tensor,
    loss_mask_sb: torch.Tensor,
    true_vocab_size: int,
    vocab_parallel: VocabParallel | None,
) -> torch.Tensor:
    """Return the number of tokens in the loss whose label has the highest logit: fp64 scalar.

    Logits are fp32. Of equal logits, that of the lowest token id is the highest, under tensor parallelism too.

    Args:
        x_sbh: last hidden states, the same on every tensor parallel rank.
        weight_vh: this rank's rows of the padded vocabulary.
        true_vocab_size: rows of the whole vocabulary from this one on are padding and are ignored.
    """
    counted = loss_mask_sb.reshape(-1) > 0
    x_nh, labels_n = x_sbh.reshape(-1, x_sbh.shape[-1])[counted], labels_sb.reshape(-1)[counted]
    correct = torch.zeros((), dtype=torch.float64, device=x_sbh.device)
    first = vocab_parallel.rank * len(weight_vh) if vocab_parallel else 0
    weight_vh = weight_vh[: max(0, true_vocab_size - first)]
    for x, labels in zip(x_nh.split(_TOKENS), labels_n.split(_TOKENS), strict=True):
        highest, token = _highest(x.float(), weight_vh, first)
        if vocab_parallel:
            own = highest.clone()
            vocab_parallel.all_reduce_max(highest)
            lowest_id = torch.where(own == highest, -token, torch.iinfo(torch.int64).min)
            vocab_parallel.all_reduce_max(lowest_id)
            token = -lowest_id
        correct += (token == labels).sum()
    return correct


def _highest(x_nh: torch.Tensor, weight_vh: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest logit of each token and its token id; `first` is the id of the first row."""
    highest = torch.full((len(x_nh),), -torch.inf, device=x_nh.device)
    token = torch.zeros(len(x_nh), dtype=torch.int64, device=x_nh.device)
    for number, rows in enumerate(weight_vh.split(_ROWS)):
        if not len(rows):
            break
        value, place = (x_nh @ rows.float().t()).max(1)
        above = value > highest
        highest = torch.where(above, value, highest)
        token = torch.where(above, place + (first + number * _ROWS), token)
    return highest, token
