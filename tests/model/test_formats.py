"""The table of what a run computes with, and the choice of its parts."""

from types import SimpleNamespace

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.model import formats
from megatron_hybrid.model.backends import choose
from megatron_hybrid.model.backends.choose import choose_backend
from megatron_hybrid.model.backends.local import LOCAL
from testing import jobs
from testing.models import SMALL


def table(model: dict, dtype: str, parallel: dict | None = None, documents: bool = False) -> list[str]:
    engine = jobs.make_engine(model, parallel or {}, dict(steps=1, global_batch_size=1, dtype=dtype))
    engine.documents = documents
    return engine.backends(1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_table_names_every_part_with_format_backend_and_reason(dtype, ranks):
    ((head, *rows),) = ranks.run(table, 1, model=SMALL, dtype=dtype)
    assert head.split() == ["layers", "part", "format", "backend", "why"]
    cells = [row[: head.index("why")].split("  ") for row in rows]
    cells = [[c.strip() for c in row if c.strip()] for row in cells]
    assert [row[:2] for row in cells] == [
        ["all", "projections, MLP"],
        ["G", "conv_gates"],
        ["G", "gated_delta_rule"],
        ["G", "gated_rmsnorm"],
        ["A", "qk_norm_rope"],
        ["A", "attention"],
        ["last", "linear_cross_entropy"],
        ["all", "norms"],
        ["all", "optimizer"],
    ]
    assert all(row[2] == dtype for row in cells[:-1])
    assert cells[1][3] == "torch"
    assert "not triton: tensors are not on a CUDA device" in rows[1]
    assert cells[-1][2:] == ["fp32", "torch.AdamW"]


def test_a_layer_kind_that_is_not_there_has_no_row(ranks):
    ((_, *rows),) = ranks.run(table, 1, model=SMALL | {"layer_pattern": "AA", "gdn": None}, dtype="fp32")
    assert not any(row.startswith("G ") for row in rows)


def test_slices_of_sequences_are_named(ranks):
    model = SMALL | {"num_attention_heads": 3, "hidden_size": 48}
    (head, *rows), _ = ranks.run(table, 2, model=model, dtype="fp32", parallel=dict(context_parallel_size=2))
    of = {row[head.index("part") :].partition("  ")[0]: row for row in rows}
    assert "each sequence in slices on 2 ranks, which pass states on" in of["gated_delta_rule"]
    assert "2 heads of whole sequences on each of 2 context parallel ranks" in of["attention"]


def test_documents_are_named(ranks):
    for documents in (False, True):
        (rows,) = ranks.run(table, 1, model=SMALL, dtype="fp32", documents=documents)
        (attention,) = (row for row in rows if "scaled_dot_product_attention" in row)
        assert ("a mask per block of queries keeps documents apart" in attention) == documents


def test_each_stage_names_its_own_layers(ranks):
    parallel = dict(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2)
    tables = ranks.run(table, 2, model=SMALL | {"layer_pattern": "GAGAGAGA"}, dtype="fp32", parallel=parallel)
    for (head, *rows), layers in zip(tables, ("0-1, 4-5", "2-3, 6-7"), strict=True):
        named = {row[head.index("part") :].partition("  ")[0]: row[: head.index("part")].strip() for row in rows}
        assert named["projections, MLP"] == named["norms"] == layers
        assert ("linear_cross_entropy" in named) == (layers == "2-3, 6-7"), "the last stage's alone"


def stage(*layers: int) -> SimpleNamespace:
    """As much of a chunk with these of eight layers as rows of linears need."""
    holders = [SimpleNamespace(layer_number=layer + 1) for layer in layers]
    return SimpleNamespace(model=SimpleNamespace(num_layers=8), decoder=SimpleNamespace(layers=holders))


@pytest.mark.parametrize(
    ("chunks", "plain", "fp8"),
    [
        ([stage(*range(8))], ["0-1", "7"], ["2-6"]),
        ([stage(0, 1, 2, 3)], ["0-1"], ["2-3"]),
        ([stage(4, 5, 6, 7)], ["7"], ["4-6"]),
        ([stage(0, 1), stage(4, 5)], ["0-1"], ["4-5"]),
        ([stage(2), stage(4)], [], ["2, 4"]),
        ([stage(0, 1)], ["0-1"], []),
    ],
)
def test_rows_of_fp8_linears_name_the_layers_of_the_stage(chunks, plain, fp8):
    precision = PrecisionConfig(fp8_recipe="tensorwise", num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=1)
    rows = list(formats._linears(chunks, LOCAL, "", precision, "bf16"))
    assert [row[0] for row in rows if row[2] == "bf16"] == plain
    assert [row[0] for row in rows if row[2].startswith("fp8")] == fp8
    assert len(rows) == len(plain) + len(fp8)


def test_the_table_tells_of_weights_held_in_fp8():
    precision = PrecisionConfig(fp8_recipe="tensorwise", fp8_param_gather=True, num_layers_at_end_in_bf16=1)
    plain, fp8 = formats._linears([stage(*range(8))], LOCAL, "", precision, "bf16")
    assert plain[:3] == ("7", "projections, MLP", "bf16")
    assert fp8[:2] == ("0-6", "projections, MLP")
    assert fp8[2].endswith("weights held in fp8")
    assert fp8[4] == "precision.fp8_recipe = tensorwise, fp8_param_gather = true"


@pytest.mark.parametrize(
    ("backend", "recipe", "dtype", "cuda", "field", "why"),
    [
        ("transformer_engine", None, "bf16", False, "model.backend", "no CUDA device is visible"),
        ("auto", "delayed", "bf16", False, "precision.fp8_recipe", "no CUDA device is visible"),
        ("transformer_engine", None, "bf16", True, "model.backend", "is not installed"),
        ("auto", "tensorwise", "bf16", True, "precision.fp8_recipe", "is not installed"),
    ],
)
def test_what_cannot_run_here_is_an_error(backend, recipe, dtype, cuda, field, why, monkeypatch):
    monkeypatch.setattr(choose, "has_cuda", lambda: cuda)
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        choose_backend(backend, PrecisionConfig(fp8_recipe=recipe), dtype)
    assert [name for name, _ in caught.value.problems] == [field]
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "dtype", "cuda", "installed", "why"),
    [
        ("auto", "bf16", False, True, "no CUDA device is visible"),
        ("auto", "bf16", True, False, "Transformer Engine is not installed"),
        ("auto", "fp32", True, True, "train.dtype is fp32"),
        ("local", "bf16", True, True, "model.backend = local"),
    ],
)
def test_the_local_backend_comes_with_a_reason(backend, dtype, cuda, installed, why, monkeypatch):
    monkeypatch.setattr(choose, "has_cuda", lambda: cuda)
    monkeypatch.setattr(choose, "find_spec", lambda name: object() if installed else None)
    chosen, reason = choose_backend(backend, PrecisionConfig(), dtype)
    assert chosen is LOCAL
    assert why in reason
