#!/usr/bin/env python3
"""Which run was better, and what did it cost? A table and a chart of several runs, and a page to watch them.

    python compare_runs.py demo demo-tied demo-dropout
    python compare_runs.py demo demo-tied --html runs/compare.html
    python -m http.server --directory runs          then look at http://localhost:8000/compare.html

The page holds all it shows. Where it is served together with the runs' folders, it also asks for their
metrics.jsonl and status.json again and again, so it follows runs that go on.
"""

import dataclasses
import html
import json
import os
import re
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import numpy as np
import torch

from basemodel.charts import xkcd_figure
from basemodel.command_line import require_plain_name, run_command
from basemodel.config import TrainConfig
from basemodel.errors import InputError, require
from basemodel.files import replace_text
from basemodel.json_config import read_config
from basemodel.measured_loss import MeasuredLoss, read_test_loss
from basemodel.run_folder import read_metrics, read_status
from gpt import GPTConfig, GPTModel

UNKNOWN = "–"
BINS = 200  # points of a training curve
Points = list[tuple[int, float]]  # tokens seen, loss


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder says about it."""

    folder: Path
    config: dict[str, Any]  # model.json and train.json, with their defaults
    parameters: int
    metrics: list[dict[str, Any]]
    status: dict[str, Any]
    test: MeasuredLoss | None  # of the best checkpoint, else of the latest

    @property
    def tokens(self) -> int | None:
        """Tokens seen so far."""
        return self.metrics[-1]["tokens"] if self.metrics else None

    @property
    def global_batch(self) -> int | None:
        """Sequences per optimiser step."""
        steps = next((line for line in self.metrics if line["step"]), None)
        return steps and steps["tokens"] // steps["step"] // self.config["context_length"]

    @property
    def validation_loss(self) -> float | None:
        """The best so far."""
        return min((loss for _, loss in self.curve("val_loss")), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over all steps: without validation, checkpoints and pauses."""
        speeds = [line["tokens_per_second"] for line in self.metrics if line.get("tokens_per_second")]
        return statistics.median(speeds) if speeds else None

    @property
    def seconds(self) -> float | None:
        """All that the run took so far, over all its resumed parts."""
        return self.metrics[-1]["seconds"] if self.metrics else None

    @property
    def validation_share(self) -> float | None:
        """The part of the run's time that went into validation."""
        spent = sum(line.get("validation_seconds", 0.0) for line in self.metrics)
        return spent / self.seconds if self.seconds else None

    def curve(self, key: str) -> Points:
        """A loss over the tokens seen; a NaN, null in the file, is left out."""
        return [(line["tokens"], line[key]) for line in self.metrics if line.get(key) is not None]


def read_run(runs_dir: Path, name: str) -> RunSummary:
    """Read a run's folder, whether it has been trained yet or not. Raises InputError where there is none."""
    folder = runs_dir / require_plain_name(name, "run")
    if not folder.is_dir():
        have = ", ".join(sorted(path.parent.name for path in runs_dir.glob("*/train.json"))) or "none"
        raise InputError(f"{folder}: no such run; there are: {have}")
    model_config = read_config(GPTConfig, folder / "model.json")
    config = read_config(TrainConfig, folder / "train.json")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPTModel(model_config).parameters())
    tests = (read_test_loss(folder / "checkpoints" / link) for link in ("best", "latest"))
    return RunSummary(
        folder,
        dataclasses.asdict(model_config) | dataclasses.asdict(config),
        parameters,
        [line for line in read_metrics(folder / "metrics.jsonl") if {"tokens", "seconds"} <= line.keys()],
        read_status(folder),
        next((test for test in tests if test), None),
    )


# ------------------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------------------


def differences(runs: list[RunSummary]) -> list[str]:
    """What is configured otherwise in each run than in the first."""
    first = runs[0].config
    return [
        ", ".join(
            f"{key} {json.dumps(first[key])} → {json.dumps(value)}"
            for key, value in run.config.items()
            if value != first[key]
        )
        for run in runs
    ]


def shown(value: float | None, form: str) -> str:
    """A number in a format, or the sign for one that is not known."""
    return UNKNOWN if value is None else form.format(value)


def table(runs: list[RunSummary]) -> list[dict[str, str]]:
    """A row for each run, by column."""
    return [
        {
            "run": run.folder.name,
            "differs from the first by": differs or UNKNOWN,
            "parameters": f"{run.parameters:,}",
            "tokens": shown(run.tokens, "{:,}"),
            "global batch": shown(run.global_batch, "{:,}"),
            "validation loss": shown(run.validation_loss, "{:.4f}"),
            "test loss": UNKNOWN if run.test is None else test_loss(run.test),
            "tokens/s": shown(run.tokens_per_second, "{:,.0f}"),
            "hours": shown(run.seconds and run.seconds / 3600, "{:.2f}"),
            "cost": shown(run.status.get("cost_usd"), "${:,.2f}"),
            "of it validation": shown(run.validation_share, "{:.0%}"),
        }
        for run, differs in zip(runs, differences(runs), strict=True)
    ]


