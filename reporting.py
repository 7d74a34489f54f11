"""What a run writes while it trains: progress bar, metrics.jsonl, status.json and the chart."""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from config import RunError, TrainConfig, optimizer_in_words
from data import BatchPlan, RunData
from files import replace_text
from gpt import GPTConfig, GPTModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Reporter:
    """The first process's voice: progress, metrics.jsonl, status.json, chart. The others stay silent."""

    def __init__(
        self, run_dir: Path, config: TrainConfig, plan: BatchPlan, *, step: int, seconds: float, speaks: bool
    ) -> None:
        self.run_dir, self.config, self.plan, self.speaks = run_dir, config, plan, speaks
        self.step_seconds: float | None = None  # smoothed over `_timed` steps
        self._timed = 0
        self.loss: float | None = None
        self.started = time.monotonic() - seconds
        self.checkpoint: str | None = None  # the last that is on the disk
        self._begun_at = step
        self._last_status = self._last_line = self._last_chart = self._chart_seconds = 0.0
        self._line: dict[str, float] = {}  # of metrics.jsonl, not written yet
        if speaks:
            self._metrics = _cut_back_metrics(run_dir / "metrics.jsonl", step)
            shown = sys.stderr.isatty()
            self._bar = tqdm(
                total=plan.steps, initial=step, unit="step", disable=not shown, dynamic_ncols=True
            )

    def seconds(self) -> float:
        """Of training so far, including what the run did before it was resumed."""
        return time.monotonic() - self.started

    def cost(self) -> float | None:
        """US dollars so far, where the config has a price."""
        return None if self.config.usd_per_hour is None else self.config.usd_per_hour * self.seconds() / 3600

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.speaks:
            tqdm.write(line)
            sys.stdout.flush()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add `values` to the line of metrics.jsonl for `step`; it is written when another step's begins."""
        if not self.speaks:
            return
        if self._line.get("step") != step:
            self.flush()
            self._line = {"step": step, "tokens": step * self.plan.tokens_per_step}
        self._line |= values | {"seconds": round(self.seconds(), 3)}

    def flush(self) -> None:
        """Write what has been logged to the disk's file. Raises RunError if the disk does not take it."""
        if self.speaks and self._line:
            finite = {
                key: None if value is None or not math.isfinite(value) else value
                for key, value in self._line.items()
            }
            self._line = {}
            path = self.run_dir / "metrics.jsonl"
            try:
                self._metrics.write((json.dumps(finite) + "\n").encode())
                if (
                    finite["step"] == self._begun_at
                ):  # a signal came between a step and the validation after it
                    self._metrics.close()
                    self._metrics = _cut_back_metrics(path, self._begun_at)
            except OSError as error:
                raise RunError(f"{path} could not be written: {error}; make room, then --resume") from error

    def step(self, step: int, values: dict[str, float], *, step_seconds: float) -> None:
        """Log a finished training step (`values` hold at least train_loss) and show where the run stands."""
        if not self.speaks:
            return
        self._timed += 1
        weight = max(0.05, 1 / self._timed)  # first a mean of all, for the first step is a slow one
        self.step_seconds = (1 - weight) * (self.step_seconds or 0.0) + weight * step_seconds
        speed = self.plan.tokens_per_step / max(step_seconds, 1e-9)
        self.loss = values["train_loss"] if math.isfinite(values["train_loss"]) else None
        self.log(step, {**values, "tokens_per_second": round(speed, 1)})
        self._bar.update(step - self._bar.n)
        cost = "" if self.cost() is None else f", ${self.cost():.2f}"
        text = f"loss {values['train_loss']:.3f}, {self.tokens_per_second:,.0f} tokens/s{cost}"
        now = time.monotonic()
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
        elif now - self._last_line > 15:
            self._last_line = now
            eta = tqdm.format_interval(self._eta(step))
            print(f"step {step:,}/{self.plan.steps:,}: {text}, ETA {eta}", file=sys.stderr, flush=True)
        if now - self._last_status > 5:
            self._last_status = now
            self.status("running", step)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps, without validation and checkpoints."""
        return self.plan.tokens_per_step / self.step_seconds if self.step_seconds else None

    def _eta(self, step: int) -> float:
        """Seconds that the steps after `step` will take; 0 as long as nothing is known."""
        return (self.plan.steps - step) * (self.step_seconds or 0.0)

    def status(self, status: str, step: int, **more: Any) -> None:
        """Replace status.json; one that cannot be written is no reason to stop training."""
        if not self.speaks:
            return
        values = {
            "status": status,
            "step": step,
            "total_steps": self.plan.steps,
            "tokens": step * self.plan.tokens_per_step,
            "loss": self.loss,
            "tokens_per_second": self.tokens_per_second,
            "eta_seconds": 0.0 if status == "finished" else self._eta(step),
            "seconds": self.seconds(),
            "cost_usd": self.cost(),
            "checkpoint": self.checkpoint,
            "pid": os.getpid(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        try:
            replace_text(self.run_dir / "status.json", json.dumps(values, indent=1))
        except OSError as error:
            self.say(f"Warning: status.json could not be written: {error}")

    def chart(self, *, final: bool = False) -> None:
        """Redraw the chart; one that cannot be drawn is no reason to stop training.

        Before the last time, only when there are steps to draw and drawing takes less than 1% of the time
        since it was drawn before.
        """
        start = time.monotonic()
        due = self._timed > 0 and start - self._last_chart > 100 * self._chart_seconds
        if not self.speaks or not (final or due):
            return
        self.flush()
        try:
            draw_chart(
                self.run_dir / "metrics.jsonl", self.run_dir / "training-run-chart.png", self.run_dir.name
            )
        except Exception as error:
            self.say(f"Warning: the chart could not be drawn: {type(error).__name__}: {error}")
        self._last_chart = time.monotonic()
        self._chart_seconds = self._last_chart - start

    def close(self, status: str, step: int, **more: Any) -> None:
        """Write the last status and put bar and files away."""
        self.flush()
        self.status(status, step, **more)
        if self.speaks:
            self._bar.close()
            self._metrics.close()


def read_status(run_dir: Path) -> dict[str, Any]:
    """What status.json says; nothing where there is none."""
    try:
        return dict(json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, two of one step as one, without any that a crash has cut off or someone
    has spoilt."""
    lines: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines[values["step"]] = lines.get(values["step"], {}) | values
    return list(lines.values())


