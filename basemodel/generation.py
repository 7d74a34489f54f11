"""How a model continues a text."""

import math
from collections.abc import Sequence

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from basemodel.attention import Cache
from basemodel.errors import RunError, require
from gpt import GPTModel

BATCH_SIZE = 32


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
        new = tokens[:, start + cache.length :]
        features = model.features(new, *cache.read_on(new.shape[1]), cache)
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


def encode_prompt(tokenizer: tiktoken.Encoding, prompt: str, vocab_size: int) -> list[int]:
    """The prompt's tokens; of an empty one the end of the text before. Raises InputError for tokens outside
    the model's vocabulary."""
    tokens = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    require(max(tokens) < vocab_size, f"the prompt has tokens outside the model's vocabulary of {vocab_size}")
    return tokens


def continuations(
    model: GPTModel,
    tokenizer: tiktoken.Encoding,
    prompts: Sequence[str],
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """What the model adds to each prompt: at most `count` tokens, up to the end of the text.

    Prompts of like length are continued together, padded on the left to one length.
    """
    encoded = [encode_prompt(tokenizer, prompt, model.config.vocab_size) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    texts = [""] * len(prompts)
    device = model.tok_emb.weight.device
    for first in tqdm(range(0, len(order), BATCH_SIZE), unit="batch", disable=None, leave=False):
        batch = order[first : first + BATCH_SIZE]
        longest = len(encoded[batch[-1]])
        padding = [longest - len(encoded[index]) for index in batch]
        rows = [[0] * empty + encoded[index] for index, empty in zip(batch, padding, strict=True)]
        continued = generate(
            model,
            torch.tensor(rows, device=device),
            count,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
            padding=torch.tensor(padding, device=device),
            stop=tokenizer.eot_token,
        )
        for index, row in zip(batch, continued[:, longest:].tolist(), strict=True):
            new = row[: row.index(tokenizer.eot_token)] if tokenizer.eot_token in row else row
            # A vocabulary may be larger than its tokenizer's: what stands for no text is left out.
            texts[index] = tokenizer.decode([token for token in new if token < tokenizer.n_vocab])
    return texts
