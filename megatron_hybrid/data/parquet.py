"""Documents of a Parquet file: one string column, read a few rows at a time with pyarrow (the extra `parquet`)."""

from collections.abc import Iterator
from typing import Any

from megatron_hybrid.data.errors import BadRecord, DataError
from megatron_hybrid.data.parquet_pages import largest_page, refuse_large_footer
from megatron_hybrid.data.records import ReadOptions

_ROWS = 256  # of a batch; documents are a few KiB
_BATCH_BYTES = 64 << 20
"""Most bytes of a batch. A dictionary or shared prefixes can make every value as large as the page that holds them."""
_DOCUMENTS_PER_PAGE = 2
"""Decompressed size of a page, in documents of the largest size. Writers aim at 1 MiB, and count after 1,024 values."""


def iterate_rows(path: str, options: ReadOptions) -> Iterator[tuple[list[bytes | None], float]]:
    """Yield UTF-8 values of the column `options.json_key`, None for null, and the fraction of the rows read so far.

    Raises:
        DataError: pyarrow is not installed, or the file has no such column of strings.
        BadRecord: the file is corrupt, truncated or a decompression bomb.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow: pip install 'megatron-hybrid[parquet]', "
            "or write its documents as JSON lines"
        ) from error
    column = options.json_key
    try:
        refuse_large_footer(path)
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            _check_column(path, file.schema_arrow, column)
            rows, total = 0, max(1, file.metadata.num_rows)
            for group in range(file.metadata.num_row_groups):
                size = _rows_at_once(path, file.metadata, group, column, options)
                for batch in file.iter_batches(size, row_groups=[group], columns=[column], use_threads=False):
                    rows += batch.num_rows
                    yield _as_bytes(batch.column(0)), min(1.0, rows / total)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadRecord(f"{path}: corrupt or truncated Parquet: {error}", "corrupt_file") from error


def _rows_at_once(path: str, metadata: Any, group: int, column: str, options: ReadOptions) -> int:
    """Return the rows of a row group that can be read at once.

    Raises:
        BadRecord: a page of the column is too large when it is decompressed.
    """
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    chosen = [i for i, name in enumerate(names) if name == column or name.startswith(f"{column}.")]
    largest = max(largest_page(path, metadata.row_group(group).column(i)) for i in chosen)
    most = _DOCUMENTS_PER_PAGE * options.max_document_bytes
    if largest > most:
        raise BadRecord(
            f"{path}: a page of {largest:,} bytes when it is decompressed, more than {most >> 20} MiB. If it is no damage or "
            "compression bomb: write it with smaller pages, or raise --max-document-mib",
            "too_large",
        )
    return max(1, min(_ROWS, _BATCH_BYTES // max(1, largest)))


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
