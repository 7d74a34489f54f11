"""The values of metrics.jsonl in TensorBoard, Weights & Biases and Trackio (extra [log]).

A tracker that fails never stops training: it is dropped with a warning. When the run is resumed, W&B and
Trackio catch up from metrics.jsonl.
"""

import dataclasses
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.files import replace_text
from basemodel.training.run import Run
from basemodel.training.run_folder import read_metrics

PROJECT = "ddp-base-model"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
START_SECONDS = float(os.environ.get("WANDB_INIT_TIMEOUT", 30))
CLOSE_SECONDS = 20.0  # a server may not answer, and torchrun kills 30 s after SIGTERM
Line = dict[str, Any]  # of metrics.jsonl


def require_packages(names: Iterable[str]) -> None:
    """Raise InputError for a tracker whose package is not installed."""
    for name in names:
        if not getattr(importlib.util.find_spec(name), "origin", None):  # a folder with that name has none
            raise InputError(f"report_to: {name} is not installed; pip install -e '.[log]', or leave it out")


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, run: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.directory / "tensorboard"
        # As in each tracker, the last step that it has from before the run was resumed.
        self.last = step - 1 if folder.exists() else -1
        self._writer = SummaryWriter(folder, purge_step=self.last + 1)  # hides steps that will be repeated

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a step to disk, so that no later checkpoint outlives them."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run; offline, in the run's folder wandb/, without credentials or if WANDB_MODE says so.

    Each start of an offline run creates a new folder with all values from the first step on, so that
    `wandb sync` of the newest one uploads the whole run.
    """

    def __init__(self, run: Run, step: int) -> None:
        import wandb

        mode = None
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            mode = "offline"  # instead of prompting for a key when nobody may be there
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run_id(run.directory),
            resume="allow",
            dir=run.directory,
            mode=mode,
            config=settings_of(run),
            settings=wandb.Settings(console="off", init_timeout=START_SECONDS),
        )
        self._teardown = wandb.teardown
        self.last = self._run.starting_step - 1

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step, commit=True)

    def close(self, *, failed: bool) -> None:
        """Wait for the upload, and until W&B's own process has written its files."""
        self._run.finish(exit_code=int(failed))
        self._teardown()


class Trackio:
    """One Trackio run, in its local database or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL points."""

    def __init__(self, run: Run, step: int) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.name}-{run_id(run.directory)}",
            resume="allow",
            config=settings_of(run),
            embed=False,
        )
        self.last = self._run._next_step - 1

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def run_id(folder: Path) -> str:
    """A run's id in its trackers: the same after a resume, a new one after a start from scratch."""
    path = folder / "trackers.json"
    if not path.exists():
        replace_text(path, json.dumps({"id": secrets.token_hex(4)}), durable=True)
    return json.loads(path.read_text(encoding="utf-8"))["id"]


def settings_of(run: Run) -> dict[str, Any]:
    """The values of the run's two JSON files, including defaults."""
    return dataclasses.asdict(run.model_config) | dataclasses.asdict(run.config)


class Trackers:
    """The trackers named in report_to. Each receives the values of each step once, whatever happens.

    A resumed run adds to the line of the step where it stopped, and trackers cannot take a step twice, so a
    line waits until the next one begins.
    """

    def __init__(self, run: Run, step: int, say: Callable[[str], None]) -> None:
        """`run` continues after `step` steps, where its metrics.jsonl ends; `say` reports failures."""
        self._say, self._waiting = say, Line()
        self._trackers: dict[str, TensorBoard | WeightsAndBiases | Trackio] = {}
        for name in run.config.report_to:
            with self._dropped_on_failure(name):
                self._trackers[name] = TRACKERS[name](run, step)
        for line in read_metrics(run.metrics) if self._trackers else []:
            self.log(line)

    def log(self, line: Line) -> None:
        """Take a line of metrics.jsonl, or more values for the previous line."""
        if self._waiting.get("step") != line["step"]:
            self._send()
        self._waiting |= line

    def close(self, status: str) -> None:
        """Send what is pending and wait for a while. A "preempted" run may still add to its last line."""
        if status != "preempted":
            self._send()
        threads, deadline = ThreadPoolExecutor(len(TRACKERS)), time.monotonic() + CLOSE_SECONDS
        failed, trackers = status == "failed", self._trackers.items()
        closing = {name: threads.submit(tracker.close, failed=failed) for name, tracker in trackers}
        for name, task in closing.items():
            with self._dropped_on_failure(name):
                task.result(deadline - time.monotonic())

    def _send(self) -> None:
        line, self._waiting = self._waiting, {}
        values = {key: value for key, value in line.items() if key != "step" and value is not None}
        for name, tracker in list(self._trackers.items()):
            if line and line["step"] > tracker.last:
                with self._dropped_on_failure(name):
                    tracker.log(line["step"], values)

    @contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"Warning: {name} gets no more values ({reason}); metrics.jsonl still does")
