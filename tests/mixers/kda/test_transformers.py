"""Logits, gradients, decoding and tensor names of Kimi Delta Attention against transformers' `kimi_linear`, in fp32."""

import pytest
import torch

from hybrid_kernels.testing import relative_error
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.mixers.kda.hugging_face import from_hugging_face, to_hugging_face
from testing import jobs
from testing.layouts import layout
from tests.mixers.kda.models import KIMI, kimi_model, our_tensors

pytest.importorskip("transformers.models.kimi_linear")
TOKENS = torch.randint(0, KIMI["vocab_size"], (2, 70), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def peer():
    """Return transformers' model, with gradients of the mean loss of predicting each token from itself."""
    model = kimi_model()
    logits = model(TOKENS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
    return model, logits.detach()


@pytest.mark.parametrize(
    ("count", "parallel"),
    [(1, layout()), (2, layout(2, sequence_parallel=False))],
    ids=["one rank", "TP2, padded heads"],
)
def test_logits_and_gradients(count, parallel, peer, ranks):
    model, logits = peer
    job = dict(model=KIMI, tensors=our_tensors(model), tokens=TOKENS, parallel=parallel)
    results = ranks.run(jobs.logits_and_gradients, count, **job)
    ours = torch.cat([result["logits"] for result in results], -1)[..., : KIMI["vocab_size"]]
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()
    if count == 1:
        for name, expected in our_tensors(model, gradients=True).items():
            assert relative_error(results[0]["gradients"][name], expected) < 1e-4, name


def test_tensor_names_map_both_ways():
    """A checkpoint's tensors come back bit for bit, and transformers' own, with joined convolutions, give the same."""
    layer = kimi_model().model.layers[0].self_attn
    tensors = dict(layer.named_parameters())
    ours = from_hugging_face(tensors)
    assert {name: tuple(x.shape) for name, x in ours.items()} == _true_shapes()
    theirs = to_hugging_face(ours)
    assert theirs["A_log"].shape == (1, 1, 3, 1) and theirs["q_conv1d.weight"].shape == (24, 1, 4)
    again = from_hugging_face(theirs)
    assert all(torch.equal(again[name], x) for name, x in ours.items()) and again.keys() == ours.keys()
    joined = torch.cat([theirs.pop(f"{name}_conv1d.weight") for name in "qkv"])
    moved = {f"forget_gate.{n}" if n in ("A_log", "dt_bias") or n.startswith("f_") else n: x for n, x in theirs.items()}
    assert moved.keys() | {"conv1d.weight"} == tensors.keys()
    assert torch.equal(joined, tensors["conv1d.weight"]) and all(torch.equal(tensors[n], x) for n, x in moved.items())


def _true_shapes() -> dict[str, tuple[int, ...]]:
    from megatron_hybrid.arch.tensors import model_tensors

    prefix = "layers.0.kda."
    tensors = model_tensors(ModelConfig(**KIMI)).items()
    return {name.removeprefix(prefix): spec.shape for name, spec in tensors if name.startswith(prefix)}
