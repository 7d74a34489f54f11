"""What a training step takes, by formulas: memory, matrix products and memory traffic.

They hold for this architecture; their terms follow from the code of model, loss and optimizers. The factors
of traffic and the numbers of kernels were fitted to counts of every operation, to within 1% of them.
benchmarks/footprint.py compares memory with that of real steps.
"""

import math
from dataclasses import dataclass

from basemodel.model.config import GPTConfig
from basemodel.model.loss import chunk_count
from basemodel.training.config import TrainConfig

# Bytes moved for each activation (tokens x width x layers), hidden weight and logit, by whether the step is
# compiled and by the bytes of an element
TRAFFIC = {
    (True, 2): (128, 24, 10),
    (True, 4): (200, 14, 20),
    (False, 2): (194, 26, 44),
    (False, 4): (236, 16, 36),
}


@dataclass(frozen=True)
class Work:
    """What part of a step does, in numbers that are the same on every machine."""

    flops: float = 0.0  # of matrix products and attention
    products: float = 0.0  # elements that those yield
    bytes: float = 0.0  # that all other operations read and write
    kernels: float = 0.0


@dataclass(frozen=True)
class Step:
    """A training step on one device, with microbatches of one size. Symbols below: N tokens in sequences of
    T, width C, H heads, L layers, vocabulary V, and e bytes for each element of matrix products."""

    model: GPTConfig
    config: TrainConfig
    microbatch: int
    device: str = "cuda"  # or "cpu"

    @property
    def tokens(self) -> int:
        """N, the tokens of a microbatch."""
        return self.microbatch * self.model.context_length

    @property
    def compiled(self) -> bool:
        return self.config.compiles_on(self.device)

    @property
    def element(self) -> int:
        """e: 2 bytes in half precision, else 4; "auto" is half precision on every GPU."""
        half = "bf16", "fp16", *(["auto"] if self.device == "cuda" else [])
        return 2 if self.config.precision in half else 4

    @property
    def residual(self) -> int:
        """Bytes per element of the residual stream: 2 with bf16, otherwise 4."""
        return 2 if self.element == 2 and self.config.precision != "fp16" else 4

    @property
    def chunks(self) -> int:
        return chunk_count(self.tokens, self.model.vocab_size, self.device)

    @property
    def rows(self) -> int:
        """V, padded on a GPU as the loss pads the head."""
        return self.model.vocab_size + (-self.model.vocab_size % 64 if self.device == "cuda" else 0)

    def memory(self, *, processes: int = 1, accumulates: bool = True) -> dict[str, float]:
        """Bytes by part when their sum is largest: as the loss is computed, or as the optimizer steps.

        Without gradient accumulation gradients come as activations go, so only the second moment has them.
        With several processes they are then in DDP's buckets.
        """
        weights = 4 * self.model.parameter_count
        with_one = self.model.hidden_parameters if self.config.optimizer == "muon" else 0
        lasting = {"weights": weights, "optimizer": 2 * weights - 4 * with_one}
        if processes > 1:
            lasting["buckets"] = weights
        in_loss = lasting | {"activations": self._activations(), "logits": self._logits()}
        if accumulates:
            in_loss["gradients"] = weights
        in_update = lasting if processes > 1 else lasting | {"gradients": weights}
        return max(in_loss, in_update, key=lambda parts: sum(parts.values()))

    def _activations(self) -> float:
        """Bytes that the forward pass keeps. For each layer: its input and the halfway sum, in float32 unless
        compiled, because layer_norm casts them; both norms, queries, keys, values, attention's output, GELU's
        input and output, in e bytes."""
        shape, e, on_cpu = self.model, self.element, self.device == "cpu"
        C, H, L, T = shape.emb_dim, shape.n_heads, shape.n_layers, shape.context_length
        per_token = (8 + 14 * e) * C + 4 * H + 16
        copies = (24 if e == 2 else 12) * C * C  # of weights in half precision, else of q, k and v joined
        if self.compiled:  # the halfway sum is computed again from its second term
            per_token = (self.residual + 15 * e) * C + 4 * H
        if self.compiled and on_cpu:  # so are norms and GELU's output
            per_token, copies = 36 * C + 4 * H, 0
        if shape.drop_rate > 0:  # masks, on a CPU in floating point; there attention keeps its scores too
            eager_cpu = on_cpu and not self.compiled
            per_token += (8 if eager_cpu else 2) * C
            per_token += (12 if eager_cpu else 6) * H * T if on_cpu else 0
        flex_attention = self.compiled and shape.drop_rate == 0  # which needs no mask of T x T
        if self.config.document_masking and not on_cpu and not flex_attention:
            per_token += T * e
        return L * (self.tokens * per_token + copies) + self.tokens * (8 * C + 16)

    def _logits(self) -> float:
        """Bytes that the loss takes: a chunk's logits in several forms, the head's copy and gradients, the
        features with their gradient."""
        C, V, e = self.model.emb_dim, self.model.vocab_size, self.element
        # Of a logit's bytes, some belong to the gradient of the chunk before.
        forms = (3 * e if self.compiled else {2: 10, 4: 8}[e]) + (e if self.chunks > 1 else 0)
        chunk = math.ceil(self.tokens / self.chunks) * self.rows * forms
        return chunk + 2 * e * self.rows * C + 4 * V * C + 4 * C * self.tokens

    def microbatch_work(self) -> Work:
        """Forward and backward of a microbatch."""
        shape, N, rows = self.model, self.tokens, self.rows
        C, L, T, hidden = shape.emb_dim, shape.n_layers, shape.context_length, shape.hidden_parameters
        # Attention's backward pass computes the scores again: five products for the forward pass's two.
        flops = 6 * N * (hidden + rows * C) + 14 * L * N * T * C
        products = N * (18 * L * C + rows + C) + hidden + self.chunks * rows * C
        per_activation, per_weight, per_logit = TRAFFIC[self.compiled, self.element]
        if self.compiled and self.residual == 2:
            per_activation -= 32  # TRAFFIC counts a residual stream in float32
        traffic = N * (per_activation * L * C + per_logit * rows + 70 * C) + per_weight * hidden
        traffic += (63 + 6 * self.chunks) * shape.vocab_size * C
        if shape.drop_rate > 0:
            traffic += (8 if self.compiled else 24) * N * L * C
        kernels = 38 * L + 33 + 6 * self.chunks if self.compiled else 63 * L + 33 + 23 * self.chunks
        return Work(flops, products, traffic, kernels)

    def validation_work(self) -> Work:
        work, products = self.microbatch_work(), 10 * self.model.n_layers * self.model.emb_dim + self.rows
        return Work(work.flops / 3, self.tokens * products, 0.45 * work.bytes, work.kernels / 3)

    def update_work(self, *, shared_by: int = 1) -> Work:
        """Clipping and the optimizer; `shared_by`: GPUs that share Muon's products, 15 for each matrix."""
        shape, muon = self.model, self.config.optimizer == "muon"
        C, L, clips = shape.emb_dim, shape.n_layers, self.config.clipping_max_norm is not None
        traffic = (44 + 8 * clips) * shape.parameter_count + (66 * shape.hidden_parameters if muon else 0)
        kernels = (13 + 13 * clips) * L + 28 + 9 * clips + 70 * muon
        share = muon / shared_by
        return Work(share * 300 * L * C**3, share * 120 * L * C**2, traffic, kernels)
