"""Keys of train.json that interact, drawn at random, against a plain account of what a run must do.

Each example is a whole run in this process, with real data, checkpoints and logs. Only the learner's numbers
are made up: its losses follow from the tokens it is given, so a run that reads others has other losses.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MODEL, Sandbox, write_dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from properties import EXAMPLES
from torch import Tensor

import checkpointing
import ddp_train
from basemodel.common.errors import InputError
from basemodel.data.sequences import Sequences
from basemodel.model import memory
from basemodel.model.config import GPTConfig
from basemodel.planning.estimate import estimate
from basemodel.planning.machines import Machine, find_machines, read_gpus
from basemodel.planning.plan import checkpoints_in_words, files_in_words
from basemodel.results import reporting, run_chart
from basemodel.training import budget, pending, run_folder
from basemodel.training.config import TrainConfig
from basemodel.training.resume import check_space
from basemodel.training.run import Run
from basemodel.training.schedule import plan_batches
from basemodel.training.stopping import StopSignal

LENGTH = 4
SHAPE = {"vocab_size": 1024, "tokenizer": "bytes", "context_length": LENGTH, "emb_dim": 4}
SHAPE = {**MODEL, **SHAPE, "n_layers": 1, "n_heads": 1}
FEWER = settings(EXAMPLES, max_examples=20)


def draw_from(key: Any) -> float:
    """A number from 1 to 2 that follows from `key` and looks like chance."""
    return 1 + int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6]) / 2**48


# ------------------------------------------------------------------------------------------------------------
# What a run must do
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Account:
    """What a run must do, worked out step by step from its train.json and the number of tokens it has."""

    train: dict[str, Any]
    tokens: int
    batches: list[list[list[int]]] = field(default_factory=list)  # of each step, its sequences
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        train, size = self.train, global_batch(self.train)
        starts = list(range(train["start_train_token"], self.tokens - LENGTH, LENGTH))
        order = list(starts)
        for epoch in range(1, train["epochs"]):
            shuffled = np.random.default_rng((train["random_seed"], epoch)).permutation(len(starts))
            order += [starts[place] for place in shuffled]
        whole = len(order) // size
        if train["min_train_tokens"] != -1:
            whole = math.ceil(train["min_train_tokens"] / (size * LENGTH))
        halved, short = (
            round(whole * train[key] / 100) for key in ("half_batch_percent", "short_sequence_percent")
        )
        for number in range(whole):
            batch = order[number * size : (number + 1) * size]
            parts = [batch[: size // 2], batch[size // 2 :]] if number < halved else [batch]
            for place, part in enumerate(parts):
                sequences = [list(range(start, start + LENGTH + 1)) for start in part]
                if number < short:
                    sequences = [[one[i], one[i + 1]] for one in sequences for i in range(LENGTH)]
                self.batches.append(sequences)
                self.rates.append(self.rate(number + place / 2, whole))

    def rate(self, batch: float, batches: int) -> float:
        """The learning rate once `batch` whole batches have been read."""
        train, peak = self.train, self.train["learning_rate"]
        warmup = round(batches * train["warmup_period_percent"] / 100)
        if train["lr_schedule"] != "constant" and batch < warmup:
            return peak * (batch + 1) / warmup
        if train["lr_schedule"] == "wsd":
            return peak * min(
                1, (batches - batch) / (round(batches * train["decay_period_percent"] / 100) + 1)
            )
        if train["lr_schedule"] == "cosine":
            turned = min(1, (batch - warmup) / max(1, batches - 1 - warmup))
            return peak * (0.55 + 0.45 * math.cos(math.pi * turned))
        return peak

    @property
    def steps(self) -> int:
        return len(self.batches)

    def due(self, key: str, *, first: bool = False, last: bool = False) -> list[int]:
        """The steps behind which the interval `key` has something done; 0 is before the first."""
        if (interval := self.train[key]) is None:
            return []
        steps = {step for step in range(1, self.steps + 1) if step % interval == 0}
        return sorted(steps | ({0} if first else set()) | ({self.steps} if last else set()))

    @property
    def validations(self) -> list[int]:
        return self.due("validation_interval", first=True, last=True)

    @property
    def saves(self) -> list[int]:
        key = "checkpoint_interval" if self.train["checkpoint_interval"] else "validation_interval"
        return self.due(key, last=True) or [self.steps]

    def loss(self, step: int) -> float:
        return loss_of(self.batches[step - 1])

    @property
    def means(self) -> dict[int, float]:
        """The mean loss of the steps up to each checkpoint since the one before."""
        return {
            step: sum(map(self.loss, range(before + 1, step + 1))) / (step - before)
            for before, step in itertools.pairwise([0, *self.saves])
        }

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint: by validation if there is any, else by the mean since the last."""
        measured = self.means
        if self.validations:
            measured = {step: val_loss(step) for step in self.saves if step in self.validations}
        return min(measured, key=measured.get, default=None)

    def kept(self, stopped: int | None = None) -> list[int]:
        """The steps whose checkpoints are there at the end, with one that was saved when `stopped`."""
        saved = [(step, "due") for step in self.saves] + [(stopped, "asked for")] * (stopped is not None)
        saved.sort()  # what was asked for comes before what is due after the same step
        keep = self.train["keep_checkpoints"] or len(saved)
        return sorted(step for step, _ in {*saved[-keep:], *((step, "due") for step in [self.best] if step)})


