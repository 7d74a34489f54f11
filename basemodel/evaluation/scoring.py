"""How likely a model finds texts, and how it continues them: in batches, and kept on disk."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

from basemodel.common.errors import InputError, RunError
from basemodel.evaluation.judging import ReplyCache
from basemodel.model.generation import continuations
from gpt import GPTModel

Window = tuple[list[int], list[int]]  # inputs, and targets for the last of them
HEAD_ROWS = 1024  # tokens whose logits exist at once; with GPT-2's vocabulary 206 MB


class Scorer:
    """Answers questions about texts with a model. What it computes is kept in the folder `cache`, in a file
    that the weights' hash names, and never computed again.

    Raises InputError if the tokenizer has tokens that the model has not, or the cache cannot be written.
    """

    def __init__(
        self, model: GPTModel, tokenizer: tiktoken.Encoding, *, batch_size: int, cache: Path
    ) -> None:
        if tokenizer.n_vocab > model.config.vocab_size:
            raise InputError(
                f"the model's vocabulary of {model.config.vocab_size} does not hold the {tokenizer.n_vocab} "
                f"tokens of the tokenizer '{model.config.tokenizer}'; is it the right tokenizer?"
            )
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{cache}: cannot be a folder for answers: {error.strerror}") from None
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.kept = ReplyCache(cache / f"{fingerprint_model(model)[:16]}.jsonl")
        self.asked = self.cut = 0  # texts scored, and how many of them were longer than the context

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, in which `<|endoftext|>` is text like any other."""
        return self.tokenizer.encode_ordinary(text)

    def log_likelihoods(self, pairs: Sequence[Window]) -> list[tuple[float, bool]]:
        """For each context (at least one token) and continuation: the continuation's log-likelihood in nats,
        and whether each of its tokens is the most likely one. Raises RunError if they are not finite."""
        length = self.model.config.context_length
        self.asked += len(pairs)
        self.cut += sum(len(context) + len(continuation) > length + 1 for context, continuation in pairs)
        keyed = [[(key_of(window), window) for window in windows(*pair, length)] for pair in pairs]
        missing = {key: window for each in keyed for key, window in each if key not in self.kept.replies}
        # The longest first, so that batches are even and a lack of memory shows at once.
        for batch in self._batches(sorted(missing, key=lambda key: -len(missing[key][0]))):
            self.kept.add_all(dict(zip(batch, self._score([missing[key] for key in batch]), strict=True)))
        found = [[self.kept.replies[key] for key, _ in each] for each in keyed]
        return [(sum(nats for nats, _ in parts), all(best for _, best in parts)) for parts in found]

    @torch.no_grad()
    def _score(self, batch: list[Window]) -> list[tuple[float, bool]]:
        """The log-likelihoods of windows of at most context_length tokens. Shapes: N targets in all."""
        device = self.model.tok_emb.weight.device
        longest = max(len(inputs) for inputs, _ in batch)
        # Padding on the right: no token attends to what follows it.
        rows = torch.tensor([inputs + [0] * (longest - len(inputs)) for inputs, _ in batch], device=device)
        features = self.model.features(rows)  # (B, T, C)
        last = [x[len(inputs) - len(y) : len(inputs)] for x, (inputs, y) in zip(features, batch, strict=True)]
        targets = torch.tensor([token for _, y in batch for token in y], device=device)  # (N,)
        losses, greedy = [], []
        for x, y in zip(torch.cat(last).split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = self.model.out_head(x).float()
            losses.append(F.cross_entropy(logits, y, reduction="none").double())
            greedy.append(logits.argmax(-1) == y)
        loss, most_likely = torch.cat(losses).cpu(), torch.cat(greedy).cpu()
        if not loss.isfinite().all():
            raise RunError("the model's logits are not finite: its weights are damaged, or training diverged")
        sizes = [len(y) for _, y in batch]
        parts = zip(loss.split(sizes), most_likely.split(sizes), strict=True)
        return [(-nats.sum().item(), bool(best.all())) for nats, best in parts]

    def continue_greedily(self, prompts: Sequence[str], count: int) -> list[str]:
        """What the model adds to each prompt, always the most likely token: at most `count` of them."""
        keyed = [(key_of((self.encode(prompt), count)), prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in keyed if key not in self.kept.replies}
        for batch in self._batches(sorted(missing, key=lambda key: -len(missing[key]))):
            texts = continuations(
                self.model, self.tokenizer, [missing[key] for key in batch], count, temperature=0
            )
            self.kept.add_all(dict(zip(batch, texts, strict=True)))
        return [self.kept.replies[key] for key, _ in keyed]

    def _batches(self, keys: list[str]) -> Iterator[list[str]]:
        size = self.batch_size
        for first in tqdm(range(0, len(keys), size), unit="batch", disable=None, leave=False):
            yield keys[first : first + size]


def windows(context: list[int], continuation: list[int], length: int) -> Iterator[Window]:
    """Cut a continuation into parts of at most `length` tokens, each with as much as fits of what precedes
    it: lm-evaluation-harness's windows, for one continuation and, after end-of-text, for whole documents."""
    tokens = context + continuation
    for start in range(len(context), len(tokens), length):
        end = min(start + length, len(tokens))
        yield tokens[max(0, end - 1 - length) : end - 1], tokens[start:end]


def key_of(question: Any) -> str:
    """A short name for a question, by which its answer is kept."""
    return hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]


def fingerprint_model(model: GPTModel) -> str:
    """The SHA-256 of all that decides what a model answers: configuration, modules, and weights."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(model.config), str(model)]).encode())
    for name, tensor in sorted(model.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
