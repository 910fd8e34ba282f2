"""A stage that starts from another run's checkpoint: what it takes, what may change, and what is kept of every start."""

import copy
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.vocabulary import vocabulary_identity
from megatron_hybrid.train.setup import write_config
from megatron_hybrid.train.start import check_start_point, choose_start
from testing import jobs
from testing.checkpoints import edit_index
from tests.train import stage_jobs
from tests.train.test_trainer import make_config


def stage_of(first: dict, **checkpoint) -> dict:
    """A second stage in another folder: other data, batch size and schedule."""
    second = copy.deepcopy(first) | {"run_dir": first["run_dir"] + "-2"}
    second["data"] |= {"seed": 7}
    second["train"] |= dict(
        steps=4, global_batch_size=4, batch_ramp=None, schedule=dict(kind="linear", min_lr_ratio=0.0)
    )
    second["checkpoint"] = dict(interval=4, init_from=first["run_dir"], take="moments") | checkpoint
    return second


CASES = {
    "DP2, bf16": (2, {}, {"dtype": "bf16"}, {}),
    "TP2": (2, {"tensor_parallel_size": 2}, {}, {}),
    "ZeRO 3, bf16": (2, {}, {"dtype": "bf16", "engine": "deepspeed"}, {"stage": 3}),
}


