"""Fine-tuning on instructions, as in chapter 7 of "Build a Large Language Model (from Scratch)"."""

import math
import random
from dataclasses import dataclass

import tiktoken
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from basemodel.common.errors import InputError, RunError
from basemodel.evaluation.instructions import Record, prompt_of
from basemodel.model.loss import IGNORED, chunked_cross_entropy
from gpt import GPTModel


def encode_records(records: list[Record], tokenizer: tiktoken.Encoding, model: GPTModel) -> list[list[int]]:
    """Tokenize prompts with their responses. Raises InputError for tokens outside the model's vocabulary."""
    encoded = [tokenizer.encode_ordinary(prompt_of(record) + record["output"]) for record in records]
    size = model.config.vocab_size
    if max(tokenizer.eot_token, *map(max, encoded)) >= size:
        raise InputError(f"the model's vocabulary of {size} does not hold the tokenizer's tokens")
    return encoded


def check_lengths(records: list[Record], tokenizer: tiktoken.Encoding, length: int) -> None:
    """Print how many prompts leave no room for a response in `length` tokens. Raises InputError if none
    does."""
    prompts = [len(tokenizer.encode_ordinary(prompt_of(record))) for record in records]
    shortest = min(prompts)
    if shortest >= length:
        hint = f"context_length {length} leaves no room for a response"
        raise InputError(f"the shortest prompt has {shortest} tokens: {hint}")
    if cut := sum(size >= length for size in prompts):
        print(f"Of {len(records):,} prompts {cut:,} leave no room for a response in {length:,} tokens")


def collate(records: list[list[int]], length: int, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Batch tokenized records as inputs and targets, (B, T) each, T at most `length`, padded.
    The first end-of-text is a target, so that the model learns to stop; the others are ignored."""
    rows = [torch.tensor([*tokens, end_of_text]) for tokens in records]
    inputs = pad_sequence(rows, batch_first=True, padding_value=end_of_text)[:, :-1]
    targets = pad_sequence(rows, batch_first=True, padding_value=IGNORED)[:, 1:]
    return inputs[:, :length], targets[:, :length]


def batch_loss(model: GPTModel, records: list[list[int]], end_of_text: int) -> tuple[Tensor, int]:
    """The mean loss over the targets in a batch of records that are not padding, and their number."""
    device = model.tok_emb.weight.device
    inputs, targets = collate(records, model.config.context_length, end_of_text)
    features = model.features(inputs.to(device)).flatten(0, 1)
    loss = chunked_cross_entropy(features, model.out_head.weight, targets.flatten().to(device))
    return loss, int((targets != IGNORED).sum())


@torch.no_grad()
def mean_loss(model: GPTModel, records: list[list[int]], batch_size: int, end_of_text: int) -> float:
    """The mean loss per token over all records."""
    model.eval()
    total = count = 0.0
    for first in range(0, len(records), batch_size):
        loss, tokens = batch_loss(model, records[first : first + batch_size], end_of_text)
        total, count = total + loss.item() * tokens, count + tokens
    return total / count


@dataclass(frozen=True)
class FineTuning:
    """Hyperparameters of fine-tuning."""

    learning_rate: float
    weight_decay: float
    batch_size: int
    drop_rate: float
    max_epochs: int
    seed: int


def fine_tune(
    model: GPTModel, train: list[list[int]], validation: list[list[int]], how: FineTuning, end_of_text: int
) -> None:
    """Train `model` on tokenized records, epoch by epoch until the validation loss rises, and leave it with
    the weights of the best epoch. Raises RunError if training diverges."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = how.drop_rate
        elif hasattr(module, "drop_rate"):
            module.drop_rate = how.drop_rate
    torch.manual_seed(how.seed)
    shuffle = random.Random(how.seed)
    optimizer = torch.optim.AdamW(model.parameters(), how.learning_rate, weight_decay=how.weight_decay)
    print(f"before: validation loss {mean_loss(model, validation, how.batch_size, end_of_text):.4f}")
    best, best_epoch, best_weights = math.inf, 0, {}
    for epoch in range(1, how.max_epochs + 1):
        model.train()
        order = shuffle.sample(train, len(train))
        losses = []
        for first in tqdm(range(0, len(order), how.batch_size), desc=f"epoch {epoch}", disable=None):
            loss, _ = batch_loss(model, order[first : first + how.batch_size], end_of_text)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        loss = mean_loss(model, validation, how.batch_size, end_of_text)
        trained = torch.stack(losses).mean().item()
        print(f"epoch {epoch}: training loss {trained:.4f}, validation loss {loss:.4f}", flush=True)
        if not math.isfinite(loss):
            raise RunError(f"the validation loss is {loss} after epoch {epoch}; try a lower --learning-rate")
        if loss > best:
            break
        best, best_epoch = loss, epoch
        best_weights = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_weights)
    model.eval()
    print(f"Answering with the weights of epoch {best_epoch} (validation loss {best:.4f})")
