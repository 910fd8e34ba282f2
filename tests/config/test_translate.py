"""Wrong values of single fields: names, types, choices and bounds. Each error names its field and the remedy, and nothing else."""

import random

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.translate import field_paths
from tests.config.wrong_runs import TINY, Case, assert_named, each

WRONG: list[Case] = [
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
    (["data={train: [{path: a}], validation: [{path: b}]}"], "data.sequence_length", "is missing", "Tokens per sample"),
    (["data.train=[{weight: 1.0}]"], "data.train.0.path", "is missing", "give the prefix or the shards of a dataset"),
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
    (["data.train=[data/train]"], "data.train.0", "is not a section", "its fields are path, generator, weight, dtype"),
    (["train.optimizer.betas=[0.9]"], "train.optimizer.betas", "too few entries", "give 2, such as [0.9, 0.95]"),
    (["train.optimizer.betas=[0.9, 0.9, 0.9]"], "train.optimizer.betas", "2 are wanted", "[0.9, 0.95]"),
    # choices
    (["train.schedule.kind=cosin"], "train.schedule.kind", "one of cosine, linear, wsd, wsd_s, constant, phases", "nearest is cosine"),
    (["train.dtype=bfloat16"], "train.dtype", "is not one of fp32, bf16", "the nearest is bf16"),
    (["train.dtype=float32"], "train.dtype", "'float32' is not one of", "the nearest is fp32"),
    (
        ["parallel.recompute_granularity=selectiv"],
        "parallel.recompute_granularity",
        "not one of none, selective",
        "nearest is selective",
    ),
    (
        ["parallel.recompute_granularity=null"],
        "parallel.recompute_granularity",
        "null is not one of",
        "the nearest is none",
    ),
    (["data.train.0.dtype=int16"], "data.train.0.dtype", "is not one of uint16, uint32, or null", "nearest is uint16"),
    (["model.gdn.conv_kernel_size=3"], "model.gdn.conv_kernel_size", "3 is not one of 4", "the nearest is 4"),
    (["train.optimizer.no_decay=[embedings]"], "train.optimizer.no_decay.0", "not one of", "nearest is embedding"),
    (["model.base_preset=olmo_hybrid_7"], "model.base_preset", "is not one of", "the nearest is olmo_hybrid_7b"),
    (["model=pure_gdn"], "model.of", "is missing", "{base_preset: pure_gdn, of: olmo_hybrid_7b}"),
    (["model={base_preset: pure_gdn, of: olmo_hybrid_7}"], "model.of", "with a size", "is olmo_hybrid_7b"),
    (["model={base_preset: olmo3_7b, of: olmo_hybrid_7b}"], "model.of", "olmo3_7b has its own size", "remove it"),
    (["model.of=olmo3_7b"], "model.of", "is for pure_gdn and pure_attention", "remove it"),
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
]


@each(WRONG)
def test_names_field_and_remedy(overrides: list[str], field: str, wrong: str, remedy: str) -> None:
    assert_named(overrides, field, wrong, remedy)


def test_every_wrong_field_is_listed() -> None:
    wrong = ["train.steps=0", "train.dtype=fp8", "model.hidden_size=x", "data.train.0.pth=a", "loging.interval=1"]
    with pytest.raises(ConfigError) as caught:
        load_run(None, TINY + wrong)
    fields = {field for field, _ in caught.value.problems}
    assert fields == {"train.steps", "train.dtype", "model.hidden_size", "data.train.0.pth", "loging"}
    assert len(str(caught.value).splitlines()) == 5


def test_whatever_is_written_gives_a_run_or_a_remedy() -> None:
    values = ["0", "1", "-1", "3", "256", "99999999999999999999", "1e9", "1e-5", ".nan", ".inf", "true", "null", "abc"]
    values += ["[1, 2]", "[]", "{}", "{a: 1}", "[[1]]", "[null]", "[0.5, 0.5]", "WA", "olmo3_7b", "pure_gdn", "''"]
    paths = [*field_paths(RunConfig), "data.train.0", "data.train.0.path", "model.base_preset", "model.of", "x"]
    draw = random.Random(0)
    for _ in range(400):
        overrides = [f"{draw.choice(paths)}={draw.choice(values)}" for _ in range(draw.randint(1, 3))]
        try:
            describe(load_run(None, TINY + overrides), draw.randint(1, 8))
        except ConfigError as error:
            assert all(field and "; " in message for field, message in error.problems), (overrides, str(error))
