"""ablate.py: runs and seeds, kills and signals, and what is called noise."""

import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import NO_CHART, Finished, Sandbox, Script, refused, run_script, wait_for, write_dataset

from basemodel.ablation import CONFIGS, KEYS, Study
from basemodel.intervals import mean_interval, student_t_quantile
from basemodel.outcomes import differing_conditions, outcomes

VALIDATE = {"validation_interval": 4, "validation_batches": 2}
FORKED = f"import test_ablate; test_ablate.fork_trainings(); {NO_CHART}"


class ForkedProcess:
    """As much of subprocess.Popen as ablate.py uses, for the project's scripts: forked from this process,
    which has imported PyTorch and computed nothing."""

    def __init__(self, command: list[str], process_group: int, stdout: Any = None, **_: Any) -> None:
        self._said = tempfile.TemporaryFile("w+") if stdout else None
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, process_group)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            for number in (1, 2) if self._said else ():
                os.dup2(self._said.fileno(), number)
            script = next(word for word in command if word.endswith("ddp_train.py"))
            sys.argv = command[command.index(script) :]
            try:
                runpy.run_path(script, run_name="__main__")
            finally:
                os._exit(99)

    def wait(self) -> int:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        self.wait()
        self._said.seek(0)
        return "", self._said.read()

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def fork_trainings() -> None:
    """Have this process fork its trainings, because starting Python anew takes longer than they do."""
    started_anew = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        trains = any(str(word).endswith("ddp_train.py") for word in command)
        return (ForkedProcess if trains else started_anew)(command, **options)

    subprocess.Popen = popen


def study_command(sandbox: Sandbox, *options: object, base: str = "tiny") -> list[str]:
    places = ["--runs-dir", sandbox.path / "runs", "--chart", sandbox.path / "ablate.png"]
    return [str(word) for word in ("ablate.py", base, sandbox.datasets, *options, *places)]


def ablate(sandbox: Sandbox, *options: object, before: str = FORKED, status: int = 0) -> Finished:
    done = run_script(*study_command(sandbox, *options), before=before)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def table_of(said: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    write_dataset(tmp_path / "datasets/test/tokens")
    sandbox = Sandbox(tmp_path)
    sandbox.write_run(train=VALIDATE)
    return sandbox


def test_a_study(sandbox: Sandbox) -> None:
    pass
