"""The token files of a data set: their names, and reading several of them as one.

A split is one file, train.safetensors, or several, train-00000-of-00003.safetensors and so on, each with one
1-D uint16 tensor named `tokens`. The last token of a file is followed by the first of the next, so documents
and sequences may begin in one and end in another.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from basemodel.common.errors import InputError
from basemodel.common.files import refuse_stand_in
from basemodel.common.json_config import read_json_object
from basemodel.common.names import META

# What the names of all token files match.
PATTERNS = [f"{split}{part}.safetensors" for split in ("train", "validation") for part in ("", "-*-of-*")]


def split_names(split: str, count: int) -> list[str]:
    """The names of the `count` files of a split, in order."""
    return [f"{split}.safetensors"] if count == 1 else _numbered(split, count)


def _numbered(split: str, count: int) -> list[str]:
    return [f"{split}-{index:05d}-of-{count:05d}.safetensors" for index in range(count)]


def whole_set(listed: Iterable[str], split: str, where: object) -> list[str]:
    """The names of all files of the split, in order, if at least one of them is `listed`; otherwise [].
    Raises InputError, which names the place `where` they are, if the listed files do not belong together."""
    pattern = re.compile(rf"{split}(-\d{{5,}}-of-(\d{{5,}}))?\.safetensors")
    present = sorted(name for name in listed if pattern.fullmatch(name))
    if not present:
        return []
    count = pattern.fullmatch(present[0])[2]
    names = _numbered(split, int(count)) if count else split_names(split, 1)
    if not set(present) <= set(names):
        found = f"{present[0]} to {present[-1]}"
        raise InputError(f"{where}: {found} are not one set numbered from 00000; move strays away")
    return names


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, in order, with those still missing; a single one if none is there.
    Raises InputError if the files there do not belong together."""
    listed = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in whole_set(listed, split, folder) or split_names(split, 1)]


def as_one_path(files: list[Path]) -> str:
    """A split's files as one path: FOLDER/train.safetensors, or FOLDER/train-*-of-00003.safetensors."""
    first = files[0]
    return str(first.with_name(first.name.replace("-00000-", "-*-")))


def read_meta(folder: Path) -> dict[str, Any]:
    """What a data set's meta.json says; empty without one. Raises InputError if it is malformed."""
    return read_json_object(folder / META) if (folder / META).exists() else {}


class TokenFile:
    """The 1-D uint16 tensor `tokens` of a safetensors file, memory-mapped: all processes share one copy.
    Raises InputError if the file is missing, damaged, or holds anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            refuse_stand_in(path)
            file = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            if not path.exists():
                raise InputError(f"{path}: no such file") from None
            raise InputError(f"{path}: damaged or not safetensors ({error}); fetch or prepare it") from None
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        layout = {name: (tensor.get_dtype(), len(tensor.get_shape())) for name, tensor in tensors.items()}
        if layout != {"tokens": ("U16", 1)}:
            raise InputError(f"{path}: must contain one 1-D uint16 tensor named 'tokens', not {layout}")
        self._tokens = tensors["tokens"]
        self.count: int = self._tokens.get_shape()[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, copied into a new uint16 array."""
        return self._tokens[start:stop]

    def check_vocabulary(self, start: int, stop: int, vocab_size: int) -> None:
        """Raise InputError, with index and value, if a token in [start, stop) is not below `vocab_size`."""
        chunk = 1 << 24
        for first in range(start, stop if vocab_size < 65_536 else start, chunk):
            tokens = self.read(first, min(first + chunk, stop))
            if tokens.max() >= vocab_size:
                index = int((tokens >= vocab_size).argmax())
                raise InputError(
                    f"{self.path}: token {tokens[index]} at index {first + index} is outside the model's "
                    f"vocabulary of {vocab_size}; was the data set made with another tokenizer?"
                )


class TokenFiles:
    """The tokens of a split, in one or more files. Raises InputError as `split_files` and TokenFile do."""

    def __init__(self, folder: Path, split: str) -> None:
        paths = split_files(folder, split)
        self._name = as_one_path(paths)
        # safetensors does not slice an empty tensor.
        self._files = [file for file in map(TokenFile, paths) if file.count]
        # Where each file begins in the whole.
        *self._starts, self.count = accumulate((file.count for file in self._files), initial=0)

    def __str__(self) -> str:
        return self._name

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, copied into a new uint16 array."""
        return np.concatenate([file.read(*place) for file, *place in self._places(start, stop)])

    def check_vocabulary(self, start: int, stop: int, vocab_size: int) -> None:
        """Raise InputError, with file and index, if a token in [start, stop) is not below `vocab_size`."""
        for file, first, last in self._places(start, stop):
            file.check_vocabulary(first, last, vocab_size)

    def _places(self, start: int, stop: int) -> Iterator[tuple[TokenFile, int, int]]:
        """The files that hold tokens start to stop - 1, and the range in each."""
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            file, begins = self._files[index], self._starts[index]
            end = min(stop, begins + file.count)
            yield file, start - begins, end - begins
            start, index = end, index + 1
