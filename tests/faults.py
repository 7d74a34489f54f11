"""Let each call on files fail, one after another, in processes that train, prepare data and export a model,
and cut the power at each.

    PYTHONPATH=. python tests/faults.py FOLDER

Each case is a process forked from this one, which has imported everything, under the library of faults.c. The
calls of an undisturbed process are recorded first. Then each of them fails in turn, with each of the errors
that disks and file servers give, once and for good. Whatever happens, a process ends well or with one line of
error, nothing half is taken for whole, nothing announced as saved is lost, and the same command, undisturbed,
goes on to the same bits: also from all that a disk may hold after a power cut at any point of the record.
"""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
from power_cuts import Disk, Tree, write_tree
from shim import Call, environment, is_preloaded, library_file
from watched import SUBJECTS, Fault, failed_calls, get_ready

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS)
OF_READING = (errno.EIO, errno.ESTALE)


def faults_of(calls: list[Call]) -> Iterator[Fault]:
    """Every way in which one of a process's calls can be the first to fail."""
    for number, call in enumerate((call for call in calls if call.name != "mark"), start=1):
        for error in OF_READING if call.only_reads else ERRORS:
            yield from (Fault(number, error, forever) for forever in (False, True))
        if call.name == "write":
            yield Fault(number, 0, False)


def disturb(subject: Any, case: Path, fault: Fault) -> str:
    """Let a subject suffer a fault; return what is wrong with how it ended, empty if nothing is."""
    subject.lay_out(case)
    problem, ended, failed = "", None, []
    try:
        ended = subject.start(case, fault)
        failed = failed_calls(ended)
        assert failed, "nothing failed"
        errors = [line for line in ended.said.splitlines() if line.startswith("Error: ")]
        assert "Traceback" not in ended.said, "a traceback"
        assert ended.status in (0, 1, 2), f"status {ended.status}"
        assert len(errors) == (ended.status != 0), f"{len(errors)} lines of error, status {ended.status}"
        subject.check(case, ended, fault)
    except Exception as error:
        first = f"{failed[0][0].name} {Path(failed[0][0].path).relative_to(case)}" if failed else "none"
        reason = error if isinstance(error, AssertionError) else traceback.format_exc()
        said = "\n".join(ended.said.splitlines()[-4:]) if ended else ""
        where = f"{type(subject).__name__}: {fault}, {first} in {failed[0][1] if failed else ()}"
        problem = f"{where}: {reason}\n{said}\n"
    shutil.rmtree(case)
    return problem


def spread(work: Callable[[int, Any], str], items: list[Any], lanes: int) -> list[str]:
    """Do `work` on all items, given with their numbers, in several processes; returns the problems."""
    if lanes == 1:
        return list(filter(None, map(work, range(len(items)), items)))
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for lane in range(lanes):
            workers.append(os.fork())
            if workers[-1] == 0:
                found = [work(number, items[number]) for number in range(lane, len(items), lanes)]
                Path(folder, str(lane)).write_text(json.dumps(found))
                os._exit(0)
        for lane, worker in enumerate(workers):
            os.waitpid(worker, 0)
            problems += json.loads(Path(folder, str(lane)).read_text())
    return list(filter(None, problems))


def some(items: list[Any], most: int | None) -> list[Any]:
    """All items, or as many as a test has the time for, always the same."""
    return items if most is None else random.Random(0).sample(items, min(most, len(items)))


def fail_every_call(
    folder: Path, name: str, most: int | None = None, lanes: int = 1
) -> dict[str, int | list[str]]:
    """Disturb a subject by every fault, or by some; returns counts and the problems."""
    folder.mkdir(parents=True)
    subject = SUBJECTS[name](folder)
    chosen = some(list(faults_of(subject.calm.calls)), most)
    problems = spread(lambda number, fault: disturb(subject, folder / f"case-{number}", fault), chosen, lanes)
    calls = sum(call.name != "mark" for call in subject.calm.calls)
    return {"calls": calls, "faults": len(chosen), "problems": problems}


