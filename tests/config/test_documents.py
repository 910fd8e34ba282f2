"""data.documents and data.instance_filter: what is accepted, and errors."""

import pytest

from megatron_hybrid.config.data import DataConfig, InstanceFilterConfig
from megatron_hybrid.config.load import load_run
from tests.config.wrong_runs import TINY, Case, assert_named, each

WRONG: list[Case] = [
    (["data.documents=packed"], "data.documents", "packed", "pack"),
    (
        ["data.instance_filter={repetition_min_period: 14}"],
        "data.instance_filter.repetition_min_period",
        "14 exceeds repetition_max_period = 13",
        "at most 13",
    ),
    (["data.instance_filter={repetition_max_count: 2}"], "data.instance_filter.repetition_max_count", "2", "3"),
    (
        ["data.instance_filter={max_count: 32}"],
        "data.instance_filter.max_count",
        "no such field",
        "repetition_max_count",
    ),
]


@each(WRONG)
def test_wrong_values(overrides, field, wrong, remedy):
    assert_named(overrides, field, wrong, remedy)


def test_the_instance_filter_is_accepted():
    assert load_run(None, [*TINY, "data.instance_filter={}"]).data.instance_filter == InstanceFilterConfig()


def test_defaults_keep_the_stream():
    data = load_run(None, TINY).data
    assert data.documents == "keep" and data.instance_filter is None


@pytest.mark.parametrize("mode", ["mask", "pack"])
def test_built_in_mixers_take_documents(mode):
    run = load_run(None, [*TINY, f"data.documents={mode}", "parallel.context_parallel_size=2"])
    assert run.layout.documents == mode


@pytest.mark.parametrize("mode", ["mask", "pack"])
def test_the_section_alone_accepts_all_modes(mode):
    data = DataConfig(train=({"path": "a"},), sequence_length=8, documents=mode, instance_filter={})
    assert data.instance_filter == InstanceFilterConfig(
        repetition_min_period=1, repetition_max_period=13, repetition_max_count=32
    )
