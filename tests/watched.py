"""What calls on files are made to fail in: processes that train, prepare data and export a model."""

import errno
import gc
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

# The first step of an optimizer would import it, in each process anew.
import torch._dynamo  # noqa: F401
from helpers import TORTURED_MODEL, TRAIN, Sandbox, write_dataset, write_model
from safetensors.numpy import load_file
from shim import Call, library, read_calls

import checkpointing
import ddp_train
import prepare_datasets
import upload_model
from basemodel.common.command_line import run_command
from basemodel.common.names import METRICS, SAMPLES, STATUS
from basemodel.data.hub import FINGERPRINTS
from basemodel.results import reporting, run_chart
from basemodel.training import resume, run_folder

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
KILLED = 9  # exit status
# What only reports about a training or tidies up after it: files, and the functions that do so.
REPORTS = (METRICS, STATUS, SAMPLES, FINGERPRINTS)
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
    ended = Ended(status, output.read_text(errors="replace"), read_calls(log) if log.exists() else [])
    for path in (output, log):
        path.unlink(missing_ok=True)
    return ended


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
    """A training of six steps that saves three times."""

    options: tuple[str, ...] = ()
    saved_before = 0  # step of the last checkpoint that was announced as saved

    def __init__(self, folder: Path) -> None:
        self._begin = folder / "base"
        sandbox = Sandbox(self._begin)
        write_dataset(sandbox.datasets / "test/tokens")
        sandbox.write_run("tiny", MODEL, RUN)
        self.prepare(folder)
        self.lay_out(folder / "calm")
        self.calm = self.start(folder / "calm")
        assert self.calm.status == 0, self.calm.said
        self._tensors, self._metrics = final_tensors(folder / "calm"), read_metrics(folder / "calm")

    def prepare(self, folder: Path) -> None:
        """Do what comes before what is watched."""

    def lay_out(self, case: Path) -> None:
        """Write into a new folder what the process begins with."""
        shutil.copytree(self._begin, case, symlinks=True)

    def start(self, case: Path, fault: Fault | None = None) -> Ended:
        """Run the process there to its end."""
        return run_watched(case, lambda: self._train(case, *self.options), fault)

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
        saved = max(last_saved(ended.calls), self.saved_before)
        assert saved <= max(steps, default=0), f"{saved} was saved, {steps} are there"
        if not (ended.status == 0 and LAST_STEP in steps):
            resumed = run_watched(case, lambda: self._train(case, "--resume"))
            assert resumed.status == 0, f"resumed: {resumed.said[-300:]}"
            assert not list(folder.glob(checkpointing.TEMPORARY_PREFIX + "*")), "leftovers"
        self.check_end(case, metrics=not any(call.error and METRICS in call.path for call, _ in failed))

    def _check_status(self, ended: Ended, failed: list[tuple[Call, tuple[str, ...]]], fault: Fault) -> None:
        if all(is_expendable(call, within) for call, within in failed):
            assert ended.status == 0, "only reports and tidying failed"
        if fault.error in checkpointing.MAY_PASS and not fault.forever:
            saving = any(within[:1] == ("save_checkpoint",) for _, within in failed)
            assert ended.status == 0 or not saving, "saving was not tried again"

    def decides(self, path: str) -> bool:
        """Whether `check_after_power_cut` looks at a path: not at what a save has not finished."""
        is_unfinished = f"/{checkpointing.TEMPORARY_PREFIX}" in path
        return path.startswith("runs/tiny/checkpoints") and not is_unfinished

    def matters(self, path: str) -> bool:
        """Whether `go_on` may look at a path."""
        return True

    def check_after_power_cut(self, case: Path, calls: list[Call]) -> None:
        """As soon as a checkpoint was announced as saved, it is there, or a newer one; no link is broken."""
        folder = Sandbox(case).run_dir("tiny") / "checkpoints"
        saved = max(last_saved(calls), self.saved_before)
        newest = checkpointing.newest_checkpoint(folder, lambda _: None)
        step = newest.meta["global_step"] if newest else 0
        assert step >= saved, f"{saved} was saved, {step} is there"
        for link in ("latest", "best"):
            if (folder / link).is_symlink() and (folder / link).readlink() != Path(newest.path.name):
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


class Resumption(Training):
    """The resumption of a training that was killed as soon as its second checkpoint was saved."""

    options = ("--resume",)
    saved_before = 4

    def prepare(self, folder: Path) -> None:
        killed = run_watched(self._begin, lambda: self._train(self._begin, end_after=2))
        assert killed.status == KILLED, killed.said


def fail(line: str) -> None:
    raise AssertionError(line)


