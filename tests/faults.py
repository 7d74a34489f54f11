"""Let calls on files fail, one after another, in processes that train, prepare data and export a model.

    PYTHONPATH=. python tests/faults.py FOLDER

Each case is a process forked from this one, which has imported everything, under the library of faults.c. The
calls of an undisturbed process are counted first. Then each of them fails in turn, with each of the errors
that disks and file servers give, once and for good. Whatever happens, a process ends well or with one line of
error, nothing half is taken for whole, nothing announced as saved is lost, and the same command, undisturbed,
goes on to the same bits.
"""

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

# The first step of an optimizer would import it, in each process anew.
import torch._dynamo  # noqa: F401
from helpers import TORTURED_MODEL, TRAIN, Sandbox, write_dataset, write_model
from power_cuts import Disk, Tree, write_tree
from safetensors.numpy import load_file
from shim import Call, build, environment, is_preloaded, library, read_calls

import checkpointing
import ddp_train
import prepare_datasets
import upload_model
from basemodel.common.command_line import run_command
from basemodel.results import reporting, run_chart
from basemodel.training import resume, run_folder

ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS)
OF_READING = (errno.EIO, errno.ESTALE)
MODEL = {**TORTURED_MODEL, "emb_dim": 8, "n_layers": 1, "vocab_size": 257, "tokenizer": "bytes"}
RUN = {
    **TRAIN,
    "microbatch_size": 8,
    "min_train_tokens": 6 * 8 * 16,
    "checkpoint_interval": 2,
    "keep_checkpoints": 1,
    "sample_interval": 3,
    "sample_prompts": ["a"],
}
LAST_STEP = 6
# What only reports about a training or tidies up after it: files, and the functions that do so.
REPORTS = ("metrics.jsonl", "status.json", "samples.jsonl", "sha256.json")
TIDYING = (
    (checkpointing, "point_link"),
    (checkpointing, "prune_checkpoints"),
    (checkpointing, "remove_leftovers"),
    (run_folder, "lock_run"),
    (reporting, "continue_prompts"),
)
SAVING = ("save_checkpoint", "try_saving")


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A call that fails, counted from 1; error 0: a write that does half of its work."""

    call: int
    error: int
    forever: bool

    def __str__(self) -> str:
        name = errno.errorcode.get(self.error, "half a write")
        return f"call {self.call}, {name} {'for good' if self.forever else 'once'}"


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit status, what it said, and its calls."""

    status: int
    said: str
    calls: list[Call]


def run_watched(folder: Path, main: Callable[[], Any], fault: Fault | None = None) -> Ended:
    """Run `main` in a forked process whose calls on paths in a folder are recorded and may fail."""
    output, log = folder.with_suffix(".output"), folder.with_suffix(".calls")
    for path in (output, log):
        path.unlink(missing_ok=True)
    worker = os.fork()
    if worker == 0:
        status = 70
        try:
            os.setpgid(0, 0)
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for number in (1, 2):
                os.dup2(handle, number)
            library().record(bytes(log))
            number, error, forever = (fault.call, fault.error, fault.forever) if fault else (0, 0, False)
            library().arm(bytes(folder), number, error, forever)
            main()
        except SystemExit as end:
            status = end.code or 0
            library().mark(b"ended")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = wait_for(worker, output)
    return Ended(status, output.read_text(errors="replace"), read_calls(log) if log.exists() else [])


