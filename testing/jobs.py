"""Jobs that tests run on ranks (testing/ranks.py): plain functions with plain arguments."""

import contextlib
import io
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.checkpoint import CheckpointConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.zero import ZeroConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.sample import Sample
from megatron_hybrid.distributed.process_groups import leave_groups
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.precision.fp8_parameters import is_fp8_param
from megatron_hybrid.train.engines.base import Engine
from megatron_hybrid.train.engines.megatron import MegatronEngine
from testing.documents import samples_of_step as document_samples_of_step

SEQUENCE_LENGTH = 32


def make_engine(
    model: dict,
    parallel: dict,
    train: dict,
    sequence_length: int = SEQUENCE_LENGTH,
    precision: dict | None = None,
    zero: dict | None = None,
) -> Engine:
    """Build an engine on the calling ranks."""
    parallel, train = ParallelConfig(**parallel), TrainConfig(**train)
    groups = start_distributed(Launch.from_environment(), parallel, train.seed)
    common = (ModelConfig(**model), train, parallel, sequence_length, groups, PrecisionConfig(**(precision or {})))
    if train.engine == "megatron":
        return MegatronEngine(*common)
    from megatron_hybrid.train.engines.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(*common, zero=ZeroConfig(**(zero or {})))


def named_parameters(engine: Engine) -> list[tuple]:
    """Return (name, parameter, pieces) of all parameters on this rank."""
    return getattr(engine, "parameters", None) or list(engine.layout.parameters(engine.chunks))


def values_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a copy of a parameter as a plain tensor."""
    return parameter.dequantize() if is_fp8_param(parameter) else parameter.detach().clone()


def same_casts(engine: Engine, checkpoint: str) -> bool:
    """Return whether all weights held in FP8 equal Transformer Engine's cast of the checkpoint's whole weights."""
    with CheckpointReader(checkpoint) as reader:
        for _, parameter, pieces in named_parameters(engine):
            if not is_fp8_param(parameter):
                continue
            values = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            for piece in pieces:
                piece.target.narrow(values).copy_(reader.read(piece.tensor.name, piece.source))
            if not torch.equal(parameter._get_quantizer().copy()(values).dequantize(), parameter.dequantize()):
                return False
    return True


def batches_of(engine: Engine, samples: torch.Tensor, micro_batch_size: int) -> list[Batch]:
    """Return this rank's micro-batches of samples [n, s + 1]."""
    rank, ranks = engine.groups.dp.rank(), engine.groups.dp.size()
    mine = samples.view(-1, ranks, micro_batch_size, samples.shape[1])[:, rank]
    return [Batch.of_samples(m) for m in mine]


def batches_of_documents(engine: Engine, samples: list[Sample], micro_batch_size: int) -> list[Batch]:
    """Return this rank's micro-batches of samples with documents."""
    groups = [samples[first : first + micro_batch_size] for first in range(0, len(samples), micro_batch_size)]
    return [Batch.collate(group) for group in groups[engine.groups.dp.rank() :: engine.groups.dp.size()]]


