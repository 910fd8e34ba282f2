"""A mixer of another package: it trains, shards, is saved, resharded, counted and planned without any change to the project."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hybrid.arch import registry
from megatron_hybrid.arch.flops import count_parameters, layer_training_flops
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.load import dump_run, load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner.command import Request, answer
from megatron_hybrid.planner.parameters import rank_parameters
from megatron_hybrid.planner.plan import Plan
from tests.mixers import plugin_jobs

MODEL = dict(
    layer_pattern="GTA*2",
    hidden_size=32,
    ffn_hidden_size=64,
    vocab_size=61,
    num_attention_heads=4,
    gdn=dict(num_key_heads=4, num_value_heads=4, key_head_dim=4, value_head_dim=8),
    leaky=dict(num_heads=3, head_dim=8),  # TP2 adds a dummy head
)
STEPS, HALF = 4, 2


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A folder with the package `leaky`, on the path of this process only."""
    shutil.copytree(Path(__file__).parent / "leaky", tmp_path / "packages" / "leaky")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    registry.mixer_specs()
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))
    yield tmp_path / "packages"
    for name in [name for name in sys.modules if name.partition(".")[0] == "leaky"]:
        del sys.modules[name]


def run_config(folder: Path, name: str, steps: int = STEPS, **sections: dict) -> dict:
    tokens = folder / "tokens.npy"
    learnable = np.cumsum(np.random.default_rng(0).integers(0, 3, 4000)) % MODEL["vocab_size"]
    learnable.astype(np.uint16).tofile(tokens)
    train = dict(
        steps=steps,
        global_batch_size=4,
        dtype="fp32",
        optimizer={"lr": 1e-2, "no_decay": ["embedding", "leaky_decay"]},
        schedule={"kind": "constant"},
    )
    return dict(
        run_dir=str(folder / name),
        plugins=["leaky"],
        model=MODEL,
        data=dict(train=[dict(path=str(tokens))], sequence_length=16),
        train=train,
        logging=dict(tensorboard=False, plot_interval=0),
        preflight=dict(enabled=False),
        **sections,
    )


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    with CheckpointReader(sorted((folder / name / "checkpoints").glob("step-*"))[-1]) as reader:
        return {tensor: reader.read(tensor) for tensor in model_tensors_of(reader)}


def model_tensors_of(reader: CheckpointReader) -> list[str]:
    return [name for name in reader.index.tensors if name.startswith("layers.")]


def test_it_trains_is_saved_and_resumes_under_other_layouts(package, tmp_path, ranks):
    def train(count: int, name: str, steps: int = STEPS, **parallel: int) -> list[int]:
        config = run_config(tmp_path, name, steps, parallel=parallel)
        return ranks.run(plugin_jobs.train, count, folder=str(package), config=config)

    train(1, "one")
    held = train(4, "sharded", HALF, tensor_parallel_size=2, pipeline_parallel_size=2)
    config = run_config(tmp_path, "sharded", parallel=dict(tensor_parallel_size=2, pipeline_parallel_size=2))
    plan = Plan.of(RunConfig(**config), 4)
    assert held == [rank_parameters(plan, stage) for stage in (0, 0, 1, 1)]
    shutil.copytree(tmp_path / "sharded", tmp_path / "replicas")
    assert {t.shape for name, t in tensors(tmp_path, "sharded").items() if name.endswith("leaky.decay")} == {(3,)}
    train(4, "sharded", tensor_parallel_size=2, pipeline_parallel_size=2)
    train(2, "replicas")  # resumes at TP1, DP2
    arguments = dict(folder=str(package), checkpoint=str(tmp_path / "one"), tokens=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    ((decoded, full),) = ranks.run(plugin_jobs.decode, 1, **arguments)
    assert decoded == full and len(decoded) == 12
    expected = losses(tmp_path, "one")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    for name in ("sharded", "replicas"):
        assert losses(tmp_path, name) == pytest.approx(expected, rel=2e-5)
        for tensor, value in tensors(tmp_path, "one").items():
            difference = tensors(tmp_path, name)[tensor] - value
            assert difference.norm() < 1e-3 * value.norm(), tensor  # Adam enlarges rounding where gradients vanish


def test_it_is_counted_and_described(package, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config(tmp_path, "run", parallel=dict(tensor_parallel_size=2))))
    run = load_run(str(config))
    leaky = [t for name, t in model_tensors(run.model).items() if ".1.leaky." in name]
    assert sum(t.numel for t in leaky) == 3 * (3 * 8 * 32) + 3
    assert count_parameters(run.model) == sum(t.numel for t in model_tensors(run.model).values())
    mlp = 3 * 32 * 64
    assert layer_training_flops(run.model, "T", 16) == 3 * (2 * (3 * (3 * 8 * 32) + mlp) + 3 * 3 * 8)
    text = describe(run, 2)
    assert "leaky average" in text and "plugins: [leaky]" in text
    (line,) = (line for line in text.splitlines() if line.split()[1:3] == ["leaky", "average"] and "4" in line.split())
    assert line.split()[3:] == ["3", "4", "2"]  # heads: true, padded, per rank
    again = tmp_path / "again.yaml"
    again.write_text(dump_run(run))
    assert load_run(str(again)) == run


def test_the_planner_plans_it(package, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config(tmp_path, "run")))
    request = Request(str(config), gpus=4, gpu="h200", emit=tmp_path / "planned.yaml")
    assert "activations: leaky average" in answer(request)
    planned = load_run(str(request.emit))
    assert planned.plugins == ("leaky",) and planned.model.leaky == load_run(str(config)).model.leaky
    refused = answer(replace(request, gpus=8, why=("tp=8",), emit=None))
    assert "and the 3 leaky heads" in refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["model.leaky=null"],
            "model.leaky: is missing, and layer_pattern has T layers; give leaky.num_heads and head_dim",
        ),
        (["model.leaky.num_head=1"], "model.leaky.num_head: there is no such field; did you mean num_heads?"),
        (
            ["parallel.context_parallel_size=2"],
            "parallel.context_parallel_size: 2: leaky average (layer_pattern's T) does not support it; set it to 1",
        ),
        (
            ["data.documents=pack"],
            "data.documents: pack: leaky average (layer_pattern's T) does not support it; set it to keep",
        ),
        (
            ["parallel.tensor_parallel_size=8"],
            "parallel.tensor_parallel_size: 8 exceeds the 4 Gated DeltaNet key heads (model.gdn.num_key_heads) and the 3 leaky heads "
            "(model.leaky.num_heads) and the 4 key/value heads",
        ),
        (
            ["model.blocks.T.output_gate=false"],
            "model.blocks.T.output_gate: false is not implemented for leaky; set it to true",
        ),
        (["plugins=[leaky, lekay]"], "plugins.1: lekay cannot be imported"),
    ],
)
def test_errors_name_its_fields(package, tmp_path, change, message):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config(tmp_path, "run")))
    with pytest.raises(ConfigError) as caught:
        load_run(str(config), change)
    assert message in str(caught.value)


def test_without_the_plugin_its_section_is_unknown(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_config(tmp_path, "run") | {"plugins": []}))
    with pytest.raises(ConfigError, match="model.leaky: there is no such field"):
        load_run(str(config))


def test_two_mixers_of_one_name_are_refused(package):
    class Other(type(registry.mixer_spec("attention"))):
        """Another mixer called attention."""

    with pytest.raises(UserError, match="both use attention"):
        registry.register(Other())
