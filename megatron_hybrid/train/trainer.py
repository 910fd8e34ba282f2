"""The training loop. Every rank runs it. Everything but the steps themselves is done by callbacks (train/callbacks/)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.run_dir import check_run_dir
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.curriculum import Curriculum
from megatron_hybrid.data.fingerprint import data_identity
from megatron_hybrid.data.vocabulary import vocabulary_identity
from megatron_hybrid.distributed.first_rank import on_first_rank
from megatron_hybrid.distributed.process_groups import stop_distributed
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.observe.sinks import check_sinks
from megatron_hybrid.train.callbacks import default_callbacks
from megatron_hybrid.train.callbacks.base import Callback, StepOutcome
from megatron_hybrid.train.data_check import open_data
from megatron_hybrid.train.engines.build import build_engine
from megatron_hybrid.train.engines.losses import BatchLosses
from megatron_hybrid.train.interrupt import Interrupt
from megatron_hybrid.train.progress import Progress
from megatron_hybrid.train.schedules import learning_rate
from megatron_hybrid.train.setup import (
    build_loader,
    build_logger,
    build_validation_sets,
    find_text_bytes,
    write_config,
)
from megatron_hybrid.train.start import check_start_point
from megatron_hybrid.train.start_checks import check_start, newest_step, run_folder
from megatron_hybrid.train.verified_start import choose_verified_start
from megatron_hybrid.train.watchdog import build_watchdog, collective_timeout


def pretrain(config: RunConfig, launch: Launch) -> Progress:
    """Train to config.train.steps, from the newest checkpoint if there is one, and return the progress of the run.

    SIGUSR1, SIGTERM or Ctrl-C on any rank ends it earlier, with a checkpoint of the current step. A run that hangs ends the
    process (train/watchdog/).

    Raises:
        ConfigError: degrees or batch sizes that do not fit the number of ranks.
        PreflightError, RestartError: nodes that are not ready; a job that restarts without progress.
        RunDirError: run_dir cannot be created or written.
        RunFolderError: another run uses the folder, or has used it; or no steps are left to train.
        DataError, CheckpointError: before the first step, naming file and remedy.
        DivergedError: loss or gradient norm stayed non-finite for too many steps.
        ReplicaError: data parallel ranks have different parameters or gradient norms.
    """
    config.check_world(launch.world_size)
    check_run_dir(config, launch.world_size)
    run_dir = Path(config.run_dir)
    check_sinks(config.logging, run_dir, writes=launch.rank == 0)
    with Interrupt(lambda: newest_step(run_dir)) as interrupt, build_watchdog(run_dir, config.train) as watchdog:
        groups = start_distributed(launch, config.parallel, config.train.seed, collective_timeout(config.train))
        try:
            watchdog.join_team()
            with run_folder(run_dir):
                check_start(config, launch)
                with Trainer(config, launch, groups, interrupt) as trainer:
                    progress = trainer.run()
                dist.barrier()  # launchers end all ranks as soon as one exits: wait until all have saved
            return progress
        finally:
            stop_distributed()


class Trainer:
    """One run on this rank.

    Args:
        interrupt: receives signals that ask the run to stop; None: the process handles signals itself.
        callbacks: further callbacks. Their hooks are called before those of the default callbacks.
    """

    def __init__(
        self,
        config: RunConfig,
        launch: Launch,
        groups: ProcessGroupCollection,
        interrupt: Interrupt | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config, self.launch, self.groups = config, launch, groups
        self.progress, self.stop = Progress(), False
        self.start = choose_verified_start(config)
        self.batches: list[Batch] = []
        self.curriculum = Curriculum(config.data.curriculum) if config.data.curriculum else None
        training, validation = open_data(config, self.curriculum)
        self.data_identity, self.vocabulary, self.changes = on_first_rank(lambda: self._compare(training))
        self.engine = build_engine(config, groups)
        self.loader = build_loader(config, groups, training, config.data.num_workers)
        text_bytes = on_first_rank(lambda: find_text_bytes(config))
        validation_sets = build_validation_sets(config, groups, validation, text_bytes)
        self.callbacks = [*callbacks, *default_callbacks(config, training, validation_sets, interrupt)]
        for callback in self.callbacks:
            callback.setup(self)
        on_first_rank(lambda: write_config(config, self.progress.step))
        self.logger = build_logger(config, launch, training, self.progress, continues=self.start.kind == "resume")
        for callback in self.callbacks:
            callback.start(self)

    def _compare(self, training: Blend) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
        """Return the identities of data and vocabulary, and a line for each change since the checkpoint's run."""
        identity = data_identity(training, self.config.data.seed)
        changes = check_start_point(self.config, self.start, identity)
        return identity, vocabulary_identity(self.config), changes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loader.close()
        self.logger.close()
        for callback in self.callbacks:
            callback.close()
        if kind is None:  # after an error, the GPU may no longer respond
            self.engine.close()

    def run(self) -> Progress:
        """Train until the last step, or until a callback stops the run."""
        while self.progress.step < self.config.train.steps and not self.stop:
            for callback in self.callbacks:
                callback.begin_step(self)
            outcome = self.step()
            for callback in self.callbacks:
                callback.end_step(self, outcome)
        for callback in self.callbacks:
            callback.finish(self)
        return self.progress

    def step(self) -> StepOutcome:
        """Train on one global batch: compute gradients, then update unless a callback says to skip."""
        config, progress = self.config, self.progress
        batch_size = config.train.batch_size_at(progress.samples)
        self.batches = list(self.loader.global_batch(progress.samples, batch_size))
        read_length = self.batches[0].tokens.shape[1]
        length = config.train.sequence_length_at(progress.samples, read_length)
        self.batches = [batch.split(length) for batch in self.batches]
        read_losses = self.engine.forward_backward(self.batches)
        norm = self.engine.gradient_norm()  # before the losses, so that the device computes it without a pause
        losses = read_losses()

        progress.step += 1
        progress.samples += batch_size
        progress.tokens += batch_size * read_length
        lr = learning_rate(progress.step, config.train)
        skipped = self._reason_to_skip(losses, norm)
        if skipped is None:
            self.engine.update(lr, norm)
            progress.updates += 1
        return StepOutcome(losses, norm, lr, batch_size, skipped)

    def _reason_to_skip(self, losses: BatchLosses, grad_norm: float) -> str | None:
        if losses.weight == 0:  # callbacks would take the missing loss for a run that diverges
            return "no token of the batch counts in the loss"
        reasons = [callback.reason_to_skip(losses.loss, grad_norm) for callback in self.callbacks]
        return next((reason for reason in reasons if reason is not None), None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint: JSON values, the same on every rank."""
        states = {callback.name: callback.state_dict() for callback in self.callbacks if callback.name}
        known = {"world_size": self.launch.world_size, "data": self.data_identity, "vocabulary": self.vocabulary}
        return asdict(self.progress) | states | known

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the checkpoint that the run starts from."""
        samples = state.get("samples", 0)  # absent where a run takes moments only, or starts from an average
        tokens = state["tokens"] if "tokens" in state else samples * self._saved_sequence_length()
        self.progress = Progress(state.get("step", 0), samples, tokens, state.get("updates", 0))
        self.engine.optimizer.set_updates(self.progress.updates)
        for callback in self.callbacks:
            if callback.name in state:
                callback.load_state_dict(state[callback.name])

    def _saved_sequence_length(self) -> int:
        """Return the sequence length of the checkpoint's run: earlier versions did not save the number of tokens."""
        assert self.start.folder is not None
        data = read_index(self.start.folder).run.get("data", {})
        return int(data.get("sequence_length", self.config.data.sequence_length))