@pytest.fixture
def first(tmp_path):
    return make_config(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_with_moments_it_is_an_uninterrupted_run_whose_config_changed(name, ranks, first):
    count, parallel, train, zero = CASES[name]
    if zero and find_spec("deepspeed") is None:
        pytest.skip("no DeepSpeed here")
    first |= {"parallel": parallel, "zero": zero, "train": first["train"] | train | {"eval_interval": None}}
    second = stage_of(first)
    straight = ranks.run(stage_jobs.both_stages_at_once, count, first=first, second=second)
    found = ranks.run(stage_jobs.second_stage, count, config=second)
    for expected, result in zip(straight, found, strict=True):
        assert result["losses"] == expected["losses"]
        assert result["updates"] == expected["updates"] == 10
        for what in ("parameters", "moments"):
            assert result[what].keys() == expected[what].keys()
            assert all(torch.equal(result[what][key], value) for key, value in expected[what].items())


def test_layout_and_engine_may_change_between_stages(ranks, first):
    (expected,) = ranks.run(stage_jobs.both_stages_at_once, 1, first=first, second=stage_of(first))
    layouts = [(2, {"parallel": {"tensor_parallel_size": 2}})]
    if find_spec("deepspeed"):
        layouts.append((1, {"train": stage_of(first)["train"] | {"engine": "deepspeed"}, "zero": {"stage": 1}}))
    for count, changes in layouts:
        (result, *_) = ranks.run(stage_jobs.second_stage, count, config=stage_of(first) | changes)
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["updates"] == expected["updates"]


@pytest.fixture(scope="module")
def ended(ranks, tmp_path_factory):
    """A finished run: its configuration, and what its rank returned."""
    config = make_config(tmp_path_factory.mktemp("ended"))
    return config, ranks.run(jobs.pretrain_run, 1, config=config)[0]


def test_what_is_taken(ranks, ended, tmp_path):
    first, left = ended
    weights = stage_of(first, take="weights") | {"model": first["model"] | {"rope_theta": None}}
    (without,) = ranks.run(jobs.pretrain_run, 1, config=weights | {"run_dir": str(tmp_path / "weights")})
    assert without["progress"] == {"step": 4, "samples": 16, "tokens": 256, "updates": 4}
    assert len(without["window"]["losses"]) == 4
    everything = first | {"run_dir": str(tmp_path / "all"), "train": first["train"] | {"steps": 7}}
    everything["checkpoint"] = dict(init_from=first["run_dir"], take="everything")
    (all_of_it,) = ranks.run(jobs.pretrain_run, 1, config=everything)
    assert all_of_it["progress"] == {"step": 7, "samples": 40, "tokens": 640, "updates": 7}
    assert all_of_it["window"]["losses"][:6] == left["window"]["losses"]


def test_random_state_starts_fresh(ranks, ended, tmp_path):
    folder = {"run_dir": str(tmp_path / "stage")}
    (stage,) = ranks.run(stage_jobs.second_stage, 1, config=stage_of(ended[0]) | folder)
    (fresh,) = ranks.run(stage_jobs.second_stage, 1, config=stage_of(ended[0]) | folder | {"checkpoint": {}})
    assert torch.equal(stage["random"], fresh["random"])


def copy_of(first: dict, folder: Path) -> dict:
    """The finished run in a folder whose files a test may change."""
    shutil.copytree(Path(first["run_dir"]).parent, folder, dirs_exist_ok=True)
    source = [{"path": str(folder / "tokens.npy")}]
    return first | {"run_dir": str(folder / "run"), "data": first["data"] | {"train": source, "validation": source}}


def start(config: dict) -> list[str]:
    run = RunConfig(**config)
    return check_start_point(run, choose_start(run, {}), None)


def test_changes_of_rope_data_and_schedule_are_reported_and_others_are_refused(ended):
    first, _ = ended
    dropped = stage_of(first)
    dropped["model"] |= {"rope_theta": None}
    dropped["data"] |= {"sequence_length": 32}
    lines = start(dropped)
    for text in (
        "model.rope_theta 500000.0 -> null",
        "data.sequence_length 16 -> 32",
        "data.seed 1234 -> 7",
        "train.schedule.kind 'cosine' -> 'linear'",
    ):
        assert f"changed since step-00000006: {text}" in lines
    for change, text in (
        ({"norm_eps": 0.1}, "model.norm_eps: 1e-06 before, 0.1 now"),
        ({"ffn_hidden_size": 96}, "model.ffn_hidden_size is 64 there and 96 in this run"),
        ({"vocab_size": 130}, "model.vocab_size is 97 there and 130 in this run"),
        ({"layer_pattern": "AG"}, "model.layer_pattern is"),
        ({"layer_pattern": "GW", "sliding_window": 8}, "model.layer_pattern: 'GA' before, 'GW' now"),
    ):
        wrong = stage_of(first)
        wrong["model"] |= change
        with pytest.raises(CheckpointError, match=text):
            start(wrong)


def test_another_tokenizer_is_refused(ended, tmp_path):
    first = copy_of(ended[0], tmp_path)

    def summary(digest: str) -> None:
        stated = dict(documents=1, tokens=1, max_token=96, dtype="uint16", tokenizer="t", vocab_size=97)
        stated |= dict(eos_token_id=96, append_eos=False, vocabulary_sha256=digest)
        (tmp_path / "tokens.npy.json").write_text(json.dumps(stated))

    summary("a" * 64)
    folder = tmp_path / "run/checkpoints/step-00000006"
    assert json.loads((folder / "index.json").read_text())["state"]["vocabulary"] is None, "nothing stated it"
    start(stage_of(first))
    identity = vocabulary_identity(RunConfig(**first))
    edit_index(folder, lambda index: index["state"].update(vocabulary=identity))
    start(stage_of(first))
    summary("b" * 64)
    with pytest.raises(CheckpointError, match="data.tokenizer: 97 ids, SHA-256 a{12} before, .* b{12} now") as caught:
        start(stage_of(first))
    assert "token ids would mean other text" in str(caught.value)
    start(stage_of(first, allow_changes=["data.tokenizer"]))


def test_moments_that_are_not_there_are_named(ended, tmp_path):
    first = copy_of(ended[0], tmp_path)

    def without_second_moments(index: dict) -> None:
        index["tensors"] = {name: entry for name, entry in index["tensors"].items() if "exp_avg_sq" not in name}

    edit_index(tmp_path / "run" / "checkpoints" / "step-00000006", without_second_moments)
    with pytest.raises(
        CheckpointError, match="checkpoint.take: moments, and .* does not hold exp_avg_sq of adamw; set"
    ):
        start(stage_of(first))
    start(stage_of(first, take="weights"))


def test_every_start_keeps_its_configuration(tmp_path):
    run = RunConfig(**make_config(tmp_path))
    longer = run.model_copy(update={"train": run.train.model_copy(update={"steps": 8})})
    for config, step in ((run, 0), (run, 3), (longer, 3), (run, 3), (longer, 3)):
        write_config(config, step)
    names = ["config-00000000.yaml", "config-00000003-2.yaml", "config-00000003.yaml", "config.yaml"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    kept = [load_run(str(tmp_path / "run" / name)) for name in names]
    assert kept == [run, longer, run, longer]
