"""The shape of a model: the keys of `model.json`."""

from dataclasses import dataclass
from typing import Literal

from basemodel.common.errors import InputError
from basemodel.common.json_config import check_ranges, key


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, as given in `model.json`. GPT-2 small: 50257, 1024, 768, 12, 12.

    Parameters and FLOPs are counted here, so that counting them does not require torch. Letters as in
    gpt.py: T tokens, C = emb_dim, V = vocab_size, L = n_layers.
    """

    vocab_size: int = key("number of tokens in the vocabulary; token ids are uint16", min=1, max=65_536)
    context_length: int = key("tokens per sequence", min=1)
    emb_dim: int = key("width of the residual stream, a multiple of n_heads", min=1)
    n_heads: int = key("attention heads per block", min=1)
    n_layers: int = key("transformer blocks", min=1)
    drop_rate: float = key("dropout rate of embeddings, attention and feed-forward layers", min=0, below=1)
    qkv_bias: bool = key("whether the query, key and value projections have biases")
    tie_weights: bool = key("whether the output head shares the token embedding's weights", False)
    init: Literal["pytorch", "gpt2", "zero"] = key(
        "initial weights. pytorch: PyTorch's defaults; gpt2: normal(0, 0.02), with residual projections "
        "divided by sqrt(2 x n_layers); zero: pytorch, but residual projections 0, positions normal(0, 0.02)",
        "pytorch",
    )
    tokenizer: Literal["gpt2", "bytes", "dataset"] = key(
        "gpt2; bytes: the 256 bytes and end-of-text; dataset: the data set's tokenizer.json", "gpt2"
    )
    end_of_text_id: int | None = key(
        'id of the end-of-text token, with "tokenizer": "dataset"; null: read from tokenizer.json', None
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.emb_dim % self.n_heads != 0:
            raise InputError(f"emb_dim {self.emb_dim} must be a multiple of n_heads {self.n_heads}")
        if self.end_of_text_id is not None and self.tokenizer != "dataset":
            raise InputError('end_of_text_id has no effect without "tokenizer": "dataset"')
        if not 0 <= (self.end_of_text_id or 0) < self.vocab_size:
            raise InputError(f"end_of_text_id must be 0 to {self.vocab_size - 1}, not {self.end_of_text_id}")

    @property
    def end_of_text(self) -> int:
        """The token that ends each document; the last one if the data set's is not known yet."""
        own = self.vocab_size - 1 if self.end_of_text_id is None else self.end_of_text_id
        return {"gpt2": 50_256, "bytes": 256, "dataset": own}[self.tokenizer]

    @property
    def hidden_parameters(self) -> int:
        """Parameters in the blocks' matrices: 4 x C^2 in attention and 4 + 4 in the feed-forward layers."""
        return 12 * self.n_layers * self.emb_dim**2

    @property
    def parameter_count(self) -> int:
        C, embeddings = self.emb_dim, (1 if self.tie_weights else 2) * self.vocab_size + self.context_length
        vectors = (3 * self.qkv_bias + 1) + (4 + 1) + 4  # biases of attention and feed-forward, two norms
        return embeddings * C + self.hidden_parameters + self.n_layers * vectors * C + 2 * C

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward: 6 per parameter in a matrix product, plus
        attention's 12 * L * C * T (PaLM, Chowdhery et al. 2022, appendix B)."""
        matrices = self.hidden_parameters + self.vocab_size * self.emb_dim
        return 6 * matrices + 12 * self.n_layers * self.emb_dim * self.context_length
