"""Layouts that do not fit the model, the batch or the ranks: each error names its field and the remedy, and nothing else."""

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run
from tests.config.wrong_runs import OVERLAP, RAMP, TINY, VPP, ZERO, Case, assert_named, each

WRONG: list[Case] = [
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel", "tensor_parallel_size > 1", "leave it out"),
    (["parallel.tensor_parallel_size=0"], "parallel.tensor_parallel_size", "greater than 0", "the nearest is 1"),
    (OVERLAP[:1], "parallel.tp_comm_overlap", "nothing to overlap at tensor_parallel_size 1", "this to false"),
    (
        [*OVERLAP, "parallel.sequence_parallel=false"],
        "parallel.tp_comm_overlap",
        "needs sequence",
        "leave sequence_par",
    ),
    ([*OVERLAP, "train.dtype=fp32"], "parallel.tp_comm_overlap", "needs train.dtype bf16", "or this to false"),
    (
        [*OVERLAP, "model.backend=local"],
        "parallel.tp_comm_overlap",
        "Transformer Engine's",
        "model.backend to auto",
    ),
    (
        [*OVERLAP, "parallel.tensor_parallel_size=16"],
        "parallel.tp_comm_overlap",
        "at most 8 GPUs of one node, and tensor_parallel_size is 16",
        "set that to 8",
    ),
    (
        [*OVERLAP, "precision.fp8_recipe=blockwise", "model.gdn.value_head_dim=64"],
        "parallel.tp_comm_overlap",
        "cannot exchange blockwise FP8",
        "to tensorwise, or this to false",
    ),
    ([*OVERLAP, *ZERO], "parallel.tp_comm_overlap", "is for train.engine = megatron", "or this to false"),
    (VPP[1:], "parallel.virtual_pipeline_parallel_size", "needs pipeline_parallel_size > 1", "set it to 1"),
    (["parallel.pipeline_parallel_size=9"], "parallel.pipeline_parallel_size", "exceed the 8 layers", "at most 8"),
    (
        ["parallel={pipeline_parallel_size: 3, virtual_pipeline_parallel_size: 3}"],
        "parallel.pipeline_parallel_size",
        "9 stages exceed the 8 layers",
        "at most 2",
    ),
    (
        ["parallel={pipeline_parallel_size: 2, virtual_pipeline_parallel_size: 5}"],
        "parallel.pipeline_parallel_size",
        "10 stages exceed the 8 layers",
        "set virtual_pipeline_parallel_size to at most 4",
    ),
    (
        ["parallel={pipeline_parallel_size: 9, virtual_pipeline_parallel_size: 9}"],
        "parallel.pipeline_parallel_size",
        "81 stages exceed the 8 layers",
        "at most 8 and virtual_pipeline_parallel_size to 1",
    ),
    (
        ["parallel={pipeline_parallel_size: 2, pipeline_split: [3, 3, 2]}"],
        "parallel.pipeline_split",
        "has 3 entries",
        "= 2 of them",
    ),
    (
        ["parallel={pipeline_parallel_size: 2, pipeline_split: [3, 4]}"],
        "parallel.pipeline_split",
        "sums to 7; layer_pattern has 8 layers",
        "add 1 to its entries",
    ),
    (
        ["parallel={pipeline_parallel_size: 2, pipeline_split: [5, 4]}"],
        "parallel.pipeline_split",
        "sums to 9",
        "take 1 from its entries",
    ),
    (["parallel.overlap_param_gather=true"], "parallel.overlap_param_gather", "needs", "overlap_grad_reduce; set both"),
    (
        ["parallel.tensor_parallel_size=2", "data.sequence_length=255"],
        "data.sequence_length",
        "as sequence parallelism needs",
        "nearest is 254, or set parallel.sequence_parallel to false",
    ),
    (
        ["parallel.tensor_parallel_size=8", "model.num_key_value_heads=2"],
        "parallel.tensor_parallel_size",
        "and the 2 key/value heads (model.num_key_value_heads)",
        "that fits is 4",
    ),
    (
        ["parallel.tensor_parallel_size=4", "model.gdn.num_key_heads=2", "model.num_key_value_heads=1"],
        "parallel.tensor_parallel_size",
        "exceeds the 2 Gated DeltaNet key heads",
        "that fits is 2",
    ),
    (
        ["parallel.tensor_parallel_size=4", "model.ffn_hidden_size=386"],
        "model.ffn_hidden_size",
        "386 is not a multiple of tensor_parallel_size = 4",
        "the nearest is 384; or keep it: the nearest tensor_parallel_size that fits is 2",
    ),
    (
        ["parallel.context_parallel_size=2", "data.sequence_length=255"],
        "data.sequence_length",
        "255 is not a multiple of context_parallel_size 2 = 2",
        "the nearest is 254",
    ),
    (
        ["parallel={context_parallel_size: 2, tensor_parallel_size: 2}", "data.sequence_length=254"],
        "data.sequence_length",
        "context_parallel_size 2 x tensor_parallel_size 2 = 4",
        "the nearest is 252",
    ),
    (
        ["parallel.context_parallel_size=3", "data.sequence_length=6", "model.layer_pattern=G*8"],
        "parallel.context_parallel_size",
        "leaves 2 tokens of a sequence on each rank",
        "the largest that fits is 2",
    ),
    (
        ["parallel={context_parallel_size: 4, tensor_parallel_size: 2}"],
        "parallel.context_parallel_size",
        "4 exceeds the 2 key/value heads of each of 2 tensor parallel ranks",
        "set it to 2 at most",
    ),
    (
        [*ZERO, "parallel.context_parallel_size=2"],
        "parallel.context_parallel_size",
        "2 is for train.engine = megatron",
        "set it to 1",
    ),
]


