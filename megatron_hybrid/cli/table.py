"""Table of all commands. It imports none of them, so that `megatron-hybrid --help` answers at once."""

from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A command: its module, the line that the overview shows, and whether it handles requests to stop."""

    module: str
    summary: str
    stops_gracefully: bool = False
    """Requests to stop stay pending from the first moment until the command has a handler for them."""


COMMANDS = {
    "preprocess": Command("preprocess", "tokenize text files, JSON lines, Parquet or source code for training"),
    "check-data": Command("check_data", "check all tokens and indexes of a run before it takes GPUs"),
    "plan": Command("plan", "rank parallel layouts of a training job by predicted step time and memory"),
    "calibrate": Command("calibrate", "measure the rates of a GPU or a node for `plan`"),
    "launch": Command("launch", "start a command on this node's ranks, one per GPU", stops_gracefully=True),
    "preflight": Command("preflight", "check the nodes of a run before it starts", stops_gracefully=True),
    "pretrain": Command("pretrain", "train a model", stops_gracefully=True),
    "run-stages": Command("run_stages", "run the stages of a recipe in order, here or as SLURM jobs"),
    "plot": Command("plot", "draw the loss of one or several runs"),
    "generate": Command("generate", "continue prompts"),
    "evaluate": Command("evaluate", "print loss, perplexity and bits per byte over data sets"),
    "evaluate-tasks": Command("evaluate_tasks", "run downstream tasks"),
    "make-tasks": Command("make_tasks", "write tasks for `evaluate-tasks`"),
    "average": Command("average", "average checkpoints"),
    "verify": Command("verify", "verify a checkpoint: hashes, completeness, finite values"),
    "convert from-hf": Command("convert_from_hf", "convert a Hugging Face folder to a checkpoint"),
    "convert to-hf": Command("convert_to_hf", "convert a checkpoint to a Hugging Face folder"),
    "convert from-olmo-core": Command("convert_from_olmo_core", "convert an OLMo-core checkpoint to a checkpoint"),
}


def find_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the name of the command that a command line begins with and the remaining words, or None."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name, list(words[count:])
    return None

