#!/usr/bin/env python3
"""How good is it? The loss of trained models on text that they have not seen.

    python test_loss.py datasets runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_loss.py datasets runs/demo/model.json runs/demo/checkpoints/best/model.safetensors \\
        --dataset local/python-docs --start-token 0 --tokens 65536
    python test_loss.py datasets A/model.json A/model.safetensors B/model.json B/model.safetensors ...

Several models are measured in one pass over the data and shown as a table. The loss of a checkpoint is kept
beside it, in test-loss.json, for compare_runs.py and upload_model.py. If the data set is smaller than the
slice asked for, all of it is measured.
"""

import math
from datetime import UTC, datetime
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError, RunError
from basemodel.common.names import TOKENIZER_FILE
from basemodel.common.output import Progress, markdown_table
from basemodel.data.hub import fetch_dataset
from basemodel.data.sequences import Sequences, match_tokenizer
from basemodel.data.token_files import TokenFiles
from basemodel.data.tokenizer import get_tokenizer, same_tokenizer, token_byte_lengths
from basemodel.evaluation.measurements import MeasuredLoss, pair_models, with_error, write_test_loss
from basemodel.model.config import GPTConfig
from basemodel.model.loss import document_features
from basemodel.model.weights import folder_of, load_model
from checkpointing import META_FILE
from gpt import GPTModel


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("datasets_dir", type=Path)
@click.argument("models", type=Path, nargs=-1, required=True, metavar="MODEL_JSON MODEL_SAFETENSORS ...")
@click.option("--dataset", default="gpjt/fineweb-gpt2-tokens", help="Data set in DATASETS_DIR or on the Hub.")
@click.option(
    "--split", type=click.Choice(["train", "validation"]), default="validation", help="Split to use."
)
@click.option("--start-token", type=click.IntRange(0), default=50_000_000, help="First token of the slice.")
@click.option("--tokens", type=click.IntRange(1), default=19_660_800, help="Length of the slice.")
@click.option("--batch-size", type=click.IntRange(1), default=6, help="Sequences per forward pass.")
@click.option("--context-length", type=click.IntRange(1), help="Tokens per sequence; default: the models'.")
@click.option("--document-masking", is_flag=True, help="Let tokens attend to their own document alone.")
@click.pass_context
def main(
    context: click.Context,
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
    """Measure the loss of the models in MODEL_SAFETENSORS, ours or Hugging Face's GPT-2."""
    pairs = pair_models(models)
    loaded = [load_model(*pair) for pair in pairs]
    length = choose_length([model.config for model in loaded], context_length)
    folder = fetch_dataset(datasets_dir, dataset, None, [split])
    match_tokenizers(folder, pairs, loaded)
    file = TokenFiles(folder, split)
    by_default = context.get_parameter_source("start_token") is click.core.ParameterSource.DEFAULT
    if by_default and not Sequences(file, start_token, length, seed=0).count:
        print(f"There are only {file.count:,} tokens; the slice starts at 0 instead of {start_token:,}")
        start_token = 0
    sequences = Sequences(file, start_token, length, seed=0)
    count = count_sequences(sequences, tokens)
    stop = start_token + count * length + 1
    file.check_vocabulary(start_token, stop, min(model.config.vocab_size for model in loaded))

    losses = sequence_losses(loaded, sequences, count, batch_size, document_masking)
    size = count_bytes(sequences, count, loaded[0].config.tokenizer, folder)
    results = []
    for (_, weights), row in zip(pairs, losses, strict=True):
        loss, error = mean_and_error(row)
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
            standard_error=error,
            bits_per_byte=row.sum().item() * length / math.log(2) / size if size else None,
            measured=datetime.now(UTC).isoformat(timespec="seconds"),
            document_masking=document_masking,
        )
        results.append(result)
        if (folder_of(weights) / META_FILE).exists():  # a checkpoint of this project
            write_test_loss(folder_of(weights), result)
    print(f"{count:,} sequences of {length:,} tokens from {file}")
    if len(results) > 1:
        print_table([weights for _, weights in pairs], results, losses)
    else:
        (result,) = results
        print(f"Loss against our test dataset: {result.loss:.3f}")
        print(f"Perplexity: {result.perplexity:.2f}")
        print(f"Standard error: {known(result.standard_error)}")
        print(f"Bits per byte: {known(result.bits_per_byte)}")


def choose_length(configs: list[GPTConfig], context_length: int | None) -> int:
    """The length of the test sequences, the same for all models. Raises InputError if it does not fit one."""
    lengths = sorted({config.context_length for config in configs})
    if context_length is None and len(lengths) > 1:
        raise InputError(
            f"the models' context lengths differ ({', '.join(map(str, lengths))}); --context-length "
            f"{lengths[0]} gives all of them the same sequences"
        )
    if context_length is not None and context_length > lengths[0]:
        raise InputError(f"--context-length can be at most {lengths[0]}, a model's own, not {context_length}")
    return context_length or lengths[0]


