"""The shape of a model: the keys of `model.json`."""

from dataclasses import dataclass
from typing import Literal

from basemodel.common.errors import InputError


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
    init: Literal["pytorch", "gpt2", "zero"] = "pytorch"
    tokenizer: Literal["gpt2", "bytes", "dataset"] = "gpt2"  # dataset: the data set's own tokenizer.json
    end_of_text_id: int | None = None  # of the tokenizer "dataset"; null: read from its file

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        size, width, heads, rate = self.vocab_size, self.emb_dim, self.n_heads, self.drop_rate
        if size > 65_536:
            raise InputError(f"vocab_size must be at most 65536 (tokens are uint16), not {size}")
        if width % heads != 0:
            raise InputError(f"emb_dim {width} must be a multiple of n_heads {heads}")
        if not 0.0 <= rate < 1.0:
            raise InputError(f"drop_rate must be at least 0 and below 1, not {rate}")
        if self.end_of_text_id is not None and self.tokenizer != "dataset":
            raise InputError('end_of_text_id has no effect without "tokenizer": "dataset"')
        if not 0 <= (self.end_of_text_id or 0) < size:
            raise InputError(f"end_of_text_id must be from 0 to {size - 1}, not {self.end_of_text_id}")

    @property
    def end_of_text(self) -> int:
        """The token that ends each document; the last one where no data set has said which."""
        own = self.vocab_size - 1 if self.end_of_text_id is None else self.end_of_text_id
        return {"gpt2": 50_256, "bytes": 256, "dataset": own}[self.tokenizer]

    @property
    def hidden_parameters(self) -> int:
        """Weights of the blocks' matrices: four of attention, two of the feed-forward layer."""
        return 12 * self.n_layers * self.emb_dim**2

    @property
    def parameters(self) -> int:
        """The number of parameters; tied ones count once."""
        heads = self.vocab_size * self.emb_dim * (1 if self.tie_weights else 2)
        per_layer = (13 if self.qkv_bias else 10) * self.emb_dim  # biases and norms
        positions, final_norm = self.context_length * self.emb_dim, 2 * self.emb_dim
        return heads + self.hidden_parameters + self.n_layers * per_layer + positions + final_norm

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward: 6 per parameter of a matrix product, plus
        attention's 12 * L * C * T (PaLM, Chowdhery et al. 2022, appendix B)."""
        products = self.hidden_parameters + self.vocab_size * self.emb_dim
        return 6 * products + 12 * self.n_layers * self.emb_dim * self.context_length
