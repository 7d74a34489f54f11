#!/usr/bin/env python3
"""How good is it? The loss of trained models on text that they have not seen.

    python test_loss.py datasets runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_loss.py datasets runs/demo/model.json runs/demo/checkpoints/best/model.safetensors \\
        --dataset local/python-docs --start-token 0 --tokens 65536
    python test_loss.py datasets A/model.json A/model.safetensors B/model.json B/model.safetensors ...

Several models are measured in one pass over the data and shown as a table. The loss of a checkpoint is kept
beside it, in test-loss.json, for compare_runs.py and upload_model.py.
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
from basemodel.data import Sequences, match_tokenizer
from basemodel.errors import InputError, RunError
from basemodel.hub import fetch_dataset
from basemodel.loss import document_features
from basemodel.measured_loss import MeasuredLoss, write_test_loss
from basemodel.token_files import TokenFiles
from basemodel.tokenizer import get_tokenizer
from basemodel.trained_tokenizer import TOKENIZER_FILE, same_tokenizer
from basemodel.weights import load_model
from checkpointing import META_FILE
from gpt import GPTConfig, GPTModel


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("datasets_dir", type=Path)
@click.argument("models", type=Path, nargs=-1, required=True, metavar="MODEL_JSON MODEL_SAFETENSORS ...")
@click.option("--dataset", default="gpjt/fineweb-gpt2-tokens", show_default=True)
@click.option("--split", type=click.Choice(["train", "validation"]), default="validation", show_default=True)
@click.option("--start-token", type=click.IntRange(0), default=50_000_000, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=19_660_800, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=6, show_default=True)
@click.option("--context-length", type=click.IntRange(1), help="Tokens per sequence; default: the models'.")
@click.option("--document-masking", is_flag=True, help="Tokens attend to their own document alone.")
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
    if len(models) % 2:
        raise InputError(f"models come in pairs, MODEL_JSON MODEL_SAFETENSORS; {models[-1]} has no partner")
    pairs = list(zip(models[::2], models[1::2], strict=True))
    loaded = [load_model(*pair) for pair in pairs]
    configs = [model.config for model in loaded]
    length = choose_length(configs, context_length)
    folder = fetch_dataset(datasets_dir, dataset, None, [split])
    sequences = Sequences(TokenFiles(folder, split), start_token, length, seed=0)
    count = check_data(sequences, tokens, configs)
    for (_, weights), model in zip(pairs, loaded, strict=True):
        model.config = match_tokenizer(folder, model.config)
        check_own_tokenizer(weights, model.config, folder)

    losses = sequence_losses(
        loaded, sequences, count, batch_size=batch_size, document_masking=document_masking
    )
    size, no_bytes = count_bytes(sequences, count, configs[0].tokenizer, folder)
    results = []
    for (_, weights), row in zip(pairs, losses, strict=True):
        loss = row.mean().item()
        if not math.isfinite(loss):
            raise RunError(f"{weights}: the loss is {loss:.3g}: damaged weights, or training diverged")
        result = MeasuredLoss(
            dataset=dataset,
            split=split,
            start_token=start_token,
            tokens=count * length,
            context_length=length,
            loss=loss,
            perplexity=row.mean().exp().item(),
            standard_error=row.std().item() / math.sqrt(count) if count > 1 else None,
            bits_per_byte=row.sum().item() * length / math.log(2) / size if size else None,
            measured=datetime.now(UTC).isoformat(timespec="seconds"),
            document_masking=document_masking,
        )
        results.append(result)
        if (weights.parent / META_FILE).exists():  # a checkpoint of this project
            write_test_loss(weights.parent, result)
    print(f"{count:,} sequences of {length:,} tokens from {sequences.tokens}")
    if len(results) > 1:
        print_table([weights for _, weights in pairs], results, losses, no_bytes)
    else:
        (result,) = results
        print(f"Loss against our test dataset: {result.loss:.3f}")
        print(f"Perplexity: {result.perplexity:.2f}")
        print(f"Standard error: {known(result.standard_error)}")
        print(f"Bits per byte: {known(result.bits_per_byte, f'unknown: {no_bytes}')}")


def choose_length(configs: list[GPTConfig], asked: int | None) -> int:
    """The length of the test sequences, the same for all models. Raises InputError if it does not fit one."""
    lengths = sorted({config.context_length for config in configs})
    if asked is None and len(lengths) > 1:
        raise InputError(
            f"the models' context lengths differ ({', '.join(map(str, lengths))}); --context-length "
            f"{lengths[0]} gives all of them the same sequences"
        )
    if asked is not None and asked > lengths[0]:
        raise InputError(f"--context-length can be at most {lengths[0]}, a model's own, not {asked}")
    return asked or lengths[0]


def check_data(sequences: Sequences, tokens: int, configs: list[GPTConfig]) -> int:
    """How many sequences `tokens` tokens make. Raises InputError if there are fewer, or a model cannot read
    them."""
    if len({config.tokenizer for config in configs}) > 1:
        raise InputError("the models' tokenizers differ; measure each on a data set of its own")
    split, start, length = sequences.tokens, sequences.start, sequences.length
    count = tokens // length
    if not 0 < count <= sequences.count:
        hint = "; --start-token 0 begins at the start" if start else ""
        raise InputError(
            f"{split}: has {split.count:,} tokens, which make {sequences.count} sequences of {length} "
            f"after --start-token {start}; --tokens {tokens} asks for {count}{hint}"
        )
    smallest = min(config.vocab_size for config in configs)
    split.check_vocabulary(start, start + count * length + 1, smallest)
    return count


def check_own_tokenizer(weights: Path, config: GPTConfig, dataset_folder: Path) -> None:
    """Raise InputError if a model brings another tokenizer.json than the data set's, beside its weights."""
    if config.tokenizer == "dataset" and (weights.parent / TOKENIZER_FILE).exists():
        ours, theirs = (get_tokenizer("dataset", folder) for folder in (weights.parent, dataset_folder))
        if not same_tokenizer(ours, theirs):
            raise InputError(
                f"{weights.parent / TOKENIZER_FILE}: is not the tokenizer of the data set {dataset_folder}; "
                "measure the model on the text it was trained on, prepared with --tokenizer and this file"
            )


