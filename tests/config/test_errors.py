"""Wrong precision, engines, models, data and schedules: each error names its field and the remedy, and nothing else."""

import pickle

import pytest
from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import ConfigError, no_traceback
from megatron_hybrid.config.load import load_run
from tests.config.wrong_runs import RAMP, TINY, ZERO, Case, assert_named, each

WRONG: list[Case] = [
    # precision
    (["precision.fp8_recipe=delayd"], "precision.fp8_recipe", "not one of", "nearest is delayed"),
    (
        ["precision.fp8_recipe=tensorwise", "train.dtype=fp32"],
        "precision.fp8_recipe",
        "needs train.dtype bf16",
        "to null",
    ),
    (
        ["precision.fp8_recipe=delayed", "model.backend=local"],
        "precision.fp8_recipe",
        "needs Transformer Engine",
        "model.backend to auto",
    ),
    (["precision.fp8_attention=true"], "precision.fp8_attention", "needs FP8 GEMMs", "fp8_recipe to tensorwise"),
    (["precision.fp8_param_gather=true"], "precision.fp8_param_gather", "needs FP8 GEMMs", "fp8_recipe to tensorwise"),
    (
        ["precision={fp8_recipe: tensorwise, fp8_param_gather: true, cache_fp8_weights: false}"],
        "precision.cache_fp8_weights",
        "no weight is cast",
        "set it to true",
    ),
    (
        ["precision={fp8_recipe: tensorwise, fp8_param_gather: true}", "parallel.distributed_optimizer=false"],
        "precision.fp8_param_gather",
        "needs parallel.distributed_optimizer",
        "set that to true",
    ),
    (
        ["precision={fp8_recipe: tensorwise, fp8_attention: true}"],
        "precision.fp8_attention",
        "needs model.head_dim = 128",
        "set it to false",
    ),
    (
        ["precision={fp8_recipe: tensorwise, fp8_attention: true}", "model.head_dim=128", "model.layer_pattern=GGG"],
        "precision.fp8_attention",
        "neither A nor W",
        "set it to false",
    ),
    (
        ["precision={fp8_recipe: delayed, num_layers_at_start_in_bf16: 1}"],
        "precision.num_layers_at_start_in_bf16",
        "no meaning with fp8_recipe = delayed",
        "to tensorwise",
    ),
    (
        ["precision={fp8_recipe: blockwise, num_layers_at_start_in_bf16: 4, num_layers_at_end_in_bf16: 4}"],
        "precision.num_layers_at_start_in_bf16",
        "8 of 8 layers are in bf16",
        "lower them",
    ),
    (
        ["precision.fp8_recipe=tensorwise", "model.ffn_hidden_size=392"],
        "model.ffn_hidden_size",
        "392 is not a multiple of 16",
        "nearest is 384",
    ),
    (
        ["precision.fp8_recipe=tensorwise", "model.hidden_size=136", "model.head_dim=32"],
        "model.hidden_size",
        "136 is not a multiple of 16",
        "nearest is 128",
    ),
    (
        ["precision.fp8_recipe=tensorwise", "model.gdn.value_head_dim=50"],
        "model.gdn.value_head_dim",
        "200 wide",
        "always fits is 64",
    ),
    (
        ["precision.fp8_recipe=tensorwise", "data.sequence_length=100", "train.micro_batch_size=1"],
        "data.sequence_length",
        "multiple of 16",
        "nearest is 96",
    ),
    # engines
    (["train.engine=deepspeeds"], "train.engine", "not one of megatron, deepspeed", "nearest is deepspeed"),
    (["zero.stage=3"], "zero.stage", "3 has no meaning with train.engine = megatron", "set that to deepspeed"),
    ([*ZERO, "zero.stage=4"], "zero.stage", "4 is not one of 1, 2, 3", "the nearest is"),
    ([*ZERO, "zero.offload_optimizer=disk"], "zero.offload_optimizer", "not one of none, cpu", "the nearest is"),
    (
        [*ZERO, "zero={stage: 3, offload_parameters: nvme}"],
        "zero.offload_parameters",
        "not one of none, cpu",
        "the nearest",
    ),
    ([*ZERO, "zero.offload_parameters=cpu"], "zero.offload_parameters", "set stage to 3", "or this to none"),
    (
        [*ZERO, "zero={stage: 3, offload_optimizer: nvme, nvme_path: /nvme}"],
        "zero.offload_optimizer",
        "nvme is no longer supported",
        "set it to cpu",
    ),
    ([*ZERO, "zero.nvme_path=/nvme"], "zero.nvme_path", "is no longer supported", "leave it out"),
    (
        [*ZERO, "zero={offload_optimizer: cpu, offload_fraction: 0.5}"],
        "zero.offload_fraction",
        "0.5 needs stage 3 and offload_optimizer cpu",
        "this to 1.0",
    ),
    ([*ZERO, "zero.offload_fraction=0"], "zero.offload_fraction", "must be greater than 0", "such as 1.0"),
    (
        [*ZERO, "parallel.pipeline_parallel_size=2"],
        "parallel.pipeline_parallel_size",
        "cannot run with train.engine = deepspeed: its ZeRO reduces and shards",
        "set it to 1, or train.engine to megatron",
    ),
    ([*ZERO, "parallel.overlap_grad_reduce=true"], "parallel.overlap_grad_reduce", "is for train.engine", "zero.stage"),
    ([*ZERO, "parallel.distributed_optimizer=false"], "parallel.distributed_optimizer", "false is for", "leave it out"),
    ([*ZERO, "precision.fp8_recipe=tensorwise"], "precision.fp8_recipe", "fp32 gradient buffers", "this to null"),
    (["train.optimizer.offload_fraction=1.5"], "train.optimizer.offload_fraction", "at most 1", "the nearest is 1"),
    (
        [*ZERO, "train.optimizer.offload_fraction=0.5"],
        "train.optimizer.offload_fraction",
        "0.5 is for train.engine = megatron",
        "zero.offload_optimizer to cpu",
    ),
    (
        ["train.optimizer.offload_fraction=0.5", "parallel.distributed_optimizer=false"],
        "train.optimizer.offload_fraction",
        "0.5 needs parallel.distributed_optimizer",
        "set that to true",
    ),
    (
        ["train.optimizer.offload_fraction=1", "precision={fp8_recipe: tensorwise, fp8_param_gather: true}"],
        "train.optimizer.offload_fraction",
        "1 cannot keep masters of weights held in FP8",
        "precision.fp8_param_gather to false",
    ),
    # the model
    (["model.layer_pattern=GGGX*2"], "model.layer_pattern", "'GGGX*2' is not a group of layers", "as in GGGA*8"),
    (["model.layer_pattern=ggga*2"], "model.layer_pattern", "'ggga*2' is not a group", "did you mean GGGA*2?"),
    (["model.layer_pattern=GGGA*0"], "model.layer_pattern", "is not a group of layers", "optionally *n"),
    (["model.layer_pattern=GGGA,"], "model.layer_pattern", "'' is not a group of layers", "GGGA*7,GGA"),
    (["model.layer_pattern=GGGA*999999999"], "model.layer_pattern", "more than 4096 layers", "nearest is GGGA*1024"),
    (["model.layer_pattern=GGGA*" + "9" * 4000], "model.layer_pattern", "more than 4096 layers", "GGGA*1024"),
    (["model.layer_pattern=A*4000,A*100"], "model.layer_pattern", "more than 4096 layers", "the nearest is A*96"),
    (["model.layer_pattern=WWWA*2"], "model.sliding_window", "is missing", "such as 4096"),
    (["model.gdn=null"], "model.gdn", "is missing", "give gdn.num_key_heads, num_value_heads"),
    (["model.gdn.num_value_heads=6"], "model.gdn.num_value_heads", "multiple of num_key_heads = 4", "nearest is 4"),
    (["model.gdn.num_value_heads=2"], "model.gdn.num_value_heads", "multiple of num_key_heads = 4", "nearest is 4"),
    (["model.gdn.a_init_range=[4, 1]"], "model.gdn.a_init_range", "0 <= low < high", "as in [0.0, 16.0]"),
    (["model.gdn.dt_init_floor=1"], "model.gdn.dt_init_floor", "above all of dt_init_range", "give at most 0.1"),
    (["model.num_key_value_heads=3"], "model.num_key_value_heads", "does not divide", "the nearest is 2"),
    (["model.num_key_value_heads=8"], "model.num_key_value_heads", "does not divide", "the nearest is 4"),
    (["model.hidden_size=130"], "model.hidden_size", "not a multiple of num_attention_heads = 4", "nearest is 128"),
    (["model.head_dim=31"], "model.head_dim", "31 is odd", "the nearest is 32, or set rope_theta to null"),
    (["model.eos_token_id=257"], "model.eos_token_id", "outside the vocabulary", "vocab_size - 1 = 256"),
    (["model.pad_token_id=-1"], "model.pad_token_id", "at least 0", "the nearest is 0, or null"),
    # data
    (["data.train.0.path=data/train.bin"], "data.train.0.path", "one file of a pair", "give their prefix, data/train"),
    (["data.train.0.dtype=uint16"], "data.train.0.dtype", "is for raw .npy shards", "leave it out"),
    (
        ["data.train=[{path: a.npy, dtype: uint16}]", "model.vocab_size=100352"],
        "data.train.0.dtype",
        "does not hold model.vocab_size = 100352",
        "the nearest is uint32",
    ),
    (
        ["model={base_preset: olmo3_7b, layer_pattern: WA}"],
        "model.sliding_window",
        "4096 exceeds data.sequence_length = 256",
        "give at most 256",
    ),
    (["data.validation=[]", "train.eval_interval=5"], "train.eval_interval", "nothing to evaluate", "data.validation"),
    # schedule, ramp, checkpoints
    (["train.schedule.warmup_steps=100"], "train.schedule.warmup_steps", "below train.steps = 100", "at most 99"),
    (
        ["train.schedule={warmup_steps: 10, decay_steps: 10}"],
        "train.schedule.decay_steps",
        "not after warmup_steps = 10",
        "give at least 11, or null",
    ),
    (
        ["train.schedule={kind: wsd, warmup_steps: 10, decay_steps: 95}"],
        "train.schedule.decay_steps",
        "do not fit into train.steps = 100",
        "give at most 90",
    ),
    (
        ["train.schedule={kind: constant, decay_steps: 5}"],
        "train.schedule.decay_steps",
        "no meaning for a constant",
        "set it to null",
    ),
    ([RAMP % (16, 2)], "train.batch_ramp.start", "exceeds train.global_batch_size = 8", "give at most 8"),
    ([RAMP % (2, 4)], "train.batch_ramp.increment", "does not divide train.global_batch_size - start = 6", "is 3"),
    (
        ["train.batch_ramp={start: 2, increment: 2, samples: 2}"],
        "train.batch_ramp.samples",
        "below the number of increments",
        "at least 3",
    ),
    (["checkpoint.keep_every=1500"], "checkpoint.keep_every", "multiple of checkpoint.interval = 1000", "is 1000"),
    (["checkpoint={interval: null, keep_every: 10}"], "checkpoint.keep_every", "nothing to keep", "set it to null"),
]


@each(WRONG)
def test_names_field_and_remedy(overrides: list[str], field: str, wrong: str, remedy: str) -> None:
    assert_named(overrides, field, wrong, remedy)


def test_several_problems_of_one_section_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*TINY, "model.layer_pattern=GXA", "model.num_key_value_heads=3", "model.eos_token_id=300"])
    assert [f for f, _ in caught.value.problems] == [
        "model.layer_pattern", "model.num_key_value_heads", "model.eos_token_id",
    ]  # fmt: skip


def test_tool_ends_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, no_traceback():
        load_run(None, [*TINY, "train.steps=0"])
    assert caught.value.code == 78
    assert ": train.steps: 0 must be" in capsys.readouterr().err


def test_sections_made_in_python_are_checked_too() -> None:
    with pytest.raises(ValidationError, match=r"num_key_value_heads: 3 does not divide"):
        ModelConfig(
            layer_pattern="A", hidden_size=64, ffn_hidden_size=64, vocab_size=8, num_attention_heads=4,
            num_key_value_heads=3,
        )  # fmt: skip


def test_errors_survive_pickling() -> None:
    error = ConfigError(("a", "b"), ("c", "d"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a: b\nc: d"
