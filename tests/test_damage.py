"""Damaged checkpoints, full disks, non-finite losses."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import forked
from helpers import (
    make_sandbox,
    step_reached,
)
from torture import Training, assert_same_end, train

import checkpointing
from basemodel.common.errors import InputError
from basemodel.model import loss
from basemodel.results import run_chart
from basemodel.training import run_folder
from basemodel.training.run_folder import lock_run


def write_checkpoints(folder: Path, steps: int = 3) -> list[Path]:
    """Small checkpoints of step 1 to `steps`, the second the best, with their links."""
    paths = []
    for step in range(1, steps + 1):
        tensors = {"value": torch.full((8,), float(step))}
        meta = {key: {} for key in checkpointing.REQUIRED_META - {"files"}}
        meta |= {"global_step": step, "is_best": step <= 2}
        paths.append(checkpointing.save_checkpoint(folder, tensors, tensors, meta))
        checkpointing.point_link(folder, "latest", paths[-1])
        if step <= 2:
            checkpointing.point_link(folder, "best", paths[-1])
    return paths


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(position: int) -> Callable[[Path], None]:
    def flip_byte(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return flip_byte


def flip_digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"global_step": 3', '"global_step": 2'))


FILES = [checkpointing.MODEL_FILE, checkpointing.OPTIMIZER_FILE, checkpointing.META_FILE]


def drop_the_cursor(path: Path) -> None:
    meta = json.loads(path.read_text())
    del meta["sequences_seen"]
    path.write_text(json.dumps(meta))


DAMAGES = [
    (file, damage) for file in FILES for damage in (truncate, flip(0), flip(12), flip(-1), Path.unlink)
]


@pytest.mark.parametrize(
    ("file", "damage"),
    [*DAMAGES, *((checkpointing.META_FILE, damage) for damage in (flip_digit, drop_the_cursor))],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: Callable) -> None:
    paths = write_checkpoints(tmp_path)
    damage(paths[-1] / file)
    said: list[str] = []
    found = checkpointing.newest_checkpoint(tmp_path, said.append)
    assert found.meta["global_step"] == 2 and found.model["value"].eq(2).all()
    assert len(said) == 1 and paths[-1].name in said[0] and file in said[0]
    # `latest` is a hint, a folder's name is not.
    assert checkpointing.named_checkpoint(tmp_path, "latest", said.append).meta["global_step"] == 2
    with pytest.raises(InputError, match=file):
        checkpointing.named_checkpoint(tmp_path, paths[-1].name, said.append)


@pytest.mark.parametrize(
    "target", ["gone", "latest", "best", "../../elsewhere", "/etc", ".", "strangers", None]
)
@pytest.mark.parametrize("link", ["latest", "best"])
def test_a_link_that_leads_nowhere_is_passed_over(tmp_path: Path, link: str, target: str | None) -> None:
    folder = tmp_path / "run/checkpoints"
    write_checkpoints(folder)
    shutil.copytree(folder, tmp_path / "elsewhere", symlinks=True)
    (folder / "strangers").mkdir()
    (folder / link).unlink()
    if target:
        (folder / link).symlink_to(target)
    said: list[str] = []
    found = checkpointing.named_checkpoint(folder, link, said.append)
    assert found.path.parent == folder
    # With `latest` pointing at `best` and the other way round, the newest is meant, or the last best.
    assert found.meta["global_step"] == {"latest": 3, "best": 2}[link]
    assert any(line.startswith(f"Skipping {link}: ") for line in said)


def test_strangers_are_left_alone_and_leftovers_are_not(tmp_path: Path) -> None:
    paths = write_checkpoints(tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints"
    leftover = folder / (checkpointing.TEMPORARY_PREFIX + paths[0].name)
    shutil.copytree(paths[0], leftover)
    (folder / f"{checkpointing.TEMPORARY_PREFIX}latest").symlink_to("x")
    strangers = [folder / name for name in (".incomplete-notes", "20261121Z-iteration-x", "backup")]
    for path in strangers:
        path.mkdir()
    (folder / ".incomplete-best").mkdir()
    (folder / "20261121Z999999-iteration-9").symlink_to(paths[0].name)
    checkpointing.remove_leftovers(folder)
    checkpointing.prune_checkpoints(folder, 1)
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in (*strangers, *paths[1:])} | {
        *("latest", "best", ".incomplete-best", "20261121Z999999-iteration-9")
    }


def test_a_clock_that_was_ahead_makes_no_older_checkpoint_the_newest(tmp_path: Path) -> None:
    (ahead,) = write_checkpoints(tmp_path, 1)
    ahead.rename(tmp_path / "20991231Z235959-iteration-1")
    newest = write_checkpoints(tmp_path, 3)[-1]
    checkpointing.prune_checkpoints(tmp_path, 1)
    assert checkpointing.list_checkpoints(tmp_path)[-1] == newest
    assert checkpointing.newest_checkpoint(tmp_path, print).meta["global_step"] == 3


def test_neither_the_best_nor_the_newest_is_pruned(tmp_path: Path) -> None:
    paths = write_checkpoints(tmp_path, 5)
    checkpointing.prune_checkpoints(tmp_path, 1)
    assert checkpointing.list_checkpoints(tmp_path) == [paths[1], paths[4]]
    (tmp_path / "best").unlink()  # what is the best follows from the checkpoints
    checkpointing.prune_checkpoints(tmp_path, 1)
    assert checkpointing.list_checkpoints(tmp_path) == [paths[1], paths[4]]


def test_a_run_is_locked_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status.json").write_text('{"pid": 42}')
    assert lock_run(tmp_path)
    with pytest.raises(InputError, match=r"is being trained by another process \(pid 42\)"):
        lock_run(tmp_path)
    said = []
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"is being trained by another process \(pid 42\)"):
        lock_run(tmp_path, said.append)
    assert said == ["Waiting up to 0 s for another process of this run (pid 42) to end"]


# ------------------------------------------------------------------------------------------------------------
# Disks
# ------------------------------------------------------------------------------------------------------------


@forked
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path, whole: Path) -> None:
    sandbox = make_sandbox(tmp_path, "full")
    sandbox.run_dir("whole").symlink_to(whole)

    def patch(rank: int) -> None:
        real = checkpointing.save_checkpoint

        def save(folder: Path, model: dict, optimizer: dict, meta: dict, *rest: bytes | None) -> Path:
            if meta["global_step"] == 10:  # larger files than that are refused from now on
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            return real(folder, model, optimizer, meta, *rest)

        checkpointing.save_checkpoint = save

    training = Training(sandbox, "full", patch=patch)
    assert training.wait()[0] == 1
    said = training.log.read_text()
    assert "Error: could not save the checkpoint of step 10: " in said
    assert "it takes 0.2 MB, " in said and " is free; --resume continues from" in said
    assert sandbox.status("full")["status"] == "failed"
    (left,) = sandbox.checkpoints("full")
    assert left.name.endswith("-iteration-5") and left.name in said
    assert "Resuming after step 5" in train(sandbox, "full", "--resume")
    assert_same_end(sandbox, "full", "whole")


def test_a_disk_too_small_is_noticed_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the 3 that are kept, 5 exist at a time: with the best and the one being written."""
    monkeypatch.setattr(checkpointing, "free_space", lambda folder: 12_000)
    checkpointing.require_space(tmp_path, 10, None, 1_200)
    with pytest.raises(InputError, match=r"11 checkpoints take .* keep_checkpoints"):
        checkpointing.require_space(tmp_path, 11, None, 1_200)
    checkpointing.require_space(tmp_path, 1000, 3, 2_400)
    with pytest.raises(InputError, match=r"5 checkpoints take"):
        checkpointing.require_space(tmp_path, 1000, 3, 2_412)


