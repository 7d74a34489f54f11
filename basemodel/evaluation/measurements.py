"""The test loss of a checkpoint, which test_loss.py measures and keeps beside it."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from basemodel.common.errors import InputError
from basemodel.common.files import replace_text
from basemodel.common.json_config import read_json_object

TEST_LOSS_FILE = "test-loss.json"


@dataclass(frozen=True)
class MeasuredLoss:
    """How well a model does on a slice of a data set. Loss in nats per token."""

    dataset: str
    split: str
    start_token: int
    tokens: int
    context_length: int
    loss: float
    perplexity: float
    standard_error: float | None  # of the loss, over sequences; None for a single sequence
    bits_per_byte: float | None  # None if the vocabulary is missing or the tokens encode no text
    measured: str  # when
    document_masking: bool = False
    windows: str = "sequences"  # or "harness windows", of documents

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.loss:.4f}{error}"

    def same_data(self, other: "MeasuredLoss") -> bool:
        """Whether both were measured on the same sequences."""
        keys = ("dataset", "split", "start_token", "tokens", "context_length", "document_masking", "windows")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


def read_test_loss(folder: Path) -> MeasuredLoss | None:
    """The test loss of the checkpoint in `folder`; None if there is none, or it is damaged."""
    try:
        return MeasuredLoss(**read_json_object(folder / TEST_LOSS_FILE))
    except (InputError, TypeError):
        return None


def write_test_loss(folder: Path, result: MeasuredLoss) -> None:
    """Keep a checkpoint's test loss beside it, atomically; if that fails, warn and go on."""
    try:
        replace_text(folder / TEST_LOSS_FILE, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    except OSError as error:
        print(f"Warning: {folder / TEST_LOSS_FILE} could not be written: {error.strerror}")


TASKS_FILE = "harness.json"


@dataclass(frozen=True)
class TaskResult:
    """How well a model does at a task, by one of the task's metrics."""

    task: str
    metric: str
    value: float
    standard_error: float | None  # None for a metric without one, or a single document
    higher_is_better: bool | None
    documents: int  # how many were answered
    limit: int | None  # of documents; None: all
    fewshot: int  # solved examples before each question
    group: str | None  # the group of tasks whose own result includes this one
    version: str  # the task's
    harness: str  # the library's version
    measured: str  # when

    def __str__(self) -> str:
        return with_error(self.value, self.standard_error)

    @property
    def setting(self) -> str:
        """What makes the figure another one than that of the whole task, zero-shot; empty if nothing does."""
        how = [f"{self.fewshot}-shot"] * bool(self.fewshot)
        how += [f"first {self.documents:,} documents"] * (self.limit is not None)
        return f" ({', '.join(how)})" if how else ""

    @property
    def title(self) -> str:
        """Task, metric and setting, in words."""
        return f"{self.task} {self.metric}{self.setting}"


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A figure with its standard error, if there is one. `sign`: "+" to show that of positive values too."""
    form = ".4f" if abs(value) < 1000 else ",.0f"  # hopeless models have perplexities of billions
    return f"{value:{sign}{form}}" + ("" if error is None else f" ± {error:{form}}")


def read_task_results(folder: Path) -> list[TaskResult]:
    """The results kept in a checkpoint's `folder`; none if the file is missing or damaged."""
    try:
        kept = read_json_object(folder / TASKS_FILE)["results"]
        return [TaskResult(**result) for result in kept]
    except (InputError, KeyError, TypeError):
        return []


def keep_task_results(folder: Path, results: Iterable[TaskResult]) -> None:
    """Add results to those kept in `folder`, atomically, in place of earlier ones with the same title; if
    that fails, warn and go on."""
    kept = {result.title: result for result in (*read_task_results(folder), *results)}
    text = json.dumps({"results": [dataclasses.asdict(result) for result in kept.values()]}, indent=1)
    try:
        replace_text(folder / TASKS_FILE, text + "\n")
    except OSError as error:
        print(f"Warning: {folder / TASKS_FILE} could not be written: {error.strerror}")


def headlines(results: Iterable[TaskResult]) -> list[TaskResult]:
    """One result for each task or group: accuracy, normalized by the answers' lengths if the task has that,
    else the task's first metric. Tasks inside a group, and all but the whole task, are left out."""
    first: dict[tuple[str, int], TaskResult] = {}
    for result in results:
        if result.group is None and result.limit is None:
            key = (result.task, result.fewshot)
            best = first.setdefault(key, result)
            ranks = {"acc_norm": 0, "acc": 1}
            if ranks.get(result.metric, 2) < ranks.get(best.metric, 2):
                first[key] = result
    return list(first.values())
