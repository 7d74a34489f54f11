"""Downloads from the Hugging Face Hub, as fast as the network allows: by hf_xet or over several connections.

Without Xet, the Hub's own client fetches a file over one connection, not at all above 50 GB, and from the
beginning after a kill. Here an incomplete file lies beside its final path until all of it has come, its
SHA-256 is right, and it is on the disk. Only hf_xet still starts an incomplete file over after a kill.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub as hub  # loads its parts, and the network's, when they are used
from tqdm import tqdm

from basemodel.common.errors import InputError
from basemodel.common.files import fingerprint

CONNECTIONS = 8  # at once, over all files: more would be faster than this process can read
PART_BYTES = 8 << 20, 64 << 20  # the least and the most that one request asks for
WAITS = (0.5, 1, 2, 4, 8, 16)  # seconds between tries that bring nothing; then the download fails
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses that another try may not meet


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set on the Hub, as the Hub describes it at one commit."""

    url: str
    commit: str
    size: int | None
    etag: str  # a large file's SHA-256
    xet: Any  # where it lies on Xet, or None


def look_up(dataset: str, name: str, revision: str | None) -> RemoteFile:
    """Ask the Hub about a file. Raises InputError if another answers, or what the Hub's client raises."""
    found = hub.get_hf_file_metadata(hub.hf_hub_url(dataset, name, repo_type="dataset", revision=revision))
    if found.commit_hash is None:
        raise InputError(
            f"{dataset}: {found.location} was not answered by the Hub, perhaps by a proxy or a login page; "
            "check the network and HF_ENDPOINT"
        )
    url = hub.hf_hub_url(dataset, name, repo_type="dataset", revision=found.commit_hash)
    return RemoteFile(url, found.commit_hash, found.size, found.etag or "", found.xet_file_data)


def look_up_all(dataset: str, names: list[str], revision: str) -> list[RemoteFile]:
    """`look_up` for several files at once."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda name: look_up(dataset, name, revision), names))


def fetch(files: dict[Path, RemoteFile], label: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Download files to their paths, side by side; yield each path, with size and SHA-256, when it is done.

    Of several processes one downloads a file, and the others wait. Raises InputError if the disk is too small
    or a file is not what the Hub announced, and whatever the Hub's client raises; what has come is kept.
    """
    for folder in {path.parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
        _require_space(folder, files, label)
    total = sum(file.size or 0 for file in files.values())
    with _Progress(label, total) as progress, _Downloader(progress) as downloader:
        running = {downloader.files.submit(downloader.fetch, *item): item[0] for item in files.items()}
        for future in as_completed(running):
            if not isinstance(future.exception(), _StoppedError):  # the error behind it is yet to come
                yield running[future], future.result()


def _incomplete(file: RemoteFile, path: Path) -> Path:
    """Where a file is until it is complete: another one for another content."""
    return path.with_name(f".incomplete-{path.name}-{(file.etag or file.commit)[:16]}")


def _require_space(folder: Path, files: dict[Path, RemoteFile], label: str) -> None:
    missing = 0
    for path, file in files.items():
        if not path.exists():
            incomplete = _incomplete(file, path)
            there = incomplete.stat().st_blocks * 512 if incomplete.exists() else 0
            missing += max(0, (file.size or 0) - there)
    if missing > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{folder}: downloading {label} takes {missing / 1e9:,.2f} GB more, but {free / 1e9:,.2f} GB are "
            "free; free some space, and run the same command again"
        )


class _Progress:
    """One bar for all files, with speed and time to go; without a terminal a line now and then."""

    SECONDS = 15  # between lines

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._done = self._fetched = 0
        self._lock = threading.Lock()
        self._start = self._said = time.monotonic()
        options = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "smoothing": 0}
        self._bar = tqdm(total=total, desc=f"Fetching {label}", disable=None, **options)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.close()
        if self._bar.disable and kind is None and self._fetched > 100e6:
            self._say()

    def add(self, count: int, *, fetched: bool = True) -> None:
        """Count bytes, which may be fewer than none; those not `fetched` were there before."""
        with self._lock:
            self._done += count
            self._fetched += count if fetched else 0
            if not self._bar.disable:
                self._bar.initial += 0 if fetched else count
                self._bar.update(count)
            elif time.monotonic() - self._said > self.SECONDS:
                self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        speed = max(1, self._fetched) / (self._said - self._start)
        eta = tqdm.format_interval(max(0, self._total - self._done) / speed)
        done = f"{self._done / 1e9:,.2f} of {self._total / 1e9:,.2f} GB"
        text = f"Fetching {self._label}: {done}, {speed / 1e9:.3f} GB/s, ETA {eta}"
        print(text, file=sys.stderr, flush=True)


class _NoRangesError(Exception):
    """A server that sends no parts of files."""


class _StoppedError(Exception):
    """Another file has failed, or the user has had enough."""


