"""Hugging Face tokenizer of a local folder.

Files next to tokenizer.json change the ids too: added tokens, special tokens, prefix spaces, the tokenizer class.
transformers' AutoTokenizer applies them all; this module keeps the Rust tokenizer that it builds. Encoding therefore
costs what the `tokenizers` package costs, and worker processes receive the tokenizer without importing transformers.
"""

import json
from pathlib import Path
from typing import Any

from megatron_hybrid.base.lfs import refuse_lfs_pointer
from megatron_hybrid.data.errors import DataError

_OBJECTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
)
"""Files that hold a JSON object and decide ids or the end-of-document token."""
_SAVE = "Save the tokenizer there with transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(folder)`"


class HuggingFaceTokenizer:
    """Tokenizer that returns the ids of transformers' AutoTokenizer with `add_special_tokens=False`."""

    def __init__(self, folder: str | Path):
        """Read the tokenizer of a local folder.

        Raises:
            DataError: a missing or broken file, a tokenizer that is not a `tokenizers` pipeline, no end-of-document
                token, or files that disagree on it.
        """
        folder = Path(folder)
        files = _read_files(folder)
        _refuse_dropout(folder, files["tokenizer.json"])
        theirs = _load_with_transformers(folder, files["tokenizer_config.json"])
        self._set_backend(theirs.backend_tokenizer, bool(theirs.split_special_tokens))
        vocabulary = theirs.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have holes, so not their number
        self.eos_token_id = _find_eos(folder, files, theirs.eos_token, vocabulary)

    def _set_backend(self, backend: Any, split_special_tokens: bool) -> None:
        # A saved truncation to a model's old context length would silently cut every document.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        self._backend, self._split_special_tokens = backend, split_special_tokens

    def __getstate__(self) -> dict[str, Any]:
        try:
            backend = self._backend.to_str()
        except Exception as error:  # a pipeline step written in Python; the package raises bare Exception
            raise DataError(f"the tokenizer cannot be sent to workers: {error}; use --workers 1") from error
        return self.__dict__ | {"_backend": backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        self.__dict__.update(state)
        self._set_backend(Backend.from_str(state["_backend"]), state["_split_special_tokens"])

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin- or end-of-document tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def vocabulary(self) -> dict[str, int]:
        """Return the ID of every token."""
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return ids

    def token_bytes(self) -> dict[int, int]:
        """Return the bytes of UTF-8 text that each token stands for. Special tokens stand for none.

        Raises:
            DataError: the tokenizer is not a byte-level BPE, whose tokens are strings of bytes.
        """
        from tokenizers.pre_tokenizers import ByteLevel

        settings = json.loads(self._backend.to_str())
        model, decoder = settings["model"], settings["decoder"] or {}
        parts = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
        marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if parts != ["ByteLevel"] or model.get("type") != "BPE" or marked:
            raise DataError(
                f"the tokenizer ({model.get('type')}, decoder {' and '.join(parts) or 'none'}) is not a byte-level BPE, so its "
                "tokens have no fixed number of bytes"
            )
        alphabet = set(ByteLevel.alphabet())  # one character per byte
        plain = {token: len(text) for text, token in model["vocab"].items() if alphabet.issuperset(text)}
        added = settings["added_tokens"]
        return plain | {token["id"]: 0 if token["special"] else len(token["content"].encode()) for token in added}


def _read_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the folder's JSON objects by file name, an empty one for each missing file."""
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} holds no tokenizer.json{_what_is_there(folder)}. {_SAVE}")
    for file in folder.iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja") and file.is_file():
            refuse_lfs_pointer(file, DataError)
    return {name: _read_json(folder / name) for name in _OBJECTS}


def _what_is_there(folder: Path) -> str:
    """Return why a folder that looks like a tokenizer's has no tokenizer.json."""
    if (folder / "tokenizer.json").is_symlink():
        return " (it is a link to a missing file: download it again)"
    if (folder / "snapshots").is_dir():
        return f" (it is a repository of the Hugging Face cache: give one of {folder}/snapshots/*)"
    others = [
        name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json") if (folder / name).exists()
    ]
    return f" (it holds {others[0]}, which transformers converts)" if others else ""


