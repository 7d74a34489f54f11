"""Output for terminals, logs and pages: a progress bar, Markdown tables, text made safe to print."""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0  # between lines when there is no terminal


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
    """The text on one line, with characters that standard output cannot encode escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).replace("\n", r"\n").encode(encoding, "backslashreplace").decode(encoding)
