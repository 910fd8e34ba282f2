"""Jobs of test_plugin.py on several ranks."""

import sys

from testing import jobs
from tests.inference.decoding import decoded_and_full


def train(folder: str, config: dict) -> int:
    """Train with the packages in `folder`, and return how many elements this rank's parameters have."""
    sys.path.insert(0, folder)
    return sum(parameter.numel() for parameter in jobs.pretrain_run(config)["parameters"].values())


def decode(folder: str, checkpoint: str, tokens: list[int]) -> tuple[list[int], list[int]]:
    """Return the greedy continuation by the mixer's cache, and by running the whole sequence for every token."""
    sys.path.insert(0, folder)
    return decoded_and_full(checkpoint, tokens, 12, plugins=["leaky"])
