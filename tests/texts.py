"""What the tests of prepared text share: texts, files of them, and the tokens that must come out."""

import hashlib
import itertools
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tiktoken
from helpers import run_script
from safetensors.numpy import load_file
from tiktoken_ext.openai_public import r50k_pat_str

# All that Python takes for white space, and characters of each kind that GPT-2's pattern tells apart.
EDGES = [*(chr(c) for c in range(0x3001) if chr(c).isspace()), *"as1'.,\u00e9\u4e2d"]
NASTY = [
    *EDGES,
    *("a", "B", "\u00e9", "\u4e2d\u6587", "1", "\u0663", "\u00bd"),
    *("'", "'s", "'S", "'ll", "\u2019", ".", "--"),
    *(" ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\0", "\x7f"),
    *("\u200b", "\ufeff", "\ufffd", "\u0301", "\ud55c", "\U0001f600", "\U0001f468\u200d\U0001f469"),
    "<|endoftext|>",
]


def gpt2_stand_in() -> tiktoken.Encoding:
    """GPT-2's tokenizer without its vocabulary: its pattern, its 256 bytes, and merges of any two of EDGES.

    So its tokens show where a text was cut; those of the real vocabulary, learnt from cut texts, seldom do.
    """
    # GPT-2 counts the bytes that are printable first.
    order = sorted(range(256), key=lambda byte: byte == ord(" ") or not chr(byte).isprintable())
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    characters = [character.encode() for character in EDGES]
    beginnings = (character[:size] for character in characters for size in range(2, len(character) + 1))
    for token in (*beginnings, *(one + other for one, other in itertools.product(characters, repeat=2))):
        ranks.setdefault(token, len(ranks))
    end = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=end)


def nasty_text(rng: random.Random, most: int) -> str:
    return "".join(rng.choices(NASTY, k=rng.randrange(most)))


def random_characters(rng: random.Random, count: int) -> str:
    points = (
        rng.choice((rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(0x40000)))
        for _ in range(count)
    )
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def write_parquet(path: Path, texts: Sequence[str | None], column: str = "text") -> Path:
    table = pyarrow.table({"id": range(len(texts)), column: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=50, compression="zstd")
    return path


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(source: Path | str, output: Path, *options: str, before: str = "") -> str:
    """Prepare a data set; return what was said."""
    done = run_script("prepare_datasets.py", source, output, *options, before=before)
    assert done.returncode == 0, done.stderr
    assert not output.with_name(output.name + ".incomplete").exists()
    return done.stdout + done.stderr


def split_texts(texts: Sequence[str], fraction: float = 0.01) -> dict[str, list[str]]:
    """What is for training and what for validation: a matter of each text's checksum."""
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for text in texts:
        for_validation = zlib.crc32(text.encode(), 0x9E3779B9) < fraction * 2**32
        splits["validation" if for_validation else "train"].append(text)
    return splits


def assert_holds(folder: Path, splits: dict[str, list[str]], encoding: tiktoken.Encoding) -> dict[str, Any]:
    """A data set holds these texts in this order, each followed by end-of-text; return its meta.json."""
    meta = json.loads((folder / "meta.json").read_text())
    for split, texts in splits.items():
        file = folder / f"{split}.safetensors"
        tokens = [token for text in texts for token in (*encoding.encode_ordinary(text), encoding.eot_token)]
        found = load_file(file)["tokens"]
        assert found.dtype == np.uint16
        assert np.array_equal(found, np.array(tokens, np.uint16)), split
        size = sum(len(text.encode()) for text in texts)
        assert meta["splits"][split] == {"documents": len(texts), "tokens": len(tokens), "bytes": size}
        assert meta["sha256"][file.name] == hashlib.sha256(file.read_bytes()).hexdigest()
    return meta
