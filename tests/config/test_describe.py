"""Output of --dry-run."""

from pathlib import Path

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.load import load_run

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
TINY, LARGE = str(EXAMPLES / "pretrain_hybrid_tiny.yaml"), str(EXAMPLES / "pretrain_hybrid_7b.yaml")


def lines_of(text: str) -> list[str]:
    return [" ".join(line.removeprefix("#").split()) for line in text.splitlines()]


def test_it_is_a_config_file_again(tmp_path: Path) -> None:
    run = load_run(TINY)
    (tmp_path / "again.yaml").write_text(describe(run, 4))
    assert load_run(str(tmp_path / "again.yaml")) == run


def test_layout_heads_and_work() -> None:
    overrides = ["tensor_parallel_size=4", "pipeline_parallel_size=2", "virtual_pipeline_parallel_size=2"]
    text = describe(load_run(LARGE, [f"parallel.{override}" for override in overrides]), 64)
    lines = lines_of(text)
    assert "all 32 7,430,870,688 44.09" in lines
    assert "tensor 4 with sequence parallelism" in lines
    assert "pipeline 2 x 2 chunks, interleaved" in lines
    assert "data 8 with a distributed optimizer" in lines
    assert "3 1 1 25-31 GGAGGGA 1,834,826,220" in lines
    assert "attention query 30 32 8" in lines
    assert "per step 512 sequences x 8,192 = 4,194,304 tokens, 32 microbatches of 2 on each data parallel rank" in lines
    assert any(line.startswith("run 1,413,822 steps, 5,929,9") for line in lines)
    assert all(line.isascii() and len(line) <= 120 for line in text.splitlines())


def test_slices_of_sequences() -> None:
    overrides = ["parallel={tensor_parallel_size: 2, context_parallel_size: 4}"]
    text = describe(load_run(LARGE, overrides), 64)
    wanted = "context 4, 2,048 tokens of each sequence per rank, which attends with 4 heads over whole sequences"
    assert wanted in lines_of(text) and "data 8 with a distributed optimizer" in lines_of(text)
    assert all(len(line) <= 120 for line in text.splitlines())
    overrides.append("model.layer_pattern=G*32")
    assert "context 4, 2,048 tokens of each sequence per rank" in lines_of(describe(load_run(LARGE, overrides), 64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_stages_hold_all_parameters(tied: bool, normalised: bool) -> None:
    fields = {"tie_embeddings": tied, "embedding_norm": normalised}
    overrides = [f"model.{name}={str(value).lower()}" for name, value in fields.items()]
    overrides.append("parallel.pipeline_split=[3, 5]")
    run = load_run(TINY, overrides)
    text = describe(run, 4)
    table = text.split("Pipeline stages")[1].split("#\n")[0].splitlines()[2:]
    stages = [int(line.split()[-1].replace(",", "")) for line in table]
    total = int(next(line for line in lines_of(text) if line.startswith("all 8 ")).split()[2].replace(",", ""))
    shared = run.model.vocab_size * run.model.hidden_size if tied else 0  # the last stage holds a copy
    assert sum(stages) == total + shared
    assert ("embedding norm 128 0" in lines_of(text)) == normalised


def test_one_rank_has_no_tables_of_ranks() -> None:
    text = describe(load_run(TINY, ["parallel={}"]), 1)
    assert "Pipeline stages" not in text and "Heads over" not in text


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="does not divide the 6 ranks"):
        describe(load_run(TINY), 6)
