"""Old names of configuration fields: files, overrides and saved configurations."""

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config import renames
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.renames import RENAMES, rename_saved

BASE = ["run_dir=r", "data.train=[{path: a}]", "data.sequence_length=64", "train.steps=1", "train.global_batch_size=1",
        "train.micro_batch_size=1"]  # fmt: skip
FP8 = {"fp8_recipe": "tensorwise"}
CASES = [
    ("precision.linear", "fp8_blockwise", "precision.fp8_recipe", "blockwise", {}),
    ("precision.linear", "null", "precision.fp8_recipe", "null", {}),
    ("precision.fp8_recipe", "fp8_delayed", "precision.fp8_recipe", "delayed", {}),
    ("precision.attention", "fp8", "precision.fp8_attention", "true", FP8),
    ("precision.attention", "null", "precision.fp8_attention", "false", {}),
    ("precision.fp8_parameters", "true", "precision.fp8_param_gather", "true", FP8),
    ("precision.amax_history", "16", "precision.fp8_amax_history_len", "16", {}),
    ("precision.bf16_layers_at_start", "1", "precision.num_layers_at_start_in_bf16", "1", FP8),
    ("precision.bf16_layers_at_end", "2", "precision.num_layers_at_end_in_bf16", "2", FP8),
    ("precision.cache_weights", "false", "precision.cache_fp8_weights", "false", FP8),
    ("precision.parts", "local", "model.backend", "local", {}),
    ("train.optimizer.name", "adamw", "train.optimizer.kind", "adamw", {}),
    ("parallel.recompute", "full", "parallel.recompute_granularity", "full", {}),
    ("checkpoint.load", "none", "checkpoint.resume", "none", {}),
    ("checkpoint.load", "runs/a", "checkpoint.resume", "runs/a", {}),
]
MODEL = "{base_preset: olmo_hybrid_tiny, head_dim: 128, layer_pattern: GA*4}"


@pytest.fixture(autouse=True)
def warned(monkeypatch):
    monkeypatch.setattr(renames, "_warned", set())
    monkeypatch.delenv("RANK", raising=False)


