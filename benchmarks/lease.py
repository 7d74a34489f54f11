"""What minutes with a rented GPU are for: one figure after another, the most telling first.

    python benchmarks/gpu.py lease --minutes 9 --out DIR --datasets-dir DIR
    python benchmarks/gpu.py lease --only facts,compiled    some of the stages
    python benchmarks/gpu.py lease --tiny                   a rehearsal with a tiny model, on a CPU too

The stages run in one process, so that what one has compiled is there for the next. A stage that exceeds its
time is killed with that process, and the others go on in a new one. Each figure is at once a line of JSON in
DIR/lease.jsonl and on standard output; DIR/lease.md has them as a table in the end, DIR/lease.log all else.
"""

import contextlib
import dataclasses
import functools
import json
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, measured_code
from gpu_parts import RECIPES, Report, Setup, Training, find_tokens, read_recipe, read_run
from throughput import synchronize
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from basemodel.common.json_config import checked_config
from basemodel.model.config import GPTConfig
from basemodel.model.memory import peak_memory, release_memory
from basemodel.planning.machines import peak_flops
from basemodel.training import backend, optimizer
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World, join_world
from ddp_train import Learner
from gpt import attend

IMPORTS = 60.0  # seconds that a process may take before its first stage begins
LAUNCHES = {
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
}
SCRIPT = ROOT / "benchmarks/gpu.py"
GPU_TESTS = ROOT / "tests/test_gpu.py"
SYNCHRONIZED_STEPS = 11  # after these DDP no longer waits for the device in each forward pass, to time it
BEST = "1xrtx3090-best"

# ------------------------------------------------------------------------------------------------------------
# The process that measures
# ------------------------------------------------------------------------------------------------------------


