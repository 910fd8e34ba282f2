"""Whole-model baselines on one GPU: training steps of eight layers of OLMo Hybrid 7B, with embeddings, output layer and optimizer.

python benchmarks/peers.py                  bf16 and FP8, 8,192 tokens per step
    --only REGEX    cases whose name it finds        --steps N    timed steps        --sequence N    tokens

All cases run in one process, one after the other, with random weights and tokens:
- ours: the megatron engine, in bf16 and with tensorwise FP8 linears;
- OLMo-core 3.0: its own model, compiled block by block, with fla and torch's fused AdamW; in bf16 throughout, and with weights,
  gradients and moments in fp32, which its FSDP casts to bf16, as its recipes train;
- transformers with fla, SDPA and torch's fused AdamW;
- megatron-core 0.19.2: HybridModel with its own Gated DeltaNet, which has no negative eigenvalues, pre-norm and no QK norm. 32 heads
  instead of 30 give its projections aligned columns.

Ours and megatron-core's keep fp32 master weights and moments, as OLMo-core does in fp32. The two cases in bf16 throughout move fewer
bytes. A baseline whose package is missing, or that fails, is left out, and a note of the result file says so.
"""

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from qwen import seconds_of  # noqa: E402

PATTERN, HEADS = "GGGA*2", 32
FORMATS = {"bf16": {}, "FP8 tensorwise": {"fp8_recipe": "tensorwise"}}
GOALS = {"bf16": 1.5, "FP8 tensorwise": 2.0}
"""Least ratio to the fastest baseline in bf16."""
Step = Callable[[], None]


def our_engine(model, precision: dict, samples: torch.Tensor, groups) -> Iterator[Step]:
    """Yield a training step of the megatron engine, then close it."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.profiling.engine_steps import fill_at_random, train_one_step
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    train = TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1, dtype="bf16")
    options = dict(precision=PrecisionConfig(**precision), fill=fill_at_random)
    engine = MegatronEngine(model, train, ParallelConfig(), samples.shape[1] - 1, groups, **options)
    print(*engine.backends(1), sep="\n", flush=True)
    batches = [Batch.of_samples(samples.cpu())]

    yield partial(train_one_step, engine, batches, 1e-5)
    engine.close()


def with_torch_adamw(module: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Iterator[Step]:
    """Yield a training step with torch's fused AdamW and clipping."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    yield step


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Draw weights of about the right size. Zeros would draw less power and run faster."""
    for name, parameter in module.named_parameters():
        parameter.fill_(1.0) if "norm" in name or parameter.dim() < 2 else parameter.normal_(0.0, 0.02)


def transformers_fla(model, samples: torch.Tensor, groups) -> Iterator[Step]:
    """Yield a training step of transformers' OlmoHybridForCausalLM."""
    import fla  # noqa: F401 - without it transformers runs plain torch, which is no baseline

    from testing.peers import olmo_model

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            peer = olmo_model(model).train()
    finally:
        torch.set_default_dtype(torch.float32)
    peer.set_attn_implementation("sdpa")
    randomize(peer)
    tokens = samples[:, :-1]
    yield from with_torch_adamw(peer, lambda: peer(tokens, labels=tokens, use_cache=False).loss)


