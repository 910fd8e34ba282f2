"""YAML and overrides to a run, and back."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_hybrid.base import yaml_text
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config import presets
from megatron_hybrid.config.load import dump_run, load_run
from megatron_hybrid.config.run import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
BASE = [
    "run_dir=runs/x", "data.train=[{path: data/train}]", "data.sequence_length=8192", "train.steps=100",
    "train.global_batch_size=8",
]  # fmt: skip
NAMES = [(name, None) for name in presets.SIZED] + [(pure, of) for pure in presets.UNSIZED for of in presets.SIZED]


def load_text(folder: Path, text: str, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(text)
    return load_run(str(folder / "run.yaml"), overrides)


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(folder, text, *overrides)
    return str(caught.value).replace(str(folder) + "/", "")


def problem_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run("olmo_hybrid_tiny", [*BASE, *overrides])
    return str(caught.value)


# round trips


@pytest.mark.parametrize(("name", "of"), NAMES)
def test_every_preset_round_trips(name: str, of: str | None, tmp_path: Path) -> None:
    run = load_run(None, [*BASE, f"model.base_preset={name}", *([f"model.of={of}"] if of else [])])
    assert run.model == presets.preset(name, of)
    assert load_text(tmp_path, dump_run(run)) == run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    run = load_run(str(path))
    run.check_world({"pretrain_hybrid_tiny": 4}.get(path.stem, 64))
    assert load_text(tmp_path, dump_run(run)) == run


TEXTS = [
    "1e-5",
    "null",
    "true",
    "no",
    "yes",
    "12",
    "1:30",
    "0123",
    "2024-01-01",
    "~",
    "-",
    "a: b",
    "*x",
    "&x",
    "!x",
    "#x",
]
TEXTS += ["'", '"', "1_000", ".5", ".nan", "<<", "{a: b}", "[1", "a\nb", " padded ", "Grüße", "%d", "@x", "0x10", "+1"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_looks_like_something_else_round_trips(text: str, tmp_path: Path) -> None:
    run = load_run("olmo_hybrid_tiny", BASE).model_copy(update={"run_dir": text})
    assert load_text(tmp_path, dump_run(run)).run_dir == text


def test_floats_round_trip_exactly(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(20):
        lr = 10 ** draw.uniform(-30, 30)
        run = load_run("olmo_hybrid_tiny", [*BASE, f"train.optimizer.lr={lr!r}"])
        assert run.train.optimizer.lr == lr
        assert load_text(tmp_path, dump_run(run)) == run


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-2e+3", -2e3), ("1.5e3", 1500.0), ("1.", 1.0), (".5", 0.5), ("3.0", 3.0),
        ("1_000_000", 1000000), ("12", 12), ("-7", -7), ("0", 0), (".inf", float("inf")), ("-.inf", -float("inf")),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("off", "off"), ("0123", "0123"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("e5", "e5"),
        ('"1e-5"', "1e-5"), ("[1e-5, 2]", [1e-5, 2]), ("{a: {b: 1e3}}", {"a": {"b": 1e3}}), ("GGGA*2,GA", "GGGA*2,GA"),
    ],
)  # fmt: skip
def test_plain_values_are_read_as_people_write_them(text: str, value: object) -> None:
    read = yaml_text.read(text, "here")
    assert read == value and type(read) is type(value)


def test_pyyaml_alone_falls_into_the_trap() -> None:
    assert yaml.safe_load("1e-5") == "1e-5"  # else yaml_text's resolvers are needless


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "train.steps: is given twice, on lines 2 and 3 of run.yaml; keep one"),
        ("train: {}\nmodel: x\ntrain: {}\n", "train: is given twice, on lines 1 and 3 of run.yaml; keep one"),
        ("data: {train: [{path: a, path: b}]}", "data.train.0.path: is given twice, on lines 1 and 1"),
        ("run_dir: [a\n", "run.yaml: is not YAML: line 2, column 1"),
        ("train:\n\tsteps: 1\n", "indent with spaces, not tabs"),
        ("run_dir: *.npy\n", "put text that begins with * or & in quotes"),
        ("run_dir: a: b\n", "put text that holds ': ' in quotes"),
        ("run_dir: !!python/object/apply:os.system [true]\n", "write plain values, without !tags"),
        ("a: 1\n--- \nb: 2\n", "run.yaml: is not YAML"),
        ("- 1\n", "run.yaml: holds [1]; write sections"),
        ("just text", "run.yaml: holds 'just text'; write sections"),
        ("? [a]\n: b\n", "run.yaml: is not YAML"),
        ("1: b\nrun_dir: x\n", "1: a field's name must be text"),
        ("train: &a {steps: *a}\n", "is not a whole number; give one, 1 or more"),
        ("[" * 1500, "run.yaml: is nested too deeply"),
        ("steps: " + "9" * 5000, "run.yaml: holds a value that cannot be read"),
        ("run_dir: \x00", "run.yaml: is not YAML"),
        ("", "run_dir: is missing"),
    ],
)
def test_what_is_wrong_with_a_file(text: str, message: str, tmp_path: Path) -> None:
    assert message in problem(tmp_path, text)


def test_aliases_that_multiply_do_no_harm(tmp_path: Path) -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "a11: there is no such field" in problem(tmp_path, "\n".join([*layers, "run_dir: *a11", "model: *a11"]))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run_dir: Grüße".encode("latin-1"))
    for path, message in {
        tmp_path: "is a folder; give a YAML file, such as",
        tmp_path / "latin.yaml": "is not UTF-8 text",
        tmp_path / "none.yaml": "there is no such file, and no such preset; give a YAML file, or one of olmo_hybrid_7b",
        Path("olmo_hybrid_7"): "there is no such file, and no such preset; did you mean olmo_hybrid_7b?",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_run(str(path))


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "run_dir: r\nmodel: olmo_hybrid_tiny\ntrain: {steps: 9, global_batch_size: 1}\ndata:\n  sequence_length: 8\n"
    text += "  train:\n    - &a {path: a, weight: 2.0}\n    - {<<: *a, path: b}\n"
    assert [source.weight for source in load_text(tmp_path, text).data.train] == [2.0, 2.0]


# presets


def test_preset_by_name_and_with_changes(tmp_path: Path) -> None:
    rest = "run_dir: r\ntrain: {steps: 9, global_batch_size: 1}\ndata: {sequence_length: 8, train: [{path: a}]}\n"
    plain = load_text(tmp_path, "model: olmo_hybrid_7b\n" + rest)
    assert plain.model == presets.olmo_hybrid_7b()
    text = "model: {base_preset: olmo_hybrid_7b, layer_pattern: GGGA*4, gdn: {key_head_dim: 64}}\n" + rest
    changed = load_text(tmp_path, text).model
    assert changed.num_layers == 16
    assert changed.gdn is not None and (changed.gdn.key_head_dim, changed.gdn.value_head_dim) == (64, 192)
    assert changed.hidden_size == 3840
    pure = load_text(
        tmp_path, "model: {base_preset: pure_gdn, of: olmo_hybrid_7b, ffn_hidden_size: 512}\n" + rest
    ).model
    assert pure.layer_pattern == "G*32" and pure.ffn_hidden_size == 512


def test_overrides_of_a_preset(tmp_path: Path) -> None:
    tiny = load_run("olmo_hybrid_tiny", [*BASE, "model.gdn.value_head_dim=64", "model.gdn.dt_init_range.0=1e-2"])
    assert tiny.model.gdn is not None
    assert tiny.model.gdn.value_head_dim == 64 and tiny.model.gdn.dt_init_range == (0.01, 0.1)
    # the preset first, whatever the order
    assert load_run(None, [*BASE, "model.ffn_hidden_size=512", "model=olmo_hybrid_tiny"]).model.ffn_hidden_size == 512
    text = dump_run(load_run("olmo_hybrid_tiny", BASE))
    assert load_text(tmp_path, text, "model=olmo3_7b").model == presets.olmo3_7b()


# overrides


def test_overrides_of_every_kind(tmp_path: Path) -> None:
    run = load_run(
        str(EXAMPLES / "pretrain_hybrid_tiny.yaml"),
        [
            "train.optimizer.lr=1e-5", "train.optimizer.betas=[0.8, 0.9]", "train.optimizer.betas.1=0.99",
            "train.eval_interval=null", "data.train.0.weight=2", "data.train.1.path=more", "data.train.1.weight=3",
            "train.batch_ramp={start: 4, increment: 4, samples: 100}", "train.batch_ramp.samples=200",
            "--checkpoint.resume=none", "run_dir=runs/a=b", "parallel.pipeline_split=[3, 5]", "train.steps=1_000",
        ],
    )  # fmt: skip
    assert run.train.optimizer.lr == 1e-5 and run.train.optimizer.betas == (0.8, 0.99)
    assert run.train.eval_interval is None and run.train.steps == 1000
    assert [(s.path, s.weight) for s in run.data.train] == [("data/tiny_train", 2.0), ("more", 3.0)]
    assert run.train.batch_ramp is not None and run.train.batch_ramp.samples == 200
    assert run.checkpoint.resume == "none" and run.run_dir == "runs/a=b" and run.parallel.pipeline_split == (3, 5)


def test_an_entry_of_a_default_list_and_of_none() -> None:
    run = load_run("olmo_hybrid_tiny", [*BASE, "train.optimizer.betas.1=0.98", "data.validation.0.path=v"])
    assert run.train.optimizer.betas == (0.9, 0.98) and run.data.validation[""][0].path == "v"


def test_the_later_override_wins() -> None:
    assert load_run("olmo_hybrid_tiny", [*BASE, "train.steps=7", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "train.steps: is not an override; write section.key=value"),
        ("=5", "is not an override"),
        ("train..steps=5", "is not an override"),
        ("train.steps=", "train.steps: has no value; write train.steps=null for none, or train.steps='\"\"'"),
        ("run_dir.x=5", "run_dir: 'runs/x' has no field x; set run_dir as a whole"),
        ("data.train.2.path=a", "data.train.2: data.train has 1 entries; the next is data.train.1"),
        ("data.train.path=a", "data.train.path: data.train is a list; say which entry by its index: data.train.0.path"),
        ("data.train.0.path=*.npy", "data.train.0.path: is not YAML"),
        ("data.train.-1.path=a", "data.train is a list; say which entry"),
        ("train.optimizer={lr: 1, lr: 2}", "train.optimizer.lr: is given twice, on lines 1 and 1 of train"),
        ("train.0=5", "train.0: there is no such field"),
        ("model.layers.0=G", "model.layers: there is no such field; did you mean"),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    assert message in problem_of(override)


def test_a_run_is_data() -> None:
    run: Any = load_run("olmo_hybrid_tiny", BASE)
    assert RunConfig.model_validate_json(run.model_dump_json()) == run
    with pytest.raises(ValueError, match="frozen"):
        run.run_dir = "elsewhere"
