"""Text to token ids and back: bytes, or a Hugging Face tokenizer from a local folder.

- `Tokenizer`: what the rest of the project needs of one.
- `ByteTokenizer`: UTF-8 bytes and one end-of-document id.
- `HuggingFaceTokenizer`: `tokenizer.json` through the `tokenizers` package.
- `load_tokenizer`: by name; nothing is ever downloaded.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from megatron_hybrid.data.errors import DataError


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back."""

    vocab_size: int
    """One more than the largest id."""
    eos_token_id: int
    """Ends a document."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any token that the text does not hold (no begin- or end-of-document)."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids; control tokens such as the end of a document leave nothing."""
        ...

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token."""
        ...


class ByteTokenizer:
    """A token is a byte of UTF-8; id 256 ends a document."""

    vocab_size = 257
    eos_token_id = 256

    def encode(self, text: str) -> list[int]:
        """Ids of the text's UTF-8 bytes.

        Raises:
            UnicodeEncodeError: text holds a lone surrogate.
        """
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """Text of byte ids. Bytes that are not UTF-8 (a cut character) become U+FFFD.

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


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with the end-of-document token that the files beside it name."""

    def __init__(self, folder: str | Path):
        """Read the tokenizer of a local folder.

        Raises:
            DataError: no readable tokenizer.json, or no end-of-document token.
        """
        from tokenizers import Tokenizer as Backend

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise DataError(
                f"{folder} holds no tokenizer.json. Save the tokenizer there with transformers' "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`"
            )
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise DataError(f"{file} is not a tokenizer: {error}") from error
        # A saved truncation to a model's old context length would silently cut every document.
        self._backend.no_truncation()
        self._backend.no_padding()
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # ids may have holes, so not their number
        self.eos_token_id = self._find_eos(folder)

    def _find_eos(self, folder: Path) -> int:
        """The id that the folder names: the tokenizer's own files first, then the model's."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_json(folder / name).get("eos_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                found = self._backend.token_to_id(token)
                if found is None:
                    raise DataError(f"{folder / name}: eos_token {token!r} is not in tokenizer.json's vocabulary")
                return found
        for name in ("generation_config.json", "config.json"):
            found = _read_json(folder / name).get("eos_token_id")
            if isinstance(found, list) and found:
                found = found[0]
            if isinstance(found, int):
                if not 0 <= found < self.vocab_size:
                    raise DataError(
                        f"{folder / name}: eos_token_id {found} is outside the vocabulary of {self.vocab_size}"
                    )
                return found
        raise DataError(f'{folder} names no end-of-document token: add {{"eos_token": "..."}} to tokenizer_config.json')

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin- or end-of-document tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token."""
        return self._backend.get_vocab(with_added_tokens=True)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer of a spec: `byte`, or the folder of a Hugging Face tokenizer.

    Raises:
        DataError: neither; names are not looked up on the Hugging Face hub.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    if not Path(spec).is_dir():
        raise DataError(
            f"tokenizer {str(spec)!r} is neither `byte` nor a local folder. Names are never downloaded: "
            "fetch the tokenizer first and give its folder"
        )
    return HuggingFaceTokenizer(spec)


def vocabulary_sha256(tokenizer: Tokenizer, size: int | None = None) -> str:
    """Return a hash of the tokens with an id below `size`, or of all: equal where ids mean the same text."""
    ids = sorted((token, text) for text, token in tokenizer.vocabulary().items() if size is None or token < size)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds no JSON object")
    return value
