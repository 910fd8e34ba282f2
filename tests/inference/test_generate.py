"""Sampling, and greedy decoding of batches against transformers."""

import math
from argparse import ArgumentTypeError

import pytest
import torch

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.base.numbers import non_negative, non_negative_real, positive
from megatron_hybrid.inference.prompts import check_prompts
from megatron_hybrid.inference.sampling import NOT_FINITE, Sampler, Sampling, token_at
from testing.models import SMALL
from tests.inference import jobs
from tests.model.test_incremental import GROUPED, SCALED


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (positive, "0"), (positive, "-1"), (positive, "1.5"), (positive, str(1 << 63)), (non_negative, "-3"), (non_negative, ""),
        (non_negative_real, "-1"), (non_negative_real, "nan"), (non_negative_real, "inf"), (non_negative_real, "warm"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(parse, text):
    with pytest.raises(ArgumentTypeError):
        parse(text)


@pytest.mark.parametrize(
    "change",
    [dict(temperature=-1.0), dict(temperature=math.nan), dict(top_k=-3), dict(top_p=0.0), dict(top_p=1.1), dict(seed=-1),
     dict(seed=1 << 64)],
)  # fmt: skip
def test_sampling_is_checked(change):
    Sampling(0.8, 50, 0.9, 1).check()
    with pytest.raises(UserError, match=next(iter(change))):
        Sampling(**change).check()


@pytest.mark.parametrize("prompts", [[[]], [[1], []], [[97]], [[1], [-1]]])
def test_prompts_are_checked(prompts):
    with pytest.raises(UserError, match="prompt has"):
        check_prompts(prompts, 97)


def draw(logits: torch.Tensor, count: int, **options) -> list[int]:
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return token_at(logits.expand(count, -1), draws, Sampling(**options)).tolist()


def test_choosing_a_token():
    logits = torch.tensor([1.0, 3.0, 2.0, -50.0])
    for temperature in (1e-320, 1e-6):
        assert set(draw(logits, 10, temperature=temperature)) == {1}
    shares = torch.bincount(torch.tensor(draw(logits, 4000, temperature=1.0)), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.softmax(logits, -1), atol=1e-3, rtol=0)
    assert set(draw(logits, 200, temperature=100.0, top_k=2)) == {1, 2}
    assert set(draw(logits, 200, temperature=1.0, top_p=0.6)) == {1}  # it has 0.665
    assert set(draw(logits, 200, temperature=1.0, top_p=0.7)) == {1, 2}
    assert set(draw(logits, 200, temperature=100.0, top_k=9)) == {0, 1, 2, 3}


def test_a_sampler_marks_what_is_not_finite():
    logits = torch.tensor([[1.0, math.nan], [1.0, 2.0], [math.inf, 0.0]])
    assert Sampler(Sampling(), 3).choose(logits).tolist() == [NOT_FINITE, 1, NOT_FINITE]
    assert Sampler(Sampling(1.0), 3).choose(logits).tolist()[::2] == [NOT_FINITE] * 2


def test_a_row_draws_as_it_would_alone():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together, alone = Sampler(Sampling(1.0, seed=5), 3), [Sampler(Sampling(1.0, seed=5 + i), 1) for i in range(3)]
    for _ in range(5):
        expected = [sampler.choose(logits[i : i + 1]).item() for i, sampler in enumerate(alone)]
        assert together.choose(logits).tolist() == expected


@pytest.mark.parametrize(("model", "world"), [(SMALL, 1), (GROUPED, 2), (SCALED, 1)])
def test_greedy_decoding_gives_the_tokens_of_transformers(ranks, model, world):
    for result in ranks.run(jobs.greedy, world, model=model, lengths=[70, 3, 41], max_tokens=40):
        assert result["batch"] == result["transformers"] == result["alone"] == result["chunked"]
        assert len({len(tokens) for tokens in result["batch"]}) > 1, "no sequence ended before the others"
        assert result["sampled"] == result["sampled again"] != result["batch"]


def test_a_mixer_without_a_cache_is_refused(ranks):
    (message,) = ranks.run(jobs.without_cache, 1, model=SMALL)
    assert message.startswith("Gated DeltaNet (layer_pattern's G) cannot generate text")
