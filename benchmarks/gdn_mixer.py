"""The whole Gated DeltaNet mixer of OLMo Hybrid 7B, norm and projections included, against megatron-core's own.

Both are built from the same Transformer Engine linears and hold the same weights; megatron-core's has no negative
eigenvalues, so ours runs without. Run on a Hopper GPU with megatron-core 0.19.2, Transformer Engine, flash-linear-attention
0.6.0 and, for fla's backward, TileLang.
"""

import os

os.environ["FLA_FLASH_QLA"] = "0"  # megatron-core's runs fla's own kernels

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from kernel_timing import cpu_ms, gpu_ms, kernels, write_gpu  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.extensions.transformer_engine import (  # noqa: E402
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm import gated_delta_net as peer  # noqa: E402
from report import row  # noqa: E402

from hybrid_kernels.testing import relative_error  # noqa: E402
from megatron_hybrid.config.parallel import ParallelConfig  # noqa: E402
from megatron_hybrid.config.precision import PrecisionConfig  # noqa: E402
from megatron_hybrid.config.presets import preset  # noqa: E402
from megatron_hybrid.mixers.gated_delta_net.module import GatedDeltaNet, GatedDeltaNetSubmodules  # noqa: E402
from megatron_hybrid.model.megatron_config import transformer_config  # noqa: E402

T = 8192
LARGE = 100  # microseconds


def build():
    """Our mixer and megatron-core's, on the same weights."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=os.environ.get("MASTER_PORT", "29511"))
    dist.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = preset("olmo_hybrid_7b")
    eps = model.norm_eps  # megatron-core has one for all norms
    model = model.model_copy(
        update=dict(gdn=model.gdn.model_copy(update=dict(allow_negative_eigenvalues=False, norm_eps=eps)))
    )
    config = transformer_config(model, ParallelConfig(), PrecisionConfig(), "bf16")
    config.linear_conv_kernel_dim = model.gdn.conv_kernel_size
    config.linear_key_head_dim, config.linear_value_head_dim = model.gdn.key_head_dim, model.gdn.value_head_dim
    config.linear_num_key_heads, config.linear_num_value_heads = model.gdn.num_key_heads, model.gdn.num_value_heads
    linears = dict(in_proj=TELayerNormColumnParallelLinear, out_proj=TERowParallelLinear)
    ours = GatedDeltaNet(config, GatedDeltaNetSubmodules(**linears), 1, groups, gdn=model.gdn)
    theirs = peer.GatedDeltaNet(
        config, peer.GatedDeltaNetSubmodules(**linears, out_norm=TENorm), layer_number=1, pg_collection=groups
    )
    _same_weights(ours, theirs)
    return ours, theirs


@torch.no_grad()
def _same_weights(ours, theirs) -> None:
    """Drawn as the model draws them; what pads our in_proj stays zero."""
    theirs.in_proj.weight.normal_(std=0.02)
    theirs.out_proj.weight.normal_(std=0.02)
    theirs.conv1d.weight.uniform_(-0.5, 0.5)
    theirs.A_log.copy_(torch.empty_like(theirs.A_log).uniform_(1, 16).log())
    dt = torch.exp(torch.empty_like(theirs.dt_bias, dtype=torch.float32).uniform_(-6.9, -2.3))
    theirs.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    theirs.out_norm.weight.fill_(1.0)
    for mixer in (ours, theirs):
        mixer.in_proj.layer_norm_weight.fill_(1.0)
    width = theirs.in_proj.weight.shape[0]
    ours.in_proj.weight.zero_()
    ours.in_proj.weight[:width].copy_(theirs.in_proj.weight)
    ours.out_proj.weight.copy_(theirs.out_proj.weight)
    ours.conv_weight.copy_(theirs.conv1d.weight.squeeze(1))
    ours.A_log.copy_(theirs.A_log)
    ours.dt_bias.copy_(theirs.dt_bias)
    ours.o_norm_weight.fill_(1.0)


def measure(name, mixer, x, dy) -> dict:
    inputs = [x, *mixer.parameters()]

    def forward():
        with torch.no_grad():
            mixer(x, None)

    def both():
        return torch.autograd.grad(mixer(x, None)[0], inputs, dy)

    out = dict(dx=both()[0])
    out["forward"], out["forward + backward"], out["launch time, forward + backward"] = (
        gpu_ms(forward), gpu_ms(both), cpu_ms(both)
    )  # fmt: skip
    launched = kernels(both)
    print(name, {k: round(us) for k, (_, us) in launched.items() if us > 20}, flush=True)
    out["forward + backward, sum of the kernels"] = sum(us for _, us in launched.values()) / 1e3
    out["kernels, forward + backward"] = sum(count for count, _ in launched.values())
    start = torch.cuda.memory_allocated()
    y = mixer(x, None)[0]
    out["y"], out["memory"] = y.detach(), (torch.cuda.memory_allocated() - start - y.nbytes) / (x.shape[0] * x.shape[1])
    return out


def projections(mixer, x) -> tuple[float, float]:
    """Milliseconds of the two linears alone, forward and forward + backward: what no kernel between them can change."""
    packed = mixer.in_proj(x)[0]
    mixed = torch.randn(*x.shape[:2], mixer.out_proj.weight.shape[1], device="cuda", dtype=x.dtype, requires_grad=True)
    dpacked, dy = torch.randn_like(packed), torch.randn_like(x)

    def forward():
        with torch.no_grad():
            return mixer.in_proj(x), mixer.out_proj(mixed)

    def both():
        torch.autograd.grad(mixer.in_proj(x)[0], [x, mixer.in_proj.weight], dpacked)
        torch.autograd.grad(mixer.out_proj(mixed)[0], [mixed, mixer.out_proj.weight], dy)

    return gpu_ms(forward), gpu_ms(both)


if __name__ == "__main__":
    ours, theirs = build()
    x = torch.randn(T, 1, 3840, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(T, 1, 3840, device="cuda", dtype=torch.bfloat16)
    print(*ours.backends(T, 1), sep="\n", flush=True)
    mine, their = measure("ours", ours, x, dy), measure("megatron-core", theirs, x, dy)
    case, name, rows = f"B 1, T {T}, 30 heads, bf16", "megatron-core 0.19.2 with fla 0.6", []
    for metric in ("forward", "forward + backward", "forward + backward, sum of the kernels"):
        rows.append(row(case, metric, "ms", mine[metric], their[metric], name, 1.8))
    rows.append(row(case, metric := "launch time, forward + backward", "ms", mine[metric], their[metric], name))
    rows.append(row(case, metric := "kernels, forward + backward", "launches", mine[metric], their[metric], name))
    rows.append(row(case, "kept for the backward", "bytes a token", mine["memory"], their["memory"], name))
    for metric, own, other in zip(
        ("forward", "forward + backward"), projections(ours, x), projections(theirs, x)
    ):  # fmt: skip
        rows.append(row(case, f"{metric}, the two projections alone", "ms", own, other, name))
        between = (mine[metric] - own, their[metric] - other)
        rows.append(row(case, f"{metric}, without the projections", "ms", *between, name))
    for what in ("y", "dx"):
        rows.append(
            row(case, f"difference of {what} from {name}", "relative RMS", relative_error(mine[what], their[what]))
        )
    write_gpu("gdn_mixer", rows)
    dist.destroy_process_group()