@each(WRONG)
def test_names_field_and_remedy(overrides: list[str], field: str, wrong: str, remedy: str) -> None:
    assert_named(overrides, field, wrong, remedy)


# ranks, overrides, field, what is wrong, the remedy
WRONG_WORLDS: list[tuple[int, list[str], str, str, str]] = [
    (0, [], "world_size", "0 ranks cannot train", "run on 1"),
    (3, ["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size", "divide the 3 ranks", "run on 2 or 4"),
    (3, ["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size", "divide the 3 ranks", "set it to 1"),
    (
        8,
        ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=3"],
        "parallel.pipeline_parallel_size",
        "tensor_parallel_size 2 x pipeline_parallel_size 3 = 6 does not divide the 8 ranks",
        "run on 6 or 12 ranks, or set it to 2",
    ),
    (
        6,
        ["parallel={tensor_parallel_size: 2, context_parallel_size: 2}"],
        "parallel.context_parallel_size",
        "tensor_parallel_size 2 x pipeline_parallel_size 1 x context_parallel_size 2 = 4 does not divide the 6 ranks",
        "run on 4 or 8 ranks, or set it to 1",
    ),
    (1, ["parallel.pipeline_parallel_size=4"], "parallel.pipeline_parallel_size", "divide the 1 ranks", "set it to 1"),
    (3, [], "train.global_batch_size", "micro_batch_size 2 x data parallel size 3 = 6", "the nearest are 6 or 12"),
    (8, [], "train.global_batch_size", "8 is not a multiple of", "the nearest are 16"),
    (1, ["train.global_batch_size=7"], "train.global_batch_size", "7 is not a multiple of", "nearest are 6 or 8"),
    (
        2,
        [*VPP, "train.global_batch_size=6"],
        "train.global_batch_size",
        "makes 3 microbatches",
        "the nearest are 4 or 8, or set virtual_pipeline_parallel_size to 1",
    ),
    (1, [RAMP % (3, 5)], "train.batch_ramp.start", "3 is not a multiple of", "the nearest are 2 or 4"),
    (1, [RAMP % (2, 3)], "train.batch_ramp.increment", "3 is not a multiple of", "the nearest is 2"),
    (2, [*VPP, RAMP % (6, 2)], "train.batch_ramp.start", "(interleaved schedule) = 4", "the nearest are 4 or 8"),
    (2, [*VPP, RAMP % (4, 2)], "train.batch_ramp.increment", "2 is not a multiple of", "the nearest is 4"),
]


@pytest.mark.parametrize(("ranks", "overrides", "field", "wrong", "remedy"), WRONG_WORLDS)
def test_names_what_does_not_fit_the_ranks(
    ranks: int, overrides: list[str], field: str, wrong: str, remedy: str
) -> None:
    run = load_run(None, TINY + overrides)
    with pytest.raises(ConfigError) as caught:
        run.check_world(ranks)
    messages = dict(caught.value.problems)
    assert wrong in messages[field]
    assert remedy in messages[field]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, []),
        (4, []),
        (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]),
        (3, ["parallel.tensor_parallel_size=3", "data.sequence_length=255"]),  # 4 heads over 3 ranks: padded to 6
        (4, ["parallel.tensor_parallel_size=4", "model.num_attention_heads=5", "model.hidden_size=160"]),
        (4, ["parallel.context_parallel_size=4"]),
        (4, ["parallel.tensor_parallel_size=4", "model.num_key_value_heads=2"]),  # two ranks attend with dummies alone
        (
            4,
            [
                "model=qwen3_5_0.8b",
                "parallel.tensor_parallel_size=4",
                "train.dtype=bf16",
                "precision={fp8_recipe: tensorwise, fp8_param_gather: true}",
            ],
        ),
        (8, ["parallel={tensor_parallel_size: 2, pipeline_parallel_size: 2, context_parallel_size: 2}"]),
        (8, ["parallel.context_parallel_size=8", "model.layer_pattern=G*8"]),  # no attention, no limit of heads
        (4, OVERLAP),
        (4, [*OVERLAP, "parallel.recompute_granularity=full", *VPP]),
        (2, [*VPP, "train.global_batch_size=4"]),
        (2, [*VPP, RAMP % (4, 4)]),
        (2, ["parallel={pipeline_parallel_size: 2, pipeline_split: [1, 7]}"]),
        (1, ["train.schedule={decay_steps: 1000}"]),  # the first part of a longer schedule
        (1, ["model={base_preset: olmo_hybrid_tiny, layer_pattern: A*2, gdn: null}"]),
        (1, ["model.sliding_window=256", "model.layer_pattern=WA"]),
        (2, ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=false", "data.sequence_length=255"]),
        (2, [*ZERO, "parallel.tensor_parallel_size=2", "zero={stage: 3, offload_parameters: cpu}"]),
        (
            2,
            [
                "train.optimizer.offload_fraction=0.8",
                "parallel={overlap_grad_reduce: true, overlap_param_gather: true}",
            ],
        ),
        (1, [*ZERO, "zero={stage: 3, offload_optimizer: cpu, offload_parameters: cpu, nvme_path: null}"]),
    ],
)
def test_legal_runs_are_taken(ranks: int, overrides: list[str]) -> None:
    load_run(None, TINY + overrides).check_world(ranks)
