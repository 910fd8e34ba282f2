"""Options that several commands have. They load a checkpoint of any kind."""

import argparse

from megatron_hybrid.base.numbers import non_negative


def add_checkpoint(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the positional argument that names what `inference.load` loads."""
    parser.add_argument(name, help="a run (its newest checkpoint), a checkpoint or a Hugging Face folder")


def add_eos_token_id(parser: argparse.ArgumentParser) -> None:
    """Add --eos-token-id, for Hugging Face folders that list several tokens or none."""
    parser.add_argument("--eos-token-id", type=non_negative, help="token that ends a document (default: config.json's)")


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Add --plugin, whose values are in `plugin`."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module of the run's plugins first; may be repeated",
    )
