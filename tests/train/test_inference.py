"""tools/evaluate.py and tools/generate.py on a trained run: numbers, data and prompts that are wrong end with a message."""

import json
import math

import numpy as np
import pytest
import torch

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.base.numbers import non_negative, non_negative_real, positive
from megatron_hybrid.train.inference import _choose, check_generation
from testing.models import SMALLEST
from tests.data.files import write_raw
from tests.train import data_check_jobs


@pytest.fixture
def config(tmp_path):
    tokens = write_raw(tmp_path / "a.npy", np.tile(np.arange(20, 80), 20))
    return dict(
        run_dir=str(tmp_path / "run"),
        model=SMALLEST,
        data=dict(train=[{"path": tokens}], sequence_length=16),
        train=dict(steps=1, global_batch_size=2, micro_batch_size=2, dtype="fp32"),
        logging=dict(plot_interval=0, tensorboard=False),
    )


def test_the_tools_on_a_run(ranks, config, tmp_path):
    run, good = config["run_dir"], config["data"]["train"][0]["path"]
    write_raw(tmp_path / "bad.npy", [5, 6, 300, 7] * 50)
    write_raw(tmp_path / "wide.npy", [5, 6, 90, 7] * 50, "uint32")
    write_raw(tmp_path / "short.npy", [5, 6])
    evaluate = [run, str(tmp_path / "bad.npy")], [run, str(tmp_path / "wide.npy")], [run, str(tmp_path / "short.npy")]
    calls = [("evaluate", arguments) for arguments in evaluate]
    calls += [
        ("evaluate", [run, good, "--json"]),
        ("evaluate", [run, str(tmp_path / "wide.npy"), "--dtype", "uint32"]),
        ("evaluate", [run, f"{tmp_path}/a.bin"]),
        ("evaluate", ["none", good]),
        ("generate", [run, "--prompt", ""]),
        ("generate", [run, "--prompt", "~~~~"]),
        ("generate", [run, "--prompt", "\udcff"]),
        ("generate", [run, "--prompt", "0" * 40, "--max-tokens", "2", "--temperature", "1e-320"]),
    ]
    (results,) = ranks.run(data_check_jobs.tools_on_a_run, 1, config=config, calls=calls)
    bad, wide, short, good_data, as_uint32, pair, no_folder, empty, outside, no_text, long = results
    expected = [
        (bad, "bad.npy: byte 4: token 300"),
        (wide, "uint32"),
        (short, "do not make one sample"),
        (pair, "give their prefix"),
        (no_folder, "none: no such folder"),
        (empty, "no tokens"),
        (outside, "prompt has token 126: the model's vocabulary is 97"),
        (no_text, "--prompt is not UTF-8"),
    ]
    for (status, _, stderr), message in expected:
        assert status == 78 and message in stderr and "Traceback" not in stderr, stderr
    assert good_data[0] == 0 and json.loads(good_data[1])["tokens"] == 1184
    assert as_uint32[0] == 0 and "over 192 tokens" in as_uint32[1], as_uint32
    assert long[0] == 0 and long[1].startswith("0" * 40)
    assert "the prompt has 40 tokens, the model was trained on sequences of 16" in long[2]


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
        assert _choose(logits.clone(), temperature, 0, generator) == 1
    drawn = [_choose(logits.clone(), 1.0, 0, generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.softmax(logits, -1), atol=0.03, rtol=0)
    assert {_choose(logits.clone(), 100.0, 2, generator) for _ in range(200)} == {1, 2}
    with pytest.raises(UserError, match="not finite"):
        _choose(torch.tensor([1.0, math.nan]), 1.0, 0, generator)
