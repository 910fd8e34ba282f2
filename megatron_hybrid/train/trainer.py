"""The training loop: data in, engine steps, metrics and checkpoints out. Every rank runs it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.checkpoint.manager import CheckpointManager, complete_checkpoints, find_checkpoint
from megatron_hybrid.config.flops import training_flops_per_token
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.run_dir import check_run_dir
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.observe import RunLogger
from megatron_hybrid.observe.sinks import check_sinks
from megatron_hybrid.parallel.device import has_cuda
from megatron_hybrid.parallel.launch import Launch, start_distributed, stop_distributed
from megatron_hybrid.planner.memory import expected
from megatron_hybrid.train.engine import build_engine
from megatron_hybrid.train.interrupt import Interrupt
from megatron_hybrid.train.schedules import learning_rate
from megatron_hybrid.train.skip_step import SkipStep
from megatron_hybrid.train.start_checks import check_start, newest_step


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    samples: int = 0
    """Consumed; also the position in the data."""
    updates: int = 0
    """Steps that were not skipped."""


def pretrain(config: RunConfig, launch: Launch) -> Progress:
    """Train to config.train.steps, from the newest checkpoint if there is one. Returns where the run stands.

    SIGUSR1, SIGTERM or Ctrl-C on any rank ends it earlier, with a checkpoint of the step that it is in.

    Raises:
        ConfigError: degrees or batch sizes that do not fit the number of ranks.
        RunDirError: run_dir cannot be made or written.
        PreflightError, RestartError: nodes that are not ready; a job that restarts in vain.
        DataError, CheckpointError: before the first step, naming file and remedy.
    """
    config.check_world(launch.world_size)
    check_run_dir(config, launch.world_size)
    check_sinks(config.logging)
    with Interrupt(lambda: newest_step(Path(config.run_dir))) as interrupt:
        groups = start_distributed(launch, config.parallel, config.train.seed)
        try:
            check_start(config, launch)
            with Trainer(config, launch, groups) as trainer:
                progress = trainer.run(interrupt)
            dist.barrier()  # launchers end the other ranks as soon as one ends with a status: not before all have saved
            return progress
        finally:
            stop_distributed()


class Trainer:
    """One run on this rank: engine, data, checkpoints, metrics."""

    def __init__(self, config: RunConfig, launch: Launch, groups):
        self.config, self.launch, self.groups = config, launch, groups
        self.run_dir = Path(config.run_dir)
        train, data = config.train, config.data
        training, validation = self._open_data()
        self.engine = build_engine(config, groups)
        loader = dict(data_parallel_rank=groups.dp.rank(), data_parallel_size=groups.dp.size(), pin_memory=has_cuda())
        self.loader = BatchLoader(training, train.micro_batch_size, num_workers=data.num_workers, **loader)
        self.validation = (
            BatchLoader(validation, train.micro_batch_size, num_workers=0, **loader) if validation else None
        )

        self.skip = SkipStep(train.skip_step)
        self.progress = Progress()
        self.checkpoints = CheckpointManager(
            config.checkpoint,
            self.run_dir / "checkpoints",
            self.engine.collector(),
            config.model.model_dump(mode="json"),
            config.model_dump(mode="json"),
        )
        resumed = self._load()
        if launch.rank == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(dump_run(config))
        self.logger = RunLogger(
            config.logging,
            self.run_dir,
            launch.rank,
            total_steps=train.steps,
            start_step=self.progress.step,
            start_tokens=self.progress.samples * data.sequence_length,
            flops_per_token=training_flops_per_token(config.model, data.sequence_length),
            num_devices=launch.world_size,
            device_name=torch.cuda.get_device_name() if has_cuda() else None,
            settings=config.model_dump(mode="json"),
        )
        for line in self.engine.backends(train.micro_batch_size):
            self.logger.info(line)
        if has_cuda() and train.engine == "megatron":
            self.logger.info(expected(config, launch.world_size).line())
        self.logger.info(f"resumed from {resumed}" if resumed else "started from initial weights")

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception) -> None:
        self.loader.close()
        self.logger.__exit__(*exception)
        self.checkpoints.close()
        if exception[0] is None:  # else its GPU may not answer any more
            self.engine.close()

    def _open_data(self):
        """Rank 0 checks the files first; the others find its verdicts."""
        config, first = self.config, self.launch.rank == 0
        if not first:
            dist.barrier()
        opened = build_train_and_validation(config.data, config.model.vocab_size, self.run_dir)
        if first:
            dist.barrier()
        return opened

    def run(self, interrupt: Interrupt | None = None) -> Progress:
        """The loop. Where an interrupt is handed in and the ranks agree that it was asked for, it ends with a save."""
        train, save = self.config.train, self.config.checkpoint
        stop = False
        while self.progress.step < train.steps and not stop:
            if interrupt is not None:
                interrupt.begin_step(self.progress.step)
            self.step()
            step = self.progress.step
            if train.eval_interval and (step % train.eval_interval == 0 or step == train.steps):
                self.evaluate()
            stop = interrupt is not None and interrupt.agreed(step)
            if stop or (save.interval and step % save.interval == 0) or step == train.steps:
                self.save()
            self.checkpoints.check()
        if interrupt is not None:
            interrupt.settle()
        if stop and self.progress.step < train.steps:
            self.checkpoints.close()
            self.logger.info(f"asked to stop: saved step {self.progress.step} of {train.steps}; run it again to go on")
        return self.progress

    def step(self) -> None:
        """One global batch: gradients, then an update unless it is to be skipped."""
        config, progress = self.config, self.progress
        batch_size = config.train.batch_size_at(progress.samples)
        batches = list(self.loader.global_batch(progress.samples, batch_size))
        losses = self.engine.forward_backward(batches)
        norm = self.engine.gradient_norm()

        progress.step += 1
        progress.samples += batch_size
        lr = learning_rate(progress.step, config.train)
        skipped = self.skip.should_skip(losses.loss, norm)
        if skipped is None:
            self.engine.update(lr, norm)
            progress.updates += 1
        self.logger.log_step(
            progress.step,
            {
                "loss": losses.loss,
                "z_loss": losses.z_loss,
                "grad_norm": norm,
                "lr": lr,
                "batch_size": batch_size,
                "tokens": progress.samples * config.data.sequence_length,
                "skipped": skipped,
            },
        )

    def evaluate(self) -> float:
        """Mean loss over the first `eval_batches` global batches of the validation data, the same ones every time."""
        assert self.validation is not None
        size = self.config.train.global_batch_size
        with self.logger.pause():
            losses = [
                self.engine.evaluate(list(self.validation.global_batch(number * size, size))).loss
                for number in range(self.config.train.eval_batches)
            ]
        loss = sum(losses) / len(losses)
        self.logger.log_eval(self.progress.step, loss)
        return loss

    def save(self) -> None:
        """A checkpoint of this step."""
        state: dict[str, Any] = asdict(self.progress) | {
            "skip_step": self.skip.state_dict(),
            "world_size": self.launch.world_size,
        }
        with self.logger.pause():
            self.checkpoints.save(self.progress.step, state, _random_state())

    def _load(self) -> Path | None:
        """Resume this run; else start from the checkpoint it names; else from initial weights."""
        load, root = self.config.checkpoint.load, self.run_dir / "checkpoints"
        mine = complete_checkpoints(root)
        folder = mine[-1] if mine and load != "none" else find_checkpoint(load, root)
        if folder is None:
            return None
        state, local = self.checkpoints.load(folder, self.config.checkpoint.weights_only and folder not in mine)
        if state:
            self.progress = Progress(state["step"], state["samples"], state["updates"])
            self.engine.optimizer.set_updates(self.progress.updates)
            self.skip.load_state_dict(state["skip_step"])
        if local:
            _set_random_state(local)
        return folder


def _random_state() -> dict[str, torch.Tensor]:
    state = {"rng.cpu": torch.get_rng_state()}
    return state | {"rng.cuda": torch.cuda.get_rng_state()} if has_cuda() else state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["rng.cpu"])
    if has_cuda() and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"])
