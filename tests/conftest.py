"""The fixtures that tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: tests run beside one another

import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken.registry
from helpers import Sandbox, make_sandbox, write_dataset
from texts import gpt2_stand_in

from basemodel.tokenizer import tiktoken_encoder


@dataclass
class Hub:
    """A Hugging Face Hub for data sets, as far as downloading files goes."""

    url: str
    requests: list[tuple[str, str]]  # method, path
    ranges: list[str]  # asked for
    headers: dict[str, str]  # sent in place of the right ones
    # Bytes after which each answer is cut off, one after another; then answers are whole.
    cuts: list[int]
    # Set: a connection that was cut off stays open, and silent.
    stall: threading.Event = field(default_factory=threading.Event)

    def downloads(self, name: str) -> int:
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.requests)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    write_dataset(tmp_path / "datasets/test/tokens")
    return Sandbox(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run like those of make_sandbox that two processes have trained undisturbed."""
    sandbox = make_sandbox(tmp_path_factory.mktemp("undisturbed"), "whole")
    sandbox.train("whole", processes=2)
    return sandbox.run_dir("whole")


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> Iterator[tiktoken.Encoding]:
    """A stand-in for GPT-2's tokenizer that needs no download, here and in the scripts the test starts."""
    stand_in = gpt2_stand_in()
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in)
    monkeypatch.setenv("GPT2_STAND_IN", "1")
    tiktoken_encoder.cache_clear()
    yield stand_in
    tiktoken_encoder.cache_clear()


@pytest.fixture
def serve_hub() -> Iterator[Callable[[Path], Hub]]:
    """A function that serves the folders OWNER/NAME under a folder as data sets, until the test ends."""
    with contextlib.ExitStack() as stack:

        def serve(folder: Path) -> Hub:
            hub = Hub("", [], [], {}, [])

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_HEAD(self) -> None:
                    hub.requests.append((self.command, self.path))
                    prefix, _, tail = self.path.partition("/resolve/")
                    file = folder / prefix.removeprefix("/datasets/") / tail.partition("/")[2]
                    if not file.is_file():
                        self.send_response(404)
                        self.send_header("X-Error-Code", "EntryNotFound")
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                        return
                    data = file.read_bytes()
                    digest = hashlib.sha256(data).hexdigest()
                    start = 0
                    if self.command == "GET" and (asked := self.headers.get("Range")):
                        hub.ranges.append(asked)
                        start = int(asked.removeprefix("bytes=").rstrip("-"))
                    self.send_response(206 if start else 200)
                    headers = {
                        "X-Repo-Commit": "0" * 40,
                        "ETag": f'"{digest}"',
                        "Content-Length": str(len(data) - start),
                    }
                    if start:
                        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    for name, value in (headers | hub.headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    if self.command == "GET":
                        end = start + hub.cuts.pop(0) if hub.cuts else len(data)
                        self.wfile.write(data[start:end])
                        while end < len(data) and hub.stall.is_set():
                            time.sleep(0.05)
                        self.close_connection = True

                do_GET = do_HEAD

                def log_message(self, *args: Any) -> None:
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            hub.url = f"http://127.0.0.1:{server.server_port}"
            return hub

        yield serve


@pytest.fixture
def serve() -> Iterator[Callable[[type], str]]:
    """A function that serves HTTP on 127.0.0.1 until the test ends, and returns the address."""
    with contextlib.ExitStack() as stack:

        def start(handler: type) -> str:
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start
