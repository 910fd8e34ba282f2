"""`megatron-hybrid COMMAND`: its table of commands, what `--help` says, and wrong command lines."""

import argparse
import re
import subprocess
import sys
from importlib import import_module

import pytest

from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.cli import main as command_line
from megatron_hybrid.cli.table import COMMANDS, find_command
from megatron_hybrid.config.command_line import RunCommandLine


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*words)`: status, stdout and stderr of the command line, called in this process."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megatron-hybrid", *words])
        try:
            status = command_line.main()
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return call


class Parsed(Exception):
    """Ends a command once its parser is complete."""


@pytest.fixture
def parser_of(monkeypatch):
    """`parser_of(name)`: the argument parser of a command."""

    def build(name: str) -> argparse.ArgumentParser:
        found = []

        def stop(parser, *_):
            found.append(parser)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args", stop)
        monkeypatch.setattr("megatron_hybrid.launch.stop_signals.watch", lambda: None)
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(Parsed):
            import_module(f"megatron_hybrid.cli.{COMMANDS[name].module}").main()
        return found[0]

    return build


def test_the_overview_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0 and all(f"  {name} " in out and command.summary in out for name, command in COMMANDS.items())
    status, out, _ = run("convert", "--help")
    assert status == 0 and "convert to-hf" in out and "pretrain" not in out
    assert run("--version")[1].startswith("megatron-hybrid ")


def test_every_module_of_the_folder_is_a_command(root):
    modules = {path.stem for path in (root / "megatron_hybrid" / "cli").glob("*.py")}
    assert modules - {"__init__", "__main__", "main", "table"} == {command.module for command in COMMANDS.values()}


def test_every_tool_is_a_command(root):
    modules = {command.module for command in COMMANDS.values()}
    for tool in (root / "tools").glob("*.py"):
        (module,) = re.findall(r"^from megatron_hybrid\.cli\.(\w+) import main$", tool.read_text(), re.MULTILINE)
        assert module in modules


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described_with_its_default(name, parser_of):
    parser = parser_of(name)
    assert len(parser.description.splitlines()) >= 3, "the description says what the command does and how it ends"
    formatter = parser._get_formatter()
    for action in parser._actions:
        text = formatter._expand_help(action) if action.help else ""
        assert text, f"{action.dest} has no help text"
        takes_value = action.option_strings and action.nargs != 0
        if takes_value and not action.required and "may be repeated" not in text:
            assert "default" in text, f"{action.option_strings[0]} does not say its default: {text}"


def test_wrong_commands_end_with_the_nearest(run):
    status, _, err = run("pretrian")
    assert status == BAD_INPUT and "did you mean pretrain?" in err
    status, _, err = run("convert", "to-hff")
    assert status == BAD_INPUT and "convert to-hff: no such command; did you mean convert to-hf?" in err
    status, _, err = run()
    assert status == BAD_INPUT and "usage: megatron-hybrid COMMAND" in err


def test_the_name_of_the_command_begins_its_messages(run, tmp_path):
    status, _, err = run("plot", str(tmp_path / "none"))
    assert (
        status == BAD_INPUT and err.startswith("megatron-hybrid plot: ") and "metrics" not in err.partition("give")[0]
    )


def test_two_words_name_one_command():
    assert find_command(["convert", "to-hf", "a", "b"]) == ("convert to-hf", ["a", "b"])
    assert find_command(["convert", "a"]) is None and find_command([]) is None


def test_help_imports_neither_torch_nor_pydantic():
    program = (
        "import sys; from megatron_hybrid.cli.main import main; main(['--help']); "
        "sys.exit(bool({'torch', 'pydantic', 'rich'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ("run.yaml", "train.steps=5", "model.hidden_size=8"),
        ("--train.steps=5", "run.yaml", "--model.hidden_size=8"),
        ("--train.steps", "5", "--model.hidden_size", "8", "run.yaml"),
        ("train.steps=5", "--model.hidden_size", "8", "run.yaml"),
    ],
)
def test_overrides_are_written_in_any_order_and_as_options(words):
    found = RunCommandLine(None).parse(words)
    assert found.config == "run.yaml" and found.overrides == ["train.steps=5", "model.hidden_size=8"]


@pytest.mark.parametrize("after", [[], ["--dry-run"], ["train.lr=1"]])
def test_an_option_that_lacks_its_value_is_an_error(after, capsys):
    with pytest.raises(SystemExit) as stopped:
        RunCommandLine(None).parse(["run.yaml", "--train.steps", *after])
    assert stopped.value.code == BAD_INPUT and "--train.steps has no value" in capsys.readouterr().err


def test_a_negative_number_is_a_value():
    assert RunCommandLine(None).parse(["run.yaml", "--train.z_loss", "-1"]).overrides == ["train.z_loss=-1"]
