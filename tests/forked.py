"""Run a test in a process of its own: it may patch the product, and trainings forked from it (torture.py)
inherit the patch."""

import os
import traceback
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from forkserver import FORKSERVER, start_forkserver


def _call(module: str, name: str, arguments: tuple, outcome: Any) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        getattr(import_module(module), name).__wrapped__(*arguments)
        outcome.send("")
    except BaseException:
        outcome.send(traceback.format_exc())


def forked(test: Callable) -> Callable:
    """Have a test run in a process of its own that has imported everything and computed nothing."""

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
