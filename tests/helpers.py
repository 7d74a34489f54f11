"""What the tests share: tiny runs on tiny data, and the processes that train and evaluate them.

Scripts run in processes forked from one that has imported PyTorch and computed nothing, because starting
Python and importing PyTorch takes longer than most of what is tested. Such a process has arguments,
environment, output and exit status of its own, as if it had been typed. `run_python` starts Python itself.
"""

import contextlib
import ctypes
import inspect
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from forkserver import FORKSERVER, SCRIPTS, be_python, be_script, start_forkserver
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

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
TORTURED_MODEL = {**MODEL, "n_layers": 1, "drop_rate": 0.2, "init": "zero"}
TORTURED_TRAIN = {
    **TRAIN,
    "epochs": 100,
    "min_train_tokens": 25 * 8 * 16,
    "checkpoint_interval": 5,
    "validation_interval": 10,
    "validation_batches": 3,
    "keep_checkpoints": 3,
    "clipping_max_norm": 1.0,
    "embedding_learning_rate": 0.05,
    "head_learning_rate": 0.004,
    "half_batch_percent": 20,  # 10 half batches, then 20
    "short_sequence_percent": 40,
    "schedule_learning_rate": True,
    "warmup_period_percent": 10,
}
BYTES = {"vocab_size": 257, "tokenizer": "bytes"}
STANDARD_FILES = ("p2cread", "c2pwrite", "errwrite")  # what subprocess calls a child's
PR_SET_CHILD_SUBREAPER = 36  # of sys/prctl.h
# Drawing takes longer than training.
NO_CHART = "from basemodel.results import run_chart; run_chart.draw_chart = lambda *_: None"
# The last statements before a script that starts others.
FORKED = f"{NO_CHART}; import helpers; helpers.fork_python()"


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


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


