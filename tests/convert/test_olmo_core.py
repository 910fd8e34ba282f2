"""OLMo-core's checkpoints: both generations of names, sharded, with the optimizer."""

import json
from pathlib import Path

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.convert.olmo_core.config import model_from_olmo_core
from megatron_hybrid.convert.olmo_core.names import olmo_core_names
from megatron_hybrid.convert.verify import verify
from testing.peers import transformers_model, true_tensors_of
from tests.convert import jobs as convert_jobs
from tests.convert.folders import BASE, MODELS, OLMO3, weights
from tests.convert.olmo_core_files import NORM, olmo_core_config, olmo_core_state, save, to_ours

CASES = {
    **{name: (fields, False) for name, fields in MODELS.items()},
    "olmo3": (OLMO3, False),
    "older names": (BASE, True),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_arrive_bit_for_bit(case, tmp_path):
    fields, old = CASES[case]
    model = ModelConfig(**fields)
    folder = save(tmp_path / "step10", olmo_core_config(model, old), olmo_core_state(model, old))
    assert to_ours(folder, tmp_path / "ours") == 0
    expected = true_tensors_of(transformers_model(model), model)
    with CheckpointReader(tmp_path / "ours") as reader:
        assert ModelConfig(**reader.index.model) == model
        assert not reader.has_optimizer() and reader.index.state == {}
        assert set(reader.index.tensors) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(reader.read(name), tensor), name
    assert not verify(tmp_path / "ours").problems


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_optimizer_goes_along(dtype, tmp_path, ranks):
    model = ModelConfig(**BASE)
    state = olmo_core_state(model, optimizer=True)
    folder = save(tmp_path / "step17", olmo_core_config(model), state)
    assert to_ours(folder / "model_and_optim", tmp_path / "ours", "--dtype", dtype) == 0
    with CheckpointReader(tmp_path / "ours") as reader:
        assert reader.has_optimizer() and reader.index.state["updates"] == 17
        for name, spec in model_tensors(model).items():
            key = olmo_core_names(name)[0]
            for part in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(
                    reader.read(name, state=part), state["optim"][f"state.{key}.{part}"].view(spec.shape)
                )
            if dtype == "bf16" and not spec.always_fp32:
                assert torch.equal(reader.read(name, state="master"), state["model"][key].view(spec.shape))
                assert torch.equal(reader.read(name), state["model"][key].view(spec.shape).bfloat16())
    assert not verify(tmp_path / "ours").problems
    saved = ranks.run(
        convert_jobs.load_and_save, 2, checkpoint=str(tmp_path / "ours"), folder=str(tmp_path / "run"),
        parallel=dict(tensor_parallel_size=2), train=dict(dtype=dtype),
    )  # fmt: skip
    assert saved[0]["updates"] == 17
    with CheckpointReader(tmp_path / "ours") as before, CheckpointReader(tmp_path / "run/step-00000001") as after:
        for name in model_tensors(model):
            for part in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(before.read(name, state=part), after.read(name, state=part))

    assert to_ours(folder, tmp_path / "alone", "--no-optimizer") == 0
    assert set(weights(tmp_path / "alone")) == set(model_tensors(model))


def _save_sharded(folder: str, fields: dict) -> None:
    """Runs on ranks: every matrix split by rows, unevenly, as FSDP does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    state = olmo_core_state(ModelConfig(**fields), optimizer=True)
    for part in state.values():
        for key, value in part.items():
            if isinstance(value, torch.Tensor) and value.dim():
                part[key] = distribute_tensor(value, mesh, [Shard(0)])
    dcp.save(state, checkpoint_id=Path(folder) / "model_and_optim")


def test_sharded_over_ranks(tmp_path, ranks):
    ranks.run(_save_sharded, 3, folder=str(tmp_path / "step1"), fields=BASE)
    (tmp_path / "step1/config.json").write_text(json.dumps(olmo_core_config(ModelConfig(**BASE))))
    whole = save(
        tmp_path / "whole", olmo_core_config(ModelConfig(**BASE)), olmo_core_state(ModelConfig(**BASE), optimizer=True)
    )
    assert len(list((tmp_path / "step1/model_and_optim").glob("*.distcp"))) >= 3
    assert to_ours(tmp_path / "step1", tmp_path / "a") == 0
    assert to_ours(whole, tmp_path / "b") == 0
    for path in (tmp_path / "b").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.update(mystery=1), "unknown field 'mystery'"),
        (lambda m: m["block"]["gdn"].update(name="normalized"), "'normalized' is none of default, reordered_norm"),
        (lambda m: m.update(block_pattern=["gdn", "gdn", "other", "attn"]), "layers differ in norm placement"),
        (lambda m: m.update(embedding_norm=NORM | {"eps": 1e-5}), "different eps"),
        (lambda m: m["block"]["attn"]["sequence_mixer"].pop("bias"), "bias = None"),
        (lambda m: m["block"]["attn"]["sequence_mixer"].update(gate={}), "gate.granularity = None"),
        (lambda m: m["block"]["attn"]["sequence_mixer"].update(qk_norm=None), "qk_norm is None"),
        (lambda m: m["block"]["attn"]["sequence_mixer"]["rope"].update(scaling={"factor": 2}), "rope.scaling"),
        (lambda m: m["block"]["attn"]["layer_norm"].update(eps=1e-5), "different eps"),
        (lambda m: m["block"]["attn"]["feed_forward"].update(hidden_size=41), "differ in ffn_hidden_size"),
        (lambda m: m.update(n_layers=0), "n_layers 0"),
        (lambda m: m.update(block_pattern=["gdn", "x"]), "block_pattern"),
        (lambda m: m.update(vocab_size=68), "embeddings.weight is F32 [67, 24]"),
    ],
)
def test_wrong_configs_are_named(change, told, tmp_path, capsys):
    config = json.loads(json.dumps(olmo_core_config(ModelConfig(**BASE))))
    blocks = config["model"]["block"]
    blocks["other"] = blocks["gdn"] | {"name": "peri_norm"}
    change(config["model"])
    folder = save(tmp_path / "step1", config, olmo_core_state(ModelConfig(**BASE)))
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    assert told in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_missing_and_unknown_tensors(tmp_path, capsys):
    model = ModelConfig(**BASE)
    state = olmo_core_state(model, optimizer=True)
    name = "blocks.1.attention.w_g.weight"
    cases = {
        f"missing: {name}": {"model": {k: v for k, v in state["model"].items() if k != name}},
        "does not have: model.extra": {"model": state["model"] | {"extra": torch.zeros(1)}},
        "missing optimizer state": state
        | {"optim": {k: v for k, v in state["optim"].items() if not k.endswith(f"{name}.exp_avg")}},
        "different numbers of updates": state | {"optim": state["optim"] | {f"state.{name}.step": torch.tensor(3.0)}},
    }
    for number, (told, changed) in enumerate(cases.items()):
        folder = save(tmp_path / f"step{number}", olmo_core_config(model), changed)
        assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
        assert told in capsys.readouterr().err


def test_released_shapes_are_understood():
    """Return OLMo-core's configurations of the two 7B models."""
    from megatron_hybrid.config.presets import olmo3_7b, olmo_hybrid_7b

    for preset in (olmo_hybrid_7b(), olmo3_7b()):
        assert model_from_olmo_core(json.loads(json.dumps(olmo_core_config(preset)))) == preset
    assert (
        model_from_olmo_core(json.loads(json.dumps(olmo_core_config(olmo_hybrid_7b(), old=True)))) == olmo_hybrid_7b()
    )
