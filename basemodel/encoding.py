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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from basemodel.documents import Piece, in_validation, read_documents
from basemodel.errors import RunError
from basemodel.files import fingerprint
from basemodel.tokenizer import Encoder, EnginesDisagree, GigatokenEncoder, get_tokenizer, tiktoken_encoder

SPLITS = ("train", "validation")
PART_FILES = (*SPLITS, "lengths")
COUNTED = ("documents", "tokens", "bytes")  # what a size counts, in int64; bytes of UTF-8, for bits per byte
# Forked workers share the loaded vocabulary. The threads that numpy and pyarrow keep survive a fork, and none
# of ours runs yet; macOS's own libraries do not survive one.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(frozen=True)
class Settings:
    """How to encode, the same for every shard."""

    tokenizer: str
    validation_fraction: float
    text_column: str
    tokenizer_sha256: str | None = None  # of tokenizer.json, beside the parts, for the tokenizer "dataset"


@dataclass(frozen=True)
class Part:
    """An encoded shard: a folder with the raw uint16 tokens of each split, the document lengths in tokens
    (uint32), and record.json.

    The record holds the `key` that identifies input and settings, the counts of each split and of the `last`
    training document, how many invalid UTF-8 sequences were `replaced`, why gigatoken was not used (its
    `disagreement`, or ""), and the `sha256` of the other files.
    """

    folder: Path
    record: dict[str, Any]
    resumed: bool  # finished by an earlier run


# ------------------------------------------------------------------------------------------------------------
# In a worker
# ------------------------------------------------------------------------------------------------------------


def encode_shard(
    number: int, shard: list[Piece], parts_dir: Path, settings: Settings, gigatoken: GigatokenEncoder | None
) -> Part:
    """Encode a shard into a folder under `parts_dir`, which gets its name once it is complete.

    Raises InputError.
    """
    key = [asdict(settings), *(piece.identity() for piece in shard)]
    folder = parts_dir / f"{number:06d}"
    if record := finished_record(folder, key):
        return Part(folder, record, resumed=True)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = parts_dir / f"{number:06d}.{os.getpid()}"  # removed by the main process after any error
    unfinished.mkdir()
    with_tiktoken, disagreement = tiktoken_encoder(settings.tokenizer, parts_dir.parent), ""
    end_of_text = get_tokenizer(settings.tokenizer, parts_dir.parent).eot_token
    try:
        record = encode_documents(shard, unfinished, settings, gigatoken or with_tiktoken, end_of_text)
    except EnginesDisagree as error:
        disagreement = str(error)
        record = encode_documents(shard, unfinished, settings, with_tiktoken, end_of_text)
    record |= {"key": key, "disagreement": disagreement, "sha256": _hashes(unfinished)}
    (unfinished / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return Part(unfinished.rename(folder), record, resumed=False)


def finished_record(folder: Path, key: list[Any]) -> dict[str, Any] | None:
    """The record of a part from an earlier run; None if there is none with this key, or it is damaged."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return record if record["key"] == key and record["sha256"] == _hashes(folder) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _hashes(folder: Path) -> dict[str, str]:
    return {name: fingerprint(folder / name)["sha256"] for name in PART_FILES}


def encode_documents(
    shard: list[Piece], folder: Path, settings: Settings, encode: Encoder, end_of_text: int
) -> dict[str, Any]:
    """Encode the documents of a shard into the files of its folder; return what the record says of them."""
    sizes, replaced = {name: np.zeros(3, np.int64) for name in (*SPLITS, "last")}, 0
    encoded = _encoded
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in PART_FILES}
        for piece in shard:
            for document in read_documents(piece, settings.text_column):
                held_out = in_validation(document, settings.validation_fraction)
                split = "validation" if held_out else "train"
                before = encoded.copy()
                for text in document:  # in fragments that can be encoded one by one
                    tokens = encode(text)
                    files[split].write(tokens.astype("<u2").tobytes())
                    encoded += (0, len(tokens), len(text))
                files[split].write(end_of_text.to_bytes(2, "little"))
                encoded += (1, 1, 0)
                size = encoded - before
                files["lengths"].write(int(size[1]).to_bytes(4, "little"))
                sizes[split] += size
                sizes["last"] = sizes["last"] if held_out else size
                replaced += document.replaced
    return {name: size.tolist() for name, size in sizes.items()} | {"replaced": replaced}


_encoded: np.ndarray  # the size of all that this worker has encoded, in memory that the main process reads


def _start_worker(memory: Any, slots: Any) -> None:
    """Set up a worker process. It ends with the main process, which alone handles Ctrl-C."""
    global _encoded
    _encoded = np.frombuffer(memory, np.int64).reshape(-1, 3)[slots.get()]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# ------------------------------------------------------------------------------------------------------------
# In the main process
# ------------------------------------------------------------------------------------------------------------


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
def worker_pool(count: int) -> Iterator[tuple[ProcessPoolExecutor, np.ndarray]]:
    """A pool of workers, and the size of what each has encoded so far, shape (count, 3).

    The workers end with any error. Raises RunError if one is killed.
    """
    memory, slots = CONTEXT.RawArray("q", 3 * count), CONTEXT.SimpleQueue()
    for slot in range(count):
        slots.put(slot)
    with ProcessPoolExecutor(count, CONTEXT, _start_worker, (memory, slots)) as pool:
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
    tiktoken_encoder(settings.tokenizer, parts_dir.parent)  # loaded here once for all forked workers
    expected = [sum(piece.size for piece in shard) for shard in shards]
    parts = {}
    with worker_pool(min(workers, len(shards))) as (pool, encoded):
        # Largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(shards)), key=lambda i: -expected[i])
        jobs = {pool.submit(encode_shard, i, shards[i], parts_dir, settings, gigatoken): i for i in order}
        waiting = set(jobs)
        with Progress(sum(expected), encoded) as progress:
            while waiting:
                finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
                for job in finished:
                    number = jobs[job]
                    part = parts[number] = job.result()
                    done = 0 if part.resumed else sum(part.record[split][2] for split in SPLITS)
                    progress.expected += done - expected[number]
                    if reason := part.record["disagreement"]:
                        tqdm.write(f"{reason}; encoded shard {number} with tiktoken", sys.stderr)
                progress.show()
    if kept := sum(part.resumed for part in parts.values()):
        print(f"{kept} of {len(shards)} shards were already encoded by an earlier run")
    engine = "gigatoken" if gigatoken else "tiktoken"
    tokens, speed = encoded[:, 1].sum(), progress.tokens_per_second
    print(f"Encoded {tokens:,} tokens with {engine} at {speed:,.0f} tokens/s")
    return [parts[number] for number in range(len(shards))]
