"""Starts of runs: fresh, resumed, rewound or from another run, and changes since then."""

import copy
import json
import shutil

import numpy as np
import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.checkpoint.folders import complete_checkpoints
from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.config.checkpoint import CheckpointConfig
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.fingerprint import data_identity
from megatron_hybrid.train.run_lock import RunFolderError
from megatron_hybrid.train.start import check_start_point, choose_start, set_later_aside
from testing import jobs
from testing.checkpoints import edit_index, make_earlier_version
from tests.train.test_trainer import config, make_config, metrics  # noqa: F401 - config is a fixture


@pytest.fixture(scope="module")
def finished_run(ranks, tmp_path_factory):
    """A run that has saved steps 2, 4 and 6: its folder and its configuration."""
    folder = tmp_path_factory.mktemp("finished")
    run = make_config(folder)
    run["checkpoint"] = {"interval": 2, "keep_last": None}
    ranks.run(jobs.pretrain_run, 1, config=run)
    return folder, run


@pytest.fixture
def saved(finished_run, tmp_path):
    """The configuration of a copy of that run, which a test may change."""
    folder, run = finished_run
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copy(folder / "tokens.npy", tmp_path)
    source = [{"path": str(tmp_path / "tokens.npy")}]
    edit_index(
        tmp_path / "run" / "checkpoints" / "step-00000006",
        lambda index: index.update(json.loads(json.dumps(index).replace(str(folder), str(tmp_path)))),
    )
    return copy.deepcopy(run) | {
        "run_dir": str(tmp_path / "run"),
        "data": run["data"] | {"train": source, "validation": source},
    }


def changed(config: dict, **sections) -> RunConfig:  # noqa: F811
    """The run with fields of its sections changed, and one step more."""
    merged = config | {"train": config["train"] | {"steps": 7}}
    for section, fields in sections.items():
        merged[section] = merged[section] | fields if isinstance(fields, dict) else fields
    return RunConfig(**merged)


def compare(run: RunConfig) -> list[str]:
    blend, _ = build_train_and_validation(run.data, run.model.vocab_size, validate=False)
    assert isinstance(blend, Blend)
    return check_start_point(run, choose_start(run, {}), data_identity(blend, run.data.seed))


def steps(run_dir) -> list[int]:
    return [int(folder.name[-8:]) for folder in complete_checkpoints(run_dir / "checkpoints")]


def test_a_fresh_start_in_a_used_folder_is_refused(saved):
    run = changed(saved, checkpoint={"resume": "none"})
    with pytest.raises(
        RunFolderError, match="holds 3 checkpoints of an earlier one, the newest of step 6; give another"
    ):
        choose_start(run, {})
    restarted = choose_start(run, {"SLURM_RESTART_COUNT": "1"})
    assert restarted.kind == "resume", "the attempt before it was the fresh start"


def test_a_run_is_rewound_to_an_earlier_checkpoint(ranks, saved, tmp_path):
    first = tmp_path / "run" / "checkpoints" / "step-00000002"
    again = changed(saved, checkpoint={"resume": str(first), "keep_last": 2}).model_dump()
    (result,) = ranks.run(jobs.pretrain_run, 1, config=again)
    assert result["progress"]["step"] == 7
    assert steps(tmp_path / "run") == [6, 7], "keep_last counts the new line only"
    aside = tmp_path / "run" / "checkpoints" / "set-aside-1"
    assert sorted(p.name for p in aside.iterdir()) == ["metrics.jsonl", "step-00000004", "step-00000006"]
    assert [line["step"] for line in metrics(saved)] == [1, 2, 3, 4, 5, 6, 7]
    same = choose_start(RunConfig(**again), {})
    assert (same.kind, same.folder.name) == ("resume", "step-00000007"), "the same command again"
    assert f"to rewind it again, remove the checkpoints after {first}" in same.notes[0]
    sooner = changed(saved, checkpoint={"resume": str(tmp_path / "run" / "checkpoints" / "step-00000006")})
    assert choose_start(sooner, {}).kind == "rewind", "another command"
    back = changed(saved, checkpoint={"resume": str(aside / "step-00000006")})
    with pytest.raises(CheckpointError, match="was set aside when the run was rewound"):
        choose_start(back, {})


