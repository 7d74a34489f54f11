"""Reading: how files of each type are cut into pieces, and the documents in a piece."""

import contextlib
import csv
import glob
import io
import itertools
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.files import DISK_FULL
from basemodel.prepare import documents
from basemodel.prepare.documents import LongText, Piece, Text
from basemodel.prepare.formats import (
    check_is_text,
    compression,
    file_type,
    marked_encoding,
    open_decompressed,
    open_utf8,
)
from basemodel.prepare.python_docs import python_docs


def cut_into_pieces(path: Path, split: str | None, text_column: str) -> Iterator[Piece]:
    """Cut a file into pieces of about SHARD_BYTES where its format allows. Raises InputError."""
    kind, size = file_type(path), path.stat().st_size
    with readable(path):
        if size == 0 and kind != "text":  # which is a document, though empty
            return
        if kind in ("jsonl", "json", "csv", "text"):
            check_is_text(path)
        if kind == "json" and _has_an_object_per_line(path):
            kind = "jsonl"
        if kind == "csv":
            _header(path, text_column)  # a misspelt column is an error before anything slow
        if kind == "parquet" and not compression(path):
            yield from _row_groups(Piece(path, kind, size, split=split), text_column)
        elif kind == "jsonl" and not compression(path) and not _marked_encoding(path):
            count = max(1, size // documents.SHARD_BYTES)
            cuts = [size * i // count for i in range(count + 1)]
            for start, stop in itertools.pairwise(cuts):
                yield Piece(path, kind, stop - start, start, stop, split)
        else:
            yield Piece(path, kind, 3 * size if compression(path) else size, split=split)  # 3: a guess


def read_documents(piece: Piece, text_column: str) -> "Iterator[Text | LongText | None]":
    """The documents in a piece: rows of tables, JSON objects, a whole text file. Raises InputError."""
    if piece.path is None:
        yield from map(Text.from_str, python_docs())
        return
    with readable(piece.path):
        yield from READERS[piece.type](piece, text_column)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what libraries raise for an unreadable file into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    # What pyarrow and pandas raise are ValueErrors, as are decoding errors.
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        if getattr(error, "errno", None) in DISK_FULL:  # while decompressing
            raise
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[Path]:
    """The file itself or, where a reader has to seek in it and cannot, a decompressed copy for a while."""
    if compression(path) is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="decompressed.") as folder:
        plain = Path(folder, path.stem)
        with open_decompressed(path) as file, plain.open("wb") as out:
            shutil.copyfileobj(file, out)
        yield plain


def _whole_text(piece: Piece, _: str) -> Iterator[Text | LongText]:
    """A text file as one document."""
    with open_utf8(piece.path) as file:
        start = file.read(LongText.BLOCK)
        short = not file.read(1)
    yield Text.from_bytes(start) if short else LongText(piece.path)


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------


def _column_texts(column: Any) -> Iterator[Text | None]:
    """The texts in a pyarrow array. Raises InputError if it is no text."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):  # such as pandas' categories
        column = column.dictionary_decode()
    for value in column.cast(pyarrow.large_binary()).to_pylist():
        yield None if value is None else Text.from_bytes(value)


def _check_column(path: Path, schema: Any, text_column: str) -> None:
    """Raise InputError unless a pyarrow schema has a column of text with this name."""
    from pyarrow import types

    if text_column not in schema.names:
        raise InputError(f"{path}: has no column '{text_column}'; --text-column is one of {schema.names}")
    kind = schema.field(text_column).type
    stored = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(holds(stored) for holds in (*texts, types.is_binary, types.is_large_binary, types.is_null)):
        raise InputError(f"{path}: column '{text_column}' is {kind}, not text")


@contextlib.contextmanager
def _parquet_file(path: Path, text_column: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile with a text column of this name. Raises InputError."""
    import pyarrow.parquet

    try:
        # A small buffer instead of whole columns of a row group.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            _check_column(path, file.schema_arrow, text_column)
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: damaged or not a parquet file: {reason}") from None


def _row_groups(piece: Piece, text_column: str) -> Iterator[Piece]:
    """A parquet file cut into groups of row groups."""
    with _parquet_file(piece.path, text_column) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    start = size = 0
    for i, group in enumerate(groups):
        columns = (group.column(j) for j in range(group.num_columns))
        size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_column)
        if size >= documents.SHARD_BYTES or i == len(groups) - 1:
            yield replace(piece, size=size, start=start, stop=i + 1)
            start, size = i + 1, 0


