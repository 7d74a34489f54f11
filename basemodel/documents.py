"""The sources of text: files, the shards they are cut into, and the documents in a shard."""

import ast
import codecs
import contextlib
import io
import itertools
import json
import platform
import random
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from basemodel.errors import InputError

FILE_TYPES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
PYTHON_DOCS = "python-docs"
SHARD_BYTES = 64_000_000  # of text, roughly
SAMPLE_BYTES = 100_000_000  # of text, to train a tokenizer on


@dataclass(frozen=True)
class Piece:
    """A file or part of one. `start` and `stop` count row groups in .parquet and bytes in .jsonl."""

    path: Path | None  # None: the Python documentation
    size: int  # bytes of text, roughly
    start: int = 0
    stop: int = sys.maxsize

    def identity(self) -> list[Any]:
        """Values that differ for any other piece, and for this one once its file has changed."""
        if self.path is None:
            return [PYTHON_DOCS, platform.python_version()]
        status = self.path.stat()
        return [str(self.path.resolve()), status.st_size, status.st_mtime_ns, self.start, self.stop]


def find_files(source: Path) -> list[Path]:
    """The text files in a folder (recursively, sorted by path), or the file itself. Raises InputError."""
    known = ", ".join(FILE_TYPES)
    if source.is_file():
        if not source.name.endswith(FILE_TYPES):
            raise InputError(f"{source}: unknown file type; known are {known}")
        return [source]
    if not source.is_dir():
        raise InputError(
            f"{source}: no such file or folder; the source may also be '{PYTHON_DOCS}', or OWNER/NAME on the "
            "Hub with --files 'PATTERN'"
        )
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name.endswith(FILE_TYPES))
    if not files:
        raise InputError(f"{source}: contains no {known} files")
    return files


