"""Evaluate a loaded model on data sets, data-parallel over the ranks of the launch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.translate import translate
from megatron_hybrid.data.agreement import evaluation_disagreements, refuse, warn
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.build import build_train_and_validation, open_sources
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.document_dataset import DocumentDataset
from megatron_hybrid.data.generated import GeneratedDataset
from megatron_hybrid.data.prepare_documents import DocumentPreparation, prepare_alone
from megatron_hybrid.data.text_bytes import TextBytes
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.evaluation.validation_set import ValidationSet
from megatron_hybrid.inference.load import NOT_FINITE_REMEDY, LoadedModel


def parse_sets(arguments: list[str]) -> dict[str, str]:
    """Return paths by names: `docs=data/docs` is the set docs; a path without a name has its own as its name.

    Raises:
        UserError: a name occurs twice.
    """
    named = [argument.partition("=") if "=" in argument else (argument, "=", argument) for argument in arguments]
    sets = {name: path for name, _, path in named}
    if len(sets) < len(named) or not all(sets):
        raise UserError(f"{' '.join(arguments)}: give each set a name of its own, as in docs=data/docs code=data/code")
    return sets


def open_validation_sets(
    model: LoadedModel,
    paths: Mapping[str, str],
    dtype: str | None = None,
    sequence_length: int | None = None,
    check: str = "auto",
    batch_size: int = 8,
    documents: str | None = None,
    work: str | Path | None = None,
) -> list[ValidationSet]:
    """Open data sets and check them as pretraining does. Each is evaluated whole.

    Args:
        paths: sources by the names of the sets.
        dtype, check: as in a source of `data.train` and in `data.check`.
        sequence_length: None: that of the run.
        batch_size: sequences per call of the model on a rank.
        documents: as `data.documents`. None: as the run.
        work: folder of this process for document boundaries. It must exist as long as the sets. Needed unless documents is keep.

    Raises:
        UserError: data that cannot be used, or that contradicts the model or its tokenizer; no sequence length.
        ValueError: `work` is needed and not given.
    """
    length = sequence_length or model.sequence_length
    if not length:
        raise UserError("--sequence-length is missing: the checkpoint does not name one")
    documents = documents or model.documents
    groups, found = model.network.pg_collection, []
    for name, path in paths.items():
        dataset = _open(model, path, dtype, length, check, documents, work)
        tokenizer = model.tokenizer
        text_bytes = TextBytes(None, "the checkpoint names no tokenizer")
        if tokenizer is not None:
            text_bytes = TextBytes.of(tokenizer, model.config.vocab_size, [path])
        unit = batch_size * groups.dp.size()
        found.append(
            ValidationSet(name, dataset, dataset.samples_per_epoch, groups, batch_size, unit, unit, text_bytes)
        )
    return found


def _open(
    model: LoadedModel,
    path: str,
    dtype: str | None,
    length: int,
    check: str,
    documents: str,
    work: str | Path | None,
) -> FixedLengthDataset | DocumentDataset:
    fields = {"sequence_length": length, "check": check, "documents": documents}
    try:
        config = DataConfig.model_validate({"train": [{"path": path, "dtype": dtype}], **fields})
    except ValidationError as error:
        raise translate(error, DataConfig) from None
    warn(refuse(evaluation_disagreements(model.config, model.run, path)))
    preparation = None
    if documents != "keep":
        if work is None:
            raise ValueError(f"work: needed with documents = {documents}")
        opened = open_sources(config, model.config.vocab_size)
        preparation = prepare_alone(DocumentPreparation(opened, config, model.config.eos_token_id, work))
    blend, _ = build_train_and_validation(config, model.config.vocab_size, documents=preparation)
    (dataset,) = blend.datasets
    assert not isinstance(dataset, GeneratedDataset)  # the configuration has a path
    if preparation is not None:
        return DocumentDataset(preparation.reader(dataset.source), seed=0, shuffle=False)
    return FixedLengthDataset(dataset.source, length, seed=0, shuffle=False)


@dataclass(frozen=True)
class Mean:
    """Mean loss of the micro-batches of all ranks."""

    loss: float
    weight: float
    correct: None = None


@torch.no_grad()
def mean_loss(model: LoadedModel, batches: list[Batch]) -> Mean:
    """Return the mean loss over the counted tokens of all data parallel ranks' micro-batches.

    Raises:
        UserError: the loss is not finite.
    """
    total = torch.zeros(2, dtype=torch.float64, device=local_device())
    for batch in batches:
        here = batch.to(local_device())
        bounds = dict(documents=here.documents, cu_seqlens=here.cu_seqlens)
        losses = model.network(here.tokens, here.labels, here.loss_mask, **bounds)
        total += torch.stack([x.sum(dtype=torch.float64) for x in (losses.per_token, here.loss_mask)])
    dist.all_reduce(total, group=model.network.pg_collection.dp)
    nats, weight = total.tolist()
    if not math.isfinite(nats):
        raise UserError(f"the loss is {nats}: {NOT_FINITE_REMEDY}")
    return Mean(nats / weight if weight else math.nan, weight)
