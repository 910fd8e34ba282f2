"""Mean loss of a loaded model over a data set."""

import math
from collections.abc import Iterator

import torch
from pydantic import ValidationError

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.translate import translate
from megatron_hybrid.data.agreement import evaluation_disagreements, refuse, warn
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.inference.load import NOT_FINITE_REMEDY, LoadedModel


def open_evaluation_data(
    model: LoadedModel, path: str, dtype: str | None = None, sequence_length: int | None = None, check: str = "auto"
) -> FixedLengthDataset:
    """Open a data set for evaluation and check it as pretraining does.

    Args:
        path, dtype, check: as in a source of `data.train` and in `data.check`.
        sequence_length: None: that of the run.

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
    """Yield (tokens so far, mean cross-entropy so far in nats per token), to the end of the data set.

    Raises:
        UserError: batch_size below 1, or a loss that is not finite.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: give at least 1")
    total, count, samples = 0.0, 0, dataset.samples_per_epoch
    for first in range(0, samples, batch_size):
        rows = [torch.from_numpy(dataset.sample(i)) for i in range(first, min(first + batch_size, samples))]
        batch = Batch.of_samples(torch.stack(rows)).to(local_device())
        losses = model.network(batch.tokens, batch.labels, batch.loss_mask)
        size = batch.labels.numel()
        if not math.isfinite(value := losses.cross_entropy.double().item()):
            raise UserError(f"the loss of tokens {count:,} to {count + size:,} is {value}: {NOT_FINITE_REMEDY}")
        total += value * size
        count += size
        yield count, total / count
