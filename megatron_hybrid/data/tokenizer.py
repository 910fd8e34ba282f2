"""Tokenizers: bytes, or a Hugging Face tokenizer from a local folder.

- `Tokenizer`: what the rest of the project needs of one.
- `ByteTokenizer`: UTF-8 bytes and one end-of-document id.
- `load_tokenizer`: a tokenizer by name. Nothing is downloaded. `hf_tokenizer` reads the folders.
"""

import hashlib
import json
from pathlib import Path
from typing import Protocol

from megatron_hybrid.data.errors import DataError


class Tokenizer(Protocol):
    """Tokenizer between text and ids in [0, vocab_size)."""

    vocab_size: int
    """Largest id plus one."""
    eos_token_id: int
    """End-of-document token."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin- or end-of-document tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without control tokens such as end-of-document."""
        ...

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token."""
        ...

    def token_bytes(self) -> dict[int, int]:
        """Return the bytes of UTF-8 text that each token stands for. Special tokens stand for none.

        Raises:
            DataError: a token stands for different text in different places.
        """
        ...


class ByteTokenizer:
    """Tokenizer of UTF-8 bytes. Id 256 is end-of-document."""

    vocab_size = 257
    eos_token_id = 256

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text's UTF-8 bytes.

        Raises:
            UnicodeEncodeError: text holds a lone surrogate.
        """
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """Return the text of byte ids. Bytes that are not UTF-8, as of a cut character, become U+FFFD.

        Raises:
            DataError: an id outside [0, 257).
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token {token} is no byte: ids of the byte tokenizer are 0 to 256")
        return bytes(token for token in ids if token != self.eos_token_id).decode("utf-8", errors="replace")

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token."""
        return {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<eos>": self.eos_token_id}

    def token_bytes(self) -> dict[int, int]:
        """Return the bytes of UTF-8 text that each token stands for: one, or none for end-of-document."""
        return dict.fromkeys(range(256), 1) | {self.eos_token_id: 0}


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer of a spec: `byte`, or the folder of a Hugging Face tokenizer.

    Raises:
        DataError: neither; names are not looked up on the Hugging Face Hub.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if not Path(spec).is_dir():
        raise DataError(
            f"tokenizer {str(spec)!r} is neither `byte` nor a local folder. Names are never downloaded: "
            "fetch the tokenizer first and give its folder"
        )
    from megatron_hybrid.data.hf_tokenizer import HuggingFaceTokenizer

    return HuggingFaceTokenizer(spec)


def vocabulary_sha256(tokenizer: Tokenizer, size: int | None = None) -> str:
    """Return a hash of the tokens with an ID below `size`, or of all. Hashes are equal if IDs have the same text."""
    ids = sorted((token, text) for text, token in tokenizer.vocabulary().items() if size is None or token < size)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
