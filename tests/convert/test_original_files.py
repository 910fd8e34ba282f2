"""Files next to the weights of a Hugging Face model: an export contains them again, also after training."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.checkpoint.format import INDEX
from megatron_hybrid.convert.verify import verify
from tests.convert import jobs
from tests.convert.folders import BASE, edit_json, write_folder
from tests.convert.test_huggingface import to_ours, to_theirs

GENERATION = {"eos_token_id": [5, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.95, "pad_token_id": 6}
TOKENIZER = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"eos_token": "x"}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model with all files that usually are next to it."""
    write_folder(tmp_path / "hf", BASE)
    edit_json(tmp_path / "hf/config.json", bos_token_id=3, max_position_embeddings=4096)
    edit_json(tmp_path / "hf/generation_config.json", **GENERATION)
    (tmp_path / "hf/additional_chat_templates").mkdir()
    for name, text in TOKENIZER.items():
        (tmp_path / "hf" / name).write_text(text)
    return tmp_path / "hf"


def trained(ranks, checkpoint: Path, target: Path, **data) -> Path:
    """A checkpoint of a run that started from `checkpoint`."""
    run = dict(data=data) if data else {}
    saved = ranks.run(
        jobs.load_and_save, 2, checkpoint=str(checkpoint), folder=str(target), parallel={}, train=dict(global_batch_size=2), run=run
    )  # fmt: skip
    return Path(saved[0]["path"])


def check_export(folder: Path) -> None:
    config, generation = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert (config["bos_token_id"], config["max_position_embeddings"], config["eos_token_id"]) == (3, 4096, 5)
    assert {name: generation[name] for name in GENERATION} == GENERATION
    assert {name: (folder / name).read_text() for name in TOKENIZER} == TOKENIZER


def test_all_of_it_comes_back(folder, tmp_path):
    assert to_ours(folder, tmp_path / "ours") == 0
    assert to_theirs(tmp_path / "ours", tmp_path / "out") == 0
    check_export(tmp_path / "out")
    assert not verify(tmp_path / "ours", tmp_path / "out").problems


def test_training_forgets_nothing(folder, tmp_path, ranks, capsys):
    assert to_ours(folder, tmp_path / "ours") == 0
    first = trained(ranks, tmp_path / "ours", tmp_path / "run1", sequence_length=32)
    shutil.rmtree(tmp_path / "ours")
    second = trained(ranks, first, tmp_path / "run2", sequence_length=64)
    capsys.readouterr()
    assert to_theirs(second, tmp_path / "out") == 0
    said = capsys.readouterr().err
    check_export(tmp_path / "out")
    assert "max_position_embeddings is 4096" in said and "is 64" in said and "--max-position-embeddings" in said


def test_positions_are_the_longest_known(folder, tmp_path, ranks, capsys):
    assert to_ours(folder, tmp_path / "ours") == 0
    longer = trained(ranks, tmp_path / "ours", tmp_path / "run1", sequence_length=8192)
    shorter = trained(ranks, longer, tmp_path / "run2", sequence_length=32)
    assert to_theirs(shorter, tmp_path / "out") == 0
    assert "max_position_embeddings is 8192" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 8192
    assert to_theirs(shorter, tmp_path / "asked", "--max-position-embeddings", "100") == 0
    assert json.loads((tmp_path / "asked/config.json").read_text())["max_position_embeddings"] == 100
    assert json.loads((shorter / INDEX).read_text())["run"]["trained_before"]["checkpoint"] == str(longer)


def test_an_end_token_of_the_run_is_added(folder, tmp_path, capsys):
    assert to_ours(folder, tmp_path / "ours", "--eos-token-id", "9") == 0
    assert to_theirs(tmp_path / "ours", tmp_path / "out") == 0
    assert "[9]" in capsys.readouterr().err
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [9, 5, 7] and generation["temperature"] == 0.6


def test_a_given_tokenizer_replaces_the_original(folder, tmp_path):
    assert to_ours(folder, tmp_path / "ours") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text('{"other": 1}')
    assert to_theirs(tmp_path / "ours", tmp_path / "out", "--tokenizer", str(tmp_path / "other")) == 0
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"other": 1}'
    assert not (tmp_path / "out/chat_template.jinja").exists()


@pytest.mark.parametrize("options", [[], ["--tokenizer"]], ids=["kept", "with another tokenizer"])
def test_processors_of_images_return(folder, tmp_path, options):
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    for name in names:
        (folder / name).write_text(f'{{"of": "{name}"}}')
    assert to_ours(folder, tmp_path / "ours") == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text("{}")
    assert (
        to_theirs(tmp_path / "ours", tmp_path / "out", *options, *([str(tmp_path / "other")] if options else [])) == 0
    )
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_what_is_left_out_is_said(folder, tmp_path, capsys):
    (folder / "LICENSE").write_text("x")
    (folder / "configuration_x.py").write_text("x")
    assert to_ours(folder, tmp_path / "ours") == 0
    assert f"left out of {folder}: LICENSE, configuration_x.py" in capsys.readouterr().err


def test_a_damaged_generation_config_is_named(folder, tmp_path, capsys):
    (folder / "generation_config.json").write_text("{")
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    assert "generation_config.json: not readable JSON" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_links_in_kept_files_are_not_followed(folder, tmp_path, ranks):
    assert to_ours(folder, tmp_path / "ours") == 0
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "ours/original/tokenizer.json").unlink()
    (tmp_path / "ours/original/tokenizer.json").symlink_to(tmp_path / "secret")
    assert to_theirs(tmp_path / "ours", tmp_path / "out") == BAD_INPUT
    with pytest.raises(AssertionError, match="original/tokenizer.json: 6 bytes, 2 bytes were written; use an earlier"):
        trained(ranks, tmp_path / "ours", tmp_path / "run")
