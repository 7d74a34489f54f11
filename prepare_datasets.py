#!/usr/bin/env python3
"""Turn text into a data set that ddp_train.py trains on: uint16 tokens in safetensors, split by document.

    python prepare_datasets.py python-docs datasets/local/python-docs --tokenizer bytes
    python prepare_datasets.py my-texts/ datasets/me/my-texts --stats       .parquet, .jsonl(.gz, .zst), .txt
    python prepare_datasets.py HuggingFaceFW/fineweb datasets/me/fineweb-10b --files 'sample/10BT/*'

The input is cut into shards of about 64 MB of text, each encoded by one worker straight to disk, and the
results are joined in the input's order. So the same text gives the same bytes whatever the number of workers,
memory does not grow with the data, and what was interrupted goes on behind its last finished shard: all that
is unfinished stands in OUTPUT_DIR.incomplete, and OUTPUT_DIR appears when it is whole.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import tiktoken
from tqdm import tqdm

from basemodel.command_line import require_dataset_id, run_command
from basemodel.documents import (
    FILE_TYPES,
    PYTHON_DOCS,
    Piece,
    cut_into_pieces,
    find_files,
    in_validation,
    make_shards,
    read_documents,
)
from basemodel.errors import InputError, RunError, require
from basemodel.files import fingerprint, sync
from basemodel.hub import check_push, download, push
from basemodel.json_config import read_json_object
from basemodel.tokenizer import (
    Encoder,
    EnginesDisagree,
    GigatokenEncoder,
    GigatokenSetup,
    get_tokenizer,
    set_up_engine,
    tiktoken_encoder,
)

SPLITS = ("train", "validation")
PART_FILES = (*SPLITS, "lengths")
BATCH_BYTES = 1 << 20  # of text, encoded at once
CONTEXT_LENGTH = 1024  # of GPT-2, for --stats


# ------------------------------------------------------------------------------------------------------------
# Encoding, one shard per worker at a time
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a split holds; `bytes` of UTF-8 text, for bits per byte."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: "Counts") -> None:
        """Count what another counted."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes


@dataclass(frozen=True)
class Settings:
    """How to encode, the same for every shard."""

    tokenizer: str
    validation_fraction: float
    text_column: str


@dataclass
class Part:
    """A finished shard: a folder with the raw uint16 tokens of each split, the documents' lengths in tokens
    (uint32), and record.json, which holds the rest of this."""

    folder: Path
    key: list[Any]  # what it was made of, and how
    counts: dict[str, Counts] = field(default_factory=lambda: {split: Counts() for split in SPLITS})
    last: Counts = field(default_factory=Counts)  # of the last document for training
    replaced: int = 0  # invalid UTF-8 sequences
    sha256: dict[str, str] = field(default_factory=dict)  # by file name
    doubts: str = ""  # why gigatoken was not used

    @property
    def total(self) -> Counts:
        """Of both splits."""
        total = Counts()
        for counts in self.counts.values():
            total.add(counts)
        return total

    def save(self) -> None:
        """Write record.json."""
        self.sha256 = self._hashes(self.folder)
        values = asdict(self)
        del values["folder"]
        (self.folder / "record.json").write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, key: list[Any]) -> "Part | None":
        """A part that an earlier start finished; None if there is none with this key, or it is damaged."""
        try:
            values = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            values["counts"] = {split: Counts(**counts) for split, counts in values["counts"].items()}
            part = cls(folder, **(values | {"last": Counts(**values["last"])}))
            found = cls._hashes(folder) if part.key == key else {}
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return part if found == part.sha256 else None

    @staticmethod
    def _hashes(folder: Path) -> dict[str, str]:
        return {name: fingerprint(folder / name)["sha256"] for name in PART_FILES}


def encode_shard(
    number: int, shard: list[Piece], parts_dir: Path, settings: Settings, setup: GigatokenSetup | None
) -> tuple[Part, bool]:
    """Encode a shard into a folder of its own under `parts_dir`; whether that was there before.

    The folder gets its name when it is whole. Raises InputError.
    """
    key = [asdict(settings), *(piece.identity() for piece in shard)]
    folder = parts_dir / f"{number:06d}"
    if part := Part.load(folder, key):
        return part, True
    unfinished = parts_dir / f"{number:06d}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.mkdir()
    tokenizer = get_tokenizer(settings.tokenizer)
    with_tiktoken = tiktoken_encoder(settings.tokenizer)
    try:
        try:
            part = Part(unfinished, key)
            encode = GigatokenEncoder(tokenizer, setup) if setup else with_tiktoken
            encode_documents(shard, part, settings, encode, tokenizer.eot_token)
        except EnginesDisagree as error:
            part = Part(unfinished, key, doubts=str(error))
            encode_documents(shard, part, settings, with_tiktoken, tokenizer.eot_token)
        part.save()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    part.folder = unfinished.rename(folder)
    return part, False


