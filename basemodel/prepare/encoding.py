"""Encoding shards of documents in parallel, by tiktoken or gigatoken, into folders that can be resumed."""

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from basemodel.common.errors import InputError, RunError
from basemodel.common.files import fingerprint
from basemodel.common.output import Progress
from basemodel.data.tokenizer import get_tokenizer
from basemodel.prepare.documents import PYTHON_DOCS, Piece, Text, in_validation
from basemodel.prepare.readers import read_documents

SPLITS = ("train", "validation")
PART_FILES = (*SPLITS, "lengths", "hashes")
EXCERPT_BYTES = 100
COUNTED = ("documents", "tokens", "bytes")  # what a size counts; bytes of UTF-8, for bits per byte
SAMPLE_BYTES = 50_000_000  # of text, to train a tokenizer on
# Forked workers share the loaded vocabulary. The threads that numpy and pyarrow keep survive a fork, and none
# of ours runs yet; macOS's own libraries do not survive one.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")

Encoder = Callable[[bytes], np.ndarray]  # the UTF-8 of a text -> its tokens


@dataclass(frozen=True)
class Settings:
    """How to encode, the same for every shard."""

    tokenizer: str
    validation_fraction: float
    text_column: str
    train_tokenizer: int | None = None  # tokens that the tokenizer "dataset" was trained to have
    tokenizer_sha256: str | None = None  # of its tokenizer.json
    folder: Path | None = None  # where its tokenizer.json is

    def identity(self) -> dict[str, Any]:
        """What decides about the tokens, for meta.json and to recognize what an earlier run has encoded."""
        return {key: value for key, value in asdict(self).items() if key != "folder" and value is not None}


@dataclass(frozen=True)
class Part:
    """An encoded shard: a folder with the raw uint16 tokens of each split, the length of each document in
    tokens (uint32) and its hash (uint64), and record.json: the `key` that identifies input and settings, the
    size of each split, the numbers of `empty` documents, `null` rows and `replaced` invalid UTF-8 sequences,
    the `sha256` of the other files, and how the first, a middle and the last document begin."""

    folder: Path
    record: dict[str, Any]
    resumed: bool  # finished by an earlier run


# With these versions, gigatoken's and tiktoken's tokens have been compared for each of Unicode's characters,
# beside letters, digits, apostrophes and spaces. They are the same for all but those in the ranges below,
# which contain what tiktoken's newer Unicode knows as letters and digits: texts with one go to tiktoken.
COMPARED = {"gigatoken": "0.10.0", "tiktoken": "0.14.0"}
DIFFERING = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce-\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7\U00011db0-\U00011de9"
    "\U00016ea0-\U00016ff6\U000187f8-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)


def encode(tokenizer: tiktoken.Encoding, text: bytes) -> np.ndarray:
    """Encode UTF-8 text with tiktoken. `<|endoftext|>` in the text is ordinary text, never the token."""
    return tokenizer.encode_to_numpy(text.decode(), allowed_special=set(), disallowed_special=())


def find_gigatoken(engine: str, tokenizer: tiktoken.Encoding, folder: Path) -> Path | None:
    """The vocabulary with which gigatoken encodes, written into `folder`; None means to encode with tiktoken.
    Raises InputError if the engine "gigatoken" cannot be used here; "auto" prints why it is not."""
    is_missing = engine == "auto" and importlib.util.find_spec("gigatoken") is None
    if is_missing or engine == "tiktoken" or tokenizer.name != "gpt2":
        return None
    vocabulary = folder / "gpt2.tiktoken"
    tokens = map(tokenizer.decode_single_token_bytes, range(tokenizer.eot_token))
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    vocabulary.write_bytes(b"".join(lines))
    try:
        load_gigatoken(vocabulary)
        versions = {name: importlib.metadata.version(name) for name in COMPARED}
        if versions == COMPARED:
            return vocabulary
        pair = " and ".join(f"{name} {version}" for name, version in versions.items())
        problem = f"{pair} have not been compared with each other"
    except Exception as error:  # anything a library built for another machine can raise
        problem = f"gigatoken does not work here ({type(error).__name__}: {error})"
    if engine == "gigatoken":
        raise InputError(f"--engine gigatoken: {problem}; install it with: pip install -e '.[fast]'")
    print(f"{problem}; encoding with tiktoken", file=sys.stderr)
    return None