def global_batch(train: dict[str, Any]) -> int:
    if "gradient_accumulation_steps" in train:
        return train["microbatch_size"] * train["gradient_accumulation_steps"]
    return train["global_batch_size"]


def loss_of(sequences: list[list[int]]) -> float:
    return float(np.float32(draw_from(sequences)))


def val_loss(step: int) -> float:
    return draw_from(("validation", step))


# ------------------------------------------------------------------------------------------------------------
# What it does
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A learner that computes nothing: what it was given, and after which step the run is told to stop."""

    done_before: int = 0  # steps
    stop_after: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # that a "step" and a "validation" take
    now: float = 1000.0
    batches: list[list[list[int]]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.done_before + len(self.batches)

    def go_on(self, kind: str) -> None:
        self.now += self.seconds.get(kind, 0.0)

    def learner(self) -> type:
        watched = self

        class Scripted(ddp_train.Learner):
            def train_step(self, microbatches: list[Tensor], rate: float, *, stop: bool = False) -> Tensor:
                (shape,) = {tuple(microbatch.shape) for microbatch in microbatches}
                assert shape[0] <= self.config.microbatch_size * (LENGTH if shape[1] == 2 else 1)
                watched.batches.append(torch.cat(microbatches).tolist())
                watched.rates.append(rate)
                watched.go_on("step")
                return torch.tensor([loss_of(watched.batches[-1]), 1.0, 1.0, float(stop)])

            def validate(self, sequences: Sequences, stop: object) -> float:
                assert sequences.start == self.config.start_val_token
                watched.go_on("validation")
                return val_loss(watched.step)

        return Scripted


class Runs:
    """Trains in this process, over and over."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.count = folder, patch, 0
        patch.setattr(run_folder, "lock_run", lambda *_: True)  # a process holds it to its end
        patch.setattr(run_chart, "draw_chart", lambda *_: None)
        patch.setattr(reporting, "continue_prompts", self.sample)
        patch.setattr(os, "fsync", lambda _: None)

    @staticmethod
    def sample(run: Run, _model: object, step: int) -> list[dict[str, Any]]:
        return [{"step": step, "tokens": run.plan.tokens(step), "prompt": "a", "text": str(step)}]

    def sandbox(self, tokens: int, train: dict[str, Any]) -> Sandbox:
        self.count += 1
        sandbox = Sandbox(self.folder / str(self.count))
        counted = np.arange(tokens, dtype=np.uint16)
        write_dataset(sandbox.datasets / "test/tokens", counted, np.arange(64, dtype=np.uint16))
        sandbox.write_run("tiny", SHAPE, {"global_batch_size": ..., **train})
        return sandbox

    def train(self, sandbox: Sandbox, watched: Watched, *options: str) -> tuple[int, str]:
        """The exit status, and what was printed."""
        said = io.StringIO()
        with self.patch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr(ddp_train, "Learner", watched.learner())
            patch.setattr(StopSignal, "__bool__", lambda _: watched.step + 1 == watched.stop_after)
            for module in (budget, pending, reporting):
                clock = SimpleNamespace(
                    monotonic=lambda: watched.now if watched.seconds else time.monotonic()
                )
                patch.setattr(module, "time", clock)
            words = sandbox.command("tiny", *options)
            status = ddp_train.main.main(words[words.index("tiny") :], standalone_mode=False)
        return status, said.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        yield Runs(tmp_path_factory.mktemp("runs"), patch)


