#!/usr/bin/env python3
"""Which run was better, and what did it cost? A table, a chart and a live page of several runs.

    python compare_runs.py demo demo-tied demo-dropout
    python compare_runs.py demo demo-tied --html runs/compare.html
    python -m http.server --directory runs          then open http://localhost:8000/compare.html

The page is self-contained. When served together with the runs' folders, it also polls their metrics.jsonl,
status.json and samples.jsonl to follow runs in progress.
"""

import html
import json
import os
import re
import statistics
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import numpy as np

from basemodel.common.command_line import require_file_path, run_command, runs_dir_option
from basemodel.common.errors import InputError
from basemodel.common.files import followed, replace_text
from basemodel.common.json_config import read_config
from basemodel.common.names import CHECKPOINTS, METRICS, MODEL_JSON, SAMPLES, TRAIN_JSON
from basemodel.common.output import markdown_table
from basemodel.common.xkcd import xkcd_chart
from basemodel.evaluation import measurements
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig
from basemodel.training.run_folder import find_run, read_metrics, read_samples, read_status

UNKNOWN = "–"
BINS = 200  # points in a curve of all steps
Points = list[tuple[int, float]]  # tokens seen, value


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("run_names", nargs=-1, required=True, metavar="RUN ...")
@click.option("--chart", type=Path, default="compare-runs.png", help="PNG file to draw the chart to.")
@click.option("--html", "page", type=Path, help="HTML file to write a page that follows the runs to.")
@click.option("--refresh", type=click.IntRange(1), default=30, help="Seconds between updates of the page.")
@runs_dir_option
def main(run_names: tuple[str, ...], chart: Path, page: Path | None, refresh: int, runs_dir: Path) -> None:
    """Compare several runs, by the names of their folders: print a Markdown table and chart their losses."""
    for path in filter(None, (chart, page)):
        require_file_path(path)
    for name in run_names:
        if run_names.count(name) > 1:
            raise InputError(f"run '{name}' is named twice")
    runs = [read_run(runs_dir, name) for name in run_names]
    rows = table(runs)
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    for note in notes(runs):
        print(f"\n{note}")
    if any(run.tokens is not None for run in runs):
        draw_chart(runs, chart)
        print(f"\nChart: {chart}")
    else:
        print("\nNo chart: none of the runs has started")
    if page:
        write_page(runs, rows, page, refresh)
        print(f"Page: {page}")


@dataclass(frozen=True)
class RunSummary:
    """What the folder of a run says about it; None where it is not known yet."""

    folder: Path
    config: dict[str, Any]  # model.json and train.json, with their defaults
    parameters: int
    status: dict[str, Any]
    curves: dict[str, Points]  # train and validation (losses), learning_rate and grad_norm
    samples: list[dict[str, Any]]  # how the model continued prompts while it trained
    validation_loss: float | None  # the best so far
    test: measurements.MeasuredLoss | None  # of the best checkpoint, else of the latest
    tasks: list[measurements.TaskResult]  # of the same checkpoints
    tokens: int | None  # seen so far
    seconds: float | None  # in all parts of the run, however often it was resumed
    global_batch: int | None  # sequences per optimizer step
    tokens_per_second: float | None  # the median over all steps: excludes validation, checkpoints and pauses
    validation_share: float | None  # of the time


