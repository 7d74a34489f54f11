"""The GPT-2 model of the published runs, and how it continues a text.

Shapes in comments: B sequences, T tokens each, C = emb_dim, H heads of D = C / H, V = vocab_size. Parameter
names are those of the published models, so that their files load (weights.py).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from basemodel.errors import RunError, require


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, as `model.json` gives it. GPT-2 small: 50257, 1024, 768, 12, 12."""

    vocab_size: int
    context_length: int  # tokens
    emb_dim: int
    n_heads: int
    n_layers: int
    drop_rate: float
    qkv_bias: bool
    tie_weights: bool = False
    init: Literal["pytorch", "gpt2"] = "pytorch"
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        size, width, heads, rate = self.vocab_size, self.emb_dim, self.n_heads, self.drop_rate
        require(size <= 65_536, f"vocab_size must be at most 65536 (tokens are uint16), not {size}")
        require(width % heads == 0, f"emb_dim {width} must be a multiple of n_heads {heads}")
        require(0.0 <= rate < 1.0, f"drop_rate must be at least 0 and below 1, not {rate}")

    @property
    def end_of_text(self) -> int:
        """The token that stands behind each document."""
        return {"gpt2": 50_256, "bytes": 256}[self.tokenizer]


class LayerNorm(nn.Module):
    """Layer normalisation, with the parameter names of the published models."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, eps=1e-5)


class Cache:
    """Keys and values of the tokens that a model has read: reading on costs the work of the new ones alone.

    Room for `size` tokens a row; the first `padding` (B,) of each row are padding and not attended.
    """

    def __init__(self, padding: Tensor, size: int) -> None:
        self.padding, self.size, self.length = padding, size, 0
        self.layers: dict[nn.Module, Tensor] = {}  # keys and values, (2, B, H, size, D)

    def read_on(self, count: int) -> tuple[Tensor, Tensor]:
        """Count `count` more tokens a row as read. Return their positions (B, T), and which of all S tokens
        each of them attends to, (B, 1, T, S)."""
        self.length += count
        columns = torch.arange(self.length, device=self.padding.device)
        new, first = columns[-count:, None], self.padding[:, None, None]
        # Padding attends to itself: a softmax over no tokens would be NaN.
        visible = ((columns <= new) & (columns >= first) | (columns == new))[:, None]
        return (columns[-count:] - self.padding[:, None]).clamp(min=0), visible

    def extend(self, layer: nn.Module, new: Tensor) -> Tensor:
        """Add a layer's keys and values (2, B, H, T, D) of the new tokens; return those of all S tokens."""
        if layer not in self.layers:
            self.layers[layer] = new.new_empty(*new.shape[:3], self.size, new.shape[4])
        self.layers[layer][:, :, :, self.length - new.shape[3] : self.length] = new
        return self.layers[layer][:, :, :, : self.length]


# Which tokens each token attends to, where not all before it: (B, 1, T, S), or in blocks for FlexAttention.
Visible = Tensor | BlockMask


def within_documents(tokens: Tensor, end_of_text: int, *, in_blocks: bool) -> tuple[Tensor, Visible]:
    """For tokens (B, T) that attend to their own document alone: their positions in it (B, T), and the mask.

    An end-of-text closes the document before it as a target, and opens the one behind it as an input: it is
    what the first token is predicted from. So nothing that a document's loss is made of is in another one.
    """
    B, T = tokens.shape
    index = torch.arange(T, device=tokens.device)
    starts = torch.where(tokens == end_of_text, index, 0).cummax(dim=1).values  # of each token's document
    if in_blocks:

        def attends(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (k >= starts[b, q])

        return index - starts, create_block_mask(attends, B, None, T, T, device=tokens.device)
    return index - starts, ((index <= index[:, None]) & (index >= starts[:, :, None]))[:, None]


class Attention(nn.Module):
    """Causal self-attention over H heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads, self.drop_rate = config.n_heads, config.drop_rate
        self.W_query = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_key = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_value = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor, visible: Visible | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        projections = (self.W_query, self.W_key, self.W_value)
        if cache:
            # One token's products take less time than to copy the weights would.
            qkv = torch.cat([projection(x) for projection in projections], dim=-1)
        else:
            # Three matrices in the file, one matrix product on the machine: fewer, larger ones are faster.
            weight = torch.cat([p.weight for p in projections])  # (3C, C)
            bias = torch.cat([p.bias for p in projections]) if self.W_query.bias is not None else None
            qkv = F.linear(x, weight, bias)
        qkv = qkv.view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        k, v = cache.extend(self, torch.stack((k, v))) if cache else (k, v)  # then (B, H, S, D)
        y = self._attend(q, k, v, visible)  # (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible | None) -> Tensor:
        if isinstance(visible, BlockMask):
            return flex_attention(q, k, v, block_mask=visible)
        how = visible, self.drop_rate * self.training, visible is None  # mask, dropout, whether causal
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 256:
            # On CPUs the backward pass of short bf16 attention takes three times as long as in float32.
            with torch.autocast("cpu", enabled=False):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), *how)
        return F.scaled_dot_product_attention(q, k, v, *how)


class FeedForward(nn.Module):
    """Two layers, the hidden one four times as wide, with the tanh form of GELU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if not torch.compiler.is_compiling():
            return self.layers(x)
        x = self.layers[0](x)
        # The same GELU, with one exponential in place of tanh, which takes a compiled CPU kernel far longer.
        return self.layers[2](x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)))


