"""Jobs of tests/train/test_stages.py."""

import torch

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.train.data_check import open_data
from megatron_hybrid.train.progress import Progress
from megatron_hybrid.train.setup import build_loader
from megatron_hybrid.train.trainer import Trainer
from testing import jobs


def both_stages_at_once(first: dict, second: dict) -> dict:
    """Run the first stage, then change data, schedule and batch size of the living run to those of the second, and run on."""
    one, two = RunConfig(**first), RunConfig(**second)
    groups = start_distributed(Launch.from_environment(), one.parallel, one.train.seed)
    with Trainer(one, Launch.from_environment(), groups) as trainer:
        trainer.run()
        trainer.loader.close()
        trainer.config, trainer.callbacks = two, []
        trainer.progress = Progress(updates=trainer.progress.updates)
        trainer.loader = build_loader(two, groups, open_data(two)[0], num_workers=0)
        losses = [trainer.step().losses.loss for _ in range(two.train.steps)]
        return {"losses": losses, "updates": trainer.engine.optimizer.updates} | jobs.everything(trainer.engine)


def second_stage(config: dict) -> dict:
    """Run a stage and return what `both_stages_at_once` returns, and the first values of torch's random numbers."""
    run = RunConfig(**config)
    groups = start_distributed(Launch.from_environment(), run.parallel, run.train.seed)
    with Trainer(run, Launch.from_environment(), groups) as trainer:
        random = torch.rand(4)
        losses = [trainer.step().losses.loss for _ in range(run.train.steps)]
        known = {"losses": losses, "updates": trainer.engine.optimizer.updates, "random": random}
        return known | {"changes": trainer.changes} | jobs.everything(trainer.engine)
