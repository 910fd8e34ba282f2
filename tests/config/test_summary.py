"""The summary that a run prints at its start."""

import pytest

from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.summary import short_number, summary

SEVEN_B = "examples/configs/pretrain_hybrid_7b.yaml"


def text(root, *overrides: str, world_size: int = 64, memory: str | None = None) -> list[str]:
    config: RunConfig = load_run(str(root / SEVEN_B), ["data.train.0.path=/data/a.npy", "run_dir=/runs/a", *overrides])
    return summary(config, world_size, "NVIDIA H200", [0.5, 12.0], memory)


def test_the_7b_run(root):
    lines = text(root, "parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=4")
    shown = {line[:12].strip(): line[12:] for line in lines}
    assert shown["run folder"] == "/runs/a" and shown["ranks"] == "64 on NVIDIA H200"
    assert shown["model"].startswith("7.43 B parameters, 32 layers GGGA*8, width 3,840")
    assert shown["layout"] == "TP2 with SP x PP2 with VPP4 x DP16 with a distributed optimizer"
    assert shown["step"].startswith("512 sequences x 8,192 = 4,194,304 tokens; per rank 16 micro-batches")
    assert "0.5 of data.train.0, 12 of data.train.1" in " ".join(" ".join(lines).split()) and "memory" not in shown


def test_no_line_is_longer_than_80_columns(root):
    lines = text(root, memory="at most 57.8 GB of tensors per GPU (" + ", ".join(["weights 14.9"] * 12) + ")")
    assert max(map(len, lines)) <= 80 and len(lines) <= 15
    long = "/a/folder/with/a/long/name" * 5
    assert f"run folder  {long}" in text(root, f"run_dir={long}"), "a path stays whole, so that it can be copied"


def test_one_rank_and_fp8(root):
    lines = text(root, "parallel.tensor_parallel_size=1", "parallel.sequence_parallel=null", world_size=1)
    assert "layout      one rank" in lines
    lines = text(root, "precision.fp8_recipe=tensorwise")
    assert any(line.startswith("precision   bf16 with fp8 tensorwise linears; optimizer") for line in lines)


@pytest.mark.parametrize(
    "value, words", [(7_430_870_688, "7.43 B"), (999_999, "1 M"), (1234, "1.23 k"), (7, "7"), (4e12, "4 T")]
)
def test_short_numbers(value, words):
    assert short_number(value) == words
