"""Kimi Delta Attention is one folder and one line: nothing else in the package knows it, and everything works with it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import megatron_hybrid
from megatron_hybrid.arch.flops import count_parameters, layer_training_flops
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import PackedParameter
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.load import load_run
from megatron_hybrid.mixers.initial_values import draw
from megatron_hybrid.planner.command import Request, answer
from tests.mixers.kda.models import KDA, MODEL


def test_two_files_at_most_outside_its_folder_know_it():
    folder = Path(megatron_hybrid.__file__).parent
    known = re.compile("kda|kimi", re.IGNORECASE)
    others = [path.relative_to(folder) for path in folder.rglob("*.py") if "mixers/kda/" not in path.as_posix()]
    assert len(others) > 200
    found = [str(path) for path in others if known.search((folder / path).read_text())]
    assert "arch/registry.py" in found and len(found) <= 2, found


@pytest.fixture
def run_file(tmp_path) -> Path:
    tokens = tmp_path / "tokens.npy"
    np.zeros(4000, np.uint16).tofile(tokens)
    run = dict(
        run_dir=str(tmp_path / "run"),
        model=MODEL,
        data=dict(train=[dict(path=str(tokens))], sequence_length=64),
        train=dict(steps=1, global_batch_size=4, dtype="fp32", optimizer=dict(no_decay=["kda_scalars"])),
        preflight=dict(enabled=False),
    )
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run))
    return file


def test_it_is_counted_and_described(run_file):
    run = load_run(str(run_file), ["parallel.tensor_parallel_size=2"])
    tensors = {n: t for n, t in model_tensors(run.model).items() if n.startswith("layers.0.kda.")}
    projections = 48 * (2 * 24 + 48 + 2 * 10 + 3) + 10 * (24 + 48) + 48 * 48
    assert sum(t.numel for t in tensors.values()) == projections + 4 * (2 * 24 + 48) + 3 + 24 + 16
    assert count_parameters(run.model) == sum(t.numel for t in model_tensors(run.model).values())
    per_token = 2 * (projections + 3 * 48 * 96) + 8 * 3 * 8 * 16
    assert layer_training_flops(run.model, "K", 64) == 3 * per_token
    lines = [line.split() for line in describe(run, 2).splitlines()]
    assert ["Kimi", "Delta", "Attention", "3", "4", "2"] in [
        line[1:] for line in lines
    ]  # heads: true, padded, per rank


def test_initial_values_are_those_of_kimi_linear():
    model = ModelConfig(**MODEL | dict(kda=KDA | dict(num_heads=64, key_head_dim=16)))
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: draw(torch.empty(spec.shape), spec.init, model.init_std, generator)
        for name, spec in model_tensors(model).items()
        if name.startswith("layers.0.kda.")
    }
    A, dt = drawn["layers.0.kda.A_log"].exp(), F.softplus(drawn["layers.0.kda.dt_bias"])
    assert 1 <= A.min() < 2 and 15 < A.max() <= 16
    assert 9e-4 < dt.min() < 2e-3 and 0.09 < dt.max() < 0.101
    for name in ("q_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "b_proj", "q_conv"):
        assert drawn[f"layers.0.kda.{name}.weight"].std() == pytest.approx(0.02, rel=0.1), name
    assert (drawn["layers.0.kda.o_norm.weight"] == 1).all()
    bounded = ModelConfig(**MODEL | dict(kda=KDA | dict(gate_lower_bound=-5.0)))
    a_log = mixer_spec("kda").parameter("A_log", bounded, bounded.block(0)).tensors[0]
    assert a_log.init.distribution == "zeros" and a_log.always_fp32


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_hold_every_element_once(ranks):
    model = ModelConfig(**MODEL)
    for packed in mixer_spec("kda").parameters(model, model.block(0)):
        held = {tensor.name: np.zeros(tensor.shape, int) for tensor in packed.tensors}
        for rank in range(1 if packed.split == "replicated" else ranks):
            for part in packed.slices(rank, ranks):
                held[part.tensor.name][part.source.index] += 1
                assert all(a + n <= m for a, n, m in zip(part.target.offset, part.target.shape, _shape(packed, ranks)))
        assert all((count == 1).all() for count in held.values()), packed.name


def _shape(packed: PackedParameter, ranks: int) -> tuple[int, ...]:
    return packed.rank_shape(ranks)


def test_the_planner_plans_it(run_file, tmp_path):
    request = Request(str(run_file), gpus=4, gpu="h200", emit=tmp_path / "planned.yaml")
    assert "activations: Kimi Delta Attention" in answer(request)
    assert load_run(str(request.emit)).model.kda == load_run(str(run_file)).model.kda


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["model.kda=null"],
            "model.kda: is missing, and layer_pattern has K layers; give kda.num_heads, key_head_dim and value_head_dim",
        ),
        (["model.kda.num_head=1"], "model.kda.num_head: there is no such field; did you mean num_heads?"),
        (["model.kda.gate_lower_bound=-6.0"], "model.kda.gate_lower_bound: "),
        (["model.kda.dt_init_range=[0.1, 0.01]"], "model.kda.dt_init_range: [0.1, 0.01] must have 0 <= low < high"),
        (
            ["parallel.tensor_parallel_size=8"],
            "8 exceeds the 3 Kimi Delta Attention heads (model.kda.num_heads) and the 3 key/value heads",
        ),
        (
            ["parallel.context_parallel_size=32"],
            "32 leaves 2 tokens of a sequence on each rank, and Kimi Delta Attention's convolution looks back on 3",
        ),
        (
            ["model.blocks.K.output_gate=false"],
            "model.blocks.K.output_gate: false is not implemented for kda; set it to true",
        ),
    ],
)
def test_errors_name_its_fields(run_file, change, message):
    with pytest.raises(ConfigError) as caught:
        load_run(str(run_file), change)
    assert message in str(caught.value)
