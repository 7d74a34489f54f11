"""A run that was stopped and goes on ends as the one that was not: weights, files, links and figures."""

import json
import shutil
from typing import Any

import pytest
from helpers import NO_CHART, Sandbox, assert_same_tensors

DROPOUT = {"drop_rate": 0.1}
SCHEDULE = {"schedule_learning_rate": True, "warmup_period_percent": 25, "clipping_max_norm": 0.5}
# So high a rate that the first checkpoint stays the best.
CLIMBING = {"learning_rate": 1.0, "validation_interval": 1, "validation_batches": 3}
TIMED = {"seconds", "tokens_per_second", "validation_seconds", "checkpoint_seconds"}

# A loss scale that grows with every second step, from where it still leaves room to.
GROWING_SCALE = f"""{NO_CHART}
import functools, torch
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=16.0, growth_interval=2)
"""
# SIGTERM to the last process behind its seventh step; the one before these allocates the optimizer's state.
STOPPED = f"""{NO_CHART}
import os, signal, time
from torch.optim.optimizer import register_optimizer_step_post_hook
steps = [0]
def count(*_):
    steps[0] += 1
    if steps[0] == 1 + 7 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
register_optimizer_step_post_hook(count)
"""


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMED}


def what_is_left(sandbox: Sandbox, run: str) -> dict[str, Any]:
    """All that a finished run leaves but for times: what its folder's files say, and where links point."""
    folder = sandbox.run_dir(run)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    paths = {name: (folder / "checkpoints" / name).readlink() for name in ("latest", "best")}
    metas = [sandbox.meta(run, index) for index in range(len(sandbox.checkpoints(run)))]
    for meta in metas:
        del meta["digest"]
    return {
        "metrics": [without_times(json.loads(line)) for line in lines],
        "meta": {meta["global_step"]: without_times(meta) for meta in metas},
        "links": {name: path.name.split("-")[-1] for name, path in paths.items()},
        "status": {key: sandbox.status(run)[key] for key in ("status", "step", "tokens", "loss")},
    }


def assert_same_end(sandbox: Sandbox, one: str, other: str) -> None:
    assert_same_tensors(sandbox.final_tensors(one), sandbox.final_tensors(other))
    assert what_is_left(sandbox, one) == what_is_left(sandbox, other)


OWN_RATES = {"optimizer": "muon", "embedding_learning_rate": 0.05, "head_learning_rate": 0.002}
HALVES = {"half_batch_percent": 33.4, "min_train_tokens": 6 * 8 * 16, "checkpoint_interval": 3}
HALVES |= {"short_sequence_percent": 66}


@pytest.mark.parametrize(
    ("processes", "changes", "before"),
    [
        (1, CLIMBING, NO_CHART),
        (2, {**SCHEDULE, "checkpoint_interval": 3}, NO_CHART),
        (1, {**SCHEDULE, "checkpoint_interval": 3, "optimizer": "muon", "precision": "fp16"}, GROWING_SCALE),
        (2, {**SCHEDULE, **OWN_RATES, "validation_interval": 2, "validation_batches": 3}, NO_CHART),
        (2, {**SCHEDULE, **HALVES}, NO_CHART),
    ],
)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_end(
    sandbox: Sandbox, processes: int, changes: dict, before: str
) -> None:
    """From what is on the disk of a run that was killed after its first checkpoint: metrics have gone on."""
    sandbox.write_run("whole", DROPOUT, changes)
    sandbox.train("whole", processes=processes, before=before)
    sandbox.write_run("resumed", DROPOUT, changes)
    shutil.copytree(sandbox.run_dir("whole"), sandbox.run_dir("resumed"), dirs_exist_ok=True, symlinks=True)
    for path in sandbox.checkpoints("resumed")[1:]:
        shutil.rmtree(path)
    (sandbox.run_dir("resumed") / "status.json").unlink()
    out = sandbox.train("resumed", "--resume", processes=processes, before=before)
    assert f"Resuming after step {sandbox.meta('resumed', 0)['global_step']}, " in out
    assert_same_end(sandbox, "whole", "resumed")
    assert sandbox.metrics("resumed", "step")[-8:] == list(range(1, 9))
    if before == GROWING_SCALE:
        assert [sandbox.meta("whole", i)["scaler"]["scale"] for i in range(3)] == [32.0, 128.0, 256.0]
    if changes is CLIMBING:
        assert what_is_left(sandbox, "resumed")["links"]["best"] == "1", "or this shows nothing"


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_one_process_checkpoints_all_and_the_run_goes_on_to_the_same_end(
    sandbox: Sandbox, processes: int
) -> None:
    """In the midst of an interval whose mean loss decides what is best."""
    settings = {**SCHEDULE, "min_train_tokens": 15 * 8 * 16, "checkpoint_interval": 5}
    for run in ("whole", "stopped"):
        sandbox.write_run(run, DROPOUT, settings)
    sandbox.train("whole", processes=processes)
    finished = sandbox.launch("stopped", processes=processes, before=STOPPED)
    assert {done.returncode for done in finished} == {128 + 15}
    assert "and saved a checkpoint; --resume continues from there" in finished[0].stdout
    status = sandbox.status("stopped")
    assert status["status"] == "preempted" and status["step"] in (7, 8, 9)
    assert sandbox.checkpoints("stopped")[-1].name.endswith(f"-iteration-{status['step']}")
    sandbox.train("stopped", "--resume", processes=processes)
    shutil.rmtree(sandbox.checkpoints("stopped")[1])  # of the stop
    assert_same_end(sandbox, "whole", "stopped")