@torch.no_grad()
def sequence_losses(
    models: list[GPTModel], sequences: Sequences, count: int, *, batch_size: int, document_masking: bool
) -> Tensor:
    """Each model's mean loss on each of the first `count` sequences, in nats per token: (models, count),
    float64, on the CPU. The data are read once."""
    losses = torch.zeros(len(models), count, dtype=torch.float64)
    features_of = document_features if document_masking else GPTModel.features
    for first in tqdm(range(0, count, batch_size), unit="batch", disable=None):
        batch = sequences.read(first, min(batch_size, count - first)).long()
        for model, row in zip(models, losses, strict=True):
            tokens = batch.to(model.tok_emb.weight.device)
            features = features_of(model, tokens[:, :-1])
            # Sequence by sequence: the logits of a batch would take gigabytes.
            for index, (x, targets) in enumerate(zip(features, tokens[:, 1:], strict=True), start=first):
                row[index] = F.cross_entropy(model.out_head(x), targets, reduction="none").double().mean()
    return losses


def count_bytes(sequences: Sequences, count: int, tokenizer_name: str, folder: Path) -> tuple[int, str]:
    """The length in bytes of the text that the targets of the first `count` sequences encode, end-of-text not
    counted; if it is 0, the second value says why. `folder` is the data set's."""
    try:
        tokenizer = get_tokenizer(tokenizer_name, folder)
    except InputError as error:
        return 0, str(error)
    lengths = torch.zeros(65_536, dtype=torch.int64)
    pieces = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    lengths[: len(pieces)] = torch.tensor([len(piece) for piece in pieces])
    lengths[tokenizer.eot_token] = 0
    size = sum(int(lengths[sequences.read(i, 1)[:, 1:].long()].sum()) for i in range(count))
    return size, "" if size else "the tokens encode no text"


def known(value: float | None, otherwise: str = "unknown") -> str:
    """A figure with four decimals."""
    return otherwise if value is None else f"{value:.4f}"


def print_table(weights: list[Path], results: list[MeasuredLoss], losses: Tensor, no_bytes: str) -> None:
    """Print several models' results as a Markdown table.

    The last column is the mean difference to the first model, sequence by sequence. Its standard error is far
    smaller than those of the losses, because text that is hard for one model is hard for all.
    """
    print("\n| model | loss | standard error | perplexity | bits per byte | loss minus the first's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path, result, difference in zip(weights, results, losses - losses[0], strict=True):
        versus = f"{difference.mean():+.4f}"
        versus += f" ± {difference.std() / math.sqrt(len(difference)):.4f}" if len(difference) > 1 else ""
        cells = (
            str(path),
            f"{result.loss:.4f}",
            known(result.standard_error),
            f"{result.perplexity:.2f}",
            known(result.bits_per_byte),
            "" if path is weights[0] else versus,
        )
        print(f"| {' | '.join(cells)} |")
    if no_bytes:
        print(f"\nBits per byte: unknown: {no_bytes}")


if __name__ == "__main__":
    run_command(main)
