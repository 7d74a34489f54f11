"""The parts of gpu.py that measure and train: `speed`, `run` and `recipe`, with their tables and tokens."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, require, run_python, spread
from throughput import in_turns, make_side, synchronize

from basemodel.common.errors import RunError
from basemodel.common.json_config import checked_config, read_json_object
from basemodel.data.token_files import TokenFiles
from basemodel.model.config import GPTConfig
from basemodel.model.memory import is_out_of_memory, peak_memory
from basemodel.planning.machines import peak_flops
from basemodel.training.backend import choose_precision
from basemodel.training.config import TrainConfig
from basemodel.training.processes import join_world
from basemodel.training.run_folder import read_metrics, read_status

LIMIT = 480.0  # seconds that a part may take
TINY = {
    "vocab_size": 257,
    "tokenizer": "bytes",
    "context_length": 32,
    "emb_dim": 32,
    "n_heads": 2,
    "n_layers": 2,
}
VOCABULARY_CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache"))
VOCABULARY = VOCABULARY_CACHE / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # GPT-2's, as tiktoken names it


class Report:
    """A Markdown file that grows line by line, so that a part that is killed leaves what it has found."""

    def __init__(self, path: Path) -> None:
        self.path, self.silent = path, False
        self._file = path.open("w", buffering=1, encoding="utf-8")

    def say(self, line: str = "") -> None:
        """Write a line to the file and, unless this report is silent, print it."""
        print(line, file=self._file)
        if not self.silent:
            print(line, flush=True)

    def row(self, *cells: object) -> None:
        """A row of the table."""
        self.say(f"| {' | '.join(map(str, cells))} |")

    def table(self, *columns: str) -> None:
        """Begin a table."""
        self.say()
        self.row(*columns)
        self.row(*["---"] * len(columns))


@dataclass
class Setup:
    """What a part works with."""

    datasets_dir: Path | None
    tiny: bool
    device_name: str
    device_gib: float
    folder: Path = field(default_factory=Path)  # for runs and whatever else need not be kept
    processes: list[subprocess.Popen] = field(default_factory=list)  # trainings
    started: float = field(default_factory=time.monotonic)
    limit: float = LIMIT  # seconds

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return TINY["context_length"] if self.tiny else 1024

    def seconds(self) -> float:
        """Since the part began."""
        return time.monotonic() - self.started

    def left(self) -> float:
        """Seconds that the part has left, less a reserve for its end."""
        return self.limit - min(30.0, 0.1 * self.limit) - self.seconds()

    def close(self) -> None:
        """Kill the trainings that a failed part leaves running."""
        for process in self.processes:
            process.kill()
            process.wait()


def read_run(name: str, *, tiny: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """model.json, for a rehearsal with a tiny shape, and train.json of one of the project's runs."""
    model, train = (read_json_object(ROOT / f"runs/{name}/{kind}.json") for kind in ("model", "train"))
    return model | (TINY if tiny else {}), train


def mfu(speed: float, flops_per_token: int, device_name: str) -> str:
    """Model FLOPs utilization as text."""
    peak = peak_flops(device_name)
    return f"{speed * flops_per_token / peak:.1%}" if peak else "unknown"


def flops_per_token(model: dict[str, Any]) -> int:
    """Training FLOPs per token of a model.json."""
    return GPTConfig(**model).flops_per_token


# ------------------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------------------

