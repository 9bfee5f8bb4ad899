"""Reads files of columns, parquet and Arrow, in bounded memory whatever their columns claim.

A few kilobytes of such a file can hold gigabytes: a long text is stored once and repeated by number, or packed.
So texts stay numbers until rows are made, a batch is cut where its rows are large, and a file that unpacks to more than
RATIO_LIMIT times its size is refused with the name of the column.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from laddpo.preference.reading.bad_rows import file_error
from laddpo.preference.reading.compression import RATIO_FREE_BYTES, RATIO_LIMIT
from laddpo.preference.reading.strict_json import one_line

BATCH_ROWS = 1000
BATCH_BYTES = 64 * 2**20  # Python objects made at a time
SMALL_GROUP_ROWS = 100_000  # rows of a small row group decoded at a time; each time copies its list of texts
GROUP_BYTES = 256 * 2**20  # a row group may unpack to this whatever its size in the file
LONGEST_LIST = 2**24  # values of a row group beyond one for each row
OBJECT_BYTES = 100  # about what one Python value takes beside its text
VALUE_BYTES = 4  # and what it takes in a line of JSON
Rows = Iterator[tuple[str, dict]]


def read_parquet(
    path: Path, stream: BinaryIO, max_line_bytes: int, text_columns: Sequence[str], wanted: Container[str] | None
) -> Rows:
    """Rows of a parquet file, batch by batch; the place of a row is its number. Only wanted columns are decoded, rows
    have None in the rest."""
    with _pyarrow(path, "parquet") as pa:
        import pyarrow.parquet as pq

        parquet = pq.ParquetFile(path)
        schema = parquet.schema_arrow
        names = check_schema(pa, path, schema, text_columns, wanted)
        leaves = [leaf for leaf in range(len(parquet.schema)) if _column_of(parquet.schema.column(leaf).path, names)]
        texts = [parquet.schema.column(leaf) for leaf in leaves]
        texts = [column.path for column in texts if column.logical_type.type == "STRING"]
        # repeated texts stay numbers into a list of texts
        shared = pq.ParquetFile(path, read_dictionary=texts, metadata=parquet.metadata)

        def batches() -> Iterator[Any]:
            for group in range(parquet.num_row_groups):
                rows = check_row_group(path, parquet.metadata.row_group(group), leaves, names)
                yield from shared.iter_batches(batch_size=rows, row_groups=[group], columns=names)

        yield from table_rows(pa, path, schema, names, batches(), max_line_bytes)


def read_arrow(
    path: Path, stream: BinaryIO, max_line_bytes: int, text_columns: Sequence[str], wanted: Container[str] | None
) -> Rows:
    """As read_parquet, for the .arrow files that save_to_disk of `datasets` writes, and those with a footer."""
    with _pyarrow(path, "Arrow") as pa, pa.memory_map(str(path)) as source:
        has_footer = source.read(8) == b"ARROW1\0\0"  # then a stream follows, as in the files without
        source.seek(8 if has_footer else 0)
        for message in _messages(pa, source):
            if _is_packed(message):
                raise file_error(path, "DATA-54", "holds packed columns", "Write it as parquet, or not packed.")
        source.seek(0)
        reader = pa.ipc.open_file(source) if has_footer else pa.ipc.open_stream(source)
        names = check_schema(pa, path, reader.schema, text_columns, wanted)

        def batches() -> Iterator[Any]:
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if has_footer else reader:
                batch.validate(full=True)
                for start in range(0, len(batch), BATCH_ROWS):
                    yield batch.slice(start, BATCH_ROWS)

        yield from table_rows(pa, path, reader.schema, names, batches(), max_line_bytes)


def table_rows(
    pa: Any, path: Path, schema: Any, names: Sequence[str], batches: Iterator[Any], max_line_bytes: int
) -> Rows:
    """The rows of record batches as dictionaries; no more than BATCH_BYTES of them exist at a time, or one row."""
    number = text_bytes = 0
    limit = max(RATIO_FREE_BYTES, RATIO_LIMIT * path.stat().st_size)
    for whole in batches:
        rest = [whole]
        while rest:
            batch = rest.pop()
            sizes = {name: decoded_size(pa, batch.column(name)) for name in names}
            if len(batch) > 1 and sum(text + OBJECT_BYTES * values for text, values in sizes.values()) > BATCH_BYTES:
                half = len(batch) // 2
                rest += [batch.slice(half), batch.slice(0, half)]
                continue
            largest, (text, values) = max(sizes.items(), key=lambda item: sum(item[1]), default=("", (0, 0)))
            if len(batch) == 1 and text + VALUE_BYTES * values > max_line_bytes:
                problem = f"row {number + 1:,}: column {largest}: holds {text:,} bytes in {values:,} values"
                advice = f"data.max_line_bytes is {max_line_bytes:,}. Raise it if that is right."
                raise file_error(path, "DATA-37", problem, advice)
            text_bytes += sum(text for text, _ in sizes.values())
            if text_bytes > limit:
                problem = f"column {largest}: unpacks to more than {RATIO_LIMIT} times the file ({text_bytes:,} bytes)"
                raise file_error(path, "DATA-49", problem, "Write it as JSON lines if that is right.")
            yield from _numbered_rows(pa, path, schema, names, batch, number)
            number += len(batch)


def _numbered_rows(pa: Any, path: Path, schema: Any, names: Sequence[str], batch: Any, first: int) -> Rows:
    columns = dict.fromkeys(schema.names, [None] * len(batch))
    for name in names:
        try:
            columns[name] = _texts(pa, batch.column(name), schema.field(name).type).to_pylist()
        except (MemoryError, OSError):
            raise
        except Exception as error:  # the kinds depend on what is installed: pytz has its own for an unknown zone
            rows = f"rows {first + 1:,} to {first + len(batch):,}"
            problem = f"column {name}: is {schema.field(name).type} and cannot be read in {rows} ({one_line(error)})"
            raise file_error(path, "DATA-53", problem, "Save the column as text.") from error
    for number, row in enumerate(zip(*columns.values(), strict=True), start=first + 1):
        yield f"{path}:{number}", dict(zip(columns, row, strict=True))


def _texts(pa: Any, column: Any, kind: Any) -> Any:
    """The column with texts instead of dictionary indices: it is faster to read."""
    try:
        return column if column.type == kind else column.cast(kind)
    except pa.ArrowNotImplementedError:  # string_view
        return column


def decoded_size(pa: Any, array: Any) -> tuple[int, int]:
    """(bytes of text, number of values) that an array has as Python objects, each repeated text counted again."""
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        if not _is_text(pa, kind.value_type):
            return 0, len(array)
        return pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0, len(array)
    if _is_text(pa, kind):
        return pc.sum(pc.binary_length(array)).as_py() or 0, len(array)
    if not pa.types.is_nested(kind):
        return 0, len(array)
    if pa.types.is_map(kind):
        array = array.cast(pa.list_(pa.struct([("key", kind.key_type), ("value", kind.item_type)])))
    inner = array.flatten()
    parts = [decoded_size(pa, part) for part in (inner if isinstance(inner, list) else [inner])]
    return sum(text for text, _ in parts), len(array) + sum(values for _, values in parts)


def _is_text(pa: Any, kind: Any) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def check_row_group(path: Path, group: Any, leaves: Sequence[int], names: Sequence[str]) -> int:
    """Refuse a row group that unpacks to far more than it is; else the number of its rows to decode at a time."""
    chunks = [group.column(leaf) for leaf in leaves]
    if not chunks:
        return BATCH_ROWS
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    packed = sum(chunk.total_compressed_size for chunk in chunks)
    largest = max(chunks, key=lambda chunk: chunk.total_uncompressed_size)
    longest = max(chunks, key=lambda chunk: chunk.num_values)
    problem = ""
    if unpacked > max(GROUP_BYTES, RATIO_LIMIT * packed):
        name = _column_of(largest.path_in_schema, names)
        problem = f"column {name}: unpacks to {largest.total_uncompressed_size:,} bytes, more than {RATIO_LIMIT} times"
        problem += f" its {largest.total_compressed_size:,}"
    elif longest.num_values - group.num_rows > LONGEST_LIST:
        name = _column_of(longest.path_in_schema, names)
        problem = f"column {name}: has {longest.num_values:,} values in one row group of {group.num_rows:,} rows"
    if problem:
        raise file_error(path, "DATA-49", problem, "Write it as JSON lines if that is right.")
    if unpacked <= BATCH_BYTES:
        return SMALL_GROUP_ROWS
    return max(1, min(BATCH_ROWS, BATCH_BYTES * group.num_rows // unpacked))


def check_schema(
    pa: Any, path: Path, schema: Any, text_columns: Sequence[str], wanted: Container[str] | None
) -> list[str]:
    """The names of the wanted columns. Refuses a file whose columns cannot be told apart or whose text columns hold
    something else, before its rows say so one by one."""
    if len(set(schema.names)) != len(schema.names):
        raise file_error(path, "DATA-17", f"has a repeated column among {schema.names}", "Rename one of them.")
    columns = [column for column in schema if wanted is None or column.name in wanted]
    for column in columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        problem = f"column {column.name}: is {kind}, want string or list<struct<role, content>>"
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise file_error(path, "DATA-55", problem, "Save the column as text.")
        fits = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_nested(kind)
        fits = fits or pa.types.is_string_view(kind) or pa.types.is_null(kind)
        if column.name in text_columns and not fits:
            raise file_error(path, "DATA-53", problem, "Check data.columns.")
    return [column.name for column in columns]


@contextmanager
def _pyarrow(path: Path, kind: str) -> Iterator[Any]:
    """pyarrow; what is wrong with it or with the file becomes a UserError."""
    try:
        import pyarrow as pa
    except ImportError as error:  # comes with `datasets`, but may have been left out on purpose
        raise file_error(path, "DATA-51", "needs pyarrow to be read", "pip install pyarrow") from error
    try:
        yield pa
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of the file's content
            raise
        problem = f"is not a whole {kind} file ({one_line(error)})"
        raise file_error(path, "DATA-54", problem, "Copy it again.") from error


def _column_of(leaf: str, names: Sequence[str]) -> str | None:
    """The column that holds a leaf such as messages.list.element.content."""
    return next((name for name in names if leaf == name or leaf.startswith(f"{name}.")), None)


def _messages(pa: Any, source: Any) -> Iterator[Any]:
    """The messages of an Arrow stream, from the current position of the source."""
    reader = pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _is_packed(message: Any) -> bool:
    """Whether the buffers of a batch are compressed: field 3 of its flatbuffer, which pyarrow does not show."""
    data = message.metadata.to_pybytes()

    def follow(place: int) -> int:
        return place + struct.unpack_from("<I", data, place)[0]

    def field(table: int, number: int) -> int:
        """The place of a field, 0 when it is not there."""
        entries = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * number >= struct.unpack_from("<H", data, entries)[0]:
            return 0
        offset = struct.unpack_from("<H", data, entries + 4 + 2 * number)[0]
        return table + offset if offset else 0

    header = follow(field(follow(0), 2))
    if message.type == "dictionary":
        header = follow(field(header, 1))
    return message.type in ("record batch", "dictionary") and bool(field(header, 3))
