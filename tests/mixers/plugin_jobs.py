"""What ranks run for test_plugin.py."""

import sys

from megatron_hybrid.base.errors import UserError
from testing import jobs


def train(folder: str, config: dict) -> dict:
    """Train with packages of `folder`; return the losses of this rank's metrics and the names of its parameters."""
    sys.path.insert(0, folder)
    found = jobs.pretrain_run(config)
    return {"progress": found["progress"], "parameters": found["parameters"]}


def refusal(folder: str, config: dict) -> str:
    """Return the error that a run ends with."""
    try:
        train(folder, config)
    except UserError as error:
        return str(error)
    return "none"
