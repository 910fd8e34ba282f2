"""The text of a continuation is whole: what is printed token by token is what the tokens decode to after their prompt."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_hybrid.data.hf_tokenizer import HuggingFaceTokenizer
from megatron_hybrid.data.streaming import ContinuationText
from megatron_hybrid.data.tokenizer import ByteTokenizer


def byte_level(special=(), normalizer=None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens(list(special))
    return backend


def words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<e>", "<u>", *"abcd"])}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<e>"])
    return backend


def metaspace() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<e>", "▁a", "▁b", "c"])}, unk_token="<e>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<e>"])
    return backend


@pytest.fixture
def load(tmp_path):
    def save(backend: Tokenizer, eos: str) -> HuggingFaceTokenizer:
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": "{eos}"}}')
        return HuggingFaceTokenizer(tmp_path)

    return save


def stream(tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    text = ContinuationText(tokenizer, prompt)
    return [*(text.add(token) for token in ids), text.end()]


def test_special_tokens_in_the_prompt(load):
    tokenizer = load(byte_level(["<|im_start|>", "<|im_end|>"]), "<|im_end|>")
    prompt = tokenizer.encode("<|im_start|>user abc<|im_end|>")
    assert stream(tokenizer, prompt, tokenizer.encode("hello")) == [*"hello", ""]
    mixed = tokenizer.encode("a<|im_end|>b")
    assert "".join(stream(tokenizer, prompt, mixed)) == "ab"


def test_a_prompt_that_is_normalized(load):
    tokenizer = load(byte_level(["<e>"], normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])), "<e>")
    assert "".join(stream(tokenizer, tokenizer.encode("ＡＢ  ﬁ X"), tokenizer.encode("yz"))) == "yz"


@pytest.mark.parametrize("prompt", ["a b", "a          b", "<e>a b"])
def test_spaces_between_words(load, prompt):
    tokenizer = load(words(), "<e>")
    ids = tokenizer.encode("c d a b") * 10
    told = "".join(stream(tokenizer, tokenizer.encode(prompt), ids))
    assert told == " " + tokenizer.decode(ids)


def test_a_leading_space_is_kept_after_a_prompt(load):
    tokenizer = load(metaspace(), "<e>")
    assert stream(tokenizer, tokenizer.encode("a b"), [1, 3, 0, 2]) == [" a", "c", "", " b", ""]


@pytest.mark.parametrize("text", ["é漢🙂x", "🙂" * 20])
def test_characters_of_several_tokens(load, text):
    for tokenizer in (ByteTokenizer(), load(byte_level(["<e>"]), "<e>")):
        parts = stream(tokenizer, tokenizer.encode("naïve 漢"), tokenizer.encode(text))
        assert "".join(parts) == text and not any("\ufffd" in part for part in parts)


def test_bytes_that_complete_no_character_come_at_the_end():
    tokenizer = ByteTokenizer()
    assert stream(tokenizer, tokenizer.encode("a"), list("é🙂".encode())[:-1])[-1] == "\ufffd"
    assert "".join(stream(tokenizer, tokenizer.encode("a"), [0xFF, 0x41, 0xC3])) == "\ufffdA\ufffd"
