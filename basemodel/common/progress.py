"""A progress bar that is readable on a terminal and in a log."""

import sys
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
