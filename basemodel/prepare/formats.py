"""The files that text comes in: their types, how they are decompressed, and how their bytes become UTF-8."""

import codecs
import io
import lzma
from pathlib import Path
from typing import BinaryIO

from basemodel.common.errors import InputError

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
KNOWN = f"{', '.join(TYPES)} (also compressed: {', '.join(COMPRESSIONS)})"
SAMPLE_BYTES = 1 << 16
# UTF-32's little-endian mark begins with UTF-16's, so it comes first.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def compression(path: Path) -> str | None:
    """How a file is compressed, by its last suffix; None if it is not."""
    return COMPRESSIONS.get(path.suffix.lower())


def file_type(path: Path) -> str | None:
    """A file's type, one of TYPES' values, by its suffix, compressed or not; None if it is unknown."""
    return TYPES.get(Path(path.stem if compression(path) else path.name).suffix.lower())


def open_decompressed(path: Path) -> io.BufferedReader:
    """A file's bytes, decompressed. Several compressed streams in one file are read as one."""
    kind = compression(path)
    if kind is None:
        return path.open("rb")
    if kind == "xz":
        return io.BufferedReader(lzma.open(path), SAMPLE_BYTES)
    import pyarrow  # a dependency of `datasets`

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=kind), SAMPLE_BYTES)


def open_utf8(path: Path) -> BinaryIO:
    """A text file's bytes in UTF-8: decompressed, decoded as its byte order mark says, without that mark."""
    file = open_decompressed(path)
    start = file.peek(4)[:4]
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    encoding = marked_encoding(start)
    return io.BufferedReader(_InUtf8(file, encoding), SAMPLE_BYTES) if encoding else file


def marked_encoding(start: bytes) -> str | None:
    """The encoding, other than UTF-8, that a file's first four bytes name; None if they name none."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)


class _InUtf8(io.RawIOBase):
    """A stream in another encoding, read as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self._text.read(len(buffer) // 4).encode()  # a character takes up to four bytes
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._text.close()
        super().close()


def check_is_text(path: Path) -> None:
    """Raise InputError if a text file's beginning is something else, or text in an encoding it does not name.

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
