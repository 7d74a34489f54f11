"""Training on a GPU: the losses are those of a CPU, the host never waits, and a run survives there too.

Each test takes a device. `pytest -m gpu` runs those of CUDA, and skips them where there is none; the same
bodies on the CPU, where they can be, belong to the suite.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    MODEL,
    NO_CHART,
    ROOT,
    TORTURED_MODEL,
    TORTURED_TRAIN,
    Sandbox,
    Script,
    assert_same_tensors,
    step_reached,
    wait_for,
    write_dataset,
)
from torch.utils._python_dispatch import TorchDispatchMode

from basemodel.model.config import GPTConfig
from basemodel.model.masks import within_documents
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from ddp_train import Learner
from gpt import attend

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available"),
]

if torch.cuda.is_available():  # cuBLAS reads it once, at the first product, which earlier tests make
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

RATE = 5e-3


def on_both(*values: tuple[Any, ...], cuda: tuple[tuple[Any, ...], ...] = ()) -> list[Any]:
    """Parameters: each of `values` on the CPU and on CUDA, those of `cuda` there alone."""
    on_cpu = [pytest.param("cpu", *each) for each in values]
    return [*on_cpu, *(pytest.param("cuda", *each, marks=CUDA) for each in (*values, *cuda))]


def make_learner(device: str, **changes: Any) -> Learner:
    """A small byte-level model and its step."""
    torch.compiler.reset()
    if device == "cuda":  # too many recompilations would end compilation, without a word
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    shape = {"vocab_size": 301, "context_length": 128, "emb_dim": 64, "tokenizer": "bytes"}
    settings = {"dataset": "a/b", "microbatch_size": 2, "min_train_tokens": 1, "learning_rate": RATE}
    world = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device(device), control=None)
    return Learner(TrainConfig(**settings | changes), GPTConfig(**MODEL | shape), world)


def random_microbatches(learner: Learner, seed: int) -> list[torch.Tensor]:
    """Two microbatches with something to learn, and with some ends of text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, (2, 2, 129), generator=generator).cumsum(-1) % 301
    return list(tokens.to(learner.world.device))


@functools.cache
def on_cpu(**changes: Any) -> tuple[list[float], list[float]]:
    """`losses_and_norms` on the CPU, in float32 and not compiled."""
    return losses_and_norms(make_learner("cpu", precision="fp32", compile=False, **changes))


def losses_and_norms(learner: Learner) -> tuple[list[float], list[float]]:
    """The loss and the norm of the gradient in each of 8 steps."""
    steps = [learner.train_step(random_microbatches(learner, seed), RATE)[:2].tolist() for seed in range(8)]
    return tuple(zip(*steps, strict=True))


# ------------------------------------------------------------------------------------------------------------
# The same training
# ------------------------------------------------------------------------------------------------------------

TOLERANCES = {"fp32": 1e-4, "tf32": 5e-4, "fp16": 5e-4, "bf16": 2e-3}
EAGER = [(precision, "adamw", False) for precision in TOLERANCES]
COMPILED = [(precision, "adamw", True) for precision in TOLERANCES]
MUON = ("fp32", "muon", False)


@pytest.mark.parametrize(
    ("device", "precision", "optimizer", "compile"), on_both(*EAGER, MUON, cuda=tuple(COMPILED))
)
def test_losses_are_those_of_a_cpu_in_float32(
    device: str, precision: str, optimizer: str, *, compile: bool
) -> None:
    changes = {"optimizer": optimizer, "clipping_max_norm": 1.0}
    expected, expected_norms = on_cpu(**changes)
    learner = make_learner(device, precision=precision, compile=compile, **changes)
    losses, norms = losses_and_norms(learner)
    assert learner.loss_module.is_compiled == compile
    assert expected[-1] < expected[0] - 0.3, "something is learnt"
    assert losses == pytest.approx(expected, rel=TOLERANCES[precision])
    assert norms == pytest.approx(expected_norms, rel=20 * TOLERANCES[precision])


@pytest.mark.parametrize(
    ("device", "precision", "compile"),
    on_both(("fp32", False), ("bf16", False), cuda=(("fp32", True), ("bf16", True))),
)
def test_document_masking_has_the_losses_of_a_mask_on_a_cpu(
    device: str, precision: str, *, compile: bool
) -> None:
    """Compiled on CUDA it is FlexAttention; elsewhere the mask is a plain one."""
    expected, _ = on_cpu(document_masking=True)
    learner = make_learner(device, precision=precision, compile=compile, document_masking=True)
    losses, _ = losses_and_norms(learner)
    assert expected != pytest.approx(on_cpu()[0], rel=1e-4), "the mask matters"
    assert losses == pytest.approx(expected, rel=TOLERANCES[precision])


