"""The training loss: the head and its cross-entropy in chunks, so that all logits never exist at once.

The logits of one GPT-2 small sequence take 200 MB in float32, and their gradient as much again: more than all
activations of the twelve blocks. They are needed only briefly, because the gradient of the mean cross-entropy
with respect to the logits, (softmax - one-hot) / N, follows from the logits alone. So the forward pass
computes a chunk of logits, derives the loss and the gradients of features and head weights from it, and drops
it; the backward pass only scales those gradients. (The idea is that of Cut Cross-Entropy, Wijmans et al.
2024, and of Liger Kernel, Hsu et al. 2024, in plain PyTorch.)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

from basemodel.attention import within_documents
from gpt import GPTModel

IGNORED = -100  # targets of this value are ignored, as in F.cross_entropy


# Logits per chunk, in elements. More on accelerators, where accumulating the weight's gradient, once per
# chunk, must stay cheap relative to the matrix products.
CHUNK_LOGITS = {"cpu": 1 << 24}


DEFAULT_CHUNK_LOGITS = 1 << 28


def document_features(model: GPTModel, tokens: Tensor) -> Tensor:
    """`model.features` of tokens (B, T) that attend to their own document alone."""
    # FlexAttention skips what is masked, where it is compiled for a GPU; it knows no dropout.
    flex = tokens.is_cuda and torch.compiler.is_compiling() and model.config.drop_rate == 0
    return model.features(tokens, *within_documents(tokens, model.config.end_of_text, flex=flex))


class NextTokenLoss(nn.Module):
    """The model with its loss: the module that DDP wraps."""

    def __init__(self, model: GPTModel, *, document_masking: bool = False) -> None:
        super().__init__()
        self.model = model
        self._eager_features = (
            functools.partial(document_features, model) if document_masking else model.features
        )
        self._features: Callable[[Tensor], Tensor] = self._eager_features
        self._chunk: ChunkFunction = chunk_loss_and_gradients

    def compile(self) -> None:
        """Compile, at their next call, the blocks as one graph and the loss of a chunk as another."""
        if self.model.out_head.weight.device.type == "cpu":
            # Keep 60% of the activations, recompute the cheap ones: as fast on a CPU, in a tenth less memory.
            torch._functorch.config.activation_memory_budget = 0.6
        self._features = torch.compile(self._eager_features, dynamic=False)
        self._chunk = torch.compile(chunk_loss_and_gradients, dynamic=False)

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled graphs are in use."""
        return self._chunk is not chunk_loss_and_gradients

    def uncompile(self) -> None:
        """Undo `compile`."""
        self._features, self._chunk = self._eager_features, chunk_loss_and_gradients

    def forward(self, sequences: Tensor) -> Tensor:
        """Map sequences (B, T + 1) to the mean cross-entropy in nats per token, a scalar."""
        features = self._features(sequences[:, :-1]).flatten(0, 1)  # (B * T, C)
        return chunked_cross_entropy(
            features, self.model.out_head.weight, sequences[:, 1:].flatten(), chunk_function=self._chunk
        )


def chunked_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
    chunk_function: "ChunkFunction | None" = None,
) -> Tensor:
    """`F.cross_entropy(features @ weight.T, targets)` of features (N, C), weight (V, C), targets (N,).

    Equal to it up to rounding, in value and in both gradients, with products in autocast's precision. The
    backward pass may run once: it scales the gradients in place.
    """
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
        if dtype == torch.float16:
            # The loss scale would come too late for gradients computed in the forward pass.
            return F.cross_entropy(F.linear(features, weight).float(), targets, ignore_index=IGNORED)
        features = features.to(dtype)
    if chunk_tokens is None:  # equal chunks, because compiled code is specialized for a size
        most = CHUNK_LOGITS.get(features.device.type, DEFAULT_CHUNK_LOGITS)
        chunks = math.ceil(len(features) * len(weight) / most)
        chunk_tokens = math.ceil(len(features) / chunks)
    wants_gradients = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    chunks = Chunks(chunk_tokens, chunk_function or chunk_loss_and_gradients, wants_gradients)
    return _ChunkedCrossEntropy.apply(features, weight, targets, chunks)


def chunk_loss_and_gradients(
    features: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk of features (n, C), and its gradient with respect to the logits, (n, V).

    Rows of `weight` beyond vocab_size are padding.
    """
    logits = features @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weight.shape[0] > vocab_size:
        logits[:, vocab_size:] = -torch.inf
    counts = targets != IGNORED
    rows = targets.where(counts, 0)[:, None]
    log_probabilities = F.log_softmax(logits, dim=-1)
    of_targets = log_probabilities.gather(1, rows)
    # The gradient is the softmax minus one at the target, subtracted before rounding.
    gradient = log_probabilities.exp_().to(features.dtype)
    gradient.scatter_(1, rows, of_targets.exp().sub(1).to(features.dtype))
    gradient *= counts[:, None]
    return -(of_targets.squeeze(1) * counts).sum(), gradient


ChunkFunction = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Chunks(NamedTuple):
    """How the loss is computed in chunks."""

    tokens: int  # per chunk
    function: ChunkFunction
    gradients: bool  # whether any are wanted


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, chunks: Chunks) -> Tensor:
        vocab_size = weight.shape[0]
        # GPUs multiply in tiles, so there the copy for the products is padded to a multiple of 64 rows.
        padding = -vocab_size % 64 if features.is_cuda else 0
        padded = F.pad(weight.to(features.dtype), (0, 0, 0, padding))
        loss = features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
        if chunks.gradients:
            features_gradient = torch.empty_like(features)
            weight_gradient = torch.zeros_like(weight)
            product = torch.empty_like(padded)
        with torch.autocast(features.device.type, enabled=False):
            for first in range(0, len(features), chunks.tokens):
                chunk = features[first : first + chunks.tokens]
                chunk_loss, gradient = chunks.function(
                    chunk, padded, targets[first : first + chunks.tokens], vocab_size
                )
                loss += chunk_loss
                if chunks.gradients:
                    torch.mm(gradient, padded, out=features_gradient[first : first + chunks.tokens])
                    torch.mm(gradient.T, chunk, out=product)
                    weight_gradient += product[:vocab_size]
        count = (targets != IGNORED).sum()
        if chunks.gradients:
            ctx.save_for_backward(features_gradient, weight_gradient, count)
        return loss / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features_gradient, weight_gradient, count = ctx.saved_tensors
        scale = gradient / count
        return (
            (features_gradient * scale).to(features_gradient.dtype),
            weight_gradient.mul_(scale),
            *[None] * 2,
        )
