"""Predictions for separated documents: less attention, a little more memory, and everything else as before."""

from dataclasses import replace

import pytest

from megatron_hybrid.arch.flops import layer_training_flops, training_flops_per_token
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.planner.command import Request, answer
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.memory import fullest
from megatron_hybrid.planner.timing import StepPredictor
from tests.planner.test_memory import MODEL, plan

PREDICTOR = StepPredictor(load("h200"))
ATTENDED = 2048


@pytest.fixture(scope="module")
def plans():
    whole = plan(gpus=1, micro_batch=1)
    return whole, replace(whole, attended_length=ATTENDED)


def test_attention_is_that_of_as_many_shorter_sequences(plans):
    whole, documents = plans
    one, other = (PREDICTOR.step(p) for p in plans)
    shorter = PREDICTOR.step(
        replace(whole, sequence_length=ATTENDED, micro_batch_size=4, global_batch_size=4 * whole.global_batch_size)
    )
    assert other.parts["attention"] == pytest.approx(shorter.parts["attention"])
    assert other.parts["attention"] < 0.3 * one.parts["attention"]
    assert {part: s for part, s in one.parts.items() if part not in ("attention", "kernel launches")} == pytest.approx(
        {part: s for part, s in other.parts.items() if part not in ("attention", "kernel launches")}
    )


def test_mfu_counts_the_pairs_of_tokens_in_documents(plans):
    one, other = (PREDICTOR.step(p) for p in plans)
    per_token = training_flops_per_token(MODEL, ATTENDED)
    assert other.mfu == pytest.approx(per_token * other.tokens / other.seconds / other.peak)
    assert per_token < training_flops_per_token(MODEL, 8192)
    assert layer_training_flops(MODEL, "G", ATTENDED) == layer_training_flops(MODEL, "G", 8192)


def test_memory_grows_by_starts_positions_and_angles(plans):
    whole, documents = (fullest(p) for p in plans)
    per_token = (documents.total - whole.total) / plans[0].tokens
    angles = 4 * MODEL.attention_head_dim if MODEL.rope_theta else 0
    assert per_token == pytest.approx(4 + 4 + angles)


def test_a_document_length_needs_documents():
    ask = Request("olmo_hybrid_7b", 8, sequence_length=8192, global_batch_size=64, document_length=500)
    with pytest.raises(ConfigError, match="document_length: data.documents is keep; give --documents mask or pack"):
        answer(ask)
