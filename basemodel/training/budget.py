"""The time and cost of training, and runs that end on a budget of hours or dollars.

While such a run trains, its last step moves to where the budget will end at the speed measured so far. Each
step's learning rate is that of a run planned to end there, so the schedule still completes.
"""

import dataclasses
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from basemodel.training.run import Run, times_due
from basemodel.training.run_folder import read_status

FIRST_LOOK = 8  # steps until the measured speed is reliable enough to set the learning rate
MARGIN = 0.01  # share of the budget held in reserve


class Clock:
    """How long training has taken, how fast it is, and what it costs."""

    def __init__(self, run: Run, step: int, seconds: float) -> None:
        """Start after `step` steps and `seconds` of training."""
        self.run, self.steps = run, 0  # steps timed since the start
        self.batch_seconds: float | None = None  # per full global batch, a moving average
        self.pauses = {"validation": 0.0, "checkpoint": 0.0, "chart": 0.0}  # seconds that the last one took
        self._started = time.monotonic() - seconds
        self._saved = time.monotonic()
        paid = read_status(run.directory).get("paid_seconds") if step else None
        self._lost = max(0.0, paid - seconds) if isinstance(paid, float) else 0.0

    def count(self, step: int, seconds: float) -> float:
        """Count step number `step`, which took `seconds`; return its tokens per second."""
        self.steps += 1
        plan, weight = self.run.plan, max(0.05, 1 / self.steps)  # a plain mean at first: step 1 is slow
        batch_seconds = seconds / (plan.batches(step) - plan.batches(step - 1))
        self.batch_seconds = (1 - weight) * (self.batch_seconds or 0.0) + weight * batch_seconds
        return plan.tokens_per_batch / max(batch_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float | None:
        """Moving average over the last steps, without validation and checkpoints."""
        return self.run.plan.tokens_per_batch / self.batch_seconds if self.batch_seconds else None

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time a "validation", a "checkpoint" or a "chart", and note it in `pauses`."""
        start = time.monotonic()
        yield
        self.pauses[kind] = time.monotonic() - start
        if kind == "checkpoint":
            self._saved = time.monotonic()

    def minutes_unsaved(self) -> float:
        """Minutes since the last checkpoint, or since training started or was resumed."""
        return (time.monotonic() - self._saved) / 60

    def seconds(self) -> float:
        """Seconds of training so far, including those before the run was resumed."""
        return time.monotonic() - self._started

    def paid_seconds(self) -> float:
        """Seconds of training so far, including steps lost in a crash and repeated."""
        return self.seconds() + self._lost

    def eta(self, step: int) -> float:
        """Seconds from step `step` to the last, at the average speed."""
        plan = self.run.plan
        return (plan.batches(plan.steps) - plan.batches(step)) * (self.batch_seconds or 0.0)

    def cost(self, more_seconds: float = 0.0) -> float | None:
        """US dollars so far and for `more_seconds`; None if the config has no price."""
        price = self.run.config.usd_per_hour
        return None if price is None else price * (self.paid_seconds() + more_seconds) / 3600


class Budget:
    """Keeps a run within max_hours and max_usd by moving its last step, as the first process decides."""

    def __init__(self, run: Run, world: World) -> None:
        self.limit, self._run, self._world = run.config.max_seconds, run, world
        self._max_steps, self._begun_at, self._next_look = run.plan.steps, 0, FIRST_LOOK

    def resume(self, meta: dict[str, Any]) -> None:
        """Continue from a checkpoint with `meta`: to the same end or, if the limits changed, to a new one."""
        step, seconds, plan = meta["global_step"], meta["seconds"], self._run.plan
        self._begun_at, self._next_look = step, step + 1
        if self.limit is None or step == 0:
            return
        if _has_same_limits(self._run.config, meta):
            return self._end_after(meta["total_steps"])
        remaining = max(0.0, (1 - MARGIN) * self.limit - seconds)
        batches = plan.batches(step)
        self._end_after(plan.steps_for(batches + remaining * batches / max(seconds, 1e-9)))

    def move_end(self, step: int, clock: Clock) -> None:
        """After step `step`, move the run's last step to where the budget ends, if an update is due."""
        if self.limit is None or step < self._next_look:
            return
        steps = self._world.broadcast(self._affordable(step, clock))
        # Often at first, because the first steps are slow; later every hundredth of the run.
        self._next_look = step + max(1, min(step - self._begun_at, steps // 100))
        self._end_after(steps)

    def _affordable(self, step: int, clock: Clock) -> int:
        """The total number of steps that the budget allows."""
        run, plan = self._run, self._run.plan
        if not clock.batch_seconds:  # a GPU's first step has not been read yet
            return plan.steps
        validation, save, chart = (clock.pauses[kind] for kind in ("validation", "checkpoint", "chart"))
        remaining = (1 - MARGIN) * self.limit - clock.paid_seconds() - 2 * chart

        def seconds_to(end: int) -> float:
            validations = times_due(run.config.validation_interval, step - 1, end)
            saves = times_due(run.checkpoint_interval, step - 1, end)
            steps = (plan.batches(end) - plan.batches(step)) * clock.batch_seconds
            return steps + validations * validation + saves * save

        ends = range(step, self._max_steps + 1)
        return ends[max(0, bisect_right(ends, remaining, key=seconds_to) - 1)]

    def _end_after(self, steps: int) -> None:
        self._run.plan = dataclasses.replace(self._run.plan, steps=min(self._max_steps, steps))


def has_ended(run: Run, meta: dict[str, Any]) -> bool:
    """Whether a checkpoint ends the run: all steps are done, or its budget is spent and unchanged."""
    step = meta["global_step"]
    spent = run.config.max_seconds is not None and step == meta.get("total_steps")
    return meta["settled"] and (step >= run.plan.steps or (spent and _has_same_limits(run.config, meta)))


def _has_same_limits(config: TrainConfig, meta: dict[str, Any]) -> bool:
    before = meta["train_config"]
    return all(before.get(key) == getattr(config, key) for key in ("max_hours", "max_usd", "usd_per_hour"))
