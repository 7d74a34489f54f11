"""Every branch for CUDA, on a CPU: what would be asked of the libraries, by stand-ins that note it."""

import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import MODEL, NO_CHART, TRAIN, Sandbox, assert_same_tensors, write_dataset
from torch import Tensor

import checkpointing
import ddp_train
from basemodel.common.errors import InputError, RunError
from basemodel.data import sequences
from basemodel.model import devices, loss, masks, memory
from basemodel.model.config import GPTConfig
from basemodel.training import backend, microbatch, pending, processes, resume
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from gpt import GPTModel

CUDA = torch.device("cuda", 1)
ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), control=None)
ON_CUDA = World(rank=1, local_rank=1, size=2, local_size=2, device=CUDA, control=None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A node with two GPUs, of which this process has the second; the calls that would use them."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.version, "cuda", None)  # of what is there, nothing is asked for its kernels
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: calls.append(("index", index)))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: calls.append(("init", a, k)))
    monkeypatch.setattr(dist, "new_group", lambda **k: calls.append(("group", k["backend"])))
    monkeypatch.setattr(processes, "store_of_these_processes", lambda *_: dist.HashStore())
    names = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29_500}
    for name, value in {**names, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    return calls


def test_processes_on_gpus_speak_nccl_each_with_its_own_device(two_gpus: list[Any]) -> None:
    world = processes.join_world()
    assert world.device == CUDA
    assert two_gpus[0] == ("index", 1), "before anything else touches a device"
    kind, (backend,), options = two_gpus[1]
    assert (kind, backend, options["device_id"]) == ("init", "nccl", CUDA)
    assert two_gpus[2:] == [("group", "gloo")] * 2, "objects travel on the CPU"


def test_more_processes_than_gpus_are_refused(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes for 2 devices; use --nproc_per_node=2"):
        processes.join_world()


@pytest.fixture
def a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stand-ins for the files of a GPU and of its driver."""
    monkeypatch.setattr(devices, "GPU_FILES", (tmp_path / "nothing", tmp_path / "nvidia0"))
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia0"


def test_a_gpu_with_an_old_driver_is_no_reason_to_train_on_the_cpu(
    a_gpu_that_torch_cannot_use: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = f"{a_gpu_that_torch_cannot_use} is there, but PyTorch {torch.__version__}"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(InputError, match=re.escape(there)) as error:
        processes.join_world()
    assert "for CUDA 13.0 cannot use it with driver 550.54.15; update the driver, or install" in str(
        error.value
    )
    assert str(error.value).endswith("or set CUDA_VISIBLE_DEVICES= to train on the CPU")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="is built without CUDA; install PyTorch with CUDA, or set"):
        processes.join_world()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert processes.join_world().device.type == "cpu"


@pytest.mark.parametrize(
    ("gpu", "built", "supported"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_120"], False),
        ((7, 5), ["sm_75", "sm_80", "sm_90", "sm_120"], True),
        ((8, 6), ["sm_75", "sm_80", "sm_90", "sm_120"], True),
        ((8, 0), ["sm_75", "sm_86", "sm_90a"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((10, 3), ["sm_90", "sm_100", "sm_120"], True),
        ((12, 1), ["sm_90", "sm_100"], False),
        ((12, 1), ["sm_90", "compute_90"], True),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_refused(
    two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch, gpu: tuple, built: list[str], supported: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    if supported:
        assert processes.join_world().device == CUDA
        return
    with pytest.raises(InputError, match=f"Tesla V100 is sm_{gpu[0]}{gpu[1]}, for which PyTorch .* has no"):
        processes.join_world()


def test_without_build_tools_nothing_is_tried_and_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton looks for $CC, gcc and clang, and includes Python.h."""
    module = loss.NextTokenLoss(GPTModel(GPTConfig(**MODEL)))
    config = TrainConfig(**{**TRAIN, "compile": "auto"})
    on_one = World(rank=0, local_rank=0, size=1, local_size=1, device=CUDA, control=None)
    tried: list[Any] = []
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda _: str(tmp_path))
    for tools in ({"gcc"}, {"header"}):  # one of them is not enough
        (tmp_path / "Python.h").unlink(missing_ok=True)
        if "header" in tools:
            (tmp_path / "Python.h").touch()
        monkeypatch.setattr(
            backend.shutil, "which", lambda name, tools=tools: name if name in tools else None
        )
        problem = backend.compile_if_configured(module, config, on_one, tried.append)
        assert "apt install build-essential python3-dev" in problem
        assert (
            capsys.readouterr().out == f"Warning: training without torch.compile, which failed: {problem}\n"
        )
        assert not tried and not module.is_compiled
    monkeypatch.setattr(backend.shutil, "which", lambda name: name == "clang")
    assert backend.compile_if_configured(module, config, on_one, tried.append) is None
    assert tried == [module] and module.is_compiled


def test_a_run_that_could_not_be_compiled_says_so_at_its_end(sandbox: Sandbox) -> None:
    sandbox.write_run()
    broken = (
        "from basemodel.training import backend; backend.compile_if_configured = lambda *_, **__: 'no gcc'"
    )
    said = sandbox.train(before=f"{NO_CHART}; {broken}").splitlines()
    assert said[-6] == "Trained without torch.compile, which failed: no gcc"
    assert said[-5].startswith("Training complete in")
    assert sandbox.status()["compile_problem"] == "no gcc"


def test_ddp_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def ddp(module: torch.nn.Module, **options: Any) -> torch.nn.Module:
        found.update(options)
        return module

    monkeypatch.setattr(ddp_train, "DistributedDataParallel", ddp)
    monkeypatch.setattr(ddp_train.Learner, "_warm_up", lambda *_: None)
    monkeypatch.setattr(GPTModel, "to", lambda self, device: found.update(device=device) or self)
    config = TrainConfig(**{**TRAIN, "compile": False})
    learner = ddp_train.Learner(config, GPTConfig(**MODEL), ON_CUDA)
    assert found == {"device": CUDA, "device_ids": [1], "gradient_as_bucket_view": True}
    assert learner.optimizer.defaults["fused"]


class Noting:
    """Stands in for a tensor and notes what is done with it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.device = CUDA

    def pin_memory(self) -> "Noting":
        self.calls.append("pin")
        return self

    def to(self, target: Any, **options: Any) -> "Noting":
        self.calls.append((target, options))
        return self


def test_tokens_travel_pinned_and_narrow_and_nobody_waits() -> None:
    for device, first in ((CUDA, ["pin"]), (torch.device("cpu"), [])):
        tokens = Noting()
        sequences.to_device(tokens, device)
        assert tokens.calls == [*first, (device, {"non_blocking": True}), (torch.int64, {})]


def test_results_are_read_one_step_late_when_their_event_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.number = calls.count("record") + 1

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append(f"wait for {self.number}")

    class Result(Noting):
        def to(self, target: Any, **options: Any) -> Tensor:
            assert (target, options) == ("cpu", {"non_blocking": True})
            calls.append("copy")
            return torch.tensor([1.0, 2.0, 1.0, 0.0])

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    steps = pending.PendingSteps(CUDA)
    steps.add(1, Result())
    assert steps.read_due() == []
    steps.add(2, Result())
    assert [step for step, _, _ in steps.read_due()] == [1]
    assert [step for step, _, _ in steps.read_all()] == [2]
    assert calls == ["copy", "record", "copy", "record", "wait for 1", "wait for 2"]


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_the_precision_is_the_best_that_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch, supported: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    config = TrainConfig(**{**TRAIN, "precision": "auto"})
    assert backend.choose_precision(config, CUDA) == expected


class OnGPU(Tensor):
    """A tensor that claims to be on a GPU, and so do those computed from it."""

    device = property(lambda self: CUDA)


def test_the_head_is_padded_to_whole_tiles() -> None:
    """And what is padding neither counts nor learns."""
    torch.manual_seed(0)
    features = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(100, 16, dtype=torch.float64, requires_grad=True)
    targets, rows = torch.randint(100, (30,)), []

    def chunk(features: Tensor, weight: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(weight))
        return loss.chunk_loss_and_gradients(features, weight, *more)

    on_gpu = features.as_subclass(OnGPU)
    found = loss.chunked_cross_entropy(on_gpu, weight, targets, chunks=loss.Chunks(10, chunk))
    whole = F.cross_entropy(features @ weight.T, targets)
    assert rows == [128] * 3
    torch.testing.assert_close(found, whole, check_device=False)
    gradients = (torch.autograd.grad(each, (features, weight)) for each in (found, whole))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, check_device=False)


@pytest.mark.parametrize(
    ("compiled", "drop_rate", "chosen"), [(True, 0.0, True), (False, 0.0, False), (True, 0.1, False)]
)
def test_flex_attention_is_chosen_where_it_is_compiled_and_needs_no_dropout(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, drop_rate: float, chosen: bool
) -> None:
    model = GPTModel(GPTConfig(**{**MODEL, "drop_rate": drop_rate, "vocab_size": 257, "tokenizer": "bytes"}))
    module, asked = loss.NextTokenLoss(model, document_masking=True), []
    monkeypatch.setattr(loss.NextTokenLoss, "is_compiled", property(lambda self: compiled))

    def within_documents(tokens: Tensor, end: int, *, flex: bool) -> Any:
        asked.append(flex)
        return masks.within_documents(tokens.as_subclass(Tensor), end, flex=False)

    monkeypatch.setattr(loss, "within_documents", within_documents)
    module(torch.randint(257, (2, 17)).as_subclass(OnGPU))
    assert asked == [chosen]


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    figures = {"max_memory_allocated": 3 * gib, "memory_reserved": 4 * gib}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * gib, 24 * gib))
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: emptied.append("peak"))
    assert memory.peak_memory(CUDA) == 3
    assert memory.headroom(CUDA) == 21
    cycle = type("Cycle", (), {})()  # like the traceback of an attempt that ran out of memory
    cycle.itself, alive = cycle, weakref.ref(cycle)
    del cycle
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cache" if not alive() else ""))
    memory.release_memory(CUDA)
    assert emptied == ["cache", "peak"]
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"))


def test_a_size_that_fits_only_with_allocations_tried_again_is_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = ddp_train.Learner(TrainConfig(**{**TRAIN, "compile": False}), GPTConfig(**MODEL), ALONE)
    assert "GiB free" in microbatch.rehearse(learner, 2)
    retries = iter([3, 4])
    monkeypatch.setattr(memory, "allocation_retries", lambda _: next(retries))
    with pytest.raises(torch.OutOfMemoryError):
        microbatch.rehearse(learner, 2)


def test_segments_expand_where_they_can(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under WSL2, and not where the user has said something else."""
    monkeypatch.setattr(memory, "WSL_DEVICE", Path("/dev/nothing"))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    processes.join_world()
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    processes.join_world()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(memory, "WSL_DEVICE", Path("/dev/null"))
    processes.join_world()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize("can_pin", [True, False])
def test_checkpoints_are_copied_to_one_block_of_memory_pinned_where_that_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, can_pin: bool
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    asked: list[tuple[int, bool]] = []
    empty = torch.empty

    def noting(size: int, *, pin_memory: bool = False, **more: Any) -> Tensor:
        asked.append((size, pin_memory))
        if pin_memory and not can_pin:
            raise RuntimeError("CUDA error: out of memory")
        return empty(size, **more)

    monkeypatch.setattr(torch, "empty", noting)
    model, optimizer = {"a": torch.rand(2, 3)}, {"a.step": torch.tensor(4.0), "a.buffer": torch.rand(3, 2).mT}
    with checkpointing.Saver(tmp_path, None, tmp_path / "log") as saver:
        saver.reserve(model, optimizer)
        for _ in range(2):
            model["a"] += 1
            saver.copy(model, optimizer)
            for copied, tensors in zip(saver._copied, (model, optimizer), strict=True):
                assert_same_tensors(copied, tensors)
                assert all(copy.is_contiguous() for copy in copied.values())
    size = 4 * (6 + 1 + 6)
    assert asked == ([(size, True)] if can_pin else [(size, True), (size, False)])


def test_dropout_on_a_gpu_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(state=torch.arange(16, dtype=torch.uint8))
    there.get_rng_state = lambda: there.state
    there.set_rng_state = lambda state: setattr(there, "state", state)
    monkeypatch.setattr(torch, "get_device_module", lambda device: there)
    saved = resume.rng_state(CUDA)
    there.state = torch.zeros(16, dtype=torch.uint8)
    resume.set_rng_state({"rng": [saved]}, SimpleNamespace(size=1, rank=0, device=CUDA), seed=1)
    assert there.state.tolist() == list(range(16))


def test_errors_of_nccl_are_one_line() -> None:
    nccl = dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error")
    for error in (nccl, dist.DistNetworkError("connection reset")):
        with (
            pytest.raises(RunError, match="another training process died or hung; restart with"),
            processes.lost_processes_explained(),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="CUDA error: an illegal memory access"),
        processes.lost_processes_explained(),
    ):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


