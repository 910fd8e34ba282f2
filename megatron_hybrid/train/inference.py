"""A checkpoint in one process, without an optimizer: to measure its loss on a dataset, or to continue a prompt.

Every token generated runs the whole context again (there is no cache): for looking at a model, not for serving it.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.checkpoint.folders import find_checkpoint
from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.translate import translate
from megatron_hybrid.data.agreement import checkpoint_disagreements, evaluation_disagreements, refuse, warn
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.model.hybrid_model import HybridLanguageModel, build_model
from megatron_hybrid.model.param_layout import ParamLayout

_BROKEN = "the checkpoint's weights are not finite, or too large; use an earlier checkpoint"


@dataclass
class LoadedModel:
    """A model in one process, and what its checkpoint says of the run that made it."""

    network: HybridLanguageModel
    config: ModelConfig
    run: dict
    step: int | None

    @property
    def sequence_length(self) -> int | None:
        """Tokens of the sequences it was trained on; None: its checkpoint does not say."""
        length = self._data.get("sequence_length")
        return length if type(length) is int and length > 0 else None

    @property
    def tokenizer(self) -> str | None:
        """Tokenizer of its run; None: its checkpoint does not say."""
        name = self._data.get("tokenizer")
        return name if isinstance(name, str) and name else None

    @property
    def _data(self) -> dict:
        data = self.run.get("data")
        return data if isinstance(data, dict) else {}


def load_model(path: str, dtype: str = "fp32") -> LoadedModel:
    """Load a checkpoint's weights, whatever layout wrote it.

    Args:
        path: a checkpoint's folder, or a run's: its newest.

    Raises:
        CheckpointError: no complete checkpoint there.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such folder; give a checkpoint's folder, or a run's")
    folder = find_checkpoint(os.path.abspath(path), "checkpoint")
    parallel = ParallelConfig()
    torch.set_num_threads(os.cpu_count() or 1)  # alone on this machine, where ranks of a run share it
    groups = start_distributed(Launch(0, 0, 1), parallel, seed=0, quiet=True)
    with CheckpointReader(folder) as reader:
        try:
            config = ModelConfig(**reader.index.model)
        except (ValidationError, TypeError) as error:
            raise CheckpointError(f"{folder}: the model in its index is damaged: {error}") from error
        (network,) = build_model(config, parallel, PrecisionConfig(), dtype, sequence_length=1, groups=groups)
        layout = ParamLayout(config, 0, 1)
        Collector([network], layout, groups, {}, optimizer_sharded=False).load_weights(reader)
        return LoadedModel(network.eval(), config, reader.index.run, reader.index.state.get("step"))


def open_evaluation_data(
    model: LoadedModel, path: str, dtype: str | None = None, sequence_length: int | None = None, check: str = "auto"
) -> FixedLengthDataset:
    """Open data to measure a model's loss on, and check it as pretraining does.

    Args:
        path, dtype, check: as a source of `data.train` and as `data.check`.
        sequence_length: None: the run's.

    Raises:
        UserError: data that cannot be used, or that contradicts the model or its tokenizer; no sequence length.
    """
    length = sequence_length or model.sequence_length
    if not length:
        raise UserError("--sequence-length is missing: the checkpoint does not name one")
    try:
        config = DataConfig.model_validate(
            {"train": [{"path": path, "dtype": dtype}], "sequence_length": length, "check": check}
        )
    except ValidationError as error:
        raise translate(error, DataConfig) from None
    warn(refuse(evaluation_disagreements(model.config, model.run, path)))
    blend, _ = build_train_and_validation(config, model.config.vocab_size)
    return FixedLengthDataset(blend.datasets[0].source, length, seed=0, shuffle=False)


@torch.no_grad()
def mean_loss(model: LoadedModel, dataset: FixedLengthDataset, batch_size: int = 8) -> Iterator[tuple[int, float]]:
    """Yield (tokens so far, mean cross-entropy so far in nats per token), to the end of the dataset.

    Raises:
        UserError: batch_size below 1, or a loss that is not finite.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: give at least 1")
    device, total, count = local_device(), 0.0, 0
    samples = dataset.samples_per_epoch
    for first in range(0, samples, batch_size):
        rows = [torch.from_numpy(dataset.sample(i)) for i in range(first, min(first + batch_size, samples))]
        tokens = torch.stack(rows).to(device)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        _, loss, _ = model.network(inputs, labels, torch.ones_like(labels, dtype=torch.float32))
        if not math.isfinite(value := loss.double().item()):
            raise UserError(f"the loss of tokens {count:,} to {count + labels.numel():,} is {value}: {_BROKEN}")
        total += value * labels.numel()
        count += labels.numel()
        yield count, total / count


@torch.no_grad()
def generate(
    model: LoadedModel, prompt: list[int], max_tokens: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Iterator[int]:
    """Yield tokens that continue the prompt, until the end-of-document token or max_tokens.

    Args:
        temperature: 0 takes the likeliest token. top_k: draw among the k likeliest; 0: among all.

    Raises:
        UserError: an empty prompt, a token the model does not have, or a number out of range.
    """
    check_generation(model.config.vocab_size, prompt, max_tokens, temperature, top_k, seed)
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


def check_generation(
    vocab_size: int, prompt: list[int], max_tokens: int, temperature: float, top_k: int, seed: int
) -> None:
    """Check what `generate` is given. Raises UserError as it does."""
    if not prompt:
        raise UserError("the prompt has no tokens: give at least one that the tokenizer knows")
    if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
        raise UserError(
            f"prompt has token {wrong[0]}: the model's vocabulary is {vocab_size}; is it the right tokenizer?"
        )
    if max_tokens < 0 or top_k < 0:
        raise UserError(f"max_tokens {max_tokens}, top_k {top_k}: must not be negative")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature {temperature}: give a finite number of at least 0")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed {seed}: give a number from 0 to 2^63 - 1")


def _choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if not bool(logits.isfinite().all()):
        raise UserError(f"the model's logits are not finite: {_BROKEN}")
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
    scaled = (logits.double() - logits.max()) / temperature  # at most 0: a small temperature must not overflow
    return int(torch.multinomial(torch.softmax(scaled, -1).float(), 1, generator=generator))


def tokenize_prompt(model: LoadedModel, prompt: str, name: str | None) -> tuple[Tokenizer, list[int]]:
    """Load a tokenizer, the run's where `name` is None, and return it with the ids of a prompt.

    Prints a warning where the tokenizer contradicts the model, and where the prompt is longer than the sequences that the
    model was trained on.

    Raises:
        UserError: no tokenizer, or a prompt that is not UTF-8.
    """
    chosen = model.tokenizer if name is None else name
    if chosen is None:
        raise UserError("--tokenizer is missing: the checkpoint does not name one")
    tokenizer = load_tokenizer(chosen)
    found = checkpoint_disagreements(
        model.config, model.run, chosen, "data.tokenizer" if name is None else "--tokenizer"
    )
    warn(str(disagreement) for disagreement in dict.fromkeys(found))
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt is not UTF-8 text (character {error.start})") from None
    ids = tokenizer.encode(prompt)
    if model.sequence_length is not None and len(ids) > model.sequence_length:
        warn([f"the prompt has {len(ids)} tokens, the model was trained on sequences of {model.sequence_length}"])
    return tokenizer, ids
