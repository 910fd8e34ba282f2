"""Command lines of all commands: options and overrides in any order; errors name the nearest option and end with status 78."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_hybrid.base import nearest, yaml_text
from megatron_hybrid.base.errors import BAD_INPUT, ConfigError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.translate import fields_called

_OVERRIDE = re.compile(rf"--((?:\w+\.[\w.]+|{'|'.join(RunConfig.model_fields)}))(=|\Z)", re.ASCII)
"""An override written as an option: `--section.key=value`, or `--section.key` before its value."""
_ASSIGNMENT = re.compile(r"[\w.-]+=", re.ASCII)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that adds an option's default to its help text, unless the text mentions one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help, action.default
        if not action.option_strings or value is None or value is False or value == [] or value == argparse.SUPPRESS:
            return text
        return text if text is None or "default" in text else f"{text} (default: %(default)s)"


class CommandLine(argparse.ArgumentParser):
    """Argument parser with strict options.

    Options may come before, between and after positional arguments. They cannot be abbreviated, so that a misspelt option does not
    become another. A wrong command line ends with status 78, like any other wrong input.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line, with options and positional arguments in any order."""
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit."""
        self.print_usage(sys.stderr)
        unknown = re.search(r"unrecognized arguments: (-[^\s=]+)", message)
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}{self.hint(unknown[1]) if unknown else ''}\n")

    def hint(self, unknown: str) -> str:
        """Return a suggestion for an unknown option."""
        found = nearest.word(unknown, self._option_string_actions, cutoff=0.6)
        return f"; did you mean {found}?" if found else f"; options are listed by {self.prog} --help"


class RunCommandLine(CommandLine):
    """Command line of a command that takes a run: a YAML file and overrides.

    Args:
        config: help of the file.
    """

    def __init__(self, description: str | None, config: str = "a YAML file, or the name of a model preset") -> None:
        super().__init__(description)
        self.add_argument("config", help=config)
        self.add_argument(
            "overrides",
            nargs="*",
            default=[],
            metavar="section.key=value",
            help="replace fields of the file; --section.key=value and --section.key value are the same",
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line. Overrides may be written as options, and may precede the file."""
        found = super().parse(self._as_assignments(sys.argv[1:] if argv is None else argv))
        given = [found.config, *found.overrides]
        found.config = next(
            (word for word in given if not _ASSIGNMENT.match(word) or Path(word).is_file()), found.config
        )
        given.remove(found.config)
        found.overrides = given
        return found

    def _as_assignments(self, words: Sequence[str]) -> list[str]:
        """Return the words with `--section.key=value` and `--section.key value` as `section.key=value`."""
        result, remaining = list[str](), iter(words)
        for word in remaining:
            found = _OVERRIDE.match(word)
            if found is None:
                result.append(word)
            elif found[2]:
                result.append(word.removeprefix("--"))
            else:
                result.append(f"{found[1]}={self._value(found[1], next(remaining, None))}")
        return result

    def _value(self, field: str, word: str | None) -> str:
        """Return the word after `--section.key`, unless it is an option or an override itself."""
        if word is None or word.startswith("--") or _ASSIGNMENT.match(word):
            self.error(f"--{field} has no value; give it as --{field}=value")
        return word

    def hint(self, unknown: str) -> str:
        """Return a suggestion for an unknown option, which may be a configuration field."""
        name = unknown.lstrip("-")
        paths = [name] if "." in name else fields_called(name.replace("-", "_"), RunConfig)
        if paths:
            return f"; fields are set by section.key=value: {' or '.join(f'{path}=...' for path in paths)}"
        return super().hint(unknown)


def check_output_file(option: str, path: Path | str | None) -> None:
    """Check that a result file can be written, before the work begins.

    Raises:
        ConfigError: the path is a folder, its folder does not exist, or it is not writable.
    """
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise ConfigError.at(option, f"{path} is a folder; give the name of a file, such as {path / 'result.yaml'}")
    try:
        existed = path.exists()
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    except FileNotFoundError:
        raise ConfigError.at(option, f"{path}: the folder {path.parent} does not exist; make it first") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError.at(option, f"{path} cannot be written ({reason}); give another file") from None


def read_yaml(option: str, path: Path) -> object:
    """Read a YAML file given on the command line.

    Raises:
        ConfigError: the file does not exist, is a folder, is not readable, or is not UTF-8 text; or as `yaml_text.read`.
    """
    try:
        return yaml_text.read_file(path, str(path))
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError.at(option, f"{path} is not UTF-8 text (byte {error.start}); give a text file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError.at(
            option, f"{path} cannot be read ({reason}); give a file that exists and may be read"
        ) from None
