"""What the benchmarks share: where the project is, what was measured, and how a number is written."""

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for those that import this module first
from basemodel.common.errors import InputError, RunError

runs_dir_option = click.option(
    "--runs-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=ROOT / "runs",
    help="The folder of the runs. Default: runs/ of the project.",
)


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


def measured_code() -> dict[str, str]:
    """What a result that is kept is a result of: the commit, marked if it is not all, and PyTorch."""
    import torch  # here, because not all that is measured has it

    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    commit = os.environ.get("MEASURED_COMMIT") or commit  # where the code was copied without its history
    return {"commit": commit or "unknown", "torch": torch.__version__}


def run_python(*command: str | Path, env: dict[str, str] | None = None, timeout: float | None = None) -> str:
    """Run a command line behind `python` in the project's folder and return its output.

    Raises RunError, with its last words, if it ends badly or takes more than `timeout` seconds.
    """
    options = {"cwd": ROOT, "env": env, "timeout": timeout, "capture_output": True, "text": True}
    try:
        done = subprocess.run([sys.executable, *command], **options)
    except subprocess.TimeoutExpired:
        raise RunError(f"{' '.join(map(str, command))} took more than {timeout:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        raise RunError(f"{' '.join(map(str, command))} ended with status {done.returncode}: {last}")
    return done.stdout


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median of some numbers, with the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
