"""The optimised step computes what a plain one does."""

import dataclasses
import functools
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import MODEL, TRAIN, Calls
from reference import PlainTrainer

from basemodel.common.errors import RunError
from basemodel.model.config import GPTConfig
from basemodel.model.loss import (
    IGNORED,
    Chunks,
    NextTokenLoss,
    chunk_count,
    chunk_loss_and_gradients,
    chunked_cross_entropy,
)
from basemodel.training.backend import compile_if_configured
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from basemodel.training.schedule import plan_batches
from ddp_train import Learner
from gpt import GPTModel

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), control=None)


@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "chunk"), [(37, 16, 53, 8), (64, 16, 64, 64), (5, 7, 131, 100)]
)
def test_chunked_loss_and_gradients_equal_the_whole_ones(
    tokens: int, width: int, vocab: int, chunk: int
) -> None:
    torch.manual_seed(0)
    features = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    targets[::4] = IGNORED
    whole = F.cross_entropy(features @ weight.T, targets)
    chunked = chunked_cross_entropy(features, weight, targets, chunks=Chunks(chunk))
    torch.testing.assert_close(chunked, whole, rtol=1e-14, atol=0)
    expected = torch.autograd.grad(3 * whole, (features, weight))
    for one, other in zip(torch.autograd.grad(3 * chunked, (features, weight)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_cross_entropy(features, weight, targets, chunks=Chunks(chunk)), whole
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_chunk_is_the_same_written_for_a_compiler(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """To the bit, with ignored targets, padding and a factor; but without scatter_, a kernel of its own."""
    torch.manual_seed(0)
    features, weight = torch.randn(32, 16).to(dtype), torch.randn(104, 16).to(dtype)
    targets = torch.randint(100, (32,)).where(torch.arange(32) % 5 > 0, IGNORED)
    for factor in (None, torch.tensor(1024.0)):
        eager = chunk_loss_and_gradients(features, weight, targets, 100, factor)
        with monkeypatch.context() as patch, Calls() as calls:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            compiled = chunk_loss_and_gradients(features, weight, targets, 100, factor)
        for one, other in zip(eager, compiled, strict=True):
            assert torch.equal(one, other)
        assert "gather" in calls.count and "scatter_add_" not in calls.count


def test_chunks_are_equal_where_a_few_more_make_them_so() -> None:
    """Compiled code is made for a size."""
    assert chunk_count(32 * 1024, 50_257, "cuda") == 8  # seven would do, but do not divide 32,768
    assert chunk_count(12 * 1024, 50_257, "cuda") == 3
    assert chunk_count(64 * 1024, 50_257, "cuda") == 16
    assert chunk_count(6 * 1021, 50_257, "cuda") == 2
    assert chunk_count(40 * 1021, 50_257, "cuda") == 8, "20 or 40 would be too many"
    assert chunk_count(16, 257, "cuda") == 1


def test_float16_gradients_keep_what_a_loss_scale_saves() -> None:
    """With 8,192 tokens, most gradients are below float16's smallest number before the scale comes in."""
    torch.manual_seed(0)
    features = torch.randn(8192, 8, requires_grad=True)
    weight = (0.1 * torch.randn(2000, 8)).requires_grad_()
    targets = torch.randint(2000, (8192,))
    expected = torch.autograd.grad(F.cross_entropy(features @ weight.T, targets), (features, weight))
    with torch.autocast("cpu", torch.float16):
        loss = chunked_cross_entropy(features, weight, targets)
    found = torch.autograd.grad(65_536 * loss, (features, weight))
    for one, other in zip(found, expected, strict=True):
        assert (one / 65_536 - other).norm() < 0.01 * other.norm()


def losses_of_both(model: dict, precision: str, *, steps: int = 30) -> tuple[list[float], list[float]]:
    """The losses of the plain step and of ours over the same steps from the same weights."""
    model_config = GPTConfig(
        **{**MODEL, "vocab_size": 301, "context_length": 32, "emb_dim": 64, "n_heads": 4, **model}
    )
    config = TrainConfig(
        dataset="a/b", microbatch_size=4, min_train_tokens=1, precision=precision, learning_rate=1e-3
    )
    plain, learner = PlainTrainer(model_config, config, ALONE.device), Learner(config, model_config, ALONE)
    plain.model.load_state_dict(learner.model.state_dict())
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(steps):
        increments = torch.randint(7, (2, 4, 33), generator=generator)
        microbatches = list(increments.cumsum(-1) % 301)
        ours, *_ = learner.train_step(microbatches, config.learning_rate)
        pairs.append((plain.step(microbatches), ours.item()))
    return tuple(zip(*pairs, strict=True))


@pytest.mark.parametrize("model", [{}, {"tie_weights": True, "init": "gpt2"}, {"qkv_bias": True}])
def test_30_steps_have_the_plain_losses_in_float32(model: dict) -> None:
    plain, ours = losses_of_both(model, "fp32")
    assert plain[-1] < plain[0] - 0.5, "something is learnt"
    assert ours == pytest.approx(plain, rel=1e-5)


def test_20_steps_have_the_plain_losses_in_bf16() -> None:
    plain, ours = losses_of_both({"init": "gpt2"}, "bf16", steps=20)
    assert ours == pytest.approx(plain, abs=2e-3)


@pytest.mark.parametrize(
    "shape", [{"half_batch_percent": 50}, {"short_sequence_percent": 50}, {}, {"precision": "fp16"}]
)
def test_nothing_is_left_to_compile_once_training_begins(
    monkeypatch: pytest.MonkeyPatch, shape: dict
) -> None:
    """Neither for half batches nor for short sequences nor for validation nor for fp16's loss scale; a
    compiler that fails for one of them would end the training, and one that does not would make a budget
    believe that steps are slow."""
    compiled: list[int] = []

    def compiler(graph: torch.fx.GraphModule, _inputs: object) -> Callable:
        compiled.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    torch.compiler.reset()
    settings = {**TRAIN, **shape, "validation_interval": 5, "validation_batches": 1}
    config = TrainConfig(
        **{**settings, "microbatch_size": 8, "min_train_tokens": 8 * 16 * 10, "compile": True}
    )
    plan = plan_batches(config, 16, 1, None)
    learner = Learner(config, GPTConfig(**MODEL), ALONE, plan=plan)
    before = len(compiled)
    assert before >= 2 * 2, "a block and the loss, in training and in validation"
    sequences = torch.randint(64, (8, 17))
    for step in range(plan.steps):
        counts = [count for _, count in plan.microbatches(step, 0)]
        learner.train_step([plan.cut(sequences[:count], step) for count in counts], 0.01)
    learner.validation_loss(sequences)
    assert len(compiled) == before
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_the_compiled_step_has_the_same_losses() -> None:
    model_config = GPTConfig(**{**MODEL, "n_layers": 1})
    settings = {**TRAIN, "clipping_max_norm": 1.0}
    eager, compiled = (
        Learner(TrainConfig(**settings, compile=compile), model_config, ALONE) for compile in (False, True)
    )
    assert (eager.loss_module.is_compiled, compiled.loss_module.is_compiled) == (False, True)
    sequences = torch.randint(64, (2, 17))
    for _ in range(5):
        one, *_ = eager.train_step([sequences], 0.01)
        other, *_ = compiled.train_step([sequences], 0.01)
        assert other.item() == pytest.approx(one.item(), rel=1e-5)


def test_a_compiler_that_fails_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler\nfound")

    loss = NextTokenLoss(GPTModel(GPTConfig(**MODEL)))
    cuda = dataclasses.replace(ALONE, device=torch.device("cuda"))
    config = TrainConfig(dataset="a/b", microbatch_size=2, min_train_tokens=1)
    compile_if_configured(loss, config, cuda, broken)
    assert (
        "without torch.compile, which failed: RuntimeError: no C++ compiler found" in capsys.readouterr().out
    )
    assert torch.isfinite(loss(torch.randint(64, (2, 17))))
    with pytest.raises(RunError, match='set "compile" to "auto" or false'):
        compile_if_configured(loss, dataclasses.replace(config, compile=True), ALONE, broken)
