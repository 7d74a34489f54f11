"""A data set's files, made from encoded parts: tokens in safetensors, meta.json, the card, the histogram."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from basemodel.common.errors import InputError, RunError
from basemodel.common.names import TOKENIZER_FILE
from basemodel.data.token_files import split_names
from basemodel.data.tokenizer import get_tokenizer, token_byte_lengths
from basemodel.prepare.encoding import COUNTED, SPLITS, Part, Settings

CONTEXT_LENGTH = 1024  # GPT-2's, for the histogram
DOCUMENTS_AT_ONCE = 4_000_000  # whose hashes are in memory
Segment = tuple[Path, int, int]  # a file of raw tokens, and the range of its tokens
Layout = dict[str, tuple[list[int], list[Segment]]]  # of each split: its size, and where its tokens are


def write_dataset(folder: Path, layout: Layout, settings: Settings, max_file_size: int) -> dict[str, Any]:
    """Write the token files of both splits, none above `max_file_size` bytes, and the data set's own
    tokenizer, if it has one; return what meta.json says about them.

    Raises RunError if a part is damaged.
    """
    tokenizer, sha256 = get_tokenizer(settings.tokenizer, settings.folder), {}
    if settings.tokenizer == "dataset":
        shutil.copyfile(settings.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        sha256[TOKENIZER_FILE] = settings.tokenizer_sha256
    for split, (_, segments) in layout.items():
        files = cut_segments(segments, capacity(max_file_size))
        for name, own in zip(split_names(split, len(files)), files, strict=True):
            sha256[name] = join_segments(own, folder / name)
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

    If no document fell to validation, the end of the text goes there: that fraction of the tokens. Copies of
    documents are left out then, because what is held out must not be in the rest.
    """
    sizes = {split: sum(np.array(part.record[split]) for part in parts) for split in SPLITS}
    segments = {
        split: [(part.folder / split, 0, part.record[split][1]) for part in parts] for split in SPLITS
    }
    if not any(size[0] for size in sizes.values()):
        raise InputError("the source contains no documents to train on")
    if sizes["train"][0] == 0:
        raise InputError("all documents fell to validation; lower --validation-fraction")
    if sizes["validation"][0] == 0:
        segments["train"], documents = without_copies(parts)
        tokens = sum(stop - start for _, start, stop in segments["train"])
        held_out = max(1, int(tokens * settings.validation_fraction))
        if held_out == tokens:
            raise InputError("the source is too short to hold out any text for validation")
        segments["train"], segments["validation"] = split_off(segments["train"], held_out)
        byte_lengths = token_byte_lengths(get_tokenizer(settings.tokenizer, settings.folder))
        sizes["train"] = np.array([documents, tokens - held_out, text_bytes(segments["train"], byte_lengths)])
        sizes["validation"] = np.array([1, held_out, text_bytes(segments["validation"], byte_lengths)])
    return {split: (sizes[split].tolist(), segments[split]) for split in SPLITS}


def without_copies(parts: list[Part]) -> tuple[list[Segment], int]:
    """Where the training documents are, without those that equal an earlier one, and how many there are."""
    hashes = np.concatenate([np.fromfile(part.folder / "hashes", "<u8") for part in parts])
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    segments, seen = [], 0
    for part in parts:
        edges = np.cumsum([0, *np.fromfile(part.folder / "lengths", "<u4")])
        kept = first[seen : seen + len(edges) - 1]
        turns = np.flatnonzero(np.diff(np.pad(kept, 1)))  # where a run of kept documents begins or ends
        runs = edges[turns].reshape(-1, 2).tolist()
        segments += [(part.folder / "train", start, stop) for start, stop in runs]
        seen += len(kept)
    return segments, int(first.sum())


def split_off(segments: list[Segment], tokens: int) -> tuple[list[Segment], list[Segment]]:
    """Segments, and the last `tokens` tokens of them by themselves."""
    rest, end = list(segments), []
    while tokens:
        path, start, stop = rest.pop()
        taken = min(tokens, stop - start)
        end.insert(0, (path, stop - taken, stop))
        if taken < stop - start:
            rest.append((path, start, stop - taken))
        tokens -= taken
    return rest, end


def text_bytes(segments: list[Segment], byte_lengths: np.ndarray) -> int:
    """The bytes of text that segments decode to."""
    chunk, total = 1 << 22, 0
    for path, start, stop in segments:
        tokens = np.memmap(path, "<u2", "r", shape=(stop,))
        total += sum(int(byte_lengths[tokens[i : i + chunk]].sum()) for i in range(start, stop, chunk))
    return total


def count_passed_over(parts: list[Part]) -> dict[str, int]:
    """What meta.json says of the rows that were no documents, or no good ones."""
    counts = {name: sum(part.record[name] for part in parts) for name in ("empty", "null", "replaced")}
    return counts | {"duplicates": count_duplicates(parts)}


def count_duplicates(parts: list[Part]) -> int:
    """How many documents equal another one, of which they are the second or later copy.

    Counted in passes over the hashes, a few million different ones at a time, to bound memory.
    """
    files = [part.folder / "hashes" for part in parts]
    documents = sum(path.stat().st_size for path in files) // 8
    passes, distinct = 1 + documents // DOCUMENTS_AT_ONCE, 0
    for number in range(passes):
        mine = [hashes[hashes % passes == number] for hashes in (np.fromfile(path, "<u8") for path in files)]
        distinct += len(np.unique(np.concatenate(mine)))
    return documents - distinct


