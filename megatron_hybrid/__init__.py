"""megatron_hybrid: pretraining of hybrid language models (Gated DeltaNet and attention) on megatron-core."""

from megatron_hybrid.base.nvrx_conflict import hide_old_async_checkpoints

__version__ = "0.2.0"

hide_old_async_checkpoints()  # before any module imports megatron-core