def load_gigatoken(vocabulary: Path) -> Any:
    """A gigatoken.Tokenizer for GPT-2 without special tokens, which it would recognize inside the text."""
    import gigatoken

    return gigatoken.Tokenizer.from_tiktoken(vocabulary, pretokenizer="gpt2", special_tokens={})


class GigatokenEncoder:
    """An Encoder that uses gigatoken, and tiktoken for texts with a DIFFERING character. Some texts are
    encoded with both, to raise RunError if one of them gets different tokens."""

    RENEWAL_BYTES = 32_000_000  # of text, after which gigatoken's ever-growing cache of words is dropped

    def __init__(self, tokenizer: tiktoken.Encoding, vocabulary: Path) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._texts, self._bytes = 0, self.RENEWAL_BYTES

    def __call__(self, text: bytes) -> np.ndarray:
        """Encode UTF-8 text."""
        if not text.isascii() and DIFFERING.search(text.decode()):
            return encode(self._tokenizer, text)
        if self._bytes >= self.RENEWAL_BYTES:
            self._gigatoken = None  # free the old one before the new one is loaded
            self._gigatoken, self._bytes = load_gigatoken(self._vocabulary), 0
        tokens = self._gigatoken.encode(text)
        is_sampled = self._texts < 16 or self._texts % 512 == 0
        if is_sampled and not np.array_equal(tokens, encode(self._tokenizer, text)):
            raise RunError(f"gigatoken encodes {text[:40]!r}... unlike tiktoken; try --engine tiktoken")
        self._texts += 1
        self._bytes += len(text)
        return tokens


def encode_shard(
    number: int, shard: list[Piece], parts_dir: Path, settings: Settings, vocabulary: Path | None
) -> Part:
    """Encode a shard into a folder in `parts_dir`, which gets its name once it is complete, unless an earlier
    run has done so. `vocabulary` is gigatoken's, None to use tiktoken. Raises InputError and RunError."""
    key = [settings.identity(), *(piece.identity() for piece in shard)]
    folder = parts_dir / f"{number:06d}"
    if record := finished_record(folder, key):
        return Part(folder, record, resumed=True)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = parts_dir / f"{folder.name}.{os.getpid()}"  # removed by the main process after any error
    unfinished.mkdir()
    tokenizer = get_tokenizer(settings.tokenizer, settings.folder)
    encoder = GigatokenEncoder(tokenizer, vocabulary) if vocabulary else functools.partial(encode, tokenizer)
    record = write_part(shard, unfinished, encoder, settings)
    record |= {"key": key, "sha256": _hashes(unfinished)}
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


def write_part(shard: list[Piece], folder: Path, encoder: Encoder, settings: Settings) -> dict[str, Any]:
    """Encode a shard's documents into the files of a part; return the sizes and counts for its record."""
    end_of_text = np.array([get_tokenizer(settings.tokenizer, settings.folder).eot_token], "<u2")
    sizes = {split: [0] * len(COUNTED) for split in SPLITS}
    counts = Counter(empty=0, null=0, replaced=0)
    excerpts: dict[str, tuple[str, str]] = {}
    rows = ((row, piece) for piece in shard for row in read_documents(piece, settings.text_column))
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb", 1 << 20)) for name in PART_FILES}
        for document, piece in rows:
            if document is None or document == Text(b""):
                counts["null" if document is None else "empty"] += 1
                continue
            digest, length, size, start = hashlib.blake2b(digest_size=8), 0, 0, b""
            split = SPLITS[is_held_out(document, piece.split, settings)]
            for fragment in document:
                start = start or fragment[:EXCERPT_BYTES]
                tokens = encoder(fragment)
                files[split].write(tokens.astype("<u2").tobytes())
                digest.update(fragment)
                length, size = length + len(tokens), size + len(fragment)
            files[split].write(end_of_text.tobytes())
            files["lengths"].write(np.array([length + 1], "<u4").tobytes())
            files["hashes"].write(digest.digest())
            counts["replaced"] += document.replaced
            sizes[split] = [sum(pair) for pair in zip(sizes[split], (1, length + 1, size), strict=True)]
            excerpts["last"] = str(piece.path or PYTHON_DOCS), start.decode(errors="ignore")
            excerpts.setdefault("first", excerpts["last"])
            documents = sum(size[0] for size in sizes.values())
            if documents.bit_count() == 1:  # the last of 1, 2, 4 is past the middle
                excerpts["middle"] = excerpts["last"]
    return {**sizes, **counts, "excerpts": excerpts}


