"""Ids of a tokenizer folder against transformers' AutoTokenizer, whatever files lie next to tokenizer.json."""

import hashlib
import json
import pickle
import shutil

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as tokenizer_decoders

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import load_tokenizer
from tests.base.test_lfs import POINTER

EOS = "<|endoftext|>"
IM_START = {"content": "<|im_start|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
TEXTS = ["the cat <|endoftext|> sat <|im_start|>user on", " Le ÇAFÉ .  <|im_start|>  x<tool>y ", "the", "", "a\n\n b ."]


@pytest.fixture(scope="module")
def backend():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS, "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran after the cat"] * 20, trainer)
    return tokenizer


def write(folder, backend, settings=None, /, **files):
    """A tokenizer folder; files: JSON content by name without .json."""
    backend.save(str(folder / "tokenizer.json"))
    base = {"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in {"tokenizer_config": base | (settings or {}), **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_same_as_transformers(folder):
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.eos_token_id == theirs.eos_token_id
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ours


NEW_ID = 300  # the first id after the vocabulary

CONFIGS = {
    "nothing": {},
    "additional_special_tokens": {"additional_special_tokens": ["<|im_start|>"]},
    "additional_special_tokens as objects": {"additional_special_tokens": [IM_START | {"__type": "AddedToken"}]},
    "extra_special_tokens": {"extra_special_tokens": ["<|im_start|>"]},
    "extra_special_tokens by name": {"extra_special_tokens": {"tool_token": "<tool>"}},
    "a token of its own": {"image_token": "<tool>"},
    "added_tokens_decoder": {"added_tokens_decoder": {str(NEW_ID): IM_START | {"special": True}}},
    "added_tokens_decoder, strip": {
        "added_tokens_decoder": {str(NEW_ID): IM_START | {"special": False, "lstrip": True, "rstrip": True}}
    },
    "add_prefix_space": {"add_prefix_space": True, "tokenizer_class": "GPT2TokenizerFast"},
    "add_prefix_space, generic class": {"add_prefix_space": True},
    "split_special_tokens": {"split_special_tokens": True},
    "do_lower_case": {"do_lower_case": True},
    "clean_up_tokenization_spaces": {"clean_up_tokenization_spaces": True},
    "add_bos_token": {"add_bos_token": True, "bos_token": EOS, "add_eos_token": True},
    "LlamaTokenizer over bytes": {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    "unknown class": {"tokenizer_class": "NoSuchTokenizer"},
    "no class": {"tokenizer_class": None},
    "Qwen2Tokenizer": {"tokenizer_class": "Qwen2Tokenizer", "errors": "replace"},
    "GPTNeoXTokenizer": {"tokenizer_class": "GPTNeoXTokenizer", "unk_token": EOS, "bos_token": EOS},
    "chat_template": {"chat_template": "{{ messages }}"},
    "model_max_length": {"model_max_length": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_tokenizer_config(tmp_path, backend, name):
    assert_same_as_transformers(write(tmp_path, backend, CONFIGS[name]))


FILES = {
    "added_tokens": {"added_tokens": {"<|im_start|>": NEW_ID, "<tool>": NEW_ID + 1}},
    "special_tokens_map": {"special_tokens_map": {"eos_token": EOS, "pad_token": "<tool>"}},
    "special tokens as objects": {"special_tokens_map": {"eos_token": {**IM_START, "content": EOS}}},
    "more special tokens": {"special_tokens_map": {"additional_special_tokens": ["<|im_start|>"]}},
    "config": {"config": {"model_type": "llama", "eos_token_id": 5}},
    "config of olmo_hybrid": {"config": {"model_type": "olmo_hybrid"}},
    "generation_config": {"generation_config": {"eos_token_id": [7, 0]}},
    "tokenizer of another folder": {"added_tokens": {}, "special_tokens_map": {}, "generation_config": {}},
}


@pytest.mark.parametrize("name", FILES)
def test_files_next_to_tokenizer_json(tmp_path, backend, name):
    assert_same_as_transformers(write(tmp_path, backend, None, **FILES[name]))


def change(backend, how):
    changed = Tokenizer.from_str(backend.to_str())
    how(changed)
    return changed


CHANGES = {
    "truncation and padding": lambda t: (t.enable_truncation(3), t.enable_padding(length=9)),
    "post_processor": lambda t: setattr(
        t, "post_processor", processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    ),
    "normalizer": lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
    "normalized added token": lambda t: t.add_tokens([AddedToken("<TOOL>", normalized=True, single_word=True)]),
    "a hole in the ids": lambda t: t.add_special_tokens(["<tool>", "<|im_start|>"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_contents_of_tokenizer_json(tmp_path, backend, name):
    write(tmp_path, change(backend, CHANGES[name]))
    if "hole" in name:
        saved = json.loads((tmp_path / "tokenizer.json").read_text())
        saved["added_tokens"][-1]["id"] += 40
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    assert_same_as_transformers(tmp_path)


@pytest.mark.parametrize("config", [{}, {"split_special_tokens": True}, CONFIGS["extra_special_tokens"]])
def test_a_worker_gets_the_same_tokenizer(tmp_path, backend, config):
    ours = load_tokenizer(write(tmp_path, change(backend, CHANGES["truncation and padding"]), config))
    copy = pickle.loads(pickle.dumps(ours))
    assert (copy.vocab_size, copy.eos_token_id) == (ours.vocab_size, ours.eos_token_id)
    assert [copy.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_a_folder_of_the_hugging_face_cache(tmp_path, backend):
    write(tmp_path, backend, CONFIGS["extra_special_tokens"])
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in tmp_path.glob("*.json"):
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.move(file, repository / "blobs" / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    assert_same_as_transformers(snapshot)
    with pytest.raises(DataError, match="a repository of the Hugging Face cache: give one of .*/snapshots/"):
        load_tokenizer(repository)
    for blob in (repository / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(DataError, match="a link to a missing file"):
        load_tokenizer(snapshot)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({}, {"special_tokens_map": {"eos_token": "<|pad|>"}}, "tokenizer_config.json has .* special_tokens_map.json"),
        ({}, {"generation_config": {"eos_token_id": 5}}, r"generation_config.json: eos_token_id \[5\] leaves out"),
        ({"eos_token": "<no>"}, {}, "tokenizer_config.json: eos_token '<no>' is not in"),
        ({"eos_token": None}, {}, "names no end-of-document token"),
        ({"added_tokens_decoder": {"300": "<tool>"}}, {}, "cannot load this tokenizer.*check tokenizer_config.json"),
        (
            {"auto_map": {"AutoTokenizer": ["a.B", "a.B"]}, "tokenizer_class": "B"},
            {},
            "cannot load this tokenizer.*trust_remote_code",
        ),
        (
            {"tokenizer_class": "ByT5Tokenizer"},
            {},
            "tokenizer_class: transformers' ByT5Tokenizer prepares text in Python",
        ),
        ({}, {"added_tokens": [1]}, "added_tokens.json: not a JSON object"),
    ],
)
def test_folders_that_are_refused(tmp_path, backend, config, files, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        load_tokenizer(write(tmp_path, backend, config, **files))


def test_random_merges_are_refused(tmp_path, backend):
    write(tmp_path, change(backend, lambda t: setattr(t.model, "dropout", 0.1)))
    with pytest.raises(DataError, match="tokenizer.json: model.dropout is 0.1: .*random"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "tekken.json"])
def test_other_formats_are_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=f"holds no tokenizer.json .it holds {name}, .*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json"])
def test_git_lfs_pointers_are_named(tmp_path, backend, name):
    write(tmp_path, backend)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(DataError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
        load_tokenizer(tmp_path)
