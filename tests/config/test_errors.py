"""Wrong configurations: each must name its field and the remedy, and nothing else."""

import pickle
import random

import pytest
from pydantic import ValidationError

from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.errors import ConfigError, field_paths, no_traceback
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.run import RunConfig

TINY = [
    "run_dir=runs/x", "model=olmo_hybrid_tiny", "data.train=[{path: data/train}]", "data.validation=[{path: data/val}]",
    "data.sequence_length=256", "train.steps=100", "train.global_batch_size=8", "train.micro_batch_size=2",
]  # fmt: skip
"""A legal run."""

ZERO = ["train.engine=deepspeed"]
OVERLAP = ["parallel.tp_comm_overlap=true", "parallel.tensor_parallel_size=2"]
VPP = ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=2"]
RAMP = "train.batch_ramp={start: %d, increment: %d, samples: 1000}"

# overrides of TINY, the field named, what the message must hold: what is wrong, and the remedy
WRONG: list[tuple[list[str], str, str, str]] = [
    # fields that do not exist, or do not stand there
    (["trian.steps=5"], "trian", "no such field", "did you mean train?"),
    (["train.stesp=5"], "train.stesp", "no such field", "did you mean steps?"),
    (["train.optimizer.learning_rate=1"], "train.optimizer.learning_rate", "no such field", "train.optimizer.lr"),
    (["train.tensor_parallel_size=2"], "train.tensor_parallel_size", "no such", "parallel.tensor_parallel_size"),
    (["train.lr=1e-3"], "train.lr", "no such field", "did you mean train.optimizer.lr?"),
    (["data.seq_length=128"], "data.seq_length", "no such field", "did you mean sequence_length?"),
    (["model.num_layers=8"], "model.num_layers", "no such field", "did you mean model.layer_pattern?"),
    (["logging.qqq=1"], "logging.qqq", "no such field", "the fields here are interval, tensorboard"),
    (["data.train.0.wieght=2"], "data.train.0.wieght", "no such field", "did you mean weight?"),
    # missing
    (["run_dir=null"], "run_dir", "null is not text", "Folder of everything the run writes"),
    (["train=null"], "train", "null is not a section", "its fields are steps, global_batch_size"),
    (["data={train: [{path: a}], validation: [{path: b}]}"], "data.sequence_length", "is missing", "Tokens a sample"),
    (["data.train=[{weight: 1.0}]"], "data.train.0.path", "is missing", "A megatron-core prefix"),
    (["data.train=[]"], "data.train", "has 0 entries", "give at least 1"),
    # of another type
    (["train.steps=1.5"], "train.steps", "1.5 is not a whole number", "the nearest is 2"),
    (["train.steps=1e2"], "train.steps", "100.0 is not a whole number", "write 100"),
    (["train.steps='\"12\"'"], "train.steps", "is not a whole number", "give one"),
    (['train.steps="12"'], "train.steps", "'12' is not a whole number", "write 12 without quotes"),
    (["train.steps=true"], "train.steps", "true is not a whole number", "give one"),
    (['train.optimizer.lr="3e-4"'], "train.optimizer.lr", "is not a number", "write 3e-4 without quotes"),
    (["train.optimizer.lr=fast"], "train.optimizer.lr", "'fast' is not a number", "such as 0.0003 (the default)"),
    (["model.tie_embeddings=yes"], "model.tie_embeddings", "'yes' is not true or false", "write true"),
    (["checkpoint.async_save=0"], "checkpoint.async_save", "0 is not true or false", "write false"),
    (["run_dir=2024"], "run_dir", "2024 is not text", 'write "2024", in quotes'),
    (['run_dir=""'], "run_dir", "is empty", "give it: Folder"),
    (["data.train=data/train"], "data.train", "is not a list", "write [data/train]"),
    (["data.train=[data/train]"], "data.train.0", "is not a section", "its fields are path, weight, dtype"),
    (["train.optimizer.betas=[0.9]"], "train.optimizer.betas", "too few entries", "give 2, such as [0.9, 0.95]"),
    (["train.optimizer.betas=[0.9, 0.9, 0.9]"], "train.optimizer.betas", "2 are wanted", "[0.9, 0.95]"),
    # choices
    (["train.schedule.kind=cosin"], "train.schedule.kind", "one of cosine, linear, wsd, constant", "nearest is cosine"),
    (["train.dtype=bfloat16"], "train.dtype", "is not one of fp32, bf16", "the nearest is bf16"),
    (["train.dtype=float32"], "train.dtype", "'float32' is not one of", "the nearest is fp32"),
    (["parallel.recompute=selectiv"], "parallel.recompute", "not one of none, selective", "nearest is selective"),
    (["parallel.recompute=null"], "parallel.recompute", "null is not one of", "the nearest is none"),
    (["data.train.0.dtype=int16"], "data.train.0.dtype", "is not one of uint16, uint32, or null", "nearest is uint16"),
    (["model.gdn.conv_kernel_size=3"], "model.gdn.conv_kernel_size", "3 is not one of 4", "the nearest is 4"),
    (["train.optimizer.no_decay=[embedings]"], "train.optimizer.no_decay.0", "not one of", "nearest is embedding"),
    (["model.preset=olmo_hybrid_7"], "model.preset", "is not one of", "the nearest is olmo_hybrid_7b"),
    (["model=pure_gdn"], "model.of", "is missing", "{preset: pure_gdn, of: olmo_hybrid_7b}"),
    (["model={preset: pure_gdn, of: olmo_hybrid_7}"], "model.of", "with a size", "is olmo_hybrid_7b"),
    (["model={preset: olmo3_7b, of: olmo_hybrid_7b}"], "model.of", "olmo3_7b has its own size", "remove it"),
    (["model.of=olmo3_7b"], "model.of", "is for pure_gdn and pure_attention", "remove it"),
    # precision
    (["precision.linear=fp8_delayd"], "precision.linear", "not one of", "nearest is fp8_delayed"),
    (["precision.linear=fp8_tensorwise", "train.dtype=fp32"], "precision.linear", "needs train.dtype bf16", "to null"),
    (["precision={linear: fp8_delayed, parts: local}"], "precision.linear", "Transformer Engine's", "parts to auto"),
    (["precision.attention=fp8"], "precision.attention", "needs FP8 linears", "linear to fp8_tensorwise"),
    (["precision.fp8_parameters=true"], "precision.fp8_parameters", "needs FP8 linears", "linear to fp8_tensorwise"),
    (
        ["precision={linear: fp8_tensorwise, fp8_parameters: true, cache_weights: false}"],
        "precision.cache_weights",
        "no weight is ever cast",
        "set it to true",
    ),
    (
        ["precision={linear: fp8_tensorwise, fp8_parameters: true}", "parallel.distributed_optimizer=false"],
        "precision.fp8_parameters",
        "needs parallel.distributed_optimizer",
        "set that to true",
    ),
    (
        ["precision={linear: fp8_tensorwise, attention: fp8}"],
        "precision.attention",
        "needs model.head_dim = 128",
        "set it to null",
    ),
    (
        ["precision={linear: fp8_tensorwise, attention: fp8}", "model.head_dim=128", "model.layer_pattern=GGG"],
        "precision.attention",
        "neither A nor W",
        "set it to null",
    ),
    (
        ["precision={linear: fp8_delayed, bf16_layers_at_start: 1}"],
        "precision.bf16_layers_at_start",
        "no meaning with linear = fp8_delayed",
        "fp8_tensorwise",
    ),
    (
        ["precision={linear: fp8_blockwise, bf16_layers_at_start: 4, bf16_layers_at_end: 4}"],
        "precision.bf16_layers_at_start",
        "8 of 8 layers are in bf16",
        "lower them",
    ),
    (
        ["precision.linear=fp8_tensorwise", "model.ffn_hidden_size=392"],
        "model.ffn_hidden_size",
        "392 is not a multiple of 16",
        "nearest is 384",
    ),
    (
        ["precision.linear=fp8_tensorwise", "model.hidden_size=136", "model.head_dim=32"],
        "model.hidden_size",
        "136 is not a multiple of 16",
        "nearest is 128",
    ),
    (
        ["precision.linear=fp8_tensorwise", "model.gdn.value_head_dim=50"],
        "model.gdn.value_head_dim",
        "200 wide",
        "always fits is 64",
    ),
    (
        ["precision.linear=fp8_tensorwise", "data.sequence_length=100", "train.micro_batch_size=1"],
        "data.sequence_length",
        "multiples of 16",
        "nearest is 96",
    ),
    # engines
    (["train.engine=deepspeeds"], "train.engine", "not one of megatron, deepspeed", "nearest is deepspeed"),
    (["zero.stage=3"], "zero.stage", "3 has no meaning with train.engine = megatron", "set that to deepspeed"),
    ([*ZERO, "zero.stage=4"], "zero.stage", "4 is not one of 1, 2, 3", "the nearest is"),
    ([*ZERO, "zero.offload_optimizer=disk"], "zero.offload_optimizer", "not one of none, cpu, nvme", "the nearest is"),
    (
        [*ZERO, "zero={stage: 3, offload_parameters: nvme}"],
        "zero.offload_parameters",
        "not one of none, cpu",
        "the nearest",
    ),
    ([*ZERO, "zero.offload_parameters=cpu"], "zero.offload_parameters", "set stage to 3", "or set it to none"),
    (
        [*ZERO, "zero={offload_optimizer: nvme, nvme_path: /nvme}"],
        "zero.offload_optimizer",
        "needs stage 3, and it is 2",
        "or this to cpu",
    ),
    ([*ZERO, "zero={stage: 3, offload_optimizer: nvme}"], "zero.nvme_path", "is missing", "or offload to cpu"),
    ([*ZERO, "zero.nvme_path=/nvme"], "zero.nvme_path", "is not used", "set it to null"),
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
        "cannot run with train.engine = deepspeed: its ZeRO reduces and shares out",
        "set it to 1, or train.engine to megatron",
    ),
    ([*ZERO, "parallel.overlap_grad_reduce=true"], "parallel.overlap_grad_reduce", "is for train.engine", "zero.stage"),
    ([*ZERO, "parallel.distributed_optimizer=false"], "parallel.distributed_optimizer", "false is for", "leave it out"),
    ([*ZERO, "precision.linear=fp8_tensorwise"], "precision.linear", "fp32 gradient buffers", "this to null"),
    # bounds
    (["train.steps=0"], "train.steps", "0 must be greater than 0", "the nearest is 1"),
    (["model.hidden_size=-128"], "model.hidden_size", "-128 must be", "the nearest is 1"),
    (["data.num_workers=-1"], "data.num_workers", "-1 must be at least 0", "the nearest is 0"),
    (["train.schedule.min_lr_ratio=1.5"], "train.schedule.min_lr_ratio", "must be at most 1", "the nearest is 1"),
    (["train.skip_step.window=1"], "train.skip_step.window", "1 must be at least 2", "the nearest is 2"),
    (["train.optimizer.lr=0"], "train.optimizer.lr", "must be greater than 0", "such as 0.0003"),
    (["model.rope_theta=0"], "model.rope_theta", "must be greater than 0", "or null"),
    (["train.optimizer.lr=.nan"], "train.optimizer.lr", "nan is not a finite number", "such as 0.0003"),
    (["train.optimizer.clip_grad=.inf"], "train.optimizer.clip_grad", "inf is not a finite number", "such as 1.0"),
    (["data.train.0.weight=-.inf"], "data.train.0.weight", "-inf is not a finite number", "such as 1.0"),
    (["logging.peak_tflops=-1"], "logging.peak_tflops", "must be greater than 0", "or null"),
    (["train.optimizer.betas=[0.9, 1.0]"], "train.optimizer.betas", "at least 0 and below 1", "give [0.9, 0.999]"),
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
    (["data.train.0.path=data/train.bin"], "data.train.0.path", "one of a pair", "give their prefix, data/train"),
    (["data.train.0.dtype=uint16"], "data.train.0.dtype", "is for raw .npy shards", "leave it out"),
    (
        ["data.train=[{path: a.npy, dtype: uint16}]", "model.vocab_size=100352"],
        "data.train.0.dtype",
        "does not hold model.vocab_size = 100352",
        "the nearest is uint32",
    ),
    (
        ["model={preset: olmo3_7b, layer_pattern: WA}"],
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
    # layout
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
        [*OVERLAP, "precision.parts=local"],
        "parallel.tp_comm_overlap",
        "Transformer Engine's",
        "precision.parts to auto",
    ),
    (
        [*OVERLAP, "parallel.tensor_parallel_size=16"],
        "parallel.tp_comm_overlap",
        "at most 8 GPUs of one node, and tensor_parallel_size is 16",
        "set that to 8",
    ),
    (
        [*OVERLAP, "precision.linear=fp8_blockwise", "model.gdn.value_head_dim=64"],
        "parallel.tp_comm_overlap",
        "cannot exchange fp8_blockwise",
        "fp8_tensorwise, or this to false",
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
        ["parallel.tensor_parallel_size=4", "model.num_key_value_heads=2"],
        "parallel.tensor_parallel_size",
        "exceeds the 2 key/value heads (model.num_key_value_heads)",
        "that fits is 2",
    ),
    (
        ["parallel.tensor_parallel_size=4", "model.gdn.num_key_heads=2"],
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
]