def cut_power_everywhere(
    folder: Path, name: str, most: int | None = None, lanes: int = 1
) -> dict[str, int | list[str]]:
    """Look at all that the disk may hold after a power cut at each point of a subject, and go on from it, or
    from some of it; returns counts and the problems."""
    folder.mkdir(parents=True)
    subject = SUBJECTS[name](folder)
    subject.lay_out(folder / "begin")
    left = of_interest(after_power_cuts(folder, subject.calm.calls), subject.matters)
    decisive = of_interest(left, subject.decides)

    def look_at(number: int, chosen: tuple[Tree, int], *, goes_on: bool) -> str:
        tree, point = chosen
        return look(subject, folder / f"case-{number}", tree, subject.calm.calls[:point], goes_on=goes_on)

    problems = spread(partial(look_at, goes_on=False), list(decisive.items()), lanes)
    chosen = some(list(left.items()), most)
    problems += spread(partial(look_at, goes_on=True), chosen, lanes)
    return {"left": len(left), "decisive": len(decisive), "gone on from": len(chosen), "problems": problems}


def of_interest(left: dict[Tree, int], wanted: Callable[[str], bool]) -> dict[Tree, int]:
    """What is left on paths that are `wanted`, and the last point at which that may be."""
    found: dict[Tree, int] = {}
    for tree, number in left.items():
        part = tuple((path, content) for path, content in tree if wanted(path))
        found[part] = max(number, found.get(part, 0))
    return found


def after_power_cuts(folder: Path, calls: list[Call]) -> dict[Tree, int]:
    """What a power cut may leave of the subject in `folder`, which began as `begin` and ended as `calm`, and
    how many calls it had made at the last point where a power cut leaves this."""
    disk, left = Disk(folder / "calm", folder / "begin"), {}
    for number, call in enumerate(calls, start=1):
        if disk.apply(call) or call.name == "mark":
            left.update((tree, number) for tree in disk.after_power_cut())
    really = Disk(folder / "calm", folder / "calm").now()
    assert disk.now() == really, "not all that the process did to files is in the record"
    return left


def look(subject: Any, case: Path, tree: Tree, calls: list[Call], *, goes_on: bool) -> str:
    """Check what a power cut has left, and with `goes_on` what comes of it; return what is wrong, if any."""
    problem = ""
    write_tree(tree, case)
    try:
        subject.check_after_power_cut(case, calls)
        if goes_on:
            subject.go_on(case)
    except Exception as error:
        reason = error if isinstance(error, AssertionError) else traceback.format_exc()
        last = f"{calls[-1].name} {calls[-1].path} {calls[-1].other}"
        what = "\n".join(f"    {path}: {content!r}"[:100] for path, content in tree)
        problem = f"{type(subject).__name__}: power cut after call {len(calls)}, {last}: {reason}\n{what}\n"
    shutil.rmtree(case)
    return problem


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--only", type=click.Choice(list(SUBJECTS)), multiple=True, help="Leave out the others.")
@click.option("--most", type=click.IntRange(1), help="Of the faults, and of what power cuts leave.")
@click.option("--lanes", type=click.IntRange(1), default=2, show_default=True, help="Processes side by side.")
def main(folder: Path, only: tuple[str, ...], most: int | None, lanes: int) -> None:
    """Enumerate all faults in FOLDER, which must be new or empty, and print counts as JSON."""
    if not is_preloaded():
        if not (library := library_file()):
            raise click.ClickException("this needs Linux and a C compiler")
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment(library)}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    get_ready()
    failed = False
    for enumerate_all in (fail_every_call, cut_power_everywhere):
        for name in only or SUBJECTS:
            start, place = time.monotonic(), folder.resolve() / enumerate_all.__name__ / name
            found = enumerate_all(place, name, most, lanes)
            print(*found["problems"], sep="\n", file=sys.stderr)
            counts = {**found, "problems": len(found["problems"])}
            seconds = round(time.monotonic() - start, 1)
            print(json.dumps({enumerate_all.__name__: name, **counts, "seconds": seconds}), flush=True)
            failed = failed or bool(found["problems"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
