"""Jobs of the layer specs' tests: plain megatron-core, without this package's trainer unless a job compares with it."""

import dataclasses
import importlib.util
import math
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_hybrid.spec import enable_cpu_backend, gated_delta_net_layer_spec, optimizer_config_overrides
from testing.documents import relative_error

ROOT = Path(__file__).resolve().parent.parent.parent
WD_GROUPS = "a group of their own"


@cache
def example() -> ModuleType:
    """examples/megatron_lm/train_plain.py."""
    path = ROOT / "examples" / "megatron_lm" / "train_plain.py"
    spec = importlib.util.spec_from_file_location("train_plain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(tp: int, pp: int = 1, seed: int = 1) -> None:
    """Form megatron-core's groups on the CPU."""
    enable_cpu_backend()
    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def loss_of(module, step: int = 0) -> torch.Tensor:
    """The mean loss of a batch."""
    tokens, labels = example().batch(step)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return module(tokens, positions, attention_mask=None, labels=labels).mean()


def first_step(module) -> dict:
    """The loss, and the names of parameters that are all zero and of those whose gradients are."""
    zero = [name for name, p in module.named_parameters() if not p.any()]
    loss = loss_of(module)
    loss.backward()
    dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    module.zero_grad(set_to_none=True)
    return {"loss": float(loss.detach()), "zero": zero, "dead": dead, "not finite": bad}


def trained(tp: int, sequence_parallel: list[bool], steps: int) -> dict[tuple, dict]:
    """Return findings of the first step and the losses of the example's training, by model and sequence parallelism."""
    start(tp)
    found = {}
    for model in ("gpt", "hybrid"):
        for sp in sequence_parallel:
            torch.manual_seed(1)
            module = example().build(model, tp, sp)
            found[model, sp] = first_step(module) | {"losses": example().train(module, steps)}
    return found


def reloaded(tp: int, folder: str, save: bool) -> dict[str, tuple[float, float]]:
    """The losses of both models before and after an SGD step with momentum, saved first or loaded from `folder`.

    Models that load are drawn from another seed, so that nothing of them is left.
    """
    start(tp, seed=1 if save else 2)
    found = {}
    for model in ("gpt", "hybrid"):
        module = example().build(model, tp, sp=tp > 1)
        ddp = DistributedDataParallel(module.config, DistributedDataParallelConfig(), module)
        options = dict(optimizer="sgd", lr=0.1, sgd_momentum=0.9, weight_decay=0.0, clip_grad=0.0)
        optimizer = get_megatron_optimizer(OptimizerConfig(**options), [ddp])
        path = Path(folder) / model
        step(ddp, optimizer, 0)  # momentum
        state = {"model": module.sharded_state_dict()}
        state["optimizer"] = optimizer.sharded_state_dict(state["model"])
        if save:
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                path.mkdir()
            torch.distributed.barrier()
            with shared_write_results():
                dist_checkpointing.save(state, str(path))
        else:
            state = dist_checkpointing.load(state, str(path))
            module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        padding = [name for name in padded(module) if name]
        assert not padding, f"padding that is not zero: {padding}"
        with torch.no_grad():
            before = float(loss_of(module, 1))
        step(ddp, optimizer, 2)
        with torch.no_grad():
            found[model] = before, float(loss_of(module, 1))
    return found


@contextmanager
def shared_write_results() -> Iterator[None]:
    """Give megatron-core's writer the queue that it would start a process for: a test's ranks are daemons, which may not."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    process = multiprocessing.current_process()
    process._config["daemon"] = False
    with multiprocessing.get_context("fork").Manager() as manager:
        filesystem_async._results_queue = manager.Queue()
        yield


def padded(module) -> list[str]:
    """Parameters of mixers that hold anything outside their pieces."""
    wrong = []
    for name, mixer in module.named_modules():
        for parameter in getattr(mixer, "packing", {}):
            rest = mixer.get_parameter(parameter).detach().clone()
            for piece in mixer.slices(parameter):
                piece.target.narrow(rest).zero_()
            if rest.any():
                wrong.append(f"{name}.{parameter}")
    return wrong


def step(ddp, optimizer, number: int) -> None:
    """One step of plain megatron-core."""
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    loss_of(ddp, number).backward()
    finalize_model_grads([ddp])
    optimizer.step()


def beside_trainer(tp: int) -> dict[str, tuple[float, float]]:
    """Return the trainer's loss and the spec's from the trainer's weights, by model."""
    from megatron_hybrid.distributed.process_groups import leave_groups
    from testing.jobs import make_engine, named_parameters

    enable_cpu_backend()
    module_of, found = example(), {}
    for model, pattern in (("gpt", "GG"), ("hybrid", "GA")):
        fields = dict(
            layer_pattern=pattern,
            hidden_size=64,
            ffn_hidden_size=256,
            vocab_size=module_of.VOCABULARY,
            num_attention_heads=4,
            num_key_value_heads=4,
            gdn=module_of.GDN.model_dump(),
            rope_theta=None,
            norm_eps=1e-5,
        )
        engine = make_engine(
            fields, dict(tensor_parallel_size=tp), dict(steps=1, global_batch_size=4, dtype="fp32"), module_of.SEQUENCE
        )
        options = {} if model == "hybrid" else {"position_embedding_type": "none"}
        spec = build_without_positions(module_of, model, tp, **options)
        theirs = {name: p for name, p, _ in named_parameters(engine)}
        with torch.no_grad():
            for name, parameter in spec.named_parameters():
                parameter.copy_(theirs[name.replace("final_layernorm", "final_norm")])
        tokens, labels = module_of.batch(0)
        mask = torch.ones_like(labels, dtype=torch.float32)
        with torch.no_grad():
            expected = engine.chunks[0](tokens, labels, mask)[1]
            found[model] = float(expected), float(loss_of(spec))
        engine.close()
        leave_groups()
    return found


def build_without_positions(module_of, model: str, tp: int, **options):
    """The example's model without learned positions, which the trainer's models do not have."""
    if model == "hybrid":
        return module_of.build(model, tp, sp=tp > 1)
    from megatron.core.models.gpt import GPTModel

    config = module_of.build("gpt", tp, sp=tp > 1).config
    layer = gated_delta_net_layer_spec(module_of.GDN)
    return GPTModel(config, layer, module_of.VOCABULARY, module_of.SEQUENCE, **options)


def packed_documents(tp: int, sp: bool, lengths: list[int]) -> dict[str, float]:
    """Return, by model, the largest relative error of logits and gradients of PackedSeqParams from each document alone."""
    start(tp)
    found = {}
    for model in ("gpt", "hybrid"):
        torch.manual_seed(1)
        module = example().build(model, tp, sp)
        if model == "hybrid":
            module.position_embedding_type = "rope"
            module.rotary_pos_emb = RotaryEmbedding(16, 1.0, use_cpu_initialization=True)
        tokens = torch.randint(example().VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        bounds = torch.tensor([0, *lengths, 0], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        longest = max(lengths)
        packed = PackedSeqParams("thd", bounds, bounds.clone(), max_seqlen_q=longest, max_seqlen_kv=longest)
        together = module(tokens, positions, None, packed_seq_params=packed)
        parts = zip(tokens.split(lengths, 1), positions.split(lengths, 1), strict=True)
        alone = torch.cat([module(*part, None) for part in parts], 1)
        values = [together, alone]
        pairs = [[x.detach() for x in values]] + list(zip(*(gradients(module, x) for x in values), strict=True))
        found[model] = max(relative_error(*pair) for pair in pairs)
    return found


def padded_documents(tail: int) -> dict[str, float]:
    """Return, by model, the largest difference of logits that padding after packed documents makes: the longest has 4 tokens."""
    start(1)
    found = {}
    for model in ("gpt", "hybrid"):
        torch.manual_seed(1)
        module = example().build(model, 1, False)
        module.position_embedding_type = "rope"
        module.rotary_pos_emb = RotaryEmbedding(16, 1.0, use_cpu_initialization=True)
        tokens = torch.arange(8 + tail)[None]
        bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
        logits = []
        for length in (8, 8 + tail):
            packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=4, max_seqlen_kv=4)
            positions = torch.arange(length)[None]
            logits.append(module(tokens[:, :length], positions, None, packed_seq_params=packed)[:, :8])
        found[model] = float((logits[0] - logits[1]).detach().abs().max())
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=3, max_seqlen_kv=3)
        try:
            module(tokens[:, :8], torch.arange(8)[None], None, packed_seq_params=packed)
        except RuntimeError as error:
            assert "max_seqlen_q is below the length of the longest document" in str(error)
        else:
            raise AssertionError("a document longer than max_seqlen_q was accepted")
    return found


def gradients(module, logits: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of a weighted sum of logits, of replicated weights summed over the ranks that share the tokens."""
    weights, parameters = torch.linspace(-1, 1, logits.numel()).view_as(logits), list(module.parameters())
    found = torch.autograd.grad((logits * weights).sum(), parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return list(found)


def recomputed() -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of the GPTModel by how it recomputes."""
    start(1)
    ways = {
        "none": {},
        "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
        "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    }
    found = {}
    for way, options in ways.items():
        torch.manual_seed(1)
        module = example().build("gpt", 1, False, **options)
        loss_of(module).backward()
        found[way] = {name: p.grad for name, p in module.named_parameters()}
    return found


def in_stages(tp: int, pp: int) -> float | None:
    """The GPTModel's loss over pipeline stages, by megatron-core's schedule; None where a stage has none."""
    from megatron.core.models.gpt import GPTModel

    start(tp, pp)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, normalization="RMSNorm", add_bias_linear=False,
        hidden_dropout=0.0, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=tp > 1,
        use_cpu_initialization=True, batch_p2p_comm=False, pipeline_dtype=torch.float32, init_method_std=1e-3,
    )  # fmt: skip
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    options = dict(pre_process=first, post_process=last)
    layer = gated_delta_net_layer_spec(example().GDN)
    module = GPTModel(config, layer, example().VOCABULARY, example().SEQUENCE, **options)

    def forward(batches, model):
        tokens, labels = next(batches)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None, labels=labels), lambda out: (out.mean(), {"loss": out.mean().detach()})

    outputs = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter([example().batch(i) for i in range(2)]), model=module,
        num_microbatches=2, seq_length=example().SEQUENCE, micro_batch_size=4, forward_only=False,
    )  # fmt: skip
    dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead
    return float(sum(output["loss"] for output in outputs) / 2) if outputs else None


