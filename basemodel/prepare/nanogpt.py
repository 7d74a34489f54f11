"""nanoGPT's token files: train.bin and val.bin, raw uint16 tokens with end-of-text between documents."""

from pathlib import Path

import numpy as np
import tiktoken

from basemodel.common.errors import InputError
from basemodel.data.tokenizer import token_byte_lengths
from basemodel.prepare.assemble import Layout, text_bytes

BINS = {"train": "train.bin", "validation": "val.bin"}


def lay_out_bins(source: Path, tokenizer: tiktoken.Encoding) -> Layout:
    """Each split's size and tokens. Raises InputError if the files do not hold this tokenizer's tokens."""
    if (source / "meta.pkl").exists():
        raise InputError(
            f"{source}: meta.pkl says that its tokens are nanoGPT's own for single characters; prepare its "
            "input.txt with --tokenizer bytes"
        )
    layout: Layout = {}
    for split, name in BINS.items():
        path = source / name
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % 2:
            raise InputError(f"{path}: {'damaged: not a whole number of uint16' if size else 'is missing'}")
        segment = (path, 0, size // 2)
        layout[split] = ([_documents(path, tokenizer), size // 2, 0], [segment])
        layout[split][0][2] = text_bytes([segment], token_byte_lengths(tokenizer))
    return layout


def _documents(path: Path, tokenizer: tiktoken.Encoding) -> int:
    """How many documents a file holds. Raises InputError for a token outside the vocabulary."""
    tokens, chunk, ends = np.memmap(path, "<u2", "r"), 1 << 22, 0
    for start in range(0, len(tokens), chunk):
        some = tokens[start : start + chunk]
        if some.max() >= tokenizer.n_vocab:
            index = int((some >= tokenizer.n_vocab).argmax())
            raise InputError(
                f"{path}: token {some[index]} at index {start + index} is outside the vocabulary of "
                f"{tokenizer.n_vocab} of --tokenizer {tokenizer.name}"
            )
        ends += int((some == tokenizer.eot_token).sum())
    return ends + int(tokens[-1] != tokenizer.eot_token)
