"""Jobs of test_losses.py, which run on ranks."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.sample import SampleCounts
from megatron_hybrid.train.engines.base import Engine
from testing import jobs

MAGNIFICATION = 1e3


def masked_batches(engine: Engine, samples: torch.Tensor, masks: torch.Tensor, sources: torch.Tensor) -> list[Batch]:
    """Return this rank's micro-batches of two samples each, with their loss masks and sources."""
    ranks, rank = engine.groups.dp.size(), engine.groups.dp.rank()
    found = []
    for rows in torch.arange(len(samples)).view(-1, ranks, 2)[:, rank]:
        slots, counted = masks[rows].numel(), int(masks[rows].count_nonzero())
        counts = SampleCounts(slots=slots, counted=counted, crossing=slots - counted)
        batch = Batch.of_samples(samples[rows])
        found.append(replace(batch, loss_mask=masks[rows], counts=counts, sources=sources[rows]))
    return found


def masked_step(model: dict, parallel: dict, train: dict, zero: dict | None = None, **data: torch.Tensor) -> dict:
    """Run one step. Return its losses and the gradients of all parameters, in pieces of true tensors.

    The gradients are read from the update: Adam with an enormous eps changes each parameter by its gradient times a constant.
    """
    optimizer = dict(eps=1e6, clip_grad=0.0, weight_decay=0.0)
    engine = jobs.make_engine(model, parallel, train | {"optimizer": optimizer}, zero=zero)
    batches = masked_batches(engine, **data)
    before = {name: jobs.values_of(p) for name, p, _ in jobs.named_parameters(engine)}
    evaluated, losses = engine.evaluate(batches), engine.forward_backward(batches)()
    norm = engine.gradient_norm()
    engine.update(MAGNIFICATION * 1e6, norm)
    gradients: list[tuple[str, Any, torch.Tensor]] = []
    for name, parameter, pieces in jobs.named_parameters(engine):
        change = (before[name] - jobs.values_of(parameter)) / MAGNIFICATION
        gradients += [(piece.tensor.name, piece.source, piece.target.narrow(change).clone()) for piece in pieces]
    return {"losses": losses, "evaluated": evaluated, "norm": norm, "gradients": gradients}


def plain_mean(model: dict, train: dict, samples: torch.Tensor, masks: torch.Tensor, sources: torch.Tensor) -> dict:
    """Return the mean over counted tokens, computed from all logits of the global batch in fp64, and its gradients."""
    engine = jobs.make_engine(model, {}, train)
    (chunk,) = engine.chunks
    logits = chunk(samples[:, :-1]).double()[..., : model["vocab_size"]]
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), samples[:, 1:], reduction="none")
    z = logits.logsumexp(-1).square()
    mean, z_mean = ((masks * x).sum() / masks.sum() for x in (cross_entropy, z))
    (mean + train["z_loss"] * z_mean).backward()
    correct = int((logits.argmax(-1) == samples[:, 1:])[masks > 0].sum())
    of_batches = (masks * cross_entropy).view(-1, 2 * masks.shape[1]).sum(1) / masks.view(-1, 2 * masks.shape[1]).sum(1)
    gradients = {
        piece.tensor.name: piece.target.narrow(p.main_grad if p.grad is None else p.grad).clone()
        for _, p, pieces in jobs.named_parameters(engine)
        for piece in pieces
    }
    by_source = [(masks * cross_entropy)[s == 1].sum() / masks[s == 1].sum() for s in sources.t()]
    return {
        "loss": mean.item(),
        "z_loss": z_mean.item(),
        "by_source": [float(x) for x in by_source],
        "correct": correct,
        "mean_of_means": of_batches[of_batches.isfinite()].mean().item(),
        "gradients": gradients,
    }


def uncounted_step(config: dict) -> dict:
    """Train with masks that are zero in step 2. Return parameters after each step and the skip-step window."""
    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.data.sample import Sample
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed
    from megatron_hybrid.train.trainer import Trainer

    run = RunConfig(**config)
    groups = start_distributed(Launch.from_environment(), run.parallel, run.train.seed)
    with Trainer(run, Launch.from_environment(), groups) as trainer:
        plain, size, length = trainer.loader.dataset, run.train.global_batch_size, run.data.sequence_length

        class Masked:
            sequence_length = length

            def sample(self, index: int) -> Sample:
                tokens, none = plain.sample(index), index // size == 1
                mask = torch.full((length,), float(not none)).numpy()
                counts = SampleCounts(slots=length, counted=0 if none else length, filtered=length if none else 0)
                return Sample(tokens[:-1], tokens[1:], mask, None, counts)

        trainer.loader.dataset = Masked()
        states = []
        while trainer.progress.step < run.train.steps:
            for callback in trainer.callbacks:
                callback.begin_step(trainer)
            outcome = trainer.step()
            for callback in trainer.callbacks:
                callback.end_step(trainer, outcome)
            states.append(jobs.everything(trainer.engine))
        return {"states": states, "window": trainer.state_dict()["skip_step"], "updates": trainer.progress.updates}
