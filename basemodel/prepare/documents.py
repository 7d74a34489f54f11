"""What is encoded: documents, the pieces of files that hold them, and the shards that pieces make."""

import codecs
import io
import platform
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basemodel.prepare.formats import open_utf8

PYTHON_DOCS = "python-docs"
SHARD_BYTES = 64_000_000  # of text, roughly


@dataclass(frozen=True)
class Piece:
    """A file or part of one. `start` and `stop` count row groups in .parquet and bytes in .jsonl."""

    path: Path | None  # None: the Python documentation
    type: str  # of text_files.TYPES
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


# A document is a Text or a LongText, which iterate over fragments of UTF-8 that, tokenized one by one, give
# the tokens of the whole, or None in place of a null.


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
                cut = safe_cut(text)
                if cut:
                    yield text[:cut].encode()
                    text = text[cut:]
                size = 2 * size if cut == 0 else self.BLOCK
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
