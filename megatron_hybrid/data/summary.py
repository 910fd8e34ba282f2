"""Summary of a tokenized dataset: `PREFIX.json`, which megatron-hybrid preprocess writes with `PREFIX.bin`."""

import json
from dataclasses import dataclass, fields

from megatron_hybrid.data.errors import DataError


@dataclass(frozen=True)
class StatedData:
    """Fields of a summary that are compared with other files."""

    path: str
    """Path of the summary."""
    documents: int
    tokens: int
    max_token: int
    dtype: str
    tokenizer: str
    vocab_size: int
    eos_token_id: int
    append_eos: bool
    vocabulary_sha256: str | None = None
    """Hash of the tokenizer's ids and their text. None: an earlier version wrote the summary."""


_OPTIONAL = {"vocabulary_sha256"}
_BEGINNING = b'{\n  "documents"'
_MOST_BYTES = 64 << 20  # a summary lists every input file
_REMEDY = "Write the dataset again, or remove the summary to use the dataset without it"


def read_summary(prefix: str) -> StatedData | None:
    """Read `PREFIX.json`. Returns None if it does not exist or is not a summary of a dataset.

    Raises:
        DataError: it cannot be read, or is a summary with a field that is missing or of another type.
    """
    path = f"{prefix}.json"
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        found = json.loads(text) if len(text) <= _MOST_BYTES else None
    except (ValueError, RecursionError) as error:
        if text.startswith(_BEGINNING):
            raise DataError(f"{path}: the summary is damaged: {error}. {_REMEDY}") from error
        return None  # another file that happens to have this name, such as JSON lines
    if not isinstance(found, dict) or not {"tokens", "dtype", "tokenizer"} <= found.keys():
        return None
    values: dict[str, object] = {"path": path}
    for field in fields(StatedData)[1:]:
        value = found.get(field.name)
        if value is None and field.name in _OPTIONAL:
            continue
        wanted = str if field.name in _OPTIONAL else field.type
        if type(value) is not wanted:
            raise DataError(f"{path}: {field.name} is {value!r}: the summary is damaged. {_REMEDY}")
        values[field.name] = value
    return StatedData(**values)  # type: ignore[arg-type]
