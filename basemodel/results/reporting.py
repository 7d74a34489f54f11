"""What a run reports while it trains: metrics.jsonl, status.json, a progress line, samples and the chart."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, BinaryIO

from tqdm import tqdm

from basemodel.common.files import replace_text
from basemodel.common.names import CHART, METRICS, SAMPLES, STATUS
from basemodel.common.output import LINE_SECONDS, one_line, warned
from basemodel.planning import machines
from basemodel.planning.estimate import slower_than_planned
from basemodel.results import run_chart
from basemodel.results.trackers import Trackers, require_packages
from basemodel.training.budget import Clock
from basemodel.training.run import Run
from basemodel.training.run_folder import read_metrics, read_samples, read_status
from gpt import GPTModel

STATUS_SECONDS = 5.0  # between updates of status.json
ENOUGH_STEPS = 100  # after which the speed is compared with the estimate
# The same samples as `test_smoke.py --tokens 50 --seed RANDOM_SEED` draws from a checkpoint.
SAMPLE_TOKENS = 50
TEMPERATURE, TOP_K = 1.0, 25


def check_reporting(run: Run) -> None:
    """Raise InputError if samples or trackers that the config asks for would fail later."""
    shape = run.model_config
    # A data set's own tokenizer encodes any prompt, and `open_data` checks that it exists.
    if run.config.sample_interval is not None and shape.tokenizer != "dataset":
        from basemodel.data.tokenizer import get_tokenizer
        from basemodel.model.generation import encode_prompts

        encode_prompts(get_tokenizer(shape.tokenizer), run.config.sample_prompts, shape.vocab_size)
    require_packages(run.config.report_to)


def continue_prompts(run: Run, model: GPTModel, step: int) -> list[dict[str, Any]]:
    """Continue the run's prompts after `step` steps; return the lines of samples.jsonl, one per prompt.
    Training is not affected: a twin with the same weights, never compiled and never in training mode, does
    the computing, and the random numbers come from a separate generator."""
    from basemodel.data.tokenizer import get_tokenizer
    from basemodel.model.generation import Sampling, continuations, random_generator

    twin = GPTModel.outline(model.config).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    sampling = Sampling(TEMPERATURE, TOP_K, random_generator(model, run.config.random_seed))
    tokenizer, prompts = get_tokenizer(model.config.tokenizer, run.data.folder), run.config.sample_prompts
    texts = continuations(twin, tokenizer, prompts, SAMPLE_TOKENS, sampling)
    seen = {"step": step, "tokens": run.plan.tokens(step)}
    return [{**seen, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def keep_samples(run: Run, step: int, samples: list[dict[str, Any]]) -> None:
    """Replace the lines of samples.jsonl for `step` and later steps, which a resumed run repeats."""
    lines = [line for line in read_samples(run.samples) if line["step"] < step] + samples
    replace_text(run.samples, "".join(json.dumps(line) + "\n" for line in lines), durable=True)


class MetricsLog:
    """Writes metrics.jsonl, a line per step, and sends the same values to the trackers."""

    def __init__(self, run: Run, step: int) -> None:
        """Continue after `step` steps; lines of later steps, which will be repeated, are dropped."""
        self._run, self._begun_at = run, step
        self._line: dict[str, Any] = {}  # of the newest step; more values may follow
        self._unwritten = b""  # what the disk has not taken
        self._file: BinaryIO | None = None
        with warned(f"open {METRICS}"):
            self._open()
        self._trackers = Trackers(run, step, say)

    def _open(self) -> None:
        path = self._run.metrics
        lines = [line for line in read_metrics(path) if line["step"] <= self._begun_at]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in lines), durable=True)
        self._file = path.open("ab", buffering=0)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add `values` to the line of `step`, which is written once the next step begins."""
        if self._line.get("step") != step:
            self.flush()
            self._line = {"step": step, "tokens": self._run.plan.tokens(step)}
        self._line |= values

    def flush(self) -> None:
        """Write the line and what could not be written before; a failure is only a warning."""
        line, self._line = self._line, {}
        finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
        if line:
            self._unwritten += (json.dumps(finite) + "\n").encode()
        with warned(f"write {METRICS}"):
            if self._file is None:
                self._open()
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            # A signal arrived between this step and its validation: merge the two lines.
            if line.get("step") == self._begun_at:
                self._open()
        if line:
            self._trackers.log(finite)

    def close(self, status: str) -> None:
        self.flush()
        with warned(f"close {METRICS}"):
            if self._file is not None:
                self._file.close()
        self._trackers.close(status)


