"""The test loss of a checkpoint, which test_loss.py measures and keeps beside it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from basemodel.errors import InputError
from basemodel.files import replace_text
from basemodel.json_config import read_json_object

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
