"""megatron_hybrid: pretraining of hybrid language models (Gated DeltaNet and attention) on megatron-core."""

__version__ = "0.1.0"
