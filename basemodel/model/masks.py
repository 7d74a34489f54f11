"""What attention looks at: masks and the key-value cache.

Shapes: B sequences, T new tokens of S in all, H heads of D = C / H.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

# A boolean (B, 1, T, S), true where a query attends to a key, or FlexAttention's BlockMask; None: causal.
AttentionMask = Tensor | BlockMask
BLOCK = 128  # FlexAttention skips blocks of so many queries and keys


def within_documents(tokens: Tensor, end_of_text: int, *, flex: bool) -> tuple[Tensor, AttentionMask | None]:
    """The positions (B, T) of tokens (B, T) in their document, and a mask that confines attention to it.

    As a target, end-of-text closes a document; as an input, it starts the next one, whose first token is
    predicted from it. So no document's loss depends on another document. NextTokenLoss calls this.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    starts = torch.where(tokens == end_of_text, index, 0).cummax(dim=1).values  # of each token's document
    if flex:
        return index - starts, block_mask(starts)
    return index - starts, ((index <= index[:, None]) & (index >= starts[:, :, None]))[:, None]


def block_mask(starts: Tensor) -> BlockMask:
    """FlexAttention's mask, causal and within documents; `starts` (B, T): where each token's document starts.

    It is create_block_mask's, which would look at every pair of tokens, for each microbatch.
    """

    def attends(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= starts[b, q])

    T = starts.shape[1]
    blocks = torch.arange(-(-T // BLOCK), device=starts.device)
    padded = torch.cat([starts, starts[:, -1:].expand(-1, -T % BLOCK)], dim=1)[:, None]
    first, last = padded[:, :, ::BLOCK, None], padded[:, :, BLOCK - 1 :: BLOCK, None]  # (B, 1, blocks, 1)
    # In a full block every query attends to every key. Starts never fall from one query to the next.
    full = (blocks < blocks[:, None]) & (blocks * BLOCK >= last)
    partial = (blocks <= blocks[:, None]) & (blocks >= first // BLOCK) & ~full
    lists = []
    for kept in (partial, full):
        order = kept.int().argsort(dim=-1, descending=True, stable=True)
        lists += [kept.sum(-1, dtype=torch.int32), order.int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=(T, T))


class Cache:
    """Keys and values of the tokens read so far, so that only new tokens are computed: `size` per row, of
    which the first `padding` (B,) are padding and get no attention."""

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
