"""A run's folder: finding it, reading its logs, locking it, and setting earlier results aside."""

import fcntl
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from basemodel.command_line import require_plain_name
from basemodel.errors import InputError


def find_run(runs_dir: Path, name: str) -> Path:
    """The folder of the run `name`. Raises InputError, naming the runs there are, if there is none."""
    folder = runs_dir / require_plain_name(name, "run")
    if not folder.is_dir():
        have = ", ".join(sorted(path.parent.name for path in runs_dir.glob("*/train.json"))) or "none"
        raise InputError(f"{folder}: no such run; there are: {have}")
    return folder


def read_status(run_dir: Path) -> dict[str, Any]:
    """The contents of status.json; empty if it is missing or damaged."""
    try:
        return dict(json.loads((run_dir / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, merged by step, without truncated and damaged ones."""
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
    """Lock a run's folder for the life of this process; False if the file system has no locks.

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
    """Move the results of an earlier run into a new subfolder and return it; None if there are none."""
    names = ("checkpoints", "metrics.jsonl", "status.json", "training-run-chart.png")
    found = [directory / name for name in names if (directory / name).exists()]
    if not found:
        return None
    now = datetime.now(UTC)
    while (aside := directory / f"earlier-{now:%Y%m%dZ%H%M%S}").exists():
        now += timedelta(seconds=1)
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside
