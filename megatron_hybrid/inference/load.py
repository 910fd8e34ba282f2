"""Loads a checkpoint on every rank of this launch, without an optimizer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import import_plugins
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.checkpoint.folders import find_checkpoint
from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.model.hybrid_model import HybridLanguageModel, build_model
from megatron_hybrid.model.param_layout import ParamLayout

NOT_FINITE_REMEDY = "the checkpoint's weights are not finite, or too large; use an earlier checkpoint"


@dataclass
class LoadedModel:
    """A whole model on this rank, and the configuration of the run that trained it."""

    network: HybridLanguageModel
    config: ModelConfig
    run: dict[str, Any]
    step: int | None

    @property
    def sequence_length(self) -> int | None:
        """Length of the training sequences; None: not in the checkpoint."""
        length = self._data.get("sequence_length")
        return length if type(length) is int and length > 0 else None

    @property
    def tokenizer(self) -> str | None:
        """Tokenizer of the run; None: not in the checkpoint."""
        name = self._data.get("tokenizer")
        return name if isinstance(name, str) and name else None

    @property
    def _data(self) -> dict[str, Any]:
        data = self.run.get("data")
        return data if isinstance(data, dict) else {}


def load_model(path: str, dtype: str | None = "fp32", plugins: Sequence[str] = ()) -> LoadedModel:
    """Load the weights of a checkpoint that was written under any layout.

    Args:
        path: folder of a checkpoint, or of a run, whose newest checkpoint is loaded.
        dtype: fp32 or bf16; None: that of the run.
        plugins: modules to import first. No module is imported because a checkpoint names it.

    Raises:
        CheckpointError: no complete checkpoint there, or its model is not valid.
        ConfigError: a plug-in cannot be imported.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such folder; give a checkpoint's folder, or a run's")
    import_plugins(plugins)
    folder = find_checkpoint(os.path.abspath(path), "checkpoint")
    parallel = ParallelConfig()
    launch = Launch.from_environment()
    if launch.world_size == 1:  # unlike the ranks of a run, this process has the machine to itself
        torch.set_num_threads(os.cpu_count() or 1)
    groups = start_distributed(launch, parallel, seed=0, quiet=True)
    with CheckpointReader(folder) as reader:
        config, dtype = reader.model, dtype or reader.index.run.get("train", {}).get("dtype", "fp32")
        (network,) = build_model(config, parallel, PrecisionConfig(), dtype, sequence_length=1, groups=groups)
        layout = ParamLayout(config, 0, 1)
        Collector([network], layout, groups, {}, optimizer_sharded=False).load_weights(reader)
        return LoadedModel(network.eval(), config, reader.index.run, reader.index.state.get("step"))
