"""A run's folder: one training at a time, and nothing of an earlier one lost."""

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from basemodel.errors import InputError


def read_status(run_dir: Path) -> dict[str, Any]:
    """What status.json says; nothing where there is none."""
    try:
        return dict(json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, two of one step as one, without any that a crash has cut off or someone
    has spoilt."""
    lines: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines[values["step"]] = lines.get(values["step"], {}) | values
    return list(lines.values())


def lock_run(run_dir: Path) -> bool:
    """Keep other trainings out of a run's folder while this process lives; False where files know no locks.

    Raises InputError if the folder is locked or cannot be written to.
    """
    holder = read_status(run_dir).get("pid")  # most likely
    if not os.access(run_dir, os.W_OK):
        raise InputError(f"{run_dir}: cannot be written to; training writes its results there")
    try:
        fcntl.flock(os.open(run_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{run_dir}: is being trained by another process (pid {holder}); wait for it or stop it"
        ) from None
    except OSError:
        return False
    return True


def set_earlier_results_aside(directory: Path) -> Path | None:
    """Move what an earlier run of this name wrote into a folder of its own; None if nothing was."""
    names = ("checkpoints", "metrics.jsonl", "status.json", "training-run-chart.png")
    found = [directory / name for name in names if (directory / name).exists()]
    if not found:
        return None
    stamp = datetime.now(UTC).strftime("%Y%m%dZ%H%M%S")
    aside = next(
        path
        for n in range(1000)
        if not (path := directory / f"earlier-{stamp}{f'-{n}' if n else ''}").exists()
    )
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside
