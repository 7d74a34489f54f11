"""Figures that were measured: a small file of speeds and memory, which plans prefer to estimates.

`make bench`, `make gpu` and finished runs add to RUNS_DIR/figures.jsonl, a line each.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from basemodel.model.config import GPTConfig
from basemodel.planning.machines import Machine, is_device
from basemodel.training.config import TrainConfig
from basemodel.training.run import Run

FILE = "figures.jsonl"
# What does not change the speed of a step, or is kept beside the hash.
LEFT_OUT = {"init", "tokenizer", "tie_weights"}


@dataclass(frozen=True)
class Figure:
    """A measured speed."""

    device: str  # as CUDA or the system calls it
    memory_gib: float  # of the device; 0 on a CPU
    processes: int
    config: str  # speed_hash
    microbatch: int
    tokens_per_second: float  # of all processes, without validation and checkpoints
    peak_gib: float | None  # of one process
    source: str  # what measured it
    date: str


def speed_hash(model: GPTConfig, config: TrainConfig, *, compiled: bool) -> str:
    """A hash of what makes a step fast or slow, but for the batch."""
    shape = {k: v for k, v in dataclasses.asdict(model).items() if k not in LEFT_OUT}
    keys = ("optimizer", "document_masking", "precision", "deterministic")
    return hashlib.sha256(
        json.dumps([shape, compiled, [getattr(config, key) for key in keys]]).encode()
    ).hexdigest()[:12]


def today() -> str:
    """The date, as a figure has it."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def add_figure(runs_dir: Path, figure: Figure) -> None:
    """Add a figure to the file of `runs_dir`; one that cannot be written is no reason to fail."""
    try:
        with (runs_dir / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(figure)) + "\n")
    except OSError as error:
        print(f"Warning: {runs_dir / FILE} could not be written: {error}")


def read_figures(runs_dir: Path) -> list[Figure]:
    """The figures of `runs_dir`, oldest first, without lines that are damaged."""
    path, found = runs_dir / FILE, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(Figure(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return [
        each for each in found if isinstance(each.tokens_per_second, float) and each.tokens_per_second > 0
    ]


def find_figure(
    run: Run, processes: int, is_same_device: Callable[[Figure], bool], *, on_gpu: bool = True
) -> Figure | None:
    """The newest figure of a run's step on so many devices: same shape, optimizer, precision and batch."""
    compiled = run.config.compile is True or (run.config.compile == "auto" and on_gpu)
    wanted = speed_hash(run.model_config, run.config, compiled=compiled), processes, run.plan.microbatch_size
    for figure in reversed(read_figures(run.directory.parent)):
        if (figure.config, figure.processes, figure.microbatch) == wanted and is_same_device(figure):
            return figure
    return None


def on_machine(machine: Machine) -> Callable[[Figure], bool]:
    """Whether a figure is of the GPUs of a machine; those of one name may differ in memory."""
    gpu = machine.gpu
    return lambda figure: (
        is_device(gpu, figure.device) and abs(figure.memory_gib - gpu.memory_gib) < 0.15 * gpu.memory_gib
    )
