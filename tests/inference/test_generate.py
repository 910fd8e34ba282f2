"""Arguments of text generation, and the choice of a token."""

import math

import pytest
import torch

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.base.numbers import non_negative, non_negative_real, positive
from megatron_hybrid.inference.generate import check_generation, sample_token


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (positive, "0"), (positive, "-1"), (positive, "1.5"), (positive, str(1 << 63)), (non_negative, "-3"), (non_negative, ""),
        (non_negative_real, "-1"), (non_negative_real, "nan"), (non_negative_real, "inf"), (non_negative_real, "warm"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(parse, text):
    from argparse import ArgumentTypeError

    with pytest.raises(ArgumentTypeError):
        parse(text)


@pytest.mark.parametrize(
    "change",
    [dict(prompt=[]), dict(prompt=[97]), dict(prompt=[-1]), dict(max_tokens=-1), dict(temperature=-1.0),
     dict(temperature=math.nan), dict(top_k=-3), dict(seed=-1), dict(seed=1 << 64)],
)  # fmt: skip
def test_what_generate_is_given_is_checked(change):
    good = dict(vocab_size=97, prompt=[1], max_tokens=1, temperature=0.8, top_k=50, seed=0)
    check_generation(**good)
    with pytest.raises(UserError):
        check_generation(**good | change)


def test_choosing_a_token():
    logits, generator = torch.tensor([1.0, 3.0, 2.0, -50.0]), torch.Generator().manual_seed(0)
    for temperature in (0, 1e-320, 1e-6):
        assert sample_token(logits.clone(), temperature, 0, generator) == 1
    drawn = [sample_token(logits.clone(), 1.0, 0, generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.softmax(logits, -1), atol=0.03, rtol=0)
    assert {sample_token(logits.clone(), 100.0, 2, generator) for _ in range(200)} == {1, 2}
    with pytest.raises(UserError, match="not finite"):
        sample_token(torch.tensor([1.0, math.nan]), 1.0, 0, generator)
