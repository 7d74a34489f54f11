"""What attention looks at: masks and the key-value cache.

Shapes: B sequences, T new tokens of S in all, H heads of D = C / H.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# A boolean (B, 1, T, S), true where a query attends to a key, or FlexAttention's BlockMask; None: causal.
AttentionMask = Tensor | BlockMask


def within_documents(tokens: Tensor, end_of_text: int, *, flex: bool) -> tuple[Tensor, AttentionMask | None]:
    """The positions (B, T) of tokens (B, T) in their document, and a mask that confines attention to it.

    As a target, end-of-text closes a document; as an input, it starts the next one, whose first token is
    predicted from it. So no document's loss depends on another document. NextTokenLoss calls this.
    """
    B, T = tokens.shape
    index = torch.arange(T, device=tokens.device)
    starts = torch.where(tokens == end_of_text, index, 0).cummax(dim=1).values  # of each token's document
    if flex:

        def attends(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (k >= starts[b, q])

        return index - starts, create_block_mask(attends, B, None, T, T, device=tokens.device)
    return index - starts, ((index <= index[:, None]) & (index >= starts[:, :, None]))[:, None]


class Cache:
    """Keys and values of the tokens read so far, so that only new tokens are computed.

    It holds `size` tokens per row; the first `padding` (B,) of each row are padding and get no attention.
    """

    def __init__(self, padding: Tensor, size: int) -> None:
        self.padding, self.size, self.length = padding, size, 0
        self.layers: dict[nn.Module, Tensor] = {}  # keys and values, (2, B, H, size, D)

    def read_on(self, count: int) -> tuple[Tensor, Tensor]:
        """Count `count` more tokens per row as read. Returns their positions (B, T) and their mask over all S
        tokens, (B, 1, T, S)."""
        self.length += count
        columns = torch.arange(self.length, device=self.padding.device)
        new, first = columns[-count:, None], self.padding[:, None, None]
        # Padding attends to itself: a softmax over no tokens would be NaN.
        mask = ((columns <= new) & (columns >= first) | (columns == new))[:, None]
        return (columns[-count:] - self.padding[:, None]).clamp(min=0), mask

    def extend(self, layer: nn.Module, new: Tensor) -> Tensor:
        """Add a layer's keys and values (2, B, H, T, D) of the new tokens; return those of all S tokens."""
        if layer not in self.layers:
            self.layers[layer] = new.new_empty(*new.shape[:3], self.size, new.shape[4])
        self.layers[layer][:, :, :, self.length - new.shape[3] : self.length] = new
        return self.layers[layer][:, :, :, : self.length]
