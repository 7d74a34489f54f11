#!/usr/bin/env python3
"""What can it do? Accuracies at HellaSwag, LAMBADA and other tasks, by lm-evaluation-harness.

    pip install -e ".[harness]"
    python test_harness.py runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_harness.py A/model.json A/model.safetensors gpt2/config.json gpt2/model.safetensors
    python test_harness.py ... --tasks piqa,my-task --include-path my-tasks/       with a task of one's own

Several models are shown side by side, with their differences to the first on the same documents. Answers
are kept in harness-cache/, so that after an interruption the same command resumes. A checkpoint's results are
kept beside it, in harness.json, for compare_runs.py and upload_model.py.
"""

import sys
from pathlib import Path

import click

from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation.harness import (
    Measured,
    evaluate_task,
    load_tasks,
    paired_difference,
    require_harness,
)
from basemodel.evaluation.measurements import keep_task_results, with_error
from basemodel.evaluation.scoring import Scorer
from basemodel.model.weights import folder_of, load_model
from checkpointing import META_FILE

TASKS = "hellaswag,lambada_openai,arc_easy,piqa,winogrande"
# OpenAI's GPT-2 small, zero-shot. For HellaSwag see the head of dev/data/hellaswag.py in karpathy/llm.c, for
# LAMBADA EleutherAI/lm-evaluation-harness#2159; the paper is Radford et al. 2019, of which table 3 is meant.
PUBLISHED = {
    "hellaswag": "acc 0.2892, acc_norm 0.3114 (lm-evaluation-harness, as quoted in karpathy/llm.c)",
    "lambada_openai": "acc 0.3256, perplexity 40.06 (lm-evaluation-harness, its issue 2159); the paper's "
    "0.4599 and 35.13 are of OpenAI's own preparation of the text",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", type=Path, nargs=-1, required=True, metavar="MODEL_JSON MODEL_SAFETENSORS ...")
@click.option("--tasks", default=TASKS, show_default=True, help="Names or YAML files, with commas between.")
@click.option(
    "--include-path", "folders", type=Path, multiple=True, help="A folder of further tasks, as YAML files."
)
@click.option("--fewshot", type=click.IntRange(0), help="Solved examples per question; default: the task's.")
@click.option("--limit", type=click.IntRange(1), help="Only the first documents of each task, for a try.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--cache", type=Path, default="harness-cache", show_default=True, help="A folder for answers.")
def main(
    models: tuple[Path, ...],
    tasks: str,
    folders: tuple[Path, ...],
    fewshot: int | None,
    limit: int | None,
    batch_size: int,
    cache: Path,
) -> None:
    """Evaluate the models in MODEL_SAFETENSORS, ours or Hugging Face GPT-2's, by lm-evaluation-harness."""
    require_harness()
    if len(models) % 2:
        raise InputError(f"models come in pairs, MODEL_JSON MODEL_SAFETENSORS; {models[-1]} has no partner")
    pairs = list(zip(models[::2], models[1::2], strict=True))
    labels = label_models([weights for _, weights in pairs])
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--include-path {folder}: no such folder")
    loaded = [load_model(*pair) for pair in pairs]
    checkpoints = [folder_of(weights) for _, weights in pairs]
    scorers = [
        Scorer(model, get_tokenizer(model.config.tokenizer, checkpoint), batch_size=batch_size, cache=cache)
        for model, checkpoint in zip(loaded, checkpoints, strict=True)
    ]
    todo = load_tasks(list(dict.fromkeys(names)), folders, fewshot)

    columns: list[list[Measured]] = []
    for checkpoint, label, scorer in zip(checkpoints, labels, scorers, strict=True):
        columns.append([])
        for name, task in todo.items():
            print(f"{label}: {name}", file=sys.stderr)
            measured = evaluate_task(scorer, task, limit)
            columns[-1] += measured
            if (checkpoint / META_FILE).exists():  # a checkpoint of this project
                keep_task_results(checkpoint, [each.result for each in measured])
    print_table(labels, columns)
    for label, scorer in zip(labels, scorers, strict=True):
        if scorer.cut:
            print(
                f"\n{label}: {scorer.cut:,} of {scorer.asked:,} texts are longer than its context of "
                f"{scorer.model.config.context_length:,} tokens; it saw their ends"
            )
    for name in filter(PUBLISHED.__contains__, todo):
        print(f"\nOpenAI's GPT-2 small, published, {name}: {PUBLISHED[name]}")


def label_models(weights: list[Path]) -> list[str]:
    """A short name for each model: its folder, less what all models' folders have in common."""
    folders = [folder_of(path) for path in weights]
    common = set.intersection(*(set(path.parts) for path in folders)) if len(folders) > 1 else set()
    labels = [str(Path(*(part for part in path.parts if part not in common))) for path in folders]
    if "." in labels or len(set(labels)) < len(labels):
        labels = [str(path) for path in weights]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label} is given twice")
    return labels


def print_table(labels: list[str], columns: list[list[Measured]]) -> None:
    """Print a Markdown table: a row for each task and metric, a column for each model, and one for each one's
    difference to the first, whose standard error counts only what differs on the same documents."""
    heads = ["task", "metric", "documents", *labels, *(f"{label} minus {labels[0]}" for label in labels[1:])]
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in zip(*columns, strict=True):
        result = row[0].result
        arrow = {True: " ↑", False: " ↓", None: ""}[result.higher_is_better]
        cells = [result.task + result.setting, result.metric + arrow, f"{result.documents:,}"]
        cells += [str(each.result) for each in row]
        for each in row[1:]:
            cells.append(with_error(*paired_difference(each, row[0]), sign="+"))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run_command(main)