def _cut_back_metrics(path: Path, step: int) -> BinaryIO:
    """Open metrics.jsonl for appending after `step`, one line per step, without what will be done again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept), durable=True)
    return path.open("ab", buffering=0)


@contextmanager
def xkcd_figure(size: tuple[float, float]) -> "Iterator[Figure]":
    """A figure of `size` inches to draw on, in xkcd style, in a font that is installed."""
    import matplotlib  # here, because it takes half a second that only a process that draws should spend

    matplotlib.use("Agg")
    from matplotlib import font_manager
    from matplotlib import pyplot as plt

    installed = set(font_manager.get_font_names())
    fonts = [name for name in ("xkcd", "xkcd Script", "Comic Neue", "Humor Sans") if name in installed]
    with plt.xkcd():
        plt.rcParams["font.family"] = fonts[0] if fonts else "DejaVu Sans"
        figure = plt.figure(figsize=size, layout="constrained")
        try:
            yield figure
        finally:
            plt.close(figure)


def draw_chart(metrics: Path, chart: Path, title: str) -> None:
    """Draw loss, learning rate and gradient norm over the steps of a metrics.jsonl as a PNG.

    Steps are drawn in at most 200 bins: the mean of each, and for the loss the band from its least to its
    most.
    """
    lines = read_metrics(metrics)
    trained = [line for line in lines if "train_loss" in line]
    validated = [line for line in lines if "val_loss" in line]
    bins = [part for part in np.array_split(np.arange(len(trained)), 200) if len(part)]

    def binned(key: str, statistic: Callable[[list[float]], float]) -> list[float]:
        values = ([trained[i][key] for i in part if trained[i][key] is not None] for part in bins)
        return [float(statistic(found)) if found else math.nan for found in values]

    with xkcd_figure((11, 11)) as figure:
        loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
        steps = binned("step", np.mean)
        low, high = binned("train_loss", min), binned("train_loss", max)
        loss.fill_between(steps, low, high, alpha=0.3, linewidth=0, label="train loss, min to max")
        loss.plot(steps, binned("train_loss", np.mean), label="train loss")
        if validated:
            points = [line["step"] for line in validated], [line["val_loss"] for line in validated]
            loss.plot(*points, marker="o", label="validation loss")
        loss.set(title=title, ylabel="nats per token")
        loss.legend()
        rate.plot(steps, binned("learning_rate", np.mean), color="tab:green")
        rate.set(ylabel="learning rate")
        norm.plot(steps, binned("grad_norm", np.mean), color="tab:red")
        norm.set(ylabel="gradient norm", xlabel="global step")
        unfinished = chart.with_name(chart.name + ".incomplete")
        figure.savefig(unfinished, format="png", dpi=90)
    unfinished.replace(chart)


def print_plan(
    run_dir: Path,
    config: TrainConfig,
    model_config: GPTConfig,
    data: RunData | None,
    plan: BatchPlan,
    hardware: str,
) -> None:
    """Say what a run does, in numbers that follow from its configs; `data` None: not here yet."""
    with torch.device("meta"):
        model = GPTModel(model_config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens, size = plan.steps * plan.tokens_per_step, 12 * parameters  # weights and two moments in float32
    interval = config.checkpoint_interval or config.validation_interval
    checkpoints = math.ceil(plan.steps / interval) if interval else 1
    kept = checkpoints if config.keep_checkpoints is None else min(checkpoints, config.keep_checkpoints + 1)
    speed = read_status(run_dir).get("tokens_per_second")
    speed = speed if isinstance(speed, float) and speed > 0 else None
    price = config.usd_per_hour
    have = f"{data.train.tokens.count:,} training tokens" if data else "not here yet"
    split = (
        f"{plan.processes} processes x microbatch {plan.microbatch_size} x accumulation {plan.accumulation}"
    )
    free = shutil.disk_usage(run_dir).free
    lines = {
        "Run": f"{run_dir.name}, seed {config.random_seed}",
        "Model": f"{parameters:,} parameters, context {model_config.context_length:,}",
        "Data": f"{config.dataset}, {have}, tokenizer {model_config.tokenizer}",
        "Hardware": hardware,
        "Global batch": f"{plan.global_batch:,} sequences, {plan.tokens_per_step:,} tokens = {split}",
        "Steps": f"{plan.steps:,}, {tokens:,} tokens" if plan.steps else "not known before the data are here",
        "Optimiser": optimizer_in_words(dataclasses.asdict(config)),
        "FLOPs": f"{tokens * model.flops_per_token():.2e}, {model.flops_per_token():,} per token",
        "Disk": f"{kept} checkpoints, {kept * size / 1e9:.2f} GB; {free / 1e9:.1f} GB are free",
        "ETA": "not known before a first run here",
    }
    if speed:
        lines["ETA"] = (
            f"{timedelta(seconds=round(tokens / speed))} at {speed:,.0f} tokens/s, as the last run went"
        )
    if price is not None:
        cost = f"${tokens / speed / 3600 * price:.2f} at " if speed else ""
        lines["Cost"] = f"{cost}${price:.2f} an hour"
    for name, text in lines.items():
        print(f"{name + ':':14}{text}", flush=True)


def set_earlier_results_aside(directory: Path) -> Path | None:
    """Move what an earlier run of this name wrote into a folder of its own; None if nothing was."""
    names = ("checkpoints", "metrics.jsonl", "status.json", "training-run-chart.png")
    found = [directory / name for name in names if (directory / name).exists()]
    if not found:
        return None
    stamp = datetime.now(UTC).strftime("%Y%m%dZ%H%M%S")
    aside = next(
        path
        for n in range(1000)
        if not (path := directory / f"earlier-{stamp}{f'-{n}' if n else ''}").exists()
    )
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside
