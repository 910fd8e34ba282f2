"""The layer spec in a GPTModel of plain megatron-core on one GPU: curves in every format against the CPU's, gradients, recompute,
and the mixer's time against megatron-core's own Gated DeltaNet.

    --cpu FILE    only the CPU's curve, in fp32: its initial weights and losses go to FILE (the benchmark runs this itself)
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402

from megatron_hybrid.spec import (  # noqa: E402
    GatedDeltaNetConfig,
    enable_cpu_backend,
    gated_delta_net_layer_spec,
    optimizer_config_overrides,
)

VOCABULARY, SEQUENCE, BATCH, STEPS = 512, 256, 4, 10
GDN = GatedDeltaNetConfig(num_key_heads=4, num_value_heads=4, key_head_dim=96, value_head_dim=192)
BF16 = dict(params_dtype=torch.bfloat16, bf16=True)
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
# case: backend, fields of TransformerConfig, the case it is held against, the largest relative difference of losses
CASES = {
    "fp32, local": ("local", {}, "CPU", 1e-4),
    "bf16, local": ("local", BF16, "CPU", 2e-2),
    "bf16": ("transformer_engine", BF16, "CPU", 2e-2),
    "bf16, selective recompute": ("transformer_engine", BF16 | SELECTIVE, "bf16", 1e-4),
    "bf16, full recompute": ("transformer_engine", BF16 | FULL, "bf16", 1e-4),
    "fp8 tensorwise": ("transformer_engine", BF16 | dict(fp8="hybrid", fp8_recipe="tensorwise"), "bf16", 2e-2),
    "fp8 delayed": ("transformer_engine", BF16 | dict(fp8="hybrid", fp8_recipe="delayed"), "bf16", 2e-2),
    "fp8 delayed, full recompute": (
        "transformer_engine",
        BF16 | FULL | dict(fp8="hybrid", fp8_recipe="delayed"),
        "bf16",
        2e-2,
    ),
}
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.in_proj.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def config_of(layers: int, hidden: int, ffn: int, **more) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=hidden // 128,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **more,
    )


def build(backend: str, **more) -> GPTModel:
    config = config_of(4, 512, 1408, **more)
    return GPTModel(config, gated_delta_net_layer_spec(GDN, backend), VOCABULARY, SEQUENCE)


def load(module: GPTModel, weights: dict[str, torch.Tensor], backend: str) -> None:
    """Copy the CPU's initial weights, whose norms are in the linears with Transformer Engine."""
    parameters = dict(module.named_parameters())
    for name, value in weights.items():
        if backend == "transformer_engine":
            for plain, fused in FUSED_NORMS.items():
                name = name.replace(plain, fused)
        with torch.no_grad():
            parameters.pop(name).copy_(value)
    assert not parameters, f"not set: {list(parameters)}"


def curve(module: GPTModel, steps: int) -> dict:
    """Losses of `steps` steps, and how many parameters start at zero and have no gradient in the first."""
    config = module.config
    zero = sum(not p.any() for p in module.parameters())
    wrapped = Float16Module(config, module) if config.bf16 else module
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(config, ddp_config, wrapped)
    options = OptimizerConfig(
        lr=1e-3, adam_eps=1e-5, clip_grad=1.0, bf16=config.bf16, params_dtype=config.params_dtype, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(options, [ddp], config_overrides=optimizer_config_overrides(options))
    device, losses, dead = next(module.parameters()).device, [], 0
    for step in range(steps):
        start = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(step))
        x = ((start + torch.arange(SEQUENCE + 1)) % VOCABULARY).to(device)
        positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        module.set_is_first_microbatch()
        loss = ddp(x[:, :-1], positions, None, labels=x[:, 1:]).mean()
        loss.backward()
        finalize_model_grads([ddp])
        if step == 0:
            dead = sum(not p.main_grad.any() or not p.main_grad.isfinite().all() for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "zero": zero, "dead": dead}


def join(cpu: bool) -> None:
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo" if cpu else "nccl", init_method=f"file://{store.name}_store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)


def on_cpu(file: Path, steps: int) -> None:
    """The oracle: weights and losses in fp32."""
    enable_cpu_backend()
    join(cpu=True)
    module = build("local", use_cpu_initialization=True)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    torch.save({"weights": weights, "found": curve(module, steps)}, file)


def difference(expected: dict, found: dict) -> float:
    """Return the largest difference of losses, relative to the first loss: the later ones fall to a thirtieth of it."""
    pairs = list(zip(expected["losses"], found["losses"], strict=True))
    return max(abs(a - b) / pairs[0][0] if b == b else float("inf") for a, b in pairs)


def speed() -> tuple[float, float | None]:
    """ms forward and backward of a layer without its MLP at the 7B's sizes: ours, megatron-core's (None: it cannot run here)."""
    from kernel_timing import gpu_ms
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    gdn = GatedDeltaNetConfig(num_key_heads=30, num_value_heads=30, key_head_dim=96, value_head_dim=192)
    config = config_of(1, 3840, 11008, **BF16)
    config.linear_conv_kernel_dim, config.linear_key_head_dim, config.linear_value_head_dim = 4, 96, 192
    config.linear_num_key_heads = config.linear_num_value_heads = 30
    x = torch.randn(8192, 1, 3840, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    times: list[float | None] = []
    for spec in (gated_delta_net_layer_spec(gdn, mlp=False), hybrid_stack_spec.submodules.gdn_layer):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        try:
            layer = build_module(spec, config=config, layer_number=1, pg_collection=groups, add_layer_offset=False)
            layer = layer.cuda().bfloat16()

            def run(layer=layer):
                layer(x, attention_mask=None)[0].backward(x)
                x.grad = None
                layer.zero_grad(set_to_none=True)

            times.append(gpu_ms(run))
        except (AssertionError, ImportError, RuntimeError, ValueError) as error:
            if not times:
                raise
            print(f"megatron-core's Gated DeltaNet fails: {str(error)[:300]}", flush=True)
            times.append(None)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    args, _ = parser.parse_known_args()
    if args.cpu:
        return on_cpu(args.cpu, args.steps)
    from kernel_timing import write_gpu
    from report import bounded, row

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cpu.pt"
        command = [sys.executable, __file__, "--cpu", str(file), "--steps", str(args.steps)]
        subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        oracle = torch.load(file, weights_only=True)
    join(cpu=False)
    found, rows = {"CPU": oracle["found"]}, []
    for case, (backend, fields, against, goal) in CASES.items():
        module = build(backend, **fields).cuda()
        load(module, oracle["weights"], backend)
        found[case] = result = curve(module, args.steps)
        other = f"{case}: a GPU from the CPU in fp32" if against == "CPU" else f"{case}: from {against}"
        rows.append(bounded(other, "loss, relative to the first", "", difference(found[against], result), goal))
        rows.append(bounded(case, "last loss of the first", "relative", result["losses"][-1] / result["losses"][0], 0.9))
        rows.append(bounded(case, "parameters that start at zero", "", result["zero"], 0))
        rows.append(bounded(case, "parameters without a finite gradient", "", result["dead"], 0))
        write_gpu("layer_spec", rows)
    ours, theirs = speed()
    case = "layer without MLP, 7B sizes, 8192 tokens, bf16"
    rows.append(row(case, "forward + backward", "ms", ours, theirs, "megatron-core 0.19.2"))
    write_gpu("layer_spec", rows)


if __name__ == "__main__":
    main()