class TransformerBlock(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each with dropout before it is added back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.att = Attention(config)
        self.ff = FeedForward(config)
        self.norm1 = LayerNorm(config.emb_dim)
        self.norm2 = LayerNorm(config.emb_dim)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, visible: Visible | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.drop_shortcut(self.att(self.norm1(x), visible, cache))
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

    def _init_gpt2(self) -> None:
        """Weights normal(0, 0.02), biases zero, and the 2L projections that add to the residual stream scaled
        by 1/sqrt(2L), so that its variance does not grow with depth (Radford et al. 2019, section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith(("att.out_proj.weight", "ff.layers.2.weight"))
                scale = math.sqrt(2 * self.config.n_layers) if residual else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V)."""
        return self.out_head(self.features(tokens))

    def features(
        self, tokens: Tensor, cache: Cache | None = None, *, document_masking: bool = False
    ) -> Tensor:
        """Map tokens (B, T), which follow on those in the cache, to what the head reads, (B, T, C)."""
        length, visible = tokens.shape[1], None
        if cache:
            positions, visible = cache.read_on(length)
        elif document_masking:
            # FlexAttention skips what is masked, where it is compiled for a GPU; it knows no dropout.
            in_blocks = tokens.is_cuda and torch.compiler.is_compiling() and self.config.drop_rate == 0
            positions, visible = within_documents(tokens, self.config.end_of_text, in_blocks=in_blocks)
        else:
            positions = torch.arange(length, device=tokens.device)
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))
        for block in self.trf_blocks:
            x = block(x, visible, cache)
        return self.final_norm(x)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, each once: of two tied tensors the embedding."""
        return {name: p.detach() for name, p in self.named_parameters()}

    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward: 6 per parameter of a matrix product, plus
        attention's 12 * L * C * T (PaLM, Chowdhery et al. 2022, appendix B)."""
        matrices = self.out_head.weight.numel()
        matrices += sum(p.numel() for p in self.trf_blocks.parameters() if p.dim() == 2)
        return 6 * matrices + 12 * self.config.n_layers * self.config.emb_dim * self.config.context_length


@torch.no_grad()
def generate(
    model: GPTModel,
    tokens: Tensor,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    padding: Tensor | None = None,
    stop: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue tokens (B, T), T at least 1, by `count` tokens, or until all rows have drawn the token `stop`;
    return (B, T + count) or less. The first `padding` (B,) tokens of each row are padding.

    Raises RunError if the model gives no numbers. At temperature 0 the likeliest token is taken; otherwise
    one is drawn from the `top_k` likeliest (all when None). Past the context length the model sees the last
    context_length tokens; then all positions move with each token, and a cache saves nothing.
    """
    prompt, size, cache = tokens.shape[1], model.config.context_length, None
    padding = tokens.new_zeros(len(tokens)) if padding is None else padding
    for length in range(prompt, prompt + count):
        if cache is None or cache.length == size or not use_cache:
            start = max(0, length - size)
            cache = Cache((padding - start).clamp(min=0), min(size, prompt + count))
        features = model.features(tokens[:, start + cache.length :], cache)
        logits = model.out_head(features[:, -1]).float()  # (B, V)
        if not logits.isfinite().all():
            raise RunError("the model's logits are no numbers: its weights are damaged, or training diverged")
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None and top_k < logits.shape[-1]:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
            scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
            chosen = torch.multinomial(F.softmax(scaled, dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], dim=1)
        if stop is not None and (tokens[:, prompt:] == stop).any(dim=1).all():
            break
    return tokens
