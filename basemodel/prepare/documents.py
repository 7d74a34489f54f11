"""Documents, the files that they come in, and the shards that they are encoded in."""

import codecs
import io
import lzma
import platform
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from basemodel.common.errors import InputError

PYTHON_DOCS = "python-docs"
SHARD_BYTES = 64_000_000  # of text, roughly
SAMPLE_BYTES = 1 << 16  # from the beginning of a file, to tell whether it is text

# To add a type, add its suffix here and its reader to READERS in readers.py.
TYPES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
KNOWN_TYPES = f"{', '.join(TYPES)} (also compressed: {', '.join(COMPRESSIONS)})"
# UTF-32's little-endian mark begins with UTF-16's, so it comes first.
BYTE_ORDER_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def compression(path: Path) -> str | None:
    """How a file is compressed, by its last suffix; None if it is not."""
    return COMPRESSIONS.get(path.suffix.lower())


def suffix(path: Path) -> str:
    """A file's suffix in small letters, without that of its compression."""
    return Path(path.stem if compression(path) else path.name).suffix.lower()


def file_type(path: Path) -> str | None:
    """A file's type, one of TYPES' values, by its suffix, compressed or not; None if it is unknown."""
    return TYPES.get(suffix(path))


def open_decompressed(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes, decompressed. Several compressed streams in one file read as one."""
    kind = compression(path)
    if kind is None:
        return path.open("rb")
    if kind == "xz":
        return io.BufferedReader(lzma.open(path), SAMPLE_BYTES)
    import pyarrow  # a dependency of `datasets`

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=kind), SAMPLE_BYTES)


def marked_encoding(path: Path) -> str | None:
    """The encoding other than UTF-8 that a file's byte order mark names; None if there is no such mark."""
    with open_decompressed(path) as file:
        start = file.peek(4)[:4]
    return next((name for name, marks in BYTE_ORDER_MARKS.items() if start.startswith(marks)), None)


def open_utf8(path: Path) -> BinaryIO:
    """Open a text file to read it as UTF-8: decompressed, decoded as its byte order mark says, without the
    mark. A file in another encoding is read into memory."""
    encoding, file = marked_encoding(path), open_decompressed(path)
    if encoding:
        with io.TextIOWrapper(file, encoding, newline="") as text:
            return io.BytesIO(text.read().encode())
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def check_is_text(path: Path) -> None:
    """Raise InputError if a text file begins with something else, or in an encoding that no mark names.

    A few invalid bytes are no reason, they become U+FFFD. Legacy encodings of other alphabets have them in
    every second place, and UTF-16 without a byte order mark has NULs there.
    """
    with open_utf8(path) as file:
        sample = file.read(SAMPLE_BYTES)
    # The incremental decoder does not mind that the last character may be cut off.
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)
    wrong = text.count("\ufffd") - sample.count("\ufffd".encode()) + text.count("\0")
    if wrong > len(text) / 3:
        raise InputError(
            f"{path}: most of it is not UTF-8 text; if it is text, convert it, as iconv -f SHIFT_JIS -t UTF-8"
        )


@dataclass(frozen=True)
class Piece:
    """A file or part of one. `start` and `stop` count row groups in .parquet and bytes in .jsonl."""

    path: Path | None  # None: the Python documentation
    type: str  # one of TYPES' values
    size: int  # bytes of text, roughly
    start: int = 0
    stop: int = sys.maxsize
    split: str | None = None  # the source's own; None: by each document's text

    def identity(self) -> list[Any]:
        """Values that differ for any other piece, and for this one once its file has changed."""
        if self.path is None:
            return [PYTHON_DOCS, platform.python_version()]
        status = self.path.stat()
        file = [str(self.path.resolve()), status.st_size, status.st_mtime_ns]
        return [*file, self.type, self.start, self.stop, self.split]


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


# A document is a Text or a LongText, which iterate over fragments of UTF-8. Encoded one by one, the fragments
# give the tokens of the whole.


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
        text = data.decode(errors="replace")
        return cls(text.encode(), text.count("\ufffd") - data.count("\ufffd".encode()))

    @classmethod
    def from_str(cls, text: str) -> "Text":
        r"""A document from a string that may hold lone surrogates, which \u escapes in JSON can produce."""
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
        return cls(valid.encode(), valid.count("\ufffd") - text.count("\ufffd"))


@dataclass
class LongText:
    """A long text file as one document, read a megabyte at a time. Invalid UTF-8 becomes U+FFFD, counted."""

    BLOCK = 1 << 20

    path: Path
    replaced: int = 0  # invalid sequences in the last pass over the file

    def __iter__(self) -> Iterator[bytes]:
        self.replaced = 0
        codecs.register_error("replace and count", self._replace)
        size, text = self.BLOCK, ""
        with io.TextIOWrapper(open_utf8(self.path), "utf-8", "replace and count", newline="") as file:
            while more := file.read(size):
                text += more
                if cut := safe_cut(text):
                    yield text[:cut].encode()
                    text = text[cut:]
                size = self.BLOCK if cut else 2 * size
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


def in_validation(document: Iterable[bytes], fraction: float) -> bool:
    """Whether a document is for validation. Depends on its text alone, so copies land on the same side."""
    checksum = 0x9E3779B9  # a seed that sends empty documents to training
    for fragment in document:
        checksum = zlib.crc32(fragment, checksum)
    return checksum < fraction * 2**32
