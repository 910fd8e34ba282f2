"""Train a small model with plain megatron-core and this package's layers: `torchrun --nproc-per-node 2 train_plain.py --tp 2 --sp`."""

import argparse
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.spec import (
    GatedDeltaNetConfig,
    enable_cpu_backend,
    gated_delta_net_layer_spec,
    olmo_hybrid_stack_spec,
)

VOCABULARY, SEQUENCE = 128, 64
GDN = GatedDeltaNetConfig(num_key_heads=6, num_value_heads=6, key_head_dim=16, value_head_dim=32)


def build(model: str, tp: int, sp: bool, **more) -> torch.nn.Module:
    """A GPTModel of Gated DeltaNet layers alone, or a HybridModel with attention among them."""
    cpu = not torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=tp, sequence_parallel=sp, use_cpu_initialization=cpu, **more,
    )  # fmt: skip
    if model == "gpt":
        return GPTModel(config, gated_delta_net_layer_spec(GDN), VOCABULARY, SEQUENCE)
    return HybridModel(config, olmo_hybrid_stack_spec(GDN), VOCABULARY, SEQUENCE, hybrid_layer_pattern="G*")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [4, SEQUENCE]: counting, from a random start."""
    start = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(step))
    x = (start + torch.arange(SEQUENCE + 1)) % VOCABULARY
    return x[:, :-1], x[:, 1:]


def train(module: torch.nn.Module, steps: int) -> list[float]:
    """The losses of `steps` steps, nats per token."""
    ddp = DistributedDataParallel(module.config, DistributedDataParallelConfig(), module)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, clip_grad=1.0), [ddp])
    device, losses = next(module.parameters()).device, []
    for step in range(steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        tokens, labels = (x.to(device) for x in batch(step))
        positions = torch.arange(SEQUENCE, device=device).expand_as(tokens)
        loss = ddp(tokens, positions, attention_mask=None, labels=labels).mean()
        loss.backward()
        finalize_model_grads([ddp])
        optimizer.step()
        losses.append(float(loss))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["gpt", "hybrid"], default="gpt")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        enable_cpu_backend()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(args.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    losses = train(build(args.model, args.tp, args.sp), steps=20)
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token")


if __name__ == "__main__":
    main()
