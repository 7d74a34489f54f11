"""A data set's token files and what meta.json says of them, from encoded parts or nanoGPT's token files."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from basemodel.common.errors import InputError, RunError
from basemodel.common.files import refuse_stand_in
from basemodel.common.names import TOKENIZER_FILE
from basemodel.data.token_files import split_names
from basemodel.data.tokenizer import get_tokenizer, token_byte_lengths
from basemodel.prepare.encoding import COUNTED, SPLITS, Part, Settings

NANOGPT_FILES = {"train": "train.bin", "validation": "val.bin"}  # raw uint16 tokens
MAX_FILE_SIZE = 40_000_000_000  # bytes; the Hub refuses files above 50 GB
Segment = tuple[Path, int, int]  # a file of raw tokens, and the range of its tokens
Layout = dict[str, tuple[list[int], list[Segment]]]  # of each split: its size, and where its tokens are


def write_dataset(folder: Path, layout: Layout, settings: Settings) -> dict[str, Any]:
    """Write the token files of both splits, none above MAX_FILE_SIZE, and the data set's own tokenizer, if it
    has one; return what meta.json says of them. Raises RunError if a part is damaged."""
    tokenizer, sha256 = get_tokenizer(settings.tokenizer, settings.folder), {}
    if settings.tokenizer == "dataset":
        shutil.copyfile(settings.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        sha256[TOKENIZER_FILE] = settings.tokenizer_sha256
    capacity = (MAX_FILE_SIZE - len(_header(MAX_FILE_SIZE // 2))) // 2  # tokens in a file
    for split, (_, segments) in layout.items():
        files = cut_segments(segments, capacity)
        for name, file_segments in zip(split_names(split, len(files)), files, strict=True):
            sha256[name] = join_segments(file_segments, folder / name)
    return {
        **settings.identity(),
        "vocab_size": tokenizer.n_vocab,
        "token_dtype": "uint16",
        "end_of_text": tokenizer.eot_token,
        "splits": {split: dict(zip(COUNTED, size, strict=True)) for split, (size, _) in layout.items()},
        "sha256": sha256,
        "versions": {"python": platform.python_version(), "tiktoken": importlib.metadata.version("tiktoken")},
    }


def lay_out(parts: list[Part], settings: Settings) -> Layout:
    """Each split's size and tokens. Raises InputError if the documents do not make two splits.

    If no document is for validation, the end of the text is: the fraction of the tokens that was asked for.
    Copies of documents are left out then, because what is held out must not be in the rest. A document
    that is cut in two counts for the split in which it begins, so validation may have none.
    """
    sizes = {split: sum(np.array(part.record[split]) for part in parts) for split in SPLITS}
    segments = {
        split: [(part.folder / split, 0, count) for part in parts if (count := part.record[split][1])]
        for split in SPLITS
    }
    if not any(size[0] for size in sizes.values()):
        raise InputError("the source contains no documents to train on")
    if sizes["train"][0] == 0:
        raise InputError("every document was assigned to validation; lower --validation-fraction")
    if sizes["validation"][0] == 0:
        text, documents = without_copies(parts)
        tokens = sum(stop - start for _, start, stop in text)
        held_out = max(1, int(tokens * settings.validation_fraction))
        if held_out == tokens:
            raise InputError("the source is too short to hold out any text for validation")
        segments["train"], *end = cut_segments(text, tokens - held_out)
        segments["validation"] = [segment for file in end for segment in file]
        tokenizer = get_tokenizer(settings.tokenizer, settings.folder)
        counts = {split: count_tokens(segments[split]) for split in SPLITS}
        text_bytes = {split: counts[split] @ token_byte_lengths(tokenizer) for split in SPLITS}
        path, _, stop = segments["train"][-1]
        (last,) = next(token_blocks([(path, stop - 1, stop)]))
        begun = counts["train"][tokenizer.eot_token] + (last != tokenizer.eot_token)
        sizes["train"] = np.array([begun, tokens - held_out, text_bytes["train"]])
        sizes["validation"] = np.array([documents - begun, held_out, text_bytes["validation"]])
    return {split: (sizes[split].tolist(), segments[split]) for split in SPLITS}


def without_copies(parts: list[Part]) -> tuple[list[Segment], int]:
    """Where the training documents are, without those that equal an earlier one, and how many there are."""
    hashes = read_hashes(parts)
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    segments, seen = [], 0
    for part in parts:
        edges = np.cumsum([0, *np.fromfile(part.folder / "lengths", "<u4")])
        is_first = first[seen : seen + len(edges) - 1]
        turns = np.flatnonzero(np.diff(np.pad(is_first, 1)))  # where a run of first copies begins or ends
        runs = edges[turns].reshape(-1, 2).tolist()
        segments += [(part.folder / "train", start, stop) for start, stop in runs]
        seen += len(is_first)
    return segments, int(first.sum())


def token_blocks(segments: Iterable[Segment]) -> Iterator[np.ndarray]:
    """The tokens of segments, a few million at a time: uint16. Raises RunError if a file is cut off."""
    chunk = 1 << 22
    for path, start, stop in segments:
        if path.stat().st_size < 2 * stop:
            raise RunError(f"{path}: is damaged; check the disk and run the same command again")
        tokens = np.memmap(path, "<u2", "r", shape=(stop,))
        yield from (tokens[first : min(first + chunk, stop)] for first in range(start, stop, chunk))


def count_tokens(segments: list[Segment]) -> np.ndarray:
    """The number of times that each of the 65,536 possible tokens occurs in segments, int64."""
    return sum(np.bincount(block, minlength=65_536) for block in token_blocks(segments))


def count_skipped(parts: list[Part]) -> dict[str, int]:
    """The numbers of empty documents, nulls, replaced characters and duplicates, for meta.json."""
    counts = {name: sum(part.record[name] for part in parts) for name in ("empty", "null", "replaced")}
    hashes = read_hashes(parts)
    return counts | {"duplicates": len(hashes) - len(np.unique(hashes))}


def read_hashes(parts: list[Part]) -> np.ndarray:
    """The hashes of all documents, in order: uint64."""
    return np.concatenate([np.fromfile(part.folder / "hashes", "<u8") for part in parts])


def cut_segments(segments: list[Segment], capacity: int) -> list[list[Segment]]:
    """Distribute segments over files of `capacity` tokens each; the last one may hold fewer."""
    files: list[list[Segment]] = [[]]
    room = capacity
    for path, start, stop in segments:
        while start < stop:
            if room == 0:
                files.append([])
                room = capacity
            end = min(stop, start + room)
            files[-1].append((path, start, end))
            start, room = end, room - (end - start)
    return files


def _header(count: int) -> bytes:
    """What a safetensors file of `count` tokens begins with."""
    description = {"tokens": {"dtype": "U16", "shape": [count], "data_offsets": [0, 2 * count]}}
    header = json.dumps(description, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the data that follows
    return len(header).to_bytes(8, "little") + header


def join_segments(segments: list[Segment], path: Path) -> str:
    """Stream segments into one safetensors file; return its SHA-256. Raises RunError if one is cut off."""
    header = _header(sum(stop - start for _, start, stop in segments))
    digest = hashlib.sha256(header)
    with path.open("wb") as out:
        out.write(header)
        for block in token_blocks(segments):
            out.write(block)
            digest.update(block)
    return digest.hexdigest()


def lay_out_nanogpt(source: Path, tokenizer: tiktoken.Encoding) -> Layout:
    """Each split's size and tokens, from nanoGPT's train.bin and val.bin: raw tokens, end-of-text between
    documents. Raises InputError if the files do not hold this tokenizer's tokens."""
    if (source / "meta.pkl").exists():
        problem = "meta.pkl says that its tokens are nanoGPT's own for single characters"
        raise InputError(f"{source}: {problem}; prepare its input.txt with --tokenizer bytes")
    layout: Layout = {}
    for split, name in NANOGPT_FILES.items():
        path = source / name
        size = path.stat().st_size if path.is_file() else 0
        if size:
            refuse_stand_in(path)
        if size == 0 or size % 2:
            raise InputError(f"{path}: {'damaged: not a whole number of uint16' if size else 'is missing'}")
        tokens, segments = np.memmap(path, "<u2", "r"), [(path, 0, size // 2)]
        if len(tokens) > 1 and not tokens[1:2048:2].any():  # every second half of a number is zero
            raise InputError(f"{path}: holds uint32 or wider numbers; nanoGPT's tokens are uint16")
        counts = count_tokens(segments)
        if counts[tokenizer.n_vocab :].any():
            vocabulary = f"the vocabulary of {tokenizer.n_vocab} of --tokenizer {tokenizer.name}"
            raise InputError(f"{path}: token {counts.nonzero()[0][-1]} is outside {vocabulary}")
        documents = int(counts[tokenizer.eot_token] + (tokens[-1] != tokenizer.eot_token))
        layout[split] = [documents, size // 2, int(counts @ token_byte_lengths(tokenizer))], segments
    return layout
