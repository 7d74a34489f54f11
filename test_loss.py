#!/usr/bin/env python3
"""How good is it? The loss of trained models on text that they have not seen.

    python test_loss.py datasets runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_loss.py datasets runs/demo/model.json runs/demo/checkpoints/best/model.safetensors \\
        --dataset local/python-docs --start-token 0 --tokens 65536
    python test_loss.py datasets A/model.json A/model.safetensors B/model.json B/model.safetensors ...
    python test_loss.py datasets ... --windows harness       figures that compare with lm-evaluation-harness's

Several models are measured in one pass over the data and shown as a table. The loss of a checkpoint is kept
beside it, in test-loss.json, for compare_runs.py and upload_model.py. Of a small data set, what there is
is measured.
"""

import math
from datetime import UTC, datetime
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError, RunError
from basemodel.data.hub import fetch_dataset
from basemodel.data.sequences import Sequences, match_tokenizer
from basemodel.data.token_files import TOKENIZER_FILE, TokenFiles
from basemodel.data.tokenizer import get_tokenizer, same_tokenizer, token_byte_lengths
from basemodel.evaluation.measurements import MeasuredLoss, write_test_loss
from basemodel.evaluation.test_slices import DocumentSlice, ScoredSlice, SequenceSlice
from basemodel.model.config import GPTConfig
from basemodel.model.loss import IGNORED, document_features
from basemodel.model.weights import folder_of, load_model
from checkpointing import META_FILE
from gpt import GPTModel


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
@click.option(
    "--windows",
    type=click.Choice(["sequences", "harness"]),
    default="sequences",
    show_default=True,
    help="harness: each document by itself, as lm-evaluation-harness's loglikelihood_rolling has it.",
)
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
    windows: str,
) -> None:
    """Measure the loss of the models in MODEL_SAFETENSORS, ours or Hugging Face GPT-2's."""
    if document_masking and windows == "harness":
        raise InputError(
            "--document-masking goes with --windows sequences; the harness's are documents anyway"
        )
    if len(models) % 2:
        raise InputError(f"models come in pairs, MODEL_JSON MODEL_SAFETENSORS; {models[-1]} has no partner")
    pairs = list(zip(models[::2], models[1::2], strict=True))
    loaded = [load_model(*pair) for pair in pairs]
    configs = [model.config for model in loaded]
    length = choose_length(configs, context_length)
    folder = fetch_dataset(datasets_dir, dataset, None, [split])
    check_together(folder, pairs, loaded)
    configs = [model.config for model in loaded]
    file = TokenFiles(folder, split)
    if context.get_parameter_source("start_token") is click.core.ParameterSource.DEFAULT:
        start_token = start_within(file, start_token, length)
    choose = choose_sequences if windows == "sequences" else choose_documents
    part = choose(file, start_token, tokens, length, configs)

    sums = unit_losses(loaded, part, batch_size=batch_size, document_masking=document_masking)
    total = part.sizes.sum().item()
    size, no_bytes = count_bytes(part, configs[0].tokenizer, folder)
    results = []
    for (_, weights), row in zip(pairs, sums, strict=True):
        loss = row.sum().item() / total
        if not math.isfinite(loss):
            raise RunError(f"{weights}: the loss is {loss:.3g}: damaged weights, or training diverged")
        result = MeasuredLoss(
            dataset=dataset,
            split=split,
            start_token=start_token,
            tokens=int(total),
            context_length=length,
            loss=loss,
            perplexity=(row.sum() / total).exp().item(),
            standard_error=standard_error(row, part.sizes),
            bits_per_byte=row.sum().item() / math.log(2) / size if size else None,
            measured=datetime.now(UTC).isoformat(timespec="seconds"),
            document_masking=document_masking,
            windows="sequences" if windows == "sequences" else "harness windows",
        )
        results.append(result)
        if (folder_of(weights) / META_FILE).exists():  # a checkpoint of this project
            write_test_loss(folder_of(weights), result)
    print(f"{part} from {file}")
    if len(results) > 1:
        differences = [(row.sum().item() / total, standard_error(row, part.sizes)) for row in sums - sums[0]]
        print_table([weights for _, weights in pairs], results, differences, no_bytes)
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


def check_together(folder: Path, pairs: list[tuple[Path, Path]], models: list[GPTModel]) -> None:
    """Raise InputError unless all models read a data set's tokens; tell them its end-of-text."""
    if len({model.config.tokenizer for model in models}) > 1:
        raise InputError("the models' tokenizers differ; measure each on a data set of its own")
    for (_, weights), model in zip(pairs, models, strict=True):
        model.config = match_tokenizer(folder, model.config)
        check_own_tokenizer(folder_of(weights), model.config, folder)


def start_within(file: TokenFiles, start: int, length: int) -> int:
    """Where to start if nobody has said: `start`, or the beginning of a file that ends before it."""
    if Sequences(file, start, length, seed=0).count:
        return start
    print(f"There are only {file.count:,} tokens, none to measure after the first {start:,}; starting at 0")
    return 0


