"""tools/run_stages.py on a SLURM cluster: jobs that depend on each other, and a killed stage that is submitted again."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_hybrid.checkpoint.folders import complete_checkpoints
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.cli.average import main as average
from testing import jobs
from testing.slurm_cluster import Slowed
from tests.slurm.conftest import SCRIPT

STEPS, LATER = 50, 3  # the first stage must not end before it is killed, and is slowed once it trains
SECOND = ["data.seed=7", f"train.steps={LATER}"]
STAGES = [
    {"name": "first", "config": "config.yaml"},
    {"name": "second", "config": "config.yaml", "overrides": SECOND, "from": "first", "take": "moments"},
    {"name": "last", "config": "config.yaml", "overrides": SECOND, "from": "average(first, second)"},
]
ITEMS = ["first", "second", "average-first-second", "last"]


@pytest.fixture
def submit(example, cluster):
    """Return a function that submits the stages and returns the job numbers by their names."""
    example.config |= {"parallel": {}, "checkpoint": {"interval": 2}}
    example.config["train"]["steps"] = STEPS
    slurm = {"script": SCRIPT, "options": ["--nodes=1"]}
    file = example.folder / "stages.yaml"
    file.write_text(yaml.safe_dump({"folder": str(example.folder / "stages"), "stages": STAGES, "slurm": slurm}))
    variables = example.variables(CPU_RANKS="1", NODES="1")
    variables.pop("CONFIG")  # the stages set it

    def run() -> dict[str, str]:
        done = cluster.run(sys.executable, example.root / "tools/run_stages.py", file, "--slurm", **variables)
        assert done.returncode == 0, done.stderr
        return dict(line.split(": job ") for line in done.stdout.splitlines())

    return run


def undisturbed(config: dict, folder: Path, ranks) -> dict[str, Path]:
    """Run the same stages in this process and return the last checkpoint of each."""
    last: dict[str, Path] = {}
    starts = {"first": {}, "second": {"take": "moments"}, "last": {"take": "weights"}}
    for name, take in starts.items():
        run = copy.deepcopy(config) | {"run_dir": str(folder / name)}
        if take:
            run["data"]["seed"], run["train"]["steps"] = 7, LATER
            run["checkpoint"] |= take | {"init_from": str(last["first" if name == "second" else "average"])}
        ranks.run(jobs.pretrain_run, 1, config=run)
        last[name] = complete_checkpoints(folder / name / "checkpoints")[-1]
        if name == "second":
            last["average"] = folder / "average"
            assert average([str(last["first"]), str(last["second"]), "--out", str(last["average"]), "--quiet"]) == 0
    return last


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name) for name in reader.index.tensors}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_stage_is_submitted_again_and_the_stages_end_with_the_same_values(submit, example, cluster, ranks):
    first_try, stages = submit(), example.folder / "stages"
    assert list(first_try) == ITEMS
    for name, needed in (("second", ["first"]), ("average-first-second", ["first", "second"]), ("last", [ITEMS[2]])):
        dependency = cluster.job(first_try[name])["Dependency"]
        assert [word.partition("(")[0] for word in dependency.split(",")] == [f"afterok:{first_try[n]}" for n in needed]
    example.wait_for(lambda: example.metrics(stages / "first"), "a step", 150)
    with Slowed(str(example.folder)):
        example.wait_for(lambda: complete_checkpoints(stages / "first" / "checkpoints"), "a checkpoint", 150)
        cluster.output("scancel", "--signal=KILL", f"{first_try['first']}.0")  # its step alone: the job fails
    assert example.wait_for_end(first_try["first"], 60)["JobState"] == "FAILED", example.log()
    for name in ITEMS[1:]:
        assert example.wait_for_end(first_try[name], 90)["JobState"] == "CANCELLED", "its input will never be there"
    (stopped,) = complete_checkpoints(stages / "first" / "checkpoints")[-1:]
    assert stopped.name < f"step-{STEPS:08d}"

    second_try = submit()
    assert list(second_try) == ITEMS and not set(first_try.values()) & set(second_try.values())
    for name in ITEMS:
        assert example.wait_for_end(second_try[name], 240)["JobState"] == "COMPLETED", example.log()
    assert f"resumed from {stopped}" in example.log()
    assert submit() == {}, "all stages are done"

    expected = undisturbed(example.config, example.folder / "straight", ranks)
    for name in ("first", "second", "last"):
        found = tensors(stages / name / "checkpoints" / expected[name].name)
        assert found.keys() == tensors(expected[name]).keys()
        assert all(torch.equal(found[key], value) for key, value in tensors(expected[name]).items()), name