@pytest.mark.parametrize(
    ("overrides", "field", "wrong", "remedy"), WRONG, ids=[f"{i}-{case[1]}" for i, case in enumerate(WRONG)]
)
def test_names_field_and_remedy(overrides: list[str], field: str, wrong: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(None, TINY + overrides)
    assert [named for named, _ in caught.value.problems] == [field]
    line = str(caught.value)
    assert line.startswith(f"{field}: ") and "\n" not in line and len(line) < 400
    what, _, says = line.partition("; ")
    assert wrong in what or wrong in line
    assert remedy in says or remedy in line


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
        (4, OVERLAP),
        (4, [*OVERLAP, "parallel.recompute=full", *VPP]),
        (2, [*VPP, "train.global_batch_size=4"]),
        (2, [*VPP, RAMP % (4, 4)]),
        (2, ["parallel={pipeline_parallel_size: 2, pipeline_split: [1, 7]}"]),
        (1, ["train.schedule={decay_steps: 1000}"]),  # the first part of a longer schedule
        (1, ["model={preset: olmo_hybrid_tiny, layer_pattern: A*2, gdn: null}"]),
        (1, ["model.sliding_window=256", "model.layer_pattern=WA"]),
        (2, ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=false", "data.sequence_length=255"]),
        (2, [*ZERO, "parallel.tensor_parallel_size=2", "zero={stage: 3, offload_parameters: cpu}"]),
        (1, [*ZERO, "zero={stage: 3, offload_optimizer: nvme, offload_parameters: cpu, nvme_path: /nvme}"]),
    ],
)
def test_legal_runs_are_taken(ranks: int, overrides: list[str]) -> None:
    load_run(None, TINY + overrides).check_world(ranks)


