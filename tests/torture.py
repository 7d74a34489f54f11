"""Kill a training again and again, at random moments and half of the time inside a save or while an old
checkpoint is deleted, or take its terminal away, resume it each time, and compare its end with that of a run
that nobody disturbed.

    PYTHONPATH=. python tests/torture.py FOLDER --kills 200

Processes are forked from this one, which has imported PyTorch already, because starting Python anew takes
longer than what is tested. Each training is a process group of its own, with the environment that torchrun
would give: two processes that talk through gloo, killed together by SIGKILL.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

# The first step of an optimizer would import it, in each process anew.
import torch._dynamo  # noqa: F401
from helpers import TORTURED_MODEL, TORTURED_TRAIN, Sandbox, reserve_port, write_dataset
from safetensors.numpy import load_file

import checkpointing
import ddp_train
from basemodel.common.command_line import run_command
from basemodel.results import run_chart
from basemodel.training import pending


class Training:
    """A run trained by processes that are forked here; `patch` is called in each before it begins.

    They read the results of steps one step late, as on a GPU; with `behind` 0 at once, as on a CPU. Output
    goes to a file or, with `terminal`, to a terminal, until `close_terminal`.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        run: str,
        *options: str,
        processes: int = 2,
        behind: int = 1,
        terminal: bool = False,
        patch: Callable[[int], None] = lambda rank: None,
    ) -> None:
        command = sandbox.command(run, *options)
        arguments = command[command.index("ddp_train.py") + 1 :]
        self._behind = behind
        self.log = sandbox.path / f"{run}.log"
        self.log.touch()
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        self._terminal, output = os.openpty() if terminal else (-1, log)
        self._holder = reserve_port()
        port = self._holder.getsockname()[1]
        self.workers: list[int] = []
        for rank in range(processes):
            worker = os.fork()
            if worker == 0:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.setpgid(0, self.workers[0] if self.workers else 0)
                self._be(rank, processes, port, arguments, output, patch)
            self.workers.append(worker)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(worker, self.workers[0])
        for handle in {log, output}:
            os.close(handle)

    def _be(self, rank: int, size: int, port: int, words: list[str], output: int, patch: Callable) -> None:
        try:
            for number in (1, 2):
                os.dup2(output, number)
            self.close_terminal()  # this process's own handle of its other end
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which this may run, has it ignored
            sys.stdout.reconfigure(line_buffering=True)
            names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"
            os.environ.update(zip(names, map(str, (rank, rank, size, size, port)), strict=True))
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            sys.argv = ["ddp_train.py", *words]
            run_chart.draw_chart = lambda *_: None  # takes longer than all the rest
            pending.STEPS_BEHIND["cpu"] = self._behind
            patch(rank)
            run_command(ddp_train.main, abruptly=True)
        finally:
            os._exit(99)

    def close_terminal(self) -> None:
        """From now on, whatever the processes print is an error."""
        if self._terminal != -1:
            os.close(self._terminal)

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one process, or to all."""
        if rank is None:
            os.killpg(self.workers[0], number)
        else:
            os.kill(self.workers[rank], number)

    def wait(self, seconds: float = 120, rank: int | None = None) -> list[int]:
        """The exit statuses (negative: the signal that ended it) of all processes, or of one, when they have
        ended. Raises TimeoutError, and kills what is left, after `seconds`."""
        deadline = time.monotonic() + seconds
        statuses = []
        for worker in self.workers if rank is None else [self.workers[rank]]:
            while (ended := os.waitpid(worker, os.WNOHANG))[0] == 0:
                if time.monotonic() > deadline:
                    self.signal(signal.SIGKILL)
                    raise TimeoutError(f"still running after {seconds} s:\n{self.log.read_text()}")
                time.sleep(0.002)
            statuses.append(os.waitstatus_to_exitcode(ended[1]))
        return statuses

    def has_ended(self) -> bool:
        """Whether the first process has; its status is left to be waited for."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.workers[0], look) is not None

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds, or the first process ends. Raises TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (condition() or self.has_ended()):
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(self.log.read_text())
            time.sleep(0.0005)


def train(sandbox: Sandbox, run: str, *options: str, **more: object) -> str:
    """Train a run to its end and return what it said."""
    training = Training(sandbox, run, *options, **more)
    statuses = training.wait()
    assert set(statuses) == {0}, f"{statuses}\n{training.log.read_text()}"
    return training.log.read_text()


