"""Callback that reports the memory that the planner predicts. The only file of `train` that imports the planner."""

from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.planner.memory import expected
from megatron_hybrid.train.callbacks.base import Callback, Run


class ExpectedMemory(Callback):
    """Prints the planner's prediction of peak GPU memory at the start of a run.

    Writes one line to the console, on GPUs only. Do not use it with DeepSpeed's engine, whose memory the planner does not
    predict.
    """

    def start(self, run: Run) -> None:
        if has_cuda():
            run.logger.info(expected(run.config, run.launch.world_size).line())
