"""Which code and libraries a checkpoint comes from."""

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch


def provenance() -> dict[str, Any]:
    """The versions of what computes, and this code's commit."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"versions": versions, "git_commit": git_commit()}


@functools.cache
def git_commit() -> str | None:
    """The commit of this code, None where that is not known."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