def encode_documents(
    shard: list[Piece], part: Part, settings: Settings, encode: Encoder, end_of_text: int
) -> None:
    """Encode the documents of a shard into the files of `part`, and count."""
    documents = itertools.chain.from_iterable(read_documents(piece, settings.text_column) for piece in shard)
    with contextlib.ExitStack() as stack:
        *splits, lengths = (stack.enter_context((part.folder / name).open("wb")) for name in PART_FILES)
        writers = {
            split: SplitWriter(file, lengths, encode, end_of_text)
            for split, file in zip(SPLITS, splits, strict=True)
        }
        for document in documents:
            split = "validation" if in_validation(document, settings.validation_fraction) else "train"
            writers[split].write(document)
            part.replaced += document.replaced
        for split, writer in writers.items():
            writer.flush()
            part.counts[split] = writer.counts
        part.last = writers["train"].last


class SplitWriter:
    """Encodes the documents of one split, about a megabyte at a time, and writes tokens and lengths."""

    def __init__(self, tokens: BinaryIO, lengths: BinaryIO, encode: Encoder, end_of_text: int) -> None:
        self.counts, self.last = Counts(), Counts()  # of all documents, and of the last one
        self._tokens, self._lengths, self._encode, self._end = tokens, lengths, encode, end_of_text
        self._texts: list[bytes] = []  # to be encoded next: documents, or fragments of one
        self._whole: list[bool] = []  # whether the document ends with that text
        self._size = 0  # bytes of these texts, and one for each
        self._begun = 0  # tokens written of a document that has not ended

    def write(self, document: Iterable[bytes]) -> None:
        """Take a document, as texts that can be encoded one by one."""
        self.last = Counts(documents=1)
        for text in document:
            if self._size >= BATCH_BYTES:
                self.flush()
            self._texts.append(text)
            self._whole.append(False)
            self._size += len(text) + 1
            self.last.bytes += len(text)
        self._whole[-1] = True

    def flush(self) -> None:
        """Encode what was taken, write and count it."""
        if not self._texts:
            return
        tokens = self._encode(self._texts)
        ends = np.flatnonzero(tokens == self._end)
        if not all(self._whole):
            tokens = np.delete(tokens, ends[np.logical_not(self._whole)])
            ends = np.flatnonzero(tokens == self._end)
        lengths = np.diff(ends, prepend=-1 - self._begun)
        self._begun = len(tokens) - 1 - (ends[-1] if len(ends) else -1 - self._begun)
        if len(lengths):
            self.last.tokens = int(lengths[-1])
        self._tokens.write(tokens.tobytes())
        self._lengths.write(lengths.astype("<u4").tobytes())
        done = Counts(len(lengths), len(tokens), self._size - len(self._texts))
        self.counts.add(done)
        _tell(done)
        self._texts, self._whole, self._size = [], [], 0


_shared: Any  # counts of documents, tokens and bytes that all workers add to


def _tell(counts: Counts) -> None:
    """Tell the main process what this worker has encoded."""
    with _shared.get_lock():
        for index, amount in enumerate((counts.documents, counts.tokens, counts.bytes)):
            _shared[index] += amount


