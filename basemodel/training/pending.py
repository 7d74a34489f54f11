"""Results of training steps that have been launched but not read yet.

The host reads a step's result once the next step is launched, so that a GPU never waits for Python. On a CPU
it reads each result immediately.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

STEPS_BEHIND = {"cpu": 0}  # how many steps late results are read; 1 on other devices
FIRST_STEP_SECONDS = 600.0  # time limit of the first step, which may have to compile


class StepResult(NamedTuple):
    """The result of a training step, the same on all processes."""

    loss: float  # mean over the global batch, nats per token
    grad_norm: float  # of the averaged gradient, before clipping
    finite: float  # 1.0 if both are finite; otherwise the step was skipped
    stops: float  # number of processes asked to stop


class PendingSteps:
    """A queue of launched steps: number, result on its way to the host, event that marks its arrival."""

    def __init__(self, device: torch.device) -> None:
        self._behind = STEPS_BEHIND.get(device.type, 1)
        self._queue: list[tuple[int, Tensor, torch.Event | None]] = []
        self._slowest: float | None = None
        self._clock, self._in_a_step = time.monotonic(), False

    def restart_clock(self) -> None:
        """Time the next step from now, to leave out validation and checkpoints."""
        self._clock, self._in_a_step = time.monotonic(), True

    def overdue(self) -> float:
        """Seconds by which the step in progress exceeds the slowest so far; may be negative."""
        if not self._in_a_step:
            return 0.0
        usual = FIRST_STEP_SECONDS if self._slowest is None else self._slowest
        return time.monotonic() - self._clock - usual

    def add(self, step: int, result: Tensor) -> None:
        """Start copying a result, the fields of StepResult as a tensor of shape (4,), to the host."""
        on_host, event = result.to("cpu", non_blocking=True), None
        if result.device.type != "cpu":
            event = torch.get_device_module(result.device).Event()
            event.record()
        self._queue.append((step, on_host, event))

    def read_due(self) -> list[tuple[int, StepResult, float]]:
        """Wait for all results but that of a step just launched on a GPU; return (step, result, seconds)."""
        return self._read(keep=self._behind)

    def read_all(self) -> list[tuple[int, StepResult, float]]:
        """Wait for all results, as `read_due` returns them; no step is in progress until `restart_clock`."""
        results = self._read(keep=0)
        self._in_a_step = False
        return results

    def _read(self, keep: int) -> list[tuple[int, StepResult, float]]:
        results = []
        while len(self._queue) > keep:
            step, on_host, event = self._queue.pop(0)
            if event is not None:
                event.synchronize()
            before, self._clock = self._clock, time.monotonic()
            seconds = self._clock - before
            self._slowest = max(self._slowest or 0.0, seconds)
            results.append((step, StepResult(*on_host.tolist()), seconds))
        return results