def test_a_restarted_job_does_not_rewind_again(saved, tmp_path):
    run = changed(saved, checkpoint={"resume": str(tmp_path / "run" / "checkpoints" / "step-00000002")})
    assert choose_start(run, {}).kind == "rewind"
    assert choose_start(run, {"SLURM_RESTART_COUNT": "2"}).folder.name == "step-00000006"


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_empty(saved, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    root.rename(tmp_path / "elsewhere")
    root.symlink_to("checkpoints")  # to itself, which the system refuses to follow
    for env in ({}, {"SLURM_RESTART_COUNT": "1"}):
        with pytest.raises(OSError, match="symbolic links"):
            choose_start(changed(saved), env)


def test_what_is_set_aside_never_replaces_anything(saved, tmp_path):
    run_dir = tmp_path / "run"
    assert set_later_aside(run_dir, run_dir / "checkpoints" / "step-00000006") is None
    assert set_later_aside(run_dir, run_dir / "checkpoints" / "step-00000004").name == "set-aside-1"
    assert set_later_aside(run_dir, run_dir / "checkpoints" / "step-00000002").name == "set-aside-2"
    assert steps(run_dir) == [2]


def test_a_stage_resumes_its_own_checkpoints_even_if_the_first_stage_is_gone(saved, tmp_path):
    stage = changed(saved, run_dir=str(tmp_path / "stage"), checkpoint={"init_from": saved["run_dir"]})
    start = choose_start(stage, {})
    assert (start.kind, start.folder.name, start.take) == ("checkpoint", "step-00000006", "weights")
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "stage" / "checkpoints")
    assert choose_start(stage, {}).kind == "resume"


def test_nothing_left_to_train_is_an_error(saved, tmp_path):
    for run in (
        RunConfig(**saved),
        changed(saved, run_dir=str(tmp_path / "next"), train={"steps": 3}, checkpoint={"resume": saved["run_dir"]}),
    ):
        with pytest.raises(RunFolderError, match=r"train.steps: \d leaves nothing to train: .* is of step 6"):
            compare(run)


def test_two_checkpoints_to_start_from_are_an_error():
    with pytest.raises(ValueError) as caught:
        CheckpointConfig(init_from="a", resume="b")
    (error,) = caught.value.errors()
    assert isinstance(error["ctx"]["error"], ConfigError) and "resume is b" in str(error["ctx"]["error"])
    assert CheckpointConfig(init_from="a", resume="none").init_from == "a"


def test_weights_of_another_run_do_not_replace_a_runs_own_checkpoints(saved, tmp_path):
    stage = changed(saved, checkpoint={"init_from": str(tmp_path / "elsewhere")})
    assert choose_start(stage, {}).kind == "resume"
    fresh = changed(saved, checkpoint={"init_from": str(tmp_path / "elsewhere"), "resume": "none"})
    with pytest.raises(RunFolderError, match="checkpoint.resume: none starts a new run"):
        choose_start(fresh, {})
    absent = changed(saved, run_dir=str(tmp_path / "new"), checkpoint={"init_from": str(tmp_path / "elsewhere")})
    with pytest.raises(CheckpointError, match="checkpoint.init_from: .*no complete checkpoint there"):
        choose_start(absent, {})


