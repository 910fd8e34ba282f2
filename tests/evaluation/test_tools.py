"""tools/evaluate.py and tools/generate.py on a trained run: numbers, data and prompts that are wrong end with a message."""

import json

import numpy as np
import pytest

from testing.models import SMALLEST
from tests.data.files import write_raw
from tests.evaluation import jobs


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


@pytest.mark.parametrize("documents", ["mask", "pack"])
def test_documents_are_those_of_the_run(ranks, config, tmp_path, documents):
    source = config["data"]["train"]
    config["model"] = SMALLEST | {"eos_token_id": 25}
    config["data"] |= {"documents": documents, "validation": source}
    config["train"] |= {"eval_interval": 1, "eval_batches": 100}
    run, path = config["run_dir"], source[0]["path"]
    calls = [
        ("evaluate", [run, path, "--json", *more]) for more in ([], ["--documents", documents], ["--documents", "keep"])
    ]
    (results,) = ranks.run(jobs.tools_on_a_run, 1, config=config, calls=calls)
    assert [status for status, _, _ in results] == [0, 0, 0], results
    as_run, named, kept = (json.loads(out)["loss"] for _, out, _ in results)
    (step,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert as_run == named == pytest.approx(step["eval_loss"], rel=1e-6) and abs(as_run - kept) > 1e-6


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
    (results,) = ranks.run(jobs.tools_on_a_run, 1, config=config, calls=calls)
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
    assert json.loads(good_data[1])["sets"][good]["tokens"] == 1184
    assert as_uint32[0] == 0 and " 192 " in as_uint32[1] and "bits per byte" in as_uint32[1], as_uint32
    assert long[0] == 0 and long[1].startswith("0" * 40)
    assert "the prompt has 40 tokens, the model was trained on sequences of 16" in long[2]


def test_several_sets_over_several_ranks(ranks, config, tmp_path):
    """Two ranks with small batches print what one rank with a large one prints, and only the first prints."""
    run = config["run_dir"]
    config["train"]["dtype"] = "bf16"
    write_raw(tmp_path / "b.npy", np.arange(20, 20 + 70) % 97)
    sets = [f"a={tmp_path}/a.npy", f"b={tmp_path}/b.npy"]
    arguments = [run, *sets, "--json"]
    more = [("evaluate", [*arguments, "--batch-size", "1"]), ("evaluate", [run, *sets])]
    ((one,),) = ranks.run(jobs.tools_on_a_run, 1, config=config, calls=[("evaluate", arguments)])
    in_fp32 = ("evaluate", [*arguments, "--precision", "fp32"])
    first, second = ranks.run(jobs.tools, 2, calls=[*more, in_fp32])
    assert all(status == 0 and not out for status, out, _ in second), second
    (_, small, _), (_, table, _), (_, exact, _) = first
    found, expected = json.loads(small)["sets"], json.loads(one[1])["sets"]
    assert found["a"]["tokens"] == 1184 and found["b"]["tokens"] == 64
    for name in "ab":
        for key, value in expected[name].items():
            assert found[name][key] == pytest.approx(value, rel=1e-6), key
        assert found[name]["loss"] != json.loads(exact)["sets"][name]["loss"], "in the run's dtype"
        bits = found[name]["loss"] / np.log(2)  # every token is a byte
        assert found[name]["bits_per_byte"] == pytest.approx(bits)
    assert [line.split()[0] for line in table.splitlines()] == ["set", "a", "b"]


def test_names_of_sets():
    from megatron_hybrid.base.errors import UserError
    from megatron_hybrid.evaluation.loaded_model import parse_sets

    assert parse_sets(["docs=data/docs", "data/code"]) == {"docs": "data/docs", "data/code": "data/code"}
    for wrong in (["a=x", "a=y"], ["=x"]):
        with pytest.raises(UserError, match="give each set a name of its own"):
            parse_sets(wrong)
