"""Output for terminals, logs and pages: a progress bar, Markdown tables, text made safe to print."""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0  # between lines when there is no terminal


class Expendable(io.FileIO):
    """Standard output or error. What cannot be written (a closed pipe or terminal, a full disk) is dropped,
    with one warning on standard error, because losing a run is worse than losing its output."""

    warned = False

    def write(self, data: bytes) -> int:
        """Write `data`, or drop it."""
        try:
            return super().write(data) or len(data)
        except OSError as error:
            if not self.warned:
                self.warned = True
                with contextlib.suppress(OSError):
                    os.write(2, f"Warning: some output is lost: {error}\n".encode())
        return len(data)


def make_output_expendable() -> None:
    """Replace sys.stdout and sys.stderr, even if closed, with streams on which a write raises no error."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if (stream := getattr(sys, name)) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        by_line = stream is None or stream.line_buffering or stream.write_through
        raw, encoding = Expendable(descriptor, "w", closefd=False), stream and stream.encoding
        buffer = io.BufferedWriter(raw)
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=by_line))


@contextlib.contextmanager
def warned(what: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Go on after an error, with a warning that says once that the program could not do `what`."""
    try:
        yield
    except errors as error:
        _warn(f"could not {what}: {'' if isinstance(error, OSError) else type(error).__name__ + ': '}{error}")


@functools.cache
def _warn(message: str) -> None:
    tqdm.write(f"Warning: {message}")


class Progress(tqdm):
    """tqdm's bar if standard error is a terminal, else a plain line every LINE_SECONDS."""

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        self.on_terminal = sys.stderr.isatty()
        if self.on_terminal:
            options |= {"dynamic_ncols": True}
        else:
            layout = "{desc}: " if options.get("desc") else ""
            layout += "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
            options |= {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "bar_format": layout}
        super().__init__(iterable, file=sys.stderr, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print a line."""
        if self.on_terminal:
            return super().display(msg, pos)
        print(msg or self, file=sys.stderr, flush=True)
        return True


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of `rows` under the headings `columns`; None makes an empty cell."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(cell: object) -> str:
    return "" if cell is None else str(cell).replace("|", r"\|")


def printable(text: str) -> str:
    """Escape control characters, which could upset a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def one_line(text: str) -> str:
    """The text on one line, with control characters escaped."""
    return printable(text).replace("\n", r"\n")