def test_every_wrong_field_is_listed() -> None:
    wrong = ["train.steps=0", "train.dtype=fp8", "model.hidden_size=x", "data.train.0.pth=a", "loging.interval=1"]
    with pytest.raises(ConfigError) as caught:
        load_run(None, TINY + wrong)
    fields = {field for field, _ in caught.value.problems}
    assert fields == {"train.steps", "train.dtype", "model.hidden_size", "data.train.0.pth", "loging"}
    assert len(str(caught.value).splitlines()) == 5


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


def test_whatever_is_written_gives_a_run_or_a_remedy() -> None:
    values = ["0", "1", "-1", "3", "256", "99999999999999999999", "1e9", "1e-5", ".nan", ".inf", "true", "null", "abc"]
    values += ["[1, 2]", "[]", "{}", "{a: 1}", "[[1]]", "[null]", "[0.5, 0.5]", "WA", "olmo3_7b", "pure_gdn", "''"]
    paths = [*field_paths(RunConfig), "data.train.0", "data.train.0.path", "model.preset", "model.of", "x"]
    draw = random.Random(0)
    for _ in range(400):
        overrides = [f"{draw.choice(paths)}={draw.choice(values)}" for _ in range(draw.randint(1, 3))]
        try:
            describe(load_run(None, TINY + overrides), draw.randint(1, 8))
        except ConfigError as error:
            assert all(field and "; " in message for field, message in error.problems), (overrides, str(error))
