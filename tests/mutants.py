"""Break the product in known ways, one at a time, and see that the test which must notice fails.

    python tests/mutants.py               all of mutants.toml, two at a time; exit status 1 if one survives
    python tests/mutants.py clip best     those whose names hold one of these words

Each mutant is one edit in a copy of the project. It counts as killed only if pytest reports failed tests
(exit status 1; an error in collecting them is 2) and the same test passes in an unchanged copy.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


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
    *(".git", ".venv", ".*_cache", "__pycache__", "datasets", "checkpoints", "docs", "*.egg-info")
)
SECONDS = 240  # that one mutant's test may take; all of them in an unchanged copy take longer


def mutated(mutant: Mutant) -> str:
    """The text of its file, with the edit made."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    if (found := text.count(mutant.old)) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} holds the old text {found} times, not once")
    return text.replace(mutant.old, mutant.new)


def run_tests(tests: Iterable[str], *options: str, mutant: Mutant | None = None) -> int | None:
    """pytest's exit status in a copy of the project; None if it has not come to its end in time."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(shutil.copytree(ROOT, Path(folder) / "project", ignore=NOT_COPIED))
        if mutant:
            (project / mutant.file).write_text(mutated(mutant), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *tests]
        hasty = {"PRELOAD": "ddp_train,torch._dynamo", "WITHOUT_SHRINKING": "1"}
        env = {**os.environ, **hasty} if mutant else None
        with subprocess.Popen(
            command,
            cwd=project,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                return process.wait(SECONDS if mutant else None)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started


def verdict(mutant: Mutant) -> str:
    status = run_tests([mutant.test], "-n0", "-x", mutant=mutant)
    return {1: "killed", 0: "SURVIVED", None: "HUNG"}.get(status, f"NOT RUN (pytest's exit status {status})")


def main() -> None:
    parser = argparse.ArgumentParser(description="See that tests fail where the product is broken.")
    parser.add_argument("words", nargs="*", help="only mutants whose names hold one of these")
    words = parser.parse_args().words
    chosen = [each for each in MUTANTS if not words or any(word in each.name for word in words)]
    start = time.monotonic()
    for mutant in chosen:
        mutated(mutant)  # that each edit can be made is seen before anything slow
    if run_tests(sorted({mutant.test for mutant in chosen})) != 0:
        raise SystemExit("the tests fail in an unchanged copy; fix that first")
    with ThreadPoolExecutor(2) as pool:
        verdicts = []
        for mutant, said in zip(chosen, pool.map(verdict, chosen), strict=True):
            print(f"{said:10} {mutant.name:50} {mutant.test}", flush=True)
            verdicts.append(said)
    killed = verdicts.count("killed")
    print(f"{killed} of {len(chosen)} mutants killed in {time.monotonic() - start:.0f} s")
    sys.exit(killed != len(chosen))


if __name__ == "__main__":
    main()