def test_changes_that_only_steer_the_run_are_reported(saved):
    assert compare(changed(saved, checkpoint=saved["checkpoint"])) == [
        "changed since step-00000006: train.steps 6 -> 7"
    ]
    lines = compare(
        changed(
            saved,
            train={"schedule": {"warmup_steps": 1}, "global_batch_size": 4, "batch_ramp": None},
            data={"tokenizer": "elsewhere"},
            model={"eos_token_id": 5},
        )
    )
    for text in (
        "train.global_batch_size 8 -> 4",
        "train.schedule.warmup_steps 2 -> 1",
        "data.tokenizer 'byte' -> 'elsewhere'",
        "model.eos_token_id null -> 5",
        "train.batch_ramp.start 4 -> (absent)",
    ):
        assert f"changed since step-00000006: {text}" in lines


MODEL_CHANGES = {
    "norm_eps": (0.1, "model.norm_eps: 1e-06 before, 0.1 now"),
    "num_attention_heads": (1, "model.num_attention_heads: 2 before, 1 now"),
    "rope_theta": (1e4, "model.rope_theta: 500000.0 before, 10000.0 now"),
}


@pytest.mark.parametrize("field", MODEL_CHANGES)
def test_a_model_that_computes_something_else_is_refused(saved, field):
    value, text = MODEL_CHANGES[field]
    with pytest.raises(CheckpointError) as caught:
        compare(changed(saved, model={field: value}))
    assert text in str(caught.value) and "checkpoint.allow_changes=[model" in str(caught.value)
    assert "samples" not in str(caught.value)
    assert compare(changed(saved, model={field: value}, checkpoint={"allow_changes": ("model",)}))


def test_the_sign_of_eigenvalues_is_part_of_the_model(saved):
    gdn = saved["model"]["gdn"] | {"allow_negative_eigenvalues": False}
    with pytest.raises(CheckpointError, match="model.gdn.allow_negative_eigenvalues: true before, false now"):
        compare(changed(saved, model={"gdn": gdn}))


def tokens(path, seed: int, count: int = 20_000) -> dict:
    np.random.default_rng(seed).integers(0, 97, count).astype("uint16").tofile(path)
    return {"path": str(path)}


def test_data_that_repeats_or_skips_samples_is_refused(saved, tmp_path):
    other = tokens(tmp_path / "other.npy", 1)
    (mine,) = saved["data"]["train"]
    for data, text in (
        ({"seed": 9}, "data.seed: 1234 before, 9 now"),
        ({"sequence_length": 8}, "data.sequence_length: 16 before, 8 now"),
        ({"train": [other]}, r"data.train.0: other tokens than before \(20,000, as many as before\)"),
        ({"train": [mine, other]}, "data.train: 1 sources before, 2 now"),
    ):
        with pytest.raises(CheckpointError, match=text) as caught:
            compare(changed(saved, data=data))
        assert "samples would be repeated or left out" in str(caught.value)
        assert compare(changed(saved, data=data, checkpoint={"allow_changes": ("data",)}))


def test_files_that_grew_or_changed_are_noticed_and_files_that_moved_are_not(saved, tmp_path):
    (mine,) = saved["data"]["train"]
    shutil.copy(mine["path"], tmp_path / "moved.npy")
    lines = compare(changed(saved, data={"train": [{"path": str(tmp_path / "moved.npy"), "weight": 5.0}]}))
    assert len([line for line in lines if "data.train.0" in line]) == 2, "path and weight; its share is still all"
    held = np.fromfile(mine["path"], "uint16")
    np.append(held, held[:1]).tofile(mine["path"])
    with pytest.raises(CheckpointError, match="data.train.0: 20,000 tokens before, 20,001 now"):
        compare(changed(saved))


def test_a_checkpoint_of_an_earlier_version_is_compared_by_its_configuration(saved, tmp_path):
    def change(content):
        del content["state"]["data"], content["state"]["tokens"], content["run"]["checkpoint"]["allow_changes"]

    make_earlier_version(tmp_path / "run" / "checkpoints" / "step-00000006", change)
    assert compare(changed(saved, checkpoint=saved["checkpoint"])) == [
        "changed since step-00000006: train.steps 6 -> 7"
    ]
    with pytest.raises(CheckpointError, match="data.seed: 1234 -> 9"):
        compare(changed(saved, data={"seed": 9}))


