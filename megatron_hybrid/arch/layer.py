"""The parameters of a whole layer (its mixer's, its norms' and its MLP's) and of what is outside the layers, with their packing."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.mixer import MixerSpec
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import FP8_ALIGNMENT, PackedParameter, TensorSpec, norm_init
from megatron_hybrid.arch.registry import mixer_spec

MLP_INPUT, MLP_OUTPUT = "linear_fc1", "linear_fc2"
BEFORE_LAYERS = ("embedding", "embedding_norm")
"""Those of `outer_parameters` that the first pipeline stage holds. The last one holds the others."""
_MODULES = ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp")
"""megatron-core's names of a layer's modules, in the order of its constructor."""


def layer_parameters(model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
    """Return a layer's parameters in the order of checkpoints.

    Names are megatron-core's, without fusion of norms and linears (`input_layernorm.weight`, see `fused_norms`). Tensor names
    are relative to the layer (`gdn.q_proj.weight`).
    """
    return (*_mixer(model, block), *_mlp(model, block))


def in_module_order(parameters: Iterable[PackedParameter]) -> list[PackedParameter]:
    """Return a layer's parameters in the order of torch's `named_parameters`: of every module, its own come first."""

    def place(parameter: PackedParameter) -> tuple[int, bool]:
        module, _, rest = parameter.name.partition(".")
        return _MODULES.index(module), "." in rest

    return sorted(parameters, key=place)


def fused_norms(spec: MixerSpec) -> dict[str, str]:
    """Return the names that norms have in linears they are fused into, each with its name in `layer_parameters`."""
    return {
        f"self_attention.{spec.input_linear}.layer_norm_weight": "input_layernorm.weight",
        f"mlp.{MLP_INPUT}.layer_norm_weight": "pre_mlp_layernorm.weight",
    }


def _mixer(model: ModelFields, block: Block) -> Iterator[PackedParameter]:
    spec = mixer_spec(block.mixer)
    for parameter in placed_parameters(spec, spec.parameters(model, block), block):
        yield parameter.placed("self_attention", spec.prefix)
    yield from _norms(model, block, "input_layernorm", f"self_attention.{spec.output_linear}", "mixer_norm")


def placed_parameters(
    spec: MixerSpec, parameters: Iterable[PackedParameter], block: Block
) -> Iterator[PackedParameter]:
    """Yield a mixer's parameters by the names they have in its module: a post-norm wraps the output linear."""
    output = f"{spec.output_linear}.weight"
    for parameter in parameters:
        wrapped = block.norm != "pre" and parameter.name == output
        yield replace(parameter, name=f"{spec.output_linear}.linear.weight") if wrapped else parameter


def _mlp(model: ModelFields, block: Block) -> Iterator[PackedParameter]:
    h, f = model.hidden_size, model.ffn_hidden_size
    gate, up = (TensorSpec(f"mlp.{name}_proj.weight", (f, h)) for name in ("gate", "up"))
    down = TensorSpec("mlp.down_proj.weight", (h, f))
    output = f"mlp.{MLP_OUTPUT}.weight" if block.norm == "pre" else f"mlp.{MLP_OUTPUT}.linear.weight"
    yield PackedParameter(f"mlp.{MLP_INPUT}.weight", (gate, up), "rows", groups=f, is_gemm=True)
    yield PackedParameter(output, (down,), "columns", groups=f, is_gemm=True)
    yield from _norms(model, block, "pre_mlp_layernorm", f"mlp.{MLP_OUTPUT}", "mlp_norm")


def _norms(model: ModelFields, block: Block, before: str, after: str, tensor: str) -> Iterator[PackedParameter]:
    """Yield the norms of a sublayer. A layer with one norm calls it `tensor`, wherever it is; the second is `post_{tensor}`."""
    places = {"pre": [f"{before}.weight"], "post": [f"{after}.norm.weight"]}
    names = places.get(block.norm, places["pre"] + places["post"])
    for name, prefix in zip(names, ("", "post_"), strict=False):
        yield PackedParameter(name, (_norm(f"{prefix}{tensor}", model),))


def _norm(tensor: str, model: ModelFields) -> TensorSpec:
    return TensorSpec(f"{tensor}.weight", (model.hidden_size,), norm_init(model.zero_centered_norm), "norm")


def outer_parameters(model: ModelFields) -> dict[str, PackedParameter]:
    """Return the parameters outside the layers in their order: `embedding`, `embedding_norm` if there is one, `final_norm` and,
    unless embeddings are tied, `output`.
    """
    shape = (model.vocab_size, model.hidden_size)

    def table(name: str, tensor: str) -> PackedParameter:
        return PackedParameter(
            name, (TensorSpec(f"{tensor}.weight", shape, decay_group=tensor),), "rows", shape[0], FP8_ALIGNMENT
        )

    found = {"embedding": table("embedding.word_embeddings.weight", "embedding")}
    if model.embedding_norm:
        found["embedding_norm"] = PackedParameter("embedding.norm.weight", (_norm("embedding_norm", model),))
    found["final_norm"] = PackedParameter("decoder.final_norm.weight", (_norm("final_norm", model),))
    return found if model.tie_embeddings else found | {"output": table("output_layer.weight", "output")}
