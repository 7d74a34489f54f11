"""Whatever happens to a run, it goes on from a whole checkpoint to the end that an undisturbed run has.

Trainings are forked from a process that has imported everything and computed nothing (see torture.py).
"""

import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torture
from forked import forked
from helpers import TORTURED_TRAIN, Sandbox, make_sandbox, step_reached
from torture import Training, assert_same_end, train

import checkpointing

# ------------------------------------------------------------------------------------------------------------
# Killed
# ------------------------------------------------------------------------------------------------------------


@forked
def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    counts = torture.torture(tmp_path, kills=2, seed=2)
    assert counts["kills"] >= 2 and counts["inside a save"] >= 1 and counts["runs"] >= 1
    assert counts["terminals"] >= 1


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

    def after_power_cut(self, path: Path, copy: Path) -> Path:
        """Write to `copy`, and return, what would be left of a file or folder."""
        self._restore(path.stat().st_ino, copy)
        return copy

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


def some_tensors(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    tensor = torch.full((1000,), float(step))
    return {"value": tensor}, {"value.state": tensor}


def some_meta(step: int) -> dict:
    empty = {key: {} for key in checkpointing.REQUIRED_META - {"files"}}
    return {**empty, "global_step": step, "is_best": True}


def test_a_save_that_is_not_finished_is_not_overwritten_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host copies of tensors are used again, and must not be while they are being written."""
    real, started = checkpointing.save_checkpoint, threading.Event()

    def slow(*arguments: object) -> Path:
        started.wait(10)
        return real(*arguments)

    monkeypatch.setattr(checkpointing, "save_checkpoint", slow)
    (tmp_path / "log").touch()
    with checkpointing.Saver(tmp_path / "checkpoints", None, tmp_path / "log") as saver:
        for step in (1, 2):
            threading.Timer(0.2, started.set).start()
            saver.copy(*some_tensors(step))
            saver.write(some_meta(step))
    paths = checkpointing.list_checkpoints(tmp_path / "checkpoints")
    saved = [checkpointing.load_checkpoint(path) for path in paths]
    assert [(each.meta["global_step"], each.model["value"][0].item()) for each in saved] == [(1, 1), (2, 2)]


def save_and_crash(folder: Path, crash_at: int) -> bool:
    """In a process that kills itself: one save, then another that crashes at a boundary. False if it had none
    left. A power cut leaves `folder`.cut and, of the log with a line for each step, log.cut."""
    worker = os.fork()
    if worker == 0:
        try:
            disk = Disk(crash_at)
            log = folder.with_name("log")
            saver = checkpointing.Saver(folder, 1, log)
            shutil.rmtree = remove_folder
            for step in (1, 2):
                with log.open("a") as lines:
                    lines.write(f"step {step}\n")
                disk.armed = step == 2
                try:
                    saver.copy(*some_tensors(step))
                    saver._write(*saver._copied, some_meta(step))
                except Crash:
                    break
                disk.armed = False
            crashed = disk.boundaries == crash_at
            for path in (folder, log):
                disk.after_power_cut(path, path.with_suffix(".cut"))
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
    whole checkpoints alone, of step 1 or 2, and of step 2 as soon as step 1 is gone or `latest` names it; of
    what was logged up to the newest, all. Returns the number of boundaries."""
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
            newest = checkpoints[-1].meta["global_step"]
            assert crashed or newest == 2, f"{left}: saved, and not there"
        assert len(folder.with_name("log.cut").read_text().splitlines()) >= newest, f"boundary {crash_at}"
        checkpointing.remove_leftovers(folder)
        assert not list(folder.glob(checkpointing.TEMPORARY_PREFIX + "*"))
    return crash_at - 1


def fail(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.skipif(bool(shutil.which("cc")), reason="test_faults.py sees more, where it can be compiled")
@forked
def test_a_crash_at_any_boundary_of_a_save_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    assert check_every_boundary(tmp_path) >= 40


@forked
def test_what_was_saved_or_linked_is_on_the_disk_at_once(tmp_path: Path) -> None:
    disk, folder = Disk(0), tmp_path / "run/checkpoints"
    folder.parent.mkdir()
    path = checkpointing.save_checkpoint(folder, *some_tensors(1), some_meta(1))
    left = disk.after_power_cut(folder.parent, tmp_path / "saved")
    assert checkpointing.load_checkpoint(left / "checkpoints" / path.name).meta["global_step"] == 1
    checkpointing.point_link(folder, "latest", path)
    left = disk.after_power_cut(folder.parent, tmp_path / "linked")
    assert (left / "checkpoints/latest").readlink() == Path(path.name)


def cut_off(sandbox: Sandbox, run: str, *options: str, **more: object) -> None:
    """Train until a few steps after the second checkpoint, then kill all."""
    training = Training(sandbox, run, *options, **more)
    training.wait_until(step_reached(sandbox, run, 12))
    training.signal(signal.SIGKILL)
    training.wait()


@forked
def test_three_processes_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """With three, the order of additions in an exchange of gradients depends on DDP's buckets: without the
    passes that warm DDP up, this test fails."""
    sandbox = make_sandbox(
        tmp_path, "whole", "resumed", microbatch_size=2, global_batch_size=6, min_train_tokens=2000
    )
    train(sandbox, "whole", processes=3)
    cut_off(sandbox, "resumed", processes=3)
    train(sandbox, "resumed", "--resume", processes=3)
    assert_same_end(sandbox, "resumed", "whole")


@forked
def test_other_numbers_of_processes_go_on_with_the_same_data(tmp_path: Path) -> None:
    """Also past a damaged checkpoint, from the one before it."""
    sandbox = make_sandbox(tmp_path)
    for run in ("whole", "changing"):
        sandbox.write_run(run, {}, TORTURED_TRAIN)
    train(sandbox, "whole")
    cut_off(sandbox, "changing", processes=2)
    first = sandbox.checkpoints("changing")[-1].name
    training = Training(sandbox, "changing", "--resume", processes=1)
    training.wait_until(step_reached(sandbox, "changing", 22))
    training.signal(signal.SIGKILL)
    training.wait()
    assert f"from {first}\n" in training.log.read_text()
    before, newest = sandbox.checkpoints("changing")[-2:]
    os.truncate(newest / "model.safetensors", 1000)
    said = train(sandbox, "changing", "--resume", processes=2)
    assert f"Skipping {newest.name}: {newest}/model.safetensors: damaged" in said
    assert f"from {before.name}\n" in said
    assert "The number of processes changed from 2 to 1: same data order, different dropout masks" in said
    assert "The number of processes changed from 1 to 2" in said
    assert sandbox.metrics("changing", "step") == sandbox.metrics("whole", "step")
    assert sandbox.metrics("changing") == pytest.approx(sandbox.metrics("whole"), rel=1e-3)
