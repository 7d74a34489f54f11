"""Generating text: continuing token sequences, and prompts in batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from basemodel.common.errors import InputError, RunError
from basemodel.common.output import Progress
from basemodel.model.masks import Cache
from gpt import GPTModel

BATCH_SIZE = 32  # prompts at once; the keys and values of one full GPT-2 small sequence take 75 MB


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    temperature: float = 1.0  # 0: always the most likely token
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    generator: torch.Generator | None = None
    stop: int | None = None  # end once every row has produced this token
    use_cache: bool = True  # of keys and values; without it, each token costs a pass over the whole context

    def choose(self, logits: Tensor) -> Tensor:
        """Map logits (B, V) to tokens (B, 1)."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        if 0 < self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        return torch.multinomial(F.softmax(scaled, dim=-1), 1, generator=self.generator)


GREEDY = Sampling(temperature=0)


def random_generator(model: GPTModel, seed: int | None) -> torch.Generator:
    """A random number generator on the model's device; without a seed, different every time."""
    generator = torch.Generator(model.tok_emb.weight.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def generate(
    model: GPTModel, tokens: Tensor, count: int, sampling: Sampling, padding: Tensor | None = None
) -> Tensor:
    """Continue tokens (B, T) as `stream` does; return (B, T + count) or fewer columns."""
    return torch.cat([tokens, *stream(model, tokens, count, sampling, padding)], dim=1)


@torch.no_grad()
def stream(
    model: GPTModel, tokens: Tensor, count: int, sampling: Sampling, padding: Tensor | None = None
) -> Iterator[Tensor]:
    """Continue tokens (B, T), T at least 1, by up to `count` tokens; yield each column (B, 1) at once.

    The first `padding` (B,) tokens of each row are ignored. Past the context length the model sees the last
    context_length tokens; then every position shifts with each token, and the cache saves nothing. Raises
    RunError if logits are not finite.
    """
    prompt, size, cache = tokens.shape[1], model.config.context_length, None
    padding = tokens.new_zeros(len(tokens)) if padding is None else padding
    for length in range(prompt, prompt + count):
        if cache is None or cache.length == size or not sampling.use_cache:
            start = max(0, length - size)
            cache = Cache((padding - start).clamp(min=0), min(size, prompt + count))
        new = tokens[:, start + cache.length :]
        features = model.features(new, *cache.read_on(new.shape[1]), cache)
        logits = model.out_head(features[:, -1]).float()  # (B, V)
        if not logits.isfinite().all():
            raise RunError("the model's logits are not finite: its weights are damaged, or training diverged")
        tokens = torch.cat([tokens, sampling.choose(logits)], dim=1)
        yield tokens[:, -1:]
        if sampling.stop is not None and (tokens[:, prompt:] == sampling.stop).any(dim=1).all():
            break


def require_vocabulary(model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Raise InputError if the model lacks tokens of the tokenizer."""
    if tokenizer.n_vocab > model.config.vocab_size:
        raise InputError(
            f"the model's vocabulary of {model.config.vocab_size} does not hold the {tokenizer.n_vocab} "
            f"tokens of the tokenizer '{model.config.tokenizer}'; name the one it was trained with"
        )


def encode_prompts(tokenizer: tiktoken.Encoding, prompts: Sequence[str], vocab_size: int) -> list[list[int]]:
    """The tokens of each prompt; an empty prompt becomes end-of-text. Raises InputError for tokens outside a
    vocabulary of `vocab_size`."""
    encoded = [tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token] for prompt in prompts]
    for prompt, tokens in zip(prompts, encoded, strict=True):
        if max(tokens) >= vocab_size:
            raise InputError(f"the prompt '{prompt}' has tokens outside the vocabulary of {vocab_size}")
    return encoded


def continuations(
    model: GPTModel, tokenizer: tiktoken.Encoding, prompts: Sequence[str], count: int, sampling: Sampling
) -> list[str]:
    """What the model adds to each prompt: at most `count` tokens, up to the end of the text. Batches prompts
    of similar length, padded on the left. Raises InputError for prompts outside the model's vocabulary."""
    end = tokenizer.eot_token
    sampling = replace(sampling, stop=end)
    encoded = encode_prompts(tokenizer, prompts, model.config.vocab_size)
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    texts = [""] * len(prompts)
    device = model.tok_emb.weight.device
    batches = range(0, len(order), BATCH_SIZE)
    for first in Progress(batches, unit="batch", disable=len(batches) == 1, leave=False):
        batch = order[first : first + BATCH_SIZE]
        longest = len(encoded[batch[-1]])
        padding = torch.tensor([longest - len(encoded[index]) for index in batch], device=device)
        rows = torch.tensor([[0] * (longest - len(encoded[i])) + encoded[i] for i in batch], device=device)
        continued = generate(model, rows, count, sampling, padding)
        for index, row in zip(batch, continued[:, longest:].tolist(), strict=True):
            new = row[: row.index(end)] if end in row else row
            # The model's vocabulary may be padded beyond the tokenizer's.
            texts[index] = tokenizer.decode([token for token in new if token < tokenizer.n_vocab])
    return texts
