"""Functions that the tests of interruptions run on ranks."""

import os
import signal
from pathlib import Path

import torch.distributed as dist

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.train.callbacks.base import StepOutcome
from megatron_hybrid.train.interrupt import Interrupt
from megatron_hybrid.train.trainer import Trainer, pretrain


def votes(asked: int | None, at: int, steps: int = 6) -> dict:
    """The answers of `steps` calls, where rank `asked` is signalled before call `at`."""
    before = signal.getsignal(signal.SIGUSR1)
    with Interrupt() as interrupt:
        answers = []
        for step in range(steps):
            if dist.get_rank() == asked and step == at:
                os.kill(os.getpid(), signal.SIGUSR1)
            answers.append(interrupt.agreed())
        interrupt.settle()
    return {"answers": answers, "restored": signal.getsignal(signal.SIGUSR1) == before}


def interrupted(config: dict, signum: int, at: int, rank: int) -> dict:
    """tools/pretrain.py's run; the rank is signalled in its step `at`. Where the run stands, and what is on disk then."""
    run = RunConfig(**config)
    step = Trainer.step

    def signalled(self: Trainer) -> StepOutcome:
        outcome = step(self)
        if self.progress.step == at and dist.get_rank() == rank:
            os.kill(os.getpid(), signum)
        return outcome

    Trainer.step = signalled
    progress = pretrain(run, Launch.from_environment())
    saved = sorted(p.name for p in Path(run.run_dir, "checkpoints").glob("*"))
    return {"step": progress.step, "saved": saved}
