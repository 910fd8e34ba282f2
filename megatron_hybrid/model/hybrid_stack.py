"""megatron-core's stack of hybrid layers with a final norm of our choice."""

from megatron.core.models.hybrid.hybrid_block import HybridStack


class HybridStackWithNorm(HybridStack):
    """HybridStack whose final norm is `norm`: its own is hard-coded to Transformer Engine's (hybrid_block.py:215)."""

    def __init__(self, config, *args, norm: type, post_layer_norm: bool = True, **kwargs):
        super().__init__(config, *args, **kwargs, post_layer_norm=False)
        self.post_layer_norm = post_layer_norm
        if self.post_process and self.post_layer_norm:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
