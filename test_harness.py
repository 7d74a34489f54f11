#!/usr/bin/env python3
"""What can it do? Accuracy on HellaSwag, LAMBADA and other tasks, by lm-evaluation-harness.

    pip install -e ".[harness]"
    python test_harness.py runs/original/model.json runs/original/checkpoints/best/model.safetensors
    python test_harness.py A/model.json A/model.safetensors gpt2/config.json gpt2/model.safetensors
    python test_harness.py ... --tasks piqa,my-task --include-path my-tasks/       with a task of your own

Several models are shown side by side, with their differences to the first on the same documents. Answers
are kept in harness-cache/, so after an interruption the same command resumes. The results of a checkpoint are
kept beside it, in harness.json, for compare_runs.py and upload_model.py.
"""

import sys
from pathlib import Path

import click

from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError
from basemodel.common.output import markdown_table
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation.harness import Score, evaluate_task, load_tasks, paired_difference, require_harness
from basemodel.evaluation.measurements import add_task_results, pair_models, with_error
from basemodel.evaluation.scoring import Scorer
from basemodel.model.weights import folder_of, load_model
from checkpointing import META_FILE

TASKS = "hellaswag,lambada_openai,arc_easy,piqa,winogrande"
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("models", type=Path, nargs=-1, required=True, metavar="MODEL_JSON MODEL_SAFETENSORS ...")
@click.option("--tasks", default=TASKS, help="Names of tasks or YAML files, separated by commas.")
@click.option("--include-path", "folders", type=FOLDER, multiple=True, help="Folder of YAML files of tasks.")
@click.option("--fewshot", type=click.IntRange(0), help="Solved examples per question; default: the task's.")
@click.option("--limit", type=click.IntRange(1), help="Documents per task at most, for a quick try.")
@click.option("--batch-size", type=click.IntRange(1), default=32, help="Texts per forward pass.")
@click.option("--cache", type=Path, default="harness-cache", help="Folder that keeps the answers.")
def main(
    models: tuple[Path, ...],
    tasks: str,
    folders: tuple[Path, ...],
    fewshot: int | None,
    limit: int | None,
    batch_size: int,
    cache: Path,
) -> None:
    """Evaluate the models in MODEL_SAFETENSORS, ours or Hugging Face's GPT-2, by lm-evaluation-harness."""
    require_harness()
    pairs = pair_models(models)
    labels = label_models([weights for _, weights in pairs])
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task")
    loaded = [load_model(*pair) for pair in pairs]
    checkpoints = [folder_of(weights) for _, weights in pairs]
    scorers = [
        Scorer(model, get_tokenizer(model.config.tokenizer, checkpoint), batch_size=batch_size, cache=cache)
        for model, checkpoint in zip(loaded, checkpoints, strict=True)
    ]
    loaded_tasks = load_tasks(list(dict.fromkeys(names)), folders, fewshot)

    columns: list[list[Score]] = []
    for checkpoint, label, scorer in zip(checkpoints, labels, scorers, strict=True):
        columns.append([])
        for name, task in loaded_tasks.items():
            print(f"{label}: {name}", file=sys.stderr)
            scores = evaluate_task(scorer, task, limit)
            columns[-1] += scores
            if (checkpoint / META_FILE).exists():  # a checkpoint of this project
                add_task_results(checkpoint, [score.result for score in scores])
    print_table(labels, columns)
    for label, scorer in zip(labels, scorers, strict=True):
        if scorer.cut:
            print(
                f"\n{label}: {scorer.cut:,} of {scorer.asked:,} texts are longer than its context of "
                f"{scorer.model.config.context_length:,} tokens; it saw only the end of each"
            )


def label_models(weights: list[Path]) -> list[str]:
    """A short name for each model: its folder, without the parts that all models' folders share."""
    folders = [folder_of(path) for path in weights]
    common = set.intersection(*(set(path.parts) for path in folders)) if len(folders) > 1 else set()
    labels = [str(Path(*(part for part in path.parts if part not in common))) for path in folders]
    if "." in labels or len(set(labels)) < len(labels):
        labels = [str(path) for path in weights]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"{label} is given twice")
    return labels


def print_table(labels: list[str], columns: list[list[Score]]) -> None:
    """Print a Markdown table: a row for each task and metric, a column for each model, and one for its
    difference to the first model, whose standard error is that of the paired differences by document."""
    first, *others = labels
    headings = ["task", "metric", "documents", *labels, *(f"{label} minus {first}" for label in others)]
    rows = []
    for scores in zip(*columns, strict=True):
        result = scores[0].result
        arrow = {True: " ↑", False: " ↓", None: ""}[result.higher_is_better]
        cells = [result.task + result.setting, result.metric + arrow, f"{result.documents:,}"]
        cells += [str(score.result) for score in scores]
        cells += [with_error(*paired_difference(score, scores[0]), sign="+") for score in scores[1:]]
        rows.append(cells)
    print("\n" + markdown_table(headings, rows))


if __name__ == "__main__":
    run_command(main)
