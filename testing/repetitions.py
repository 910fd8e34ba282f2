"""One training run repeated on the same ranks, every tensor compared bit for bit with the first repetition."""

import gc
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.distributed.process_groups import leave_groups
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.train.interrupt import Interrupt
from megatron_hybrid.train.trainer import Trainer
from testing.disturbance import delayed_exchanges, planted_race
from testing.jobs import named_parameters
from testing.models import hybrid


def run_config(folder: Path, parallel: dict, tied: bool = True, steps: int = 4) -> dict:
    """A small run that evaluates every two steps and reads its data in two threads."""
    tokens = np.cumsum(np.random.default_rng(0).integers(0, 3, 20_000)) % 97
    tokens.astype("uint16").tofile(folder / "tokens.npy")
    source = [{"path": str(folder / "tokens.npy")}]
    return dict(
        run_dir=str(folder / "run"),
        model=hybrid("GAGA", 32, 4, 8, vocab_size=97, tie_embeddings=tied),
        data=dict(train=source, validation=source, sequence_length=32, num_workers=2),
        parallel=parallel,
        train=dict(
            steps=steps,
            global_batch_size=8,
            micro_batch_size=2,
            dtype="fp32",
            eval_interval=2,
            eval_batches=1,
            optimizer=dict(lr=1e-2, eps=1e-2),  # Adam with a small eps magnifies rounding
            schedule=dict(warmup_steps=1),
        ),
        checkpoint=dict(interval=None),
        logging=dict(plot_interval=0, tensorboard=False),
    )


@dataclass
class Record:
    """Hashes and losses of one repetition on this rank."""

    digests: dict[str, str] = field(default_factory=dict)
    """By step, kind and name of the tensor, in the order in which they were taken."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    parameters: list[tuple[str, tuple[int, ...], torch.Tensor]] = field(default_factory=list)
    """(true tensor, offset in it, values) after the last step."""

    def first_difference(self, other: "Record") -> str | None:
        """The first tensor whose bits differ; None if there is none."""
        names = list(self.digests | other.digests)
        return next((name for name in names if self.digests.get(name) != other.digests.get(name)), None)


def digest(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bytes."""
    return hashlib.blake2b(tensor.detach().contiguous().numpy().tobytes(), digest_size=8).hexdigest()


class Watch:
    """Records the tensors of a trainer's engine after each of its calls."""

    def __init__(self, trainer: Trainer, after_schedule: Callable[[], None] | None = None):
        self.trainer, self.engine, self.record = trainer, trainer.engine, Record()
        self.after_schedule = after_schedule or (lambda: None)
        for method in ("forward_backward", "gradient_norm", "update", "evaluate"):
            setattr(self.engine, method, self._watched(method, getattr(self.engine, method)))

    def _watched(self, method: str, call: Callable) -> Callable:
        def watched(*args):
            if method in ("forward_backward", "evaluate"):
                self._digest(f"{method} input", self._batches(args[0]))
            result = call(*args)
            getattr(self, f"_after_{method}")(result)
            return result

        return watched

    @staticmethod
    def _batches(batches: list[Batch]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, batch in enumerate(batches):
            yield from ((f"{number}.{name}", tensor) for name, tensor in batch.tensors().items())

    def _after_forward_backward(self, read_losses) -> None:
        self.after_schedule()
        self.record.losses.append(read_losses().loss)
        self._digest("gradients", self._gradients())

    def _after_gradient_norm(self, norm: float) -> None:
        self.record.norms.append(norm)

    def _after_update(self, _) -> None:
        self._digest("parameters", self._parameters())
        self._digest("moments", self._moments())

    def _after_evaluate(self, losses) -> None:
        self.after_schedule()
        self.record.evaluations.append(losses.loss)
        self._digest("parameters after evaluation", self._parameters())
        self._digest("gradients after evaluation", self._gradients())

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter) for name, parameter, _ in named_parameters(self.engine))

    def _gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.main_grad) for name, parameter, _ in named_parameters(self.engine))

    def _moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        shards = self.engine.optimizer.shards()
        for name, parameter, _ in named_parameters(self.engine):
            if parameter in shards:
                yield from ((f"{name}.{state}", values) for state, values in shards[parameter].states.items())

    def _digest(self, kind: str, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        at = f"{self.trainer.progress.step}, {len(self.record.digests)}, {kind}"
        self.record.digests |= {f"{at}, {name}": digest(tensor) for name, tensor in tensors}

    def finish(self) -> Record:
        """The record, with the parameters themselves."""
        record = self.record
        numbers = torch.tensor(record.losses + record.norms + record.evaluations, dtype=torch.float64)
        record.digests["losses, norms and evaluations"] = digest(numbers)
        record.parameters = [
            (piece.tensor.name, tuple(piece.source.offset), piece.target.narrow(parameter).detach().clone())
            for _, parameter, pieces in named_parameters(self.engine)
            for piece in pieces
        ]
        return record


def run_once(config: dict, after_schedule: Callable[[], None] | None = None) -> Record:
    """Train as tools/pretrain.py does, in groups of its own. after_schedule: called after each step and evaluation."""
    run, launch = RunConfig(**config), Launch.from_environment()
    groups = start_distributed(launch, run.parallel, run.train.seed, quiet=True)
    quiet = redirect_stdout(io.StringIO())  # hundreds of runs would fill the log
    with quiet, Interrupt() as interrupt, Trainer(run, launch, groups, interrupt) as trainer:
        watch = Watch(trainer, after_schedule)
        trainer.run()
        record = watch.finish()
    dist.barrier()
    leave_groups()
    if launch.rank == 0:
        shutil.rmtree(run.run_dir)
    dist.barrier()
    return record


def repeat(config: dict, repetitions: int, seed: str, race: bool = False) -> dict:
    """Run once undisturbed, then `repetitions` times with other delays each time.

    Args:
        race: plant a race in the disturbed repetitions.

    Returns:
        the first Record; how many tensors were compared in each repetition; and (repetition, first tensor that differs).
    """
    rank = dist.get_rank()
    may_be_stopped = Path(config["run_dir"]).with_name(f"{os.getpid()}.pid")  # see testing.disturbance.Stopper
    may_be_stopped.touch()
    expected, differences = run_once(config), []
    for number in range(repetitions):
        with ExitStack() as disturbed:
            disturbed.enter_context(delayed_exchanges(f"{seed}/{number}/{rank}"))
            if race:
                disturbed.enter_context(planted_race())
            found = run_once(config)
        gc.collect()  # groups of a finished run keep some 60 threads each until Python's cycle collector finds them
        if difference := found.first_difference(expected):
            differences.append((number, difference))
    may_be_stopped.unlink()
    return {"first": expected, "tensors": len(expected.digests), "differences": differences}


def difference_of_curves(records: list[Record], one: Record) -> float:
    """Largest relative difference of a loss, norm or evaluation of any rank from one rank's."""
    values = [record.losses + record.norms + record.evaluations for record in (*records, one)]
    *found, expected = (torch.tensor(value, dtype=torch.float64) for value in values)
    return max(float(((value - expected) / expected).abs().max()) for value in found)


def difference_of_parameters(records: list[Record], one: Record) -> float:
    """Largest absolute difference of a parameter of any rank from one rank's."""
    whole = {name: values for name, _, values in one.parameters}
    return max(
        float((values - _region(whole[name], offset, values.shape)).abs().max())
        for record in records
        for name, offset, values in record.parameters
    )


def _region(tensor: torch.Tensor, offset: tuple[int, ...], shape: torch.Size) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
