"""One Gated DeltaNet block and one attention block of OLMo Hybrid 7B, MLP included, against megatron-core 0.19.2's own: forward,
and forward with backward, weight gradients added to fp32 buffers, one sequence of 8192.

megatron-core's blocks are its `hybrid_stack_spec` with its fused options on; they lack OLMo's post-norm, QK norm and negative
eigenvalues, which ours have. Its Gated DeltaNet runs fla's Triton kernels.

python benchmarks/blocks.py            torchrun --nproc-per-node 2 benchmarks/blocks.py      (tensor parallel 2)
    --formats bf16     --profile
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ["FLA_FLASH_QLA"] = "0"

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

SEQUENCE = 8192
FORMATS = {"bf16": {}, "FP8 tensorwise": {"fp8_recipe": "tensorwise"}, "FP8 blockwise": {"fp8_recipe": "blockwise"}}
BLOCKS = {"Gated DeltaNet": ("G", 1.5), "attention": ("*", None)}
PEER = "megatron-core 0.19.2"


def our_stack(model, parallel, precision, groups, symbol: str):
    """A stack of one layer, as the trainer builds it."""
    from megatron_hybrid.model.backends.choose import choose_backend
    from megatron_hybrid.model.hybrid_model import HybridLayers
    from megatron_hybrid.model.hybrid_stack import SLOT, one_slot
    from megatron_hybrid.model.layer_specs import layer_specs
    from megatron_hybrid.model.megatron_config import transformer_config

    backend, _ = choose_backend(model.backend, precision, "bf16")
    one_layer = model.model_copy(update=dict(layer_pattern={"G": "G", "*": "A"}[symbol]))
    config = transformer_config(model, parallel, precision, "bf16")
    return HybridLayers(
        config,
        one_slot(layer_specs(one_layer, backend)),
        norm=backend.norm,
        precision=precision,
        post_process=False,
        layer_type_list=[SLOT],
        pg_collection=groups,
    )


def their_stack(model, parallel, precision, groups, symbol: str):
    """megatron-core's mixer block and MLP block."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from megatron_hybrid.model.megatron_config import transformer_config

    config = copy.copy(transformer_config(model, parallel, precision, "bf16"))
    gdn = model.gdn
    for name, value in dict(
        linear_conv_kernel_dim=gdn.conv_kernel_size,
        linear_key_head_dim=gdn.key_head_dim,
        linear_value_head_dim=gdn.value_head_dim,
        linear_num_key_heads=gdn.num_key_heads,
        linear_num_value_heads=gdn.num_value_heads,
        gradient_accumulation_fusion=True,
        apply_rope_fusion=True,
        perform_initialization=True,
    ).items():
        setattr(config, name, value)
    return HybridStack(
        config,
        hybrid_stack_spec.submodules,
        post_process=False,
        post_layer_norm=False,
        layer_type_list=[symbol, "-"],
        pg_collection=groups,
    )


def runs(stack, angles, tensor_parallel_size: int) -> dict[str, Callable]:
    """Return the functions to measure of a stack. They have run once, so that their kernels are compiled."""
    for parameter in stack.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    shape = (SEQUENCE // tensor_parallel_size, 1, stack.config.hidden_size)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def run():
        return stack(hidden_states=x, attention_mask=None, rotary_pos_emb=angles)

    def forward():
        with torch.no_grad():
            return run()

    def both():
        run().backward(dy)
        x.grad = None
        for parameter in stack.parameters():
            parameter.grad = None

    assert forward().isfinite().all()
    both()
    return {"forward": forward, "forward + backward": both}


def main() -> None:
    from kernel_timing import gpu_ms, write_gpu
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from report import row
    from train_step import kernel_kinds

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.distributed.process_groups import stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--profile", action="store_true", help="where the time of each goes, ours and theirs")
    args, _ = parser.parse_known_args()
    launch, model = Launch.from_environment(), olmo_hybrid_7b()
    parallel = ParallelConfig(tensor_parallel_size=launch.world_size)
    groups = start_distributed(launch, parallel, seed=0)
    angles = RotaryEmbedding(model.attention_head_dim, 1.0, rotary_base=int(model.rope_theta or 0))(SEQUENCE)
    rows: list[dict] = []
    for name in args.formats.split(","):
        options = FORMATS[name]
        for block, (symbol, goal) in BLOCKS.items():
            precision, case = PrecisionConfig(**options), f"{block} block, TP{launch.world_size}, {name}"
            sizes = (model, parallel, precision, groups, symbol)
            ours = runs(our_stack(*sizes), angles, launch.world_size)
            try:
                theirs = runs(their_stack(*sizes), angles, launch.world_size)
            except (AssertionError, RuntimeError, ValueError) as error:
                print(f"{case}: {PEER} fails: {str(error)[:200]}", flush=True)
                theirs = {}
            for metric, run in ours.items():
                peer = gpu_ms(theirs[metric]) if theirs else None
                rows.append(row(case, metric, "ms", gpu_ms(run), peer, PEER, goal if name == "bf16" else None))
                if args.profile:
                    print(case, metric, kernel_kinds(run), kernel_kinds(theirs[metric]) if theirs else "", flush=True)
            del ours, theirs
            torch.cuda.empty_cache()
            if launch.rank == 0:
                write_gpu("blocks" if launch.world_size == 1 else f"blocks_tp{launch.world_size}", rows)
    stop_distributed()


if __name__ == "__main__":
    main()
