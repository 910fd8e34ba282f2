"""megatron-core 0.19.2 on CPU ranks over gloo, for tests and debugging."""

from megatron.core.models.hybrid import hybrid_block
from megatron.core.transformer import transformer_block
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.cpu_backend import use_cpu_backend
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.model.norms import norm_of_config


def enable_cpu_backend() -> None:
    """Patch this process's megatron-core, and the parts of `torch.cuda` that it calls, so that its models run without a GPU.

    Call it before torch.distributed's groups and the model are made, with backend "gloo". The TransformerConfig needs
    `use_cpu_initialization=True`, fusions off, and `batch_p2p_comm=False` for pipelines. A second call does nothing. A process
    with GPUs must not call it: patches cannot be taken back.

    Raises:
        UserError: a CUDA device is visible.
    """
    if has_cuda():
        raise UserError(
            "enable_cpu_backend: a CUDA device is visible; set CUDA_VISIBLE_DEVICES= (empty) or leave the call out"
        )
    use_cpu_backend()
    # norms that megatron-core gives no slot for: its own refuse sequence parallelism, or are Transformer Engine's
    WrappedTorchNorm.__new__ = staticmethod(lambda cls, *args, **kwargs: norm_of_config(*args, **kwargs))
    transformer_block.LayerNormImpl = hybrid_block.TENorm = norm_of_config