def in_bf16() -> dict:
    """A bf16 model: dtypes, values and optimizer groups of its fp32 scalars."""
    start(1)
    module = example().build("gpt", 1, False, params_dtype=torch.bfloat16, bf16=True)
    scalars = {n: p for n, p in module.named_parameters() if n.endswith(("A_log", "dt_bias"))}
    before = {name: p.detach().clone() for name, p in scalars.items()}
    wrapped = Float16Module(module.config, module)
    same = all(p is scalars[n] and torch.equal(p, before[n]) for n, p in module.named_parameters() if n in scalars)
    config = OptimizerConfig(lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(module.config, ddp_config, wrapped)
    right = {}
    for groups, overrides in (("standard", None), (WD_GROUPS, optimizer_config_overrides(config))):
        optimizer = get_megatron_optimizer(config, [ddp], config_overrides=overrides)
        (part,) = optimizer.chained_optimizers
        sizes = {
            name: (p.numel(), part._get_main_param_and_optimizer_states(p)["param"].numel())
            for name, p in ddp.named_parameters()
        }
        right[groups] = all(a == b for a, b in sizes.values())
        decays = {group["wd_mult"] for group in optimizer.param_groups for p in group["params"] if p.numel() == 6}
    step(ddp, optimizer, 0)
    moved = all(not torch.equal(p, before[n]) for n, p in scalars.items())
    return {
        "dtypes": {n.rpartition(".")[2]: p.dtype for n, p in module.named_parameters()},
        "same": same,
        "moved": moved,
        "states found": right,
        "decays": decays,
    }


def refusals() -> dict[str, str]:
    """Return the layer's errors about inputs and configurations that it does not support, by their names."""
    start(1)
    module = example().build("hybrid", 1, False)
    x, s = torch.randn(8, 2, 64), 8
    said = {}

    def note(name: str, call) -> None:
        try:
            call()
            said[name] = "accepted"
        except ValueError as error:
            said[name] = f"{error}"

    causal = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    changed = causal.clone()
    for kind, layer in zip(("gdn", "attention"), module.decoder.layers, strict=True):
        expected = layer(x, attention_mask=None)[0]
        note(f"{kind} causal", lambda layer=layer, y=expected: torch.testing.assert_close(layer(x, causal)[0], y))
        for field in ("packed_seq_params", "inference_context", "attention_bias", "sequence_len_offset"):
            note(f"{kind} {field}", lambda layer=layer, field=field: layer.self_attention(x, **{field: object()}))
        for mask in (torch.zeros_like(causal), torch.ones_like(causal), causal[..., :1, :], causal.float()):
            note(f"{kind} attention_mask", lambda layer=layer, mask=mask: layer(x, attention_mask=mask))
        layer(x, changed)
        changed[..., :3] = True
        note(f"{kind} attention_mask", lambda layer=layer: layer(x, changed))
        changed.copy_(causal)
    for field, value in {
        "context_parallel_size": 2,
        "add_bias_linear": True,
        "attention_dropout": 0.1,
        "fp8": "hybrid",
        "rotary_interleaved": True,
        "add_qkv_bias": True,
        "attention_output_gate": True,
        "qk_l2_norm": True,
        "qk_clip": True,
        "multi_latent_attention": True,
        "softmax_type": "off-by-one",
    }.items():
        note(field, lambda field=field, value=value: build_with(field, value))
    note("rotary_percent", lambda: loss_of(hybrid("rope", rotary_percent=0.5)))
    note("hybrid_layer_pattern", lambda: build_with("pattern", "G-"))
    return said


def hybrid(positions: str, scale: float = 1.0, fields: dict | None = None, **options) -> torch.nn.Module:
    """A HybridModel like the example's, with weights of one seed and the queries of attention multiplied by `scale`."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_hybrid.spec import olmo_hybrid_stack_spec

    plain = example().build("hybrid", 1, False).config
    config = TransformerConfig(
        **{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.name in FIELDS}
    )
    for name, value in (fields or {}).items():
        setattr(config, name, value)
    torch.manual_seed(1)
    sizes = dict(vocab_size=example().VOCABULARY, max_sequence_length=64, hybrid_layer_pattern="G*")
    spec = olmo_hybrid_stack_spec(example().GDN)
    module = HybridModel(config, spec, **sizes, position_embedding_type=positions, **options)
    with torch.no_grad():
        module.decoder.layers[1].self_attention.q_norm_weight.mul_(scale)
    return module


FIELDS = (
    "num_layers", "hidden_size", "num_attention_heads", "normalization", "gated_linear_unit", "activation_func",
    "add_bias_linear", "hidden_dropout", "attention_dropout", "use_cpu_initialization",
)  # fmt: skip
YARN = dict(
    yarn_rotary_scaling_factor=8.0, yarn_original_max_position_embeddings=16, yarn_beta_fast=32.0, yarn_beta_slow=1.0,
    yarn_mscale_all_dim=0.0, yarn_correction_range_round_to_int=True,
)  # fmt: skip


def attention_settings() -> dict[str, tuple[float, float, float]]:
    """Return losses of a HybridModel by setting: with it, of an equal model without it, and of one without both."""
    start(1)
    d = 16
    factor = 0.1 * math.log(8.0) + 1.0  # the concentration of YaRN at 8 times the length
    zero_centered = dict(layernorm_zero_centered_gamma=True)
    without_norms = ("q_norm_weight", "k_norm_weight")
    cases = {
        "no_rope_freq": (hybrid("rope", fields={"no_rope_freq": [1, 1]}), hybrid("none"), hybrid("rope")),
        "softmax_scale": (hybrid("rope", fields={"softmax_scale": 3 * d**-0.5}), hybrid("rope", 3.0), hybrid("rope")),
        "yarn_mscale": (
            hybrid("yarn", fields=YARN | {"yarn_mscale": 1.0}),
            hybrid("yarn", factor**2, fields=YARN | {"yarn_mscale": 0.0}),
            hybrid("yarn", fields=YARN | {"yarn_mscale": 0.0}),
        ),
    }
    centered = hybrid("rope", fields=zero_centered)
    assert all(not dict(centered.decoder.layers[1].self_attention.named_parameters())[n].any() for n in without_norms)
    with torch.no_grad():
        return {name: tuple(float(loss_of(module)) for module in models) for name, models in cases.items()}


def build_with(field: str, value):
    """The hybrid example with one field of its configuration set afterwards, as megatron-core would not allow on a CPU."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_hybrid.spec import olmo_hybrid_stack_spec

    config = example().build("hybrid", 1, False).config
    pattern = value if field == "pattern" else "G*"
    if field != "pattern":
        setattr(config, field, value)
    module_of = example()
    return HybridModel(
        config, olmo_hybrid_stack_spec(module_of.GDN), module_of.VOCABULARY, 64, hybrid_layer_pattern=pattern
    )
