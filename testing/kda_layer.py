"""Our Kimi Delta Attention mixer and fla's own layer on the same weights, on a GPU. tests/gpu and benchmarks share it."""

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.mixers.kda.hugging_face import to_hugging_face
from megatron_hybrid.mixers.kda.module import KimiDeltaAttention, KimiDeltaAttentionSubmodules
from megatron_hybrid.model.megatron_config import transformer_config

KIMI_LINEAR = dict(
    layer_pattern="K", hidden_size=2304, ffn_hidden_size=9216, vocab_size=163840, num_attention_heads=32, head_dim=72,
    kda=dict(num_heads=32, key_head_dim=128, value_head_dim=128),
)  # fmt: skip
"""Sizes of moonshotai/Kimi-Linear-48B-A3B."""


def build(model: dict, linears: dict[str, type], dtype: str = "bf16") -> tuple[KimiDeltaAttention, torch.nn.Module]:
    """Return our mixer and fla's KimiDeltaAttention with its weights, on the current GPU, in a process group of one rank.

    Args:
        linears: modules of in_proj and out_proj.
    """
    from fla.layers.kda import KimiDeltaAttention as Peer

    if not dist.is_initialized():
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=os.environ.get("MASTER_PORT", "29512"))
        dist.init_process_group("nccl", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = ModelConfig(**model)
    core = transformer_config(config, ParallelConfig(), PrecisionConfig(), dtype)
    core.perform_initialization = True  # a training run fills the parameters itself
    ours = KimiDeltaAttention(core, KimiDeltaAttentionSubmodules(**linears), 1, groups, kda=config.kda)
    kda = config.kda
    theirs = Peer(
        hidden_size=config.hidden_size, head_dim=kda.key_head_dim, num_heads=kda.num_heads, norm_eps=kda.norm_eps,
        expand_v=kda.value_head_dim / kda.key_head_dim,
    ).to("cuda", core.params_dtype)  # fmt: skip
    for name in ("A_log", "dt_bias"):
        getattr(theirs, name).data = getattr(theirs, name).data.float()
    copy_weights(ours, theirs)
    return ours, theirs


@torch.no_grad()
def copy_weights(ours: KimiDeltaAttention, theirs: torch.nn.Module) -> None:
    """Copy our weights into fla's layer. The bias of its output gate, which Kimi Linear lacks, becomes zero."""
    parameters = dict(ours.named_parameters())
    true = {
        part.tensor.name: part.target.narrow(parameters[name].data)
        for name in ours.packing
        for part in ours.slices(name)
    }
    renamed = {"f_a_proj": "f_proj.0", "f_b_proj": "f_proj.1", "g_a_proj": "g_proj.0", "g_b_proj": "g_proj.1"}
    own = dict(theirs.named_parameters())
    for name, tensor in to_hugging_face(true).items():
        module, _, rest = name.partition(".")
        target = own.pop(f"{renamed.get(module, module)}.{rest}" if rest else name)
        target.copy_(tensor.reshape(target.shape))
    own.pop("g_proj.1.bias").zero_()
    assert not own, f"not copied: {', '.join(own)}"