def cut_segments(segments: list[Segment], most: int) -> list[list[Segment]]:
    """Distribute segments over files of `most` tokens each; the last one may hold fewer."""
    files: list[list[Segment]] = [[]]
    room = most
    for path, start, stop in segments:
        while stop - start > room:
            files[-1].append((path, start, start + room))
            files.append([])
            start, room = start + room, most
        files[-1].append((path, start, stop))
        room -= stop - start
    return files


def capacity(size: int) -> int:
    """How many tokens fit into a file of `size` bytes."""
    return (size - len(_header(size // 2))) // 2


def _header(count: int) -> bytes:
    """What a safetensors file of `count` tokens begins with."""
    description = {"tokens": {"dtype": "U16", "shape": [count], "data_offsets": [0, 2 * count]}}
    header = json.dumps(description, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the data that follows
    return len(header).to_bytes(8, "little") + header


def join_segments(segments: list[Segment], path: Path) -> str:
    """Stream segments into one safetensors file, return its SHA-256. Raises RunError if one is cut off."""
    header = _header(sum(stop - start for _, start, stop in segments))
    digest = hashlib.sha256(header)
    with path.open("wb") as out:
        out.write(header)
        for source, start, stop in segments:
            with source.open("rb") as file:
                file.seek(2 * start)
                left = 2 * (stop - start)
                while block := file.read(min(left, 1 << 20)):
                    out.write(block)
                    digest.update(block)
                    left -= len(block)
            if left:
                raise RunError(f"{source}: is damaged; check the disk and run the same command again")
    return digest.hexdigest()


def document_lengths(layout: Layout, end_of_text: int) -> np.ndarray:
    """The length of each document in tokens, its end-of-text included: int64."""
    ends, before, chunk = [np.array([-1])], 0, 1 << 24
    for path, start, stop in (segment for _, segments in layout.values() for segment in segments):
        tokens = np.memmap(path, "<u2", "r", shape=(stop,))
        for first in range(start, stop, chunk):
            some = tokens[first : min(first + chunk, stop)]
            ends.append(before + np.flatnonzero(some == end_of_text))
            before += len(some)
    lengths = np.diff(np.append(np.concatenate(ends), before - 1))
    return lengths[lengths > 0]  # without the last, if the last document has its end-of-text


def draw_lengths(layout: Layout, end_of_text: int, path: Path, title: str) -> str:
    """Draw a histogram of document lengths in tokens, in xkcd style; return the figures as text."""
    from basemodel.common.xkcd import xkcd_chart

    lengths = document_lengths(layout, end_of_text)
    mean, median, total = float(lengths.mean()), float(np.median(lengths)), int(lengths.sum(dtype=np.int64))
    lost = 1 - np.minimum(lengths, CONTEXT_LENGTH).sum(dtype=np.int64) / total
    with xkcd_chart(path, (10, 6)) as figure:
        axes = figure.subplots()
        axes.hist(lengths, bins=np.geomspace(1, lengths.max() + 1, 60))
        axes.set(xscale="log", title=title, xlabel="tokens in a document", ylabel="documents")
        axes.axvline(mean, color="tab:red", label=f"mean {mean:,.0f}")
        axes.axvline(median, color="tab:green", label=f"median {median:,.0f}")
        axes.axvline(CONTEXT_LENGTH, color="tab:gray", label=f"cropping here would lose {lost:.1%}")
        axes.legend()
    return (
        f"Tokens per document: mean {mean:,.1f}, median {median:,.0f}; {total:,} tokens in all\n"
        f"Cropping every document to {CONTEXT_LENGTH:,} tokens would lose {lost:.1%} of them"
    )


def card(name: str, meta: dict[str, Any]) -> str:
    """The data set's card for the Hub: YAML front matter, then Markdown."""
    from huggingface_hub import DatasetCardData

    header = DatasetCardData(
        pretty_name=name,
        task_categories=["text-generation"],
        tags=["tokens", meta["tokenizer"], "safetensors"],
        source_datasets=[meta["source"]] if meta["revision"] else None,
    )
    tokenizer = "that of `tokenizer.json`" if meta["tokenizer"] == "dataset" else f"`{meta['tokenizer']}`"
    revision = f" at revision `{meta['revision']}`" if meta["revision"] else ""
    rows = "".join(
        f"| {split} | {counts['documents']:,} | {counts['tokens']:,} | {counts['bytes']:,} |\n"
        for split, counts in meta["splits"].items()
    )
    files = "".join(f"| {file} | `{sha256}` |\n" for file, sha256 in meta["sha256"].items())
    return f"""---
{header.to_yaml()}
---

# {name}

{meta["description"]}. The source is `{meta["source"]}`{revision}, the tokenizer {tokenizer} with a
vocabulary of {meta["vocab_size"]:,}.

| split | documents | tokens | bytes of text |
| --- | --- | --- | --- |
{rows}
| file | SHA-256 |
| --- | --- |
{files}
Each file holds one 1-D uint16 tensor named `tokens`: documents one after another, each followed by
`<|endoftext|>`, token {meta["end_of_text"]}. A document goes to validation if the checksum of its text is in
the lowest {meta["validation_fraction"]:.3g} of the range. `meta.json` has this in machine-readable form.

```python
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

files = sorted(Path().glob("train*.safetensors"))  # read as one: each goes on where the one before ends
tokens = np.concatenate([load_file(file)["tokens"] for file in files])
```
"""
