"""Command lines: any order, no abbreviations, status 78, and hints that name the nearest option or field."""

import itertools

import pytest

from megatron_hybrid.base.errors import BAD_INPUT, ConfigError
from megatron_hybrid.base.numbers import non_negative, positive
from megatron_hybrid.config.command_line import CommandLine, RunCommandLine, check_output_file


@pytest.fixture
def parser():
    parser = RunCommandLine("A tool.")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=positive)
    return parser


@pytest.mark.parametrize(
    "words", list(itertools.permutations([["c.yaml"], ["a.b=1"], ["--dry-run"], ["--world-size", "4"]]))
)
def test_any_order(parser, words):
    found = parser.parse(sum(words, []))
    assert (found.config, found.overrides, found.dry_run, found.world_size) == ("c.yaml", ["a.b=1"], True, 4)


def test_overrides_may_look_like_options(parser):
    overrides = ["train.steps=4", "run_dir=/x", "train.optimizer.lr=-1", "data.train.0.path=--x"]
    found = parser.parse(
        ["--" + overrides[0], "c.yaml", "--" + overrides[1], overrides[2], "--dry-run", "--" + overrides[3]]
    )
    assert (found.config, found.overrides, found.dry_run) == ("c.yaml", overrides, True)


def test_a_file_whose_name_looks_like_an_override(parser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yaml").write_text("")
    assert parser.parse(["a.b=1", "lr=1.yaml"]).config == "lr=1.yaml"
    assert parser.parse(["runs/lr=1/c.yaml", "a.b=1"]).config == "runs/lr=1/c.yaml"
    assert parser.parse(["a.b=1"]).config == "a.b=1", "of which load_run says that there is no such file"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["c", "--dryrun"], "unrecognized arguments: --dryrun; did you mean --dry-run?"),
        (["c", "--dry"], "unrecognized arguments: --dry; did you mean --dry-run?"),
        (["c", "--world-siz=4"], "did you mean --world-size?"),
        (["c", "--steps=4"], "fields are set by section.key=value: train.steps=..."),
        (["c", "--global-batch-size", "4"], "fields are set by section.key=value: train.global_batch_size=..."),
        (["c", "--lr=1"], "fields are set by section.key=value: train.optimizer.lr=..."),
        (["c", "--zzz"], "options are listed by"),
        (["c", "--world-size", "0"], "argument --world-size: 0 is out of range; give at least 1"),
        (["c", "--world-size", "-3"], "argument --world-size: -3 is out of range"),
        (["c", "--world-size", "x"], "argument --world-size: 'x' is not a whole number"),
        ([], "the following arguments are required: config"),
    ],
)
def test_a_wrong_command_line_ends_with_78(parser, capsys, words, says):
    with pytest.raises(SystemExit) as ended:
        parser.parse(words)
    printed = capsys.readouterr()
    assert ended.value.code == BAD_INPUT and says in printed.err and printed.out == ""


def test_several_values_and_a_number_of_zero():
    parser = CommandLine(None)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--include", nargs="+", action="extend", default=[])
    parser.add_argument("--workers", type=non_negative)
    found = parser.parse(["a", "--include", "x", "--workers", "0", "b", "--include", "y", "z"])
    assert (found.inputs, found.include, found.workers) == (["a", "b"], ["x", "y", "z"], 0)


def test_output_files(tmp_path):
    check_output_file("--output", None)
    check_output_file("--output", tmp_path / "new.yaml")
    (tmp_path / "old.yaml").write_text("kept")
    check_output_file("--output", tmp_path / "old.yaml")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["kept"], "nothing is made, nothing is changed"
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "does not exist; make it"),
        (tmp_path / "old.yaml" / "x", "Not a"),
    ):
        with pytest.raises(ConfigError, match=f"--output: .*{says}"):
            check_output_file("--output", path)