class StatusFile:
    """status.json: how far the run has come, how fast, and at what cost."""

    def __init__(self, run: Run, clock: Clock, device_name: str) -> None:
        self._run, self._clock, self._device = run, clock, device_name
        self.loss: float | None = None
        self.checkpoint: str | None = None  # the last one on disk
        self.compile_problem: str | None = None
        self._peak = machines.peak_flops(device_name)
        self._written = 0.0

    def mfu(self, tokens_per_second: float | None) -> dict[str, float]:
        """Model FLOPs utilization as {"mfu": share of the peak}; empty if the devices' peak is unknown."""
        if self._peak is None or tokens_per_second is None:
            return {}
        flops = tokens_per_second * self._run.model_config.flops_per_token
        return {"mfu": round(flops / (self._peak * self._run.plan.processes), 4)}

    def refresh(self, step: int) -> None:
        """Replace the file if it is older than STATUS_SECONDS."""
        if time.monotonic() - self._written > STATUS_SECONDS:
            self.write("running", step)

    def write(self, status: str, step: int, error: str | None = None) -> None:
        """Replace the file; a failure is only a warning."""
        run, clock, self._written = self._run, self._clock, time.monotonic()
        eta = 0.0 if status == "finished" else clock.eta(step)
        values = {
            "status": status,
            "step": step,
            "total_steps": run.plan.steps,
            "tokens": run.plan.tokens(step),
            "loss": self.loss,
            "tokens_per_second": clock.tokens_per_second,
            **self.mfu(clock.tokens_per_second),
            "eta_seconds": eta,
            "seconds": clock.seconds(),
            "paid_seconds": clock.paid_seconds(),
            "cost_usd": clock.cost(),
            "expected_cost_usd": clock.cost(eta),
            "checkpoint": self.checkpoint,
            "device": self._device,
            "device_gib": machines.device_memory_gib(),
            "processes": run.plan.processes,
            "microbatch_size": run.plan.microbatch_size,
            "pid": os.getpid(),
            "launchers": run.launchers,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            **({} if error is None else {"error": error}),
            **({"compile_problem": self.compile_problem} if self.compile_problem else {}),
        }
        with warned(f"write {STATUS}"):
            replace_text(run.directory / STATUS, json.dumps(values, indent=1))


class ProgressLine:
    """Loss, speed, MFU and cost: next to a bar on a terminal, else as a line every LINE_SECONDS."""

    def __init__(self, run: Run, clock: Clock, step: int) -> None:
        self._run, self._clock, self._printed = run, clock, 0.0
        options = {"unit": "step", "disable": None, "dynamic_ncols": True}  # None: if not a terminal
        self._bar = tqdm(total=run.plan.steps, initial=step, **options)

    def show(self, step: int, loss: float, mfu: dict[str, float]) -> None:
        """Show the progress after `step` steps."""
        clock, eta, total, now = self._clock, self._clock.eta(step), self._run.plan.steps, time.monotonic()
        expected = clock.cost(eta)
        text = f"loss {loss:.3f}, {clock.tokens_per_second:,.0f} tokens/s"
        text += "".join(f", {share:.0%} MFU" for share in mfu.values())
        text += "" if expected is None else f", ${clock.cost():.2f} of ${expected:.2f}"
        if not self._bar.disable:
            self._bar.total = total  # a budget may have moved the end
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._printed > LINE_SECONDS:
            self._printed = now
            line = f"step {step:,}/{total:,}: {text}, ETA {tqdm.format_interval(eta)}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()


