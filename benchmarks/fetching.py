"""How long a data set's file takes over HTTP from a server that is far away, and what a kill costs.

    python benchmarks/fetching.py --megabytes 600 --rounds 3

A server on 127.0.0.1 answers after 40 ms and sends at most 30 MB/s over each connection, in turns to what
training downloads with and to huggingface_hub's snapshot_download: undisturbed, then killed half-way and
started again.
"""

import http.server
import json
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
from basemodel.common.output import markdown_table

DATASET, NAME, COMMIT = "far/away", "train.safetensors", "0" * 40
CLIENTS = {
    "training's download": "from basemodel.data import hub; from pathlib import Path; "
    f"hub.fetch_dataset(Path({{folder!r}}), '{DATASET}', None, ['train'])",
    "snapshot_download": "import huggingface_hub; huggingface_hub.snapshot_download("
    f"'{DATASET}', repo_type='dataset', local_dir={{folder!r}}, allow_patterns='{NAME}')",
}


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

    def handle_error(self, *_: object) -> None:
        """Say nothing about clients that were killed."""


class Handler(http.server.BaseHTTPRequestHandler):
    """The file, whole or from some byte on, and what the Hub's API says about it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Say nothing about requests."""

    def do_GET(self) -> None:
        """Answer late, and send slowly."""
        time.sleep(self.server.latency)
        if self.path.startswith("/api/"):
            large = {"oid": self.server.sha256, "size": self.server.size, "pointerSize": 1}
            file = {"type": "file", "path": NAME, "size": self.server.size, "oid": COMMIT, "lfs": large}
            info = {"id": DATASET, "sha": COMMIT, "siblings": [{"rfilename": NAME}]}
            body = json.dumps([file] if "/tree/" in self.path else info).encode()
            self.begin(200, len(body))
            self.wfile.write(body)
            return
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(requested[1]) if requested else 0
        headers = {"ETag": f'"{self.server.sha256}"', "X-Repo-Commit": COMMIT}
        if requested:
            headers["Content-Range"] = f"bytes {start}-{self.server.size - 1}/{self.server.size}"
        self.begin(206 if requested else 200, self.server.size - start, headers)
        if self.command == "GET":
            self.send_file(start)

    do_HEAD = do_GET

    def begin(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        """Send an answer's first lines."""
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self, start: int) -> None:
        """Send the file from `start` on, in pieces that are due one after another."""
        piece, begun, place = 256 << 10, time.monotonic(), start
        with self.server.file.open("rb") as file:
            while place < self.server.size:
                sent = os.sendfile(self.connection.fileno(), file.fileno(), place, piece)
                place += sent
                with self.server.lock:
                    self.server.sent += sent
                due = begun + (place - start) / self.server.bytes_per_second
                time.sleep(max(0.0, due - time.monotonic()))


def start(server: Server, folder: Path, client: str) -> subprocess.Popen:
    """Start to fetch the file in another process: the Hub's client reads its settings when it is imported."""
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home")}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENTS[client].format(folder=str(folder))],
        env=os.environ | hub | {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )


def finish(server: Server, folder: Path, client: str) -> float:
    """The seconds that a download takes until it ends, with the imports it needs and the hashing."""
    begun = time.monotonic()
    status = start(server, folder, client).wait()
    seconds = time.monotonic() - begun
    (path,) = folder.rglob(NAME) if status == 0 else [folder]
    if status or fingerprint(path)["sha256"] != server.sha256:
        raise RunError(f"{path} is not what the server has")
    return seconds


def killed(server: Server, folder: Path, client: str) -> tuple[float, float, float]:
    """Kill a download half-way; return the second try's seconds, how often the file's bytes were sent in all,
    and the MB that are left over on the disk."""
    server.sent = 0
    process = start(server, folder, client)
    while server.sent < server.size / 2 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    seconds = finish(server, folder, client)
    left = sum(path.stat().st_size for path in folder.rglob("*incomplete*"))
    return seconds, server.sent / server.size, left / 1e6


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--megabytes", type=click.IntRange(1), default=600, show_default=True, help="Size of the file.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Downloads per client.")
@click.option("--latency", default=0.04, show_default=True, help="Seconds before an answer begins.")
@click.option("--speed", default=30.0, show_default=True, help="MB/s over one connection.")
def main(megabytes: int, rounds: int, latency: float, speed: float) -> None:
    """Fetch a file by each client in turns, undisturbed and killed half-way."""
    with tempfile.TemporaryDirectory() as folder:
        content, target = Path(folder, "content"), Path(folder, "fetched")
        with content.open("wb") as file:
            for _ in range(megabytes):
                file.write(os.urandom(1_000_000))
        with Server(content, latency, speed * 1e6) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            figures: dict[str, list[tuple[float, ...]]] = {client: [] for client in CLIENTS}
            for _ in range(rounds):
                for client, results in figures.items():
                    whole = finish(server, target, client)
                    shutil.rmtree(target)
                    results.append((whole, *killed(server, target, client)))
                    shutil.rmtree(target)
            columns = ("client", "whole, s", "after a kill, s", "file sent, times", "left over, MB")
            rows = [
                (client, *(spread(list(column), ".1f") for column in zip(*results, strict=True)))
                for client, results in figures.items()
            ]
            print(markdown_table(columns, rows))
            print(f"\nLoad of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
            server.shutdown()


if __name__ == "__main__":
    run_command(main)
