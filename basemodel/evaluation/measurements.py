"""Results of evaluations, which are kept beside a checkpoint: its test loss and its scores on tasks."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.files import replace_text
from basemodel.common.json_config import read_json_object
from basemodel.common.output import warned

TEST_LOSS_FILE = "test-loss.json"
TASKS_FILE = "harness.json"


def pair_models(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The models of a command line, MODEL_JSON MODEL_SAFETENSORS each. Raises InputError for half a pair."""
    if len(paths) % 2:
        raise InputError(f"models come in pairs, MODEL_JSON MODEL_SAFETENSORS; {paths[-1]} has no partner")
    return list(zip(paths[::2], paths[1::2], strict=True))


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

    def __str__(self) -> str:
        return with_error(self.loss, self.standard_error)


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
        """What makes this differ from the whole task, zero-shot; empty if nothing does."""
        parts = [f"{self.fewshot}-shot"] * bool(self.fewshot)
        parts += [f"first {self.documents:,} documents"] * (self.limit is not None)
        return f" ({', '.join(parts)})" if parts else ""

    @property
    def title(self) -> str:
        """Task, metric and setting, in words."""
        return f"{self.task} {self.metric}{self.setting}"


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """A value with its standard error, if there is one; `sign`: "+" shows the sign of positive values too."""
    form = ".4f" if abs(value) < 1000 else ",.0f"  # hopeless models have perplexities of billions
    return f"{value:{sign}{form}}" + ("" if error is None else f" ± {error:{form}}")


def read_test_loss(folder: Path) -> MeasuredLoss | None:
    """The test loss of the checkpoint in `folder`; None if it is missing or damaged."""
    try:
        values = read_json_object(folder / TEST_LOSS_FILE)
        if values.pop("windows", "sequences") != "sequences":  # earlier versions could score documents
            return None
        return MeasuredLoss(**values)
    except (InputError, TypeError):
        return None


def write_test_loss(folder: Path, result: MeasuredLoss) -> None:
    """Keep a checkpoint's test loss beside it."""
    _write(folder / TEST_LOSS_FILE, asdict(result))


def read_task_results(folder: Path) -> list[TaskResult]:
    """The results kept beside the checkpoint in `folder`; none if the file is missing or damaged."""
    try:
        return [TaskResult(**result) for result in read_json_object(folder / TASKS_FILE)["results"]]
    except (InputError, KeyError, TypeError):
        return []


def add_task_results(folder: Path, results: Iterable[TaskResult]) -> None:
    """Add results to those kept in `folder`, in place of earlier ones with the same title."""
    by_title = {result.title: result for result in (*read_task_results(folder), *results)}
    _write(folder / TASKS_FILE, {"results": [asdict(result) for result in by_title.values()]})


def _write(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file atomically; if that fails, warn: the result has been printed anyway."""
    with warned(f"write {path}"):
        replace_text(path, json.dumps(values, indent=1) + "\n")


def headlines(results: Iterable[TaskResult]) -> list[TaskResult]:
    """One result for each whole task or group: accuracy, normalized by the answers' lengths where the task
    has it, else the task's first metric. Tasks inside a group are left out."""
    ranks = {"acc_norm": 0, "acc": 1}
    best: dict[tuple[str, int], TaskResult] = {}
    for result in results:
        if result.group is None and result.limit is None:
            rival = best.setdefault((result.task, result.fewshot), result)
            if ranks.get(result.metric, 2) < ranks.get(rival.metric, 2):
                best[result.task, result.fewshot] = result
    return list(best.values())


class AnswerCache:
    """Answers by key, one JSON line each in the file at `path`."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, Any] = {}
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        text = self._file.read()
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, after a kill
                entry = json.loads(line)
                self.answers[entry["key"]] = entry["reply"]
        if text and not text.endswith(b"\n"):
            self._file.write(b"\n")

    def add(self, answers: dict[str, Any]) -> None:
        """Keep answers; they are on disk when this returns. It is a single write, so threads need no lock."""
        self.answers |= answers
        lines = [json.dumps({"key": key, "reply": answer}) + "\n" for key, answer in answers.items()]
        self._file.write("".join(lines).encode())
        os.fsync(self._file.fileno())


def key_of(question: Any) -> str:
    """The key of a question that JSON can express: its SHA-256."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