@pytest.mark.parametrize("device", on_both(()))
def test_deterministic_training_has_the_same_bits_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that it is forgotten afterwards
    precision = "bf16" if device == "cuda" else "fp32"  # which is slow on many a CPU
    changes = {"deterministic": True, "precision": precision, "compile": False, "document_masking": True}
    try:
        one, other = (losses_and_norms(make_learner(device, **changes)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert one == other


@pytest.mark.parametrize(("device", "backward"), on_both((False,), cuda=((True,),)))
def test_flex_attention_is_masked_attention(device: str, *, backward: bool) -> None:
    """In float32; on a CPU without the backward pass, which FlexAttention does not have there."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    tokens = torch.randint(257, (2, 256)).to(device)
    tokens[:, ::100] = 256
    q, k, v, weights = (torch.randn(2, 4, 256, 32).to(device) for _ in range(4))

    def results(attention: Any, *, flex: bool) -> list[torch.Tensor]:
        inputs = [each.clone().requires_grad_(backward) for each in (q, k, v)]
        attended = attention(*inputs, within_documents(tokens, 256, flex=flex)[1], 0.0)
        gradients = torch.autograd.grad((attended * weights).sum(), inputs) if backward else ()
        return [attended.detach(), *gradients]

    compiled = torch.compile(attend, dynamic=False) if device == "cuda" else attend
    for found, expected in zip(results(compiled, flex=True), results(attend, flex=False), strict=True):
        assert (found - expected).norm() < 2e-3 * expected.norm()


# ------------------------------------------------------------------------------------------------------------
# The host never waits
# ------------------------------------------------------------------------------------------------------------


class NoReads(TorchDispatchMode):
    """In this context, reading a number from a device's tensor is an error."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == self.device:
            raise AssertionError("the host reads a tensor of the device, and so waits for it")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """On CUDA, whatever makes the host wait is an error; on the CPU, where nothing waits, what would."""
    if device == "cpu":
        with NoReads(device):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("device", "precision", "compile"),
    on_both(
        ("fp16", False),
        cuda=(("fp32", False), ("tf32", False), ("bf16", False), ("bf16", True), ("fp16", True)),
    ),
)
def test_a_step_never_waits_for_the_device(
    device: str, precision: str, optimizer: str, *, compile: bool
) -> None:
    changes = {"optimizer": optimizer, "precision": precision, "clipping_max_norm": 1.0}
    learner = make_learner(device, compile=compile, **changes)
    microbatches = random_microbatches(learner, 0)
    for _ in range(3):
        learner.train_step(microbatches, 1e-3)
    with no_waiting(device):
        for _ in range(2):
            result = learner.train_step(microbatches, 1e-3)
    assert result.isfinite().all() and result[2] == 1


# ------------------------------------------------------------------------------------------------------------
# A run survives
# ------------------------------------------------------------------------------------------------------------


def start(sandbox: Sandbox, run: str, device: str) -> Script | subprocess.Popen:
    """Train a run on a device, from its last checkpoint. Forked processes cannot use CUDA."""
    if device == "cpu":
        sandbox.env["CUDA_VISIBLE_DEVICES"] = ""
        return sandbox.start(run, "--resume")
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; {NO_CHART}; "
    code += 'runpy.run_path(sys.argv[0], run_name="__main__")'
    return subprocess.Popen([sys.executable, "-c", code, *sandbox.command(run, "--resume")], cwd=ROOT)


@pytest.mark.parametrize("device", on_both(()))
def test_a_run_that_is_stopped_then_killed_ends_like_an_undisturbed_one(tmp_path: Path, device: str) -> None:
    sandbox = Sandbox(tmp_path)
    write_dataset(sandbox.datasets / "test/tokens")
    # Steps enough for a signal to come in between; dropout shows whether random numbers go on.
    count = 60 if device == "cuda" else 30
    steps = {"min_train_tokens": count * 8 * 16, "learning_rate": 1e-3, "validation_interval": 10}
    for run in ("whole", "disturbed"):
        changes = {**steps, "checkpoint_interval": 5, "precision": "auto", "compile": False}
        sandbox.write_run(run, TORTURED_MODEL, {**TORTURED_TRAIN, **changes})
    whole = start(sandbox, "whole", device)
    whole.wait(120)
    assert whole.returncode == 0
    for least, number, status in ((5, signal.SIGTERM, 143), (16, signal.SIGKILL, -9), (count, None, 0)):
        training = start(sandbox, "disturbed", device)
        wait_for(step_reached(sandbox, "disturbed", least), f"step {least}")
        if number:
            os.kill(training.pid, number)
        training.wait(120)
        assert training.returncode == status
        if number == signal.SIGTERM:
            stopped = sandbox.status("disturbed")
            assert stopped["status"] == "preempted" and 5 <= stopped["step"] < count
            assert sandbox.checkpoints("disturbed")[-1].name.endswith(f"-iteration-{stopped['step']}")
    expected, found = (sandbox.metrics(run) for run in ("whole", "disturbed"))
    assert found == (expected if device == "cpu" else pytest.approx(expected, rel=2e-2))
    kind = json.loads((sandbox.checkpoints("disturbed")[-1] / "meta.json").read_text())["device"]
    assert kind.startswith("cpu") == (device == "cpu")
    if device == "cpu":
        assert_same_tensors(sandbox.final_tensors("whole"), sandbox.final_tensors("disturbed"))