def file_of(folder, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


@pytest.mark.parametrize(("old", "old_value", "new", "new_value", "precision"), CASES)
def test_each_old_name_means_the_new_one(old, old_value, new, new_value, precision, tmp_path, capsys):
    others = [*BASE, f"model={MODEL}", *(f"precision.{name}={value}" for name, value in precision.items())]
    expected = load_run(None, [*others, f"{new}={new_value}"])
    assert capsys.readouterr().err == "", "no warning for a current name"
    assert load_run(None, [*others, f"{old}={old_value}"]) == expected
    *sections, name = old.split(".")
    text = f"{{{name}: {old_value}}}"
    for section in reversed(sections[1:]):
        text = f"{{{section}: {text}}}"
    file = file_of(tmp_path, f"model: {MODEL}\n{sections[0]}: {text}\n")
    assert load_run(file, [override for override in others if not override.startswith("model=")]) == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "one warning per field and process"
    assert lines[0].startswith(f"warning: {old}") and new in lines[0]


def test_an_old_name_in_a_section_that_an_override_gives_as_a_whole():
    run = load_run(None, [*BASE, f"model={MODEL}", "train.optimizer={name: adamw, lr: 0.1}"])
    assert run.train.optimizer.kind == "adamw" and run.train.optimizer.lr == 0.1
    with pytest.raises(ConfigError, match="train.optimizer.name: is the old name of train.optimizer.kind"):
        load_run(None, [*BASE, f"model={MODEL}", "train.optimizer={name: adamw, kind: adamw}"])


def test_the_table_is_covered():
    assert {old for old, *_ in CASES} >= {rename.old for rename in RENAMES} - {"model.preset"}


def test_the_old_key_of_a_preset(tmp_path, capsys):
    expected = load_run(None, [*BASE, "model={base_preset: pure_gdn, of: olmo_hybrid_tiny}"])
    assert load_run(None, [*BASE, "model={preset: pure_gdn, of: olmo_hybrid_tiny}"]) == expected
    assert load_run(None, [*BASE, "model.of=olmo_hybrid_tiny", "model.preset=pure_gdn"]) == expected
    assert load_run(file_of(tmp_path, "model: {preset: pure_gdn, of: olmo_hybrid_tiny}"), BASE) == expected
    assert capsys.readouterr().err == "warning: model.preset is deprecated; write model.base_preset\n"


def test_a_backend_beside_a_preset_that_only_an_override_names(tmp_path):
    file = file_of(tmp_path, "model: olmo_hybrid_7b\nprecision: {parts: local}\n")
    run = load_run(file, [*BASE, "model=olmo_hybrid_tiny"])
    assert run.model.backend == "local" and run.model.hidden_size == 128
    assert load_run(file, [*BASE, "model=olmo_hybrid_tiny", "precision.parts=auto"]).model.backend == "auto"


STARTS = [
    ("", ["checkpoint.load=x", "checkpoint.weights_only=true"], ("auto", "x")),
    ("", ["checkpoint={load: x, weights_only: true}"], ("auto", "x")),
    ("{load: x, weights_only: true}", [], ("auto", "x")),
    ("{load: x, weights_only: true}", ["checkpoint.load=y"], ("auto", "y")),
    ("{load: x, weights_only: true}", ["checkpoint.weights_only=false"], ("x", None)),
    ("{load: x}", ["checkpoint.weights_only=true"], ("auto", "x")),
    ("{resume: x}", ["checkpoint.weights_only=true"], ("auto", "x")),
    ("{init_from: x}", ["checkpoint.load=y"], ("auto", "y")),
    ("{weights_only: false}", [], ("auto", None)),
    ("{load: x}", ["checkpoint.resume=y"], ("y", None)),
]


@pytest.mark.parametrize(("section", "overrides", "expected"), STARTS)
def test_the_old_pair_of_a_start(section, overrides, expected, tmp_path):
    file = file_of(
        tmp_path, f"model: olmo_hybrid_tiny\ncheckpoint: {section}\n" if section else "model: olmo_hybrid_tiny"
    )
    checkpoint = load_run(file, [*BASE, *overrides]).checkpoint
    assert (checkpoint.resume, checkpoint.init_from) == expected


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["precision={linear: fp8_delayed, fp8_recipe: delayed}"], "precision.linear", "remove precision.linear"),
        (["model={preset: olmo_hybrid_tiny, base_preset: olmo_hybrid_tiny}"], "model.preset", "model.base_preset"),
        (["checkpoint={load: x, resume: y}"], "checkpoint.load", "the old name of checkpoint.resume"),
        (["checkpoint.load=x", "checkpoint.init_from=y"], "checkpoint.load", "the old name of checkpoint.init_from"),
        (["checkpoint.weights_only=true"], "checkpoint.weights_only", "checkpoint.load is auto"),
        (["checkpoint.weights_only=1"], "checkpoint.weights_only", "1 is not true or false"),
        (["precision.linear=fp8_delayd"], "precision.fp8_recipe", "the nearest is delayed"),
        (["precision.attention=fp4"], "precision.fp8_attention", "'fp4' is not true or false"),
    ],
)
def test_old_names_do_not_hide_errors(overrides, field, words):
    with pytest.raises(ConfigError) as caught:
        load_run("olmo_hybrid_tiny", [*BASE, *overrides])
    assert [name for name, _ in caught.value.problems] == [field]
    assert words in str(caught.value)


def test_a_saved_configuration_is_renamed_silently(capsys):
    saved = {
        "model": {"layer_pattern": "G"},
        "precision": {"parts": "local", "linear": None, "attention": None, "cache_weights": True},
        "parallel": {"recompute": "none"},
        "checkpoint": {"load": "x", "weights_only": True, "interval": 3},
        "converted_from": {"load": 1},
    }
    assert rename_saved(saved) == {
        "model": {"layer_pattern": "G", "backend": "local"},
        "precision": {"fp8_recipe": None, "fp8_attention": False, "cache_fp8_weights": True},
        "parallel": {"recompute_granularity": "none"},
        "checkpoint": {"interval": 3, "resume": "auto", "init_from": "x"},
        "converted_from": {"load": 1},
    }
    assert "parts" in saved["precision"], "the argument is left as it is"
    assert rename_saved({"converted_from": {}}) == {"converted_from": {}}
    assert capsys.readouterr().err == ""


def test_only_the_first_rank_warns(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    load_run("olmo_hybrid_tiny", [*BASE, "parallel.recompute=full"])
    assert capsys.readouterr().err == ""
