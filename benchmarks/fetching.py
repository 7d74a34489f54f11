"""How fast a file of a data set comes from a server that is far away, and what cuts and kills cost.

    python benchmarks/fetching.py --megabytes 600 --rounds 3

A server on 127.0.0.1 answers after 40 ms and sends at most 30 MB/s over each connection. Sides in turns: one
connection (the Hub's own client without Xet) and ours. Then ours again, every connection cut off and the
process killed ten times, with the bytes that the server has sent.
"""

import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
from common import spread

from basemodel.common.command_line import run_command
from basemodel.common.errors import RunError
from basemodel.common.files import fingerprint

DATASET, NAME = "far/away", "train.safetensors"


class Server(http.server.ThreadingHTTPServer):
    """A Hub with one file, at a distance."""

    daemon_threads = True

    def __init__(self, file: Path, latency: float, bytes_per_second: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.file, self.size = file, file.stat().st_size
        self.sha256 = fingerprint(file)["sha256"]
        self.latency, self.bytes_per_second = latency, bytes_per_second
        self.sent = 0
        self.lock = threading.Lock()
        self.cut = threading.Event()  # set: no connection gets any further

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that were killed."""


class Handler(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of the file, whole or a range of it; anything else is not found."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""

    def do_GET(self) -> None:
        """Answer late, and send slowly."""
        time.sleep(self.server.latency)
        found = self.path.endswith(f"/{NAME}")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if found else None
        size = self.server.size if found else 0
        start, end = (int(asked[1]), int(asked[2] or size - 1) + 1) if asked else (0, size)
        self.send_response((206 if asked else 200) if found else 404)
        self.send_header("Content-Length", str(end - start))
        if found:
            self.send_header("ETag", f'"{self.server.sha256}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if found and self.command == "GET":
            self.send_file(start, end)

    do_HEAD = do_GET

    def send_file(self, start: int, end: int) -> None:
        """Send a range of the file, by pieces that are due one after another, until the server is cut off."""
        piece, begun, place = 256 << 10, time.monotonic(), start
        with self.server.file.open("rb") as file:
            while place < end and not self.server.cut.is_set():
                sent = os.sendfile(self.connection.fileno(), file.fileno(), place, min(piece, end - place))
                place += sent
                with self.server.lock:
                    self.server.sent += sent
                due = begun + (place - start) / self.server.bytes_per_second
                time.sleep(max(0.0, due - time.monotonic()))
        self.close_connection = self.close_connection or place < end


def fetch(folder: str, one_stream: bool) -> None:
    """Fetch the file into a folder, over one connection or as training does."""
    if one_stream:
        import huggingface_hub

        huggingface_hub.hf_hub_download(DATASET, NAME, repo_type="dataset", local_dir=folder)
    else:
        from basemodel.data import hub

        hub.fetch_dataset(Path(folder), DATASET, None, ["train"])


def start(server: Server, folder: Path, one_stream: bool = False) -> subprocess.Popen:
    """Start to fetch the file in another process: the Hub's client reads its settings when it is imported."""
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home")}
    code = f"import fetching; fetching.fetch({str(folder)!r}, {one_stream})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | hub | {"HF_HUB_DISABLE_XET": "1"},
        cwd=Path(__file__).parent,
        stderr=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen, server: Server, folder: Path) -> None:
    """Wait for a process, and see that the file is right."""
    status = process.wait()
    (found,) = folder.rglob(NAME) if status == 0 else [folder]
    if status or fingerprint(found)["sha256"] != server.sha256:
        raise RunError(f"{found} is not what the server has")


def timed(server: Server, folder: Path, one_stream: bool) -> float:
    """The seconds that one download takes, with the imports it needs and the hashing."""
    begun = time.monotonic()
    finish(start(server, folder, one_stream), server, folder)
    seconds = time.monotonic() - begun
    shutil.rmtree(folder)
    return seconds


def disturbed(server: Server, folder: Path, times: int) -> float:
    """How often the server has sent the file's bytes when every try but the last is cut off and killed."""
    server.sent = 0
    for step in range(1, times + 1):
        process = start(server, folder)
        while server.sent < server.size * step / (times + 1) and process.poll() is None:
            time.sleep(0.001)
        server.cut.set()  # first every connection breaks
        time.sleep(0.2)
        server.cut.clear()
        time.sleep(0.5)  # they are begun again
        process.kill()
        process.wait()
    finish(start(server, folder), server, folder)
    shutil.rmtree(folder)
    return server.sent / server.size


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--megabytes", type=click.IntRange(1), default=600, show_default=True, help="The file's size.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each side.")
@click.option("--latency", default=0.04, show_default=True, help="Seconds before an answer begins.")
@click.option("--speed", default=30.0, show_default=True, help="MB/s of one connection.")
@click.option("--kills", default=10, show_default=True, help="Cuts and kills of one download.")
def main(megabytes: int, rounds: int, latency: float, speed: float, kills: int) -> None:
    """Fetch a file over one connection and ours in turns, then with cuts and kills."""
    with tempfile.TemporaryDirectory() as folder:
        content = Path(folder, "content")
        with content.open("wb") as file:
            for _ in range(megabytes):
                file.write(os.urandom(1_000_000))
        with Server(content, latency, speed * 1e6) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            sides: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(rounds):
                for one_stream, seconds in sides.items():
                    seconds.append(timed(server, Path(folder, "fetched"), one_stream))
            print(f"One connection:    {spread(sides[True], '.1f')} s for {megabytes} MB")
            print(f"Ours:              {spread(sides[False], '.1f')} s")
            sent = disturbed(server, Path(folder, "fetched"), kills)
            print(f"{kills} cuts and kills: the server sent {sent:.3f} times the file; it ended right")
            print(f"Load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
            server.shutdown()


if __name__ == "__main__":
    run_command(main)
