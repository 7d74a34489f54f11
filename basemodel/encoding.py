"""Tokenizing shards of documents in parallel, each into a folder of its own that survives interruptions."""

import concurrent.futures
import contextlib
import io
import json
import math
import multiprocessing
import os
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

from tqdm import tqdm

from basemodel.documents import Piece, in_validation, read_documents
from basemodel.errors import RunError
from basemodel.files import fingerprint
from basemodel.tokenizer import (
    Encoder,
    EnginesDisagree,
    GigatokenEncoder,
    get_tokenizer,
    tiktoken_encoder,
)

SPLITS = ("train", "validation")
PART_FILES = (*SPLITS, "lengths")
# Forked workers share the loaded vocabulary. The threads that numpy and pyarrow keep survive a fork, and none
# of ours runs yet; macOS's own libraries do not survive one.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass
class Counts:
    """The size of a split; `bytes` of UTF-8 text, for bits per byte."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: "Counts") -> None:
        """Add another count to this one."""
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
    """An encoded shard: a folder with the raw uint16 tokens of each split, the document lengths in tokens
    (uint32), and record.json, which holds the other fields."""

    folder: Path
    key: list[Any]  # identifies the input and the settings
    counts: dict[str, Counts] = field(default_factory=lambda: {split: Counts() for split in SPLITS})
    last: Counts = field(default_factory=Counts)  # the last training document
    replaced: int = 0  # invalid UTF-8 sequences
    sha256: dict[str, str] = field(default_factory=dict)  # by file name
    disagreement: str = ""  # why gigatoken was not used

    def save(self) -> None:
        """Write record.json."""
        self.sha256 = self._hashes()
        values = asdict(self)
        del values["folder"]
        (self.folder / "record.json").write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, key: list[Any]) -> "Part | None":
        """A part finished by an earlier run; None if there is none with this key, or it is damaged."""
        try:
            values = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            counts = {split: Counts(**values["counts"][split]) for split in SPLITS}
            part = cls(folder, **(values | {"counts": counts, "last": Counts(**values["last"])}))
            return part if part.key == key and part.sha256 == part._hashes() else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _hashes(self) -> dict[str, str]:
        return {name: fingerprint(self.folder / name)["sha256"] for name in PART_FILES}


# ------------------------------------------------------------------------------------------------------------
# In a worker
# ------------------------------------------------------------------------------------------------------------


def encode_shard(
    number: int, shard: list[Piece], parts_dir: Path, settings: Settings, gigatoken: GigatokenEncoder | None
) -> tuple[Part, bool]:
    """Encode a shard into a folder under `parts_dir`, which gets its name once it is complete.

    The second value says whether an earlier run had finished it. Raises InputError.
    """
    key = [asdict(settings), *(piece.identity() for piece in shard)]
    folder = parts_dir / f"{number:06d}"
    if part := Part.load(folder, key):
        return part, True
    unfinished = parts_dir / f"{number:06d}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.mkdir()
    end_of_text = get_tokenizer(settings.tokenizer).eot_token
    with_tiktoken = tiktoken_encoder(settings.tokenizer)
    try:
        try:
            part = Part(unfinished, key)
            encode_documents(shard, part, settings, gigatoken or with_tiktoken, end_of_text)
        except EnginesDisagree as error:
            part = Part(unfinished, key, disagreement=str(error))
            encode_documents(shard, part, settings, with_tiktoken, end_of_text)
        part.save()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    part.folder = unfinished.rename(folder)
    return part, False


def encode_documents(
    shard: list[Piece], part: Part, settings: Settings, encode: Encoder, end_of_text: int
) -> None:
    """Encode the documents of a shard into the files of `part`, and count them."""
    with contextlib.ExitStack() as stack:
        *splits, lengths = (stack.enter_context((part.folder / name).open("wb")) for name in PART_FILES)
        train, validation = (SplitWriter(file, lengths, encode, end_of_text) for file in splits)
        for piece in shard:
            for document in read_documents(piece, settings.text_column):
                held_out = in_validation(document, settings.validation_fraction)
                (validation if held_out else train).write(document)
                part.replaced += document.replaced
    _report(Counts(), at_least=0)
    part.counts = {"train": train.counts, "validation": validation.counts}
    part.last = train.last


class SplitWriter:
    """Encodes the documents of one split and writes their tokens and lengths."""

    def __init__(self, tokens: BinaryIO, lengths: BinaryIO, encode: Encoder, end_of_text: int) -> None:
        self.counts, self.last = Counts(), Counts()  # all documents, and the last one
        self._tokens, self._lengths, self._encode = tokens, lengths, encode
        self._end = end_of_text.to_bytes(2, "little")

    def write(self, document: Iterable[bytes]) -> None:
        """Write a document, given as fragments that can be encoded one by one."""
        self.last = Counts()
        for text in document:
            tokens = self._encode(text)
            self._tokens.write(tokens.astype("<u2").tobytes())
            self._count(Counts(0, len(tokens), len(text)))
        self._tokens.write(self._end)
        self._count(Counts(1, 1, 0))
        self._lengths.write(self.last.tokens.to_bytes(4, "little"))

    def _count(self, more: Counts) -> None:
        self.last.add(more)
        self.counts.add(more)
        _report(more)


_shared: Any  # documents, tokens and bytes encoded by all workers
_unreported = Counts()


def _report(counts: Counts, at_least: int = 1 << 20) -> None:
    """Add to what all workers have encoded, at least so many bytes of text at a time."""
    _unreported.add(counts)
    if _unreported.bytes >= at_least:
        with _shared.get_lock():
            for index, name in enumerate(("documents", "tokens", "bytes")):
                _shared[index] += getattr(_unreported, name)
                setattr(_unreported, name, 0)


def _start_worker(shared: Any) -> None:
    """Set up a worker process. It ends with the main process, which alone handles Ctrl-C."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# ------------------------------------------------------------------------------------------------------------
