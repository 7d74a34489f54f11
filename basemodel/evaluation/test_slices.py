"""What a test of a model's loss reads: a slice of a token file, as sequences or as documents in windows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from basemodel.data.sequences import Sequences
from basemodel.data.token_files import TokenFiles
from basemodel.model.loss import IGNORED


class Batch(NamedTuple):
    """Tokens for one forward pass, int64."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T), IGNORED where nothing is scored
    units: list[int]  # the sequence or document that each row belongs to


class ScoredSlice(Protocol):
    """The part of a token file that a test scores, in units that a standard error treats as independent."""

    def __str__(self) -> str:
        """What it is, for the reader of a result."""

    @property
    def sizes(self) -> Tensor:
        """The number of tokens scored in each unit, (units,), float64."""

    @property
    def rows(self) -> int:
        """The number of rows in all batches."""

    def scored(self) -> Iterator[np.ndarray]:
        """The tokens that are scored, in pieces."""

    def batches(self, size: int) -> Iterator[Batch]:
        """All that is to be scored, `size` rows at a time."""


@dataclass(frozen=True)
class SequenceSlice:
    """The first `count` sequences, each predicted from its own first token on, as in training."""

    sequences: Sequences
    count: int

    def __str__(self) -> str:
        return f"{self.count:,} sequences of {self.sequences.length:,} tokens"

    @property
    def sizes(self) -> Tensor:
        """(count,)."""
        return torch.full((self.count,), float(self.sequences.length), dtype=torch.float64)

    @property
    def rows(self) -> int:
        """One a sequence."""
        return self.count

    def scored(self) -> Iterator[np.ndarray]:
        """The targets of each sequence."""
        return (self.sequences.read(index, 1)[0, 1:].numpy() for index in range(self.count))

    def batches(self, size: int) -> Iterator[Batch]:
        """`size` sequences at a time."""
        for first in range(0, self.count, size):
            units = list(range(first, min(first + size, self.count)))
            tokens = self.sequences.read(first, len(units)).long()
            yield Batch(tokens[:, :-1], tokens[:, 1:], units)


@dataclass(frozen=True)
class DocumentSlice:
    """The documents that begin in tokens [start, stop), each in the windows of lm-evaluation-harness's
    `loglikelihood_rolling`.

    A document's first token is predicted from end-of-text. Windows of `length` tokens follow one another,
    each predicted from the token before it on; the tail is scored after as much text as fits before it.
    End-of-text itself is not scored.
    """

    tokens: TokenFiles
    start: int
    stop: int
    length: int
    end_of_text: int

    def __str__(self) -> str:
        size = f"{int(self.sizes.sum()):,} tokens"
        return f"{len(self.documents):,} documents of {size} in windows of {self.length:,}"

    @cached_property
    def documents(self) -> list[np.ndarray]:
        """Each document's tokens, without end-of-text; the last one may be cut off at `stop`."""
        before = max(0, self.start - 1)
        tokens = self.tokens.read(before, self.stop)
        ends = np.flatnonzero(tokens == self.end_of_text)
        pieces = np.split(tokens, ends)  # all but the first begin with end-of-text
        first = [pieces[0]] if self.start == 0 else []  # else, the rest of one that began before
        return [piece for piece in (*first, *(piece[1:] for piece in pieces[1:])) if len(piece)]

    @cached_property
    def sizes(self) -> Tensor:
        """(documents,)."""
        return torch.tensor([len(document) for document in self.documents], dtype=torch.float64)

    @property
    def rows(self) -> int:
        """One a window."""
        return sum(math.ceil(len(document) / self.length) for document in self.documents)

    def scored(self) -> Iterator[np.ndarray]:
        """All of each document."""
        return iter(self.documents)

    def batches(self, size: int) -> Iterator[Batch]:
        """`size` windows at a time, padded on the right, where causal attention does not see it."""
        waiting = []
        for unit, document in enumerate(self.documents):
            for window in self.windows(document):
                waiting.append((*window, unit))
                if len(waiting) == size:
                    yield self._batch(waiting)
                    waiting = []
        if waiting:
            yield self._batch(waiting)

    def windows(self, document: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of a document's windows, at most `length` tokens each."""
        text = torch.cat([torch.tensor([self.end_of_text]), torch.from_numpy(document.astype(np.int64))])
        for first in range(0, len(document), self.length):
            last = min(first + self.length, len(document))
            begin = max(0, last - self.length)  # before `first` in the tail
            targets = text[begin + 1 : last + 1].clone()
            targets[: first - begin] = IGNORED
            yield text[begin:last], targets

    @staticmethod
    def _batch(windows: list[tuple[Tensor, Tensor, int]]) -> Batch:
        inputs, targets, units = zip(*windows, strict=True)
        return Batch(
            pad_sequence(inputs, batch_first=True),
            pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            list(units),
        )
