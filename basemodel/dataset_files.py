"""A data set's files, made from encoded parts: tokens in safetensors, meta.json, the card, the histogram."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from basemodel.encoding import COUNTED, SPLITS, Part, Settings
from basemodel.errors import InputError, RunError
from basemodel.token_files import split_names
from basemodel.tokenizer import get_tokenizer

CONTEXT_LENGTH = 1024  # GPT-2's, for the histogram
Segment = tuple[Path, int, int]  # a file of raw tokens, and the range of its tokens


def write_dataset(folder: Path, parts: list[Part], settings: Settings, max_file_size: int) -> dict[str, Any]:
    """Write the token files of both splits, none above `max_file_size` bytes; return what meta.json says
    about them.

    Raises InputError if the documents do not make two splits, RunError if a part is damaged.
    """
    try:
        splits = lay_out(parts, settings.validation_fraction)
    except InputError:
        for part in parts:  # useless with any other source
            shutil.rmtree(part.folder)
        raise
    tokenizer = get_tokenizer(settings.tokenizer)
    sha256 = {}
    for split, (_, segments) in splits.items():
        files = cut_segments(segments, capacity(max_file_size))
        for name, own in zip(split_names(split, len(files)), files, strict=True):
            sha256[name] = join_segments(own, folder / name)
    return {
        **asdict(settings),
        "vocab_size": tokenizer.n_vocab,
        "token_dtype": "uint16",
        "end_of_text": tokenizer.eot_token,
        "splits": {split: dict(zip(COUNTED, size, strict=True)) for split, (size, _) in splits.items()},
        "replaced": sum(part.record["replaced"] for part in parts),
        "sha256": sha256,
        "versions": {"python": platform.python_version(), "tiktoken": importlib.metadata.version("tiktoken")},
    }


def lay_out(parts: list[Part], fraction: float) -> dict[str, tuple[list[int], list[Segment]]]:
    """Each split's size and segments. Raises InputError if the documents do not make two splits.

    If no document fell to validation, the last one goes there, or the end of a single one: otherwise a text
    in one file, which is one document, would have no validation data.
    """
    sizes = {split: sum(np.array(part.record[split]) for part in parts) for split in SPLITS}
    segments = {
        split: [(part.folder / split, 0, part.record[split][1]) for part in parts] for split in SPLITS
    }
    documents, tokens, _ = sizes["train"]
    if documents == 0:
        raise InputError("the source contains no documents to train on")
    if sizes["validation"][0] == 0:
        index = max(i for i, part in enumerate(parts) if part.record["train"][0])
        _, length, size = parts[index].record["last"]
        held_out = length if documents > 1 else max(1, int(length * fraction))
        if held_out >= tokens:
            raise InputError("the source is too short to hold out any text for validation")
        size = round(size * held_out / length)
        path, start, stop = segments["train"][index]
        segments["train"][index] = (path, start, stop - held_out)
        segments["validation"] = [(path, stop - held_out, stop)]
        sizes["validation"] = np.array([1, held_out, size])
        sizes["train"] -= [documents > 1, held_out, size]
    return {split: (sizes[split].tolist(), segments[split]) for split in SPLITS}


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


def draw_lengths(parts: list[Part], path: Path, title: str) -> str:
    """Draw a histogram of document lengths in tokens, in xkcd style; return the figures as text."""
    from basemodel.charts import xkcd_chart

    lengths = np.concatenate([np.fromfile(part.folder / "lengths", dtype="<u4") for part in parts])
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

{meta["description"]}. The source is `{meta["source"]}`{revision}, the tokenizer `{meta["tokenizer"]}` with a
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
