"""What training costs in seconds and dollars, and a run that ends when its hours or dollars do.

While such a run trains, its end is moved to the step that the budget reaches at the speed so far. The
learning rate of each step is that of a run planned for this end, so the schedule still completes.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from basemodel.training.run import Run
from basemodel.training.run_folder import read_status

FIRST_LOOK = 8  # steps after which the speed is known well enough for a rate to follow from it
MARGIN = 0.01  # share of the budget that is left as a reserve


class Clock:
    """How long training has taken, how fast it is, and what that costs."""

    def __init__(self, run: Run, step: int, seconds: float) -> None:
        """Start after `step` steps and `seconds` of training."""
        self.run, self.steps = run, 0  # steps timed since the start
        self.batch_seconds: float | None = None  # of a whole global batch: a moving average
        self.pauses = {"validation": 0.0, "checkpoint": 0.0, "chart": 0.0}  # seconds of the last of each
        self._started = time.monotonic() - seconds
        paid = read_status(run.directory).get("paid_seconds") if step else None
        self._lost = max(0.0, paid - seconds) if isinstance(paid, float) else 0.0

    def count(self, step: int, seconds: float) -> float:
        """Count step number `step`, which took `seconds`; return its tokens per second."""
        self.steps += 1
        plan, weight = self.run.plan, max(0.05, 1 / self.steps)  # at first a plain mean: step 1 is slow
        batch_seconds = seconds / (plan.batches(step) - plan.batches(step - 1))
        self.batch_seconds = (1 - weight) * (self.batch_seconds or 0.0) + weight * batch_seconds
        return plan.tokens_per_batch / max(batch_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float | None:
        """Average over the last steps, without validation and checkpoints."""
        return self.run.plan.tokens_per_batch / self.batch_seconds if self.batch_seconds else None

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Time a "validation", a "checkpoint" or a "chart", for `pauses`."""
        start = time.monotonic()
        yield
        self.pauses[kind] = time.monotonic() - start

    def seconds(self) -> float:
        """Seconds of training so far, including those before the run was resumed."""
        return time.monotonic() - self._started

    def paid_seconds(self) -> float:
        """Seconds of training so far, including steps that a crash lost and that were repeated."""
        return self.seconds() + self._lost

    def eta(self, step: int) -> float:
        """Seconds from step `step` to the last, at the average speed."""
        plan = self.run.plan
        return (plan.batches(plan.steps) - plan.batches(step)) * (self.batch_seconds or 0.0)

    def cost(self, more_seconds: float = 0.0) -> float | None:
        """US dollars so far and for `more_seconds`, if the config has a price."""
        price = self.run.config.usd_per_hour
        return None if price is None else price * (self.paid_seconds() + more_seconds) / 3600


class Budget:
    """Keeps a run within max_hours and max_usd by moving its end, on all processes as the first one says."""

    def __init__(self, run: Run, world: World) -> None:
        self.limit, self._run, self._world = run.config.max_seconds, run, world
        self._most_steps, self._begun_at, self._next_look = run.plan.steps, 0, FIRST_LOOK

    def resume(self, meta: dict[str, Any]) -> None:
        """Continue from a checkpoint with `meta`: to the same end or, if the limits changed, to a new one."""
        step, seconds, plan = meta["global_step"], meta["seconds"], self._run.plan
        self._begun_at, self._next_look = step, step + 1
        if self.limit is None or step == 0:
            return
        if _has_same_limits(self._run.config, meta):
            return self._end_after(meta["total_steps"])
        left = max(0.0, (1 - MARGIN) * self.limit - seconds)
        batches = plan.batches(step)
        self._end_after(plan.steps_for(batches + left * batches / max(seconds, 1e-9)))

    def look(self, step: int, clock: Clock) -> None:
        """After step `step`, move the run's end to where the budget ends, if it is time to look."""
        if self.limit is None or step < self._next_look:
            return
        steps = self._world.broadcast(self._affordable(step, clock))
        # Often at first, because the first steps are slow; then after each hundredth of the run.
        self._next_look = step + max(1, min(step - self._begun_at, steps // 100))
        self._end_after(steps)

    def _affordable(self, step: int, clock: Clock) -> int:
        """How many steps the budget allows in all."""
        run, plan = self._run, self._run.plan
        if not clock.batch_seconds:  # a GPU's first step has not been read yet
            return plan.steps
        validation, save, chart = (clock.pauses[kind] for kind in ("validation", "checkpoint", "chart"))
        intervals = (validation, run.config.validation_interval), (save, run.checkpoint_interval)
        pauses = sum(seconds / interval for seconds, interval in intervals if interval)
        left = (1 - MARGIN) * self.limit - clock.paid_seconds() - validation - save - 2 * chart
        return plan.steps_for(plan.batches(step) + max(0.0, left) / (clock.batch_seconds + pauses))

    def _end_after(self, steps: int) -> None:
        self._run.plan = dataclasses.replace(self._run.plan, steps=min(self._most_steps, steps))


def has_ended(run: Run, meta: dict[str, Any]) -> bool:
    """Whether nothing is left to do after the checkpoint with `meta`: all steps are done, or the budget is
    spent and has not changed."""
    step = meta["global_step"]
    spent = run.config.max_seconds is not None and step == meta.get("total_steps")
    return meta["settled"] and (step >= run.plan.steps or (spent and _has_same_limits(run.config, meta)))


def _has_same_limits(config: TrainConfig, meta: dict[str, Any]) -> bool:
    before = meta["train_config"]
    return all(before.get(key) == getattr(config, key) for key in ("max_hours", "max_usd", "usd_per_hour"))
