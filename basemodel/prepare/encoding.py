"""Tokenizing shards of documents in parallel, into folders that survive interruptions."""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from basemodel.common.errors import RunError
from basemodel.common.files import fingerprint
from basemodel.data.tokenizer import (
    Encoder,
    EnginesDisagree,
    GigatokenEncoder,
    get_tokenizer,
    tiktoken_encoder,
)
from basemodel.prepare import documents
from basemodel.prepare.documents import LongText, Piece, Text, in_validation
from basemodel.prepare.readers import read_documents

SPLITS = ("train", "validation")
PART_FILES = (*SPLITS, "lengths", "hashes")
COUNTED = ("documents", "tokens", "bytes")  # what a size counts, in int64; bytes of UTF-8, for bits per byte
JOB_BYTES = 500_000  # of text; the buffers of larger ones cost page faults
SAMPLE_BYTES = 50_000_000  # of text, to train a tokenizer on
# Forked workers share the loaded vocabulary. The threads that numpy and pyarrow keep survive a fork, and none
# of ours runs yet; macOS's own libraries do not survive one.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(frozen=True)
class Settings:
    """How to encode, the same for every shard."""

    tokenizer: str
    validation_fraction: float
    text_column: str
    train_tokenizer: int | None = None  # tokens that the tokenizer "dataset" was trained to have
    tokenizer_sha256: str | None = None  # of its tokenizer.json
    folder: Path | None = None  # where that is

    def identity(self) -> dict[str, Any]:
        """What decides about the tokens, for meta.json and to know what an earlier run has encoded."""
        return {key: value for key, value in asdict(self).items() if key != "folder" and value is not None}


@dataclass(frozen=True)
class Part:
    """Encoded text of about SHARD_BYTES, a folder.

    It contains the raw uint16 tokens of each split, the length of each document in tokens (uint32) and its
    hash (uint64), and record.json: the `key` that identifies input and settings, the size of each split, how
    many rows were `read` and how many of those `empty` or `null`, how many invalid UTF-8 sequences were
    `replaced`, whether the part is its shard's `last`, why gigatoken was not used (its `disagreement`, or
    ""), and the `sha256` of the other files.
    """

    folder: Path
    record: dict[str, Any]
    resumed: bool  # finished by an earlier run


# ------------------------------------------------------------------------------------------------------------
# In a worker
# ------------------------------------------------------------------------------------------------------------


def encode_shard(
    number: int, shard: list[Piece], parts_dir: Path, settings: Settings, gigatoken: GigatokenEncoder | None
) -> list[Part]:
    """Encode a shard into parts: folders in `parts_dir`, which get their names once they are complete.

    What an earlier run has finished is read, to find the next document, but not encoded again. Raises
    InputError.
    """
    key = [settings.identity(), *(piece.identity() for piece in shard)]
    parts: list[Part] = []
    stream = None
    while not parts or not parts[-1].record["last"]:
        folder = parts_dir / f"{number:06d}-{len(parts):04d}"
        if record := finished_record(folder, key):
            parts.append(Part(folder, record, resumed=True))
            stream = None
            continue
        shutil.rmtree(folder, ignore_errors=True)
        unfinished = parts_dir / f"{folder.name}.{os.getpid()}"  # removed by the main process after any error
        unfinished.mkdir()
        rows, disagreement = sum(part.record["read"] for part in parts), ""
        try:
            stream = stream or encoded_jobs(shard, rows, settings, gigatoken)
            record = write_part(stream, unfinished)
        except EnginesDisagree as error:
            disagreement, gigatoken = str(error), None
            stream = encoded_jobs(shard, rows, settings, gigatoken)
            record = write_part(stream, unfinished)
        record |= {"key": key, "disagreement": disagreement, "sha256": _hashes(unfinished)}
        (unfinished / "record.json").write_text(json.dumps(record), encoding="utf-8")
        parts.append(Part(unfinished.rename(folder), record, resumed=False))
    return parts


