"""What the training step does on a GPU, as far as a CPU can show: when gradients leave, where they lie, how a
step is skipped, and what fp16 loses."""

import functools
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import forked
from helpers import MODEL, TRAIN
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from basemodel.model.config import GPTConfig
from basemodel.model.loss import Chunks, NextTokenLoss, chunked_cross_entropy
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from ddp_train import Learner
from gpt import GPTModel

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), control=None)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)


def make_learner(world: World = ALONE, **train: Any) -> Learner:
    return Learner(TrainConfig(**{**TRAIN, **train}), GPTConfig(**MODEL), world)


# ------------------------------------------------------------------------------------------------------------
# Gradients under DDP
# ------------------------------------------------------------------------------------------------------------


def graphs_behind(node: Any) -> list[Any]:
    """The compiled graphs among the nodes of an autograd graph."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node for node in seen if "CompiledFunction" in node.name()]


@needs_compiler
@forked
def test_compiled_blocks_let_their_gradients_go_while_others_still_run_backward() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss = NextTokenLoss(GPTModel(GPTConfig(**{**MODEL, "n_layers": 8})))
    with pytest.MonkeyPatch.context() as patch:
        # The same graphs, without the code that Inductor would make of them
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        loss.compile()
    # A block has 50 kB of gradients: about one bucket for each.
    parallel = DistributedDataParallel(loss, bucket_cap_mb=0.05, gradient_as_bucket_view=True)
    events = []

    def note(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        events.append("bucket")
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel.register_comm_hook(None, note)
    for _ in range(2):  # buckets are rebuilt in the order of the first backward pass
        events.clear()
        total = parallel(torch.randint(64, (2, 17)))
        graphs = graphs_behind(total.grad_fn)
        for graph in graphs:
            graph.register_prehook(lambda *_: events.append("graph"))
        total.backward()
    assert len(graphs) == 8
    buckets = events.count("bucket")
    last_graph = len(events) - events[::-1].index("graph")
    assert buckets >= 7 and events[:last_graph].count("bucket") >= buckets / 2, events


@forked
def test_ddp_averages_gradients_as_it_copies_them_and_nothing_clears_them() -> None:
    """No pass over gradients but one that copies them to DDP's buckets, whatever the accumulation."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    two = World(rank=0, local_rank=0, size=2, local_size=2, device=torch.device("cpu"), control=None)
    learner = make_learner(two)
    assert all(parameter.grad is None for parameter in learner.model.parameters()), "old buckets are free"
    matrix = list(learner.model.trf_blocks[0].ff.layers[0].weight.shape)
    for accumulation in (1, 2):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            learner.train_step(list(torch.randint(64, (accumulation, 2, 17))), 0.01)
        assert all(parameter.grad is None for parameter in learner.model.parameters())
        calls = [event.name for event in profiler.events() if matrix in (event.input_shapes or [])]
        assert not {"aten::zero_", "aten::div_", "aten::fill_"} & set(calls), calls
        assert calls.count("aten::add_") <= 2 * (accumulation - 1), "one for each of its blocks"


# ------------------------------------------------------------------------------------------------------------
# Non-finite steps
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_with_nan_changes_nothing(optimizer: str, precision: str) -> None:
    learner = make_learner(optimizer=optimizer, precision=precision, clipping_max_norm=1.0)
    microbatches = list(torch.randint(64, (2, 2, 17)))
    learner.train_step(microbatches, 0.01)

    def state() -> list[Tensor]:
        kept = [value for state in learner.optimizer.state.values() for value in state.values()]
        return [tensor.clone() for tensor in (*learner.model.state_dict().values(), *kept)]

    before, whole = state(), learner.ddp_module
    learner.ddp_module = lambda *inputs: whole(*inputs) * torch.nan
    *_, finite, _ = learner.train_step(microbatches, 0.01)
    assert not finite
    assert all(map(torch.equal, before, state()))
    learner.ddp_module = whole
    *_, finite, _ = learner.train_step(microbatches, 0.01)
    assert finite and not any(map(torch.equal, before[:3], state()[:3]))


# ------------------------------------------------------------------------------------------------------------
# fp16
# ------------------------------------------------------------------------------------------------------------


def fp16_loss_and_gradients(loss_function: Any, inputs: list[Tensor], scale: Tensor) -> list[Tensor]:
    """The loss, and its gradients as a scaler would leave them, in fp16 autocast."""
    features, weight, targets = inputs
    with torch.autocast("cpu", torch.float16):
        loss = loss_function(features, weight, targets, scale)
    gradients = torch.autograd.grad(loss * scale, (features, weight))
    return [loss, *(gradient / scale for gradient in gradients)]


def whole(features: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weight).float(), targets)


def chunked(features: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    return chunked_cross_entropy(features, weight, targets, loss_scale=scale, chunks=Chunks(100))


def test_the_chunked_fp16_loss_is_as_exact_as_the_whole_one() -> None:
    """Row by row, because AdamW makes as much of the small gradients of rare tokens as of large ones."""
    torch.manual_seed(0)
    inputs = [torch.randn(128, 64), 0.1 * torch.randn(20_000, 64), torch.randint(100, (128,))]
    inputs[0][:, 0], inputs[1][:100, 0] = 1, 12  # the other tokens have a probability of about 6e-8
    inputs[:2] = [tensor.requires_grad_() for tensor in inputs[:2]]
    precise = [inputs[0].double(), inputs[1].double(), inputs[2]]
    loss = F.cross_entropy(precise[0] @ precise[1].T, precise[2])
    expected = [loss, *torch.autograd.grad(loss, precise[:2])]
    scale = torch.tensor(2.0**16)
    theirs, ours = (fp16_loss_and_gradients(function, inputs, scale) for function in (whole, chunked))

    def error(found: Tensor, true: Tensor) -> float:
        return ((found - true).norm(dim=-1) / true.norm(dim=-1)).mean().item()

    for one, other, true in zip(ours, theirs, expected, strict=True):
        assert error(one, true) <= 1.05 * error(other, true) + 1e-7, (error(one, true), error(other, true))


def test_fp16_gradients_overflow_where_those_of_the_whole_loss_do() -> None:
    """So that the scaler sees them, skips the step and halves its scale."""
    torch.manual_seed(0)
    inputs = [torch.randn(256, 16), torch.randn(50, 16), torch.randint(50, (256,))]
    inputs[:2] = [tensor.requires_grad_() for tensor in inputs[:2]]
    for exponent, finite in ((10, True), (40, False)):
        for function in (whole, chunked):
            loss, *gradients = fp16_loss_and_gradients(function, inputs, torch.tensor(2.0**exponent))
            assert loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients) == finite
    inputs[0].data[3] = torch.nan
    for function in (whole, chunked):
        results = fp16_loss_and_gradients(function, inputs, torch.tensor(1024.0))
        assert not any(result.isfinite().all() for result in results)
