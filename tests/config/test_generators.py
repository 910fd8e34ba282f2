"""Wrong generators and curricula are refused by field, before anything starts."""

import pytest

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config import generators
from megatron_hybrid.config.generators import SampleGenerator, generator_kinds, register
from megatron_hybrid.config.load import dump_run, load_run
from tests.config.wrong_runs import TINY, assert_named, each

TASK = "data.train=[{generator: {task: state_tracking, size: 8}}]"
SETS = "data.validation={n4: [{generator: {task: state_tracking, size: 4}}]}"
STAGES = "data.curriculum=[{size: 4, samples: 800%s}, {size: 16}]"


@each(
    [
        (["data.train=[{weight: 1}]"], "data.train.0.path", "is missing", "or a generator"),
        (["data.train=[{path: a, generator: {task: recall, size: 8}}]"], "data.train.0.generator", "path = a", "remove one"),
        (["data.train=[{generator: {task: recalls, size: 8}}]"], "data.train.0.generator.task", "recalls", "the nearest is recall"),
        (["data.train=[{generator: {task: recall}}]"], "data.train.0.generator.size", "missing", ""),
        (["data.train=[{generator: {task: recall, size: 8, sizes: 1}}]"], "data.train.0.generator.sizes", "", "size"),
        (["data.train=[{generator: {task: recall, size: 129}}]"], "data.train.0.generator.size", "129 exceeds", "at most 128"),
        (
            ["data.train=[{generator: {task: state_based_recall, size: 4}}]", "data.sequence_length=1024"],
            "data.train.0.generator.size", "fewer indexes", "at least 5",
        ),
        ([TASK, "data.sequence_length=64"], "data.sequence_length", "64 is shorter", "at least 128"),
        ([TASK, "model.vocab_size=9", "model.eos_token_id=null"], "model.vocab_size", "9 is less than the 16", "at least 16"),
        ([f"{TASK[:-1]}, {{path: a}}]"], "data.train", "both files and generators", "one kind"),
        ([TASK, "data.documents=mask"], "data.documents", "mask", "keep"),
        ([TASK, "data.instance_filter={}"], "data.instance_filter", "files", "null"),
        ([TASK, "train.sequence_ramp={start: 128, samples: 100}"], "train.sequence_ramp", "cut", "data.curriculum"),
        (
            [TASK, SETS, "train.eval_interval=10", "train.eval_batches=null"],
            "train.eval_batches", "without end", "give a number",
        ),
        (["data.curriculum=[{size: 4}]"], "data.curriculum", "data.train has none", "[]"),
        ([TASK, "data.curriculum=[{size: 4}, {size: 8}]"], "data.curriculum.0.samples", "is missing", "only the last"),
        ([TASK, "data.curriculum=[{size: 4, samples: 8}]"], "data.curriculum.0.samples", "no end", "leave it out"),
        ([TASK, "data.curriculum=[{size: 4, samples: 12}, {size: 8}]"], "data.curriculum.0.samples", "12 is not", "nearest is"),
        ([TASK, STAGES % ", accuracy: 0.9"], "data.curriculum.0.validation", "is missing", "both or none"),
        (
            [TASK, STAGES % ", accuracy: 0.9, validation: n8", SETS, "train.eval_interval=5", "train.eval_accuracy=true"],
            "data.curriculum.0.validation", "n8 is not one of n4", "name a validation set",
        ),
        ([TASK, SETS, STAGES % ", accuracy: 0.9, validation: n4"], "data.curriculum.0.accuracy", "eval_accuracy", "set both"),
    ]
)  # fmt: skip
def test_refused(overrides, field, wrong, remedy):
    assert_named(overrides, field, wrong, remedy)


def test_a_run_survives_writing_and_reading(tmp_path):
    config = load_run(None, [*TINY, TASK, SETS, STAGES % "", "data.train.0.generator.gap=null"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_run(config))
    again = load_run(path, [])
    assert again == config and again.data.train[0].generator.gap is None
    assert type(again.data.train[0].generator).__name__ == "StateTracking"


def test_a_plug_in_brings_a_kind(monkeypatch):
    monkeypatch.setattr(generators, "_kinds", dict(generator_kinds()))

    class Counting(generator_kinds()["recall"]):
        task: str = "counting"

    register(Counting)
    assert (
        load_run(None, [*TINY, "data.train=[{generator: {task: counting, size: 9}}]"]).data.train[0].generator.size == 9
    )

    class Thief(SampleGenerator):
        task: str = "recall"

    with pytest.raises(UserError, match="both name a generator recall; rename"):
        register(Thief)
