"""Whether a run is as fast as planned and, if it is much slower, why that may be."""

import os
import shutil
import subprocess

from basemodel.planning.estimate import planned_speed
from basemodel.planning.machines import current_device_name
from basemodel.training.run import Run

LEAST_SHARE = 0.8  # of the planned speed, below which it is worth a line
FIRST_LOOK = 30  # steps after a start


class SpeedWatch:
    """Compares a run's speed with what was measured before on such devices, or else with its last plan."""

    def __init__(self, run: Run, device_name: str, *, compiled: bool) -> None:
        self._compiled, self._next_look = compiled, FIRST_LOOK
        self.planned, self.source = planned_speed(run, device_name)
        self._on_cuda = device_name == current_device_name()
        self._wants_compiled = run.config.compile is True or (self._on_cuda and run.config.compile == "auto")

    def look(self, steps: int, tokens_per_second: float, data_share: float) -> str | None:
        """A line about the speed after `steps` since the start, if it is low; said once. `data_share`: of the
        time, spent reading data."""
        if self.planned is None or steps < self._next_look:
            return None
        self._next_look = 2 * steps
        if tokens_per_second >= LEAST_SHARE * self.planned:
            return None
        self._next_look = 10**12
        less = 1 - tokens_per_second / self.planned
        return (
            f"Slower than planned: {tokens_per_second:,.0f} tokens/s, {less:.0%} below the "
            f"{self.planned:,.0f} {self.source}; likely because {self._reason(data_share)}"
        )

    def _reason(self, data_share: float) -> str:
        if self._wants_compiled and not self._compiled:
            return "it is not compiled"
        if data_share > 0.1:
            return f"reading data takes {data_share:.0%} of the time: a slow disk or network?"
        return (_busy_gpu() if self._on_cuda else _busy_cpu()) or "of something that this program cannot see"


def _busy_cpu() -> str:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return (
        f"other processes use the CPU too: the load is {load:.1f} on {cores} cores"
        if load > 1.2 * cores
        else ""
    )


def _busy_gpu() -> str:
    """What nvidia-smi says of clocks and other processes; empty if nothing is wrong, or without it."""
    if not shutil.which("nvidia-smi"):
        return ""
    clocks = _ask("--query-gpu=clocks.sm,clocks.max.sm")
    slow = [(int(now), int(most)) for now, most in clocks if now.isdigit() and most.isdigit()]
    others = [pid for (pid, *_) in _ask("--query-compute-apps=pid") if pid.isdigit()]
    if slow and (worst := min(slow, key=lambda pair: pair[0] / pair[1]))[0] < 0.8 * worst[1]:
        return f"a GPU runs at {worst[0]} of {worst[1]} MHz: heat, or a limit of its power?"
    if len(others) > len(clocks):
        return f"another process uses a GPU: {len(others)} on {len(clocks)} GPUs"
    return ""


def _ask(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split(", ") for line in done.stdout.splitlines() if line]
