"""Sequences of tokens, as training and evaluation read them.

A data set is a folder DATASETS_DIR/OWNER/NAME with the tokens of two splits, train and validation: documents
one after another, each followed by the end-of-text token. It comes from the Hub or from prepare_datasets.py.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from basemodel.common.errors import InputError
from basemodel.data.token_files import TokenFiles, read_meta
from basemodel.model.config import GPTConfig


@dataclass(frozen=True)
class Sequences:
    """A split's tokens cut into sequences of `length` inputs and the token that follows: `length` + 1 tokens.

    Sequence i starts at token start + i * length, and `count` of them fit. Numbers from `count` on belong to
    later epochs. Epoch 0 is in file order; each later one is shuffled by the seed and the epoch number.
    """

    tokens: TokenFiles
    start: int
    length: int
    seed: int

    @property
    def count(self) -> int:
        """Complete sequences per epoch; the last one's targets end at or before the last token."""
        return max(0, (self.tokens.count - self.start - 1) // self.length)

    def read(self, first: int, count: int) -> Tensor:
        """Sequences first to first + count - 1: uint16, (count, length + 1)."""
        starts = (self.start + self._index(number) * self.length for number in range(first, first + count))
        return torch.from_numpy(np.stack([self.tokens.read(at, at + self.length + 1) for at in starts]))

    def _index(self, number: int) -> int:
        epoch, place = divmod(number, self.count)
        return place if epoch == 0 else int(_epoch_order(self.seed, epoch, self.count)[place])


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(np.arange(count, dtype=np.uint32))


def to_device(sequences: Tensor, device: torch.device) -> Tensor:
    """Move uint16 sequences to the device and widen them there; on CUDA without waiting for the copy."""
    if device.type == "cuda":
        sequences = sequences.pin_memory()
    return sequences.to(device, non_blocking=True).to(torch.int64)


def match_tokenizer(folder: Path, model: GPTConfig) -> GPTConfig:
    """The model's config, with the end-of-text token of a data set's own tokenizer. Raises InputError if the
    data set was made with another tokenizer than the model's, or one with more tokens."""
    meta = read_meta(folder)
    name, vocab_size = meta.get("tokenizer", model.tokenizer), meta.get("vocab_size", 0)
    if name != model.tokenizer:
        is_own = model.tokenizer == "dataset"
        option = f"--train-tokenizer {model.vocab_size}" if is_own else f"--tokenizer {model.tokenizer}"
        raise InputError(
            f"{folder}: its tokenizer is '{name}', the model's '{model.tokenizer}'; set tokenizer to "
            f"'{name}' and vocab_size to {vocab_size} in model.json, or prepare the text again with {option}"
        )
    end_of_text = model.end_of_text_id
    if model.tokenizer == "dataset":
        from basemodel.data.tokenizer import get_tokenizer  # with tiktoken, which nothing else here needs

        tokenizer = get_tokenizer("dataset", folder)
        vocab_size, end_of_text = tokenizer.n_vocab, tokenizer.eot_token
    if isinstance(vocab_size, int) and vocab_size > model.vocab_size:
        problem = f"has a vocabulary of {vocab_size} tokens, the model only {model.vocab_size}"
        raise InputError(f"{folder}: {problem}; set vocab_size to {vocab_size}")
    if model.end_of_text_id not in (None, end_of_text):
        problem = f"its end-of-text token is {end_of_text}, the model's {model.end_of_text_id}"
        raise InputError(f"{folder}: {problem}; leave end_of_text_id out of model.json")
    return dataclasses.replace(model, end_of_text_id=end_of_text)
