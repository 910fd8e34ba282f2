"""Jobs of test_generated_runs.py, which run on ranks."""

from pathlib import Path

from megatron_hybrid.distributed.process_groups import leave_groups
from testing.jobs import pretrain_run


def in_one_and_in_two_starts(config: dict, stopped_at: int) -> tuple[dict, dict]:
    """Train without a stop; then, in the folder `stopped`, up to a step and on from there. Return the results of both."""
    whole = pretrain_run(config)
    stopped = config | {"run_dir": str(Path(config["run_dir"]).with_name("stopped"))}
    for steps in (stopped_at, config["train"]["steps"]):
        leave_groups()
        result = pretrain_run(stopped | {"train": config["train"] | {"steps": steps}})
    return whole, result
