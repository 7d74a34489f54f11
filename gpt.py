"""The GPT-2 model of the published runs.

Shapes in comments: B sequences, T tokens each, C = emb_dim, H heads of D = C / H, V = vocab_size. Parameter
names are those of the published models, so that their files load (weights.py).
"""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from basemodel.model.config import GPTConfig as GPTConfig
from basemodel.model.masks import AttentionMask, Cache

RESIDUAL_PROJECTIONS = "att.out_proj", "ff.layers.2"  # their outputs are added to the residual stream


class LayerNorm(nn.Module):
    """Layer normalization, with the parameter names of the published models."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


def residual_stream(x: Tensor) -> Tensor:
    """What blocks add to: in bf16 where autocast computes in it, at half the memory traffic; norms still
    compute in float32. fp16's range would be too small."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return x.bfloat16()
    return x


def linear_together(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Apply several linear layers to `x` and concatenate their outputs along the last dimension."""
    if x.shape[-2] == 1:
        # For a single token, separate products cost less than copying the weights.
        return torch.cat([layer(x) for layer in layers], dim=-1)
    # One large matrix product is faster than several small ones.
    bias = torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None
    return F.linear(x, torch.cat([layer.weight for layer in layers]), bias)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, dropout: float) -> Tensor:
    """Attention of queries (B, H, T, D) to keys and values (B, H, S, D); causal if `mask` is None."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": mask is None}
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 256:
        # On CPUs the backward pass of short bf16 attention takes three times as long as in float32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


class Attention(nn.Module):
    """Causal self-attention over H heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.drop_rate = config.n_heads, config.drop_rate
        self.W_query = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_key = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_value = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor, mask: AttentionMask | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). `mask`: what tokens attend to, for document masking; None: causal."""
        B, T, C = x.shape
        qkv = linear_together(x, self.W_query, self.W_key, self.W_value)  # (B, T, 3C)
        qkv = qkv.view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        k, v = cache.extend(self, torch.stack((k, v))) if cache else (k, v)  # then (B, H, S, D)
        y = attend(q, k, v, mask, dropout=self.drop_rate if self.training else 0.0)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear layers with a hidden width of 4C, and the tanh form of GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each with dropout before the residual addition."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.att = Attention(config)
        self.ff = FeedForward(config)
        self.norm1 = LayerNorm(config.emb_dim)
        self.norm2 = LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, mask: AttentionMask | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.drop_shortcut(self.att(self.norm1(x), mask, cache))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2, for at most context_length tokens at a time."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config) for _ in range(config.n_layers)])
        self.final_norm = LayerNorm(config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        if config.init == "gpt2":
            self._init_gpt2()
        elif config.init == "zero":
            self._init_zero()

    def _init_gpt2(self) -> None:
        """Weights normal(0, 0.02), biases zero, and the 2L projections that add to the residual stream scaled
        by 1/sqrt(2L), so that its variance does not grow with depth (Radford et al. 2019, section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.removesuffix(".weight").endswith(RESIDUAL_PROJECTIONS)
                scale = math.sqrt(2 * self.config.n_layers) if residual else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def _init_zero(self) -> None:
        """PyTorch's defaults, but the projections that add to the residual stream are zero, so that each
        block starts as the identity (Zhang et al. 2019, Fixup), and positions are normal(0, 0.02): the
        default normal(0, 1), as large as the tokens, would drown these out at first."""
        for name, module in self.trf_blocks.named_modules():
            if name.endswith(RESIDUAL_PROJECTIONS):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_emb.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V)."""
        return self.out_head(self.features(tokens))

    def features(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: AttentionMask | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Map tokens (B, T) to the input of the head, (B, T, C).

        `positions`, (B, T) or (T,), are 0 to T - 1 by default; `mask` and `cache` go to attention.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = residual_stream(self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions)))
        for block in self.trf_blocks:
            x = block(x, mask, cache)
        return self.final_norm(x)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, each once; tied weights appear as the embedding."""
        return {name: p.detach() for name, p in self.named_parameters()}

    @classmethod
    def outline(cls, config: GPTConfig) -> Self:
        """A model whose tensors take no memory, for names and shapes."""
        with torch.device("meta"):
            return cls(config)