@forked
def test_a_chart_that_cannot_be_drawn_is_a_warning(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    real = run_chart.draw_chart

    def patch(rank: int) -> None:
        run_chart.draw_chart = real

    (sandbox.run_dir("run") / "training-run-chart.png.incomplete").mkdir()
    said = train(sandbox, "run", patch=patch)
    assert "Warning: could not draw the chart: [Errno 21] Is a directory" in said
    assert "Training complete" in said


# ------------------------------------------------------------------------------------------------------------
# Non-finite losses
# ------------------------------------------------------------------------------------------------------------


def poison(ranks: tuple[int, ...], when: Callable[[int], bool]) -> Callable[[int], None]:
    """A patch that makes the loss of some training passes NaN, on some processes."""

    def patch(rank: int) -> None:
        real, passes = loss.NextTokenLoss.forward, 0

        def forward(self: loss.NextTokenLoss, *inputs: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            result = real(self, *inputs)
            if self.training:
                passes += 1
                if rank in ranks and when(passes):
                    result = result * torch.nan
            return result

        loss.NextTokenLoss.forward = forward

    return patch


@forked
def test_a_non_finite_loss_on_one_process_skips_the_step_on_all(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "one", "all")
    # The first two passes let DDP build its buckets; each of the first ten steps is one more.
    for run, ranks in (("one", (1,)), ("all", (0, 1))):
        said = train(sandbox, run, patch=poison(ranks, lambda number: number == 2 + 7))
        problem = "the training loss is nan and the gradient norm nan at step 7"
        assert said.count(f"Skipped the update: {problem}") == 1
    assert_same_end(sandbox, "one", "all")
    assert sandbox.metrics("one", "train_loss")[6] is None


@forked
def test_too_many_skipped_steps_end_the_run_and_are_counted_over_a_resume(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", patch=poison((1,), lambda number: number > 2 + 6))
    training.wait_until(step_reached(sandbox, "run", 11))
    training.signal(signal.SIGTERM)
    assert training.wait() == [143, 143]
    training = Training(sandbox, "run", "--resume", patch=poison((1,), lambda number: number > 2))
    assert training.wait() == [1, 1]
    said = training.log.read_text()
    assert "at step 22; 16 steps in a row were skipped" in said
    newest = checkpointing.list_checkpoints(sandbox.run_dir("run") / "checkpoints")[-1]
    assert f"the last checkpoint is {newest.name}" in said
    good = checkpointing.load_checkpoint(newest)
    assert all(tensor.isfinite().all() for tensor in (*good.model.values(), *good.optimizer.values()))