def saving(sandbox: Sandbox, run: str) -> bool:
    """Whether a checkpoint is being written, or a killed process was writing it."""
    return any((sandbox.run_dir(run) / "checkpoints").glob(checkpointing.TEMPORARY_PREFIX + "*"))


def assert_same_end(sandbox: Sandbox, run: str, other: str) -> None:
    """Two runs have the same weights, optimizer and metrics, to the last bit."""
    for name in (checkpointing.MODEL_FILE, checkpointing.OPTIMIZER_FILE):
        ours, theirs = (load_file(sandbox.checkpoints(each)[-1] / name) for each in (run, other))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.tobytes() == theirs[key].tobytes(), f"{name}: {key} differs"
    for key in ("step", "train_loss", "val_loss", "grad_norm", "learning_rate"):
        assert sandbox.metrics(run, key) == sandbox.metrics(other, key), f"{key} in metrics.jsonl differs"


def last_step(sandbox: Sandbox, run: str) -> int:
    """The step of the newest checkpoint."""
    paths = checkpointing.list_checkpoints(sandbox.run_dir(run) / "checkpoints")
    return int(paths[-1].name.rpartition("-")[2]) if paths else 0


def kill_once(sandbox: Sandbox, dice: random.Random, *, in_save: bool, terminal: bool) -> bool:
    """Go on with the tortured run and kill it, or take its `terminal` away, on which it stops by itself;
    False if it came to its end before."""
    before = last_step(sandbox, "tortured") + 5 * dice.randrange(1, 5)
    training = Training(sandbox, "tortured", "--resume", terminal=terminal)
    status = sandbox.run_dir("tortured") / "status.json"
    started = time.time_ns()
    training.wait_until(lambda: status.exists() and status.stat().st_mtime_ns > started)
    if in_save:
        training.wait_until(lambda: last_step(sandbox, "tortured") >= before and saving(sandbox, "tortured"))
        time.sleep(dice.uniform(0, 0.0015))
    else:
        time.sleep(dice.uniform(0, 0.5))
    training.close_terminal()
    with contextlib.suppress(ProcessLookupError):
        training.signal(signal.SIGHUP if terminal else signal.SIGKILL)
    statuses = set(training.wait())
    # A terminal may go before the training listens to signals, which it does before its first step.
    ended = {128 + signal.SIGHUP} if terminal else {-signal.SIGKILL}
    too_early = terminal and -signal.SIGHUP in statuses
    assert statuses <= {0} | ended or too_early, f"{statuses}\n{training.log.read_text()}"
    return statuses != {0}


def torture(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill and resume a run until `kills` were survived, half of that number inside a save; in between, take
    its terminal away, a quarter as often. As often as it ends meanwhile, begin it anew.

    Each time its end must be that of the undisturbed run. Returns what was survived.
    """
    sandbox = Sandbox(folder)
    write_dataset(sandbox.datasets / "test/tokens")
    sandbox.write_run("calm", TORTURED_MODEL, TORTURED_TRAIN)
    train(sandbox, "calm", behind=0)
    dice = random.Random(seed)
    counts = {"kills": 0, "inside a save": 0, "terminals": 0, "runs": 0}

    def enough() -> bool:
        return counts["kills"] >= kills and 2 * counts["inside a save"] >= kills

    while not enough():
        sandbox.write_run("tortured", TORTURED_MODEL, TORTURED_TRAIN)
        while not enough():
            in_save = 2 * counts["inside a save"] <= counts["kills"]
            terminal = 4 * counts["terminals"] < counts["kills"]
            if not kill_once(sandbox, dice, in_save=in_save, terminal=terminal):
                break
            counts["terminals" if terminal else "kills"] += 1
            counts["inside a save"] += not terminal and saving(sandbox, "tortured")
        train(sandbox, "tortured", "--resume")
        assert_same_end(sandbox, "tortured", "calm")
        counts["runs"] += 1
        sandbox.run_dir("tortured").rename(sandbox.run_dir(f"survivor-{counts['runs']}"))
    return counts


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--kills", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=int, help="Of the moments; the time of day where not given.")
def main(folder: Path, kills: int, seed: int | None) -> None:
    """Torture a training in FOLDER, which must be new or empty."""
    seed = int(time.time()) if seed is None else seed
    print(f"seed {seed}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    counts = torture(folder, kills, seed)
    print(json.dumps({**counts, "seconds": round(time.monotonic() - start, 1)}))


if __name__ == "__main__":
    main()