def read_run(runs_dir: Path, name: str) -> RunSummary:
    """Summarize a run's folder, whether training has started or not. Raises InputError if there is none."""
    folder = find_run(runs_dir, name)
    model_config = read_config(GPTConfig, folder / MODEL_JSON)
    config = read_config(TrainConfig, folder / TRAIN_JSON)
    checkpoints = [followed(folder / CHECKPOINTS / link) for link in ("best", "latest")]
    metrics = [line for line in read_metrics(folder / METRICS) if {"tokens", "seconds"} <= line.keys()]
    last = metrics[-1] if metrics else {}
    validation = curve(metrics, "val_loss")
    keys = {"train": "train_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
    before, after = ([{"step": 0, "tokens": 0}] * 2 + metrics)[-2:]
    step_tokens = (after["tokens"] - before["tokens"]) // max(1, after["step"] - before["step"])
    speeds = [line["tokens_per_second"] for line in metrics if line.get("tokens_per_second")]
    validating = sum(line.get("validation_seconds", 0.0) for line in metrics)
    return RunSummary(
        folder=folder,
        config=asdict(model_config) | asdict(config),
        parameters=model_config.parameter_count,
        status=read_status(folder),
        curves={name: binned(curve(metrics, key)) for name, key in keys.items()} | {"validation": validation},
        samples=read_samples(folder / SAMPLES),
        validation_loss=min((loss for _, loss in validation), default=None),
        test=next(filter(None, map(measurements.read_test_loss, checkpoints)), None),
        tasks=next(filter(None, map(measurements.read_task_results, checkpoints)), []),
        tokens=last.get("tokens"),
        seconds=last.get("seconds"),
        global_batch=step_tokens // model_config.context_length or None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
        validation_share=validating / last["seconds"] if last.get("seconds") else None,
    )


def curve(metrics: list[dict[str, Any]], key: str) -> Points:
    """A value over the tokens seen, without NaN, which the file holds as null."""
    return [(line["tokens"], line[key]) for line in metrics if line.get(key) is not None]


def binned(points: Points) -> Points:
    """Reduce a curve to at most BINS points, each the mean of its neighbors."""
    parts = np.array_split(np.array(points), min(BINS, len(points))) if points else []
    return [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def shown(value: float | None, form: str) -> str:
    """A formatted number, or a dash for an unknown one."""
    return UNKNOWN if value is None else form.format(value)


def table(runs: list[RunSummary]) -> list[dict[str, str]]:
    """A row for each run, by column."""
    first = runs[0].config

    def differences(config: dict[str, Any]) -> str:
        changed = (key for key in config if config[key] != first[key])
        return ", ".join(f"{key} {json.dumps(first[key])} → {json.dumps(config[key])}" for key in changed)

    tasks = dict.fromkeys(result.title for run in runs for result in measurements.headlines(run.tasks))
    return [
        {
            "run": run.folder.name,
            "differs from the first by": differences(run.config) or UNKNOWN,
            "parameters": f"{run.parameters:,}",
            "tokens": shown(run.tokens, "{:,}"),
            "global batch": shown(run.global_batch, "{:,}"),
            "validation loss": shown(run.validation_loss, "{:.4f}"),
            "test loss": UNKNOWN if run.test is None else str(run.test),
            **dict.fromkeys(tasks, UNKNOWN),
            **{result.title: str(result) for result in measurements.headlines(run.tasks)},
            "tokens/s": shown(run.tokens_per_second, "{:,.0f}"),
            "hours": shown(run.seconds and run.seconds / 3600, "{:.2f}"),
            "cost": shown(run.status.get("cost_usd"), "${:,.2f}"),
            "validation time": shown(run.validation_share, "{:.0%}"),
        }
        for run in runs
    ]


def notes(runs: list[RunSummary]) -> list[str]:
    """Warnings for readers of the table."""
    slices = dict.fromkeys(
        f"{test.dataset} {test.split} from {test.start_token:,}, {test.tokens:,} tokens in sequences of "
        f"{test.context_length:,}" + (", within documents" if test.document_masking else "")
        for test in (run.test for run in runs if run.test)
    )
    warning = f"The test losses were measured on different data: {'; '.join(slices)}."
    return [warning] if len(slices) > 1 else []


def draw_chart(runs: list[RunSummary], path: Path) -> None:
    """Draw the runs' losses over tokens seen, one color per run, as a PNG in xkcd style."""
    # The highest loss after the first twentieth of the tokens, whose losses would squash the others.
    longest = max(run.tokens or 0 for run in runs)
    all_points = (point for run in runs for point in (*run.curves["train"], *run.curves["validation"]))
    top = max((loss for tokens, loss in all_points if tokens >= longest / 20), default=1.0)
    with xkcd_chart(path, (11, 7)) as figure:
        axes = figure.subplots()
        for index, run in enumerate(runs):
            color = f"C{index}"
            styles = (("train", {"alpha": 0.4}), ("validation", {"marker": "o", "markersize": 5}))
            for name, style in styles:
                # Points above the frame are left out: lines from them would enter the picture.
                points = [point for point in run.curves[name] if point[1] <= top]
                axes.plot(*np.reshape(points, (-1, 2)).T, color=color, linewidth=2, **style)
            axes.plot([], [], color=color, label=run.folder.name)
        axes.set(xlabel="tokens seen", ylabel="nats per token", title="validation (dots) and training loss")
        axes.set_ylim(top=1.02 * top)
        axes.legend()


def write_page(runs: list[RunSummary], rows: list[dict[str, str]], path: Path, seconds: int) -> None:
    """Write a page that shows the runs and, when served with their folders, follows them."""
    titles = {result.title for run in runs for result in run.tasks}  # these have a table of their own
    rows = [{column: cell for column, cell in row.items() if column not in titles} for row in rows]
    entries = [page_entry(run, cells, path) for run, cells in zip(runs, rows, strict=True)]
    content = [{**entry, "group": group} for entry, group in zip(entries, groups(runs), strict=True)]
    title = " / ".join(run.folder.name for run in runs[:4]) + (" …" if len(runs) > 4 else "")
    values = {
        "TITLE": html.escape(title),
        "NOTES": html.escape(" ".join(notes(runs))),
        "RUNS": json.dumps(content).replace("<", r"\u003c"),  # so that no text can end the script element
        "SECONDS": str(seconds),
        "BINS": str(BINS),
        "MADE": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    replace_text(path, re.sub("@([A-Z]+)@", lambda match: values[match[1]], template))


def page_entry(run: RunSummary, cells: dict[str, str], page: Path) -> dict[str, Any]:
    """The page's data on a run: the table's `cells` and more, its curves, samples and tasks."""
    price, status = run.config["usd_per_hour"], run.status.get("status", "not started")
    hours = 0.0 if status == "finished" else (run.status.get("eta_seconds") or 0) / 3600 or None
    more = {
        "now": status,
        "minutes to go": shown(hours and 60 * hours, "{:,.1f}"),
        "cost to come": shown(None if None in (price, hours) else price * hours, "${:,.2f}"),
    }
    first = "run", "now", "validation loss", "test loss", "hours", "minutes to go", "cost", "cost to come"
    last = "differs from the first by"  # may be long
    order = dict.fromkeys((*first, *cells, last))
    return {
        "folder": quote(os.path.relpath(run.folder.resolve(), page.resolve().parent)),
        "cells": {key: (cells | more)[key] for key in sorted(order, key=last.__eq__)},
        "price": price,
        **run.curves,
        "samples": run.samples,
        "samples_to_come": bool(run.samples or run.config.get("sample_interval")),
        "tasks": {result.title: str(result) for result in run.tasks},
    }


def groups(runs: list[RunSummary]) -> list[str]:
    """The group of each run: runs that differ in random_seed alone share the name of the first."""
    names: dict[str, str] = {}
    for run in runs:
        key = json.dumps({**run.config, "random_seed": None})
        if key not in names:
            name = re.sub(r"[-_.]*seed[-_.]?\d+$", "", run.folder.name)
            names[key] = run.folder.name if name in ("", *names.values()) else name
    return [names[json.dumps({**run.config, "random_seed": None})] for run in runs]


if __name__ == "__main__":
    run_command(main)
