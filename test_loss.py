#!/usr/bin/env python3
"""How good is it? The loss of trained models on text that they have not seen.

    python test_loss.py datasets runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_loss.py datasets runs/demo/model.json runs/demo/checkpoints/best/model.safetensors \\
        --dataset local/python-docs --start-token 0 --tokens 65536
    python test_loss.py datasets A/model.json A/model.safetensors B/model.json B/model.safetensors ...

Several models read the data together, once, and give a table. The loss of a checkpoint is kept beside it, in
test-loss.json, for compare_runs.py and upload_model.py.
"""

import math
from datetime import UTC, datetime
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from basemodel.command_line import run_command
from basemodel.data import Sequences, TokenFile, check_tokenizer
from basemodel.errors import InputError, RunError, require
from basemodel.fetching import fetch_dataset
from basemodel.loss import document_features
from basemodel.measured_loss import MeasuredLoss, write_test_loss
from basemodel.tokenizer import get_tokenizer
from basemodel.weights import load_model
from checkpointing import META_FILE
from gpt import GPTModel


@torch.no_grad()
def sequence_losses(
    models: list[GPTModel], sequences: Sequences, count: int, *, batch_size: int, document_masking: bool
) -> Tensor:
    """Each model's mean loss of each of the first `count` sequences, in nats per token: float64, on the CPU,
    (models, count). The data are read once."""
    losses = torch.zeros(len(models), count, dtype=torch.float64)
    features_of = document_features if document_masking else GPTModel.features
    for first in tqdm(range(0, count, batch_size), unit="batch", disable=None):
        batch = sequences.read(first, min(batch_size, count - first)).long()
        for model, row in zip(models, losses, strict=True):
            tokens = batch.to(model.tok_emb.weight.device)
            features = features_of(model, tokens[:, :-1])
            # One sequence after another: the logits of a batch of GPT-2's would take gigabytes.
            for index, (x, targets) in enumerate(zip(features, tokens[:, 1:], strict=True), start=first):
                row[index] = F.cross_entropy(model.out_head(x), targets, reduction="none").double().mean()
    return losses


def count_bytes(sequences: Sequences, count: int, tokenizer_name: str) -> int:
    """How many bytes of text the targets of the first `count` sequences stand for; end-of-text for none."""
    tokenizer = get_tokenizer(tokenizer_name)
    lengths = torch.zeros(65_536, dtype=torch.int64)
    pieces = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    lengths[: len(pieces)] = torch.tensor([len(piece) for piece in pieces])
    lengths[tokenizer.eot_token] = 0
    return sum(int(lengths[sequences.read(i, 1)[:, 1:].long()].sum()) for i in range(count))


def statistics(losses: Tensor, length: int, size: int) -> dict[str, float | None]:
    """What the losses (count,) of sequences of `length` tokens come to, over a text of `size` bytes."""
    count = len(losses)
    return {
        "loss": losses.mean().item(),
        "perplexity": losses.mean().exp().item(),
        "standard_error": losses.std().item() / math.sqrt(count) if count > 1 else None,
        "bits_per_byte": losses.sum().item() * length / math.log(2) / size if size else None,
    }


def open_test_data(folder: Path, split: str, start: int, tokens: int, length: int) -> tuple[Sequences, int]:
    """The sequences of `length` that `tokens` tokens after `start` make, and how many to read. Raises
    InputError when there are not so many."""
    sequences = Sequences(TokenFile(folder / f"{split}.safetensors"), start, length, seed=0)
    count = tokens // length
    have = f"has {sequences.tokens.count:,} tokens, which make {sequences.count} sequences of {length}"
    require(
        0 < count <= sequences.count,
        f"{sequences.tokens.path}: {have} after --start-token {start}; --tokens {tokens} asks for {count}"
        + ("; --start-token 0 begins at the start" if start else ""),
    )
    return sequences, count


def pair_up(files: tuple[Path, ...]) -> list[tuple[Path, Path]]:
    """The arguments MODEL_JSON MODEL_SAFETENSORS ... as pairs. Raises InputError where one is left over."""
    require(
        len(files) % 2 == 0,
        f"models come in pairs, MODEL_JSON MODEL_SAFETENSORS; {files[-1]} at the end is alone",
    )
    return list(zip(files[::2], files[1::2], strict=True))


def print_one(result: MeasuredLoss, no_bytes: str) -> None:
    """Print one model's result, a figure a line."""
    error, bits = result.standard_error, result.bits_per_byte
    print(f"Loss against our test dataset: {result.loss:.3f}")
    print(f"Perplexity: {result.perplexity:.2f}")
    print("Standard error: " + ("not known" if error is None else f"{error:.4f}"))
    print("Bits per byte: " + (f"not known: {no_bytes}" if bits is None else f"{bits:.4f}"))


