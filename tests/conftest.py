"""The fixtures that tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: tests run beside one another

import contextlib
import gc
import hashlib
import http.server
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from forkserver import start_for_all_workers

if TYPE_CHECKING:  # pytest's own process, which runs no tests, starts its workers without waiting for imports
    import tiktoken
    from helpers import Sandbox

gc.disable()  # while all tests are imported, and what they need, of which nothing goes


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a GPU that torch cannot use is no matter here
    if config.getoption("numprocesses", None) and not config.getoption("collectonly"):
        start_for_all_workers()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@dataclass
class Hub:
    """A Hugging Face Hub for data sets, as far as downloading files goes."""

    url: str
    requests: list[tuple[str, str]]  # method, path
    ranges: list[range]  # the bytes asked for by range
    headers: dict[str, str]  # sent in answer to HEAD in place of the right ones
    # Bytes after which each answer is cut off, one after another; then answers are whole.
    cuts: list[int]
    hold: int | None = None  # bytes after which those then stay open, and silent, until this is None
    has_ranges: bool = True
    sent: int = 0  # bytes of files
    # What is answered in place of a file, by method and path: status, headers, and the body if there is one.
    answers: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    # Links to another server, each of which works once; with None, files come from this one.
    links: set[str] | None = None

    def downloads(self, name: str) -> int:
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.requests)


@pytest.fixture
def sandbox(tmp_path: Path) -> "Sandbox":
    from helpers import Sandbox, write_dataset

    write_dataset(tmp_path / "datasets/test/tokens")
    return Sandbox(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run like those of make_sandbox that two processes have trained undisturbed."""
    from helpers import make_sandbox

    sandbox = make_sandbox(tmp_path_factory.mktemp("undisturbed"), "whole")
    sandbox.train("whole", processes=2)
    return sandbox.run_dir("whole")


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> "Iterator[tiktoken.Encoding]":
    """A stand-in for GPT-2's tokenizer that needs no download, here and in the scripts the test starts."""
    import tiktoken.registry
    from texts import gpt2_stand_in

    stand_in = gpt2_stand_in()
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in)
    monkeypatch.setenv("GPT2_STAND_IN", "1")
    yield stand_in


def listing(folder: Path) -> tuple[int, dict[str, str], bytes]:
    """The Hub's answer to a question about the data set in a folder: its one commit and its files."""
    if not folder.is_dir():
        return 404, {"X-Error-Code": "RepoNotFound"}, b""
    files = [{"rfilename": path.name} for path in folder.iterdir()]
    answer = {"id": "/".join(folder.parts[-2:]), "sha": "0" * 40, "siblings": files}
    return 200, {}, json.dumps(answer).encode()


@pytest.fixture
def serve_hub() -> Iterator[Callable[[Path], Hub]]:
    """A function that serves the folders OWNER/NAME under a folder as data sets, until the test ends."""
    with contextlib.ExitStack() as stack:

        def serve(folder: Path) -> Hub:
            hub = Hub("", [], [], {}, [])

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_HEAD(self) -> None:
                    hub.requests.append((self.command, self.path))
                    request = f"{self.command} {self.path}"
                    prefix, _, tail = self.path.partition("/resolve/")
                    file = folder / re.sub("^.*/datasets/", "", prefix) / tail.partition("/")[2]
                    if request in hub.answers:
                        self.answer(*hub.answers[request])
                    elif self.path.startswith("/api/datasets/"):
                        self.answer(*listing(folder / "/".join(self.path.split("/")[3:5])))
                    elif not file.is_file():
                        self.answer(404, {"X-Error-Code": "EntryNotFound"})
                    elif self.command == "GET" and hub.links is not None and "/cdn/" not in self.path:
                        hub.links.add(link := f"/cdn/{secrets.token_hex(8)}{self.path}")
                        self.answer(302, {"Location": f"http://localhost:{server.server_port}{link}"})
                    elif "/cdn/" in self.path and (
                        self.path not in hub.links or "Authorization" in self.headers
                    ):
                        self.answer(403, {})
                    else:
                        (hub.links or set()).discard(self.path)
                        self.send_file(file.read_bytes())

                def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(body))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    if self.command == "GET":
                        self.send_body(body)

                def send_file(self, data: bytes) -> None:
                    headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                    asked = import_module("helpers").requested_range(self.headers.get("Range"), len(data))
                    if self.command == "HEAD":
                        headers = {"Content-Length": str(len(data))} | headers | hub.headers
                    if asked is None or not hub.has_ranges:
                        self.answer(200, headers, data)
                        return
                    hub.ranges.append(asked)
                    headers["Content-Range"] = f"bytes {asked[0]}-{asked[-1]}/{len(data)}"
                    self.answer(206, headers, data[asked.start : asked.stop])

                def send_body(self, data: bytes) -> None:
                    is_file = "/resolve/" in self.path
                    cut = hub.cuts.pop(0) if hub.cuts and data and is_file else None
                    part = data[: hub.hold if cut is None and is_file else cut]
                    hub.sent += len(part) if is_file else 0
                    with contextlib.suppress(ConnectionError):  # the client may have been killed
                        self.wfile.write(part)
                    while is_file and cut is None and len(part) < len(data) and hub.hold is not None:
                        time.sleep(0.02)
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
