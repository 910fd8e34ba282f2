"""Checks of generators and of the curriculum against the rest of a run."""

from collections.abc import Sequence

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import Problems, join
from megatron_hybrid.base.nearest import multiple
from megatron_hybrid.config.data import CurriculumStageConfig, DataConfig, SourceConfig
from megatron_hybrid.config.generators import LENGTH_MULTIPLE, SampleGenerator, sample_length
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.train import TrainConfig


def check_generators(
    model: ModelConfig, data: DataConfig, train: TrainConfig, parallel: ParallelConfig, problems: Problems
) -> None:
    """Check that generated samples fit the model, the sequence length and the layout."""
    _check_curriculum(data, train, problems)
    found = {field: s.generator for field, s in data.sources().items() if s.generator is not None}
    if not found:
        return
    _check_unmixed(data, problems)
    _check_options(data, train, parallel, problems)
    for field, generator in found.items():
        words, stages = len(generator.vocabulary), data.curriculum if field.startswith("data.train") else ()
        if words > model.vocab_size:
            text = (
                f"{model.vocab_size} is less than the {words} tokens of {field}.generator; set it to at least {words}"
            )
            problems.add("model.vocab_size", text)
        if not stages:
            _check_size(join(field, "generator.size"), generator, generator.size, data, problems)
        for number, stage in enumerate(stages):
            _check_size(join("data.curriculum", number, "size"), generator, stage.size, data, problems)


def _check_size(field: str, generator: SampleGenerator, size: int, data: DataConfig, problems: Problems) -> None:
    if (problem := generator.size_problem(size)) is not None:
        problems.add(field, f"{size} {problem}")
    elif (length := sample_length([generator], size)) > data.sequence_length:
        text = f"{data.sequence_length} is shorter than the samples of {field} = {size}; set it to at least {length}"
        problems.add("data.sequence_length", text)


def _check_unmixed(data: DataConfig, problems: Problems) -> None:
    def check(field: str, sources: Sequence[SourceConfig]) -> None:
        if len({source.generator is None for source in sources}) > 1:
            problems.add(field, "has both files and generators; give sources of one kind")

    check("data.train", data.train)
    for name, sources in data.validation.items():
        check(join("data.validation", name), sources)


def _check_options(data: DataConfig, train: TrainConfig, parallel: ParallelConfig, problems: Problems) -> None:
    """Check the options that do not go with generated samples."""
    if data.documents != "keep":
        problems.add(
            "data.documents", f"{data.documents} is for files, and generators have no documents; set it to keep"
        )
    if data.instance_filter is not None:
        problems.add("data.instance_filter", "is for files, and the data is generated; set it to null")
    if train.sequence_ramp is not None:
        problems.add("train.sequence_ramp", "would cut generated samples; set it to null, and use data.curriculum")
    if train.eval_interval is not None and train.eval_batches is None:
        problems.add("train.eval_batches", "null would evaluate on a generator without end; give a number")
    ranks = parallel.tensor_parallel_size * parallel.context_parallel_size
    if LENGTH_MULTIPLE % ranks:
        problems.add(
            "parallel.context_parallel_size",
            f"with tensor_parallel_size it makes {ranks} slices, which do not divide generated samples, multiples of "
            f"{LENGTH_MULTIPLE} tokens; give powers of two",
        )
    if parallel.tp_comm_overlap:
        problems.add(
            "parallel.tp_comm_overlap", "needs sequences of one length, and generated ones vary; set it to false"
        )


def _check_curriculum(data: DataConfig, train: TrainConfig, problems: Problems) -> None:
    if not data.curriculum:
        return
    if not any(source.generator for source in data.train):
        problems.add("data.curriculum", "is for generators, and data.train has none; set it to []")
    if train.batch_ramp is not None:
        problems.add("train.batch_ramp", "does not go with data.curriculum; set one of them to null")
    for number, stage in enumerate(data.curriculum):
        _check_stage(join("data.curriculum", number), stage, number == len(data.curriculum) - 1, data, train, problems)


def _check_stage(
    field: str, stage: CurriculumStageConfig, last: bool, data: DataConfig, train: TrainConfig, problems: Problems
) -> None:
    if last != (stage.samples is None):
        remedy = "the last stage has no end; leave it out" if last else "is missing; only the last stage has none"
        problems.add(join(field, "samples"), remedy)
    elif stage.samples is not None and stage.samples % train.global_batch_size:
        best = multiple(stage.samples, train.global_batch_size)
        text = f"{stage.samples} is not a multiple of train.global_batch_size = {train.global_batch_size}; the nearest is {best}"
        problems.add(join(field, "samples"), text)
    if stage.validation is None:
        return
    if stage.validation not in data.validation:
        text = f"{stage.validation} is not one of {', '.join(data.validation) or 'data.validation, which is empty'}"
        problems.add(join(field, "validation"), f"{text}; name a validation set")
    if train.eval_interval is None or not train.eval_accuracy:
        problems.add(join(field, "accuracy"), "needs train.eval_interval and train.eval_accuracy; set both")