def samples_of_step(step: int, count: int, vocab_size: int, sequence_length: int = SEQUENCE_LENGTH) -> torch.Tensor:
    """Return learnable samples [count, sequence_length + 1]: every second token follows from the one before it."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randint(0, vocab_size, (count, sequence_length + 1), generator=generator)
    x[:, 1::2] = (x[:, 0::2][:, : x[:, 1::2].shape[1]] * 3 + 7) % vocab_size
    return x


def curve(
    model: dict,
    parallel: dict,
    train: dict,
    steps: int,
    start: int = 0,
    load: str | None = None,
    save: str | None = None,
    async_save: bool = False,
    lr: float = 3e-3,
    precision: dict | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    zero: dict | None = None,
    skipped: tuple[int, ...] = (),
    documents: str | None = None,
) -> dict:
    """Train steps [start, steps) and return losses, gradient norms and this rank's parameters; load before, save after.

    Args:
        skipped: steps whose update is not made.
        documents: `mask` or `pack`: the samples hold several documents (testing/documents.py).
    """
    engine = make_engine(model, parallel, train, sequence_length, precision, zero)
    config = ModelConfig(**model)
    mbs, gbs = train.get("micro_batch_size", 1), train["global_batch_size"]
    manager = CheckpointManager(
        CheckpointConfig(async_save=async_save),
        Path(save or load or "."),
        engine.collector(),
        config.model_dump(mode="json"),
        {},
    )
    if load:
        state, _ = manager.load(Path(load))
        engine.optimizer.set_updates(state["updates"])
    losses, norms = [], []
    for step in range(start, steps):
        if documents:
            samples = document_samples_of_step(step, gbs, documents, config.vocab_size, sequence_length)
            batches = batches_of_documents(engine, samples, mbs)
        else:
            batches = batches_of(engine, samples_of_step(step, gbs, config.vocab_size, sequence_length), mbs)
        losses.append(engine.forward_backward(batches)().loss)
        norms.append(engine.gradient_norm())
        if step not in skipped:
            engine.update(lr, norms[-1])
    path, casts = None, None
    if save:
        path = manager.save(steps, {"updates": engine.optimizer.updates}, {})
        manager.close()
        held = any(is_fp8_param(p) for _, p, _ in named_parameters(engine))
        casts = same_casts(engine, path) if held and steps - 1 not in skipped else None
    parameters = {name: values_of(p) for name, p, _ in named_parameters(engine)}
    updates = engine.optimizer.updates
    graphed = getattr(engine, "graphed", None)
    graphs = graphed.captured if graphed else 0
    engine.close()
    return {
        "losses": losses,
        "norms": norms,
        "parameters": parameters,
        "path": str(path),
        "same_casts": casts,
        "updates": updates,
        "graphs": graphs,
    }


def first_gradients(
    model: dict, parallel: dict, train: dict, sequence_length: int, precision: dict | None = None
) -> dict[str, torch.Tensor]:
    """Return the gradients of the first step on the initial weights, by true tensor, in host memory. One tensor parallel rank."""
    engine = make_engine(model, parallel, train, sequence_length, precision)
    samples = samples_of_step(0, train["global_batch_size"], ModelConfig(**model).vocab_size, sequence_length)
    engine.forward_backward(batches_of(engine, samples, train.get("micro_batch_size", 1)))
    found = {
        piece.tensor.name: piece.target.narrow(p.main_grad).float().cpu()
        for _, p, pieces in engine.layout.parameters(engine.chunks)
        for piece in pieces
    }
    engine.close()
    return found


def different_tensors(first: str, second: str) -> list[str]:
    """Return the names of weights and moments that two checkpoints do not both hold with the same bits."""
    with CheckpointReader(first) as a, CheckpointReader(second) as b:
        one, other = a.index.tensors.keys(), b.index.tensors.keys()
        return sorted(one ^ other) + [name for name in one & other if not torch.equal(a.read(name), b.read(name))]


def curve_from_masters(**arguments) -> dict:
    """Run `curve` with every matrix saved and loaded as master weights, as is done with weights held in FP8."""
    from megatron_hybrid.train.optimizers import megatron as optimizer

    optimizer.is_fp8_param = lambda parameter: parameter.dim() == 2
    optimizer.reset_amax = lambda parameters: None
    optimizer.rowwise_casts_only = nullcontext
    return curve(**arguments)


def logits_and_gradients(
    model: dict, tensors: dict[str, torch.Tensor], tokens: torch.Tensor, parallel: dict | None = None
) -> dict:
    """Run our model with given weights. Return this rank's logits, and gradients of the mean loss by true tensor."""
    engine = make_engine(model, parallel or {}, {"steps": 1, "global_batch_size": 1, "dtype": "fp32"}, tokens.shape[1])
    (chunk,) = engine.chunks
    with torch.no_grad():
        for _, parameter, pieces in engine.layout.parameters([chunk]):
            for piece in pieces:
                piece.target.narrow(parameter).copy_(piece.source.narrow(tensors[piece.tensor.name]))
    logits = chunk(tokens)
    chunk(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32))[0].backward()
    gradients = {
        piece.tensor.name: piece.target.narrow(p.main_grad if p.grad is None else p.grad).clone()
        for _, p, pieces in engine.layout.parameters([chunk])
        for piece in pieces
    }
    return {"logits": logits.detach(), "gradients": gradients}


def pretrain_run(config: dict) -> dict:
    """Run the trainer to its end. Return its progress, skip-step window, parameters and optimizer state."""
    from megatron_hybrid.train.trainer import Trainer

    run = RunConfig(**config)
    groups = start_distributed(Launch.from_environment(), run.parallel, run.train.seed)
    with Trainer(run, Launch.from_environment(), groups) as trainer:
        progress = asdict(trainer.run())
        return {"progress": progress, "window": trainer.state_dict()["skip_step"]} | everything(trainer.engine)


def printed_run(config: dict) -> str:
    """Run the trainer to its end and return what this rank prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pretrain_run(config)
    return printed.getvalue()


def everything(engine: Engine) -> dict:
    """Return copies of this rank's parameters and optimizer state."""
    shards = engine.optimizer.shards()
    named = named_parameters(engine)
    return {
        "parameters": {name: values_of(p) for name, p, _ in named},
        "moments": {
            f"{name}.{s}": v.clone() for name, p, _ in named if p in shards for s, v in shards[p].states.items()
        },
    }


def step_with_bad_gradient(model: dict, parallel: dict, train: dict, value: float, bad_rank: int) -> dict:
    """Run a good step, a step in which one rank has a gradient that is not finite, and another good step."""
    from megatron_hybrid.train.skip_step import SkipStep

    engine = make_engine(model, parallel, train)
    config, skip = ModelConfig(**model), SkipStep(TrainConfig(**train).skip_step)
    states, reasons, norms = [], [], []
    for step in range(3):
        poison = step == 1 and torch.distributed.get_rank() == bad_rank
        # Transformer Engine's linears return no gradient of their weights, which a hook could change
        victim = next(p for name, p in engine.chunks[0].named_parameters() if "A_log" in name)
        hook = victim.register_hook(lambda gradient: gradient.clone().fill_(value)) if poison else None
        batches = batches_of(engine, samples_of_step(step, train["global_batch_size"], config.vocab_size), 1)
        losses = engine.forward_backward(batches)()
        if hook:
            hook.remove()
        norms.append(engine.gradient_norm())
        reasons.append(skip.should_skip(losses.loss, norms[-1]))
        if reasons[-1] is None:
            engine.update(1e-3, norms[-1])
        states.append(everything(engine))
    return {"states": states, "reasons": reasons, "norms": norms}


def groups_formed_again(layouts: list[dict]) -> list[tuple[int, int, int]]:
    """Form and leave the groups of each layout. Return (size of the tensor parallel group, torch's groups then and after)."""
    known = torch.distributed.distributed_c10d._world.pg_map
    found = []
    for parallel in layouts:
        groups = start_distributed(Launch.from_environment(), ParallelConfig(**parallel), seed=0, quiet=True)
        ones = torch.ones(1)
        torch.distributed.all_reduce(ones, group=groups.tp)
        formed = len(known)
        leave_groups()
        found.append((int(ones), formed, len(known)))
    return found
