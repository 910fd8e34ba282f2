"""Tokenizers, the local folder against transformers' own loader."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as tokenizer_decoders
from transformers import PreTrainedTokenizerFast

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import ByteTokenizer, load_tokenizer

TEXTS = ["", "def f(x):\n    return x\n", "naïve café — 漢字 🙂", "\x00\r\n\t", "a<|endoftext|>b"]
EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def backend():
    """A byte-level BPE tokenizer with one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["def f(x): return x + 1"] * 10, trainer)
    return tokenizer


@pytest.fixture
def folder(tmp_path, backend):
    """The tokenizer as transformers saves it."""
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(tmp_path)
    return tmp_path


def test_bytes_round_trip():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (257, 256)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text


def test_bytes_that_are_no_text_are_replaced():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*"é".encode()[:1], 65, 256, 66]) == "\ufffdAB"


@pytest.mark.parametrize("token", [-1, 257])
def test_an_id_that_is_no_byte(token):
    with pytest.raises(DataError, match=f"token {token}"):
        ByteTokenizer().decode([65, token])


def test_folder_agrees_with_transformers(folder):
    ours, theirs = load_tokenizer(str(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.vocab_size == len(theirs) and ours.eos_token_id == theirs.eos_token_id
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_saved_truncation_does_not_cut_documents(folder, backend):
    cut = Tokenizer.from_str(backend.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=4)
    cut.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("0123456789" * 10)) == 100
    assert len(tokenizer.encode("0")) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": EOS, "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": EOS}),
        ("generation_config.json", {"eos_token_id": [0, 5]}),
        ("config.json", {"eos_token_id": 0}),
    ],
)
def test_where_the_end_of_document_is_named(tmp_path, backend, name, content):
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos_token_id == backend.token_to_id(EOS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer.json"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer"),
        ({"tokenizer.json": None}, "names no end-of-document token"),
        ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "<no>"}'}, "'<no>' is not in"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "not readable JSON"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "not a JSON object"),
        ({"tokenizer.json": None, "config.json": '{"eos_token_id": 999}'}, "999 is outside the vocabulary of"),
    ],
)
def test_wrong_folders(tmp_path, backend, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(backend.to_str() if content is None else content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_names_are_not_downloaded():
    with pytest.raises(DataError, match="'gpt2' is neither .* nor a local folder. Names are never downloaded"):
        load_tokenizer("gpt2")