def cut_into_pieces(path: Path, text_column: str) -> Iterator[Piece]:
    """Cut a file into pieces of about SHARD_BYTES where its format allows. Raises InputError."""
    size = path.stat().st_size
    if path.suffix == ".parquet":
        with _parquet_file(path, text_column) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        start = size = 0
        for i, group in enumerate(groups):
            columns = (group.column(j) for j in range(group.num_columns))
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_column)
            if size >= SHARD_BYTES or i == len(groups) - 1:
                yield Piece(path, size, start, i + 1)
                start, size = i + 1, 0
    elif path.suffix == ".jsonl":
        count = max(1, size // SHARD_BYTES)
        cuts = [size * i // count for i in range(count + 1)]
        yield from (Piece(path, stop - start, start, stop) for start, stop in itertools.pairwise(cuts))
    else:
        yield Piece(path, size if path.suffix == ".txt" else 3 * size)  # a guess for compressed text


def make_shards(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Group pieces in order, small ones together. Depends on the source alone, not on the workers."""
    shards: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if room <= 0:
            shards.append([])
            room = SHARD_BYTES // 2
        shards[-1].append(piece)
        room -= max(piece.size, SHARD_BYTES // 20_000)  # even a tiny file takes time to open
    return shards


# Documents iterate over fragments of UTF-8 text which, tokenized one by one, give the tokens of the whole.


@dataclass
class Text:
    """A document in memory: one fragment of valid UTF-8."""

    content: bytes
    replaced: int = 0  # invalid sequences that became U+FFFD

    def __iter__(self) -> Iterator[bytes]:
        yield self.content

    @classmethod
    def from_bytes(cls, data: bytes) -> "Text":
        """A document from bytes that should be UTF-8."""
        try:
            data.decode()
            return cls(data)
        except UnicodeDecodeError:
            text = data.decode(errors="replace")
            return cls(text.encode(), text.count("\ufffd") - data.count("\ufffd".encode()))

    @classmethod
    def from_str(cls, text: str) -> "Text":
        r"""A document from a string that may hold lone surrogates, which \u escapes in JSON can produce."""
        try:
            return cls(text.encode())
        except UnicodeEncodeError:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
            return cls(whole.encode(), whole.count("\ufffd") - text.count("\ufffd"))


def read_documents(piece: Piece, text_column: str) -> "Iterator[Text | TextFile]":
    """The documents in a piece: rows of .parquet, lines of .jsonl, a whole .txt. Raises InputError."""
    path = piece.path
    try:
        if path is None:
            yield from map(Text.from_str, python_docs())
        elif path.suffix == ".parquet":
            yield from _parquet_texts(piece, text_column)
        elif path.suffix == ".txt":
            yield TextFile(path)
        else:
            yield from _jsonl_texts(piece, text_column)
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def _parquet_file(path: Path, text_column: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile with a text column of this name. Raises InputError."""
    import pyarrow  # a dependency of `datasets`
    import pyarrow.parquet

    try:
        # A small buffer instead of whole columns of a row group.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise InputError(f"{path}: has no column '{text_column}'; --text-column is one of {names}")
            kind = file.schema_arrow.field(text_column).type
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise InputError(f"{path}: column '{text_column}' is {kind}, not text")
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: damaged or not a parquet file: {reason}") from None


def _parquet_texts(piece: Piece, text_column: str) -> Iterator[Text]:
    import pyarrow

    with _parquet_file(piece.path, text_column) as file:
        groups = range(piece.start, piece.stop)
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        # About a megabyte at a time, to bound memory where documents are long.
        batch_size = min(1024, max(1, rows * 1_000_000 // max(1, piece.size)))
        for batch in file.iter_batches(batch_size, groups, [text_column], use_threads=False):
            texts = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            yield from (Text.from_bytes(text) for text in texts if text is not None)


def _jsonl_texts(piece: Piece, text_column: str) -> Iterator[Text]:
    for number, line in enumerate(_lines(piece), start=1):
        if line.strip():
            try:
                text = json.loads(line)[text_column]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                number += sum(1 for _ in _lines(replace(piece, start=0, stop=piece.start)))
                raise InputError(
                    f'{piece.path}: line {number} is not a JSON object with a string "{text_column}"'
                )
            yield Text.from_str(text)


def _lines(piece: Piece) -> Iterator[bytes]:
    """The lines of a .jsonl that start within the piece."""
    if piece.path.suffix == ".jsonl":
        stream = piece.path.open("rb")
    else:
        import pyarrow  # decompresses by the file's extension

        stream = io.BufferedReader(pyarrow.input_stream(str(piece.path)))
    with stream as file:
        place = piece.start
        if place:
            file.seek(place - 1)
            place += len(file.readline()) - 1  # skip the rest of a line that starts earlier
        while place < piece.stop and (line := file.readline()):
            place += len(line)
            yield line


@dataclass
class TextFile:
    """A .txt file as one document, read a megabyte at a time. Invalid UTF-8 becomes U+FFFD and is counted."""

    path: Path
    replaced: int = 0  # invalid sequences in the last pass over the file

    def __iter__(self) -> Iterator[bytes]:
        self.replaced = 0
        codecs.register_error("replace and count", self._replace)
        size, text = 1 << 20, ""
        with self.path.open(encoding="utf-8", errors="replace and count", newline="") as file:
            while more := file.read(size):
                text += more
                cut = safe_cut(text)
                if cut:
                    yield text[:cut].encode()
                    text = text[cut:]
                size = 2 * size if cut == 0 else 1 << 20
        yield text.encode()

    def _replace(self, error: UnicodeError) -> tuple[str, int]:
        self.replaced += 1
        return "\ufffd", error.end


def safe_cut(text: str) -> int:
    """The last place to cut `text` in two without changing its tokens; 0 if there is none.

    A word of GPT-2's pattern contains a space at most as its first character, so a new word starts wherever a
    space or line break follows anything but white space. The first part does not end in white space, the only
    place where the pattern looks ahead.
    """
    cut = len(text)
    while (cut := max(text.rfind(" ", 0, cut), text.rfind("\n", 0, cut))) > 0:
        if not text[cut - 1].isspace():
            return cut
    return 0


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
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (ast.get_docstring(node) or "").strip()


def in_validation(document: Iterable[bytes], fraction: float) -> bool:
    """Whether a document is for validation. Depends on its text alone, so copies land on the same side."""
    checksum = 0x9E3779B9  # a seed that sends empty documents to training
    for fragment in document:
        checksum = zlib.crc32(fragment, checksum)
    return checksum < fraction * 2**32


def sample_texts(pieces: list[Piece], text_column: str, validation_fraction: float) -> Iterator[str]:
    """About SAMPLE_BYTES of the training documents, the first ones of each piece, as much of each in
    proportion. Raises InputError."""
    share = min(1.0, SAMPLE_BYTES / max(1, sum(piece.size for piece in pieces)))
    for piece in pieces:
        room = piece.size * share
        documents = read_documents(piece, text_column)
        training = (each for each in documents if not in_validation(each, validation_fraction))
        for text in itertools.chain.from_iterable(training):
            yield text.decode()
            room -= len(text)
            if share < 1 and room <= 0:
                break
