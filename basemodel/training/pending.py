"""Results of steps that were launched on a GPU and not read yet.

The host reads the result of a step when the next one is launched, so that the GPU never waits for Python.
On a CPU each result is read at once.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

STEPS_BEHIND = {"cpu": 0}  # by how many steps results are read late; on other devices 1
FIRST_STEP_SECONDS = 600.0  # how long a first step may take; it may have to compile something


class StepResult(NamedTuple):
    """What a training step yields, the same on all processes."""

    loss: float  # mean over the global batch, nats per token
    grad_norm: float  # of the averaged gradient, before clipping
    finite: float  # 1.0 if both are finite; otherwise the step was skipped
    stops: float  # how many processes were asked to stop


class PendingSteps:
    """A queue of launched steps: number, result on its way to the host, event that says when it is there."""

    def __init__(self, device: torch.device) -> None:
        self._behind = STEPS_BEHIND.get(device.type, 1)
        self._queue: list[tuple[int, Tensor, torch.Event | None]] = []
        self._slowest: float | None = None
        self._clock, self._in_a_step = time.monotonic(), False

    def restart_clock(self) -> None:
        """Time the next step from now on, without validation and checkpoints."""
        self._clock, self._in_a_step = time.monotonic(), True

    def overdue(self) -> float:
        """By how many seconds the step in progress takes longer than the slowest so far; may be negative."""
        if not self._in_a_step:
            return 0.0
        usual = FIRST_STEP_SECONDS if self._slowest is None else self._slowest
        return time.monotonic() - self._clock - usual

    def add(self, step: int, result: Tensor) -> None:
        """Start to copy a result, the fields of StepResult as a tensor of shape (4,), to the host."""
        on_host, event = result.to("cpu", non_blocking=True), None
        if result.device.type != "cpu":
            event = torch.get_device_module(result.device).Event()
            event.record()
        self._queue.append((step, on_host, event))

    def read_due(self) -> list[tuple[int, StepResult, float]]:
        """Wait for all results but that of the step just launched on a GPU; return each with its step and the
        step's seconds."""
        return self._read(keep=self._behind)

    def read_all(self) -> list[tuple[int, StepResult, float]]:
        """Wait for all results; return each with its step and the step's seconds. Then no step is in progress
        until `restart_clock`."""
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
