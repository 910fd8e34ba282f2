"""Loads a model onto the ranks of this launch, without an optimizer."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import import_plugins
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.convert.model_folder import ModelFolder, open_model
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.model.hybrid_model import HybridLanguageModel, build_model
from megatron_hybrid.model.param_layout import ParamLayout

NOT_FINITE_REMEDY = "the checkpoint's weights are not finite, or too large; use an earlier checkpoint"


@dataclass
class LoadedModel:
    """A model on these ranks, and the configuration of the run that trained it."""

    network: HybridLanguageModel
    config: ModelConfig
    run: dict[str, Any]
    step: int | None
    tokenizer: str | None = None
    """Tokenizer that belongs to the model; None: its folder does not name one."""

    @property
    def sequence_length(self) -> int | None:
        """Length of the training sequences; None: not in the checkpoint."""
        data = self.run.get("data")
        length = data.get("sequence_length") if isinstance(data, dict) else None
        return length if type(length) is int and length > 0 else None

    @property
    def documents(self) -> str:
        """Treatment of documents in training (`data.documents`); `keep` if the checkpoint does not say."""
        data = self.run.get("data")
        documents = data.get("documents") if isinstance(data, dict) else None
        return documents if documents in ("mask", "pack") else "keep"


def load_model(
    path: str,
    dtype: str | None = "fp32",
    plugins: Sequence[str] = (),
    tensor_parallel_size: int = 1,
    eos_token_id: int | None = None,
) -> LoadedModel:
    """Load the weights of a run, a checkpoint or a Hugging Face folder.

    Each group of `tensor_parallel_size` ranks holds the model. The groups are data parallel.

    Args:
        path: a run's newest checkpoint is loaded, whatever layout wrote it.
        dtype: "fp32" or "bf16"; None: that of the run, or fp32 if there is none.
        plugins: modules to import first. No module is imported because a checkpoint names it.
        eos_token_id: the end-of-document token of a Hugging Face folder that lists several.

    Raises:
        CheckpointError: no complete checkpoint there, or its model is not valid.
        ConversionError: a Hugging Face folder that cannot be read.
        ConfigError: a plug-in cannot be imported.
        UserError: a tensor_parallel_size that does not divide the ranks.
    """
    import_plugins(plugins)
    with open_model(path, eos_token_id) as source:
        launch = Launch.from_environment()
        if launch.world_size % tensor_parallel_size:
            raise UserError(
                f"tensor_parallel_size {tensor_parallel_size} does not divide the {launch.world_size} ranks of this launch"
            )
        if launch.world_size == 1:
            torch.set_num_threads(
                os.cpu_count() or 1
            )  # unlike the ranks of a run, this process has the machine to itself
        dtype = dtype or source.run.get("train", {}).get("dtype", "fp32")
        network = _load(source, launch, dtype, tensor_parallel_size)
        return LoadedModel(network, source.model, source.run, source.step, source.tokenizer)


def _load(source: ModelFolder, launch: Launch, dtype: str, tensor_parallel_size: int) -> HybridLanguageModel:
    """Return the network with its weights. Its modules are the `local` ones, which are light enough for single tokens."""
    parallel = ParallelConfig(tensor_parallel_size=tensor_parallel_size, sequence_parallel=False)
    groups = start_distributed(launch, parallel, seed=0, quiet=True)
    config = source.model.model_copy(update={"backend": "local"})
    (network,) = build_model(config, parallel, PrecisionConfig(), dtype, sequence_length=1, groups=groups)
    layout = ParamLayout(config, groups.tp.rank(), groups.tp.size())
    Collector([network], layout, groups, {}, optimizer_sharded=False).load_weights(source)
    network.eval()
    return network