def test_a_checkpoint_with_old_names_of_fields_is_read(saved, tmp_path):
    def change(content):
        run, precision = content["run"], content["run"]["precision"]
        run["parallel"]["recompute"] = run["parallel"].pop("recompute_granularity")
        run["checkpoint"] |= {"load": run["checkpoint"].pop("resume"), "weights_only": False}
        del run["checkpoint"]["init_from"]
        precision |= {"parts": run["model"].pop("backend"), "linear": precision.pop("fp8_recipe")}
        precision |= {"attention": None, "amax_history": precision.pop("fp8_amax_history_len")}
        del precision["fp8_attention"]

    make_earlier_version(tmp_path / "run" / "checkpoints" / "step-00000006", change)
    assert compare(changed(saved)) == ["changed since step-00000006: train.steps 6 -> 7"]


def test_another_backend_is_the_same_model(saved, tmp_path):
    index = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "index.json").read_text())
    assert "backend" not in index["model"]
    lines = compare(changed(saved, model={"backend": "local"}))
    assert "changed since step-00000006: model.backend 'auto' -> 'local'" in lines


def test_tokens_accumulate_over_sequence_lengths(ranks, saved):
    longer = changed(saved, data={"sequence_length": 32}, checkpoint={"allow_changes": ("data.sequence_length",)})
    before = metrics(saved)[-1]["tokens"]
    ranks.run(jobs.pretrain_run, 1, config=longer.model_dump())
    assert before == 32 * 16 and metrics(saved)[-1]["tokens"] == before + 8 * 32


def test_a_loss_that_stays_non_finite_stops_the_run(ranks, config, tmp_path):  # noqa: F811
    config["train"] |= {"steps": 60, "skip_step": {"max_nonfinite_steps": 3}, "eval_interval": None}
    config["model"] = config["model"] | {"init_std": 1e30}
    config["checkpoint"] = {"interval": 1}
    with pytest.raises(AssertionError, match="not finite in 3 consecutive steps, the last of them step 3; no update"):
        ranks.run(jobs.pretrain_run, 1, config=config)
    assert not steps(tmp_path / "run")


def test_a_run_that_stops_while_its_loss_is_not_finite_keeps_earlier_checkpoints(ranks, saved, tmp_path):
    run_dir = tmp_path / "run"
    spoil = {"train": {"steps": 7}, "model": {"init_std": 1e30}}
    stopped = {**saved, **{name: saved[name] | fields for name, fields in spoil.items()}}
    stopped["run_dir"], stopped["checkpoint"] = str(tmp_path / "diverged"), {"interval": 2, "keep_last": 1}
    ranks.run(jobs.pretrain_run, 1, config=stopped)
    assert steps(tmp_path / "diverged") == [7], "no save at the interval, one at the end"
    shutil.copytree(tmp_path / "diverged" / "checkpoints" / "step-00000007", run_dir / "checkpoints" / "step-00000007")
    longer = stopped | {"run_dir": str(run_dir), "train": stopped["train"] | {"steps": 8}}
    ranks.run(jobs.pretrain_run, 1, config=longer)
    assert steps(run_dir) == [2, 4, 6, 7, 8]
    state = json.loads((run_dir / "checkpoints" / "step-00000008" / "index.json").read_text())["state"]
    assert state["skip_step"]["nonfinite_steps"] == 8


def test_only_fields_of_data_and_model_need_leave(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("{run_dir: r, model: olmo_hybrid_tiny, data: {train: [{path: a}], sequence_length: 8}, train: {steps: 1, "
                    "global_batch_size: 1}}")  # fmt: skip
    with pytest.raises(ConfigError, match="checkpoint.allow_changes: train.steps is no field of data or model"):
        load_run(str(file), ["checkpoint.allow_changes=[train.steps]"])