def finished_record(folder: Path, key: list[Any]) -> dict[str, Any] | None:
    """The record of a part from an earlier run; None if there is none with this key, or it is damaged."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return record if record["key"] == key and record["sha256"] == _hashes(folder) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _hashes(folder: Path) -> dict[str, str]:
    return {name: fingerprint(folder / name)["sha256"] for name in PART_FILES}


@dataclass
class Job:
    """Text to encode at once: short documents of about JOB_BYTES together, or a fragment of a long one."""

    texts: list[bytes] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)  # for validation
    hashes: list[bytes] = field(default_factory=list)
    complete: bool = True  # False: the only document goes on in the next job
    counts: Counter = field(default_factory=Counter)  # rows that were read, and what became of them
    size: int = 0  # bytes of text
    tokens: np.ndarray | None = None  # once encoded: with end-of-text after each document that is complete
    lengths: np.ndarray | None = None  # the tokens of each document

    def add(self, document: Text | None, split: str | None, settings: Settings) -> None:
        """Add a document; a null or an empty one is only counted."""
        self.counts["read"] += 1
        if document is None or not document.content:
            self.counts["null" if document is None else "empty"] += 1
            return
        self.counts["replaced"] += document.replaced
        self.size += len(document.content)
        self.texts.append(document.content)
        self.held_out.append(is_held_out(document, split, settings))
        self.hashes.append(hash_of(document))

    def encode(self, encoder: Encoder, end_of_text: int) -> "Job":
        """Make the tokens; returns the job itself."""
        self.tokens = encoder(self.texts) if self.texts else np.zeros(0, np.uint16)
        self.lengths = np.diff(np.flatnonzero(self.tokens == end_of_text), prepend=-1)
        if not self.complete:
            self.tokens, self.lengths = self.tokens[:-1], self.lengths - 1
        return self


def is_held_out(document: Iterable[bytes], split: str | None, settings: Settings) -> bool:
    """Whether a document is for validation: by the source's own split or, where that is None, by its text."""
    return split == "validation" if split else in_validation(document, settings.validation_fraction)


def hash_of(document: Iterable[bytes]) -> bytes:
    """Eight bytes, the same for equal documents, and hardly ever for others."""
    digest = hashlib.blake2b(digest_size=8)
    for fragment in document:
        digest.update(fragment)
    return digest.digest()


def jobs_of(shard: list[Piece], skip: int, settings: Settings) -> Iterator[Job]:
    """The jobs that a shard's documents make, without its first `skip` rows."""
    column = settings.text_column
    rows = ((document, piece.split) for piece in shard for document in read_documents(piece, column))
    job = Job()
    for document, split in itertools.islice(rows, skip, None):
        if isinstance(document, LongText):
            yield job
            yield from jobs_of_long(document, split, settings)
            job = Job()
        else:
            job.add(document, split, settings)
            if job.size >= JOB_BYTES or job.counts["read"] == JOB_BYTES // 100:
                yield job
                job = Job()
    yield job


def jobs_of_long(document: LongText, split: str | None, settings: Settings) -> Iterator[Job]:
    """The jobs that the fragments of a long document make."""
    about = [is_held_out(document, split, settings)], [hash_of(document)]
    fragments = iter(document)
    fragment = next(fragments)
    for following in fragments:
        yield Job([fragment], *about, complete=False, size=len(fragment))
        fragment = following
    counts = Counter(read=1, replaced=document.replaced)
    yield Job([fragment], *about, counts=counts, size=len(fragment))


def encoded_jobs(
    shard: list[Piece], skip: int, settings: Settings, gigatoken: GigatokenEncoder | None
) -> Iterator[Job]:
    """The same, encoded, in order; where there are more cores than shards, by several threads."""
    encoder = gigatoken or tiktoken_encoder(settings.tokenizer, settings.folder)
    end_of_text = get_tokenizer(settings.tokenizer, settings.folder).eot_token
    threads = 1 if gigatoken else _threads
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[concurrent.futures.Future[Job]] = collections.deque()
        for job in jobs_of(shard, skip, settings):
            waiting.append(pool.submit(job.encode, encoder, end_of_text))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_part(stream: Iterator[Job], folder: Path) -> dict[str, Any]:
    """Write encoded jobs of SHARD_BYTES into the files of a part; return what the record says of them."""
    sizes = {split: np.zeros(3, np.int64) for split in SPLITS}
    counts, begun, encoded = Counter(read=0, empty=0, null=0, replaced=0), 0, _encoded
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in PART_FILES}
        for job in stream:
            held_out = np.array(job.held_out, bool)
            of_token, of_text = np.repeat(held_out, job.lengths), np.array([len(text) for text in job.texts])
            for split, chosen in (("train", False), ("validation", True)):
                tokens = job.tokens[of_token == chosen]
                files[split].write(tokens.astype("<u2").tobytes())
                ended = np.sum(held_out == chosen) if job.complete else 0
                size = np.array([ended, len(tokens), of_text[held_out == chosen].sum()], np.int64)
                sizes[split] += size
                encoded += size
            counts.update(job.counts)
            if not job.complete:
                begun += len(job.tokens)
                continue
            if begun:
                job.lengths[0] += begun
                begun = 0
            files["lengths"].write(job.lengths.astype("<u4").tobytes())
            files["hashes"].write(b"".join(job.hashes))
            if sum(size[2] for size in sizes.values()) >= documents.SHARD_BYTES:
                last = False
                break
        else:
            last = True
    return {split: size.tolist() for split, size in sizes.items()} | {**counts, "last": last}


