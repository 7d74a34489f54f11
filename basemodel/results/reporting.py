"""What a run logs while it trains: progress bar, metrics.jsonl, samples.jsonl, status.json and the chart."""

import json
import math
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from basemodel.common.errors import RunError
from basemodel.common.files import replace_text
from basemodel.common.terminal import one_line
from basemodel.planning import machines
from basemodel.planning.estimate import slower_than_planned
from basemodel.results import run_chart
from basemodel.results.samples import continue_prompts, keep_samples, require_tokenizer
from basemodel.results.trackers import Trackers, require_packages
from basemodel.training.batches import BatchPlan
from basemodel.training.processes import World
from basemodel.training.run import Run
from basemodel.training.run_folder import read_metrics, read_status
from gpt import GPTModel

SETTLED_STEPS = 100  # since the start, after which the speed is compared with the estimate


def check_reporting(run: Run) -> None:
    """Raise InputError if samples or trackers that the config asks for would fail later."""
    require_tokenizer(run)
    require_packages(run.config.report_to)


class Reporter:
    """Progress line, metrics.jsonl, samples, trackers, status.json and chart, by the first process alone."""

    def __init__(self, run: Run, step: int, seconds: float, *, enabled: bool) -> None:
        """`run` goes on after `step` steps and `seconds` of training; only an `enabled` process reports."""
        self.run, self.enabled = run, enabled
        self.batch_seconds: float | None = None  # of a whole batch: moving average over `_timed` steps
        self._timed = 0
        self.loss: float | None = None
        self.started = time.monotonic() - seconds
        known = read_status(run.directory).get("paid_seconds") if step else None
        self._lost = max(0.0, known - seconds) if isinstance(known, float) else 0.0
        self._device_name, self._compiled = "", True
        self._pauses: dict[str, float] = {}  # how long the last ones took
        self.checkpoint: str | None = None  # the last one on disk
        self._begun_at = step
        self._last_status = self._last_line = self._last_chart = self._chart_seconds = 0.0
        self._line: dict[str, float] = {}  # the pending line of metrics.jsonl
        if enabled:
            self._flops_per_token = GPTModel.outline(run.model_config).flops_per_token()
            self._peak = machines.peak_flops(machines.current_device_name())
            self._metrics = _cut_back_metrics(run.metrics, step)
            if run.samples.exists():
                keep_samples(run, step + 1, [])
            self._trackers = Trackers(run, step, self.say)
            options = {"unit": "step", "disable": None, "dynamic_ncols": True}  # None: unless on a terminal
            self._bar = tqdm(total=self.plan.steps, initial=step, **options)

    @property
    def plan(self) -> BatchPlan:
        """The run's batches and steps."""
        return self.run.plan

    def watch(self, world: World, *, compiled: bool) -> None:
        """Compare the speed with the estimate once it has settled."""
        self._device_name, self._compiled = world.device_name, compiled

    def follow(self, run: Run) -> None:
        """Report on the same run with another end."""
        self.run = run
        if self.enabled:
            self._bar.total = run.plan.steps

    def seconds(self) -> float:
        """Seconds of training so far, including those before the run was resumed."""
        return time.monotonic() - self.started

    def paid_seconds(self) -> float:
        """Seconds of training so far, with those of steps that were lost and repeated."""
        return self.seconds() + self._lost

    def pause_seconds(self, kind: str) -> float:
        """Seconds of the last "validation", "checkpoint" or "chart"; 0 before the first."""
        return self._chart_seconds if kind == "chart" else self._pauses.get(f"{kind}_seconds", 0.0)

    def cost(self, more_seconds: float = 0.0) -> float | None:
        """US dollars so far, and for `more_seconds`, if the config has a price."""
        price = self.run.config.usd_per_hour
        return None if price is None else price * (self.paid_seconds() + more_seconds) / 3600

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.enabled:
            tqdm.write(line)
            sys.stdout.flush()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add `values` to the line of metrics.jsonl for `step`, written once the next step begins."""
        if not self.enabled:
            return
        if self._line.get("step") != step:
            self.flush()
            self._line = {"step": step, "tokens": self.plan.tokens(step)}
        self._pauses |= values
        self._line |= values | {"seconds": round(self.seconds(), 3)}

    def flush(self) -> None:
        """Write the pending line. Raises RunError if that fails, for example on a full disk."""
        if self.enabled and self._line:
            line, self._line, path = self._line, {}, self.run.metrics
            finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
            try:
                self._metrics.write((json.dumps(finite) + "\n").encode())
                # A signal came between this step and the validation after it: merge the two lines.
                if line["step"] == self._begun_at:
                    self._metrics.close()
                    self._metrics = _cut_back_metrics(path, self._begun_at)
            except OSError as error:
                raise RunError(f"{path} could not be written: {error}; make room, then --resume") from error
            self._trackers.log(finite)

    def sample(self, model: GPTModel, step: int) -> None:
        """Continue the run's prompts, show and keep what comes; a failure is no reason to stop training."""
        try:
            samples = continue_prompts(self.run, model, step)
            keep_samples(self.run, step, samples)
        except Exception as error:
            self.say(f"Warning: no samples after step {step:,}: {type(error).__name__}: {error}")
            return
        for each in samples:
            self.say(one_line(f"step {step:,}: {each['prompt']}{each['text']}"))

    def step(self, step: int, values: dict[str, float], *, step_seconds: float) -> None:
        """Log a finished training step (`values` has at least train_loss) and show the progress."""
        if not self.enabled:
            return
        self._timed += 1
        weight = max(0.05, 1 / self._timed)  # at first a plain mean, because the first step is slow
        batch_seconds = step_seconds / (self.plan.batches(step) - self.plan.batches(step - 1))
        self.batch_seconds = (1 - weight) * (self.batch_seconds or 0.0) + weight * batch_seconds
        speed = self.plan.tokens_per_batch / max(batch_seconds, 1e-9)
        loss = values["train_loss"]
        self.loss = loss if math.isfinite(loss) else None
        self.log(step, {**values, "tokens_per_second": round(speed, 1), **self._mfu(speed)})
        self._bar.update(step - self._bar.n)
        if self._timed == SETTLED_STEPS:
            speed, compiled = self.tokens_per_second, self._compiled
            if line := slower_than_planned(self.run, self._device_name, speed, compiled=compiled):
                self.say(line)
        expected = self.cost(self._eta(step))
        cost = "" if expected is None else f", ${self.cost():.2f} of ${expected:.2f}"
        mfu = "".join(f", {share:.0%} MFU" for share in self._mfu(self.tokens_per_second).values())
        text = f"loss {loss:.3f}, {self.tokens_per_second:,.0f} tokens/s{mfu}{cost}"
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
        """Average over the last steps, without validation and checkpoints."""
        return self.plan.tokens_per_batch / self.batch_seconds if self.batch_seconds else None

    def _mfu(self, tokens_per_second: float | None) -> dict[str, float]:
        """Model FLOPs utilization, a share of the devices' peak rate, as `mfu`; empty if that is unknown."""
        if self._peak is None or tokens_per_second is None:
            return {}
        flops = tokens_per_second * self._flops_per_token
        return {"mfu": round(flops / (self._peak * self.plan.processes), 4)}

    def _eta(self, step: int) -> float:
        """Seconds until the last step, from the average so far."""
        left = self.plan.batches(self.plan.steps) - self.plan.batches(step)
        return left * (self.batch_seconds or 0.0)

    def status(self, status: str, step: int, **more: Any) -> None:
        """Replace status.json; a failure to write it is only a warning."""
        if not self.enabled:
            return
        values = {
            "status": status,
            "step": step,
            "total_steps": self.plan.steps,
            "tokens": self.plan.tokens(step),
            "loss": self.loss,
            "tokens_per_second": self.tokens_per_second,
            **self._mfu(self.tokens_per_second),
            "eta_seconds": 0.0 if status == "finished" else self._eta(step),
            "seconds": self.seconds(),
            "paid_seconds": self.paid_seconds(),
            "cost_usd": self.cost(),
            "expected_cost_usd": self.cost(0.0 if status == "finished" else self._eta(step)),
            "checkpoint": self.checkpoint,
            "device": self._device_name,
            "device_gib": machines.device_memory_gib(),
            "processes": self.plan.processes,
            "microbatch_size": self.plan.microbatch_size,
            "pid": os.getpid(),
            "launchers": self.run.launchers,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        try:
            replace_text(self.run.directory / "status.json", json.dumps(values, indent=1))
        except OSError as error:
            self.say(f"Warning: status.json could not be written: {error}")

    def chart(self, *, final: bool = False) -> None:
        """Redraw the chart; one that cannot be drawn is no reason to stop training.

        Before the last time, only when there are steps to draw and drawing takes less than 1% of the time
        since it was drawn before.
        """
        start = time.monotonic()
        due = self._timed > 0 and start - self._last_chart > 100 * self._chart_seconds
        if not self.enabled or not (final or due):
            return
        self.flush()
        try:
            folder = self.run.directory
            run_chart.draw_chart(self.run.metrics, folder / "training-run-chart.png", folder.name)
        except Exception as error:
            self.say(f"Warning: the chart could not be drawn: {type(error).__name__}: {error}")
        self._last_chart = time.monotonic()
        self._chart_seconds = self._last_chart - start

    def finish(self, step: int, train_loss: float | None, val_loss: float | None) -> None:
        """Draw the chart, write the last status, and say how the run ended."""
        self.chart(final=True)
        seconds, tokens = self.seconds(), self.plan.tokens(step)
        self.close("finished", step)
        self.say(f"Training complete in {seconds:,.3f} seconds")
        self.say(f"Tokens seen: {tokens:,}")
        self.say(f"Throughput: {tokens / seconds:,.0f} tokens/second")
        for name, loss in (("train", train_loss), ("val", val_loss)):
            self.say(f"Final {name} loss: " + ("not measured" if loss is None else f"{loss:.3f}"))

    def close(self, status: str, step: int, **more: Any) -> None:
        """Write the last status and close the bar and the files."""
        self.flush()
        self.status(status, step, **more)
        if self.enabled:
            self._bar.close()
            self._metrics.close()
            self._trackers.close(status)


def complete_status(run: Run, last: dict[str, Any], checkpoint: str) -> None:
    """Draw the chart and write the status of a run that was killed just before this; `last` is the meta.json
    of its last checkpoint."""
    if read_status(run.directory).get("status") != "finished":
        step = last["global_step"]
        reporter = Reporter(run, step, last["seconds"], enabled=True)
        reporter.loss, reporter.checkpoint = last["train_loss"], checkpoint
        reporter.chart(final=True)
        reporter.close("finished", step)


def _cut_back_metrics(path: Path, step: int) -> BinaryIO:
    """Open metrics.jsonl for appending after `step`; lines of later steps, to be repeated, are dropped."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in kept), durable=True)
    return path.open("ab", buffering=0)
