"""A legal run, what makes it a wrong one, and what the error must say."""

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run

TINY = [
    "run_dir=runs/x", "model=olmo_hybrid_tiny", "data.train=[{path: data/train}]", "data.validation=[{path: data/val}]",
    "data.sequence_length=256", "train.steps=100", "train.global_batch_size=8", "train.micro_batch_size=2",
]  # fmt: skip
"""A legal run."""

ZERO = ["train.engine=deepspeed"]
OVERLAP = ["parallel.tp_comm_overlap=true", "parallel.tensor_parallel_size=2"]
VPP = ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=2"]
RAMP = "train.batch_ramp={start: %d, increment: %d, samples: 1000}"

Case = tuple[list[str], str, str, str]
"""Overrides of TINY, the field named, and what the message must hold: what is wrong, and the remedy."""


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """One test a case, with its field in the name."""
    names = [f"{i}-{case[1]}" for i, case in enumerate(cases)]
    return pytest.mark.parametrize(("overrides", "field", "wrong", "remedy"), cases, ids=names)


def assert_named(overrides: list[str], field: str, wrong: str, remedy: str) -> None:
    """The run is refused for that field alone, on one line that says what is wrong, then the remedy."""
    with pytest.raises(ConfigError) as caught:
        load_run(None, TINY + overrides)
    assert [named for named, _ in caught.value.problems] == [field]
    line = str(caught.value)
    assert line.startswith(f"{field}: ") and "\n" not in line and len(line) < 400
    what, _, says = line.partition("; ")
    assert wrong in what or wrong in line
    assert remedy in says or remedy in line