def wait_for(worker: int, output: Path, seconds: float = 120) -> int:
    """The exit status of a process when it has ended; negative: the signal that ended it."""
    deadline = time.monotonic() + seconds
    while (ended := os.waitpid(worker, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            raise AssertionError(f"still running after {seconds} s: {output.read_text()}")
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(ended[1])


def script(command: click.Command, *arguments: object) -> Callable[[], Any]:
    """What runs a script of the project in a forked process."""

    def run() -> None:
        sys.argv = [command.name, *map(str, arguments)]
        run_command(command)

    return run


# ------------------------------------------------------------------------------------------------------------
# What is disturbed
# ------------------------------------------------------------------------------------------------------------


class Training:
    """A training of six steps that saves three times, or its resumption after the second save."""

    def __init__(self, root: Path, *, resumes: bool) -> None:
        self.name = "resumed training" if resumes else "training"
        self._base, self._resumes = root / "base", resumes
        sandbox = Sandbox(self._base)
        write_dataset(sandbox.datasets / "test/tokens")
        sandbox.write_run("tiny", MODEL, RUN)
        calm = root / "calm"
        shutil.copytree(self._base, calm)
        self.calm = self.start(calm)
        assert self.calm.status == 0, self.calm.said
        self._tensors, self._metrics = final_tensors(calm), read_metrics(calm)
        if resumes:
            assert run_watched(self._base, lambda: self._train(self._base, end_after=2)).status == 9

    def lay_out(self, case: Path) -> None:
        shutil.copytree(self._base, case, symlinks=True)

    def start(self, case: Path, fault: Fault | None = None) -> Ended:
        options = ["--resume"] if self._resumes else []
        return run_watched(case, lambda: self._train(case, *options), fault)

    def _train(self, case: Path, *options: str, end_after: int | None = None) -> None:
        patch_training(end_after)
        script(ddp_train.main, *Sandbox(case).command("tiny", *options)[1:])()

    def check(self, case: Path, ended: Ended, fault: Fault) -> None:
        """What a disturbed training left must be sound, and resume to the same end."""
        failed = failed_calls(ended)
        self._check_status(ended, failed, fault)
        folder = Sandbox(case).run_dir("tiny") / "checkpoints"
        listed = checkpointing.list_checkpoints(folder)
        steps = [checkpointing.load_checkpoint(path).meta["global_step"] for path in listed]
        saved = max(last_saved(ended.calls), 4 if self._resumes else 0)
        assert saved <= max(steps, default=0), f"{saved} was saved, {steps} are there"
        if not (ended.status == 0 and LAST_STEP in steps):
            resumed = run_watched(case, lambda: self._train(case, "--resume"))
            assert resumed.status == 0, f"resumed: {resumed.said[-300:]}"
            assert not list(folder.glob(checkpointing.TEMPORARY_PREFIX + "*")), "leftovers"
        self.check_end(case, metrics=not any("metrics.jsonl" in call.path for call, _ in failed))

    def _check_status(self, ended: Ended, failed: list[tuple[Call, tuple[str, ...]]], fault: Fault) -> None:
        if all(is_expendable(call, within) for call, within in failed):
            assert ended.status == 0, "only reports and tidying failed"
        if fault.error in getattr(checkpointing, "MAY_PASS", ()) and not fault.forever:
            saving = any(within[:1] == ("save_checkpoint",) for _, within in failed)
            assert ended.status == 0 or not saving, "saving was not tried again"

    def kept(self, path: str) -> bool:
        """Whether what a power cut leaves of a path decides about the checkpoints alone."""
        return path.startswith("runs/tiny/checkpoints")

    def check_after_power_cut(self, case: Path, calls: list[Call]) -> None:
        """As soon as a checkpoint was announced as saved, it is there, or a newer one; no link is broken."""
        folder, saved = Sandbox(case).run_dir("tiny") / "checkpoints", last_saved(calls)
        newest = checkpointing.newest_checkpoint(folder, lambda _: None)
        step = newest.meta["global_step"] if newest else 0
        assert step >= saved, f"{saved} was saved, {step} is there"
        for link in checkpointing.LINKS:
            if (folder / link).is_symlink():
                checkpointing.named_checkpoint(folder, link, fail)

    def go_on(self, case: Path) -> None:
        """What a power cut has left must resume to the same end."""
        resumed = run_watched(case, lambda: self._train(case, "--resume"))
        assert resumed.status == 0, f"resumed: {resumed.said[-300:]}"
        self.check_end(case, metrics=True)

    def check_end(self, case: Path, *, metrics: bool) -> None:
        """The end must be that of the undisturbed training; of the metrics, some may be missing at most."""
        tensors = final_tensors(case)
        assert tensors.keys() == self._tensors.keys()
        for name, value in tensors.items():
            assert value == self._tensors[name], f"{name} differs"
        lines = read_metrics(case)
        assert lines == self._metrics if metrics else lines.items() <= self._metrics.items(), (
            f"metrics.jsonl: {lines}, not {self._metrics}"
        )


def fail(line: str) -> None:
    raise AssertionError(line)


def patch_training(end_after: int | None) -> None:
    """In a process that is about to train: leave out what takes long, let nothing depend on the time, mark in
    the record what goes on, and end after a number of saves."""
    run_chart.draw_chart = lambda *_: None
    reporting.SAMPLE_TOKENS = 2
    reporting.STATUS_SECONDS = 1e9
    if hasattr(checkpointing, "PAUSES"):
        checkpointing.PAUSES = tuple(0.0 for _ in checkpointing.PAUSES)
    write, save, saved = checkpointing.Saver.write, checkpointing.save_checkpoint, []

    def write_at_once(saver: checkpointing.Saver, meta: dict[str, Any]) -> None:
        write(saver, meta)
        saver.busy()

    def announce(*arguments: Any, **options: Any) -> Path:
        path = save(*arguments, **options)
        if path.parent.name == "checkpoints":
            saved.append(path)
            library().mark(f"saved {path.name}".encode())
        if len(saved) == end_after:
            os._exit(9)
        return path

    checkpointing.Saver.write, checkpointing.save_checkpoint = write_at_once, announce
    for module, name in (*TIDYING, *((checkpointing, name) for name in SAVING)):
        if hasattr(module, name):
            setattr(module, name, marked(getattr(module, name), name))


def marked(function: Callable, name: str) -> Callable:
    """A function that marks its beginning and end in the record."""

    def run(*arguments: Any, **options: Any) -> Any:
        library().mark(f"begin {name}".encode())
        try:
            return function(*arguments, **options)
        finally:
            library().mark(f"end {name}".encode())

    return run


def failed_calls(ended: Ended) -> list[tuple[Call, tuple[str, ...]]]:
    """The calls that were made to fail, each with the marked functions that it was in."""
    failed, within = [], []
    for call in ended.calls:
        if call.name == "mark" and call.path.startswith("begin "):
            within.append(call.path.removeprefix("begin "))
        elif call.name == "mark" and call.path.startswith("end "):
            within.pop()
        elif call.error > 0 or call.name.startswith("short-"):
            failed.append((call, tuple(within)))
    return failed


def last_saved(calls: Iterable[Call]) -> int:
    """The step of the last checkpoint that was announced as saved; 0 if none was."""
    saved = [call.path for call in calls if call.name == "mark" and call.path.startswith("saved ")]
    return int(saved[-1].rpartition("-")[2]) if saved else 0


def is_expendable(call: Call, within: tuple[str, ...]) -> bool:
    """Whether a call only reports or tidies: then its failure may not end a training."""
    path = Path(call.path)
    of_reports = path.name.removesuffix(".incomplete") in REPORTS
    of_folder = path.name == "tiny" and call.name in ("open", "fsync", "flock") and not within
    return of_reports or of_folder or not {name for _, name in TIDYING}.isdisjoint(within)


def final_tensors(case: Path) -> dict[str, bytes]:
    """Weights and optimizer of the last checkpoint."""
    last = checkpointing.list_checkpoints(Sandbox(case).run_dir("tiny") / "checkpoints")[-1]
    assert last.name.endswith(f"-{LAST_STEP}"), last.name
    names = (checkpointing.MODEL_FILE, checkpointing.OPTIMIZER_FILE)
    return {key: value.tobytes() for name in names for key, value in load_file(last / name).items()}


def read_metrics(case: Path) -> dict[int, dict[str, float]]:
    """The lines of metrics.jsonl by step, without times."""
    path = Sandbox(case).run_dir("tiny") / "metrics.jsonl"
    kept = ("train_loss", "grad_norm", "learning_rate")
    return {line["step"]: {key: line.get(key) for key in kept} for line in run_folder.read_metrics(path)}


class Preparation:
    """Preparing a few small texts as tokens."""

    name = "preparation"

    def __init__(self, root: Path) -> None:
        self._texts = root / "texts"
        self._texts.mkdir()
        for number in range(20):
            (self._texts / f"{number}.txt").write_text(f"{number} " + "text " * number)
        self.calm = self.start(root / "calm")
        assert self.calm.status == 0, self.calm.said
        self._tokens = contents(root / "calm/out")

    def lay_out(self, case: Path) -> None:
        case.mkdir()

    def start(self, case: Path, fault: Fault | None = None) -> Ended:
        case.mkdir(exist_ok=True)
        options = "--tokenizer", "bytes", "--workers", "1", "--validation-fraction", "0.2"
        return run_watched(case, script(prepare_datasets.main, self._texts, case / "out", *options), fault)

    def check(self, case: Path, ended: Ended, fault: Fault) -> None:
        """The output folder must be absent, empty or whole, and whole when the same command has run again."""
        left = contents(case / "out")
        assert left in ({}, self._tokens), f"half is there: {sorted(left)}"
        assert bool(left) == (ended.status == 0), f"status {ended.status}, but left {sorted(left)}"
        if not left:
            again = self.start(case)
            assert again.status == 0, f"again: {again.said[-300:]}"
            self.check_end(case)

    def kept(self, path: str) -> bool:
        """Whether what a power cut leaves of a path decides about the output folder alone."""
        return path.startswith("out/") or path == "out"

    def check_after_power_cut(self, case: Path, calls: list[Call]) -> None:
        """The output folder is absent, empty or whole, and whole once the process has ended."""
        left = contents(case / "out")
        assert left in ({}, self._tokens), f"half is there: {sorted(left)}"
        assert left or not any(call.path == "ended" for call in calls), "nothing is there"

    def go_on(self, case: Path) -> None:
        """The same command must come to the same end, unless it has."""
        if not contents(case / "out"):
            again = self.start(case)
            assert again.status == 0, f"again: {again.said[-300:]}"
            self.check_end(case)

    def check_end(self, case: Path) -> None:
        """The preparation must have come to the end of an undisturbed one."""
        assert contents(case / "out") == self._tokens
        strays = [path.name for path in case.iterdir() if path.name != "out"]
        assert not strays, strays


class Export:
    """Exporting a model for transformers."""

    name = "export"

    def __init__(self, root: Path) -> None:
        import transformers  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer  # noqa: F401

        self._model = write_model(root / "model", emb_dim=8, n_layers=1)
        self.calm = self.start(root / "calm")
        assert self.calm.status == 0, self.calm.said
        self._files = contents(root / "calm/out")

    def lay_out(self, case: Path) -> None:
        case.mkdir()

    def start(self, case: Path, fault: Fault | None = None) -> Ended:
        case.mkdir(exist_ok=True)
        return run_watched(case, script(upload_model.main, *self._model, case / "out"), fault)

    def check(self, case: Path, ended: Ended, fault: Fault) -> None:
        """The target must be absent or whole, and whole when the same command has run again."""
        left = contents(case / "out")
        assert left in ({}, self._files), f"half is there: {sorted(left)}"
        assert bool(left) == (ended.status == 0), f"status {ended.status}, but left {sorted(left)}"
        if not left:
            again = self.start(case)
            assert again.status == 0, f"again: {again.said[-300:]}"
        assert contents(case / "out") == self._files


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name; none if it is not there."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


SUBJECTS: dict[str, Callable[[Path], Any]] = {
    "training": lambda root: Training(root, resumes=False),
    "resumption": lambda root: Training(root, resumes=True),
    "preparation": Preparation,
    "export": Export,
}


# ------------------------------------------------------------------------------------------------------------
# The enumeration
# ------------------------------------------------------------------------------------------------------------


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
        problem = f"{subject.name}: {fault}: {first} in '{failed and failed[0][1]}': {reason}\n{said}\n"
    shutil.rmtree(case)
    return problem


def fail_every_call(folder: Path, name: str, share: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Disturb a subject by every fault, or by a random share of them; returns counts and the problems."""
    root = folder / name
    root.mkdir(parents=True)
    subject = SUBJECTS[name](root)
    faults = list(faults_of(subject.calm.calls))
    chosen = faults if share == 1 else random.Random(seed).sample(faults, max(1, round(share * len(faults))))
    problems = [disturb(subject, root / f"case-{number}", fault) for number, fault in enumerate(chosen)]
    calls = sum(call.name != "mark" for call in subject.calm.calls)
    return {"calls": calls, "faults": len(chosen), "problems": list(filter(None, problems))}


def cut_power_everywhere(folder: Path, name: str, share: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Look at all that the disk may hold after a power cut at each point of a subject, and go on from it, or
    from a random share of it; returns counts and the problems."""
    root = folder / f"{name}-cut"
    root.mkdir(parents=True)
    subject = SUBJECTS[name](root)
    subject.lay_out(root / "begin")
    disk, calls = Disk(root / "calm", root / "begin"), subject.calm.calls
    left: dict[Tree, int] = {}  # how many calls had been made at the last power cut that leaves this
    for number, call in enumerate(calls, start=1):
        if disk.apply(call) or call.name == "mark":
            left.update((tree, number) for tree in disk.after_power_cut())
    assert disk.now() == Disk(root / "calm", root / "calm").now(), "the record is not of all that happened"
    decisive: dict[Tree, int] = {}
    for tree, number in left.items():
        part = tuple((path, content) for path, content in tree if subject.kept(path))
        decisive[part] = max(number, decisive.get(part, 0))
    problems = [look(subject, root, tree, calls[:number]) for tree, number in decisive.items()]
    trees = list(left) if share == 1 else random.Random(seed).sample(list(left), round(share * len(left)))
    problems += [look(subject, root, tree, calls[: left[tree]], goes_on=True) for tree in trees]
    found = list(filter(None, problems))
    return {"left": len(left), "decisive": len(decisive), "gone on from": len(trees), "problems": found}


def look(subject: Any, root: Path, tree: Tree, calls: list[Call], *, goes_on: bool = False) -> str:
    """Check what a power cut has left, and with `goes_on` what comes of it; return what is wrong, if any."""
    case, problem = root / "case", ""
    write_tree(tree, case)
    try:
        subject.check_after_power_cut(case, calls)
        if goes_on:
            subject.go_on(case)
    except Exception as error:
        reason = error if isinstance(error, AssertionError) else traceback.format_exc()
        last = f"{calls[-1].name} {calls[-1].path} {calls[-1].other}"
        what = "\n".join(f"    {path}: {content!r}"[:100] for path, content in tree)
        problem = f"{subject.name}: power cut after call {len(calls)}, {last}: {reason}\n{what}\n"
    shutil.rmtree(case)
    return problem


def get_ready() -> None:
    """Do once what each forked process would do anew, and leave them memory that they need not copy."""
    os.environ.pop("LD_PRELOAD", None)  # what they start in their turn does without the library
    resume.provenance()
    gc.collect()
    gc.freeze()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--only", type=click.Choice(list(SUBJECTS)), multiple=True, help="Of the subjects, these alone."
)
@click.option("--share", type=click.FloatRange(0, 1), default=1.0, help="Of the faults, at random.")
@click.option("--seed", type=int, default=0)
def main(folder: Path, only: tuple[str, ...], share: float, seed: int) -> None:
    """Enumerate all faults in FOLDER, which must be new or empty, and print counts as JSON."""
    if not is_preloaded():
        with tempfile.TemporaryDirectory() as place:
            if not (built := build(Path(place))):
                raise click.ClickException("this needs Linux and a C compiler")
            sys.exit(
                subprocess.run(
                    [sys.executable, *sys.argv], env={**os.environ, **environment(built)}
                ).returncode
            )
    get_ready()
    results = {}
    for name in only or SUBJECTS:
        start = time.monotonic()
        results[name] = fail_every_call(folder.resolve(), name, share, seed)
        results[name]["seconds"] = round(time.monotonic() - start, 1)
        print("\n".join(results[name]["problems"]), file=sys.stderr)
        results[name]["problems"] = len(results[name]["problems"])
    print(json.dumps(results, indent=1))
    sys.exit(any(result["problems"] for result in results.values()))


if __name__ == "__main__":
    main()