class Lease:
    """What a stage works with."""

    def __init__(self, setup: Setup, out: Path) -> None:
        self.setup, self.out, self.tiny = setup, out, setup.tiny
        self.world = join_world()
        self.device = self.world.device
        self.stage = ""

    def give(self, **figures: Any) -> None:
        """Print figures as a line of JSON."""
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        print(json.dumps({"stage": self.stage, **rounded}), flush=True)

    def learner(self, run: str = "original", world: World | None = None, **train: Any) -> Learner:
        """GPT-2 small without dropout, with its training step."""
        model, settings = read_run(run, tiny=self.tiny)
        settings |= {"precision": "auto", "global_batch_size": None, "half_batch_percent": 0}
        settings |= {"short_sequence_percent": 0, "validation_interval": None, "validation_batches": 0}
        settings |= {"compile": not self.tiny, **train}
        if self.tiny:
            settings["microbatch_size"] = 2
        config = checked_config(TrainConfig, settings, "train")
        return Learner(config, GPTConfig(**model | {"drop_rate": 0.0}), world or self.world)

    def batch(self, learner: Learner, rows: int | None = None, length: int | None = None) -> torch.Tensor:
        """Random sequences, of the learner's microbatch unless a shape is given."""
        shape = rows or learner.config.microbatch_size, (length or learner.model.config.context_length) + 1
        generator = torch.Generator().manual_seed(0)
        return torch.randint(learner.model.config.vocab_size, shape, generator=generator).to(self.device)

    def speed(self, learner: Learner, step: Callable[[], Any], tokens: int) -> dict[str, Any]:
        """Tokens per second of steps of so many tokens, the median of 3 x 10 of them, MFU and peak memory."""
        seconds = statistics.median(self.timed(step))
        peak, flops = peak_flops(self.setup.device_name), learner.model.config.flops_per_token
        share = {"mfu": tokens / seconds * flops / peak} if peak else {}
        gib = peak_memory(self.device)
        return {"tokens_per_second": round(tokens / seconds), "ms": 1e3 * seconds, **share, "peak_gib": gib}

    def timed(self, step: Callable[[], Any], count: int = 10, rounds: int = 3) -> list[float]:
        """Seconds per call, in each of a few rounds."""
        count, rounds, found = (1, 1, []) if self.tiny else (count, rounds, [])
        for _ in range(rounds):
            synchronize(self.device)
            start = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(self.device)
            found.append((time.perf_counter() - start) / count)
        return found

    def profiled(self, step: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
        """The kernels that take longest, with their shares, the idle share, and launches per step."""
        on_cuda = self.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        synchronize(self.device)
        with profile(activities=kinds) as profiler:
            for _ in range(steps):
                step()
            synchronize(self.device)
        events = profiler.events()
        kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
        # Annotations, such as the optimizer's, span kernels that are counted already.
        kernels = [each for each in events if each.device_type == kind and not each.is_user_annotation]
        took: Counter[str] = Counter()
        for each in kernels:
            took[each.name] += each.self_device_time_total if on_cuda else each.self_cpu_time_total
        begun, ended = min(k.time_range.start for k in kernels), max(k.time_range.end for k in kernels)
        return {
            "idle_share": max(0.0, 1 - took.total() / (ended - begun)),
            "launches": round(sum(each.name in LAUNCHES for each in events) / steps),
            "kernels": {name[:80]: round(us / took.total(), 4) for name, us in took.most_common(15)},
        }


def facts(lease: Lease) -> None:
    """Versions, what the hardware reaches, and which attention is chosen."""
    device, tiny = lease.device, lease.tiny
    versions = {"python": sys.version.split()[0], **measured_code(), "cuda": torch.version.cuda}
    lease.give(**versions, device=lease.setup.device_name, gib=lease.setup.device_gib)
    lease.give(build_tools=backend.missing_build_tools() or "all there")
    x = torch.zeros(1 << (20 if tiny else 32), dtype=torch.uint8, device=device)
    copy = functools.partial(torch.empty_like(x).copy_, x)
    lease.give(copy_tb_per_second=2 * len(x) / min(lease.timed(copy)) / 1e12)
    del x, copy
    for m, k, n in [(64, 32, 64)] if tiny else [(8192, 8192, 8192), (49152, 768, 3072), (4096, 768, 50304)]:
        a, b = (torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        seconds = min(lease.timed(functools.partial(torch.matmul, a, b)))
        lease.give(product=f"{m} x {k} x {n}", tflops=2 * m * k * n / seconds / 1e12)
    backend.set_up_arithmetic("bf16", deterministic=False)
    q = torch.randn(2, 12, 256, 64, device=device, dtype=torch.bfloat16)
    for dropout in (0.0, 0.1):
        kernels = lease.profiled(functools.partial(attend, q, q, q, None, dropout))["kernels"]
        lease.give(attention_with_dropout=dropout, kernel=next(iter(kernels)))


def eager(lease: Lease) -> None:
    """The step uncompiled."""
    learner = lease.learner(compile=False, microbatch_size=16)
    tokens = lease.batch(learner)
    step = functools.partial(learner.train_step, [tokens], 1e-4)
    step()
    lease.give(**lease.speed(learner, step, tokens.numel() - len(tokens)))


def compiled(lease: Lease) -> None:
    """The step with AdamW, compiled: how fast, and where its time goes."""
    start = time.perf_counter()
    learner = lease.learner(microbatch_size=48)
    tokens = lease.batch(learner)
    step = functools.partial(learner.train_step, [tokens], 1e-4)
    step().tolist()
    lease.give(first_step_seconds=time.perf_counter() - start, precision=learner.precision)
    lease.give(**lease.speed(learner, step, tokens.numel() - len(tokens)))
    lease.give(**lease.profiled(step))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if not lease.tiny else 0
    lease.give(unique_graphs=graphs, compile_problem=learner.compile_problem)


def best(lease: Lease) -> None:
    """The step of the recommended recipe: two microbatches and Muon; its optimizer alone; short sequences."""
    learner = lease.learner(BEST, microbatch_size=48, gradient_accumulation_steps=2)
    tokens = lease.batch(learner)
    step = functools.partial(learner.train_step, [tokens, tokens], 1e-4)
    step()
    lease.give(**lease.speed(learner, step, 2 * (tokens.numel() - len(tokens))))
    lease.give(**lease.profiled(step))

    short = lease.batch(learner, 4 * len(tokens), learner.model.config.context_length // 4)
    step = functools.partial(learner.train_step, [short, short], 1e-4)
    start = time.perf_counter()
    step().tolist()
    lease.give(shape=str(tuple(short.shape)), first_step_seconds=time.perf_counter() - start)
    figures = lease.speed(learner, step, 2 * (short.numel() - len(short)))
    lease.give(shape=str(tuple(short.shape)), **figures)

    for parameter in learner.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    finite = torch.ones((), device=lease.device) > 0
    whole = learner.optimizer
    stacks = [torch.randn_like(stack.momentum) for stack in whole._muon.stacks]
    group, dtype = whole.param_groups[0], whole._muon.dtype
    parts = {
        "all": lambda: optimizer.step_if(finite, whole, learner.scaler),
        "AdamW": whole._adamw.step,
        "Newton-Schulz": lambda: [
            optimizer.orthogonalized(x, dtype, group["ns_coefficients"], group["ns_steps"]) for x in stacks
        ],
    }
    for name, part in parts.items():
        part()
        lease.give(optimizer=name, ms=1e3 * min(lease.timed(part)))
    lease.give(optimizer="all", launches=lease.profiled(parts["all"])["launches"])


def small(lease: Lease) -> None:
    """Small microbatches, alone and in DDP, as each of eight GPUs has them: does the host keep up?"""
    alone = lease.world
    backend_name = "nccl" if lease.device.type == "cuda" else "gloo"
    dist.init_process_group(backend_name, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for world in (alone, dataclasses.replace(alone, size=2)):
            for microbatch in (12, 6):
                learner = lease.learner(world=world, microbatch_size=microbatch)
                step = functools.partial(learner.train_step, [lease.batch(learner)], 1e-4)
                for _ in range(SYNCHRONIZED_STEPS):
                    step()
                host = statistics.median(launching(lease, step) for _ in range(5))
                device, launches = min(lease.timed(step)), lease.profiled(step)["launches"]
                what = {"microbatch": microbatch, "ddp": world.size > 1}
                lease.give(**what, ms=1e3 * device, host_ms=1e3 * host, launches=launches)
                release_memory(lease.device)
    finally:
        dist.destroy_process_group()


def launching(lease: Lease, step: Callable[[], Any]) -> float:
    """Seconds that the host takes for one step, when nothing that it launched before is still waiting."""
    synchronize(lease.device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@contextlib.contextmanager
def cudnn_attention() -> Iterator[None]:
    """Let cuDNN compute attention, as PyTorch does by default where it can."""
    set_up = backend.set_up_arithmetic

    def set_up_with_cudnn(*arguments: Any, **options: Any) -> None:
        set_up(*arguments, **options)
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.compiler.config.cache_key_tag = "cuDNN attention"

    backend.set_up_arithmetic = set_up_with_cudnn
    try:
        yield
    finally:
        backend.set_up_arithmetic = set_up


@contextlib.contextmanager
def float32_residuals() -> Iterator[None]:
    """Keep what blocks pass on in float32."""
    make = Learner._compile_all

    def with_hook(learner: Learner, module: torch.nn.Module) -> None:
        learner.model.trf_blocks[0].register_forward_pre_hook(lambda _, x: (x[0].float(), *x[1:]))
        make(learner, module)

    Learner._compile_all = with_hook
    try:
        yield
    finally:
        Learner._compile_all = make


def levers(lease: Lease) -> None:
    """Changes that may be worth making, each with its speed and its loss after 20 steps."""
    variants = {
        "as it is": contextlib.nullcontext,
        "cuDNN's attention": cudnn_attention,
        "float32 residual stream": float32_residuals,
    }
    for name, variant in variants.items():
        if not lease.tiny:
            torch.compiler.reset()
        with variant():
            learner = lease.learner(microbatch_size=48)
            tokens = lease.batch(learner)
            losses = [learner.train_step([tokens], 1e-4)[0] for _ in range(2 if lease.tiny else 20)]
            step = functools.partial(learner.train_step, [tokens], 1e-4)
            speed = lease.speed(learner, step, tokens.numel() - len(tokens))
        lease.give(variant=name, loss=losses[-1].item(), **speed)
        del learner, step
        release_memory(lease.device)


def tests(lease: Lease) -> None:
    """The tests that are marked gpu."""
    options = ["-m", "gpu", "-o", "addopts=", "-v", "-rfE", "--tb=short"]
    options += ["--noconftest", "-p", "no:cacheprovider"]
    if lease.tiny:  # the suite itself runs what needs no GPU
        options += ["-k", "deterministic and cuda"]
    command = [sys.executable, "-m", "pytest", *options, str(GPU_TESTS)]
    env = {**os.environ, "COLUMNS": "300"}  # so that the summary has room for reasons
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    lease.setup.processes.append(process)
    end = threading.Timer(lease.setup.left(), process.send_signal, [signal.SIGINT])  # for its summary
    end.start()
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        words = line.split()
        if words[1:2] in (["FAILED"], ["ERROR"]):
            lease.give(failed=words[0])
        elif line.startswith(("FAILED ", "ERROR ")):  # in the summary
            lease.give(why=" ".join(words[1:])[:300])
        elif re.search(r"\d (passed|failed|skipped)", line):
            lease.give(tests=line.strip("= \n"))
    end.cancel()
    process.wait()


def train(lease: Lease, name: str, model: dict[str, Any], settings: dict[str, Any]) -> Training:
    """A training of the stages below, ready to start: about 20M tokens, validated often."""
    tokens = find_tokens(dataclasses.replace(lease.setup, folder=lease.out))
    microbatch, batch = (2, 4) if lease.tiny else (48, 96)
    steps = 12 if lease.tiny else 20_000_000 // (batch * 1024)
    training = Training(lease.setup, tokens, name)
    changes = tokens.settings(lease.setup, steps, batch, microbatch)
    training.write(model, settings | changes | {"checkpoint_interval": max(5, steps // 4)})
    return training


@contextlib.contextmanager
def figures_given(lease: Lease, training: Training) -> Iterator[None]:
    """Give validation losses by tokens, how long saves stalled, and the speed, however far it came."""
    try:
        yield
    finally:
        for line in training.lines("val_loss"):
            lease.give(recipe=training.name, tokens=line["tokens"], val_loss=line["val_loss"])
        if stalls := [line["checkpoint_seconds"] for line in training.lines("checkpoint_seconds")]:
            middle = statistics.median(stalls)
            lease.give(recipe=training.name, saves=len(stalls), stall_seconds=middle, longest=max(stalls))
        for key in ("tokens_per_second", "mfu"):
            if values := [line[key] for line in training.lines(key)[3:]]:
                lease.give(recipe=training.name, **{key: statistics.median(values)})


def run(lease: Lease) -> None:
    """A real training by the recommended recipe, killed half-way and resumed."""
    model, settings = read_recipe("as recommended for so few steps", tiny=lease.tiny)
    training = train(lease, "recommended", model, settings)
    with figures_given(lease, training):
        training.start()
        training.wait_for_step(1)
        lease.give(seconds_to_step_1=time.monotonic() - training.began)
        training.wait_for_step(7 if lease.tiny else 120)
        training.process.kill()
        training.process.wait()
        killed = training.last_step()
        training.start("--resume")
        training.wait_for_step(killed + 1)
        resumed = re.findall(r"Resuming after step ([\d,]*\d)", training.said())
        lease.give(killed_after=killed, resumed_after=resumed, seconds=time.monotonic() - training.began)
        training.finish()
    with contextlib.suppress(OSError):
        shutil.copy(training.directory / "training-run-chart.png", lease.out / "lease.png")


def recipes(lease: Lease) -> None:
    """The same tokens by the best published recipe and by an earlier one of ours."""
    for number, name in enumerate(list(RECIPES)[:2], start=1):
        model, settings = read_recipe(name, tiny=lease.tiny)
        training = train(lease, f"earlier-{number}", model, settings | {"half_batch_percent": 0})
        lease.give(recipe=training.name, what=name)
        with figures_given(lease, training):
            training.start()
            training.finish()


# In the order of their worth, each with the most seconds that it may take.
STAGES: dict[str, tuple[Callable[[Lease], None], float]] = {
    "facts": (facts, 40),
    "eager": (eager, 40),
    "compiled": (compiled, 100),
    "best": (best, 90),
    "small": (small, 90),
    "levers": (levers, 120),
    "tests": (tests, 240),
    "run": (run, 180),
    "recipes": (recipes, 220),
}


def work(stages: list[str], setup: Setup, out: Path, minutes: float) -> None:
    """Run stages, one after another, in this process; one that fails says why, and the next begins."""
    lease, end = Lease(setup, out), time.monotonic() + 60 * minutes
    for stage in stages:
        lease.stage, start = stage, time.monotonic()
        lease.give(begins=True)
        lease.setup = dataclasses.replace(setup, limit=min(STAGES[stage][1], end - start), started=start)
        problem = {}
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.closing(lease.setup):
                lease.setup.folder = Path(folder)
                STAGES[stage][0](lease)
        except Exception as error:
            problem = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"[-300:]}
        lease.give(seconds=time.monotonic() - start, **problem, ends=True)
        synchronize(lease.device)  # ends this process if the device is lost to it; the next one goes on
        release_memory(lease.device)


# ------------------------------------------------------------------------------------------------------------
# The process that watches
# ------------------------------------------------------------------------------------------------------------


class Worker:
    """A process that measures, and the lines of JSON that it prints."""

    def __init__(self, stages: list[str], arguments: list[str], log: Path) -> None:
        command = [sys.executable, str(SCRIPT), "lease", *arguments]
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*command, "--worker", ",".join(stages)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                process_group=0,  # not a new session, which might outlive a lent machine's command
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(log,), daemon=True).start()

    def _read(self, log: Path) -> None:
        for line in self._process.stdout:
            if line.startswith('{"stage"'):
                self._lines.put(line)
            else:
                with log.open("a") as file:
                    file.write(line)
        self._lines.put(None)

    def line(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None if the process has ended. Raises queue.Empty at the deadline."""
        line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
        return None if line is None else json.loads(line)

    def kill(self) -> int:
        """Kill it with all that it has started; return its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def conduct(stages: list[str], out: Path, minutes: float, arguments: list[str]) -> int:
    """Run stages in a process of their own, a new one after each that had to be killed; return 1 if a stage
    failed, else 0."""
    out.mkdir(parents=True, exist_ok=True)
    end, left, lines = time.monotonic() + 60 * minutes, list(stages), []
    with (out / "lease.jsonl").open("w", buffering=1) as file:

        def keep(line: dict[str, Any]) -> None:
            lines.append(line)
            print(json.dumps(line), file=file)
            print(json.dumps(line), flush=True)

        while left and time.monotonic() < end:
            rest = "--minutes", str((end - time.monotonic()) / 60)
            worker = Worker(left, [*arguments, *rest], out / "lease.log")
            deadline, stage = min(end, time.monotonic() + IMPORTS), left[0]
            try:
                while (line := worker.line(deadline)) is not None:
                    stage = line["stage"]
                    if line.pop("begins", False):
                        deadline = min(end, time.monotonic() + STAGES[stage][1])
                        continue
                    if line.pop("ends", False):
                        left.remove(stage)
                        deadline = min(end, time.monotonic() + IMPORTS)
                    keep(line)
                problem = f"ended with status {worker.kill()}"
            except queue.Empty:
                problem = "killed: out of time"
            finally:
                worker.kill()
            if stage in left:
                left.remove(stage)
                keep({"stage": stage, "problem": problem})
        for stage in left:
            keep({"stage": stage, "problem": "not begun: out of time"})
    report = Report(out / "lease.md")
    report.table("stage", "figures")
    for line in lines:
        stage = line.pop("stage")
        report.row(stage, ", ".join(f"{key} {value}" for key, value in line.items()).replace("|", "\\|"))
    return int(any("problem" in line for line in lines))