class Reporter:
    """Everything that the first process reports about a run, and when."""

    def __init__(
        self, run: Run, clock: Clock, step: int, device_name: str, compile_problem: str | None = None
    ) -> None:
        """`compile_problem`: why torch.compile failed, if it did."""
        self.run, self.clock, self._device = run, clock, device_name
        self.metrics = MetricsLog(run, step)
        self.status = StatusFile(run, clock, device_name)
        self.status.compile_problem = compile_problem
        self.progress = ProgressLine(run, clock, step)
        self._last_chart = 0.0
        if run.samples.exists():
            with warned(f"rewrite {SAMPLES}"):
                keep_samples(run, step + 1, [])
        self.status.write("running", step)

    def say(self, line: str) -> None:
        say(line)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.metrics.add(step, values | {"seconds": round(self.clock.seconds(), 3)})

    def step(self, step: int, values: dict[str, float], tokens_per_second: float) -> None:
        """Log a finished training step (`values` has at least train_loss) and show the progress."""
        loss, average = values["train_loss"], self.clock.tokens_per_second
        self.status.loss = loss if math.isfinite(loss) else None
        speed = {"tokens_per_second": round(tokens_per_second, 1), **self.status.mfu(tokens_per_second)}
        self.log(step, values | speed)
        self.progress.show(step, loss, self.status.mfu(average))
        self.status.refresh(step)
        if self.clock.steps == ENOUGH_STEPS:
            compiled = self.status.compile_problem is None
            warning = slower_than_planned(self.run, self._device, average, compiled=compiled)
            if warning:
                say(warning)

    def flush(self) -> None:
        self.metrics.flush()

    def saved(self, checkpoint: str | None) -> None:
        self.status.checkpoint = checkpoint

    def sample(self, model: GPTModel, step: int) -> None:
        """Continue the run's prompts, show and save the samples; a failure never stops training."""
        with warned(f"continue the prompts after step {step:,}", Exception):
            samples = continue_prompts(self.run, model, step)
            keep_samples(self.run, step, samples)
            for sample in samples:
                say(one_line(f"step {step:,}: {sample['prompt']}{sample['text']}"))

    def chart(self, *, final: bool = False) -> None:
        """Redraw the chart; a failure never stops training. Unless `final`, draw only if there are steps to
        draw and drawing takes less than 1% of the time since the last chart."""
        idle = time.monotonic() - self._last_chart
        due = self.clock.steps > 0 and idle > 100 * self.clock.pauses["chart"]
        if not (final or due):
            return
        self.metrics.flush()
        with self.clock.pause("chart"), warned("draw the chart", Exception):
            run_chart.draw_chart(self.run.metrics, self.run.directory / CHART, self.run.name)
        self._last_chart = time.monotonic()

    def finish(self, step: int, train_loss: float | None, val_loss: float | None) -> None:
        """Draw the chart, write the final status, and print how the run ended."""
        self.chart(final=True)
        seconds, tokens = self.clock.seconds(), self.run.plan.tokens(step)
        self.close("finished", step)
        if self.status.compile_problem:
            say(f"Trained without torch.compile, which failed: {self.status.compile_problem}")
        say(f"Training complete in {seconds:,.3f} seconds")
        say(f"Tokens seen: {tokens:,}")
        say(f"Throughput: {tokens / seconds:,.0f} tokens/second")
        for name, loss in (("train", train_loss), ("val", val_loss)):
            say(f"Final {name} loss: " + ("not measured" if loss is None else f"{loss:.3f}"))

    def close(self, status: str, step: int, error: str | None = None) -> None:
        """Write the final status and close the progress line and the files."""
        self.metrics.flush()
        self.status.write(status, step, error)
        self.progress.close()
        self.metrics.close(status)


class NoReporter:
    """The reporter of every process but the first: each method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def say(line: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


def complete_status(run: Run, last: dict[str, Any], checkpoint: str) -> None:
    """Draw the chart and write the status for a run that was killed just before it did so itself; `last` is
    the meta.json of its last checkpoint."""
    if read_status(run.directory).get("status") != "finished":
        step = last["global_step"]
        reporter = Reporter(run, Clock(run, step, last["seconds"]), step, last["device"])
        reporter.status.loss, reporter.status.checkpoint = last["train_loss"], checkpoint
        reporter.chart(final=True)
        reporter.close("finished", step)
