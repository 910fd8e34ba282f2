"""Builds the engine that `train.engine` names."""

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.model.initialize import initialize
from megatron_hybrid.train.engines.base import Engine
from megatron_hybrid.train.engines.megatron import Fill, MegatronEngine


def build_engine(config: RunConfig, groups: ProcessGroupCollection, fill: Fill = initialize) -> Engine:
    """Build the engine of a run, with initial weights.

    Raises:
        ConfigError: a setting that cannot run on this machine.
    """
    common = (config.model, config.train, config.parallel, config.data.sequence_length, groups, config.precision, fill)
    documents = config.data.documents != "keep"
    if config.train.engine == "deepspeed":
        from megatron_hybrid.train.engines.deepspeed.engine import DeepSpeedEngine  # DeepSpeed is optional

        return DeepSpeedEngine(*common, config.zero, documents)
    return MegatronEngine(*common, documents=documents)