def test_loss(test: MeasuredLoss) -> str:
    """A test loss with its standard error."""
    return f"{test.loss:.4f}" + ("" if test.standard_error is None else f" ± {test.standard_error:.4f}")


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def notes(runs: list[RunSummary]) -> list[str]:
    """What a reader of the table must know."""
    tests = [run.test for run in runs if run.test]
    if any(not test.same_data(tests[0]) for test in tests):
        where = (f"{test.dataset} {test.split} from {test.start_token:,}, {test.tokens:,}" for test in tests)
        return [f"The test losses are of different data: {'; '.join(dict.fromkeys(where))} tokens."]
    return []


# ------------------------------------------------------------------------------------------------------------
# The chart and the page
# ------------------------------------------------------------------------------------------------------------


def binned(points: Points) -> Points:
    """At most BINS points, each the mean of neighbouring ones."""
    parts = np.array_split(np.array(points), min(BINS, len(points))) if points else []
    return [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def draw_chart(runs: list[RunSummary], path: Path) -> None:
    """Draw the runs' losses over tokens seen, one colour a run, as a PNG in xkcd style."""
    with xkcd_figure((11, 7)) as figure:
        axes = figure.subplots()
        for index, run in enumerate(runs):
            colour = f"C{index % 10}"
            train, validation = binned(run.curve("train_loss")), run.curve("val_loss")
            for points, style in ((train, {"alpha": 0.4}), (validation, {"marker": "o", "markersize": 5})):
                axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=2, **style)
            axes.plot([], [], color=colour, label=run.folder.name)
        axes.set(xlabel="tokens seen", ylabel="nats per token", title="validation (dots) and training loss")
        axes.set_ylim(top=highest_shown(runs))
        axes.legend()
        unfinished = path.with_name(path.name + ".incomplete")
        figure.savefig(unfinished, format="png", dpi=90)
    unfinished.replace(path)


def highest_shown(runs: list[RunSummary]) -> float:
    """The top of the chart: what the training losses are below after a twentieth of the tokens. The first
    steps, far above, would press all that matters together."""
    longest = max(run.tokens or 0 for run in runs)
    curves = [binned(run.curve("train_loss")) for run in runs]
    losses = [loss for curve in curves for tokens, loss in curve if tokens >= longest / 20]
    return 1.02 * max(losses, default=1.0)


def write_page(runs: list[RunSummary], rows: list[dict[str, str]], path: Path, seconds: int) -> None:
    """Write a page that shows the runs, and follows them where it is served with their folders."""
    content = [
        {
            "folder": quote(os.path.relpath(run.folder.resolve(), path.resolve().parent)),
            "cells": {
                **dict.fromkeys(("run", "differs from the first by", "now", "minutes to go"), UNKNOWN),
                **cells,
                "now": run.status.get("status", "not begun"),
            },
            "train": binned(run.curve("train_loss")),
            "validation": run.curve("val_loss"),
        }
        for run, cells in zip(runs, rows, strict=True)
    ]
    values = {
        "TITLE": html.escape(" / ".join(run.folder.name for run in runs)),
        "NOTES": html.escape(" ".join(notes(runs))),
        "RUNS": json.dumps(content).replace("<", r"\u003c"),  # no end of the script element in a text
        "SECONDS": str(seconds),
        "BINS": str(BINS),
        "MADE": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = re.sub("@([A-Z]+)@", lambda match: values[match[1]], template)
    replace_text(path, page)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run_names", nargs=-1, required=True, metavar="RUN ...")
@click.option("--chart", type=click.Path(path_type=Path), default=Path("compare-runs.png"), show_default=True)
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page to watch the runs, too.")
@click.option(
    "--refresh", type=click.IntRange(1), default=30, show_default=True, help="Seconds, of the page."
)
@click.option("--runs-dir", type=click.Path(path_type=Path), default=Path(__file__).parent / "runs")
def main(run_names: tuple[str, ...], chart: Path, page: Path | None, refresh: int, runs_dir: Path) -> None:
    """Compare the runs RUN ..., folders of runs/: print a Markdown table, draw their losses in one chart."""
    for path in (chart, page):
        require(
            path is None or path.parent.is_dir(), f"{path}: the folder {path and path.parent} is not there"
        )
        require(path is None or not path.is_dir(), f"{path}: is a folder; name a file")
    twice = [name for name in run_names if run_names.count(name) > 1]
    require(not twice, f"run '{twice[0] if twice else ''}' is named twice")
    runs = [read_run(runs_dir, name) for name in run_names]
    rows = table(runs)
    print(markdown(rows))
    for note in notes(runs):
        print(f"\n{note}")
    if any(run.metrics for run in runs):
        draw_chart(runs, chart)
        print(f"\nChart: {chart}")
    else:
        print("\nNo chart: none of the runs has begun")
    if page:
        write_page(runs, rows, page, refresh)
        print(f"Page: {page}")


if __name__ == "__main__":
    run_command(main)
