"""What people read about a data set: its card for the Hub, a histogram, and a summary on the terminal."""

from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from basemodel.common.output import markdown_table, one_line
from basemodel.prepare.assemble import Layout, token_blocks
from basemodel.prepare.encoding import COUNTED, Part

CONTEXT_LENGTH = 1024  # GPT-2's, for the histogram
# What the numbers in meta.json count
SUMMARY = {
    "files_read": "Files read",
    "empty": "Empty documents skipped",
    "null": "Nulls skipped",
    "replaced": "Invalid UTF-8 sequences that became U+FFFD",
    "duplicates": "Documents that are copies of others",
}


def document_lengths(layout: Layout, end_of_text: int) -> np.ndarray:
    """The length of each document in tokens, its end-of-text included: int64."""
    ends, before = [np.array([-1])], 0
    for block in token_blocks(segment for _, segments in layout.values() for segment in segments):
        ends.append(before + np.flatnonzero(block == end_of_text))
        before += len(block)
    lengths = np.diff(np.append(np.concatenate(ends), before - 1))
    return lengths[lengths > 0]  # without the last, if the last document has its end-of-text


def draw_lengths(layout: Layout, end_of_text: int, path: Path, title: str) -> str:
    """Draw a histogram of document lengths in tokens, in xkcd style; return the figures as text."""
    from basemodel.common.xkcd import xkcd_chart

    lengths = document_lengths(layout, end_of_text)
    mean, median, total = lengths.mean(), np.median(lengths), lengths.sum()
    lost = 1 - np.minimum(lengths, CONTEXT_LENGTH).sum() / total
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
    splits = markdown_table(
        ("split", "documents", "tokens", "bytes of text"),
        [[split, *(f"{counts[name]:,}" for name in COUNTED)] for split, counts in meta["splits"].items()],
    )
    files = markdown_table(("file", "SHA-256"), [[file, f"`{sha}`"] for file, sha in meta["sha256"].items()])
    return f"""---
{header.to_yaml()}
---

# {name}

{meta["description"]}. The source is `{meta["source"]}`{revision}, the tokenizer {tokenizer} with a
vocabulary of {meta["vocab_size"]:,}.

{splits}

{files}

Each file holds one 1-D uint16 tensor named `tokens`: documents one after another, each followed by
`<|endoftext|>`, token {meta["end_of_text"]}. A document goes to validation if the checksum of its text is in
the lowest {meta["validation_fraction"]:.3g} of the range. `meta.json` has this in machine-readable form.

```python
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

files = sorted(Path().glob("train*.safetensors"))  # read as one: each continues where the one before it ends
tokens = np.concatenate([load_file(file)["tokens"] for file in files])
```
"""


def summary(meta: dict[str, Any]) -> list[str]:
    """Lines that say what was read, and what was skipped or changed on the way."""
    lines = [f"{what}: {meta[key]:,}" for key, what in SUMMARY.items() if meta.get(key)]
    skipped = [f"{count:,} {reason}" for reason, count in meta["files_skipped"].items() if count]
    return [*lines, f"Files skipped: {', '.join(skipped)}"] if skipped else lines


def excerpts(parts: list[Part]) -> list[str]:
    """The beginnings of the first document, one in the middle and the last, each preceded by its file."""
    # Parts of earlier versions have none.
    if not (found := [kept for part in parts if (kept := part.record.get("excerpts"))]):
        return []
    chosen = (found[0]["first"], found[len(found) // 2]["middle"], found[-1]["last"])
    return [f"{file}: {one_line(text)}" for file, text in dict.fromkeys(map(tuple, chosen))]


def token_excerpts(file: Path, tokenizer: tiktoken.Encoding) -> list[str]:
    """Text from the start, middle and end of a nanoGPT token file, each preceded by the file."""
    tokens = np.memmap(file, "<u2", "r")
    places = dict.fromkeys((0, len(tokens) // 2, max(0, len(tokens) - 20)))
    return [f"{file}: {one_line(tokenizer.decode(tokens[place:][:20].tolist()))}" for place in places]


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as "2 files"."""
    return f"{count:,} {noun}" + "s" * (count != 1)