INTERVALS = (1, 2, 3, 4, 6, 7, 50, None)
# Of draws by Hypothesis itself, most repeat the one before but for a key.
RANDOMS = st.randoms(use_true_random=True)


@st.composite
def trainings(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """The number of tokens, and a train.json that they are enough for, of at most some 20 steps."""
    rng = draw(RANDOMS)
    microbatch, accumulation = (rng.choice(range(1, 5)) for _ in range(2))
    size, batches = microbatch * accumulation, rng.choice(range(1, 13))
    epochs = rng.choice(range(1, 4))
    by_size, validates = rng.choices([True, False], k=2)
    start = rng.randint(0, 2 * LENGTH)
    # As many as are needed, up to three sequences more, and a part of one.
    per_epoch = math.ceil(size * batches / epochs) + rng.randint(0, 3)
    tokens = start + per_epoch * LENGTH + 1 + rng.randint(0, LENGTH - 1)
    schedule = rng.choice(["constant", "cosine", "wsd"])
    warmup = 0 if schedule == "constant" else rng.randint(0, 60)
    least = (batches - 1) * size * LENGTH + rng.randint(1, size * LENGTH)
    return tokens, {
        "microbatch_size": microbatch,
        **({"global_batch_size": size} if by_size else {"gradient_accumulation_steps": accumulation}),
        "epochs": epochs,
        "start_train_token": start,
        "start_val_token": rng.randint(0, 3),
        "min_train_tokens": rng.choice([-1, least]),
        "half_batch_percent": rng.choice([0, 25, 50, 100]) if size % 2 == 0 else 0,
        "short_sequence_percent": rng.choice([0, 30, 100]),
        "lr_schedule": schedule,
        "learning_rate": 0.5,
        "warmup_period_percent": warmup,
        "decay_period_percent": rng.randint(0, 100 - warmup) if schedule == "wsd" else 60,
        "random_seed": rng.randint(0, 5),
        "validation_batches": 1,
        "validation_interval": rng.choice(INTERVALS) if validates else None,
        "checkpoint_interval": rng.choice(INTERVALS),
        "sample_interval": rng.choice(INTERVALS),
        "keep_checkpoints": rng.choice([1, 2, 3, None]),
    }


def assert_as_accounted(sandbox: Sandbox, account: Account, stopped: int | None = None) -> None:
    """What a finished run has left is what the account says."""
    lines = [json.loads(line) for line in (sandbox.run_dir() / "metrics.jsonl").read_text().splitlines()]
    steps, numbers = [line for line in lines if "train_loss" in line], range(1, account.steps + 1)
    assert [line["step"] for line in steps] == list(numbers)
    assert [line["train_loss"] for line in steps] == [account.loss(step) for step in numbers]
    assert [line["learning_rate"] for line in steps] == pytest.approx(account.rates)
    seen = np.cumsum([len(batch) * (len(batch[0]) - 1) for batch in account.batches]).tolist()
    assert [line["tokens"] for line in steps] == seen
    validations = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    assert validations == [(step, val_loss(step)) for step in account.validations]

    metas = [sandbox.meta(index=i) for i in range(len(sandbox.checkpoints()))]
    assert [meta["global_step"] for meta in metas] == account.kept(stopped)
    for meta in metas:
        if meta["settled"] and meta["global_step"] != stopped:
            assert meta["train_loss"] == pytest.approx(account.means[meta["global_step"]])
    links = {name: sandbox.run_dir() / "checkpoints" / name for name in ("latest", "best")}
    pointed = {name: link.resolve(strict=True) for name, link in links.items() if link.is_symlink()}
    steps_of = {name: int(path.name.split("-")[-1]) for name, path in pointed.items()}
    assert steps_of == {"latest": account.steps, **({"best": account.best} if account.best else {})}
    if account.best:
        assert json.loads((pointed["best"] / "meta.json").read_text())["is_best"]

    samples = sandbox.run_dir() / "samples.jsonl"
    said = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    expected = account.due("sample_interval")
    assert [(one["step"], one["tokens"]) for one in said] == [(step, seen[step - 1]) for step in expected]
    assert sandbox.status()["status"] == "finished" and sandbox.status()["total_steps"] == account.steps


@EXAMPLES
@given(drawn=trainings(), rng=RANDOMS)
def test_a_run_reads_learns_validates_saves_and_samples_as_accounted(
    runs: Runs, drawn: tuple[int, dict[str, Any]], rng: Random
) -> None:
    """Undisturbed; or stopped by a signal, or killed and back at an earlier checkpoint, and then resumed."""
    tokens, train = drawn
    account = Account(train, tokens)
    assume(account.steps)
    stop = rng.choice([None, rng.randint(1, account.steps)])
    sandbox, watched = runs.sandbox(tokens, train), Watched(stop_after=stop)
    status, said = runs.train(sandbox, watched)
    assert status == (0 if stop is None else 128 + signal.SIGTERM)
    assert watched.batches == account.batches[:stop]
    assert watched.rates == pytest.approx(account.rates[:stop])
    saves = min(len(account.saves), (train["keep_checkpoints"] or len(account.saves)) + 1)
    planned = re.search(r"^Steps: +(\d+), ([\d,]+) tokens$", said, re.M)
    total = sum(len(batch) * (len(batch[0]) - 1) for batch in account.batches)
    assert (int(planned[1]), int(planned[2].replace(",", ""))) == (account.steps, total)
    assert re.search(rf"^Disk: +{saves} checkpoints, ", said, re.M)

    if stop is None:
        assert_as_accounted(sandbox, account)
        lost = rng.randint(1, len(account.kept()))
        for path in sandbox.checkpoints()[len(account.kept()) - lost :]:
            shutil.rmtree(path)
    left = [sandbox.meta(index=i)["global_step"] for i in range(len(sandbox.checkpoints()))]
    watched = Watched(done_before=left[-1] if left else 0)
    assert runs.train(sandbox, watched, "--resume")[0] == 0
    assert watched.batches == account.batches[watched.done_before :]
    assert_as_accounted(sandbox, account, stop)


# ------------------------------------------------------------------------------------------------------------
# Plans, budgets and the largest microbatch
# ------------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(drawn=trainings(), machine=st.sampled_from(find_machines("all", read_gpus())))
def test_a_plan_for_a_machine_counts_what_the_run_will_do(
    runs: Runs, drawn: tuple[int, dict[str, Any]], machine: Machine
) -> None:
    tokens, train = drawn
    size, processes = global_batch(train), machine.count
    assume("global_batch_size" in train and size % processes == 0)
    train |= {"validation_batches": 5 * processes - 1, "precision": "fp16"}
    train |= {"half_batch_percent": 0} if size // processes % 2 else {}
    assume((account := Account(train, tokens)).steps)
    run = Run.read(runs.sandbox(tokens, train).path / "runs", "tiny")
    result = estimate(run, machine, len(range(train["start_train_token"], tokens - LENGTH, LENGTH)))
    assert result.run.plan.steps == account.steps

    def seconds_between(**changes: Any) -> float:
        config = replace(run.config, **changes)
        return estimate(replace(run, config=config), machine, None).between_steps

    # Of a run that is validated first and last and saved at the end, with microbatches of one size all along.
    validated = {"validation_interval": 50, "checkpoint_interval": 50, "min_train_tokens": 1}
    save = run.checkpoint_bytes / 10e9
    short = {"half_batch_percent": 0, **validated}
    validation = (seconds_between(**short) - save) / 2
    one = {**short, "validation_batches": 1, "microbatch_size": result.run.plan.microbatch_size}
    turns = math.ceil(
        train["validation_batches"] * train["microbatch_size"] / one["microbatch_size"] / processes
    )
    assert validation == pytest.approx(turns * (seconds_between(**one) - save) / 2)
    expected = len(account.validations) * validation + len(account.saves) * save
    assert result.between_steps == pytest.approx(expected)
    seen = sum(len(batch) * (len(batch[0]) - 1) for batch in account.batches)
    assert result.hours == pytest.approx((seen / result.tokens_per_second + expected) / 3600)


@EXAMPLES
@given(drawn=trainings(), sizes=st.tuples(*[st.integers(10**6, 10**11)] * 2), is_here=st.booleans())
def test_a_plan_says_what_is_stored_and_downloaded(
    drawn: tuple[int, dict[str, Any]], sizes: tuple[int, int], is_here: bool
) -> None:
    """GPT-2 small on other numbers of tokens. A checkpoint holds each weight and two moments, all float32."""
    tokens, train = drawn
    assume((account := Account(train, tokens)).steps)
    config = TrainConfig(**{"dataset": "a/b", **train})
    run = Run(Path("x"), config, GPTConfig(50257, 1024, 768, 12, 12, drop_rate=0, qkv_bias=False))
    count = len(range(train["start_train_token"], tokens - LENGTH, LENGTH))
    run.plan = replace(plan_batches(config, LENGTH, 1, count), length=LENGTH * 10**6)
    parts = [SimpleNamespace(tokens=SimpleNamespace(count=size)) for size in sizes]
    if is_here:
        run.data = SimpleNamespace(train=parts[0], validation=parts[1] if account.validations else None)
    words = files_in_words(run)
    kept = min(len(account.saves), (train["keep_checkpoints"] or len(account.saves)) + 1)
    assert words["Disk"] == f"{kept} checkpoints, {kept * 163_009_536 * 12 / 1e9:.2f} GB on the machine"
    size = 2 * (sum(sizes) if account.validations else sizes[0])
    if not is_here:
        seen = sum(len(batch) * (len(batch[0]) - 1) for batch in account.batches)
        size = 2 * seen * 10**6 / train["epochs"]
    minutes = f"{size / 1e9:.1f} GB, {size * 8 / 1e9 / 60:.1f} minutes at 1 Gbit/s"
    assert words["Download"] == ("" if is_here else "at least ") + minutes


@FEWER
@given(rng=RANDOMS)
def test_both_limits_of_a_budget_end_a_run_in_time_with_its_schedule_at_its_end(
    runs: Runs, rng: Random
) -> None:
    """Steps of one length, by a clock that only steps and validations move; sometimes more than there are."""
    step, steps = rng.randint(2, 50), rng.randint(30, 80)  # seconds of one, and how many there are
    validation, interval, price = rng.randint(0, 2 * step), rng.randint(5, 20), rng.randint(1, 40)
    limits = [rng.choice([None, rng.randint(25, 100)]) for _ in ("hours", "usd")]
    seconds = [None if limit is None else limit * step for limit in limits]
    train = {
        "microbatch_size": 1,
        "min_train_tokens": steps * LENGTH,
        "epochs": 2,
        "lr_schedule": "wsd",
        "learning_rate": 0.5,
        "validation_interval": interval,
        "validation_batches": 1,
        "usd_per_hour": price,
        "max_hours": seconds[0] and seconds[0] / 3600,
        "max_usd": seconds[1] and seconds[1] / 3600 * price,
    }
    sandbox, watched = runs.sandbox(200, train), Watched(seconds={"step": step, "validation": validation})
    assert runs.train(sandbox, watched)[0] == 0
    limit = min([one for one in seconds if one is not None], default=math.inf)
    took = sandbox.status()["paid_seconds"]
    assert took <= limit
    assert sandbox.status()["cost_usd"] == pytest.approx(took / 3600 * price)
    done = len(watched.batches)
    assert done == steps or took > 0.98 * limit - validation - step * (1 + validation / step / interval)
    expected = 0.5 / (round(0.6 * done) + 1)
    assert watched.rates[-1] == pytest.approx(expected), "the last of the fall"
    assert max(watched.rates) == 0.5
    again = Watched(done_before=done, seconds=watched.seconds)
    assert "is finished" in runs.train(sandbox, again, "--resume")[1] and not again.batches
    # Twice as much, when the first half is spent.
    train |= {key: train[key] and 2 * train[key] for key in ("max_hours", "max_usd")}
    sandbox.write_run("tiny", SHAPE, {"global_batch_size": ..., **train})
    if done < steps:
        assert runs.train(sandbox, again, "--resume")[0] == 0
        took = sandbox.status()["paid_seconds"]
        assert took <= 2 * limit and (again.step == steps or took > 2 * (0.98 * limit - validation - step))


@FEWER
@given(rng=RANDOMS)
def test_checkpoint_minutes_save_after_the_first_step_that_ends_late_enough(runs: Runs, rng: Random) -> None:
    """By a clock that only steps and validations move."""
    step, validation, minutes, interval = (rng.randint(1, most) for most in (90, 200, 8, 12))
    train = {
        "microbatch_size": 1,
        "min_train_tokens": 30 * LENGTH,
        "validation_interval": interval,
        "validation_batches": 1,
        "checkpoint_minutes": minutes / 2,
    }
    expected, since = [], validation
    for number in range(1, 31):
        since += step
        late, validates = since >= 30 * minutes, number % interval == 0 or number == 30
        since += validation if validates else 0
        if late or validates:
            expected.append(number)
            since = 0
    sandbox, watched = runs.sandbox(200, train), Watched(seconds={"step": step, "validation": validation})
    assert runs.train(sandbox, watched)[0] == 0
    assert [sandbox.meta(index=i)["global_step"] for i in range(len(sandbox.checkpoints()))] == expected


def test_checkpoints_by_the_clock_need_room_for_as_many_as_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = GPTConfig(**{**SHAPE, "drop_rate": 0.0})
    for minutes, said in ((None, "1 checkpoints, "), (5, "3 checkpoints, ")):
        config = TrainConfig("a/b", 1, 1, keep_checkpoints=2, checkpoint_minutes=minutes)
        run = Run(tmp_path, config, shape, plan_batches(config, LENGTH, 1, 10))
        assert checkpoints_in_words(run).startswith(said)
        monkeypatch.setattr(checkpointing, "free_space", lambda _, run=run: 3.5 * run.checkpoint_bytes)
        with pytest.raises(InputError, match="4 checkpoints take") if minutes else contextlib.nullcontext():
            check_space(run, 0)
    run = replace(run, config=replace(config, keep_checkpoints=None))
    assert checkpoints_in_words(run).endswith(", and one every 5 minutes")


@FEWER
@given(drawn=trainings(), room=st.integers(3, 60), gradients=st.integers(0, 2))
def test_the_search_counts_what_accumulation_takes_however_it_is_asked_for(
    runs: Runs, drawn: tuple[int, dict[str, Any]], room: int, gradients: int
) -> None:
    """In a memory with room for so many sequences, and beside gradients, which a second microbatch finds
    there, for fewer. Whether the global batch accumulates depends on what is found; it might."""
    tokens, train = drawn

    class Hungry(ddp_train.Learner):
        def train_step(self, microbatches: list[Tensor], learning_rate: float, **_: object) -> Tensor:
            if len(microbatches[0]) + (gradients if len(microbatches) > 1 else 0) > room:
                raise torch.OutOfMemoryError
            return torch.zeros(4)

        def validation_loss(self, sequences: Tensor) -> Tensor:
            return torch.zeros(())

    sandbox = runs.sandbox(tokens, train)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said := io.StringIO()):
        patch.setattr(ddp_train, "Learner", Hungry)
        for slow_or_lasting in ("limit_host_memory", "release_memory"):
            patch.setattr(memory, slow_or_lasting, lambda _: None)
        words = sandbox.command("tiny", "-f")
        ddp_train.main.main(words[words.index("tiny") :], standalone_mode=False)
    accumulates = "global_batch_size" in train or train["gradient_accumulation_steps"] > 1
    largest = room - gradients if accumulates else room
    assert said.getvalue().splitlines()[-1] == f"Max microbatch size was {largest}"