# A side of throughput.py, and what differs from microbatch 16, AdamW and the precision "auto".
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"microbatch_size": 6}),
    ("compiled", {}),
    ("compiled", {"optimizer": "muon"}),
    ("eager", {}),
    ("compiled", {"precision": "fp16"}),
    ("compiled", {"precision": "tf32"}),
    ("compiled", {"microbatch_size": 4}),
    ("compiled", {"microbatch_size": 32}),
    ("compiled", {"microbatch_size": 64}),
    ("compiled", {"document_masking": True}),
    ("eager", {"optimizer": "muon"}),
    ("compiled", {"microbatch_size": 128}),
]
TINY_STEPS = [
    ("plain", {"microbatch_size": 2}),
    ("eager", {"precision": "bf16", "optimizer": "muon", "document_masking": True}),
]


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Take training steps of one kind in this process; return their speed, peak memory and first step's time.

    `setting` holds a side of throughput.py, a run's `model` and `train`, and how many `steps` to take between
    two looks at the clock. Where memory runs out, that is the only thing returned, as `problem`.
    """
    world, steps = join_world(), setting["steps"]
    model_config, config = (
        GPTConfig(**setting["model"]),
        checked_config(TrainConfig, setting["train"], "train"),
    )
    start = time.perf_counter()
    try:
        step = make_side(setting["side"], config, model_config, world)
        step()
        synchronize(world.device)
        first = time.perf_counter() - start
        sides = {"": lambda: [step() for _ in range(steps)]}
        seconds = in_turns(sides, 3, 0.2 * steps, world)[""]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"problem": "out of memory"}
    tokens = steps * config.microbatch_size * model_config.context_length
    return {
        "precision": choose_precision(config, world.device),
        "tokens_per_second": [tokens / each for each in seconds],
        "peak_gib": peak_memory(world.device),
        "first_step_seconds": first,
    }


def measure_apart(setup: Setup, side: str, model: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    setting = {"side": side, "model": model, "train": train, "steps": 1 if setup.tiny else 5}
    worker = [str(ROOT / "benchmarks/gpu.py"), "speed", "--measure", json.dumps(setting)]
    return json.loads(run_python(*worker, timeout=max(1.0, setup.left())).splitlines()[-1])


def speed(setup: Setup, report: Report) -> None:
    """Measure each of STEPS. Raises RunError at the end if one failed, other than for lack of memory."""
    model, train = read_run("original", tiny=setup.tiny)
    model["drop_rate"] = 0.0
    train |= {"microbatch_size": 16, "precision": "auto"}
    flops, problems, base = flops_per_token(model), 0, None
    columns = "tokens/s (min to max)", "MFU", "peak GiB", "first step, s", "x plain"
    report.table("step", "optimizer", "precision", "microbatch", *columns)
    for side, changes in TINY_STEPS if setup.tiny else STEPS:
        values = train | changes
        what = f"{side}, document masks" if "document_masking" in changes else side
        cells = [what, values.get("optimizer", "adamw"), values["precision"], values["microbatch_size"]]
        if setup.left() < 30:
            report.row(*cells, "not measured: out of time", *[""] * 4)
            continue
        try:
            found = measure_apart(setup, side, model, values)
        except RunError as error:
            problems += 1
            # The command itself, which comes first, is long.
            found = {"problem": str(error).rpartition("ended with ")[2].replace("|", "\\|")[-200:]}
        if "problem" in found:
            report.row(*cells, found["problem"], *[""] * 4)
            continue
        cells[2] = "plain" if side == "plain" else found["precision"]
        speeds = found["tokens_per_second"]
        middle = statistics.median(speeds)
        base = middle if side == "plain" else base
        ratio = f"{middle / base:.2f}" if base else ""
        share = mfu(middle, flops, setup.device_name)
        first = f"{found['first_step_seconds']:.1f}"
        report.row(*cells, spread(speeds, ",.0f"), share, f"{found['peak_gib']:.2f}", first, ratio)
    if problems:
        raise RunError(f"{problems} kinds of steps failed")


# ------------------------------------------------------------------------------------------------------------
# Tokens and trainings
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A data set to train on."""

    datasets_dir: Path
    name: str  # OWNER/NAME
    shape: dict[str, Any]  # what its tokenizer makes of model.json
    train: int  # tokens
    validation: int

    def settings(self, setup: Setup, steps: int, batch: int, microbatch: int) -> dict[str, Any]:
        """The keys of train.json that train for so many steps on these tokens, and validate about 8 times."""
        length = setup.length
        most = min(8 if setup.tiny else 96, (self.validation - 1) // length) // microbatch
        require(most > 0, f"{self.name}: {self.validation:,} tokens for validation are too few")
        return {
            "dataset": self.name,
            "microbatch_size": microbatch,
            "global_batch_size": batch,
            "min_train_tokens": steps * batch * length,
            "epochs": math.ceil(steps * batch / max(1, (self.train - 1) // length)),
            "validation_interval": max(1, steps // 8),
            "validation_batches": most,
            "keep_checkpoints": 1,
        }


def find_tokens(setup: Setup) -> Tokens:
    """The first data set of the given folder, or the documentation that comes with Python, prepared now."""
    folder = setup.datasets_dir
    if folder is None:
        folder = setup.folder / "datasets"
    if not folder.exists():
        tokenizer = "gpt2" if VOCABULARY.exists() and not setup.tiny else "bytes"
        options = "--tokenizer", tokenizer, "--validation-fraction", "0.1"
        run_python("prepare_datasets.py", "python-docs", str(folder / "local/python-docs"), *options)
    found = sorted(folder.glob("*/*/train*.safetensors"))
    require(bool(found), f"{folder}: holds no OWNER/NAME/train.safetensors")
    source = found[0].parent
    meta = read_json_object(source / "meta.json") if (source / "meta.json").exists() else {}
    as_bytes = meta.get("tokenizer") == "bytes"
    shape = (
        {"tokenizer": "bytes", "vocab_size": 257} if as_bytes else {"tokenizer": "gpt2", "vocab_size": 50257}
    )
    counts = (TokenFiles(source, split).count for split in ("train", "validation"))
    return Tokens(folder, f"{source.parent.name}/{source.name}", shape, *counts)


class Training:
    """A run of ddp_train.py under the setup's folder, in a process of its own."""

    def __init__(self, setup: Setup, tokens: Tokens, name: str) -> None:
        self.setup, self.tokens, self.name = setup, tokens, name
        self.directory = setup.folder / "runs" / name
        self.log = setup.folder / f"{name}.log"
        self.used_gib = 0.0  # the most that nvidia-smi has shown

    def write(self, model: dict[str, Any], train: dict[str, Any]) -> None:
        """Write the run's two files."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for kind, values in (("model", model | self.tokens.shape), ("train", train)):
            (self.directory / f"{kind}.json").write_text(json.dumps(values, indent=1))

    def start(self, *options: str) -> None:
        """Start it; what it says goes to the end of its log."""
        command = ["ddp_train.py", self.name, self.tokens.datasets_dir.resolve(), *options]
        command += ["--runs-dir", self.directory.parent]
        self.began = time.monotonic()
        with self.log.open("a") as log:
            where = {"cwd": ROOT, "stdout": log, "stderr": log}
            env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # -f is read as it goes on
            self.process = subprocess.Popen([sys.executable, *map(str, command)], env=env, **where)
            self.setup.processes.append(self.process)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged. Raises RunError if the training ends before."""
        while self.last_step() < step:
            if self.process.poll() is not None and self.last_step() < step:
                raise self.failure()
            self.watch()

    def finish(self) -> None:
        """Wait until it ends. Raises RunError if it fails."""
        while self.process.poll() is None:
            self.watch()
        if self.process.returncode:
            raise self.failure()

    def watch(self) -> None:
        """Look at the GPU's memory, and pause. Raises RunError when the part's time is up."""
        if self.setup.left() < 0:
            raise RunError(f"out of time after step {self.last_step()}")
        self.used_gib = max(self.used_gib, used_gib())
        time.sleep(0.05 if self.setup.tiny else 0.5)

    def failure(self) -> RunError:
        """An error with the last line of the training's log."""
        last = (self.said().strip() or "no output").splitlines()[-1]
        return RunError(f"training {self.name} ended with status {self.process.returncode}: {last}")

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def sizes(self) -> list[tuple[int, float, float]]:
        """The microbatches that -f says fit, each with its GiB and tokens/s."""
        found = re.findall(r"microbatch (\d+): fits, ([\d.]+) GiB, ([\d,]+) tokens/s", self.said())
        return [(int(size), float(gib), float(speed.replace(",", ""))) for size, gib, speed in found]

    def lines(self, key: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have a key."""
        path = self.directory / "metrics.jsonl"
        return [line for line in read_metrics(path) if line.get(key) is not None] if path.exists() else []

    def last_step(self) -> int:
        """The last step that is logged."""
        return max((line["step"] for line in self.lines("train_loss")), default=0)

    def speed(self) -> float:
        """Tokens per second, the median over all steps but the first few."""
        return statistics.median(line["tokens_per_second"] for line in self.lines("tokens_per_second")[3:])


def used_gib() -> float:
    """How much of the GPU's memory is in use, by nvidia-smi; 0 without it."""
    if not shutil.which("nvidia-smi"):
        return 0.0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return max((int(word) / 1024 for word in done.stdout.split() if word.isdigit()), default=0.0)


# ------------------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------------------


def find_microbatch(training: Training, limit: float) -> tuple[int, float, float, str]:
    """The largest microbatch that -f finds, its GiB and tokens/s, and how -f ended.

    After `limit` seconds, and one size that fits, it is asked to stop.
    """
    training.start("-f")
    process, ended = training.process, "came to its end"
    while process.poll() is None:
        training.watch()
        if time.monotonic() - training.began > limit and training.sizes() and ended == "came to its end":
            process.send_signal(signal.SIGTERM)
            ended = f"was stopped after {limit:.0f} s"
    if not training.sizes() or not re.search("Max microbatch size was|stopped by a signal", training.said()):
        raise training.failure()
    return *max(training.sizes()), ended


def train_with_a_kill(training: Training, train: dict[str, Any], steps: int) -> tuple[int, float]:
    """Train a run, killed by SIGKILL half-way and resumed.

    Returns the step after which it was killed, and the seconds from its second start to the next step.
    """
    training.write(read_run("original", tiny=training.setup.tiny)[0], train)
    training.start()
    training.wait_for_step(steps // 2 + steps // 16)  # between two checkpoints
    training.process.kill()
    training.process.wait()
    if (killed := training.last_step()) == steps:
        raise RunError(f"all {steps} steps were done before the training could be killed")
    training.start("--resume")
    training.wait_for_step(killed + 1)
    seconds = time.monotonic() - training.began
    training.finish()
    return killed, seconds


def run(setup: Setup, report: Report) -> None:
    """Find the largest microbatch, train with it, kill the training half-way and resume it."""
    tokens = find_tokens(setup)
    training = Training(setup, tokens, "gpt2-small")
    model, train = read_run("original", tiny=setup.tiny)
    training.write(model, train)
    report.table("what", "result")
    report.row("tokens", f"{tokens.name}: {tokens.train:,} and {tokens.validation:,} for validation")
    largest, gib, speed, ended = find_microbatch(training, 1 if setup.tiny else 170)
    report.row("largest microbatch", f"{largest}, {gib:.2f} GiB, {speed:,.0f} tokens/s; -f {ended}")
    size = min(largest, 2 if setup.tiny else (tokens.validation - 1) // setup.length)
    seconds = max(20.0, min(120.0, setup.left() - 150))
    steps = 80 if setup.tiny else max(16, int(seconds * speed / (size * setup.length)))
    fits = True
    try:
        killed = train_with_a_kill(training, train | tokens.settings(setup, steps, size, size), steps)
    except RunError as error:
        if "memory ran out" not in str(error):
            raise
        fits, smaller = False, max(1, size * 7 // 8)
        report.row(f"training with microbatch {size}", "memory ran out")
        size = smaller
        killed = train_with_a_kill(training, train | tokens.settings(setup, steps, size, size), steps)
    report.row("training", f"{steps} steps of microbatch {size} x {setup.length} tokens")
    show_training(training, model | tokens.shape, killed, report)
    if not fits:
        raise RunError("memory ran out with the microbatch that -f had found")


def show_training(
    training: Training, model: dict[str, Any], killed: tuple[int, float], report: Report
) -> None:
    """The rest of the table of `run`. Raises RunError if it was not resumed, or its loss did not fall."""
    resumed = re.findall(r"Resuming after step ([\d,]*\d)", training.said())
    speed, (step, seconds) = training.speed(), killed
    report.row("tokens/s", f"{speed:,.0f}")
    report.row("MFU", mfu(speed, flops_per_token(model), training.setup.device_name))
    used = f"{training.used_gib:.1f} GiB" if training.used_gib else "not measured"
    report.row("most memory in use, by nvidia-smi", used)
    report.row("killed", f"by SIGKILL after step {step}")
    after = f"after step {resumed[-1]}" if resumed else "from scratch"
    report.row("resumed", f"{after}; {seconds:.0f} s from its start to step {step + 1}")
    losses = training.lines("val_loss")
    report.table("step", "tokens", "validation loss")
    for line in losses:
        report.row(line["step"], f"{line['tokens']:,}", f"{line['val_loss']:.4f}")
    if not resumed or read_status(training.directory).get("status") != "finished":
        raise RunError("the killed training did not go on from a checkpoint to its end")
    if losses[-1]["val_loss"] >= losses[0]["val_loss"]:
        raise RunError("the validation loss did not fall")
    chart = training.directory / "training-run-chart.png"
    if chart.exists():  # one that could not be drawn is no reason to fail
        shutil.copy(chart, report.path.with_suffix(".png"))


# ------------------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------------------

# Each a run of the project, and what is changed in it.
MUON_ALONE = {"embedding_learning_rate": None, "head_learning_rate": None, "learning_rate": 0.0014}
MUON_ALONE |= {"betas": [0.9, 0.999], "decay_all_parameters": True}
RECIPES = {
    "AdamW, the best published": ("stacked-interventions", {}, {}),
    "Muon, other rates as for AdamW": ("1xrtx3090-best", {"init": "pytorch"}, MUON_ALONE),
    "as recommended for so few steps": ("1xrtx3090-best", {}, {"muon_momentum": 0.9}),
}


def read_recipe(name: str, *, tiny: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """model.json and train.json of a recipe."""
    source, model_changes, train_changes = RECIPES[name]
    model, train = read_run(source, tiny=tiny)
    return model | model_changes, train | train_changes


def try_microbatch(setup: Setup, tokens: Tokens, batch: int) -> tuple[int, list[float]]:
    """A microbatch that fits all recipes, and the tokens/s of each with it."""
    if setup.tiny:
        return 2, [1e4] * len(RECIPES)
    room = max(1, int((setup.device_gib - 4) / 0.5))
    for microbatch in [each for each in range(min(room, 48), 0, -1) if batch % each == 0]:
        speeds = []
        for name in RECIPES:
            model, train = read_recipe(name, tiny=setup.tiny)
            values = train | {"microbatch_size": microbatch, "global_batch_size": microbatch}
            values |= {"half_batch_percent": 0}
            found = measure_apart(setup, "compiled", model | tokens.shape, values)
            if "problem" in found:
                break
            speeds.append(statistics.median(found["tokens_per_second"]))
        if len(speeds) == len(RECIPES):
            return microbatch, speeds
    raise RunError("not even a microbatch of 1 fits")


def recipe(setup: Setup, report: Report) -> None:
    """Train all recipes on the same tokens, as many as there is time for."""
    tokens, batch = find_tokens(setup), 4 if setup.tiny else 96
    microbatch, speeds = try_microbatch(setup, tokens, batch)
    length = setup.length
    seconds = max(20.0, setup.left() - 120)  # less what the starts and all validations take
    per_step = batch * length * sum(1 / speed for speed in speeds)
    steps = 8 if setup.tiny else max(20, int(seconds / per_step) // 20 * 20)
    report.say(f"{steps} batches of {batch} x {length} tokens of {tokens.name}, microbatch {microbatch}")
    marks = sorted({round(steps * part / 4) for part in range(5)})
    columns = [f"validation loss after {mark}" for mark in marks]
    report.table("recipe", *columns, "seconds", "tokens/s", "MFU")
    for number, name in enumerate(RECIPES, start=1):
        model, train = read_recipe(name, tiny=setup.tiny)
        training = Training(setup, tokens, f"recipe-{number}")
        # Saved at the end alone: half batches throughout would make two steps of each batch.
        changes = tokens.settings(setup, steps, batch, microbatch) | {"checkpoint_interval": 2 * steps}
        # So many validations that one is at each mark whatever the share of half batches.
        training.write(model, train | changes | {"validation_interval": max(1, steps // 20)})
        training.start()
        training.finish()
        losses = {line["tokens"] / (batch * length): line["val_loss"] for line in training.lines("val_loss")}
        cells = [f"{losses[min(losses, key=lambda seen: abs(seen - mark))]:.4f}" for mark in marks]
        share = mfu(training.speed(), flops_per_token(model | tokens.shape), setup.device_name)
        seconds = read_status(training.directory)["seconds"]
        report.row(name, *cells, f"{seconds:.0f}", f"{training.speed():,.0f}", share)
        shutil.rmtree(training.directory / "checkpoints")
