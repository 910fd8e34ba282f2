"""Storage of weights: buffers in the same file, copies in other types, Hugging Face's cache, Git LFS pointers."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.base.lfs import is_lfs_pointer
from megatron_hybrid.convert.verify import verify
from tests.convert.folders import BASE, weights, write_folder
from tests.convert.test_huggingface import equal, to_ours, to_theirs

COMPUTED = {
    "model.rotary_emb.inv_freq": torch.zeros(4),
    "model.layers.3.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    "model.rotary_embs.full_attention.inv_freq": torch.zeros(4),
    "model.rotary_emb.sliding_attention_original_inv_freq": torch.zeros(4),
    "model.layers.3.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    "model.layers.3.self_attn.masked_bias": torch.tensor(-1e4),
    "model.causal_mask": torch.ones(4, 4, dtype=torch.bool),
}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(tmp_path / "hf", BASE)
    return tmp_path / "hf"


def test_computed_tensors_are_left_out(folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    good = load_file(path)
    save_file(good | COMPUTED, path)
    assert to_ours(folder, tmp_path / "ours") == 0
    assert "left out, computed from config.json: model." in capsys.readouterr().err
    assert not verify(tmp_path / "ours", folder).problems
    save_file(good, path)
    assert to_ours(folder, tmp_path / "ours2") == 0
    assert equal(weights(tmp_path / "ours"), weights(tmp_path / "ours2"))


@pytest.mark.parametrize(
    "name", ["model.layers.3.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.lora_A.weight", "model.inv_freq_scale"]
)
def test_other_tensors_are_refused(name, folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(4)}, path)
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32])
def test_copies_that_hold_the_same_values_are_equal(dtype, folder, tmp_path):
    path = folder / "model.safetensors"
    values = {name: t.bfloat16().clamp(-1e3, 1e3).half().bfloat16() for name, t in load_file(path).items()}
    values = {name: torch.where(t.abs() < 1e-3, 0, t) for name, t in values.items()}  # fp16 has these, too
    save_file({n: t.float() if n.endswith(("A_log", "dt_bias")) else t for n, t in values.items()}, path)
    assert to_ours(folder, tmp_path / "ours") == 0
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    save_file({n: t.to(dtype) for n, t in values.items()}, other / "model.safetensors")
    verdict = verify(tmp_path / "ours", other)
    assert not verdict.problems and verdict.rounded == 0
    changed = {n: t.to(dtype) for n, t in values.items()}
    changed["model.norm.weight"][0] *= 1.5
    save_file(changed, other / "model.safetensors")
    assert verify(tmp_path / "ours", other).problems


def test_fp64_becomes_fp32_and_that_is_said(folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    good = load_file(path)
    save_file({n: t.double() for n, t in good.items()}, path)
    assert to_ours(folder, tmp_path / "ours") == 0
    assert "fp64" in capsys.readouterr().err
    assert {t.dtype for t in weights(tmp_path / "ours").values()} == {torch.float32}
    save_file(good, path)
    assert to_ours(folder, tmp_path / "ours2") == 0
    assert equal(weights(tmp_path / "ours"), weights(tmp_path / "ours2"))


@pytest.mark.parametrize(("scale", "status"), [(1.0, 0), (1.01, BAD_INPUT)])
def test_a_tied_copy_in_another_type(scale, status, tmp_path, capsys):
    folder = tmp_path / "tied"
    write_folder(folder, BASE | dict(tie_embeddings=True))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].float() * scale}, path)
    assert to_ours(folder, tmp_path / "ours") == status
    assert ("lm_head.weight differs" in capsys.readouterr().err) == bool(status)


def cached(source: Path, repository: Path) -> Path:
    """Return the folder as in the Hugging Face cache: a snapshot of links to blobs."""
    snapshot, blobs = repository / "snapshots/0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_a_snapshot_of_the_cache_is_read(folder, tmp_path, capsys):
    (folder / "tokenizer.json").write_text("{}")
    snapshot = cached(folder, tmp_path / "hub/models--ai--Tiny")
    assert to_ours(snapshot, tmp_path / "ours") == 0
    assert not verify(tmp_path / "ours", snapshot).problems
    assert to_theirs(tmp_path / "ours", tmp_path / "out", "--tokenizer", str(snapshot)) == 0
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}" and not (tmp_path / "out/tokenizer.json").is_symlink()
    assert to_ours(snapshot.parent.parent, tmp_path / "ours2") == BAD_INPUT
    assert f"give a snapshot of this Hugging Face cache: {snapshot}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "target", ["../../../../secret", "../../secret", "../../blobs/../../secret", "../other/secret"]
)
def test_other_links_of_a_snapshot_are_not_followed(target, folder, tmp_path, capsys):
    snapshot = cached(folder, tmp_path / "hub/models--ai--Tiny")
    (snapshot.parent / "other").mkdir()
    secret = Path(snapshot / target).resolve()
    secret.write_text((snapshot / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(target)
    assert to_ours(snapshot, tmp_path / "ours") == BAD_INPUT
    assert "is not followed" in capsys.readouterr().err


def test_blobs_that_are_a_link_themselves(folder, tmp_path, capsys):
    snapshot = cached(folder, tmp_path / "hub/models--ai--Tiny")
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert to_ours(snapshot, tmp_path / "ours") == BAD_INPUT
    assert "is not followed" in capsys.readouterr().err


def test_lfs_pointers_are_known():
    assert is_lfs_pointer(POINTER.encode()) and is_lfs_pointer(POINTER.replace("git-lfs", "hawser").encode())
    assert not is_lfs_pointer(b"version 1") and not is_lfs_pointer(b"")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"],
)
def test_lfs_pointers_are_named(name, folder, tmp_path, capsys):
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    said = capsys.readouterr().err
    assert f"{folder / name}: a Git LFS pointer" in said and "git lfs pull" in said


def test_lfs_pointers_in_our_checkpoints_are_named(folder, tmp_path, capsys):
    assert to_ours(folder, tmp_path / "ours") == 0
    for path in (next((tmp_path / "ours").glob("*.safetensors")), tmp_path / "ours/index.json"):
        path.write_text(POINTER)
        assert to_theirs(tmp_path / "ours", tmp_path / "out") == BAD_INPUT
        assert f"{path}: a Git LFS pointer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="git lfs pull"):
        verify(tmp_path / "ours")


def test_an_adapter_is_named(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert to_ours(tmp_path / "adapter", tmp_path / "ours") == BAD_INPUT
    assert "merge_and_unload" in capsys.readouterr().err