def _read_json(file: Path) -> dict[str, Any]:
    """Return a file's JSON object, an empty one if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file} holds no JSON object")
    return value


def _refuse_dropout(folder: Path, tokenizer: dict[str, Any]) -> None:
    model = tokenizer.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise DataError(
            f"{folder / 'tokenizer.json'}: model.dropout is {model['dropout']}: the ids of a text would be random; "
            "set it to null"
        )


def _load_with_transformers(folder: Path, config: dict[str, Any]) -> Any:
    """Return transformers' tokenizer of a folder, whose backend alone decides the ids."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    try:
        theirs = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **_tokens_in_short_form(config)
        )
    except Exception as error:  # transformers raises whatever its readers of these files raise
        _refuse_broken_backend(folder / "tokenizer.json")
        cause = " ".join(f"{type(error).__name__}: {error}".split())  # in one line
        raise DataError(
            f"{folder}: transformers cannot load this tokenizer: {cause} "
            "(check tokenizer_config.json and added_tokens.json)"
        ) from error
    same = isinstance(theirs, PreTrainedTokenizerFast) and all(
        getattr(type(theirs), name) is getattr(base, name)
        for base, name in [
            (PreTrainedTokenizerBase, "__call__"),
            (PreTrainedTokenizerBase, "encode"),
            (PreTrainedTokenizerFast, "_encode_plus"),
        ]
    )
    if not same:
        raise DataError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class: transformers' {type(theirs).__name__} prepares text "
            "in Python, which this tool does not reproduce. Use a tokenizer that tokenizer.json describes entirely "
            '("tokenizer_class": "PreTrainedTokenizerFast")'
        )
    return theirs


def _tokens_in_short_form(config: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens that tokenizer_config.json gives as fields without "__type".

    special_tokens_map.json has that form, but transformers rejects it in tokenizer_config.json.
    """
    from tokenizers import AddedToken

    tokens = {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, dict) and "__type" not in v}
    fields: dict[str, Any] = {"special": True}
    return {key: AddedToken(**fields | token) for key, token in tokens.items() if "content" in token}


def _refuse_broken_backend(file: Path) -> None:
    from tokenizers import Tokenizer as Backend

    try:
        Backend.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"{file} is not a tokenizer: {error}") from error


def _find_eos(folder: Path, files: dict[str, dict[str, Any]], theirs: str | None, vocabulary: dict[str, int]) -> int:
    """Return the end-of-document id: the one that transformers reads, or else the model's."""
    named = [
        (name, content)
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        if (content := _content(files[name].get("eos_token"))) is not None
    ]
    for name, content in named:
        if content not in _known_tokens(files):
            raise DataError(f"{folder / name}: eos_token {content!r} is not in tokenizer.json's vocabulary")
        if content != named[0][1]:
            raise DataError(
                f"{folder}: {named[0][0]} has eos_token {named[0][1]!r}, {name} has {content!r}: make them agree"
            )
    model_ids = _model_eos(folder, files, max(vocabulary.values(), default=-1) + 1)
    if theirs is not None and theirs in vocabulary and (named or theirs in _known_tokens(files)):
        found = vocabulary[theirs]
        generation = model_ids.get("generation_config.json")
        if generation and found not in generation:
            raise DataError(
                f"{folder / 'generation_config.json'}: eos_token_id {generation} leaves out the tokenizer's eos_token "
                f"{theirs!r} ({found}), with which documents would end: make them agree"
            )
        return found
    for ids in model_ids.values():
        return ids[0]
    raise DataError(f'{folder} names no end-of-document token: add {{"eos_token": "..."}} to tokenizer_config.json')


def _content(token: Any) -> str | None:
    """Return the text of a token, which the files give as a string or as an AddedToken's fields."""
    return token.get("content") if isinstance(token, dict) else token


def _known_tokens(files: dict[str, dict[str, Any]]) -> set[str]:
    """Return tokens that the files give an id, as opposed to those that transformers appends to the vocabulary."""
    vocabulary = files["tokenizer.json"].get("model", {}).get("vocab", {})
    known = set(vocabulary) if isinstance(vocabulary, dict) else {piece[0] for piece in vocabulary}
    added = [*files["tokenizer.json"].get("added_tokens", [])]
    added += files["tokenizer_config.json"].get("added_tokens_decoder", {}).values()
    return known | {_content(token) or "" for token in added} | set(files["added_tokens.json"])


def _model_eos(folder: Path, files: dict[str, dict[str, Any]], vocab_size: int) -> dict[str, list[int]]:
    """Return the end-of-document ids that the model's files name, by file."""
    found = {}
    for name in ("generation_config.json", "config.json"):
        ids = files[name].get("eos_token_id")
        ids = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
        if wrong := [i for i in ids if not 0 <= i < vocab_size]:
            raise DataError(f"{folder / name}: eos_token_id {wrong[0]} is outside the vocabulary of {vocab_size}")
        if ids:
            found[name] = ids
    return found