OUT_OF_CUDA_MEMORY = """
import functools, gpt, torch
features = gpt.GPTModel.features
def limited(self, tokens, *arguments, **options):
    if len(tokens) > 13:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return features(self, tokens, *arguments, **options)
gpt.GPTModel.features = limited
def backend(graph, inputs):
    print("compiled", flush=True)
    return graph.forward
torch.compile = functools.partial(torch.compile, backend=backend)
"""


def test_the_search_compiles_for_all_sizes_at_once_and_then_for_the_one_found(tmp_path: Path) -> None:
    """A block and the loss, in training and in validation: for 1, for any size, and for the last."""
    sandbox = Sandbox(tmp_path)
    write_dataset(sandbox.datasets / "test/tokens")
    validation = {"validation_interval": 4, "validation_batches": 2}
    batch = {"global_batch_size": None, "gradient_accumulation_steps": 2}
    sandbox.write_run(train={**validation, **batch, "compile": True})
    said = sandbox.train("tiny", "-f", before=OUT_OF_CUDA_MEMORY)
    assert said.splitlines()[-1] == "Max microbatch size was 13"
    assert re.findall(r"microbatch 13: fits, .* GiB free", said)[1:], "once more, as a run compiles it"
    assert said.count("compiled") <= 2 * 2 * 3
