"""Jobs of test_stages.py and test_sequence_ramp.py."""

import numpy as np
import torch

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.train.data_check import open_data
from megatron_hybrid.train.engines.build import build_engine
from megatron_hybrid.train.progress import Progress
from megatron_hybrid.train.schedules import learning_rate
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


def split_by_hand(config: dict, lengths: list[int]) -> list[float]:
    """Train one step per length on samples that are split into sequences of that length, and return the losses."""
    run = RunConfig(**config)
    groups = start_distributed(Launch.from_environment(), run.parallel, run.train.seed)
    engine, (data, _) = build_engine(run, groups), open_data(run)
    losses, size = [], run.train.global_batch_size
    for step, length in enumerate(lengths):
        samples = np.stack([data.sample(step * size + i) for i in range(size)])
        tokens, labels = (torch.from_numpy(x.reshape(-1, length)) for x in (samples[:, :-1], samples[:, 1:]))
        losses.append(engine.forward_backward([Batch(tokens, labels, torch.ones(tokens.shape))])().loss)
        engine.update(learning_rate(step + 1, run.train), engine.gradient_norm())
    return losses