def _start_worker(shared: Any) -> None:
    """Prepare a worker process. It ends with the main process, which is also the one to hear of Ctrl-C."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class ProgressLine:
    """Bytes, documents, tokens, tokens/s and ETA: a bar on a terminal, else a line every 15 seconds."""

    def __init__(self, expected: int, shared: Any) -> None:
        self._shared = shared
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(total=expected, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        self.expected = expected  # bytes of text, about

    @property
    def tokens_per_second(self) -> float:
        """Over all workers since the start."""
        return self._shared[1] / (time.monotonic() - self._started)

    def show(self) -> None:
        """Say how far the workers are."""
        documents, tokens, size = self._shared[:]
        done = f"{documents:,} documents, {tokens:,} tokens, {self.tokens_per_second:,.0f} tokens/s"
        if not self._bar.disable:
            self._bar.total = max(self.expected, size)
            self._bar.set_postfix_str(done, refresh=False)
            self._bar.update(size - self._bar.n)
        elif time.monotonic() - self._last_line > 15:
            self._last_line = time.monotonic()
            seconds = (self._last_line - self._started) * max(0, self.expected / max(1, size) - 1)
            of = f"{size / 1e6:,.0f} of about {self.expected / 1e6:,.0f} MB"
            print(f"encoding: {of}, {done}, ETA {tqdm.format_interval(seconds)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Put the bar away."""
        self._bar.close()


def encode_all(
    shards: list[list[Piece]],
    parts_dir: Path,
    settings: Settings,
    setup: GigatokenSetup | None,
    *,
    workers: int,
) -> list[Part]:
    """Encode all shards with a pool of workers, showing progress; parts come in the shards' order."""
    # A forked worker has from the start what is loaded here. The threads that numpy and pyarrow keep stand a
    # fork, and none of ours runs yet. On a Mac the system's own libraries do not stand one.
    tiktoken_encoder(settings.tokenizer)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    shared = context.Array("q", 3)  # documents, tokens and bytes that all workers have encoded
    sizes = [sum(piece.size for piece in shard) for shard in shards]
    parts, kept = {}, 0
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            ProcessPoolExecutor(min(workers, len(shards)), context, _start_worker, (shared,))
        )
        # Large ones first, so that no worker is left with a long one at the end.
        order = sorted(range(len(shards)), key=lambda i: -sizes[i])
        jobs = {pool.submit(encode_shard, i, shards[i], parts_dir, settings, setup): i for i in order}
        progress = stack.enter_context(contextlib.closing(ProgressLine(sum(sizes), shared)))
        waiting = set(jobs)
        try:
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                for job in finished:
                    number = jobs[job]
                    parts[number], was_there = job.result()
                    kept += was_there
                    progress.expected += (0 if was_there else parts[number].total.bytes) - sizes[number]
                    if parts[number].doubts:
                        tqdm.write(
                            f"{parts[number].doubts}; encoded shard {number} with tiktoken", sys.stderr
                        )
                progress.show()
        except BrokenProcessPool:
            raise RunError("a worker was killed, perhaps for want of memory; try fewer --workers") from None
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            # Waits for the pool's own thread: Python's end can trip over one that is just ending.
            pool.shutdown(cancel_futures=True)
            raise
    if kept:
        print(f"{kept} of {len(shards)} shards were there from an earlier start")
    engine = "tiktoken" if setup is None else "gigatoken"
    print(f"Encoded {shared[1]:,} tokens with {engine} at {progress.tokens_per_second:,.0f} tokens/s")
    return [parts[number] for number in range(len(shards))]


# ------------------------------------------------------------------------------------------------------------
# The data set
# ------------------------------------------------------------------------------------------------------------

Segment = tuple[Path, int, int]  # a file of raw tokens, and which of them


def lay_out(parts: list[Part], fraction: float) -> dict[str, tuple[Counts, list[Segment]]]:
    """What each split consists of. Raises InputError where the documents do not make two splits.

    Where no document happened to fall to validation, the last one goes there; of a single one, its end. (A
    text in one file is one document: without this it would have nothing to be validated on.)
    """
    totals = {split: Counts() for split in SPLITS}
    for part in parts:
        for split, counts in part.counts.items():
            totals[split].add(counts)
    segments = {
        split: [(part.folder / split, 0, part.counts[split].tokens) for part in parts] for split in SPLITS
    }
    train, validation = (totals[split] for split in SPLITS)
    require(train.documents > 0, "the source holds no documents to train on")
    if validation.documents == 0:
        index = max(i for i, part in enumerate(parts) if part.counts["train"].documents)
        last = parts[index].last
        tokens, size = last.tokens, last.bytes
        if train.documents == 1:
            tokens = max(1, int(tokens * fraction))
            size = round(size * tokens / last.tokens)
        require(tokens < train.tokens, "the source holds no text for validation beside that for training")
        path, start, stop = segments["train"][index]
        segments["train"][index] = (path, start, stop - tokens)
        segments["validation"] = [(path, stop - tokens, stop)]
        validation.add(Counts(1, tokens, size))
        train.add(Counts(-1 if train.documents > 1 else 0, -tokens, -size))
    return {split: (totals[split], segments[split]) for split in SPLITS}


