"""The training step in the manner of the published code, to measure against: plain, and none of it tuned.

Attention materialises its T x T matrix, LayerNorm and GELU are written out, logits are whole and in float32,
the optimiser is torch's as it comes, and the loss is read after every microbatch. It clips and updates as the
run says: the work is that of our side. On CUDA in float16 autocast, elsewhere in float32. Parameter names are
the model's own, so that both sides can start from the same weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig


class PlainLayerNorm(nn.Module):
    """Layer normalisation, written out."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class PlainGELU(nn.Module):
    """The tanh form of GELU, written out."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class PlainAttention(nn.Module):
    """Causal attention with the whole matrix of scores."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.W_query = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_key = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.W_value = nn.Linear(config.emb_dim, config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)
        self.dropout = nn.Dropout(config.drop_rate)
        mask = torch.triu(torch.ones(config.context_length, config.context_length), diagonal=1).bool()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (
            projection(x).view(B, T, self.n_heads, -1).transpose(1, 2)
            for projection in (self.W_query, self.W_key, self.W_value)
        )
        scores = q @ k.transpose(2, 3)
        scores = scores.masked_fill(self.mask[:T, :T], -torch.inf)
        weights = self.dropout(torch.softmax(scores / math.sqrt(C // self.n_heads), dim=-1))
        return self.out_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class PlainBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.att = PlainAttention(config)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(
            nn.Linear(config.emb_dim, 4 * config.emb_dim),
            PlainGELU(),
            nn.Linear(4 * config.emb_dim, config.emb_dim),
        )
        self.norm1 = PlainLayerNorm(config.emb_dim)
        self.norm2 = PlainLayerNorm(config.emb_dim)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.att(self.norm1(x)))
        return x + self.dropout(self.ff.layers(self.norm2(x)))


class PlainGPT(nn.Module):
    """The whole model; `forward` maps tokens (B, T) to logits (B, T, V)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.dropout = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[PlainBlock(config) for _ in range(config.n_layers)])
        self.final_norm = PlainLayerNorm(config.emb_dim)
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tok_emb(tokens) + self.pos_emb(positions))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


def plain_optimizers(model: nn.Module, config: TrainConfig, **options: bool) -> list[torch.optim.Optimizer]:
    """torch's own optimisers as they come: AdamW, and Muon where the run has it; `options` are AdamW's."""
    hidden = [p for p in model.trf_blocks.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    apart = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    decay = config.weight_decay
    adamw = torch.optim.AdamW(rest, config.learning_rate, config.betas, weight_decay=decay, **options)
    if not hidden:
        return [adamw]
    muon = {"lr": config.muon_learning_rate, "momentum": config.muon_momentum, "weight_decay": decay}
    return [torch.optim.Muon(hidden, **muon), adamw]


class PlainTrainer:
    """The plain step with what it needs between steps."""

    def __init__(self, model_config: GPTConfig, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.random_seed)
        self.model = PlainGPT(model_config).to(device)
        self.optimizers = plain_optimizers(self.model, config)
        self.max_norm = config.clipping_max_norm
        self.half = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)

    def step(self, microbatches: list[Tensor]) -> float:
        """One optimiser step over sequences (B, T + 1) each; returns the mean loss, read from the device."""
        total = 0.0
        self.model.zero_grad()
        for sequences in microbatches:
            with torch.autocast(sequences.device.type, torch.float16, enabled=self.half):
                logits = self.model(sequences[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())
            self.scaler.scale(loss / len(microbatches)).backward()
            total += loss.item() / len(microbatches)
        if self.max_norm is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return total
