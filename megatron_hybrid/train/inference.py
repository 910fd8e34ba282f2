"""A checkpoint in one process, without an optimizer: to measure its loss on a dataset, or to continue a prompt.

Every token generated runs the whole context again (there is no cache): for looking at a model, not for serving it.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.checkpoint.manager import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.errors import UserError
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.model.hybrid_model import HybridLanguageModel, build_model
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.parallel.device import local_device
from megatron_hybrid.parallel.launch import Launch, start_distributed


@dataclass
class LoadedModel:
    """A model in one process, and what its checkpoint says of the run that made it."""

    network: HybridLanguageModel
    config: ModelConfig
    run: dict
    step: int | None


def load_model(path: str, dtype: str = "fp32") -> LoadedModel:
    """Load a checkpoint's weights, whatever layout wrote it.

    Args:
        path: a checkpoint's folder, or a run's: its newest.

    Raises:
        CheckpointError: no complete checkpoint there.
    """
    folder = find_checkpoint(path, Path(path))
    assert folder is not None
    parallel = ParallelConfig()
    torch.set_num_threads(os.cpu_count() or 1)  # alone on this machine, where ranks of a run share it
    groups = start_distributed(Launch(0, 0, 1), parallel, seed=0, quiet=True)
    with CheckpointReader(folder) as reader:
        config = ModelConfig(**reader.index.model)
        (network,) = build_model(config, parallel, PrecisionConfig(), dtype, sequence_length=1, groups=groups)
        layout = ParamLayout(config, 0, 1)
        Collector([network], layout, groups, {}, optimizer_sharded=False).load_weights(reader)
        return LoadedModel(network.eval(), config, reader.index.run, reader.index.state.get("step"))


@torch.no_grad()
def mean_loss(model: LoadedModel, dataset: FixedLengthDataset, batch_size: int = 8) -> Iterator[tuple[int, float]]:
    """Yields (tokens so far, mean cross-entropy so far in nats a token), to the end of the dataset."""
    device, total, count = local_device(), 0.0, 0
    samples = dataset.samples_per_epoch
    for first in range(0, samples, batch_size):
        rows = [torch.from_numpy(dataset.sample(i)) for i in range(first, min(first + batch_size, samples))]
        tokens = torch.stack(rows).to(device)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        _, loss, _ = model.network(inputs, labels, torch.ones_like(labels, dtype=torch.float32))
        total += loss.double().item() * labels.numel()
        count += labels.numel()
        yield count, total / count


@torch.no_grad()
def generate(
    model: LoadedModel, prompt: list[int], max_tokens: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Iterator[int]:
    """Yields tokens that continue the prompt, until the end-of-document token or max_tokens.

    Args:
        temperature: 0 takes the likeliest token. top_k: draw among the k likeliest; 0: among all.

    Raises:
        UserError: an empty prompt, or a token the model does not have.
    """
    if not prompt:
        raise UserError("prompt is empty: give at least one token")
    if wrong := [token for token in prompt if not 0 <= token < model.config.vocab_size]:
        raise UserError(
            f"prompt has token {wrong[0]}: the model's vocabulary is {model.config.vocab_size}; is it the right tokenizer?"
        )
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        row = torch.tensor([tokens], device=local_device())
        logits = model.network(row)[0, -1, : model.config.vocab_size].float().cpu()
        token = _choose(logits, temperature, top_k, generator)
        if token == model.config.eos_token_id:
            return
        tokens.append(token)
        yield token


def _choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
