"""An export computes the same in every version of transformers that has its architecture."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.folders import BASE, OLMO3, YARN, write_folder
from tests.convert.logits_of import logits
from tests.convert.test_huggingface import to_ours, to_theirs

ATTENTION = OLMO3 | dict(layer_pattern="A*4", sliding_window=None)
HYBRID = {
    "hybrid": BASE,
    "hybrid-nope": BASE | dict(rope_theta=None),
    "hybrid-tied": BASE | dict(tie_embeddings=True),
    "hybrid-grouped": BASE | dict(num_attention_heads=4, num_key_value_heads=2),
    "hybrid-yarn": BASE | dict(rope_scaling=YARN),
}
ALIKE = {
    "olmo3": OLMO3,
    "olmo3-theta": OLMO3 | dict(rope_theta=2e4),
    "olmo3-grouped-tied": OLMO3 | dict(num_key_value_heads=2, tie_embeddings=True),
    "olmo3-windows-alone": OLMO3 | dict(layer_pattern="W*4", rope_theta=2e4),
    "attention": ATTENTION | dict(rope_theta=2e4),
    "attention-yarn": ATTENTION | dict(rope_scaling=YARN | dict(attention_factor=1.4)),
}
# 5.0 to 5.12 scale sliding layers as well, whatever config.json says
MIXED_YARN = {"olmo3-yarn": OLMO3 | dict(rope_theta=2e4, rope_scaling=YARN)}
FAMILIES = HYBRID | ALIKE | MIXED_YARN
OLDER = {"4.57.6": ALIKE | MIXED_YARN, "5.8.0": HYBRID | ALIKE}
TOKENS = torch.randint(0, 67, (2, 48), generator=torch.Generator().manual_seed(1))
SCRIPT = Path(__file__).with_name("logits_of.py")


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Return the export of each family, and the logits of the exported model."""
    found = {}
    for name, fields in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        peer = write_folder(folder / "hf", fields)
        assert to_ours(folder / "hf", folder / "ours") == 0
        assert to_theirs(folder / "ours", folder / name, "--max-position-embeddings", "64") == 0
        with torch.no_grad():
            found[name] = folder / name, peer(TOKENS).logits
    return found


def installed(version: str) -> Path:
    """Return a folder with this version of transformers and its dependencies without torch. It is created on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-hybrid"
    target, making = cache / f"transformers-{version}", cache / f".transformers-{version}-{os.getpid()}"
    if not target.is_dir():
        packages = [f"transformers=={version}", f"numpy=={numpy.__version__}"]
        command = [sys.executable, "-m", "pip", "install", "-q", "--retries", "0", "--target", str(making), *packages]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            shutil.rmtree(making, ignore_errors=True)
            pytest.skip(f"transformers {version} cannot be installed: {result.stderr.strip().splitlines()[-1]}")
        making.rename(target)
    return target


def test_the_installed_version(exports):
    for name, (folder, expected) in exports.items():
        assert torch.equal(logits(str(folder), TOKENS), expected), name


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER)
def test_older_versions(version, exports, tmp_path):
    folders = [str(exports[name][0]) for name in OLDER[version]]
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "tokens.safetensors"), str(tmp_path / "logits"), *folders]
    environment = os.environ | {"PYTHONPATH": str(installed(version)), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    found = load_file(tmp_path / "logits")
    wrong = {name: (found[name] - exports[name][1]).abs().max().item() for name in OLDER[version]}
    assert max(wrong.values()) < 1e-5, wrong


def test_what_a_version_cannot_compute_is_said(tmp_path, capsys):
    write_folder(tmp_path / "hf", MIXED_YARN["olmo3-yarn"])
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert to_theirs(tmp_path / "ours", tmp_path / "out") == 0
    assert "transformers 5.0 to 5.12 apply rope_scaling to sliding attention" in capsys.readouterr().err