def olmo_core(model, samples: torch.Tensor, groups, dtype: torch.dtype = torch.bfloat16) -> Iterator[Step]:
    """Yield a training step of OLMo-core's own model, whose weights, gradients and moments have this type."""
    from olmo_core.nn.attention import AttentionBackendName, AttentionConfig
    from olmo_core.nn.attention.recurrent import GatedDeltaNetConfig
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.layer_norm import LayerNormConfig
    from olmo_core.nn.lm_head import LMHeadConfig
    from olmo_core.nn.rope import RoPEConfig
    from olmo_core.nn.transformer.config import TransformerBlockConfig, TransformerConfig
    from torch.distributed.device_mesh import init_device_mesh

    norm, gdn = LayerNormConfig(name="rms", eps=model.norm_eps, bias=False), model.gdn
    shared = dict(layer_norm=norm, feed_forward=FeedForwardConfig(hidden_size=model.ffn_hidden_size, bias=False))
    mixer = GatedDeltaNetConfig(
        n_heads=gdn.num_value_heads, head_dim=gdn.key_head_dim, expand_v=gdn.value_head_dim / gdn.key_head_dim
    )
    attention = AttentionConfig(
        n_heads=model.num_attention_heads, bias=False, qk_norm=norm, rope=RoPEConfig(theta=int(model.rope_theta)),
        backend=AttentionBackendName.torch,
    )  # fmt: skip
    config = TransformerConfig(
        d_model=model.hidden_size, vocab_size=model.vocab_size, n_layers=model.num_layers,
        block={
            "gdn": TransformerBlockConfig(name="default", sequence_mixer=mixer, **shared),
            "attn": TransformerBlockConfig(name="reordered_norm", sequence_mixer=attention, **shared),
        },
        block_pattern=["gdn" if symbol == "G" else "attn" for symbol in model.layers[:4]],
        lm_head=LMHeadConfig(layer_norm=norm, bias=False),
    )  # fmt: skip
    peer = config.build(init_device="cuda").to(dtype).train()
    peer.init_weights(device=torch.device("cuda"), max_seq_len=samples.shape[1] - 1)
    peer.apply_compile()
    if dtype != torch.bfloat16:
        peer.apply_fsdp(init_device_mesh("cuda", (1,)), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    tokens, labels = samples[:, :-1], samples[:, 1:].contiguous()
    yield from with_torch_adamw(peer, lambda: peer(tokens, labels=labels, z_loss_multiplier=1e-5).loss)


def megatron_core(model, samples: torch.Tensor, groups) -> Iterator[Step]:
    """Yield a training step of megatron-core's HybridModel with its own Gated DeltaNet."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    gdn, symbols = model.gdn, "".join({"G": "G-", "A": "*-"}[symbol] for symbol in model.layers)
    config = TransformerConfig(
        num_layers=len(symbols), hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, normalization="RMSNorm", layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False, cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te",
        linear_conv_kernel_dim=gdn.conv_kernel_size, linear_key_head_dim=gdn.key_head_dim,
        linear_value_head_dim=gdn.value_head_dim, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
    )  # fmt: skip
    length = samples.shape[1] - 1
    module = HybridModel(
        config, hybrid_stack_spec, model.vocab_size, length, hybrid_layer_pattern=symbols,
        position_embedding_type="rope", rotary_base=int(model.rope_theta), pg_collection=groups,
    ).cuda()  # fmt: skip
    randomize(module)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-5, bf16=True, clip_grad=1.0, weight_decay=0.1), [wrapped])
    tokens, labels = samples[:, :-1], samples[:, 1:].contiguous()
    positions = torch.arange(length, device="cuda").expand_as(tokens)

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        wrapped(tokens, positions, attention_mask=None, labels=labels).mean().backward()
        finalize_model_grads([wrapped], pg_collection=groups)
        optimizer.step()

    yield step


BASELINES = {
    "OLMo-core 3.0": olmo_core,
    "OLMo-core 3.0, fp32 weights and moments": partial(olmo_core, dtype=torch.float32),
    "transformers, fla": transformers_fla,
    "megatron-core 0.19.2, 32 heads": megatron_core,
}


def measured(steps: Iterator[Step], count: int) -> tuple[float, float]:
    """Return seconds of a step and peak gigabytes, and release the model."""
    from kernel_timing import forget

    found = seconds_of(next(steps), count)
    next(steps, None)  # closes an engine
    del steps
    forget()
    return found


def main() -> None:
    from kernel_timing import write_gpu
    from report import row

    from megatron_hybrid.arch.flops import training_flops_per_token
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.distributed.process_groups import stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sequence", type=int, default=8192)
    args, _ = parser.parse_known_args()
    model = olmo_hybrid_7b().model_copy(update={"layer_pattern": PATTERN})
    groups = start_distributed(Launch(0, 0, 1), ParallelConfig(), seed=0, quiet=True)
    generator = torch.Generator("cuda").manual_seed(1)
    samples = torch.randint(model.vocab_size, (1, args.sequence + 1), generator=generator, device="cuda")
    baselines, notes = {}, []
    for name, build in BASELINES.items():
        if re.search(args.only, name):
            try:
                baselines[name] = measured(build(model, samples, groups), args.steps)
            except Exception as error:  # a baseline that fails leaves the others to be measured
                notes.append(f"{name} was left out: {type(error).__name__}: {error}")
                traceback.print_exc()
            print(name, baselines.get(name, notes[-1:]), flush=True)
    rows = []
    for name, precision in FORMATS.items():
        if not re.search(args.only, f"ours, {name}"):
            continue
        seconds, memory = measured(our_engine(model, precision, samples, groups), args.steps)
        work = args.sequence / seconds * training_flops_per_token(model, args.sequence) / 1e12
        rows.append(row(f"{PATTERN}, {name}", "work", "TFLOP/s", work, higher_is_better=True))
        fastest = min(baselines, key=lambda peer: baselines[peer][0]) if baselines else None
        for peer, (theirs, their_memory) in baselines.items():
            result = partial(row, f"{PATTERN}, {name}")
            goal = GOALS[name] if peer == fastest else None
            speeds = (args.sequence / seconds, args.sequence / theirs)
            rows.append(result("training step", "tokens/s", *speeds, f"{peer}, bf16", goal, higher_is_better=True))
            rows.append(result("peak memory", "GB", memory, their_memory, f"{peer}, bf16"))
    write_gpu("peers", rows, notes=notes)
    stop_distributed()


if __name__ == "__main__":
    main()
