"""Every branch for CUDA, on a CPU: what would be asked of the libraries, by stand-ins that note it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import MODEL, TRAIN, Sandbox, write_dataset
from torch import Tensor

import checkpointing
import ddp_train
from basemodel.common.errors import InputError, RunError
from basemodel.data import sequences
from basemodel.model import loss, masks, memory
from basemodel.model.config import GPTConfig
from basemodel.training import backend, pending, processes, resume
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from gpt import GPTModel

CUDA = torch.device("cuda", 1)
ON_CUDA = World(rank=1, local_rank=1, size=2, local_size=2, device=CUDA, control=None)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A node with two GPUs, of which this process has the second; the calls that would use them."""
    calls: list[Any] = []
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
    memory.release_memory(CUDA)
    assert emptied == ["cache", "peak"]
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"))


def test_checkpoints_are_copied_to_pinned_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    options: list[dict] = []
    empty_like = torch.empty_like

    def noting(tensor: Tensor, **more: Any) -> Tensor:
        options.append(more)
        return empty_like(tensor, **{**more, "pin_memory": False})

    monkeypatch.setattr(torch, "empty_like", noting)
    with checkpointing.Saver(tmp_path, None, tmp_path / "log") as saver:
        saver.copy({"a": torch.ones(2)}, {})
    assert [(each["device"], each["pin_memory"]) for each in options] == [("cpu", True)]


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