# In the main process
# ------------------------------------------------------------------------------------------------------------


class Progress:
    """Bytes, documents, tokens, tokens/s and ETA: a bar on a terminal, else a line every 15 seconds."""

    def __init__(self, expected: int, shared: Any) -> None:
        self._shared, self._started = shared, time.monotonic()
        terminal = sys.stderr.isatty()
        self._last_line = math.inf if terminal else self._started
        self._bar = tqdm(
            total=expected,
            desc="encoding",
            unit="B",
            unit_scale=True,
            mininterval=0.1 if terminal else 15,
            file=sys.stderr if terminal else io.StringIO(),
        )
        self.expected = expected  # bytes of text, roughly
        self.close = self._bar.close

    @property
    def tokens_per_second(self) -> float:
        """The mean over all workers since the start."""
        return self._shared[1] / (time.monotonic() - self._started)

    def show(self) -> None:
        """Update the bar or, when it is time, print a line."""
        documents, tokens, size = self._shared[:]
        self._bar.total = max(self.expected, size)
        done = f"{documents:,} documents, {tokens:,} tokens, {self.tokens_per_second:,.0f} tokens/s"
        self._bar.set_postfix_str(done, refresh=False)
        self._bar.update(size - self._bar.n)
        if time.monotonic() - self._last_line > 15:
            self._last_line = time.monotonic()
            print(self._bar, file=sys.stderr, flush=True)


@contextlib.contextmanager
def worker_pool(count: int, shared: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of workers that ends with any error; raises RunError if a worker is killed."""
    with ProcessPoolExecutor(count, CONTEXT, _start_worker, (shared,)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise RunError("a worker was killed, perhaps out of memory; try fewer --workers") from None
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            # Wait for the pool's own thread: Python may crash at exit while one is just ending.
            pool.shutdown(cancel_futures=True)
            raise


def encode_all(
    shards: list[list[Piece]],
    parts_dir: Path,
    settings: Settings,
    gigatoken: GigatokenEncoder | None,
    workers: int,
) -> list[Part]:
    """Encode all shards with a pool of workers, showing progress; returns the parts in the shards' order.

    Raises InputError, and RunError if a worker is killed.
    """
    tiktoken_encoder(settings.tokenizer)  # loaded here once for all forked workers
    shared = CONTEXT.Array("q", 3)  # documents, tokens and bytes encoded by all workers
    sizes = [sum(piece.size for piece in shard) for shard in shards]
    parts, kept = {}, 0
    with worker_pool(min(workers, len(shards)), shared) as pool:
        # Largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(shards)), key=lambda i: -sizes[i])
        jobs = {pool.submit(encode_shard, i, shards[i], parts_dir, settings, gigatoken): i for i in order}
        waiting = set(jobs)
        with contextlib.closing(Progress(sum(sizes), shared)) as progress:
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                for job in finished:
                    number = jobs[job]
                    part, was_there = job.result()
                    parts[number] = part
                    kept += was_there
                    encoded = 0 if was_there else sum(counts.bytes for counts in part.counts.values())
                    progress.expected += encoded - sizes[number]
                    if part.disagreement:
                        tqdm.write(f"{part.disagreement}; encoded shard {number} with tiktoken", sys.stderr)
                progress.show()
    if kept:
        print(f"{kept} of {len(shards)} shards were already encoded by an earlier run")
    engine = "gigatoken" if gigatoken else "tiktoken"
    print(f"Encoded {shared[1]:,} tokens with {engine} at {progress.tokens_per_second:,.0f} tokens/s")
    return [parts[number] for number in range(len(shards))]