def print_table(weights: list[Path], results: list[MeasuredLoss], losses: Tensor, no_bytes: str) -> None:
    """Print several models' results as a Markdown table. The last column is a mean over sequences of the
    difference to the first model, with its own standard error: text that is hard for one is hard for all, so
    it is far smaller than those of the losses."""
    print("\n| model | loss | standard error | perplexity | bits per byte | loss, less the first's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path, result, difference in zip(weights, results, losses - losses[0], strict=True):
        error, bits = result.standard_error, result.bits_per_byte
        versus = f"{difference.mean():+.4f}"
        versus += f" ± {difference.std() / math.sqrt(len(difference)):.4f}" if len(difference) > 1 else ""
        cells = (
            str(path),
            f"{result.loss:.4f}",
            "not known" if error is None else f"{error:.4f}",
            f"{result.perplexity:.2f}",
            "not known" if bits is None else f"{bits:.4f}",
            "" if path is weights[0] else versus,
        )
        print(f"| {' | '.join(cells)} |")
    if no_bytes:
        print(f"\nBits per byte: not known: {no_bytes}")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("datasets_dir", type=click.Path(path_type=Path))
@click.argument(
    "models",
    type=click.Path(path_type=Path),
    nargs=-1,
    required=True,
    metavar="MODEL_JSON MODEL_SAFETENSORS ...",
)
@click.option("--dataset", default="gpjt/fineweb-gpt2-tokens", show_default=True)
@click.option("--split", type=click.Choice(["train", "validation"]), default="validation", show_default=True)
@click.option("--start-token", type=click.IntRange(0), default=50_000_000, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=19_660_800, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=6, show_default=True)
@click.option(
    "--context-length", type=click.IntRange(1), help="Tokens per sequence; default: the models' own."
)
@click.option("--document-masking", is_flag=True, help="Have tokens attend to their own document alone.")
def main(
    datasets_dir: Path,
    models: tuple[Path, ...],
    dataset: str,
    split: str,
    start_token: int,
    tokens: int,
    batch_size: int,
    context_length: int | None,
    document_masking: bool,
) -> None:
    """Measure the loss of the models in MODEL_SAFETENSORS, ours or Hugging Face GPT-2's."""
    pairs = pair_up(models)
    loaded = [load_model(*pair) for pair in pairs]
    lengths = {model.config.context_length for model in loaded}
    require(
        len(lengths) == 1 or context_length is not None,
        f"the models' context lengths differ ({', '.join(map(str, sorted(lengths)))}); --context-length "
        f"{min(lengths)} gives all of them the same sequences",
    )
    length = context_length or lengths.pop()
    folder = fetch_dataset(datasets_dir, dataset, None, [split])
    sequences, count = open_test_data(folder, split, start_token, tokens, length)
    for (model_json, _), model in zip(pairs, loaded, strict=True):
        longest = model.config.context_length
        require(length <= longest, f"{model_json}: --context-length can be {longest} at most, not {length}")
        check_tokenizer(folder, model.config)
    smallest = min(model.config.vocab_size for model in loaded)
    sequences.tokens.check_vocabulary(start_token, start_token + count * length + 1, smallest)
    tokenizers = {model.config.tokenizer for model in loaded}
    require(len(tokenizers) == 1, "the models' tokenizers differ; measure them apart, on a data set each")

    losses = sequence_losses(
        loaded, sequences, count, batch_size=batch_size, document_masking=document_masking
    )
    size, no_bytes = 0, ""
    try:
        size = count_bytes(sequences, count, tokenizers.pop())
        no_bytes = "" if size else "the tokens stand for no text"
    except InputError as error:
        no_bytes = str(error)
    measured_on = {
        "dataset": dataset,
        "split": split,
        "start_token": start_token,
        "tokens": count * length,
        "context_length": length,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "document_masking": document_masking,
    }
    results = []
    for (_, weights), row in zip(pairs, losses, strict=True):
        if not row.mean().isfinite():
            raise RunError(f"{weights}: the loss is {row.mean():.3g}: damaged weights, or training diverged")
        results.append(MeasuredLoss(**measured_on, **statistics(row, length, size)))
        if (weights.parent / META_FILE).exists():  # a checkpoint of this project
            write_test_loss(weights.parent, results[-1])
    print(f"{count:,} sequences of {length:,} tokens from {sequences.tokens.path}")
    if len(results) == 1:
        print_one(results[0], no_bytes)
    else:
        print_table([weights for _, weights in pairs], results, losses, no_bytes)


if __name__ == "__main__":
    run_command(main)
