#!/usr/bin/env python3
"""Can it be taught? Fine-tune models on instructions, let them answer others, and judge the answers.

    python test_ift.py generate mine runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_ift.py judge mine-ift-results.json gpt2-ift-results.json           OPENAI_API_KEY is set
    python test_ift.py judge *-ift-results.json --base-url http://localhost:11434/v1 --model llama3.3
    python test_ift.py judge *-ift-results.json --no-llm                           no server

Fine-tuning follows chapter 7 of "Build a Large Language Model (from Scratch)" (Raschka 2024) and uses its
1,100 records: in file order, 85% for training, 10% to answer, 5% for validation. Unlike the book, it trains
until the validation loss rises, and answers with the weights of the best epoch. The prompts need a longer
context than the demo's.
"""

import itertools
import json
from pathlib import Path

import click
import numpy as np

from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError
from basemodel.common.files import replace_text
from basemodel.common.names import require_plain_name
from basemodel.common.output import markdown_table
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation import instructions
from basemodel.evaluation.instructions import FIELDS, FineTuning
from basemodel.evaluation.judging import RESULTS_ENDING, Judge, judge_all, read_questions, token_f1
from basemodel.model.generation import GREEDY, continuations, require_vocabulary
from basemodel.model.weights import folder_of, load_model

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
RATE = click.FloatRange(0, 1, min_open=True)
SEED = click.IntRange(0, 2**63 - 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Fine-tune a model on instructions and let it answer others; judge the answers of several models."""


@main.command(name="generate")
@click.argument("name")
@click.argument("model_json", type=Path)
@click.argument("model_safetensors", type=Path)
@click.option("--data", type=FILE, help="File of records to use in place of the book's.")
@click.option("--datasets-dir", type=Path, default="datasets", help="Folder that keeps downloaded records.")
@click.option("--output-dir", type=FOLDER, default=".", help="Folder that the results are written to.")
@click.option("--drop-rate", type=click.FloatRange(0, 0.99), default=0.0, help="Dropout while fine-tuning.")
@click.option("--learning-rate", type=RATE, default=5e-5, help="Learning rate of AdamW, which is constant.")
@click.option("--weight-decay", type=click.FloatRange(0), default=0.1, help="Weight decay of AdamW.")
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Records per training step.")
@click.option("--max-epochs", type=click.IntRange(1), default=100, help="Epochs to train at most.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, help="Tokens per answer at most.")
@click.option("--seed", type=SEED, default=123, help="Seed of the order of records and of dropout.")
def generate_command(
    name: str,
    model_json: Path,
    model_safetensors: Path,
    data: Path | None,
    datasets_dir: Path,
    output_dir: Path,
    max_new_tokens: int,
    drop_rate: float,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    max_epochs: int,
    seed: int,
) -> None:
    """Fine-tune the model in MODEL_SAFETENSORS and write its answers to NAME-ift-results.json.

    Answers take the most likely token each time.
    """
    results = output_dir / (require_plain_name(name, "name") + RESULTS_ENDING)
    if results.exists():
        raise InputError(f"{results}: already exists; remove it or choose another name")
    if data:
        records = instructions.parse_records(data.read_bytes(), data)
    else:
        records = instructions.fetch_records(datasets_dir)
    train, validation, test = instructions.split_records(records)
    model = load_model(model_json, model_safetensors)
    tokenizer = get_tokenizer(model.config.tokenizer, folder_of(model_safetensors))
    require_vocabulary(model, tokenizer)
    settings = FineTuning(learning_rate, weight_decay, batch_size, drop_rate, max_epochs, seed)
    train_tokens, validation_tokens = (
        [tokenizer.encode_ordinary(instructions.prompt_of(record) + record["output"]) for record in part]
        for part in (train, validation)
    )
    print(f"{len(train):,} records to train on, {len(validation):,} to validate, {len(test):,} to answer")
    print(f"AdamW, learning rate {learning_rate:g}, batch {batch_size}, dropout {drop_rate:g}")
    instructions.check_lengths(train, tokenizer, model.config.context_length)
    instructions.fine_tune(model, train_tokens, validation_tokens, settings, tokenizer.eot_token)
    prompts = [instructions.prompt_of(record) for record in test]
    responses = continuations(model, tokenizer, prompts, max_new_tokens, GREEDY)
    answered = [
        {**{field: record[field] for field in FIELDS}, "model_response": response.strip()}
        for record, response in zip(test, responses, strict=True)
    ]
    replace_text(results, json.dumps(answered, indent=1, ensure_ascii=False) + "\n")
    print(f"Written to {results}")


@main.command(name="judge")
@click.argument("paths", type=FILE, nargs=-1, required=True, metavar="RESULTS.json ...")
@click.option("--model", default="gpt-5.1", help="Model that judges.")
@click.option("--base-url", help="Address of an OpenAI-compatible server; default: OpenAI's.")
@click.option("--no-llm", is_flag=True, help="Score by the words shared with the reference instead.")
@click.option("--seed", type=SEED, default=42, help="Seed of the order of answers and of the intervals.")
@click.option("--retries", type=click.IntRange(0), default=3, help="Attempts after a reply without scores.")
@click.option("--parallel", type=click.IntRange(1), default=4, help="Questions to ask at the same time.")
@click.option("--cache", type=Path, default="ift-judgements.jsonl", help="File that keeps the replies.")
def judge_command(
    paths: tuple[Path, ...],
    model: str,
    base_url: str | None,
    no_llm: bool,
    seed: int,
    retries: int,
    parallel: int,
    cache: Path,
) -> None:
    """Score the models' answers in RESULTS.json, from 0 to 100, side by side.

    The key for the judge's server comes from OPENAI_API_KEY. After an interruption the same command resumes.
    """
    results = read_questions(paths)
    if no_llm:
        pairs = [[(r["model_response"], r["output"]) for r in records] for records in results.values()]
        title, scores = "Token F1", np.array([[token_f1(*pair) for pair in row] for row in pairs])
    else:
        title = f"Judged by {model}"
        scores = judge_all(results, Judge(model, base_url, retries, cache), seed, parallel)
    print_scores(title, list(results), scores, seed)


def bootstrap_intervals(values: np.ndarray, seed: int, resamples: int = 10_000) -> np.ndarray:
    """95% intervals of the rows' means, (rows, 2): percentiles over resampled questions."""
    questions = values.shape[1]
    draws = np.random.default_rng(seed).multinomial(questions, [1 / questions] * questions, size=resamples)
    return np.percentile(draws @ values.T / questions, [2.5, 97.5], axis=0).T


def print_scores(title: str, names: list[str], scores: np.ndarray, seed: int) -> None:
    """Print Markdown tables of the models' mean scores, best first, and of the difference between each pair.

    Differences are taken per question, so questions that are hard for all do not widen their intervals.
    Questions without scores (NaN) are left out, and counted.
    """
    asked, scores = scores.shape[1], scores[:, ~np.isnan(scores).any(axis=0)]

    def print_means(heading: str, labels: list[str], values: np.ndarray, form: str) -> None:
        rows = [
            (label, f"{row.mean():{form}}", f"{low:{form}} to {high:{form}}")
            for label, row, (low, high) in zip(labels, values, bootstrap_intervals(values, seed), strict=True)
        ]
        print("\n" + markdown_table([heading, "mean", "95% interval"], rows))

    order = sorted(range(len(names)), key=lambda index: -scores[index].mean())
    print(f"\n{title}, {scores.shape[1]} questions")
    if skipped := asked - scores.shape[1]:
        print(f"{skipped} of {asked} questions have no valid scores; means and intervals leave them out.")
        print("The same command asks for them again")
    print_means("model", [names[index] for index in order], scores[order], ".1f")
    if pairs := list(itertools.combinations(order, 2)):
        labels = [f"{names[a]} minus {names[b]}" for a, b in pairs]
        print_means("paired difference", labels, np.stack([scores[a] - scores[b] for a, b in pairs]), "+.1f")


if __name__ == "__main__":
    run_command(main)
