"""What costs figures when a GPU is lent for minutes: stages that hang, die or are late, and wrong clocks.

test_benchmarks.py rehearses all stages.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, Script, wait_for
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel

from basemodel.common.errors import RunError
from basemodel.training import backend

sys.path.insert(0, str(ROOT / "benchmarks"))
import lease
from gpu_parts import Setup, Training

Figures = list[dict]

STAGE = """
import json, os, sys, time
for stage in sys.argv[sys.argv.index("--worker") + 1].split(","):
    print(json.dumps({"stage": stage, "begins": True}), flush=True)
    print("what is no figure", flush=True)
    print(json.dumps({"stage": stage, "figure": os.getpid()}), flush=True)
    if stage == "eager":
        time.sleep(60)
    if stage == "compiled":
        sys.exit(3)
    print(json.dumps({"stage": stage, "seconds": 0.1, "ends": True}), flush=True)
"""


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[lease.Lease, Figures]]:
    """A lease without a GPU, in this process, and the figures that it has given."""
    given: Figures = []
    monkeypatch.setattr(lease.Lease, "give", lambda _, **figures: given.append(figures))
    setup = Setup(None, tiny=True, device_name="no GPU", device_gib=0.0, folder=tmp_path)
    with contextlib.closing(setup):
        yield lease.Lease(setup, tmp_path), given


def figures_in(folder: Path) -> Figures:
    return [json.loads(line) for line in (folder / "lease.jsonl").read_text().splitlines()]


def test_a_stage_that_hangs_or_dies_costs_the_next_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "worker.py").write_text(STAGE)
    monkeypatch.setattr(lease, "SCRIPT", tmp_path / "worker.py")
    monkeypatch.setattr(lease, "STAGES", dict.fromkeys(lease.STAGES, (None, 1.0)))
    assert lease.conduct(["facts", "eager", "compiled", "best"], tmp_path, 1.0, []) == 1
    found = figures_in(tmp_path)
    ends = [(line["stage"], line.get("problem")) for line in found if "figure" not in line]
    assert ends == [
        ("facts", None),
        ("eager", "killed: out of time"),
        ("compiled", "ended with status 3"),
        ("best", None),
    ]
    assert [line["stage"] for line in found if "figure" in line] == ["facts", "eager", "compiled", "best"]
    assert (tmp_path / "lease.log").read_text() == "what is no figure\n" * 4
    monkeypatch.setattr(lease, "STAGES", dict.fromkeys(lease.STAGES, (None, 60.0)))
    assert lease.conduct(["facts", "eager", "best"], tmp_path, 0.03, []) == 1
    assert figures_in(tmp_path)[-1] == {"stage": "best", "problem": "not begun: out of time"}


def test_what_is_stopped_from_outside_leaves_no_process_on_the_gpu(tmp_path: Path) -> None:
    """Nor one in a session of its own, which outlives the command on a machine that is lent."""
    (tmp_path / "worker.py").write_text(STAGE)
    before = f"import sys; sys.path.append({str(ROOT / 'benchmarks')!r}); import lease, pathlib; "
    before += f"lease.SCRIPT = pathlib.Path({str(tmp_path / 'worker.py')!r})"
    command = ["benchmarks/gpu.py", "lease", "--only", "eager", "--out", str(tmp_path)]
    process = Script(command, before=before)
    try:
        log = tmp_path / "lease.jsonl"
        wait_for(lambda: log.exists() and log.read_text().endswith("}\n"), "the first figure")
        worker = figures_in(tmp_path)[0]["figure"]
        assert os.getsid(worker) == os.getsid(process.pid)
        process.signal(signal.SIGTERM)
        assert process.wait(20).returncode == 143
        wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the worker to be gone", seconds=20)
    finally:
        process.kill()


def test_the_idle_share_leaves_out_the_profilers_own_time_and_counts_no_kernel_twice(
    rehearsal: tuple[lease.Lease, Figures], monkeypatch: pytest.MonkeyPatch
) -> None:
    def event(name: str, start: int, end: int, *, annotation: bool = False) -> SimpleNamespace:
        span, took = SimpleNamespace(start=start, end=end), end - start
        cuda, cpu = {"device_type": DeviceType.CUDA}, {"device_type": DeviceType.CPU}
        kind = cpu if name.startswith("cuda") else cuda
        times = {"self_device_time_total": took, "self_cpu_time_total": took}
        return SimpleNamespace(name=name, time_range=span, is_user_annotation=annotation, **times, **kind)

    class SlowProfiler:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> "SlowProfiler":
            time.sleep(0.2)
            return self

        def __exit__(self, *_: object) -> None:
            time.sleep(0.2)

        def events(self) -> list[SimpleNamespace]:
            kernels = event("matmul", 1000, 1400), event("add", 1400, 1500), event("matmul", 1750, 2000)
            calls = [event("cudaLaunchKernel", 900 + n, 901 + n) for n in range(6)]
            return [*calls, *kernels, event("Optimizer.step#AdamW.step", 1300, 1500, annotation=True)]

    monkeypatch.setattr(lease, "profile", SlowProfiler)
    monkeypatch.setattr(lease, "synchronize", lambda _: None)
    here, _ = rehearsal
    here.device = torch.device("cuda")
    found = here.profiled(lambda: None)
    assert found["idle_share"] == pytest.approx(0.25)
    assert found["launches"] == 2
    assert found["kernels"] == {"matmul": pytest.approx(650 / 750, abs=1e-4), "add": pytest.approx(0.1333)}


def test_attention_is_measured_as_training_chooses_it(
    rehearsal: tuple[lease.Lease, Figures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with cuDNN's when that is compared; compiled code on disk must not stand in for the other's."""
    chosen, attend = [], lease.attend
    monkeypatch.setattr(
        lease, "attend", lambda *x: chosen.append(torch.backends.cuda.cudnn_sdp_enabled()) or attend(*x)
    )
    monkeypatch.setattr(lease.Lease, "profiled", lambda _, step: {"kernels": {str(step().shape): 1.0}})
    torch.backends.cuda.enable_cudnn_sdp(True)
    lease.facts(rehearsal[0])
    assert chosen and not any(chosen)
    as_usual = torch.compiler.config.cache_key_tag
    with lease.cudnn_attention():
        backend.set_up_arithmetic("bf16", deterministic=False)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.compiler.config.cache_key_tag != as_usual
    backend.set_up_arithmetic("bf16", deterministic=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.compiler.config.cache_key_tag == as_usual != ""


def test_the_hosts_time_is_taken_once_ddp_no_longer_waits_for_the_device(
    rehearsal: tuple[lease.Lease, Figures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first ten forward passes it does, for timings of its own."""
    passes, before = Counter(), []
    forward = DistributedDataParallel.forward

    def counted(ddp: DistributedDataParallel, *inputs: object) -> torch.Tensor:
        passes[ddp] += 1
        return forward(ddp, *inputs)

    def launching(_: lease.Lease, step: Callable) -> float:
        before.append(passes[step.func.__self__.ddp_module])
        step()
        return 0.125

    monkeypatch.setattr(DistributedDataParallel, "forward", counted)

    monkeypatch.setattr(lease, "launching", launching)
    monkeypatch.setattr(lease.Lease, "profiled", lambda *_: {"launches": 0})
    here, figures = rehearsal
    lease.small(here)
    assert [line["ddp"] for line in figures] == [False, False, True, True]
    assert [line["host_ms"] for line in figures] == [125.0] * 4
    assert len(before) == 4 * 5 and min(before[10:]) > 10


GPU_TESTS = """
import time
from pathlib import Path
import pytest

@pytest.mark.gpu
def test_cuda_deterministic_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.gpu
def test_cuda_deterministic_hangs():
    Path(__file__).with_name("hangs").touch()
    time.sleep(60)
"""


def test_tests_that_fail_are_said_at_once_and_the_rest_costs_no_more_than_the_stage_has(
    rehearsal: tuple[lease.Lease, Figures], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, figures = rehearsal
    (tmp_path / "test_few.py").write_text(GPU_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(lease, "GPU_TESTS", tmp_path / "test_few.py")

    def timer(seconds: float, end: Callable, arguments: list) -> threading.Timer:
        """As it would be if its time were up as soon as a test hangs."""
        assert seconds == pytest.approx(here.setup.left(), abs=5) and seconds < 90

        def end_then() -> None:
            wait_for((tmp_path / "hangs").exists, "the test that hangs")
            end(*arguments)

        return threading.Timer(0, end_then)

    monkeypatch.setattr(lease, "threading", SimpleNamespace(Timer=timer))
    here.setup.limit = 100.0
    began = time.monotonic()
    lease.tests(here)
    assert time.monotonic() - began < 60
    name = "test_few.py::test_cuda_deterministic_fails"
    assert [line["failed"].endswith(name) for line in figures if "failed" in line] == [True]
    assert "one is not two" in next(line["why"] for line in figures if "why" in line)
    assert "1 failed" in figures[-1]["tests"]


def test_a_training_that_comes_too_late_still_gives_its_figures(
    rehearsal: tuple[lease.Lease, Figures],
) -> None:
    here, figures = rehearsal
    training = Training(here.setup, None, "late")
    training.directory.mkdir(parents=True)
    lines = [{"step": step, "tokens": 64 * step, "tokens_per_second": 100.0 * step} for step in range(1, 6)]
    lines[1] |= {"val_loss": 5.5, "checkpoint_seconds": 0.25}
    (training.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match="out of time"), lease.figures_given(here, training):
        raise RunError("out of time after step 5")
    assert figures == [
        {"recipe": "late", "tokens": 128, "val_loss": 5.5},
        {"recipe": "late", "saves": 1, "stall_seconds": 0.25, "longest": 0.25},
        {"recipe": "late", "tokens_per_second": 450.0},
    ]
    figures.clear()
    with lease.figures_given(here, Training(here.setup, None, "never begun")):
        pass
    assert figures == []
