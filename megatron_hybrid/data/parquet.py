"""Documents of a Parquet file: one string column, read a few rows at a time with pyarrow (the extra `parquet`)."""

from collections.abc import Iterator
from typing import Any

from megatron_hybrid.data.errors import BadRecord, DataError

_ROWS = 256  # of a batch; documents are a few KiB


def iterate_rows(path: str, column: str) -> Iterator[tuple[list[bytes | None], float]]:
    """Yield UTF-8 values of a column, None for null, and the fraction of the rows read so far.

    Raises:
        DataError: pyarrow is not installed, or the file has no such column of strings.
        BadRecord: the file is corrupt or truncated.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow: pip install 'megatron-hybrid[parquet]', "
            "or write its documents as JSON lines"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
            rows = 0
            for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
                rows += batch.num_rows
                yield _as_bytes(batch.column(0)), rows / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRecord(f"{path}: corrupt or truncated Parquet: {error}", "corrupt_file") from error


def _check_column(path: str, schema: Any, column: str) -> None:
    import pyarrow.types as types

    if column not in schema.names:
        raise DataError(f"{path}: no column {column!r} (it has: {', '.join(schema.names)}); name it with --json-key")
    found = schema.field(column).type
    value = found.value_type if types.is_dictionary(found) else found
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(check(value) for check in checks) and not types.is_null(value):
        raise DataError(f"{path}: column {column!r} holds {found}, not strings; name another with --json-key")


def _as_bytes(values: Any) -> list[bytes | None]:
    """Return the values undecoded, so that text that is not UTF-8 is reported like that of other formats."""
    import pyarrow

    if isinstance(values, pyarrow.DictionaryArray):
        values = values.dictionary_decode()
    found: list[bytes | None] = values.cast(pyarrow.large_binary()).to_pylist()
    return found