def choose_sequences(
    file: TokenFiles, start: int, tokens: int, length: int, configs: list[GPTConfig]
) -> SequenceSlice:
    """The sequences that `tokens` tokens from `start` on make, or as many as there are. Raises InputError if
    there are none, or a model cannot read them."""
    sequences = Sequences(file, start, length, seed=0)
    if not sequences.count:
        hint = f"; --start-token can be at most {file.count - length - 1}" if file.count > length else ""
        raise InputError(
            f"{file}: has {file.count:,} tokens, not one sequence of {length} and its target after "
            f"--start-token {start}{hint}"
        )
    asked = tokens // length
    if not asked:
        raise InputError(f"--tokens {tokens} is less than one sequence; use {length} or more")
    count = min(asked, sequences.count)
    if count < asked:
        print(f"Only {count:,} of the {asked:,} sequences asked for are there; measuring those")
    file.check_vocabulary(start, start + count * length + 1, min(config.vocab_size for config in configs))
    return SequenceSlice(sequences, count)


def choose_documents(
    file: TokenFiles, start: int, tokens: int, length: int, configs: list[GPTConfig]
) -> DocumentSlice:
    """The documents in `tokens` tokens from `start` on, or in as many as there are. Raises InputError if
    there are none, or a model cannot read them."""
    stop, end_of_text = min(start + tokens, file.count), configs[0].end_of_text
    smallest = min(config.vocab_size for config in configs)
    if end_of_text >= smallest:
        raise InputError(f"a model's vocabulary of {smallest} leaves out end-of-text, {end_of_text}")
    if start < file.count < start + tokens:
        print(f"Only {stop - start:,} of the {tokens:,} tokens asked for are there; measuring those")
    part = DocumentSlice(file, start, stop, length, end_of_text)
    if start >= file.count or not part.documents:
        raise InputError(
            f"{file}: no document begins in the {tokens:,} tokens after --start-token {start} of "
            f"{file.count:,}; --start-token 0 begins at the start"
        )
    file.check_vocabulary(start, stop, smallest)
    return part


def check_own_tokenizer(own_folder: Path, config: GPTConfig, dataset_folder: Path) -> None:
    """Raise InputError if a model brings another tokenizer.json than the data set's, beside its weights."""
    if config.tokenizer == "dataset" and (own_folder / TOKENIZER_FILE).exists():
        ours, theirs = (get_tokenizer("dataset", folder) for folder in (own_folder, dataset_folder))
        if not same_tokenizer(ours, theirs):
            raise InputError(
                f"{own_folder / TOKENIZER_FILE}: is not the tokenizer of the data set {dataset_folder}; "
                "measure the model on the text it was trained on, prepared with --tokenizer and this file"
            )


@torch.no_grad()
def unit_losses(
    models: list[GPTModel], part: ScoredSlice, *, batch_size: int, document_masking: bool
) -> Tensor:
    """Each model's loss on each unit of `part`, summed over its tokens, in nats: (models, units), float64, on
    the CPU. The data are read once."""
    losses = torch.zeros(len(models), len(part.sizes), dtype=torch.float64)
    features_of = document_features if document_masking else GPTModel.features
    total = math.ceil(part.rows / batch_size)
    for batch in tqdm(part.batches(batch_size), total=total, unit="batch", disable=None):
        for model, sums in zip(models, losses, strict=True):
            device = model.tok_emb.weight.device
            features, targets = features_of(model, batch.inputs.to(device)), batch.targets.to(device)
            # Row by row: the logits of a batch would take gigabytes.
            for x, y, unit in zip(features, targets, batch.units, strict=True):
                scored = y != IGNORED
                sums[unit] += (
                    F.cross_entropy(model.out_head(x[scored]), y[scored], reduction="none").double().sum()
                )
    return losses


def standard_error(sums: Tensor, sizes: Tensor) -> float | None:
    """The standard error of sums.sum() / sizes.sum(), a ratio of two means over independent units (Cochran
    1977, section 2.11); None for a single unit."""
    count, total = len(sums), sizes.sum()
    if count < 2:
        return None
    residuals = sums - sums.sum() / total * sizes
    return math.sqrt(residuals.square().sum().item() * count / (count - 1)) / total.item()


def count_bytes(part: ScoredSlice, tokenizer_name: str, folder: Path) -> tuple[int, str]:
    """The length in bytes of the text that the scored tokens encode, end-of-text not counted; if it is 0, the
    second value says why. `folder` is the data set's."""
    try:
        lengths = token_byte_lengths(get_tokenizer(tokenizer_name, folder))
    except InputError as error:
        return 0, str(error)
    size = sum(int(lengths[tokens].sum()) for tokens in part.scored())
    return size, "" if size else "the tokens encode no text"


def known(value: float | None, otherwise: str = "unknown") -> str:
    """A figure with four decimals."""
    return otherwise if value is None else f"{value:.4f}"


def print_table(
    weights: list[Path],
    results: list[MeasuredLoss],
    differences: list[tuple[float, float | None]],
    no_bytes: str,
) -> None:
    """Print several models' results as a Markdown table.

    The last column is the difference to the first model, with its standard error. That is far smaller than
    those of the losses, because text that is hard for one model is hard for all.
    """
    print("\n| model | loss | standard error | perplexity | bits per byte | loss minus the first's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path, result, (difference, error) in zip(weights, results, differences, strict=True):
        versus = f"{difference:+.4f}" + ("" if error is None else f" ± {error:.4f}")
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
