"""Parts of a step's time: the rows of its table."""

from collections.abc import Mapping

GEMMS, MEMORY_BOUND, LAUNCHES = "GEMMs", "memory-bound operations", "kernel launches"
BUBBLE, OPTIMIZER = "bubble", "optimizer"
TP, TP_HIDDEN = "TP communication", "TP communication, hidden"
DP, DP_HIDDEN = "DP communication", "DP communication, hidden"
PP = "PP communication"
HIDDEN = (TP_HIDDEN, DP_HIDDEN)


class Parts(dict[str, float]):
    """Seconds by part. A part that is missing takes no time."""

    def __missing__(self, part: str) -> float:
        return 0.0

    def add(self, others: Mapping[str, float]) -> None:
        """Add every part of `others`."""
        for part, seconds in others.items():
            self[part] += seconds

    def scaled(self, count: float) -> "Parts":
        """Return every part times `count`."""
        return Parts({part: seconds * count for part, seconds in self.items()})

    @property
    def exposed(self) -> float:
        """Seconds that are not hidden behind others."""
        return sum(seconds for part, seconds in self.items() if part not in HIDDEN)
