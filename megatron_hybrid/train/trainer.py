"""The training loop: data in, engine steps, metrics and checkpoints out. Every rank runs it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.arch.flops import training_flops_per_token
from megatron_hybrid.checkpoint.folders import complete_checkpoints
from megatron_hybrid.checkpoint.format import read_index
from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.run_dir import check_run_dir
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.fingerprint import data_identity
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.distributed.process_groups import stop_distributed
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.observe import RunLogger
from megatron_hybrid.observe.sinks import check_sinks
from megatron_hybrid.planner.memory import expected
from megatron_hybrid.train.data_check import open_data
from megatron_hybrid.train.engines.megatron import build_engine
from megatron_hybrid.train.interrupt import Interrupt
from megatron_hybrid.train.schedules import learning_rate
from megatron_hybrid.train.skip_step import SkipStep
from megatron_hybrid.train.start import check_start_point, choose_start, set_later_aside
from megatron_hybrid.train.start_checks import check_start, newest_step, on_first_rank, run_folder


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    samples: int = 0
    """Consumed; also the position in the data."""
    tokens: int = 0
    """Consumed, each sample counted with the sequence length that it had."""
    updates: int = 0
    """Steps that were not skipped."""


def pretrain(config: RunConfig, launch: Launch) -> Progress:
    """Train to config.train.steps, from the newest checkpoint if there is one. Returns where the run stands.

    SIGUSR1, SIGTERM or Ctrl-C on any rank ends it earlier, with a checkpoint of the step that it is in.

    Raises:
        ConfigError: degrees or batch sizes that do not fit the number of ranks.
        PreflightError, RestartError: nodes that are not ready; a job that restarts without progress.
        RunDirError: run_dir cannot be made or written.
        RunFolderError: another run uses the folder, or has used it; or nothing is left to train.
        DataError, CheckpointError: before the first step, naming file and remedy.
        DivergedError: loss or gradient norm stayed non-finite for too many steps.
    """
    config.check_world(launch.world_size)
    check_run_dir(config, launch.world_size)
    check_sinks(config.logging)
    with Interrupt(lambda: newest_step(Path(config.run_dir))) as interrupt:
        groups = start_distributed(launch, config.parallel, config.train.seed)
        try:
            with run_folder(Path(config.run_dir)):
                check_start(config, launch)
                with Trainer(config, launch, groups) as trainer:
                    progress = trainer.run(interrupt)
                dist.barrier()  # launchers end all ranks as soon as one ends with a status: not before all have saved
            return progress
        finally:
            stop_distributed()


class Trainer:
    """One run on this rank: engine, data, checkpoints, metrics."""

    def __init__(self, config: RunConfig, launch: Launch, groups):
        self.config, self.launch, self.groups = config, launch, groups
        self.run_dir = Path(config.run_dir)
        train, data = config.train, config.data
        self.start = on_first_rank(lambda: choose_start(config))
        training, validation = open_data(config)
        self.data_identity, changes = on_first_rank(lambda: self._compare(training))
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
            config.model.architecture(),
            config.model_dump(mode="json"),
        )
        self._load()
        set_aside = None
        if launch.rank == 0:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self.start.kind == "rewind":
                assert self.start.folder is not None
                set_aside = set_later_aside(self.run_dir, self.start.folder)
            (self.run_dir / "config.yaml").write_text(dump_run(config))
        if self.start.continues:
            self.checkpoints.own = complete_checkpoints(self.checkpoints.root)
        self.logger = RunLogger(
            config.logging,
            self.run_dir,
            launch.rank,
            total_steps=train.steps,
            start_step=self.progress.step,
            start_tokens=self.progress.tokens,
            flops_per_token=training_flops_per_token(config.model, data.sequence_length),
            num_devices=launch.world_size,
            device_name=torch.cuda.get_device_name() if has_cuda() else None,
            settings=config.model_dump(mode="json"),
            continues=self.start.kind == "resume",
        )
        for line in self.engine.backends(train.micro_batch_size):
            self.logger.info(line)
        if has_cuda() and train.engine == "megatron":
            self.logger.info(expected(config, launch.world_size).line())
        for line in (*changes, str(self.start)):
            self.logger.info(line)
        if set_aside:
            self.logger.info(
                f"later checkpoints and a copy of the metrics are in {set_aside}; remove it to free the space"
            )

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception) -> None:
        self.loader.close()
        self.logger.__exit__(*exception)
        self.checkpoints.close()
        if exception[0] is None:  # else its GPU may not answer any more
            self.engine.close()

    def _compare(self, training: Blend) -> tuple[dict[str, Any], list[str]]:
        """Identity of this run's data, and a line for each change since the run that saved the checkpoint."""
        identity = data_identity(training, self.config.data.seed)
        return identity, check_start_point(self.config, self.start, identity)

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
        progress.tokens += batch_size * config.data.sequence_length
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
                "tokens": progress.tokens,
                "skipped": skipped,
            },
        )
        self.skip.check(progress.step)

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
            "data": self.data_identity,
        }
        with self.logger.pause():
            self.checkpoints.save(self.progress.step, state, _random_state())

    def _load(self) -> None:
        """Load what the run starts from."""
        if self.start.folder is None:
            return
        state, local = self.checkpoints.load(self.start.folder, self.start.weights_only)
        if state:
            if "tokens" not in state:  # saved by an earlier version
                data = read_index(self.start.folder).run.get("data", {})
                state["tokens"] = state["samples"] * data.get("sequence_length", self.config.data.sequence_length)
            self.progress = Progress(state["step"], state["samples"], state["tokens"], state["updates"])
            self.engine.optimizer.set_updates(self.progress.updates)
            self.skip.load_state_dict(state["skip_step"])
        if local:
            _set_random_state(local)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"rng.cpu": torch.get_rng_state()}
    return state | {"rng.cuda": torch.cuda.get_rng_state()} if has_cuda() else state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["rng.cpu"])
    if has_cuda() and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"])