# A step takes 16 s by the first process's clock, and half an hour by any other's.
CLOCKS = f"""{NO_CHART}
import os, time
from torch.optim.optimizer import register_optimizer_step_post_hook
now = [1000.0]
time.monotonic = lambda: now[0]
def go_on(*_):
    now[0] += 16 if os.environ.get("RANK", "0") == "0" else 1800
register_optimizer_step_post_hook(go_on)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_by_the_clock_are_those_of_the_first_process_and_resumed_from_exactly(
    sandbox: Sandbox, processes: int
) -> None:
    for run, minutes in (("whole", {}), ("timed", {"checkpoint_minutes": 0.5})):
        sandbox.write_run(run, DROPOUT, {**SCHEDULE, **minutes})
        sandbox.train(run, processes=processes, before=CLOCKS)
    assert [path.name.split("-")[-1] for path in sandbox.checkpoints("timed")] == ["2", "4", "6", "8"]
    for path in sandbox.checkpoints("timed")[2:]:
        shutil.rmtree(path)
    assert "Resuming after step 4" in sandbox.train("timed", "--resume", processes=processes)
    assert_same_tensors(sandbox.final_tensors("whole"), sandbox.final_tensors("timed"))


def test_a_checkpoint_can_be_named(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 3, "learning_rate": 0.5})
    sandbox.train()
    before = sandbox.final_tensors()
    first = sandbox.checkpoints()[0].name
    assert (sandbox.run_dir() / "checkpoints/best").readlink().name == first
    assert "is finished" in sandbox.train("tiny", "latest")
    assert "Resuming after step 3" in sandbox.train("tiny", "best")
    assert sandbox.metrics(key="step") == list(range(1, 9))
    for path in sandbox.checkpoints()[1:]:
        shutil.rmtree(path)
    assert "Resuming after step 3" in sandbox.train("tiny", first)
    assert_same_tensors(before, sandbox.final_tensors())
    (sandbox.run_dir("tiny") / "status.json").write_text('{"status": "running"}')
    assert "is finished" in sandbox.train("tiny", "--resume")
    assert sandbox.status()["status"] == "finished", "as if it had not been killed when all but this was done"


def test_a_run_can_be_moved_and_go_on(sandbox: Sandbox) -> None:
    sandbox.write_run("whole", DROPOUT, {"checkpoint_interval": 4})
    sandbox.train("whole")
    expected = sandbox.final_tensors("whole")
    shutil.rmtree(sandbox.checkpoints("whole")[-1])
    moved = Sandbox(sandbox.path / "elsewhere")
    for folder in ("datasets", "runs"):
        shutil.move(sandbox.path / folder, moved.path / folder)
    moved.run_dir("whole").rename(moved.run_dir("renamed"))
    assert "Resuming after step 4" in moved.train("renamed", "--resume")
    assert_same_tensors(expected, moved.final_tensors("renamed"))


def test_resume_starts_afresh_where_there_is_nothing_and_a_plain_start_keeps_what_there_was(
    sandbox: Sandbox,
) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4})
    sandbox.train("tiny", "--resume")
    first = [path.name for path in sandbox.checkpoints()]
    out = sandbox.train()
    assert "Starting from scratch" in out
    (aside,) = sandbox.run_dir("tiny").glob("earlier-*")
    assert sorted(path.name for path in (aside / "checkpoints").glob("2*")) == sorted(first)
    assert (aside / "metrics.jsonl").exists()
    assert sandbox.metrics(key="step") == list(range(1, 9))


def test_keep_checkpoints_keeps_the_newest_and_the_best(sandbox: Sandbox) -> None:
    sandbox.write_run(train={**CLIMBING, "keep_checkpoints": 2})
    sandbox.train()
    losses = sandbox.metrics(key="val_loss")[1:]
    best = losses.index(min(losses)) + 1
    assert best < 7, "or this shows nothing"
    assert [int(path.name.split("-")[-1]) for path in sandbox.checkpoints()] == [best, 7, 8]