def join_segments(segments: list[Segment], path: Path) -> None:
    """Write segments as one safetensors file, a stream with nothing held."""
    size = 2 * sum(stop - start for _, start, stop in segments)
    description = {"tokens": {"dtype": "U16", "shape": [size // 2], "data_offsets": [0, size]}}
    header = json.dumps(description, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format's alignment of what follows
    with path.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for source, start, stop in segments:
            with source.open("rb") as file:
                file.seek(2 * start)
                left = 2 * (stop - start)
                while block := file.read(min(left, 1 << 20)):
                    out.write(block)
                    left -= len(block)


def read_back(path: Path, counts: Counts, encoding: tiktoken.Encoding) -> tuple[str, int]:
    """The SHA-256 of a finished file, and how many end-of-text tokens it holds.

    Raises RunError if it does not hold the tokens that were counted.
    """
    from safetensors import SafetensorError, safe_open

    digest, ends, largest = hashlib.sha256(), 0, 0
    try:
        with safe_open(path, framework="np") as file:
            whole = file.get_slice("tokens").get_shape() == [counts.tokens]
        with path.open("rb") as file:  # not mapped: its pages would count as this process's memory
            digest.update(file.read(path.stat().st_size - 2 * counts.tokens))
            while block := file.read(1 << 20):
                digest.update(block)
                tokens = np.frombuffer(block, dtype="<u2")
                ends += int(np.count_nonzero(tokens == encoding.eot_token))
                largest = max(largest, int(tokens.max()))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read back: {error}") from None
    if not whole or largest >= encoding.n_vocab:
        raise RunError(f"{path}: came out damaged; is the disk sound? Run the same command again")
    return digest.hexdigest(), ends


def write_dataset(
    folder: Path, parts: list[Part], settings: Settings, encoding: tiktoken.Encoding
) -> dict[str, Any]:
    """Write the token files of both splits, check them, and return what meta.json says of them."""
    try:
        splits = lay_out(parts, settings.validation_fraction)
    except InputError:
        for part in parts:  # of no use with any other source
            shutil.rmtree(part.folder)
        raise
    sha256, ends = {}, 0
    for split, (counts, segments) in splits.items():
        path = folder / f"{split}.safetensors"
        join_segments(segments, path)
        sha256[path.name], found = read_back(path, counts, encoding)
        ends += found
    if ends != sum(part.total.documents for part in parts):
        raise RunError(
            f"{folder}: documents were lost on the way; is the disk sound? Run the same command again"
        )
    return {
        **asdict(settings),
        "vocab_size": encoding.n_vocab,
        "token_dtype": "uint16",
        "end_of_text": encoding.eot_token,
        "splits": {split: asdict(counts) for split, (counts, _) in splits.items()},
        "replaced": sum(part.replaced for part in parts),
        "sha256": sha256,
        "versions": {"python": platform.python_version(), "tiktoken": importlib.metadata.version("tiktoken")},
    }


def draw_lengths(parts: list[Part], path: Path, title: str) -> str:
    """Draw a histogram of the documents' lengths in tokens, in xkcd style; return the figures in words."""
    from basemodel.charts import xkcd_figure

    lengths = np.concatenate([np.fromfile(part.folder / "lengths", dtype="<u4") for part in parts])
    mean, median, total = float(lengths.mean()), float(np.median(lengths)), int(lengths.sum(dtype=np.int64))
    lost = 1 - np.minimum(lengths, CONTEXT_LENGTH).sum(dtype=np.int64) / total
    with xkcd_figure((10, 6)) as figure:
        axes = figure.subplots()
        axes.hist(lengths, bins=np.geomspace(1, lengths.max() + 1, 60))
        axes.set(xscale="log", title=title, xlabel="tokens in a document", ylabel="documents")
        axes.axvline(mean, color="tab:red", label=f"mean {mean:,.0f}")
        axes.axvline(median, color="tab:green", label=f"median {median:,.0f}")
        axes.axvline(CONTEXT_LENGTH, color="tab:gray", label=f"cropping here would lose {lost:.1%}")
        axes.legend()
        figure.savefig(path, dpi=90)
    return (
        f"Tokens per document: mean {mean:,.1f}, median {median:,.0f}; {total:,} tokens in all\n"
        f"Cropping every document to {CONTEXT_LENGTH:,} tokens would lose {lost:.1%} of them"
    )


def card(name: str, meta: dict[str, Any]) -> str:
    """The data set's card for the Hub: YAML between two rules, then Markdown."""
    from huggingface_hub import DatasetCardData

    header = DatasetCardData(
        pretty_name=name,
        task_categories=["text-generation"],
        tags=["tokens", meta["tokenizer"], "safetensors"],
        source_datasets=[meta["source"]] if meta["revision"] else None,
    )
    revision = f" at revision `{meta['revision']}`" if meta["revision"] else ""
    rows = "".join(
        f"| {split} | {counts['documents']:,} | {counts['tokens']:,} | {counts['bytes']:,} | "
        f"`{meta['sha256'][f'{split}.safetensors']}` |\n"
        for split, counts in meta["splits"].items()
    )
    return f"""---
{header.to_yaml()}
---

# {name}

{meta["description"]}. The source is `{meta["source"]}`{revision}, the tokenizer `{meta["tokenizer"]}` with a
vocabulary of {meta["vocab_size"]:,}.

| split | documents | tokens | bytes of text | SHA-256 of the file |
| --- | --- | --- | --- | --- |
{rows}
Each file holds one 1-D uint16 tensor named `tokens`: documents one after another, each followed by
`<|endoftext|>`, token {meta["end_of_text"]}. The checksum of its text decides whether a document is for
validation, as {meta["validation_fraction"]:.3g} of all are. `meta.json` says the same to programs.

```python
from safetensors.numpy import load_file

tokens = load_file("train.safetensors")["tokens"]
```
"""


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unfinished_folder(output_dir: Path) -> Iterator[Path]:
    """OUTPUT_DIR.incomplete for this process alone; kept for the next start if it holds finished parts.

    Raises InputError if another process prepares the same data set, or the folder cannot be written to.
    """
    folder = output_dir.with_name(output_dir.name + ".incomplete")
    try:
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{output_dir}: another process is preparing it; wait for it or end it"
            ) from None
        # A worker that outlives this process by a moment must not hold the lock.
        os.register_at_fork(after_in_child=lock.close)
        remove_unfinished(folder / "parts")
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise InputError(
                f"{folder}: cannot be written: {error.strerror}; make room, about 4 bytes for each token, "
                "and run the same command again: finished shards are kept"
            ) from None
        finally:
            remove_unfinished(folder / "parts")
            if output_dir.exists() or not any((folder / "parts").iterdir()):
                shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(parts_dir: Path) -> None:
    """Remove what workers leave behind that were killed: folders NUMBER.PROCESS."""
    for path in parts_dir.glob("*.*"):
        shutil.rmtree(path, ignore_errors=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option("--tokenizer", type=click.Choice(["gpt2", "bytes"]), default="gpt2", show_default=True)
@click.option(
    "--validation-fraction", type=float, default=0.01, show_default=True, help="Share of the documents."
)
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count(), help="Default: one per core.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "tiktoken", "gigatoken"]),
    default="auto",
    show_default=True,
    help="What encodes; the tokens are the same. auto: gigatoken where it is installed.",
)
@click.option("--text-column", default="text", show_default=True, help="Of .parquet and .jsonl files.")
@click.option("--files", metavar="PATTERN", help="SOURCE is a Hub data set; take its files of such names.")
@click.option("--revision", help="A commit, tag or branch of the Hub data set.")
@click.option("--stats", is_flag=True, help="Also draw a histogram of document lengths.")
@click.option("--push", "repo_id", metavar="OWNER/NAME", help="Then upload the data set to the Hub.")
def main(
    source: str,
    output_dir: Path,
    tokenizer: str,
    validation_fraction: float,
    workers: int,
    engine: str,
    text_column: str,
    files: str | None,
    revision: str | None,
    repo_id: str | None,
    *,
    stats: bool,
) -> None:
    """Encode SOURCE into the data set OUTPUT_DIR: train.safetensors, validation.safetensors and meta.json.

    SOURCE is a folder or file of .parquet, .jsonl or .txt, the word python-docs, or a Hub data set's
    OWNER/NAME with --files.
    """
    require(
        0 < validation_fraction < 1,
        f"--validation-fraction must be between 0 and 1, not {validation_fraction}",
    )
    require(bool(source) and str(output_dir) != ".", "SOURCE and OUTPUT_DIR must be named")
    require(files is not None or revision is None, "--revision goes with --files, for a Hub data set")
    require(
        engine != "gigatoken" or tokenizer == "gpt2", "--engine gigatoken goes with the tokenizer gpt2 only"
    )
    if files is not None:
        require_dataset_id(source)
    if repo_id:
        check_push(repo_id)
    settings = Settings(tokenizer, validation_fraction, text_column)
    if repo_id and (output_dir / "meta.json").exists():
        check_prepared(output_dir, {"source": source, "files": files, **asdict(settings)})
        print(f"{output_dir}: already prepared")
    else:
        require_empty(output_dir)
        with unfinished_folder(output_dir) as folder:
            require_empty(output_dir)  # now that nobody else can fill it
            prepare(
                source,
                output_dir,
                folder,
                settings,
                engine=engine,
                workers=workers,
                hub=(files, revision),
                stats=stats,
            )
    if repo_id:
        push(output_dir, repo_id)


def require_empty(output_dir: Path) -> None:
    """Raise InputError if there is anything in the folder that a data set is to be written to."""
    require(output_dir.is_dir() or not output_dir.exists(), f"{output_dir}: is a file, not a folder")
    have = sorted(path.name for path in output_dir.iterdir())[:3] if output_dir.exists() else []
    require(not have, f"{output_dir}: already holds {' and '.join(have)}; remove it or choose another folder")


def check_prepared(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise InputError unless the folder holds a whole data set, made as `wanted` says."""
    meta = read_json_object(folder / "meta.json")
    for key, value in wanted.items():
        require(meta.get(key) == value, f"{folder}: holds another data set, of {key} '{meta.get(key)}'")
    for name, sha256 in meta.get("sha256", {}).items():
        whole = (folder / name).exists() and fingerprint(folder / name)["sha256"] == sha256
        require(whole, f"{folder / name}: is damaged; remove {folder} and prepare it again")


def find_pieces(
    source: str, pattern: str | None, revision: str | None, text_column: str
) -> tuple[list[Piece], str | None]:
    """What there is to encode, and the commit that it is of if it is from the Hub. Raises InputError."""
    if source == PYTHON_DOCS:
        return [Piece(None, size=2_000_000)], None
    if pattern is None:
        paths = find_files(Path(source))
    else:
        paths, revision = download(source, pattern, revision)
        paths = [path for path in paths if path.name.endswith(FILE_TYPES)]
        known = ", ".join(FILE_TYPES)
        require(bool(paths), f"{source}: has no {known} files that match --files '{pattern}'")
    pieces = [piece for path in paths for piece in cut_into_pieces(path, text_column)]
    require(bool(pieces), f"{source}: holds no documents to train on")
    return pieces, revision


def prepare(
    source: str,
    output_dir: Path,
    folder: Path,
    settings: Settings,
    *,
    engine: str,
    workers: int,
    hub: tuple[str | None, str | None],
    stats: bool,
) -> None:
    """Prepare a data set in the folder OUTPUT_DIR.incomplete, then give it its name. Raises InputError."""
    pattern, revision = hub
    encoding = get_tokenizer(settings.tokenizer)
    setup = set_up_engine(engine, encoding, folder)
    pieces, revision = find_pieces(source, pattern, revision, settings.text_column)
    parts = encode_all(make_shards(pieces), folder / "parts", settings, setup, workers=workers)
    finished = folder / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    meta = {
        "description": f"{source} as tokens: one tensor 'tokens' per split, end-of-text after each document",
        "source": source,
        "files": pattern,
        "revision": revision,
        **write_dataset(finished, parts, settings, encoding),
    }
    (finished / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    (finished / "README.md").write_text(card(output_dir.name, meta), encoding="utf-8")
    if stats:
        print(draw_lengths(parts, finished / "document-lengths.png", f"{output_dir.name}: document lengths"))
    for path in (*finished.iterdir(), finished):
        sync(path)
    finished.replace(output_dir)
    sync(output_dir.parent)
    if meta["replaced"]:
        print(f"Invalid UTF-8 was replaced by {meta['replaced']:,} characters U+FFFD")
    for split, counts in meta["splits"].items():
        path = output_dir / f"{split}.safetensors"
        print(f"{path}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


if __name__ == "__main__":
    run_command(main)
