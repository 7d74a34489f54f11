"""Reading: how files of each type are cut into pieces, and the documents in a piece."""

import ast
import contextlib
import csv
import io
import itertools
import json
import lzma
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.files import DISK_FULL, refuse_stand_in
from basemodel.prepare import documents
from basemodel.prepare.documents import LongText, Piece, Text, compression, open_decompressed, open_utf8

# Most of what pyarrow raises is a ValueError, as are decoding errors.
UNREADABLE = (OSError, EOFError, ValueError, NotImplementedError, RecursionError, lzma.LZMAError, csv.Error)


def cut_into_pieces(path: Path, split: str | None, text_column: str) -> Iterator[Piece]:
    """Cut a file into pieces of about SHARD_BYTES where its format allows. Raises InputError."""
    kind, size = documents.file_type(path), path.stat().st_size
    with readable(path):
        if size == 0 and kind != "text":  # an empty .txt is a document, though an empty one
            return
        refuse_stand_in(path)
        if kind in ("jsonl", "json", "csv", "text"):
            documents.check_is_text(path)
        if kind == "json" and _has_an_object_per_line(path):
            kind = "jsonl"
        if kind == "csv":
            _header(path, text_column)  # a misspelt column is an error before anything slow
        if kind == "parquet" and not compression(path):
            yield from _row_groups(Piece(path, kind, size, split=split), text_column)
        elif kind == "jsonl" and not compression(path) and not documents.marked_encoding(path):
            count = max(1, size // documents.SHARD_BYTES)
            cuts = [size * i // count for i in range(count + 1)]
            for start, stop in itertools.pairwise(cuts):
                yield Piece(path, kind, stop - start, start, stop, split)
        else:
            yield Piece(path, kind, 3 * size if compression(path) else size, split=split)  # 3: a guess


def read_documents(piece: Piece, text_column: str) -> Iterator[Text | LongText | None]:
    """The documents in a piece, None for a null: rows of tables, JSON objects, a whole text file. Raises
    InputError."""
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
    except UNREADABLE as error:
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        problem = " ".join(str(error).split())
        hint = "; decompress it first: zstd -d --long=31" if "requires too much memory" in problem else ""
        raise InputError(f"{path}: cannot be read: {problem}{hint}") from None


def _open_text(path: Path) -> io.TextIOWrapper:
    """Open a file to read its text; invalid UTF-8 becomes U+FFFD."""
    return io.TextIOWrapper(open_utf8(path), "utf-8", errors="replace", newline="")


def _whole_text(piece: Piece, _: str) -> Iterator[Text | LongText]:
    """A text file as one document."""
    with open_utf8(piece.path) as file:
        start = file.read(LongText.BLOCK)
        is_short = not file.read(1)
    yield Text.from_bytes(start) if is_short else LongText(piece.path)


def _open_table(path: Path) -> Any:
    """Open a file for readers that seek in it: a pyarrow file, mapped or, if compressed, read into memory."""
    import pyarrow

    if compression(path) is None:
        return pyarrow.memory_map(str(path))
    with open_decompressed(path) as file:
        return pyarrow.BufferReader(file.read())


def _column_texts(column: Any) -> Iterator[Text | None]:
    """The texts in a pyarrow array."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):  # such as pandas' categories
        column = column.dictionary_decode()
    for value in column.cast(pyarrow.large_binary()).to_pylist():
        yield None if value is None else Text.from_bytes(value)


def _check_column(path: Path, schema: Any, text_column: str) -> None:
    """Raise InputError unless a pyarrow schema has a column of text with this name."""
    import pyarrow

    _place_of(text_column, schema.names, f"{path}:")
    try:
        list(_column_texts(pyarrow.nulls(1, schema.field(text_column).type)))
    except pyarrow.ArrowNotImplementedError as error:
        raise InputError(f"{path}: column '{text_column}' is not text: {error}") from None


def _place_of(text_column: str, names: list[str], where: str) -> int:
    """The position of the text among columns of these names, or keys. Raises InputError unless it is one."""
    if (count := names.count(text_column)) > 1:
        raise InputError(f"{where} has {count} columns named '{text_column}'; rename all but one of them")
    if count == 0:
        shown = [name if len(name) <= 40 else name[:40] + "..." for name in names[:20]]
        raise InputError(f"{where} has no '{text_column}'; set --text-column to one of {shown}")
    return names.index(text_column)


@contextlib.contextmanager
def _parquet_file(path: Path, text_column: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile with a text column of this name. Raises InputError."""
    import pyarrow.parquet

    buffering = {"pre_buffer": False, "buffer_size": 1 << 20}  # instead of whole columns of a row group
    with _open_table(path) as source, pyarrow.parquet.ParquetFile(source, **buffering) as file:
        _check_column(path, file.schema_arrow, text_column)
        yield file


def _row_groups(piece: Piece, text_column: str) -> Iterator[Piece]:
    """A parquet file cut into groups of row groups."""
    with _parquet_file(piece.path, text_column) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    start = size = 0
    for i, group in enumerate(groups):
        size += group.total_byte_size
        if size >= documents.SHARD_BYTES or i == len(groups) - 1:
            yield replace(piece, size=size, start=start, stop=i + 1)
            start, size = i + 1, 0


def _parquet_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    with _parquet_file(piece.path, text_column) as file:
        groups = range(piece.start, min(piece.stop, file.metadata.num_row_groups))
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        # About a megabyte at a time, to bound memory where documents are long.
        batch_size = min(1024, max(1, rows * 1_000_000 // max(1, piece.size)))
        for batch in file.iter_batches(batch_size, groups, [text_column], use_threads=False):
            yield from _column_texts(batch.column(0))


def _arrow_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    """The texts of an Arrow file, in the streaming format, as `datasets` saves, or the file format."""
    import pyarrow

    with _open_table(piece.path) as file:
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
    path, (delimiter, columns) = piece.path, _header(piece.path, text_column)
    place, quoting = columns.index(text_column), csv.QUOTE_MINIMAL
    if documents.suffix(path) == ".tsv" and not _has_quoted_cells(path, len(columns)):
        quoting = csv.QUOTE_NONE
    for row in _rows(path, len(columns), delimiter=delimiter, quoting=quoting):
        yield Text(row[place].encode(), replaced=row[place].count("\ufffd"))


def _rows(path: Path, columns: int, *, delimiter: str, quoting: int) -> Iterator[list[str]]:
    """The rows of a .csv or .tsv below its header. Raises InputError for one with another number of cells."""
    csv.field_size_limit(2**31 - 1)
    with _open_text(path) as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for row in itertools.islice(rows, 1, None):
                if row and len(row) != columns:
                    raise csv.Error(f"cells: {len(row)}; columns in the header: {columns}")
                if row:
                    yield row
        except csv.Error as error:
            hint = "; quotes in a quoted cell must be doubled" if "expected after" in str(error) else ""
            raise InputError(f"{path}: the row that ends in line {rows.line_num}: {error}{hint}") from None


def _header(path: Path, text_column: str) -> tuple[str, list[str]]:
    """The delimiter of a .csv or .tsv (a comma, a tab, or the semicolon of many countries' spreadsheets) and
    its column names. Raises InputError unless one of them is the text's."""
    with _open_text(path) as file:
        line = file.readline(100_000)
    delimiters = "\t,;" if documents.suffix(path) == ".tsv" else ",;\t"
    names = {delimiter: next(csv.reader([line], delimiter=delimiter), []) for delimiter in delimiters}
    delimiter = max(names, key=lambda each: (text_column in names[each], len(names[each])))
    _place_of(text_column, names[delimiter], f"{path}: the first row")
    return delimiter, names[delimiter]


def _has_quoted_cells(path: Path, columns: int) -> bool:
    """Whether a .tsv has quotes around cells that contain a quote, tab or line break, as pandas writes them.
    Otherwise quotes are part of the text, as the format says. Raises InputError if it could be either."""
    kinds = set()
    with _open_text(path) as file:
        for number, line in enumerate(file):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != columns and cells != [""]:
                return True  # a tab or line break within quotes, or else an error
            for cell in cells if '"' in line else ():
                if match := re.match('"((?:[^"]|"")*)("?)', cell):
                    needed = number == 0 or '""' in match[1]
                    kind = ("needed" if needed else "needless") if match[2] else "open"
                    kinds.add("text" if match.end() < len(cell) else kind)
    if "text" in kinds or ("open" in kinds and not _is_readable_with_quotes(path, columns)):
        return False
    if kinds and "needed" not in kinds:
        problem = "quotes at the start of some cells may belong to the text or not"
        raise InputError(f"{path}: {problem}; convert it to .csv or .jsonl")
    return "needed" in kinds


def _is_readable_with_quotes(path: Path, columns: int) -> bool:
    with contextlib.suppress(InputError):
        for _ in _rows(path, columns, delimiter="\t", quoting=csv.QUOTE_MINIMAL):
            pass
        return True
    return False


def _has_an_object_per_line(path: Path) -> bool:
    with open_utf8(path) as file:
        return isinstance(_parsed(file.readline(1 << 20)), dict)


def _text_of(value: Any, text_column: str, where: str) -> Text | None:
    """The text of a JSON object, None if it is null. For anything else, raises InputError with a message that
    begins with `where`."""
    if isinstance(value, dict):
        _place_of(text_column, [*value], where)
        if (text := value[text_column]) is None or isinstance(text, str):
            return None if text is None else Text.from_str(text)
    raise InputError(f'{where} is not a JSON object with a string "{text_column}"')


def _jsonl_texts(piece: Piece, text_column: str) -> Iterator[Text | None]:
    for number, line in enumerate(_lines(piece), start=1):
        if line.strip():
            valid = Text.from_bytes(line)
            try:
                text = _text_of(_parsed(valid.content), text_column, "")
            except InputError as error:
                number += sum(1 for _ in _lines(replace(piece, start=0, stop=piece.start)))
                raise InputError(f"{piece.path}: line {number}{error}") from None
            if text is not None:
                text.replaced += valid.replaced
            yield text


def _parsed(line: bytes) -> Any:
    """The value of a line of JSON; None if it is not valid JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)


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
    """The texts of a JSON array of objects, or of one object, read into memory."""
    with open_utf8(piece.path) as file:
        valid = Text.from_bytes(file.read())
    values = json.loads(valid.content)
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        text = _text_of(value, text_column, f"{piece.path}: object {number}")
        if text is not None:
            text.replaced, valid.replaced = text.replaced + valid.replaced, 0
        yield text


# By type; the suffixes of each type are in TYPES (documents.py).
READERS = {
    "parquet": _parquet_texts,
    "arrow": _arrow_texts,
    "csv": _csv_texts,
    "jsonl": _jsonl_texts,
    "json": _json_texts,
    "text": _whole_text,
}


def python_docs() -> list[str]:
    """The text that ships with Python: the language reference and the standard library's docstrings,
    deduplicated, in an order that is fixed for each version of Python."""
    from pydoc_data.topics import topics

    documents = {text.strip() for text in topics.values()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"test", "tests", "site-packages", "dist-packages"} & set(path.relative_to(library).parts):
            documents |= set(_docstrings(path))
    ordered = sorted(documents - {""})
    random.Random(0).shuffle(ordered)
    return ordered


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # deliberately broken, like some of lib2to3's modules
        return
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # which grow, by statements alone: expressions are many and document nothing
        nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, (ast.stmt, ast.ExceptHandler))]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (ast.get_docstring(node) or "").strip()