def write_model(folder: Path, seed: int = 0, **changes: Any) -> tuple[Path, Path]:
    """The two files of a random byte-level model."""
    import torch
    from safetensors.torch import save_file as save_tensors

    from basemodel.model.config import GPTConfig
    from gpt import GPTModel

    config = {**MODEL, **BYTES, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    save_tensors(GPTModel(GPTConfig(**config)).state_dict(), folder / "model.safetensors")
    return folder / "model.json", folder / "model.safetensors"


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """What a process left: as `subprocess.CompletedProcess`."""

    returncode: int  # negative: the signal that ended it
    stdout: str
    stderr: str


def fork_python() -> None:
    """Have the Python commands that this process starts from now on forked from a copy of what it is now, by
    `subprocess` itself in all but how the process comes to be.

    Not from the process itself: its threads may hold locks that nobody would release in a fork.
    """
    execute = subprocess.Popen._execute_child
    names = list(inspect.signature(execute).parameters)[1:]
    requests, served = socket.socketpair(type=socket.SOCK_SEQPACKET)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # the parent of what the copy forks and disowns
    if os.fork() == 0:
        requests.close()
        _serve_forks(served)
    served.close()

    def fork(popen: subprocess.Popen, *values: Any) -> None:
        start = dict(zip(names, values, strict=True))
        if start["args"][0] != sys.executable:
            execute(popen, *values)
            return
        files = {number: start[name] for number, name in enumerate(STANDARD_FILES) if start[name] != -1}
        asked = {name: start[name] for name in ("start_new_session", "process_group")}
        asked |= {"args": list(map(str, start["args"])), "cwd": str(start["cwd"] or Path.cwd())}
        asked |= {"env": dict(os.environ if start["env"] is None else start["env"]), "files": list(files)}
        socket.send_fds(requests, [json.dumps(asked).encode()], list(files.values()))
        popen.pid = int(requests.recv(20))
        popen._child_created = True
        popen._close_pipe_fds(*values[names.index("p2cread") : names.index("errwrite") + 1])

    subprocess.Popen._execute_child = fork


def _serve_forks(requests: socket.socket) -> None:
    """Fork as asked until the one that asks is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        asked, handles, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not asked:
            os._exit(0)
        go_between = os.fork()
        if go_between == 0:
            go_between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == go_between:
                time.sleep(0.001)
            requests.send(str(os.getpid()).encode())  # only now can the one that asks wait for it
            _be_forked(handles, **json.loads(asked))
        for handle in handles:
            os.close(handle)
        os.waitpid(go_between, 0)


def _be_forked(
    handles: list[int],
    files: list[int],
    args: list[str],
    cwd: str,
    env: dict[str, str],
    start_new_session: bool,
    process_group: int,
) -> None:
    status = 1
    try:
        if start_new_session:
            os.setsid()
        elif process_group >= 0:
            os.setpgid(0, process_group)
        for handle, number in zip(handles, files, strict=True):
            os.dup2(handle, number)
        # Nothing else is shared, yet each number stays taken: objects of the parent may close theirs.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for path in Path("/proc/self/fd").iterdir():
            if int(path.name) > 2:
                os.dup2(nowhere, int(path.name))
        os.chdir(cwd)
        be_python(args[1:], env)
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        sys.stdout.flush()
        os._exit(status)


class Script:
    """A script of the project in a process of its own, and of a process group of its own."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None, before: str = "") -> None:
        start_forkserver()
        self._folder = tempfile.TemporaryDirectory()
        self.files = tuple(str(Path(self._folder.name, name)) for name in ("stdout", "stderr"))
        for name in self.files:
            Path(name).touch()
        self._process = FORKSERVER.Process(
            target=be_script, args=(command, {**os.environ, **(env or {})}, self.files, before, ROOT)
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def stdout(self) -> str:
        return Path(self.files[0]).read_text()

    @property
    def stderr(self) -> str:
        return Path(self.files[1]).read_text()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode  # negative: the signal that ended it

    @property
    def has_ended(self) -> bool:
        return self.returncode is not None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process, and what it has started, as a power cut would."""
        for kill in (os.killpg, os.kill):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        self._process.join()

    def wait(self, seconds: float = 300) -> Finished:
        self._process.join(seconds)
        if not self.has_ended:
            said = self.stdout + self.stderr
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{said}")
        return Finished(self._process.exitcode, self.stdout, self.stderr)


def run_script(
    *command: str | Path, env: dict[str, str] | None = None, before: str = "", **options: Any
) -> Finished:
    """Run a script, after the Python statements `before`, to its end.

    What is none of the project's scripts, or depends on how Python itself starts, is started afresh.
    """
    words = [str(word) for word in command]
    if Path(words[0]).stem not in SCRIPTS or options or any(key.startswith("PYTHON") for key in env or {}):
        return run_python(*words, env=env, **options)
    return Script(words, env, before).wait()


def run_python(*command: str | Path, env: dict[str, str] | None = None, **options: Any) -> Finished:
    """Run a command line behind `python` (such as torchrun's) in a process started afresh."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def refused(*command: str | Path, status: int = 2, **options: Any) -> str:
    """Run a script that must refuse; return its one line of error, without `Error: `."""
    done = run_script(*command, **options)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("encoding: ")]
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    return lines[0].removeprefix("Error: ")


def option_defaults(command: click.Command) -> dict[str, str]:
    """The defaults that a command's --help shows, by option."""
    shown = CliRunner().invoke(command, ["--help"], terminal_width=200).stdout
    return dict(re.findall(r"^ +(--[a-z-]+) .*\[default: ([^];]+)", shown, flags=re.MULTILINE))


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    """Wait until `condition` holds; fail loudly, naming `what`, where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.002)


def reserve_port() -> socket.socket:
    """A socket that keeps a port, `getsockname()[1]`, from being given to others. A server may bind to it."""
    holder = socket.socket()
    holder.bind(("", 0))
    # Only now: with it, the system might have chosen a port that another suite keeps like this.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return holder


def requested_range(header: str | None, size: int) -> range | None:
    """The bytes of a file that a request with this Range header asks for; None: for all of them."""
    if header is None:
        return None
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", header).groups()
    return range(int(first), min(int(last or size - 1) + 1, size))


def children_of(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def forked_children_of(process: int) -> list[int]:
    """The processes that a process has started since `fork_python`, whose copy of it is its first child."""
    return children_of(process)[1:]


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


# ------------------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Sandbox:
    """Runs and data sets of one test."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def datasets(self) -> Path:
        return self.path / "datasets"

    def run_dir(self, run: str = "tiny") -> Path:
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

    def start(self, run: str = "tiny", *options: str | Path, before: str = NO_CHART) -> Script:
        return Script(self.command(run, *options), self.env, before)

    def launch(
        self, run: str, *options: str | Path, processes: int, before: str = NO_CHART
    ) -> list[Finished]:
        """Train by several processes, in the environment that torchrun would give them, to their end."""
        with reserve_port() as holder:
            envs = [rank_environment(rank, processes, holder) for rank in range(processes)]
            scripts = [Script(self.command(run, *options), self.env | env, before) for env in envs]
            return [script.wait() for script in scripts]

    def train(
        self, run: str = "tiny", *options: str | Path, processes: int = 1, before: str = NO_CHART
    ) -> str:
        """Train a run to its end, which must be a good one, and return its standard output."""
        if processes == 1:
            finished = [run_script(*self.command(run, *options), env=self.env, before=before)]
        else:
            finished = self.launch(run, *options, processes=processes, before=before)
        assert {done.returncode for done in finished} == {0}, "".join(done.stderr for done in finished)
        return finished[0].stdout

    def metrics(self, run: str = "tiny", key: str = "train_loss") -> list[Any]:
        lines = [json.loads(line) for line in (self.run_dir(run) / "metrics.jsonl").read_text().splitlines()]
        return [line[key] for line in lines if key in line]

    def status(self, run: str = "tiny") -> dict:
        return json.loads((self.run_dir(run) / "status.json").read_text())

    def checkpoints(self, run: str = "tiny") -> list[Path]:
        folder = self.run_dir(run) / "checkpoints"
        return sorted(folder.glob("2*-iteration-*"), key=lambda path: int(path.name.split("-")[-1]))

    def meta(self, run: str = "tiny", index: int = -1) -> dict[str, Any]:
        return json.loads((self.checkpoints(run)[index] / "meta.json").read_text())

    def final_tensors(self, run: str = "tiny") -> dict[str, Any]:
        """Weights and optimizer state of the last checkpoint."""
        last = self.checkpoints(run)[-1]
        return {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


def rank_environment(rank: int, processes: int, holder: socket.socket) -> dict[str, str]:
    """What torchrun tells a process of one node; they meet at the port that `holder` keeps."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": holder.getsockname()[1]}
    return {key: str(value) for key, value in env.items()}


def make_sandbox(path: Path, *runs: str, **changes: object) -> Sandbox:
    """A sandbox with runs that drop out, validate, save and prune often, in few microbatches."""
    sandbox, changes = Sandbox(path), {"microbatch_size": 4, **changes}
    write_dataset(sandbox.datasets / "test/tokens")
    for run in runs:
        sandbox.write_run(run, TORTURED_MODEL, {**TORTURED_TRAIN, **changes})
    return sandbox


def step_reached(sandbox: Sandbox, run: str, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        path = sandbox.run_dir(run) / "metrics.jsonl"
        return path.exists() and path.read_text().count("train_loss") >= step

    return reached


def assert_modes_are_the_umasks(folder: Path) -> None:
    """Everything in a folder may be read by those whom the umask lets read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        usual = 0o777 if path.is_dir() else 0o666
        assert path.is_symlink() or stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path


class Calls(TorchDispatchMode):
    """A context that counts the operations which compute something, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def assert_same_tensors(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.equal(other[name]), f"{name} differs"


needs_gpt2 = pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"),
    reason="the GPT-2 vocabulary: set TIKTOKEN_CACHE_DIR to a copy of it",
)