def match_tokenizers(folder: Path, pairs: list[tuple[Path, Path]], models: list[GPTModel]) -> None:
    """Set the models' end-of-text to that of the data set in `folder`. Raises InputError for a model that
    reads other tokens, or brings another tokenizer.json beside its weights."""
    if len({model.config.tokenizer for model in models}) > 1:
        raise InputError("the models' tokenizers differ; measure each on a data set of its own")
    for (_, weights), model in zip(pairs, models, strict=True):
        model.config = match_tokenizer(folder, model.config)
        own_folder = folder_of(weights)
        if model.config.tokenizer == "dataset" and (own_folder / TOKENIZER_FILE).exists():
            ours, theirs = (get_tokenizer("dataset", place) for place in (own_folder, folder))
            if not same_tokenizer(ours, theirs):
                raise InputError(
                    f"{own_folder / TOKENIZER_FILE}: is not the tokenizer of the data set {folder}; "
                    "measure the model on the text it was trained on, prepared with --tokenizer and this file"
                )


def count_sequences(sequences: Sequences, tokens: int) -> int:
    """How many sequences `tokens` tokens make, or all there are. Raises InputError if there are none."""
    file, start, length = sequences.tokens, sequences.start, sequences.length
    if not sequences.count:
        hint = f"; --start-token can be at most {file.count - length - 1}" if file.count > length else ""
        problem = f"has {file.count:,} tokens, not one sequence of {length} and its target"
        raise InputError(f"{file}: {problem} after --start-token {start}{hint}")
    requested = tokens // length
    if not requested:
        raise InputError(f"--tokens {tokens} is less than one sequence; use {length} or more")
    if sequences.count < requested:
        print(f"There are only {sequences.count:,} of the {requested:,} sequences; measuring all of them")
    return min(requested, sequences.count)


@torch.no_grad()
def sequence_losses(
    models: list[GPTModel], sequences: Sequences, count: int, batch_size: int, document_masking: bool
) -> Tensor:
    """Each model's mean loss on each of the first `count` sequences, in nats per token: (models, count),
    float64, on the CPU. The data are read once."""
    losses = torch.zeros(len(models), count, dtype=torch.float64)
    features_of = document_features if document_masking else GPTModel.features
    for first in Progress(range(0, count, batch_size), unit="batch"):
        tokens = sequences.read(first, min(batch_size, count - first)).long()  # (B, T + 1)
        for model, row in zip(models, losses, strict=True):
            device = model.tok_emb.weight.device
            features, targets = features_of(model, tokens[:, :-1].to(device)), tokens[:, 1:].to(device)
            # Sequence by sequence: the logits of a batch would take gigabytes.
            for index, (x, y) in enumerate(zip(features, targets, strict=True), start=first):
                row[index] = F.cross_entropy(model.out_head(x), y, reduction="none").double().mean()
    return losses


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of values (N,), one per sequence, and its standard error; None for a single one."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def count_bytes(sequences: Sequences, count: int, tokenizer_name: str, folder: Path) -> int:
    """The length in bytes of the text that the sequences' targets encode, end-of-text not counted; 0 with a
    message if the tokenizer is missing. `folder` is the data set's."""
    try:
        lengths = token_byte_lengths(get_tokenizer(tokenizer_name, folder))
    except InputError as error:
        print(f"Bits per byte cannot be computed: {error}")
        return 0
    return sum(int(lengths[sequences.read(index, 1)[0, 1:].numpy()].sum()) for index in range(count))


def known(value: float | None) -> str:
    """A value with four decimals."""
    return "unknown" if value is None else f"{value:.4f}"


def print_table(weights: list[Path], results: list[MeasuredLoss], losses: Tensor) -> None:
    """Print the results of several models, whose losses by sequence are (models, sequences).

    The last column is the difference to the first model, with its standard error. It is far smaller than
    those of the losses, because text that is hard for one model is hard for all.
    """
    rows = [
        (
            path,
            f"{result.loss:.4f}",
            known(result.standard_error),
            f"{result.perplexity:.2f}",
            known(result.bits_per_byte),
            with_error(*mean_and_error(row - losses[0]), sign="+") if index else None,
        )
        for index, (path, result, row) in enumerate(zip(weights, results, losses, strict=True))
    ]
    columns = "model", "loss", "standard error", "perplexity", "bits per byte", "loss minus the first's"
    print("\n" + markdown_table(columns, rows))


if __name__ == "__main__":
    run_command(main)
