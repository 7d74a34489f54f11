"""A run's folder: finding it, reading its logs, locking it, and setting earlier results aside."""

import difflib
import errno
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from basemodel.common import names
from basemodel.common.errors import InputError
from basemodel.common.files import contents, lock, locked

LOCK_SECONDS = 900.0  # how long a resumed run waits for its old processes, which may hang until they time out


def find_run(runs_dir: Path, name: str) -> Path:
    """The folder of the run `name`. Raises InputError, with the nearest names, if there is none."""
    folder = runs_dir / names.require_plain_name(name, "run")
    if not folder.is_dir():
        runs = [path.parent.name for path in runs_dir.glob(f"*/{names.TRAIN_JSON}")]
        nearest = difflib.get_close_matches(name, runs, n=4, cutoff=0.0)
        raise InputError(f"{folder}: no such run; nearest: {', '.join(nearest) or 'none'}")
    return folder


def read_status(run_dir: Path) -> dict[str, Any]:
    """The contents of status.json; empty if it is missing or damaged."""
    try:
        return dict(json.loads((run_dir / names.STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects with a step in a JSON Lines file, skipping truncated and damaged lines."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, merged by step, skipping truncated and damaged ones."""
    lines: dict[int, dict[str, Any]] = {}
    for values in _read_lines(path):
        lines[values["step"]] = lines.get(values["step"], {}) | values
    return list(lines.values())


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl: step, tokens (seen so far), prompt, and text (what the model added)."""
    keys = {"step", "tokens", "prompt", "text"}
    return [values for values in _read_lines(path) if keys <= values.keys()]


def lock_run(run_dir: Path, say: Callable[[str], None] | None = None) -> bool:
    """Lock a run's folder for the life of this process; False if the file system has no locks. With `say`,
    announce and wait up to LOCK_SECONDS for the process that holds the lock: it may be left over from a dead
    launch, saving one last checkpoint. Raises InputError if the folder stays locked or is not writable."""
    holder = read_status(run_dir).get("pid")  # most likely
    if not os.access(run_dir, os.W_OK):
        raise InputError(f"{run_dir}: not writable; training writes its results there")
    waiting = f"Waiting up to {LOCK_SECONDS:.0f} s for another process of this run (pid {holder}) to end"
    try:
        return lock(run_dir, LOCK_SECONDS if say else 0.0, lambda: say(waiting)) is not None
    except BlockingIOError:
        raise InputError(
            f"{run_dir}: is being trained by another process (pid {holder}); wait for it or stop it"
        ) from None


def is_locked(run_dir: Path) -> bool:
    """Whether another process holds the lock of a run's folder, because it trains the run."""
    try:
        with locked(run_dir):
            return False
    except BlockingIOError:
        return True


def set_earlier_results_aside(directory: Path) -> Path | None:
    """Move the results of an earlier run into a new subfolder and return it; None if there are none."""
    results = [path for path in map(directory.joinpath, names.RESULTS) if path.is_file() or _contents(path)]
    if not results:
        return None
    now = datetime.now(UTC)
    while (aside := directory / f"earlier-{now:%Y%m%dZ%H%M%S}").exists():
        now += timedelta(seconds=1)
    aside.mkdir()
    for path in results:
        try:
            # A link stays; so does a mount point, which cannot be renamed.
            if not (path.is_symlink() and path.is_dir()):
                path.rename(aside / path.name)
                continue
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        earlier = _contents(path)
        (path / aside.name).mkdir()
        for each in earlier:
            each.rename(path / aside.name / each.name)
    return aside


def _contents(folder: Path) -> list[Path]:
    return [path for path in contents(folder) if not path.name.startswith("earlier-")]
