"""What the tests share: tiny runs on tiny data, trained by real processes, and a Hub on 127.0.0.1."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
MODEL = {
    "vocab_size": 64,
    "context_length": 16,
    "emb_dim": 32,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
TRAIN = {
    "dataset": "test/tokens",
    "microbatch_size": 2,
    "min_train_tokens": 8 * 8 * 16,
    "global_batch_size": 8,
    "learning_rate": 0.01,
    "precision": "fp32",
}


def random_tokens(count: int, vocab_size: int = 64, seed: int = 0) -> np.ndarray:
    """Tokens with something to learn: each is near the one before it."""
    steps = np.random.default_rng(seed).integers(0, 5, count)
    return (np.cumsum(steps) % vocab_size).astype(np.uint16)


def write_dataset(folder: Path, train: Any = None, validation: Any = None, meta: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": random_tokens(4000) if train is None else train}, folder / "train.safetensors")
    save_file(
        {"tokens": random_tokens(2000, seed=1) if validation is None else validation},
        folder / "validation.safetensors",
    )
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def run_script(
    *command: str | Path, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """Run one of the project's scripts and return what it said."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@dataclass
class Sandbox:
    """Runs and data sets of one test."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def datasets(self) -> Path:
        return self.path / "datasets"

    def run_dir(self, run: str) -> Path:
        return self.path / "runs" / run

    def write_run(self, run: str = "tiny", model: dict | None = None, train: dict | None = None) -> Path:
        """Write a run's two files; a value of ... leaves a key out."""
        folder = self.run_dir(run)
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in (("model", {**MODEL, **(model or {})}), ("train", {**TRAIN, **(train or {})})):
            kept = {key: value for key, value in values.items() if value is not ...}
            (folder / f"{name}.json").write_text(json.dumps(kept, indent=1))
        return folder

    def command(
        self, run: str, *options: str | Path, processes: int = 1, torchrun: tuple[str, ...] = ()
    ) -> list[str]:
        """The command line, behind `python`, that trains a run; torchrun only where it is needed."""
        launcher = []
        if processes > 1 or torchrun:
            launch = torchrun or ("--standalone",)
            launcher = ["-m", "torch.distributed.run", *launch, f"--nproc_per_node={processes}"]
        runs = ["--runs-dir", str(self.path / "runs")]
        return [*launcher, "ddp_train.py", run, str(self.datasets), *map(str, options), *runs]

    def train(self, run: str = "tiny", *options: str | Path, processes: int = 1, ok: bool = True) -> str:
        """Train a run to its end and return its standard output."""
        done = run_script(*self.command(run, *options, processes=processes), env=self.env)
        if ok:
            assert done.returncode == 0, done.stderr
        return done.stdout

    def metrics(self, run: str = "tiny", key: str = "train_loss") -> list[float]:
        lines = [json.loads(line) for line in (self.run_dir(run) / "metrics.jsonl").read_text().splitlines()]
        return [line[key] for line in lines if key in line]

    def status(self, run: str = "tiny") -> dict:
        return json.loads((self.run_dir(run) / "status.json").read_text())

    def checkpoints(self, run: str = "tiny") -> list[Path]:
        folder = self.run_dir(run) / "checkpoints"
        return sorted(folder.glob("2*-iteration-*"), key=lambda path: int(path.name.split("-")[-1]))

    def final_tensors(self, run: str = "tiny") -> dict[str, Any]:
        """Weights and optimiser state of the last checkpoint."""
        last = self.checkpoints(run)[-1]
        return {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    write_dataset(tmp_path / "datasets/test/tokens")
    return Sandbox(tmp_path)


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


needs_gpt2 = pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"),
    reason="the GPT-2 vocabulary: set TIKTOKEN_CACHE_DIR to a copy of it",
)
