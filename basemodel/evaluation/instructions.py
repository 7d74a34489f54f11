"""Instruction records, and fine-tuning on them as in chapter 7 of "Build a Large Language Model"."""

import codecs
import json
import math
import random
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from basemodel.common.errors import InputError, RunError
from basemodel.common.files import replace_text
from basemodel.common.output import Progress
from basemodel.model.loss import IGNORED, chunked_cross_entropy
from gpt import GPTModel

DATA_URL = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
    "ch07/01_main-chapter-code/instruction-data.json"
)
FIELDS = ("instruction", "input", "output")
Record = dict[str, str]


def parse_records(text: bytes, source: Path | str, fields: tuple[str, ...] = FIELDS) -> list[Record]:
    """Parse a JSON list, or lines, of objects with the string `fields`; an "input" that is missing or null is
    empty. Raises InputError, naming the first bad one."""
    lines, records = text.removeprefix(codecs.BOM_UTF8).splitlines(), []
    by_line = bool(lines) and lines[0].startswith(b"{")
    try:
        if by_line:
            for line in filter(bytes.strip, lines):
                records.append(json.loads(line))
        else:
            records = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"record {len(records)} is not" if by_line else "not"
        raise InputError(f"{source}: {what} valid JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{source}: must contain a JSON list of objects, or one object per line")
    for index, record in enumerate(records):
        if isinstance(record, dict) and record.get("input") is None:
            record["input"] = ""
        for field in fields:
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise InputError(f'{source}: record {index} has no string "{field}"')
    return records


def fetch_records(folder: Path) -> list[Record]:
    """The book's records, downloaded once and kept in `folder`. Raises InputError."""
    path = folder / "instruction-data.json"
    if not path.exists():
        try:
            with urllib.request.urlopen(DATA_URL, timeout=60) as reply:
                text = reply.read()
        except (OSError, ValueError) as error:
            hint = "--data FILE takes a copy of it"
            raise InputError(f"could not download {DATA_URL} ({error}); {hint}") from None
        parse_records(text, DATA_URL)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, text.decode("utf-8"))
    return parse_records(path.read_bytes(), path)


def split_records(records: list[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """Training, validation and test records: in file order, 85% for training, 10% for testing and the rest
    for validation, as in the book. Raises InputError if a split is empty."""
    train, test = int(len(records) * 0.85), int(len(records) * 0.1)
    parts = records[:train], records[train + test :], records[train : train + test]
    if not all(parts):
        raise InputError(f"{len(records)} records are too few to train, validate and test on; use 10 or more")
    return parts


def prompt_of(record: Record) -> str:
    """The instruction, with its input if it has one, in Alpaca style (Taori et al. 2023)."""
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{record['instruction']}"
    )
    prompt += f"\n\n### Input:\n{record['input']}" if record["input"] else ""
    return prompt + "\n\n### Response:\n"


def check_lengths(records: list[Record], tokenizer: tiktoken.Encoding, length: int) -> None:
    """Print how many prompts leave no room for a response in `length` tokens. Raises InputError if that is
    all of them."""
    prompts = [len(tokenizer.encode_ordinary(prompt_of(record))) for record in records]
    shortest = min(prompts)
    if shortest >= length:
        hint = f"context_length {length} leaves no room for a response; use a model with a longer context"
        raise InputError(f"the shortest prompt has {shortest} tokens: {hint}")
    if full := sum(size >= length for size in prompts):
        print(f"{full:,} of {len(records):,} prompts leave no room for a response in {length:,} tokens")


def collate(records: list[list[int]], length: int, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Batch tokenized records as inputs and targets, (B, T) each, T at most `length`, padded.
    The first end-of-text is a target, so that the model learns to stop; the others are ignored."""
    rows = [torch.tensor([*tokens, end_of_text]) for tokens in records]
    inputs = pad_sequence(rows, batch_first=True, padding_value=end_of_text)[:, :-1]
    targets = pad_sequence(rows, batch_first=True, padding_value=IGNORED)[:, 1:]
    return inputs[:, :length], targets[:, :length]


def batch_loss(model: GPTModel, records: list[list[int]], end_of_text: int) -> tuple[Tensor, int]:
    """The mean loss over the targets of a batch of records, padding excluded, and their number."""
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
    model: GPTModel, train: list[list[int]], validation: list[list[int]], tuning: FineTuning, end_of_text: int
) -> None:
    """Train `model` on tokenized records, epoch by epoch until the validation loss rises, and leave it with
    the weights of the best epoch. Raises RunError if training diverges."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = tuning.drop_rate
        elif hasattr(module, "drop_rate"):
            module.drop_rate = tuning.drop_rate
    torch.manual_seed(tuning.seed)
    shuffle = random.Random(tuning.seed)
    optimizer = torch.optim.AdamW(model.parameters(), tuning.learning_rate, weight_decay=tuning.weight_decay)
    print(f"before: validation loss {mean_loss(model, validation, tuning.batch_size, end_of_text):.4f}")
    best, best_epoch, best_weights = math.inf, 0, {}
    for epoch in range(1, tuning.max_epochs + 1):
        model.train()
        order = shuffle.sample(train, len(train))
        losses = []
        for first in Progress(range(0, len(order), tuning.batch_size), desc=f"epoch {epoch}", leave=False):
            loss, _ = batch_loss(model, order[first : first + tuning.batch_size], end_of_text)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        loss = mean_loss(model, validation, tuning.batch_size, end_of_text)
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
