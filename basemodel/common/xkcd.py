"""Charts in xkcd style."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def xkcd_chart(path: Path, size: tuple[float, float]) -> "Iterator[Figure]":
    """Yield an xkcd-style figure of `size` inches in an installed font, then save it atomically as a PNG."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's would fail here
    from matplotlib import font_manager  # imported here because it takes half a second
    from matplotlib import pyplot as plt

    installed = set(font_manager.get_font_names())
    fonts = [name for name in ("xkcd", "xkcd Script", "Comic Neue", "Humor Sans") if name in installed]
    with plt.xkcd():
        plt.rcParams["font.family"] = fonts[0] if fonts else "DejaVu Sans"
        figure = plt.figure(figsize=size, layout="constrained")
        try:
            yield figure
            unfinished = path.with_name(path.name + ".incomplete")
            figure.savefig(unfinished, format="png", dpi=90)
        finally:
            plt.close(figure)
    unfinished.replace(path)
