"""Break the product in known ways, one at a time, and see that the test which must notice fails.

    python tests/mutants.py               all of mutants.toml, two at a time; exit status 1 if one survives
    python tests/mutants.py clip best     those whose names hold one of these words

Each mutant is one edit in a copy of the project. It counts as killed only if pytest reports failed tests
(exit status 1; an error in collecting them is 2) and the same test passes in an unchanged copy.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest
from forkserver import HEAVY


@dataclass(frozen=True)
class Mutant:
    """One edit: `old`, which occurs once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    test: str  # as pytest names it


ROOT = Path(__file__).parent.parent
MUTANTS = [
    Mutant(**entry) for entry in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["mutant"]
]
NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", ".*_cache", "__pycache__", "datasets", "checkpoints", "*.egg-info")
)
SECONDS = 240  # that one mutant's test may take


def mutated(mutant: Mutant) -> str:
    """The text of its file, with the edit made."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    if (found := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} holds the old text {found} times, not once")
    return text.replace(mutant.old, mutant.new)


def run_tests(tests: Iterable[str], project: Path, mutant: Mutant | None = None) -> NoReturn:
    """Become pytest in a copy of the project, with the edit made and, then, within SECONDS."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nowhere, output)
    options = ["-p", "no:cacheprovider"]
    if mutant:
        (project / mutant.file).write_text(mutated(mutant), encoding="utf-8")
        options += ["-n0", "-x"]
        os.environ |= {"PRELOAD": "ddp_train,torch._dynamo", "WITHOUT_SHRINKING": "1"}
        signal.alarm(SECONDS)
    os.chdir(project)
    ours = {str(ROOT), str(ROOT / "tests")}
    sys.path[:] = [str(project / "tests"), *(path for path in sys.path if path not in ours)]
    os._exit(pytest.main([*options, *tests]))


def statuses(
    tasks: Iterable[tuple[list[str], Mutant | None]], at_once: int
) -> Iterator[tuple[Mutant | None, int]]:
    """Run the tests of each task in a process forked from this one, `at_once` at a time; yield how each
    ended, as os.waitstatus_to_exitcode says it."""
    tasks, running = iter(tasks), {}
    while True:
        for tests, mutant in itertools.islice(tasks, at_once - len(running)):
            folder = tempfile.TemporaryDirectory()
            project = Path(shutil.copytree(ROOT, Path(folder.name, "project"), ignore=NOT_COPIED))
            if (process := os.fork()) == 0:
                run_tests(tests, project, mutant)
            running[process] = mutant, folder
        if not running:
            return
        process, status = os.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what it has started
        mutant, folder = running.pop(process)
        folder.cleanup()
        yield mutant, os.waitstatus_to_exitcode(status)


def main() -> None:
    parser = argparse.ArgumentParser(description="See that tests fail where the product is broken.")
    parser.add_argument("words", nargs="*", help="only mutants whose names hold one of these")
    words = parser.parse_args().words
    chosen = [each for each in MUTANTS if not words or any(word in each.name for word in words)]
    start = time.monotonic()
    for mutant in chosen:
        mutated(mutant)  # that each edit can be made is seen before anything slow
    ((_, status),) = statuses([(sorted({mutant.test for mutant in chosen}), None)], 1)
    if status != 0:
        raise SystemExit("the tests fail in an unchanged copy; fix that first")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as conftest.py does, before PyTorch is imported
    for name in HEAVY:  # once, in place of once for each mutant
        with contextlib.suppress(ImportError):
            import_module(name)
    killed = 0
    for mutant, status in statuses((([mutant.test], mutant) for mutant in chosen), 2):
        said = {1: "killed", 0: "SURVIVED", -signal.SIGALRM: "HUNG"}.get(status, f"NOT RUN (status {status})")
        print(f"{said:10} {mutant.name:50} {mutant.test}", flush=True)
        killed += said == "killed"
    print(f"{killed} of {len(chosen)} mutants killed in {time.monotonic() - start:.0f} s")
    sys.exit(killed != len(chosen))


if __name__ == "__main__":
    main()
