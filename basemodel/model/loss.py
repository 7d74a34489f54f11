"""The training loss: document masks, the head, and cross-entropy in chunks, without ever having all logits.

The logits of one GPT-2 small sequence take 200 MB in float32, and so does their gradient: more than all the
activations of the twelve blocks. They are needed only briefly, because the gradient of the mean cross-entropy
with respect to the logits, (softmax - one-hot) / N, follows from the logits alone. So the forward pass
computes a chunk of logits, derives the loss and the gradients of features and head weights from it, and drops
it; the backward pass only scales those gradients. (The idea comes from Cut Cross-Entropy, Wijmans et al.
2024, and Liger Kernel, Hsu et al. 2024, in plain PyTorch.)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basemodel.model.masks import within_documents
from gpt import GPTModel

IGNORED = -100  # targets of this value are ignored, as in F.cross_entropy
# Logits per chunk, in elements. More on accelerators, where accumulating the weight's gradient, once per
# chunk, must stay cheap relative to the matrix products.
CHUNK_LOGITS = {"cpu": 1 << 24}
DEFAULT_CHUNK_LOGITS = 1 << 28


def document_features(model: GPTModel, tokens: Tensor, *, flex: bool = False) -> Tensor:
    """`model.features` of tokens (B, T) that attend to their own document alone; `flex`: FlexAttention."""
    return model.features(tokens, *within_documents(tokens, model.config.end_of_text, flex=flex))


class NextTokenLoss(nn.Module):
    """The model with its loss: the module that DDP wraps."""

    def __init__(self, model: GPTModel, *, document_masking: bool = False) -> None:
        super().__init__()
        self.model, self.document_masking = model, document_masking
        self._chunk: ChunkFunction = chunk_loss_and_gradients

    def compile(self, *, any_size: bool = False) -> None:
        """Compile each block and the loss of a chunk at their next call; `any_size`: for all batch sizes.

        A single graph of all blocks would hold back every gradient until its backward pass ends, so that DDP
        could not all-reduce those of the last blocks meanwhile. Identical blocks are compiled once.
        """
        # Imported here because these take seconds.
        import torch._dynamo.config
        import torch._functorch.config

        torch._dynamo.config.recompile_limit = 32  # all blocks share one code, compiled for each shape

        # On a CPU keep 60% of the activations and recompute the cheap ones: as fast with 10% less memory.
        on_cpu = self.model.out_head.weight.device.type == "cpu"
        torch._functorch.config.activation_memory_budget = 0.6 if on_cpu else 1.0
        dynamic = None if any_size else False  # None: from the second size on
        torch._dynamo.config.optimize_ddp = False  # it would cut graphs at buckets; blocks are small enough
        for block in self.model.trf_blocks:
            block.compile(dynamic=dynamic)
        self._chunk = torch.compile(chunk_loss_and_gradients, dynamic=dynamic)

    @property
    def is_compiled(self) -> bool:
        return self._chunk is not chunk_loss_and_gradients

    def uncompile(self) -> None:
        for block in self.model.trf_blocks:
            block._compiled_call_impl = None
        self._chunk = chunk_loss_and_gradients

    def forward(self, sequences: Tensor, loss_scale: Tensor | None = None) -> Tensor:
        """Map sequences (B, T + 1) to the mean cross-entropy in nats per token, a scalar.

        `loss_scale` is what the caller will multiply the loss by, for fp16.
        """
        features = self._features(sequences[:, :-1]).flatten(0, 1)  # (B * T, C)
        weight, targets = self.model.out_head.weight, sequences[:, 1:].flatten()
        chunks = Chunks(function=self._chunk)
        return chunked_cross_entropy(features, weight, targets, loss_scale=loss_scale, chunks=chunks)

    def _features(self, tokens: Tensor) -> Tensor:
        if not self.document_masking:
            return self.model.features(tokens)
        # FlexAttention skips masked blocks when compiled for a GPU; it does not support dropout.
        flex = tokens.device.type == "cuda" and self.is_compiled and self.model.config.drop_rate == 0
        return document_features(self.model, tokens, flex=flex)


def chunk_loss_and_gradients(
    features: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk of features (n, C), and its gradient with respect to the logits, (n, V),
    times `factor`.

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
    scale = counts[:, None].to(logits.dtype) if factor is None else counts[:, None] * factor
    loss = -(of_targets.squeeze(1) * counts).sum()
    # The gradient is the softmax minus one at the target, subtracted before rounding.
    if torch.compiler.is_compiling():  # one kernel; scatter_ would be another
        columns = torch.arange(len(weight), device=weight.device)
        gradient = (log_probabilities.exp() - (columns == rows).to(logits.dtype)) * scale
    else:
        gradient = log_probabilities.exp_().scatter_add_(1, rows, -torch.ones_like(of_targets)).mul_(scale)
    return loss, gradient.to(features.dtype)


ChunkFunction = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


class Chunks(NamedTuple):
    """How the loss is computed in chunks."""

    tokens: int | None = None  # per chunk; None: as many as CHUNK_LOGITS allows
    function: ChunkFunction = chunk_loss_and_gradients
    gradients: bool = True  # whether any are needed


def chunk_count(tokens: int, vocab_size: int, device: str) -> int:
    """Into how many chunks the loss is cut: of equal size, where less than twice as many as needed make them,
    because compiled code is specialized for a size."""
    least = math.ceil(tokens * vocab_size / CHUNK_LOGITS.get(device, DEFAULT_CHUNK_LOGITS))
    return next((count for count in range(least, 2 * least) if tokens % count == 0), least)


def chunked_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_scale: Tensor | None = None,
    chunks: Chunks = Chunks(),  # noqa: B008
) -> Tensor:
    """`F.cross_entropy(features @ weight.T, targets)` for features (N, C), weight (V, C), targets (N,).

    The value and both gradients are equal up to rounding, with products in autocast's precision. For fp16,
    `loss_scale`, by which the caller will multiply the loss, scales the gradients as they are computed,
    because no later scaling recovers what has been rounded to zero. The backward pass may run only once,
    because it scales the gradients in place.
    """
    if torch.is_autocast_enabled(features.device.type):
        features = features.to(torch.get_autocast_dtype(features.device.type))
    tokens = chunks.tokens
    if tokens is None:
        tokens = math.ceil(len(features) / chunk_count(len(features), len(weight), features.device.type))
    gradients = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    chunks = chunks._replace(tokens=tokens, gradients=gradients)
    return _ChunkedCrossEntropy.apply(features, weight, targets, loss_scale, chunks)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, targets: Tensor, loss_scale: Tensor | None, chunks: Chunks
    ) -> Tensor:
        vocab_size, count = weight.shape[0], (targets != IGNORED).sum()
        factor = None if loss_scale is None else loss_scale / count
        # GPUs multiply in tiles, so for them the copy used in products is padded to a multiple of 64 rows.
        padding = -vocab_size % 64 if features.device.type == "cuda" else 0
        padded = F.pad(weight.to(features.dtype), (0, 0, 0, padding))
        loss = features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
        if chunks.gradients:
            features_gradient = torch.empty_like(features)
            weight_gradient = torch.zeros_like(padded, dtype=weight.dtype)
        with torch.autocast(features.device.type, enabled=False):
            for first in range(0, len(features), chunks.tokens):
                chunk = features[first : first + chunks.tokens]
                chunk_targets = targets[first : first + chunks.tokens]
                chunk_loss, gradient = chunks.function(chunk, padded, chunk_targets, vocab_size, factor)
                loss += chunk_loss
                if chunks.gradients:
                    torch.mm(gradient, padded, out=features_gradient[first : first + chunks.tokens])
                    _add_product(weight_gradient, gradient.T, chunk)
        if chunks.gradients:
            # The saved gradients are those of the loss times this.
            multiple = count if loss_scale is None else loss_scale
            ctx.save_for_backward(features_gradient, weight_gradient[:vocab_size], multiple)
        return loss / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features_gradient, weight_gradient, multiple = ctx.saved_tensors
        scale = gradient / multiple
        return (
            (features_gradient * scale).to(features_gradient.dtype),
            weight_gradient.mul_(scale),
            *[None] * 3,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to a total in float32, without rounding the product to half precision where CUDA can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
