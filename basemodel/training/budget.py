"""A run that ends when its hours or dollars do, with its learning rate at the end of the schedule.

While it trains, the run's end is moved to where it comes in time by the speed so far. The rate of each step
is that of a run that was planned for as many steps.
"""

import dataclasses
from typing import Any, Protocol

from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from basemodel.training.run import Run

FIRST_LOOK = 8  # steps after which the speed is known well enough for a rate to follow from it
MARGIN = 0.01  # share of the budget that is left as a reserve


class Clock(Protocol):
    """What the budget asks of the Reporter."""

    batch_seconds: float | None

    def paid_seconds(self) -> float:
        """Seconds of training so far, with those of steps that were lost and repeated."""

    def pause_seconds(self, interval: str) -> float:
        """Seconds of the last validation or checkpoint."""

    def follow(self, run: Run) -> None:
        """Report on a run whose end has moved."""


class Budget:
    """Keeps a run within max_hours and max_usd. All processes move the end alike, as the first one says."""

    def __init__(self, run: Run, world: World) -> None:
        self.limit, self._world, self._most_steps = run.config.max_seconds, world, run.plan.steps
        self._begun_at, self._next_look = 0, FIRST_LOOK

    def resumed(self, run: Run, meta: dict[str, Any]) -> Run:
        """The run as it goes on from a checkpoint with `meta`: to the same end, or that of a new budget."""
        step, seconds = meta["global_step"], meta["seconds"]
        self._begun_at, self._next_look = step, step + 1
        if self.limit is None or step == 0:
            return run
        if not _has_other_limits(run.config, meta):
            return _ending_after(run, meta["total_steps"])
        left = max(0.0, (1 - MARGIN) * self.limit - seconds)
        batches = run.plan.batches(step)
        steps = run.plan.steps_for(batches + left * batches / max(seconds, 1e-9))
        return _ending_after(run, min(self._most_steps, steps))

    def kept(self, run: Run, step: int, clock: Clock) -> Run:
        """The run after `step`, with its end moved to where the budget ends, if it is time to look."""
        if self.limit is None or step < self._next_look:
            return run
        steps = self._world.broadcast(self._affordable(run, step, clock))
        # Often at first, because the first steps are slow; then after each hundredth of the run.
        self._next_look = step + max(1, min(step - self._begun_at, steps // 100))
        if steps != run.plan.steps:
            run = _ending_after(run, steps)
            clock.follow(run)
        return run

    def _affordable(self, run: Run, step: int, clock: Clock) -> int:
        """How many steps the run can have."""
        if not clock.batch_seconds:  # not the first process, whose word counts
            return run.plan.steps
        validation, save, chart = map(clock.pause_seconds, ("validation", "checkpoint", "chart"))
        pauses = 0.0
        for seconds, interval in (
            (validation, run.config.validation_interval),
            (save, run.checkpoint_interval),
        ):
            pauses += seconds / interval if interval else 0.0
        left = (1 - MARGIN) * self.limit - clock.paid_seconds() - validation - save - 2 * chart
        batches = run.plan.batches(step) + max(0.0, left) / (clock.batch_seconds + pauses)
        return min(self._most_steps, run.plan.steps_for(batches))


def has_ended(run: Run, meta: dict[str, Any]) -> bool:
    """Whether nothing is left to do after the checkpoint with `meta`: all steps are done, or the budget is
    spent and is still the same."""
    step, limit = meta["global_step"], run.config.max_seconds
    spent = limit is not None and step == meta.get("total_steps") and not _has_other_limits(run.config, meta)
    return meta["settled"] and (step >= run.plan.steps or spent)


def _has_other_limits(config: TrainConfig, meta: dict[str, Any]) -> bool:
    before = meta["train_config"]
    return any(before.get(key) != getattr(config, key) for key in ("max_hours", "max_usd", "usd_per_hour"))


def _ending_after(run: Run, steps: int) -> Run:
    return dataclasses.replace(run, plan=dataclasses.replace(run.plan, steps=steps))
