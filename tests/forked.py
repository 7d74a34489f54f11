"""Tests that fork trainings: they run in processes that have imported everything and computed nothing."""

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import traceback
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import pytest
from conftest import Sandbox, write_dataset
from torture import TORTURED_MODEL, TORTURED_TRAIN

FORKSERVER = multiprocessing.get_context("forkserver")


@cache
def start_forkserver() -> None:
    """Start the process that imports everything once; it finds modules as this one does."""
    FORKSERVER.set_forkserver_preload(["forked"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()


def _call(module: str, name: str, arguments: tuple, outcome) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        getattr(importlib.import_module(module), name).__wrapped__(*arguments)
        outcome.send("")
    except BaseException:
        outcome.send(traceback.format_exc())


def forked(test: Callable) -> Callable:
    """Have a test run in a process of its own, from which trainings can be forked."""

    @wraps(test)
    def run(**arguments: object) -> None:
        start_forkserver()
        ours, theirs = FORKSERVER.Pipe()
        process = FORKSERVER.Process(
            target=_call, args=(test.__module__, test.__name__, tuple(arguments.values()), theirs)
        )
        process.start()
        problem = ours.recv() if ours.poll(240) else "no answer within 240 s"
        process.kill()
        process.join()
        assert not problem, problem

    return run


def make_sandbox(path: Path, *runs: str, **changes: object) -> Sandbox:
    sandbox = Sandbox(path)
    write_dataset(sandbox.datasets / "test/tokens")
    for run in runs:
        sandbox.write_run(run, TORTURED_MODEL, {**TORTURED_TRAIN, **changes})
    return sandbox


def step_reached(sandbox: Sandbox, run: str, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        path = sandbox.run_dir(run) / "metrics.jsonl"
        return path.exists() and path.read_text().count("train_loss") >= step

    return reached