_encoded: np.ndarray  # the size of all that this worker has encoded, in memory that the main process reads
_threads = 1  # that this worker encodes with


def _start_worker(memory: Any, slots: Any, threads: int, folder: Path) -> None:
    """Set up a worker process. It ends with the main process, which alone handles Ctrl-C.

    Its temporary files are made in `folder`, on the disk that the tokens go to.
    """
    global _encoded, _threads
    _threads, tempfile.tempdir = threads, str(folder)
    _encoded = np.frombuffer(memory, np.int64).reshape(-1, 3)[slots.get()]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# ------------------------------------------------------------------------------------------------------------
# In the main process
# ------------------------------------------------------------------------------------------------------------


def sample_texts(pieces: list[Piece], settings: Settings) -> Iterator[str]:
    """About SAMPLE_BYTES of the training documents: the first ones of each piece, in proportion to its size.

    Raises InputError.
    """
    share = min(1.0, SAMPLE_BYTES / max(1, sum(piece.size for piece in pieces)))
    for piece in pieces:
        room = piece.size * share
        documents = filter(None, read_documents(piece, settings.text_column))
        training = (each for each in documents if not is_held_out(each, piece.split, settings))
        for text in itertools.chain.from_iterable(training):
            yield text.decode()
            room -= len(text)
            if share < 1 and room <= 0:
                break


class Progress(tqdm):
    """Bytes, documents, tokens, tokens/s and ETA: a bar on a terminal, else a line every 15 seconds."""

    def __init__(self, expected: int, encoded: np.ndarray) -> None:
        terminal = sys.stderr.isatty()
        super().__init__(
            total=expected,
            desc="encoding",
            unit="B",
            unit_scale=True,
            mininterval=0.1 if terminal else 15,
            file=sys.stderr if terminal else io.StringIO(),
        )
        self.expected, self.encoded = expected, encoded  # bytes of text, roughly; the size of each worker's
        self.next_line = math.inf if terminal else time.monotonic() + 15

    @property
    def tokens_per_second(self) -> float:
        """The mean over all workers since the start."""
        return self.encoded[:, 1].sum() / self.format_dict["elapsed"]

    def show(self) -> None:
        """Update the bar or, when it is time, print a line."""
        documents, tokens, size = self.encoded.sum(axis=0).tolist()
        self.total = max(self.expected, size)
        done = f"{documents:,} documents, {tokens:,} tokens, {self.tokens_per_second:,.0f} tokens/s"
        self.set_postfix_str(done, refresh=False)
        self.update(size - self.n)
        if time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + 15
            print(self, file=sys.stderr, flush=True)


@contextlib.contextmanager
def worker_pool(count: int, threads: int, folder: Path) -> Iterator[tuple[ProcessPoolExecutor, np.ndarray]]:
    """A pool of workers with `threads` each, and the size of what each has encoded so far, shape (count, 3).

    The workers end with any error. Raises RunError if one is killed.
    """
    memory, slots = CONTEXT.RawArray("q", 3 * count), CONTEXT.SimpleQueue()
    for slot in range(count):
        slots.put(slot)
    with ProcessPoolExecutor(count, CONTEXT, _start_worker, (memory, slots, threads, folder)) as pool:
        try:
            yield pool, np.frombuffer(memory, np.int64).reshape(-1, 3)
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
    tiktoken_encoder(settings.tokenizer, settings.folder)  # loaded here once for all forked workers
    expected = [sum(piece.size for piece in shard) for shard in shards]
    parts: dict[int, list[Part]] = {}
    count = min(workers, len(shards))
    with worker_pool(count, workers // count, parts_dir) as (pool, encoded):
        # Largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(shards)), key=lambda i: -expected[i])
        jobs = {pool.submit(encode_shard, i, shards[i], parts_dir, settings, gigatoken): i for i in order}
        waiting = set(jobs)
        with Progress(sum(expected), encoded) as progress:
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                for job in finished:
                    number = jobs[job]
                    parts[number] = job.result()
                    fresh = [part for part in parts[number] if not part.resumed]
                    done = sum(part.record[split][2] for part in fresh for split in SPLITS)
                    progress.expected += done - expected[number]
                    for reason in filter(None, (part.record["disagreement"] for part in fresh)):
                        tqdm.write(f"{reason}; encoded shard {number} with tiktoken", sys.stderr)
                progress.show()
    found = [part for number in range(len(shards)) for part in parts[number]]
    if kept := sum(part.resumed for part in found):
        print(f"{kept} of {len(found)} shards were already encoded by an earlier run")
    engine = "gigatoken" if gigatoken else "tiktoken"
    tokens, speed = encoded[:, 1].sum(), progress.tokens_per_second
    print(f"Encoded {tokens:,} tokens with {engine} at {speed:,.0f} tokens/s")
    return found
