"""Instance filter: samples in which an n-gram repeats many times in a row.

Such samples (tables of zeros, markup, logs) cause spikes of the loss. OLMo-core excludes them from the loss and keeps their
place in the batch, so that the order of samples does not depend on the filter. This module finds the same samples.
"""

import numpy as np

_ANCHORS = 4  # compared per repetition of the required length: a run that is long enough contains all of them


def has_repetition(tokens: np.ndarray, min_period: int = 1, max_period: int = 13, max_count: int = 32) -> bool:
    """Return whether an n-gram of min_period to max_period tokens occurs at least max_count times in a row.

    Occurrences are counted as OLMo-core's `find_periodic_sequences` does: a stretch of `period * count` tokens or more in which
    every token equals the one `period` before it. A stretch may begin inside the n-gram.

    Args:
        tokens: one sample [n].
        max_count: fewest occurrences that are found, at least 3.
    """
    return any(_has_run(tokens, period, (max_count - 1) * period) for period in range(min_period, max_period + 1))


def _has_run(tokens: np.ndarray, period: int, length: int) -> bool:
    """Return whether `length` tokens in a row equal the token `period` before them."""
    if len(tokens) < length + period:
        return False
    step = max(1, length // _ANCHORS)
    equal = tokens[period::step] == tokens[: len(tokens) - period : step]
    anchors = length // step  # that a run of this length contains at least
    candidates = equal[: len(equal) - anchors + 1].copy()
    for shift in range(1, anchors):
        candidates &= equal[shift : len(equal) - anchors + 1 + shift]
    if not candidates.any():
        return False
    different = np.flatnonzero(tokens[period:] != tokens[:-period])
    runs = np.diff(different, prepend=-1, append=len(tokens) - period) - 1
    return bool(runs.max() >= length)
