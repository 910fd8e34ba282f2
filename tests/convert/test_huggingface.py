"""Conversion from Hugging Face and back: every spelling, bit for bit."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.verification import file_sha256
from megatron_hybrid.config.load import load_run
from megatron_hybrid.convert.hf.config import hf_from_model, model_from_hf
from megatron_hybrid.convert.verify import verify
from testing.checkpoints import edit_index
from testing.peers import true_tensors_of
from tests.convert.folders import BASE, GDN, MODELS, OLMO3, SPELLINGS, edit_json, weights, write_folder
from tests.data.files import save_tokenizer
from tools import convert_from_hf, convert_to_hf, verify_checkpoint

CASES = [(fields, spelling) for fields in MODELS.values() for spelling in SPELLINGS] + [(OLMO3, "transformers")]
NAMES = [f"{name}, {spelling}" for name in MODELS for spelling in SPELLINGS] + ["olmo3"]


def to_ours(source, target, *options) -> int:
    return convert_from_hf.main([str(source), str(target), "--quiet", *options])


def to_theirs(source, target, *options) -> int:
    return convert_to_hf.main([str(source), str(target), "--quiet", *options])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize(("fields", "spelling"), CASES, ids=NAMES)
def test_round_trip_is_bit_exact(fields, spelling, tmp_path):
    peer = write_folder(tmp_path / "hf", fields, spelling)
    model = ModelConfig(**fields)

    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0

    expected = true_tensors_of(peer, model)
    with CheckpointReader(tmp_path / "ours") as reader:
        assert ModelConfig(**reader.index.model) == model
        assert set(reader.index.tensors) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(reader.read(name), tensor), name
    assert not verify(tmp_path / "ours", tmp_path / "hf").problems

    assert to_theirs(tmp_path / "ours", tmp_path / "hf2") == 0
    assert to_ours(tmp_path / "hf2", tmp_path / "ours2") == 0
    assert to_theirs(tmp_path / "ours2", tmp_path / "hf3") == 0

    assert equal(weights(tmp_path / "ours"), weights(tmp_path / "ours2"))  # ours -> theirs -> ours
    assert equal(weights(tmp_path / "hf2"), weights(tmp_path / "hf3"))
    if spelling == "separate":  # the spelling we write: theirs -> ours -> theirs
        assert equal(weights(tmp_path / "hf"), weights(tmp_path / "hf2"))


@pytest.mark.parametrize("fields", [*MODELS.values(), OLMO3], ids=[*MODELS, "olmo3"])
def test_transformers_loads_the_export_silently_and_computes_the_same(fields, tmp_path, caplog):
    from transformers import AutoModelForCausalLM, GenerationConfig

    peer = write_folder(tmp_path / "hf", fields)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert to_theirs(tmp_path / "ours", tmp_path / "export", "--max-shard-size", "8KB") == 0
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 2

    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "export", output_loading_info=True, attn_implementation="eager"
        )
    finally:
        transformers_logger.removeHandler(caplog.handler)

    assert not any(info.values()), info
    assert not [r for r in caplog.records if "MISSING" in r.getMessage() or "UNEXPECTED" in r.getMessage()]
    tokens = torch.randint(0, 67, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, peer(tokens).logits)
    assert GenerationConfig.from_pretrained(tmp_path / "export").eos_token_id == 5
    assert "transformers" in (tmp_path / "export/README.md").read_text()


def test_config_round_trip():
    for fields in (*MODELS.values(), OLMO3, OLMO3 | dict(layer_pattern="AAA", sliding_window=None)):
        model = ModelConfig(**fields)
        assert model_from_hf(json.loads(json.dumps(hf_from_model(model, "float32", 4096)))) == model


def test_sharded_and_bf16(tmp_path):
    write_folder(tmp_path / "hf", BASE, dtype=torch.bfloat16, shard="6KB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    ours = weights(tmp_path / "ours")
    for name, spec in model_tensors(ModelConfig(**BASE)).items():
        assert ours[name].dtype == (torch.float32 if spec.always_fp32 else torch.bfloat16)

    assert to_theirs(tmp_path / "ours", tmp_path / "export") == 0
    assert {t.dtype for t in weights(tmp_path / "export").values()} == {torch.bfloat16}, "as in the folder"
    assert to_theirs(tmp_path / "ours", tmp_path / "plain", "--dtype", "bf16") == 0
    exported = weights(tmp_path / "plain")
    assert {n for n, t in exported.items() if t.dtype == torch.float32} == {
        n for n in exported if n.endswith(("A_log", "dt_bias"))
    }
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "bfloat16"

    assert to_theirs(tmp_path / "ours", tmp_path / "all", "--dtype", "bf16", "--all-dtype") == 0
    assert {t.dtype for t in weights(tmp_path / "all").values()} == {torch.bfloat16}
    assert to_ours(tmp_path / "all", tmp_path / "ours2") == 0
    assert equal(ours, weights(tmp_path / "ours2"))


def test_dtype_option_rounds_once(tmp_path):
    peer = write_folder(tmp_path / "hf", BASE)
    assert to_ours(tmp_path / "hf", tmp_path / "ours", "--dtype", "bf16") == 0
    ours = weights(tmp_path / "ours")
    for name, tensor in true_tensors_of(peer, ModelConfig(**BASE)).items():
        keep = name.endswith(("A_log", "dt_bias"))
        assert torch.equal(ours[name], tensor if keep else tensor.bfloat16())
    verdict = verify(tmp_path / "ours", tmp_path / "hf")
    assert not verdict.problems
    assert verdict.rounded == len(ours) - 6


@pytest.mark.parametrize(
    "rope", [dict(rope_parameters=None), dict(rope_parameters={"rope_theta": None}), dict(rope_theta=None)]
)
def test_no_rotary_embedding_is_kept_by_every_spelling(rope, tmp_path):
    from transformers import AutoModelForCausalLM

    write_folder(tmp_path / "hf", BASE | dict(rope_theta=None))
    edit_json(tmp_path / "hf/config.json", **({"rope_parameters": ...} | rope))
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert json.loads((tmp_path / "ours/index.json").read_text())["model"]["rope_theta"] is None
    assert to_theirs(tmp_path / "ours", tmp_path / "export") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").model.rotary_emb is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(mystery=1), "unknown field 'mystery'"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(attention_bias=True), "attention_bias = True"),
        (dict(attention_dropout=0.1), "attention_dropout = 0.1"),
        (dict(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 8}), "only plain rotary embedding"),
        (dict(rope_scaling={"type": "linear", "factor": 2}), "rope_scaling"),
        (dict(rope_parameters=...), "neither rope_parameters nor rope_theta"),
        (dict(model_type="llama"), "model_type 'llama'"),
        (dict(architectures=["LlamaForCausalLM"]), "architectures"),
        (dict(linear_conv_kernel_dim=3), "conv_kernel_size"),
        (dict(num_hidden_layers=5), "layer_types"),
        (dict(num_hidden_layers=True), "num_hidden_layers is True"),
        (dict(hidden_size=...), "hidden_size is missing"),
        (dict(hidden_size="24"), "hidden_size is '24'"),
        (dict(eos_token_id=[5, 6]), "--eos-token-id"),
        (dict(vocab_size=68), "model.embed_tokens.weight is [67, 24]"),
        (dict(linear_key_head_dim=5), "linear_attn"),
        (dict(layer_types=["full_attention"] + ["linear_attention"] * 3), "does not have"),
        (dict(tie_word_embeddings=True), "lm_head.weight differs"),
        (dict(rms_norm_eps=0), "norm_eps"),
    ],
    ids=str,
)
def test_wrong_configs_are_named_and_nothing_is_written(change, told, tmp_path, capsys):
    write_folder(tmp_path / "hf", BASE)
    edit_json(tmp_path / "hf/config.json", **change)
    before = set(tmp_path.iterdir())
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == BAD_INPUT
    assert told in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_several_end_tokens_need_a_choice(tmp_path):
    write_folder(tmp_path / "hf", BASE)
    edit_json(tmp_path / "hf/config.json", eos_token_id=[5, 6])
    assert to_ours(tmp_path / "hf", tmp_path / "ours", "--eos-token-id", "6") == 0
    assert json.loads((tmp_path / "ours/index.json").read_text())["model"]["eos_token_id"] == 6


def test_wrong_tensors_are_named(tmp_path, capsys):
    write_folder(tmp_path / "hf", BASE)
    path = tmp_path / "hf/model.safetensors"
    good = load_file(path)

    def told(tensors) -> str:
        save_file(tensors, path)
        assert to_ours(tmp_path / "hf", tmp_path / "ours") == BAD_INPUT
        assert not (tmp_path / "ours").exists()
        return capsys.readouterr().err

    name = "model.layers.1.linear_attn.A_log"
    assert f"missing: {name}" in told({n: t for n, t in good.items() if n != name})
    assert "model.extra" in told(good | {"model.extra": torch.zeros(2)})
    assert name in told(good | {name: torch.zeros(4)})
    assert "I64" in told(good | {name: torch.zeros(3, dtype=torch.int64)})
    conv = "model.layers.0.linear_attn.k_conv1d.weight"
    assert "linear_attn.conv1d" in told({n: t for n, t in good.items() if n != conv})
    assert "together" in told(good | {conv: torch.zeros(2, 1, 4)})
    assert "different dtypes" in told(good | {conv: good[conv].bfloat16()})
    assert "two spellings" in told(good | {"model.layers.0.linear_attn.out_proj.weight": torch.zeros(24, 30)})


def test_tied_copies_are_accepted_when_equal(tmp_path):
    write_folder(tmp_path / "hf", BASE | dict(tie_embeddings=True))
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert "output.weight" not in weights(tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dict(layer_pattern="G*4"), "has no full attention layer"),
        (dict(layer_pattern="GGWA", sliding_window=4), "sliding windows"),
        (dict(layer_pattern="A*4", gdn=None, rope_theta=None), "always has rotary"),
        (dict(gdn=GDN | dict(norm_eps=1e-6)), "norm_eps"),
    ],
    ids=str,
)
def test_models_that_transformers_cannot_compute_are_refused(change, told, tmp_path, capsys):
    write_folder(tmp_path / "hf", BASE)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    model = ModelConfig(**BASE | change)
    tensors = {}
    for n, s in model_tensors(model).items():
        shard = dict(
            file="model-00001-of-00001.safetensors", entry=n, offset=[0] * len(s.shape), shape=s.shape, range=None
        )
        tensors[n] = dict(dtype="F32", shape=s.shape, shards=[shard])
    save_file(
        {n: torch.zeros(s.shape) for n, s in model_tensors(model).items()},
        tmp_path / "ours/model-00001-of-00001.safetensors",
    )
    path = tmp_path / "ours/model-00001-of-00001.safetensors"
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}}
    changes = dict(files=files, model=model.model_dump(mode="json"), tensors=tensors)
    edit_index(tmp_path / "ours", lambda index: index.update(changes))
    capsys.readouterr()
    assert to_theirs(tmp_path / "ours", tmp_path / "export") == BAD_INPUT
    assert told in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(("words", "status", "said"), [(60, 0, "ends documents with token 0, but model.eos_token_id is 5"),
                                                        (70, BAD_INPUT, "has 70 ids, more than model.vocab_size 67")])  # fmt: skip
def test_a_tokenizer_that_contradicts_the_model(tmp_path, capsys, words, status, said):
    write_folder(tmp_path / "theirs", BASE)
    assert to_ours(tmp_path / "theirs", tmp_path / "ours") == 0
    save_tokenizer(tmp_path / "tokenizer", [f"w{i}" for i in range(words)], "w0")
    assert to_theirs(tmp_path / "ours", tmp_path / "export", "--tokenizer", str(tmp_path / "tokenizer")) == status
    assert said in capsys.readouterr().err
    assert (tmp_path / "export").exists() == (status == 0)


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path, capsys):
    write_folder(tmp_path / "hf", BASE)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    assert to_theirs(tmp_path / "ours", tmp_path / "export", "--tokenizer", str(tokenizer)) == BAD_INPUT
    assert "no tokenizer" in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json", "secrets.env"):
        (tokenizer / name).write_text("{}")
    assert to_theirs(tmp_path / "ours", tmp_path / "export", "--tokenizer", str(tokenizer)) == 0
    assert {p.name for p in (tmp_path / "export").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_model_yaml_is_what_a_run_must_say(tmp_path):
    write_folder(tmp_path / "hf", BASE)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    overrides = [
        "run_dir=x",
        "data.sequence_length=32",
        "data.train=[{path: x}]",
        "train.steps=1",
        "train.global_batch_size=1",
    ]
    run = load_run(str(tmp_path / "ours/model.yaml"), overrides)
    assert run.model == ModelConfig(**BASE)


def test_verify_finds_what_is_wrong(tmp_path, capsys):
    write_folder(tmp_path / "hf", BASE)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert verify_checkpoint.main([str(tmp_path / "ours"), "--against", str(tmp_path / "hf"), "--quiet"]) == 0
    path = tmp_path / "ours/model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    path.write_bytes(data)
    assert verify_checkpoint.main([str(tmp_path / "ours"), "--against", str(tmp_path / "hf"), "--quiet"]) == BAD_INPUT
    told = capsys.readouterr().err
    assert "SHA-256" in told and "NaN" in told and "differs" in told
    path.write_bytes(data[:-8])
    assert verify_checkpoint.main([str(tmp_path / "ours"), "--quiet"]) == BAD_INPUT
