"""report_to: the values of metrics.jsonl in the real TensorBoard, W&B and Trackio."""

import json
import sqlite3
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import NO_CHART, Sandbox, assert_same_tensors, make_sandbox, refused, step_reached, wait_for
from wandb_server import wandb_server

from basemodel.results.trackers import TRACKERS, Trackers, run_id
from basemodel.training.run import Run
from basemodel.training.run_folder import set_earlier_results_aside

ALL = ["tensorboard", "wandb", "trackio"]
Values = dict[int, dict[str, float]]  # by step and name


def metrics_of(run_dir: Path) -> Values:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        line.pop("step"): {key: value for key, value in line.items() if value is not None} for line in lines
    }


def in_tensorboard(run_dir: Path) -> Values:
    """What TensorBoard shows. It keeps values as float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    values: Values = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in values.setdefault(event.step, {}), f"{name} of step {event.step} twice"
            values[event.step][name] = event.value
    return values


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, which are framed as in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, payload = path.read_bytes(), 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(payload)
            payload = b""


def in_wandb(run_dir: Path) -> Values:
    """What the last offline folder holds."""
    (path,) = run_dir.glob("wandb/latest-run/*.wandb")
    values: Values = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            assert record.history.step.num not in values
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            values[record.history.step.num] = {k: v for k, v in items.items() if k[0] != "_"}
    return values


def in_trackio(folder: Path) -> tuple[set[str], Values]:
    """The names of the runs in Trackio's database, and their values."""
    values: Values = {}
    with sqlite3.connect(folder / "ddp-base-model.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    for _, step, metrics in rows:
        assert step not in values, f"step {step} twice"
        values[step] = json.loads(metrics)
    return {name for name, _, _ in rows}, values


def without_times(values: dict[str, float]) -> dict[str, float]:
    timed = {"seconds", "tokens_per_second", "checkpoint_seconds", "validation_seconds"}
    return {name: value for name, value in values.items() if name not in timed}


def test_each_step_arrives_once_though_the_run_is_killed(tmp_path: Path) -> None:
    """In all three at once; training is the same to the bit. What a killed run has sent keeps its times."""
    sandbox = make_sandbox(tmp_path, "tiny", report_to=ALL)
    sandbox.env |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    with wandb_server() as server:
        sandbox.env |= server.env
        script = sandbox.start("tiny", "--resume")
        wait_for(step_reached(sandbox, "tiny", 13), "step 13")
        script.kill()
        assert "Warning" not in sandbox.train("tiny", "--resume")
    expected = metrics_of(sandbox.run_dir())
    assert list(expected) == list(range(31)) and expected[30].keys() >= {"train_loss", "val_loss"}

    shown = in_tensorboard(sandbox.run_dir())
    names, stored = in_trackio(tmp_path / "trackio")
    identity = run_id(sandbox.run_dir())
    assert names == {f"tiny-{identity}"} and list(server.history) == [identity]
    uploaded = {line["_step"]: line for line in map(json.loads, server.history[identity])}
    assert len(uploaded) == len(server.history[identity]), "each step once"
    for values in uploaded.values():
        for name in [name for name in values if name[0] == "_"]:
            del values[name]
    assert shown.keys() == stored.keys() == uploaded.keys() == expected.keys()
    for step, values in expected.items():
        assert shown[step] == pytest.approx(values, rel=1e-6), step
        for found in (stored[step], uploaded[step]):
            assert found.keys() == values.keys() and without_times(found) == without_times(values), step

    alone = make_sandbox(tmp_path / "alone", "tiny")
    alone.train()
    assert_same_tensors(sandbox.final_tensors(), alone.final_tensors())


FAILING = f"""{NO_CHART}
from torch.utils.tensorboard import SummaryWriter
add_scalar = SummaryWriter.add_scalar
def add(self, name, value, step):
    if step >= 3:
        raise OSError("no room")
    add_scalar(self, name, value, step)
SummaryWriter.add_scalar = add
"""


class Recorder:
    """A tracker that keeps its values between starts, as a server would."""

    kept: list[tuple[int, dict[str, float]]]

    def __init__(self, run: Run, step: int) -> None:
        self.last = self.kept[-1][0] if self.kept else -1

    def log(self, step: int, values: dict[str, float]) -> None:
        self.kept.append((step, dict(values)))

    def close(self, *, failed: bool) -> None:
        pass


@pytest.fixture
def tracked(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Run:
    sandbox.write_run(train={"report_to": ["tensorboard", "trackio"]})
    Recorder.kept = []
    monkeypatch.setitem(TRACKERS, "trackio", Recorder)
    run = Run.read(sandbox.path / "runs", "tiny")
    run.metrics.touch()
    return run


def log(run: Run, trackers: Trackers, step: int, **values: float) -> None:
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")
    trackers.log({"step": step, **values})


def test_a_run_stopped_before_a_validation_adds_it_to_the_same_step(tracked: Run) -> None:
    """Stopped after step 2, whose validation was still to come; then killed, and gone on from there again."""
    trackers = Trackers(tracked, 0, print)
    for step in (1, 2):
        log(tracked, trackers, step, train_loss=step)
    trackers.close("preempted")
    assert [step for step, _ in Recorder.kept] == [1]
    for _ in range(2):
        lines = [json.loads(line) for line in tracked.metrics.read_text().splitlines()]
        tracked.metrics.write_text("".join(json.dumps(x) + "\n" for x in lines if x["step"] <= 2))
        trackers = Trackers(tracked, 2, print)
        log(tracked, trackers, 2, val_loss=0.5)
        for step in (3, 4):
            log(tracked, trackers, step, train_loss=step)
    trackers.close("finished")
    expected = {1: {"train_loss": 1}, 2: {"train_loss": 2, "val_loss": 0.5}}
    expected |= {3: {"train_loss": 3}, 4: {"train_loss": 4}}
    assert Recorder.kept == list(expected.items())
    assert in_tensorboard(tracked.directory) == expected


def test_without_credentials_the_last_offline_folder_has_all_of_the_run(
    tracked: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ERROR_REPORTING": "false", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("HOME", str(tracked.directory))
    run, said = replace(tracked, config=replace(tracked.config, report_to=("wandb",))), []
    trackers = Trackers(run, 0, said.append)
    for step in (1, 2):
        log(run, trackers, step, train_loss=step)
    trackers.close("preempted")
    trackers = Trackers(run, 2, said.append)
    log(run, trackers, 2, val_loss=0.5)
    log(run, trackers, 3, train_loss=3)
    trackers.close("finished")
    expected = {1: {"train_loss": 1}, 2: {"train_loss": 2, "val_loss": 0.5}, 3: {"train_loss": 3}}
    assert said == []
    assert in_wandb(run.directory) == expected


def test_a_failure_is_one_warning_and_made_good_by_the_next_start(tracked: Run) -> None:
    said: list[str] = []
    trackers = Trackers(tracked, 0, said.append)
    log(tracked, trackers, 1, train_loss=1.0)
    trackers._trackers["trackio"].log = None  # its server has gone
    for step in (2, 3, 4):
        log(tracked, trackers, step, train_loss=float(step), skipped=None)
    trackers.close("failed")
    assert len(said) == 1 and said[0].startswith("Warning: trackio gets no more values (TypeError: ")
    assert Recorder.kept == [] and list(in_tensorboard(tracked.directory)) == [1, 2, 3, 4]
    Trackers(tracked, 4, said.append).close("finished")
    assert [step for step, _ in Recorder.kept] == [1, 2, 3, 4] and len(said) == 1


def test_a_tracker_that_does_not_end_is_left(tracked: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basemodel.results.trackers.CLOSE_SECONDS", 0.1)
    said, never = [], threading.Event()
    trackers = Trackers(tracked, 0, said.append)
    trackers._trackers["trackio"].close = lambda **_: never.wait(30)
    trackers.close("finished")
    never.set()
    assert len(said) == 1 and "trackio" in said[0] and "TimeoutError" in said[0]


def test_a_fresh_start_is_another_run_there(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    (tmp_path / "tensorboard/events").mkdir(parents=True)
    aside = set_earlier_results_aside(tmp_path)
    assert run_id(tmp_path) != first and run_id(aside) == first and (aside / "tensorboard").is_dir()


def test_training_goes_on_without_a_tracker_that_fails(sandbox: Sandbox) -> None:
    """As on a full disk, from step 3 on."""
    sandbox.write_run(train={"report_to": ["tensorboard"]})
    out = sandbox.train(before=FAILING)
    assert (
        out.count("Warning: tensorboard gets no more values (OSError: no room); metrics.jsonl still does")
        == 1
    )
    assert sandbox.status()["status"] == "finished" and len(sandbox.metrics()) == 8
    assert list(in_tensorboard(sandbox.run_dir())) == [1, 2]


@pytest.mark.parametrize("name", ALL)
def test_a_package_that_is_missing_is_said_before_anything_else(sandbox: Sandbox, name: str) -> None:
    sandbox.write_run(train={"dataset": "not/here", "report_to": [name]})
    sandbox.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    before = f"import sys; sys.modules[{name!r}] = None"
    error = refused(*sandbox.command("tiny"), before=before, env=sandbox.env)
    assert error.startswith(f"report_to: {name} is not installed; pip install -e '.[log]'")
