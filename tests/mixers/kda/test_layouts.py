"""Kimi Delta Attention has one curve under every layout, with whole sequences and with documents. All against one rank, fp32."""

from pathlib import Path

import pytest

from hybrid_kernels.testing import relative_error
from megatron_hybrid.checkpoint.reader import CheckpointReader
from testing import jobs
from testing.layouts import LR, TRAIN, assert_same, few_micro_batches, layout, relative_difference
from tests.mixers.kda.models import MODEL

STEPS, SAVED = 4, 2
DEEP = "KKKA"
LAYOUTS = {
    # name: (ranks, layer pattern, layout)
    "DP2": (2, "KKA", layout()),
    "TP2, padded head": (2, "KKA", layout(2)),
    "TP2, no sequence parallelism": (2, "KKA", layout(2, sequence_parallel=False)),
    "TP4, padded head and rank": (4, "KA", layout(4)),
    "PP2": (2, DEEP, layout(pp=2)),
    "PP2, VPP2, selective recompute": (2, DEEP, layout(pp=2, vpp=2, recompute_granularity="selective")),
    "TP2, full recompute": (2, "KKA", layout(2, recompute_granularity="full")),
    "CP2": (2, "KKA", layout(cp=2)),
    "CP2, TP2, selective recompute": (4, "KA", layout(2, cp=2, recompute_granularity="selective")),
}
DOCUMENTS = {
    # name: (ranks, mode, layout)
    "one rank, mask, selective recompute": (1, "mask", layout(recompute_granularity="selective")),
    "TP2, mask": (2, "mask", layout(2)),
    "DP2, pack": (2, "pack", layout()),
    "CP2, pack": (2, "pack", layout(cp=2)),
}


def curve(ranks, count: int, pattern: str, parallel: dict, **more) -> list[dict]:
    model, train = MODEL | {"layer_pattern": pattern}, few_micro_batches(count, parallel)
    return ranks.run(jobs.curve, count, **dict(model=model, parallel=parallel, train=train, steps=STEPS, lr=LR) | more)


@pytest.fixture(scope="module")
def one_rank(ranks):
    """Return the curve of one rank, by layer pattern and mode of documents."""
    known = {}

    def of(pattern: str, documents: str | None = None) -> dict:
        if (pattern, documents) not in known:
            (known[pattern, documents],) = curve(ranks, 1, pattern, layout(), documents=documents)
        return known[pattern, documents]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, ranks, one_rank):
    count, pattern, parallel = LAYOUTS[name]
    assert one_rank(pattern)["losses"][-1] < one_rank(pattern)["losses"][0] - 0.01
    for result in curve(ranks, count, pattern, parallel):
        assert_same(result, one_rank(pattern))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name, ranks, one_rank):
    count, mode, parallel = DOCUMENTS[name]
    size = TRAIN | {"micro_batch_size": 2}
    expected = one_rank("KKA", mode)
    for result in curve(ranks, count, "KKA", parallel, documents=mode, train=size):
        assert_same(result, expected)


def test_the_curve_tells_documents_and_updates_apart(ranks, one_rank):
    """The comparisons would find documents that are ignored, and updates that are wrong by a hundredth."""
    (other,) = curve(ranks, 1, "KKA", layout(), lr=1.01 * LR)
    assert relative_difference(other["losses"], one_rank("KKA")["losses"]) > 3e-5
    (ignored,) = curve(ranks, 1, "KA", layout(), train=TRAIN)
    (kept,) = curve(ranks, 1, "KA", layout(), documents="mask")
    assert relative_difference(kept["norms"], ignored["norms"]) > 3e-5


@pytest.mark.parametrize("count, parallel", [(4, layout(4)), (2, layout(cp=2))], ids=["TP4", "CP2"])
def test_a_checkpoint_goes_on_under_another_layout(count, parallel, ranks, one_rank, tmp_path):
    """From TP2, whose padding the checkpoint does not hold."""
    saved = curve(ranks, 2, "KA", layout(2), steps=SAVED, save=str(tmp_path))[0]["path"]
    with CheckpointReader(Path(saved)) as reader:
        shapes = {name: reader.read(name).shape for name in reader.index.tensors if name.startswith("layers.0.kda.")}
    assert shapes["layers.0.kda.A_log"] == (3,) and shapes["layers.0.kda.f_a_proj.weight"] == (10, 48)
    expected = {what: one_rank("KA")[what][SAVED:] for what in ("losses", "norms")}
    for result in curve(ranks, count, "KA", parallel, start=SAVED, load=saved):
        assert_same(result, expected)


def test_dummy_heads_stay_zero(ranks):
    """Under TP2 the second rank's second head is one that the model does not have."""
    for rank, result in enumerate(curve(ranks, 2, "KA", layout(2))):
        found = {
            name.split("self_attention.")[1]: x for name, x in result["parameters"].items() if "layers.0.self_a" in name
        }
        k, v = MODEL["kda"]["key_head_dim"], MODEL["kda"]["value_head_dim"]
        dummies = (
            found["f_b_weight"][k:], found["g_b_weight"][v:], found["A_log"][1:], found["dt_bias"][k:],
            found["conv_weight"][k : 2 * k], found["in_proj.weight"][k : 2 * k], found["out_proj.weight"][:, v:],
        )  # fmt: skip
        assert all(bool(x.any()) == (rank == 0) for x in dummies)


def test_the_gate_with_a_lower_bound_learns(ranks):
    kda = MODEL["kda"] | dict(gate_lower_bound=-5.0, allow_negative_eigenvalues=True)
    model = MODEL | dict(layer_pattern="KA", kda=kda)
    (one,) = curve(ranks, 1, "KA", layout(), model=model)
    assert one["losses"][-1] < one["losses"][0] - 0.01
    for result in curve(ranks, 2, "KA", layout(2), model=model):
        assert_same(result, one)
        for name, x in one["parameters"].items():
            if "o_norm" in name:
                assert relative_error(result["parameters"][name], x) < 1e-5
