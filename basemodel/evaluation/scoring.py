"""Log-likelihoods and greedy continuations of texts, batched and cached."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F

from basemodel.common.errors import RunError
from basemodel.common.output import Progress
from basemodel.evaluation.measurements import AnswerCache, key_of
from basemodel.model.generation import GREEDY, continuations, require_vocabulary
from gpt import GPTModel

Window = tuple[list[int], list[int]]  # inputs, and targets for the last of them
HEAD_ROWS = 1024  # tokens whose logits exist at once; with GPT-2's vocabulary 206 MB


class Scorer:
    """Answers questions about texts with a model. Answers are kept in the folder `cache`, in a file named by
    the hash of the weights, and never computed again. Raises InputError if the model lacks tokens of the
    tokenizer."""

    def __init__(
        self, model: GPTModel, tokenizer: tiktoken.Encoding, *, batch_size: int, cache: Path
    ) -> None:
        require_vocabulary(model, tokenizer)
        cache.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.cache = AnswerCache(cache / f"{fingerprint_model(model)[:16]}.jsonl")
        self.asked = self.cut = 0  # texts scored, and how many of them did not fit with all their context

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, in which `<|endoftext|>` is text like any other."""
        return self.tokenizer.encode_ordinary(text)

    def log_likelihoods(self, pairs: Sequence[Window]) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each continuation after its context of at least one token, and
        whether all its tokens are the most likely ones. Raises RunError if the logits are not finite."""
        length = self.model.config.context_length
        self.asked += len(pairs)
        self.cut += sum(len(answer) <= length < len(context) + len(answer) - 1 for context, answer in pairs)
        parts = [list(windows(*pair, length)) for pair in pairs]
        answers = iter(self._answers([window for part in parts for window in part], self._score))
        scores = [[next(answers) for _ in part] for part in parts]
        return [(sum(nats for nats, _ in part), all(best for _, best in part)) for part in scores]

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

        def compute(batch: list[tuple[list[int], int]]) -> list[str]:
            texts = [self.tokenizer.decode(tokens) for tokens, _ in batch]
            return continuations(self.model, self.tokenizer, texts, count, GREEDY)

        return self._answers([(self.encode(prompt), count) for prompt in prompts], compute)

    def _answers(self, questions: Sequence[tuple[list[int], Any]], compute: Callable[[list], list]) -> list:
        """The cached answers to questions, after computing those that are missing."""
        keys = [key_of(question)[:32] for question in questions]
        questions_by_key = dict(zip(keys, questions, strict=True))
        missing = [key for key in questions_by_key if key not in self.cache.answers]
        # The longest first, so that batches are even and a lack of memory shows at once.
        missing.sort(key=lambda key: -len(questions_by_key[key][0]))
        for first in Progress(range(0, len(missing), self.batch_size), unit="batch", leave=False):
            batch = missing[first : first + self.batch_size]
            answers = compute([questions_by_key[key] for key in batch])
            self.cache.add(dict(zip(batch, answers, strict=True)))
        return [self.cache.answers[key] for key in keys]


def windows(context: list[int], continuation: list[int], length: int) -> Iterator[Window]:
    """Cut a continuation into parts of at most `length` tokens, each preceded by all the text that fits:
    lm-evaluation-harness's windows, for one continuation and, after end-of-text, for whole documents."""
    tokens = context + continuation
    for start in range(len(context), len(tokens), length):
        end = min(start + length, len(tokens))
        yield tokens[max(0, end - 1 - length) : end - 1], tokens[start:end]


def fingerprint_model(model: GPTModel) -> str:
    """The SHA-256 of everything that decides a model's answers: configuration, modules, and weights."""
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(model.config), str(model)]).encode())
    for name, tensor in sorted(model.tensors().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