def is_held_out(document: Iterable[bytes], own_split: str | None, settings: Settings) -> bool:
    """Whether a document is for validation: by the source's own split or, where that is None, by its text."""
    return own_split == "validation" if own_split else in_validation(document, settings.validation_fraction)


def _start_worker() -> None:
    """Set up a worker process: it ends with the main process, which alone handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def sample_texts(pieces: list[Piece], settings: Settings) -> Iterator[str]:
    """About SAMPLE_BYTES of training documents: the first of each piece, by its size. Raises InputError."""
    share = min(1.0, SAMPLE_BYTES / max(1, sum(piece.size for piece in pieces)))
    for piece in pieces:
        room = piece.size * share
        documents = filter(None, read_documents(piece, settings.text_column))
        training = (text for text in documents if not is_held_out(text, piece.split, settings))
        for fragment in itertools.chain.from_iterable(training):
            yield fragment.decode()
            room -= len(fragment)
            if share < 1 and room <= 0:
                break


def start_workers(count: int, initializer: Callable[[], None] | None = None) -> Executor:
    """Worker processes, or one thread where there can be none because /dev/shm cannot be written to."""
    try:
        return ProcessPoolExecutor(count, CONTEXT, initializer)
    except OSError as error:
        print(f"Warning: using one process, because /dev/shm does not work: {error}", file=sys.stderr)
        return ThreadPoolExecutor(1)


@contextlib.contextmanager
def worker_pool(count: int) -> Iterator[Executor]:
    """A pool of workers, which end with any error. Raises RunError if one is killed."""
    with start_workers(count, _start_worker) as pool:
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
    shards: list[list[Piece]], parts_dir: Path, settings: Settings, vocabulary: Path | None, workers: int
) -> list[Part]:
    """Encode all shards with a pool of workers, showing progress; returns their parts in the shards' order.
    Raises InputError, and RunError if a worker is killed."""
    sizes = [sum(piece.size for piece in shard) for shard in shards]
    parts: dict[int, Part] = {}
    started = time.monotonic()
    with worker_pool(min(workers, len(shards))) as pool:
        # Largest first, so that no worker is left with a large one at the end.
        order = sorted(range(len(shards)), key=lambda number: -sizes[number])
        jobs = {pool.submit(encode_shard, i, shards[i], parts_dir, settings, vocabulary): i for i in order}
        # Only now that the workers are forked: the bar has a thread.
        with Progress(total=sum(sizes), desc="encoding", unit="B", unit_scale=True) as progress:
            for job in as_completed(jobs):
                number = jobs[job]
                parts[number] = job.result()
                progress.update(sizes[number])
    if resumed := sum(part.resumed for part in parts.values()):
        print(f"{resumed} of {len(parts)} shards were already encoded by an earlier run")
    encoded = [part.record[split][1] for part in parts.values() if not part.resumed for split in SPLITS]
    engine, speed = "gigatoken" if vocabulary else "tiktoken", sum(encoded) / (time.monotonic() - started)
    print(f"Encoded {sum(encoded):,} tokens with {engine} at {speed:,.0f} tokens/s")
    return [parts[number] for number in range(len(shards))]