class _Downloader:
    """What the files of one download share: connections, progress, and the sign to stop."""

    def __init__(self, progress: _Progress) -> None:
        from huggingface_hub.utils import build_hf_headers

        # Compressed, a file's bytes would not be where a range says.
        self.headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
        self.progress = progress
        self.stop = threading.Event()
        self.files, self.connections = ThreadPoolExecutor(CONNECTIONS), ThreadPoolExecutor(CONNECTIONS)

    def __enter__(self) -> "_Downloader":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.stop.set()
            if "hf_xet" in sys.modules:
                from huggingface_hub.utils._xet import abort_xet_session

                abort_xet_session()  # it does not see `stop`
        self.files.shutdown(cancel_futures=True)
        self.connections.shutdown()

    def fetch(self, path: Path, file: RemoteFile) -> dict[str, Any]:
        """Download one file to `path` unless another process does; return its size and SHA-256."""
        incomplete = _incomplete(file, path)
        with _locked(incomplete, file.url, self.stop) as handle:
            if path.exists():
                incomplete.unlink()
                self.progress.add(file.size or 0, fetched=False)
                return fingerprint(path)
            found = self._receive(file, incomplete, handle)
            large = len(file.etag) == 64
            for what, announced in (("size", file.size), ("sha256", file.etag if large else None)):
                if announced not in (None, found[what]):
                    incomplete.unlink()
                    raise InputError(
                        f"{path}: the Hub announced {what} {announced} but sent {found[what]}; the file was "
                        "removed, run the same command again to download it"
                    )
            os.fsync(handle)
            os.ftruncate(handle, found["size"])  # last, for a kill after it costs what has come
            incomplete.replace(path)
        return found

    def _receive(self, file: RemoteFile, incomplete: Path, handle: int) -> dict[str, Any]:
        from huggingface_hub.utils._runtime import is_xet_available

        if file.xet is not None and file.size is not None and is_xet_available():
            try:
                return self._by_xet(file, incomplete)
            except Exception as error:  # hf_xet's have no common type
                if self.stop.is_set():
                    raise
                problem = " ".join(str(error).split())
                tqdm.write(f"{file.url}: hf_xet failed ({problem}); fetching it over HTTP", file=sys.stderr)
        with contextlib.suppress(_NoRangesError):
            if file.size is not None:
                return self._by_parts(file, handle)
        return self._in_one_stream(file, incomplete)

    def _by_xet(self, file: RemoteFile, incomplete: Path) -> dict[str, Any]:
        from huggingface_hub.file_download import xet_get

        with self._bar_for_the_hub() as bar:
            xet_get(
                incomplete_path=incomplete,
                xet_file_data=file.xet,
                headers=self.headers,
                expected_size=file.size,
                tqdm_class=bar,
            )
        return fingerprint(incomplete)

    def _in_one_stream(self, file: RemoteFile, incomplete: Path) -> dict[str, Any]:
        from huggingface_hub.file_download import http_get

        with self._bar_for_the_hub() as bar, incomplete.open("wb") as stream:
            http_get(file.url, stream, headers=self.headers, expected_size=file.size, tqdm_class=bar)
        return fingerprint(incomplete)

    @contextlib.contextmanager
    def _bar_for_the_hub(self) -> Iterator[type]:
        """A class that the Hub's client takes for a tqdm, and that counts here; back to 0 on an error."""
        add, stop, counted = self.progress.add, self.stop, 0

        class Bar(contextlib.nullcontext):
            def __init__(self, **_: object) -> None:
                super().__init__(self)

            def update(self, count: int) -> None:
                nonlocal counted
                counted += count
                add(count)
                if stop.is_set():
                    raise _StoppedError

            def ignore(self, *_: object, **__: object) -> None:
                pass

            close = update_transfer = set_postfix_str = set_transfer_postfix_str = ignore

        try:
            yield Bar
        except BaseException:
            add(-counted)
            raise

    def _by_parts(self, file: RemoteFile, handle: int) -> dict[str, Any]:
        """Fetch a file over all connections that are free, hashing what has come behind them."""
        parts, digest = _Parts(handle, file.size), hashlib.sha256()
        self.progress.add(sum(parts.counts), fetched=False)
        fetch_part, indices = self._fetch_part, range(len(parts.counts))
        running = [self.connections.submit(fetch_part, file, parts, index) for index in indices]
        try:
            for index, future in enumerate(running):
                future.result()
                if self.stop.is_set():
                    raise _StoppedError
                os.fsync(handle)  # now, so that little is left to write at the end
                for block in parts.read(index):
                    digest.update(block)
        except _NoRangesError:
            self.progress.add(-sum(parts.counts))
            raise
        except BaseException:
            self.stop.set()
            raise
        finally:
            for future in running:
                future.cancel()
            wait(running)  # nobody may write to a handle that is closed
        return {"size": file.size, "sha256": digest.hexdigest()}

    def _fetch_part(self, file: RemoteFile, parts: "_Parts", index: int) -> None:
        """Fetch what is missing of a part, again and again after cuts, as long as that brings anything."""
        from huggingface_hub.errors import HTTPError

        failures = 0
        while not self.stop.is_set() and (missing := parts.missing(index)):
            error = InputError(
                f"{file.url} ended before its announced size of {file.size} bytes; run the same command "
                "again, what has come is kept"
            )
            try:
                self._request(file, parts, index)
            except HTTPError as problem:
                response = getattr(problem, "response", None)
                if response is not None and response.status_code not in PASSING:
                    raise
                error = problem
            failures = 1 if parts.missing(index) != missing else failures + 1
            if failures > len(WAITS):
                raise error
            if parts.missing(index):
                self.stop.wait(max(WAITS[failures - 1], _asked_wait(error)))

    def _request(self, file: RemoteFile, parts: "_Parts", index: int) -> None:
        """Ask for what is missing of a part; each time the Hub, whose links to other servers expire."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        missing = parts.missing(index)
        headers = self.headers | {"Range": f"bytes={missing[0]}-{missing[-1]}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", file.url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            _require_range(response, file, missing.start)
            for chunk in response.iter_raw():
                self.progress.add(parts.write(index, chunk))
                if self.stop.is_set():
                    return


class _Parts:
    """A file that comes in parts.

    Its bytes are written to their places; behind them stands how many of each part are there, as int64. A
    kill between the two writes costs the last chunk, and what is counted is there.
    """

    def __init__(self, handle: int, size: int) -> None:
        self._handle, self._size = handle, size
        least, most = PART_BYTES
        self._step = min(max(size // (4 * CONNECTIONS), least), most)
        self._starts = range(0, size, self._step)
        length = size + 8 * len(self._starts)
        if os.fstat(handle).st_size != length:  # new, or begun in another way
            os.ftruncate(handle, 0)
            os.ftruncate(handle, length)
        self.counts = array("q", os.pread(handle, 8 * len(self._starts), size))

    def missing(self, index: int) -> range:
        """Which bytes of the file are missing in a part."""
        start = self._starts[index]
        return range(start + self.counts[index], min(start + self._step, self._size))

    def write(self, index: int, chunk: bytes) -> int:
        """Add to a part; return how many bytes that were, for a server may send more than the part."""
        missing = self.missing(index)
        rest = memoryview(chunk)[: len(missing)]
        added = len(rest)
        while rest:
            rest = rest[os.pwrite(self._handle, rest, missing.start + added - len(rest)) :]
        self.counts[index] += added
        place = self._size + 8 * index
        os.pwrite(self._handle, self.counts[index : index + 1], place)
        return added

    def read(self, index: int) -> Iterator[bytes]:
        """The bytes of a finished part, in blocks."""
        end = self.missing(index).stop
        for start in range(self._starts[index], end, 1 << 20):
            yield os.pread(self._handle, min(1 << 20, end - start), start)


def _require_range(response: Any, file: RemoteFile, start: int) -> None:
    """Raise _NoRangesError unless an answer is the range asked for, InputError if it is of another file."""
    headers, plain = response.headers, response.headers.get("Content-Encoding", "identity") == "identity"
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    ranged = response.status_code == 206 and plain and found and int(found[1]) == start
    size = found[2] if ranged else headers.get("Content-Length", "*") if plain else "*"
    if size not in ("*", str(file.size)):
        kind = headers.get("Content-Type", "something else").partition(";")[0]
        raise InputError(
            f"{file.url}: the Hub announced size {file.size}, but {size} bytes of {kind} came; if a proxy or "
            "a login page answers in its place, get past that, and run the same command again"
        )
    if not ranged:
        raise _NoRangesError


def _asked_wait(error: Exception) -> int:
    """The seconds for which a server that has had enough asks to be left alone, at most five minutes."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)  # sent with every answer
    seconds = headers.get("Retry-After", "")
    spent = limit is not None and limit.remaining == 0
    return min(300, int(seconds) if seconds.isdigit() else limit.reset_in_seconds + 1 if spent else 0)


@contextlib.contextmanager
def _locked(path: Path, url: str, stop: threading.Event) -> Iterator[int]:
    """A handle of a file, made if need be, that no other process holds; waits until that is so."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, url, stop)
            # The process that held it may have renamed or removed it.
            found = path.stat() if path.exists() else None
            if found is not None and os.path.samestat(found, os.fstat(handle)):
                yield handle
                return
        finally:
            os.close(handle)


def _lock(handle: int, url: str, stop: threading.Event) -> None:
    waits = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waits:
                tqdm.write(f"Waiting for another process that is downloading {url}", file=sys.stderr)
            waits = True
            if stop.wait(0.2):
                raise _StoppedError from None
        except OSError:  # a file system without locks
            return
        else:
            return
