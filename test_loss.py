#!/usr/bin/env python3
"""How good is it? The loss of a trained model on text that it has not seen.

    python test_loss.py datasets runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_loss.py datasets runs/demo/model.json runs/demo/checkpoints/best/model.safetensors \\
        --dataset local/python-docs --start-token 0 --tokens 65536
"""

import math
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from tqdm import tqdm

from config import InputError, RunError, require, run_command
from data import Sequences, TokenFile, check_tokenizer, fetch_dataset
from gpt import GPTModel, load_model
from tokenizer import get_tokenizer


@torch.no_grad()
def sequence_losses(model: GPTModel, sequences: Sequences, count: int, batch_size: int) -> torch.Tensor:
    """The mean loss of each of the first `count` sequences, in nats per token: (count,) float64."""
    losses = []
    for first in tqdm(range(0, count, batch_size), unit="batch", disable=None):
        batch = sequences.read(first, min(batch_size, count - first)).to(model.tok_emb.weight.device).long()
        logits = model(batch[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(batch), -1).double().mean(dim=1).cpu())
    return torch.cat(losses)


def count_bytes(sequences: Sequences, count: int, tokenizer_name: str) -> int:
    """How many bytes of text the targets of the first `count` sequences stand for; end-of-text for none."""
    tokenizer = get_tokenizer(tokenizer_name)
    lengths = torch.zeros(65_536, dtype=torch.int64)
    pieces = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    lengths[: len(pieces)] = torch.tensor([len(piece) for piece in pieces])
    lengths[tokenizer.eot_token] = 0
    return sum(int(lengths[sequences.read(i, 1)[:, 1:].long()].sum()) for i in range(count))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("datasets_dir", type=click.Path(path_type=Path))
@click.argument("model_json", type=click.Path(path_type=Path))
@click.argument("model_safetensors", type=click.Path(path_type=Path))
@click.option("--dataset", default="gpjt/fineweb-gpt2-tokens", show_default=True)
@click.option("--split", type=click.Choice(["train", "validation"]), default="validation", show_default=True)
@click.option("--start-token", type=click.IntRange(0), default=50_000_000, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=19_660_800, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=6, show_default=True)
def main(
    datasets_dir: Path,
    model_json: Path,
    model_safetensors: Path,
    dataset: str,
    split: str,
    start_token: int,
    tokens: int,
    batch_size: int,
) -> None:
    """Measure the loss of the model in MODEL_SAFETENSORS, ours or a Hugging Face GPT-2's."""
    model = load_model(model_json, model_safetensors)
    folder = fetch_dataset(datasets_dir, dataset, None, [split])
    check_tokenizer(folder, model.config)
    length = model.config.context_length
    sequences = Sequences(TokenFile(folder / f"{split}.safetensors"), start_token, length, seed=0)
    count = tokens // length
    require(
        0 < count <= sequences.count,
        f"{sequences.tokens.path}: has {sequences.tokens.count:,} tokens, which make {sequences.count} "
        "sequences of "
        f"{length} after --start-token {start_token}; --tokens {tokens} asks for {count}"
        + ("; --start-token 0 begins at the start" if start_token else ""),
    )
    sequences.tokens.check_vocabulary(start_token, start_token + count * length + 1, model.config.vocab_size)

    losses = sequence_losses(model, sequences, count, batch_size)
    loss = losses.mean().item()
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss}: the weights are damaged, or training has diverged")
    print(f"{count:,} sequences of {length:,} tokens from {sequences.tokens.path}")
    print(f"Loss against our test dataset: {loss:.3f}")
    print(f"Perplexity: {losses.mean().exp().item():.2f}")
    print(
        "Standard error: " + (f"{losses.std().item() / math.sqrt(count):.4f}" if count > 1 else "not known")
    )
    try:
        size = count_bytes(sequences, count, model.config.tokenizer)
        bits = losses.sum().item() * length / math.log(2)
        print(
            "Bits per byte: " + (f"{bits / size:.4f}" if size else "not known: the tokens stand for no text")
        )
    except InputError as error:
        print(f"Bits per byte: not known: {error}")


if __name__ == "__main__":
    run_command(main)