def patch_training(end_after: int | None) -> None:
    """In a process that is about to train: leave out what takes long, let nothing depend on the time, mark in
    the record what goes on, and end after a number of saves."""
    run_chart.draw_chart = lambda *_: None
    reporting.SAMPLE_TOKENS = 2
    reporting.STATUS_SECONDS = 1e9
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
            os._exit(KILLED)
        return path

    checkpointing.Saver.write, checkpointing.save_checkpoint = write_at_once, announce
    for module, name in (*TIDYING, *((checkpointing, name) for name in SAVING)):
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
    path = Sandbox(case).run_dir("tiny") / METRICS
    kept = ("train_loss", "grad_norm", "learning_rate")
    return {line["step"]: {key: line.get(key) for key in kept} for line in run_folder.read_metrics(path)}


class Output:
    """A process that makes a folder `out`: absent or empty before, whole after."""

    def __init__(self, root: Path) -> None:
        self.prepare(root)
        self.lay_out(root / "calm")
        self.calm = self.start(root / "calm")
        assert self.calm.status == 0, self.calm.said
        self._whole = contents(root / "calm/out")

    def prepare(self, root: Path) -> None:
        """Make what the process reads, `self.source`."""
        raise NotImplementedError

    def run(self, output: Path) -> None:
        """Be the process."""
        raise NotImplementedError

    def lay_out(self, case: Path) -> None:
        """Make the folder that is watched."""
        case.mkdir()

    def start(self, case: Path, fault: Fault | None = None) -> Ended:
        """Run the process to its end."""
        return run_watched(case, lambda: self.run(case / "out"), fault)

    def check(self, case: Path, ended: Ended, fault: Fault) -> None:
        """All is there if all went well; else nothing half is taken for whole, and the same command works."""
        self.check_after_power_cut(case, ended.calls if ended.status == 0 else [])
        self.go_on(case, certainly=ended.status != 0)

    def decides(self, path: str) -> bool:
        """Whether `check_after_power_cut` looks at a path."""
        return path == "out" or (path.startswith("out/") and ".incomplete" not in path)

    def matters(self, path: str) -> bool:
        """Whether `go_on` may look at a path."""
        return True

    def check_after_power_cut(self, case: Path, calls: list[Call]) -> None:
        """Nothing half is taken for whole, and all is there once the process has ended."""
        left = contents(case / "out")
        assert left == self._whole or not self.counts(left), f"half is there: {sorted(left)}"
        assert left == self._whole or not any(call.path == "ended" for call in calls), "not all is there"

    def counts(self, left: dict[str, bytes]) -> bool:
        """Whether anybody would take what is left for the whole."""
        return bool(left)

    def go_on(self, case: Path, *, certainly: bool = False) -> None:
        """The same command must come to the same end, unless it has; `certainly`: it said that it failed."""
        if certainly or contents(case / "out") != self._whole:
            again = self.start(case)
            assert again.status == 0, f"again: {again.said[-300:]}"
            assert contents(case / "out") == self._whole
            there = (*case.iterdir(), *(case / "out").glob(".*"))
            strays = [path.name for path in there if path.name != "out"]
            assert not strays, strays


class Preparation(Output):
    """Preparing a few small texts as tokens."""

    def prepare(self, root: Path) -> None:
        self.source = root / "texts"
        self.source.mkdir()
        for number in range(20):
            (self.source / f"{number}.txt").write_text(f"{number} " + "text " * number)

    def run(self, output: Path) -> None:
        options = "--tokenizer", "bytes", "--workers", "1", "--validation-fraction", "0.2"
        script(prepare_datasets.main, self.source, output, *options)()


class PreparationInPlace(Preparation):
    """The same into a folder that no rename can replace, such as a mount point."""

    def lay_out(self, case: Path) -> None:
        super().lay_out(case)
        (case / "out").mkdir()

    def run(self, output: Path) -> None:
        prepare_datasets.work_folder = lambda target: target / ".incomplete"
        super().run(output)

    def counts(self, left: dict[str, bytes]) -> bool:
        return "train.safetensors" in left


class Export(Output):
    """Exporting a model for transformers."""

    def prepare(self, root: Path) -> None:
        import transformers  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer  # noqa: F401

        self.source = write_model(root / "model", emb_dim=8, n_layers=1)

    def run(self, output: Path) -> None:
        script(upload_model.main, *self.source, output)()

    def matters(self, path: str) -> bool:
        """Not what is in an unfinished export, which the next one removes unseen."""
        return not path.startswith("out.incomplete/")


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name; none if it is not there."""
    files = filter(Path.is_file, folder.iterdir() if folder.exists() else ())
    return {path.name: path.read_bytes() for path in files}


SUBJECTS = {
    "training": Training,
    "resumption": Resumption,
    "preparation": Preparation,
    "preparation-in-place": PreparationInPlace,
    "export": Export,
}


def get_ready() -> None:
    """Do once what each forked process would do anew, and leave them memory that they need not copy."""
    os.environ.pop("LD_PRELOAD", None)  # what they start in their turn does without the library
    resume.provenance()
    gc.collect()
    gc.freeze()