def _parquet_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    with _decompressed(piece.path) as path, _parquet_file(path, text_column) as file:
        groups = range(piece.start, min(piece.stop, file.metadata.num_row_groups))
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        # About a megabyte at a time, to bound memory where documents are long.
        batch_size = min(1024, max(1, rows * 1_000_000 // max(1, piece.size)))
        for batch in file.iter_batches(batch_size, groups, [text_column], use_threads=False):
            yield from _column_texts(batch.column(0))


def _arrow_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    """The texts of an Arrow file, in the streaming format, as `datasets` saves, or the file format."""
    import pyarrow

    with _decompressed(piece.path) as path, pyarrow.memory_map(str(path)) as file:
        try:
            batches = reader = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        _check_column(piece.path, reader.schema, text_column)
        for batch in batches:
            for start in range(0, batch.num_rows, 1000):
                yield from _column_texts(batch.column(text_column).slice(start, 1000))


def _csv_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    os.environ["USE_TORCH"] = "0"  # `datasets` would import it, 150 MB in each worker
    import datasets

    path = piece.path
    with tempfile.TemporaryDirectory(prefix="csv.") as folder:
        if compression(path) or _marked_encoding(path):
            path = Path(folder, "plain.csv")
            with open_utf8(piece.path) as file, path.open("wb") as out:
                shutil.copyfileobj(file, out)
        delimiter, columns = _header(path, text_column)
        rows = datasets.load_dataset(
            "csv",
            data_files=glob.escape(str(path.resolve())),
            split="train",
            streaming=True,
            cache_dir=folder,
            sep=delimiter,
            # All columns as they stand: with some of them left out, pandas drops what a row has too many.
            features=datasets.Features({name: datasets.Value("string") for name in columns}),
            keep_default_na=False,  # the word "null" is text
            chunksize=500,  # rows in memory
            encoding_errors="replace",
        )
        for table in rows.with_format("arrow").iter(1000):
            for text in _column_texts(table[text_column]):
                yield replace(text, replaced=text.content.count("\ufffd".encode())) if text else None


def _header(path: Path, text_column: str) -> tuple[str, list[str]]:
    """A .csv's delimiter (comma, tab, or the semicolon of many countries' spreadsheets) and its column names.

    Raises InputError if none of them is the text column.
    """
    with io.TextIOWrapper(open_utf8(path), "utf-8", errors="replace", newline="") as file:
        line = file.readline(100_000)
    names = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in ",;\t"}
    for delimiter, columns in names.items():
        if text_column in columns:
            return delimiter, columns
    raise InputError(f"{path}: has no column '{text_column}'; --text-column is one of {names[',']}")


# ------------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------------


def _marked_encoding(path: Path) -> str | None:
    with open_decompressed(path) as file:
        return marked_encoding(file.peek(4)[:4])


def _has_an_object_per_line(path: Path) -> bool:
    with open_utf8(path) as file:
        line = file.readline(1 << 20)
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _text_of(value: Any, text_column: str) -> Text | None:
    """The text in a JSON object, None for a null. Raises ValueError if there is none."""
    text = value.get(text_column, 0) if isinstance(value, dict) else 0
    if not isinstance(text, str | None):
        raise ValueError("no text")
    return None if text is None else Text.from_str(text)


def _not_an_object(path: Path, place: str, text_column: str) -> InputError:
    return InputError(f'{path}: {place} is not a JSON object with a string "{text_column}"')


def _jsonl_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    for number, line in enumerate(_lines(piece), start=1):
        if line.strip():
            valid = Text.from_bytes(line)
            try:
                text = _text_of(json.loads(valid.content), text_column)
            except (ValueError, RecursionError):
                number += sum(1 for _ in _lines(replace(piece, start=0, stop=piece.start)))
                raise _not_an_object(piece.path, f"line {number}", text_column) from None
            if text is not None:
                text.replaced += valid.replaced
            yield text


def _lines(piece: Piece) -> Iterator[bytes]:
    """The lines of a .jsonl that start within the piece."""
    with open_utf8(piece.path) as file:
        place = piece.start
        if place:
            file.seek(place - 1)
            place += len(file.readline()) - 1  # skip the rest of a line that starts earlier
        while place < piece.stop and (line := file.readline()):
            place += len(line)
            yield line


def _json_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    """The texts of a JSON array of objects, or of objects one after another."""
    with io.TextIOWrapper(open_utf8(piece.path), "utf-8", errors="replace") as file:
        values = _json_values(file)
        for number in itertools.count(1):
            try:
                text = _text_of(next(values), text_column)
            except StopIteration:
                return
            except (ValueError, RecursionError):
                raise _not_an_object(piece.path, f"object {number}", text_column) from None
            yield text


def _json_values(file: io.TextIOBase) -> Iterator[Any]:
    """The values in a JSON array, or one after another, a megabyte at a time. Raises ValueError."""
    decoder, between, block = json.JSONDecoder(), re.compile(r"[\s,]*"), 1 << 20
    buffer = file.read(block)
    place = re.match(r"\s*\[?", buffer).end()
    while True:
        place = between.match(buffer, place).end()
        try:
            value, place = decoder.raw_decode(buffer, place)
        except ValueError:
            more = file.read(max(block, len(buffer)))  # twice as much each time, for a long value
            buffer, place = buffer[place:] + more, 0
            if not more and buffer.strip() in ("", "]"):
                return
            if not more:
                raise
        else:
            yield value


READERS = {
    "parquet": _parquet_texts,
    "arrow": _arrow_texts,
    "csv": _csv_texts,
    "jsonl": _jsonl_texts,
    "json": _json_texts,
    "text": _whole_text,
}
