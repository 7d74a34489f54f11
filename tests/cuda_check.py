"""The GPU path on tensors that claim to be on a GPU: `make cuda-check`, which needs no GPU but a CUDA build.

They have no data, but each operation looks at the devices of its operands, so that a tensor left on the CPU
raises. autograd's engine looks for a real device, so a backward pass cannot be run like this.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpointing
from basemodel.model import loss
from basemodel.model.config import GPTConfig
from basemodel.model.masks import within_documents
from basemodel.training import optimizer
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from gpt import GPTModel

if torch.version.cuda is None:
    pytest.skip("this needs a CUDA build of PyTorch", allow_module_level=True)

SMALL = GPTConfig(50257, 1024, 768, 12, 2, drop_rate=0.1, qkv_bias=False)
ON_CUDA = World(0, 0, 1, 1, torch.device("cuda", 0), control=None)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No tensor has data, and autocast believes that there is a GPU."""
    monkeypatch.setattr(torch.amp.autocast_mode, "is_available", lambda _: True, raising=False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode():
        yield


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture
def model(no_data: None) -> GPTModel:
    model = GPTModel.outline(SMALL)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_cuda(*parameter.shape))
    return model


def autocast(precision: str) -> Any:
    return torch.autocast("cuda", PRECISIONS[precision], enabled=precision != "fp32")


def test_a_tensor_on_the_wrong_device_raises(model: GPTModel) -> None:
    """Or the others would show nothing."""
    with pytest.raises(RuntimeError, match="device"):
        model.features(torch.empty(2, 16, dtype=torch.int64))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_forward_and_validation(model: GPTModel, precision: str, training: bool, masking: bool) -> None:
    model.train(training)
    module = loss.NextTokenLoss(model, document_masking=masking)
    with torch.no_grad(), autocast(precision):
        found = module(on_cuda(2, 1025, dtype=torch.int64))
    assert (found.device, found.dtype, found.shape) == (ON_CUDA.device, torch.float32, ())


def test_block_masks(model: GPTModel) -> None:
    positions, mask = within_documents(on_cuda(2, 1024, dtype=torch.int64), 50256, flex=True)
    assert positions.device == mask.kv_indices.device == mask.full_q_indices.device == ON_CUDA.device


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_loss_with_its_gradients(precision: str, scaled: bool) -> None:
    """As its forward pass computes them: in chunks, the head's summed in float32."""
    kept: list[Tensor] = []
    ctx = SimpleNamespace(save_for_backward=lambda *tensors: kept.extend(tensors))
    features, weight = on_cuda(8192, 768, dtype=PRECISIONS[precision]), on_cuda(50257, 768)
    targets, scale = on_cuda(8192, dtype=torch.int64), on_cuda() if scaled else None
    found = loss._ChunkedCrossEntropy.forward(ctx, features, weight, targets, scale, loss.Chunks(4096))
    assert {tensor.device for tensor in (found, *kept)} == {ON_CUDA.device}
    assert [tensor.dtype for tensor in kept[:2]] == [PRECISIONS[precision], torch.float32]
    assert kept[1].shape == weight.shape


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_of_the_optimizer(model: GPTModel, kind: str, precision: str) -> None:
    found = optimizer.make_optimizer(model, TrainConfig("a/b", 1, 1, optimizer=kind), precision, ON_CUDA)
    optimizer.allocate_state(found)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step_if(on_cuda() > 0, found, torch.amp.GradScaler("cuda", enabled=False))
    state = checkpointing.optimizer_tensors(model, found)
    assert {tensor.device for tensor in state.values()} == {ON_CUDA.device} and len(state) > 30


def test_the_copy_of_a_checkpoint(model: GPTModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more))
    tensors = model.tensors()
    with checkpointing.Saver(tmp_path, None, tmp_path / "log") as saver:
        saver.copy(tensors, {})
    assert {tensor.device.type for tensor in saver._copied[0].values()} == {"cpu"}
