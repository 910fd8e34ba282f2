"""Progress of a run, saved in every checkpoint."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Steps, samples, tokens and updates so far."""

    step: int = 0
    samples: int = 0
    """Samples consumed, which is also the position in the data."""
    tokens: int = 0
    """Tokens consumed. Each sample counts with the sequence length that it had."""
    updates: int = 0
    """Updates of the optimizer, for bias correction: steps that were not skipped, and those behind the moments that the run took from
    another run's checkpoint."""
