"""Whatever happens to a run, it goes on from a whole checkpoint to the end that an undisturbed run has.

Trainings are forked from a process that has imported everything and computed nothing (see torture.py), except
where torchrun's own part is under test. Each protection is shown to bite: `test_without_...` takes it out and
expects the very check that guards it to fail.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torture
from helpers import (
    ROOT,
    TORTURED_TRAIN,
    Sandbox,
    children_of,
    forked,
    make_sandbox,
    reserve_port,
    step_reached,
    write_dataset,
)
from torture import Training, assert_same_end, train

import checkpointing
from basemodel import distributed

# ------------------------------------------------------------------------------------------------------------
# Killed
# ------------------------------------------------------------------------------------------------------------


@forked
def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    counts = torture.torture(tmp_path, kills=16, seed=0)
    assert counts["kills"] >= 16 and counts["inside a save"] >= 8 and counts["runs"] >= 1


class Disk:
    """Follows what a process does to files, to know what a disk that keeps only what was fsynced would hold
    after a power cut; and ends the process at the n-th boundary between two such doings."""

    def __init__(self, crash_at: int) -> None:
        self.crash_at, self.boundaries = crash_at, 0
        self.armed = False
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int | str]] = {}
        for name in ("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync"):
            setattr(os, name, self._watched(getattr(os, name), self._remember if name == "fsync" else None))
        safetensors.torch.save_file = self._watched(safetensors.torch.save_file, half=True)
        Path.write_text = self._watched(Path.write_text, half=True)

    def _watched(self, function: Callable, after: Callable | None = None, half: bool = False) -> Callable:
        def watched(*arguments: object, **options: object) -> object:
            self._boundary()
            result = function(*arguments, **options)
            if after is not None:
                after(*arguments)
            if half:
                path = next(each for each in arguments if isinstance(each, Path))
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) // 2])
                self._boundary()
                path.write_bytes(whole)
            self._boundary()
            return result

        return watched

    def _boundary(self) -> None:
        if self.armed:
            self.boundaries += 1
            if self.boundaries == self.crash_at:
                self.armed = False
                raise Crash

    def _remember(self, handle: int) -> None:
        path, number = Path(f"/proc/self/fd/{handle}").readlink(), os.fstat(handle).st_ino
        if path.is_dir():
            self._folders[number] = {
                each.name: str(each.readlink()) if each.is_symlink() else each.stat().st_ino
                for each in path.iterdir()
            }
        else:
            self._files[number] = path.read_bytes()

    def after_power_cut(self, folder: Path, copy: Path) -> None:
        """Write to `copy` what would be left of `folder`."""
        self._restore(folder.stat().st_ino, copy)

    def _restore(self, number: int, copy: Path) -> None:
        if number not in self._folders:
            copy.write_bytes(self._files.get(number, b""))
            return
        copy.mkdir()
        for name, entry in self._folders[number].items():
            if isinstance(entry, str):
                (copy / name).symlink_to(entry)
            else:
                self._restore(entry, copy / name)


def remove_folder(path: Path, **_: object) -> None:
    """Like shutil.rmtree, but by calls that `Disk` sees."""
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


class Crash(BaseException):
    """The end of a process in the midst of its work: nothing may catch it."""


def save_and_crash(folder: Path, crash_at: int) -> bool:
    """In a process that kills itself: one save, then another that crashes at a boundary. False if it had none
    left. What a power cut leaves is in `folder`.cut."""
    worker = os.fork()
    if worker == 0:
        try:
            disk = Disk(crash_at)
            log = folder.parent / "metrics.jsonl"
            log.touch()
            saver = checkpointing.Saver(folder, 1, log)
            shutil.rmtree = remove_folder
            for step in (1, 2):
                tensors = {"value": torch.full((1000,), float(step))}
                meta = {key: {} for key in checkpointing.REQUIRED_META - {"files"}}
                meta |= {"global_step": step, "is_best": True}
                disk.armed = step == 2
                try:
                    saver.copy(tensors, {"value.state": tensors["value"]})
                    saver._write(*saver._copied, meta)
                except Crash:
                    break
                disk.armed = False
            crashed = disk.boundaries == crash_at
            disk.after_power_cut(folder, folder.with_suffix(".cut"))
            if crashed:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        finally:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def check_every_boundary(path: Path) -> int:
    """Crash at each boundary of a save, and look at what the dead process and a power cut leave behind:
    whole checkpoints alone, of step 1 or 2, and of step 2 as soon as step 1 is gone or `latest` names it.
    Returns the number of boundaries."""
    crash_at = 0
    crashed = True
    while crashed:
        crash_at += 1
        folder = path / str(crash_at) / "checkpoints"
        folder.parent.mkdir()
        crashed = save_and_crash(folder, crash_at)
        for left in (folder, folder.with_suffix(".cut")):
            checkpoints = [
                checkpointing.load_checkpoint(each) for each in checkpointing.list_checkpoints(left)
            ]
            assert checkpoints, f"boundary {crash_at}: {left} holds none"
            for each in checkpoints:
                step = each.meta["global_step"]
                assert step in (1, 2)
                assert each.model["value"].eq(step).all() and each.optimizer["value.state"].eq(step).all()
            for link in ("latest", "best"):
                assert checkpointing.named_checkpoint(left, link, fail).meta["global_step"] in (1, 2)
            assert crashed or checkpoints[-1].meta["global_step"] == 2, f"{left}: saved, and not there"
        checkpointing.remove_leftovers(folder)
        assert not list(folder.glob(checkpointing.TEMPORARY_PREFIX + "*"))
    return crash_at - 1


def fail(line: str) -> None:
    raise AssertionError(line)


@forked
def test_a_crash_at_any_boundary_of_a_save_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    assert check_every_boundary(tmp_path) >= 40


@forked
def test_without_fsync_a_power_cut_would_lose_a_checkpoint(tmp_path: Path) -> None:
    checkpointing.sync = lambda path: None
    with pytest.raises((AssertionError, checkpointing.InputError, FileNotFoundError)):
        check_every_boundary(tmp_path)


@forked
def test_without_the_rename_a_crash_would_leave_half_a_checkpoint(tmp_path: Path) -> None:
    checkpointing.TEMPORARY_PREFIX = ""
    checkpointing.remove_leftovers = lambda folder: None
    with pytest.raises((AssertionError, checkpointing.InputError)):
        check_every_boundary(tmp_path)


def cut_off(sandbox: Sandbox, run: str, *options: str, **more: object) -> None:
    """Train until a few steps after the second checkpoint, then kill all."""
    training = Training(sandbox, run, *options, **more)
    training.wait_until(step_reached(sandbox, run, 12))
    training.signal(signal.SIGKILL)
    training.wait()


@forked
def test_three_processes_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """With three, the order of additions in an exchange of gradients depends on DDP's buckets: without the
    pass through DDP in make_state, this test fails."""
    sandbox = make_sandbox(tmp_path, "whole", "resumed", microbatch_size=1, global_batch_size=6)
    train(sandbox, "whole", processes=3)
    cut_off(sandbox, "resumed", processes=3)
    train(sandbox, "resumed", "--resume", processes=3)
    assert_same_end(sandbox, "resumed", "whole")


@forked
def test_without_restored_random_numbers_a_resumed_run_would_differ(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "whole", "resumed")
    train(sandbox, "whole")
    cut_off(sandbox, "resumed")

    def patch(rank: int) -> None:
        checkpointing.set_rng_state = lambda *_: None

    train(sandbox, "resumed", "--resume", patch=patch)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_end(sandbox, "resumed", "whole")


@forked
def test_other_numbers_of_processes_go_on_with_the_same_data(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    write_dataset(sandbox.datasets / "test/tokens")
    for run in ("whole", "changing"):
        sandbox.write_run(run, {}, TORTURED_TRAIN)
    train(sandbox, "whole")
    cut_off(sandbox, "changing", processes=2)
    first = checkpointing.last_checkpoint(sandbox.run_dir("changing") / "checkpoints").name
    training = Training(sandbox, "changing", "--resume", processes=1)
    training.wait_until(step_reached(sandbox, "changing", 40))
    training.signal(signal.SIGKILL)
    training.wait()
    said = train(sandbox, "changing", "--resume", processes=2)
    assert f"from {first}" in said
    assert "Saved by 2 processes, resumed by 1: the data go on exactly where they were" in said
    assert "Saved by 1 processes, resumed by 2" in said
    assert sandbox.metrics("changing", "step") == sandbox.metrics("whole", "step")
    assert sandbox.metrics("changing") == pytest.approx(sandbox.metrics("whole"), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Asked to stop
# ------------------------------------------------------------------------------------------------------------


def slow_save(rank: int) -> None:
    real = checkpointing.save_checkpoint
    checkpointing.save_checkpoint = lambda *arguments: time.sleep(1) or real(*arguments)


def slow_validation(rank: int) -> None:
    real = distributed.World.any

    def slow(*arguments: object) -> bool:
        print("validating")
        time.sleep(0.3)
        return real(*arguments)

    distributed.World.any = slow


def second_validation(sandbox: Sandbox, run: str) -> bool:
    """Whether the run is in its second validation: three microbatches are two rounds of two processes."""
    return (sandbox.path / f"{run}.log").read_text().count("validating") >= 2 * 2 + 1


MOMENTS = {
    "step": (lambda rank: None, lambda sandbox, run: step_reached(sandbox, run, 7)()),
    "save": (slow_save, lambda sandbox, run: step_reached(sandbox, run, 5)()),
    "validation": (slow_validation, second_validation),
}


def check_stopped(
    path: Path, moment: str, number: int, rank: int | None, patch: Callable | None = None
) -> None:
    """A run stops for a signal after the same step everywhere, says so, and goes on as if it had not."""
    sandbox = make_sandbox(path, "whole", "stopped")
    train(sandbox, "whole")
    slow, reached = MOMENTS[moment]

    def patches(rank: int) -> None:
        slow(rank)
        if patch:
            patch(rank)

    training = Training(sandbox, "stopped", "--collective-timeout", "5", patch=patches)
    training.wait_until(lambda: reached(sandbox, "stopped"))
    training.signal(number, rank)
    assert training.wait() == [
        128 + number if rank in (None, each) else 128 + signal.SIGTERM for each in (0, 1)
    ]
    status = sandbox.status("stopped")
    assert status["status"] == "preempted"
    (newest,) = sandbox.checkpoints("stopped")[-1:]
    assert newest.name == status["checkpoint"] and newest.name.endswith(f"-{status['step']}")
    if moment == "validation":
        assert status["step"] == 10 and 10 not in [
            json.loads(line)["step"]
            for line in (sandbox.run_dir("stopped") / "metrics.jsonl").read_text().splitlines()
            if "val_loss" in line
        ]
    train(sandbox, "stopped", "--resume")
    assert_same_end(sandbox, "stopped", "whole")
    assert not sandbox.run_dir("stopped").joinpath("checkpoints/latest").readlink().is_absolute()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, None)])
@forked
def test_a_signal_stops_all_after_the_same_step(tmp_path: Path, moment: str, number: int, rank: int) -> None:
    check_stopped(tmp_path, moment, number, rank)


@forked
def test_without_a_shared_decision_a_signal_to_one_process_would_end_in_chaos(tmp_path: Path) -> None:
    def patch(rank: int) -> None:
        distributed.World.sum = lambda self, tensor: tensor

    with pytest.raises(AssertionError):
        check_stopped(tmp_path, "step", signal.SIGTERM, 1, patch)


@forked
def test_a_second_signal_ends_a_process_at_once_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    def patch(rank: int) -> None:
        real = checkpointing.fingerprint

        def stuck_in_the_second(path: Path) -> dict:
            if path.parent.name.startswith(".incomplete") and path.parent.name.endswith("-10"):
                time.sleep(60)
            return real(path)

        checkpointing.fingerprint = stuck_in_the_second

    sandbox = make_sandbox(tmp_path, "whole", "stopped")
    train(sandbox, "whole")
    training = Training(sandbox, "stopped", patch=patch)
    training.wait_until(step_reached(sandbox, "stopped", 10))
    training.signal(signal.SIGTERM)
    time.sleep(3.5)  # an earlier one counts as the launcher's copy of the first
    training.signal(signal.SIGTERM)
    assert training.wait(5) == [128 + signal.SIGTERM] * 2
    assert "-iteration-5" in train(sandbox, "stopped", "--resume")
    assert_same_end(sandbox, "stopped", "whole")


@forked
def test_the_search_for_a_microbatch_stops_for_a_signal(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", "-f")
    training.wait_until(lambda: "microbatch 2: fits" in training.log.read_text())
    training.signal(signal.SIGTERM, rank=1)
    assert training.wait() == [1, 1]
    assert (
        "Error: stopped by a signal; the largest microbatch that fitted so far is" in training.log.read_text()
    )


# ------------------------------------------------------------------------------------------------------------
# A process that dies or stands still
# ------------------------------------------------------------------------------------------------------------


@forked
def test_when_a_process_dies_the_others_end(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run")
    training.wait_until(step_reached(sandbox, "run", 7))
    training.signal(signal.SIGKILL, rank=1)
    assert training.wait(10) == [1, -signal.SIGKILL]
    assert "Error: another of the processes that train together has died" in training.log.read_text()
    assert sandbox.status("run")["status"] == "failed"


@forked
def test_when_a_process_stands_still_the_others_end_at_the_timeout(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", "--collective-timeout", "2")
    training.wait_until(step_reached(sandbox, "run", 7))
    training.signal(signal.SIGSTOP, rank=1)
    start = time.monotonic()
    assert training.wait(10, rank=0) == [1]
    assert time.monotonic() - start > 1.5
    assert "died or stands still" in training.log.read_text()
    training.signal(signal.SIGKILL, rank=1)
    training.wait(rank=1)


def torchrun(
    sandbox: Sandbox, run: str, *launch: str, options: tuple[str, ...] = ("--resume",)
) -> subprocess.Popen:
    processes = 1 if "--nnodes=2" in launch else 2
    command = [sys.executable, *sandbox.command(run, *options, processes=processes, torchrun=launch)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=(sandbox.path / f"{run}.log").open("a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_torchrun_restarts_a_run_of_which_a_process_was_killed(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "whole", "killed", min_train_tokens=400 * 8 * 16)
    assert torchrun(sandbox, "whole", "--standalone").wait(120) == 0
    # Without --resume too: a process that is started again goes on.
    agent = torchrun(sandbox, "killed", "--standalone", "--max-restarts=3", options=())
    wait_for(step_reached(sandbox, "killed", 7))
    os.kill(children_of(agent.pid)[-1], signal.SIGKILL)
    assert agent.wait(120) == 0
    assert_same_end(sandbox, "killed", "whole")
    assert not list(sandbox.run_dir("killed").glob("earlier-*"))


def test_without_restarts_torchrun_ends_all_when_a_process_was_killed(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "killed", min_train_tokens=400 * 8 * 16)
    agent = torchrun(sandbox, "killed", "--standalone")
    wait_for(step_reached(sandbox, "killed", 7))
    workers = children_of(agent.pid)
    os.kill(workers[0], signal.SIGKILL)
    assert agent.wait(10) != 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_node_that_was_killed_and_started_again_is_taken_back(tmp_path: Path, monkeypatch) -> None:
    sandbox = make_sandbox(tmp_path, "whole", "killed", min_train_tokens=400 * 8 * 16)
    assert torchrun(sandbox, "whole", "--standalone").wait(120) == 0
    holder = reserve_port()
    port = holder.getsockname()[1]
    launch = (
        *("--nnodes=2", "--max-restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"),
        "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=2",
    )
    # Else torchrun (2.13) tells a node that joins later nothing of the store that it has kept from the start.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    nodes = [torchrun(sandbox, "killed", *launch) for _ in range(2)]
    wait_for(step_reached(sandbox, "killed", 7))
    # The one that holds the rendezvous stays.
    other = next(node for node in nodes if not listens(node.pid, port))
    workers = children_of(other.pid)
    os.killpg(other.pid, signal.SIGKILL)
    for worker in workers:  # each leads a group of its own
        os.kill(worker, signal.SIGKILL)
    other.wait()
    nodes[nodes.index(other)] = torchrun(sandbox, "killed", *launch)
    assert [node.wait(120) for node in nodes] == [0, 0]
    assert_same_end(sandbox, "killed", "whole")


def listens(process: int, port: int) -> bool:
    """Whether a process has a socket that listens on a port of this machine."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [row.split() for row in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    sockets = {
        f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port
    }
    return any(str(handle.readlink()) in sockets for handle in Path(f"/proc/{process}/fd").iterdir())
