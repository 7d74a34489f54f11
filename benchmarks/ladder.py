"""Recipes on a ladder of sizes: how many tokens, and how many seconds, each takes to the same loss.

    python prepare_datasets.py corpus.jsonl datasets/local/ladder --train-tokenizer 2048
    python benchmarks/ladder.py datasets FOLDER                    every study of ladder.json, then the tables
    python benchmarks/ladder.py datasets FOLDER --study tuning     one study; two can be run side by side
    python benchmarks/ladder.py datasets FOLDER --report --time    the tables, with step times taken now

A study is a recipe of some size and what is varied in it. ablate.py trains it in FOLDER, on tokens seen once,
and validates on the same held-out documents. Stopped, the same command goes on. Losses are in nats per token.
"""

import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from ablations import step_times
from common import require

import ablate
from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_json_object
from basemodel.data.hub import dataset_folder
from basemodel.model.config import GPTConfig
from basemodel.results.study import KEYS, Study, final_loss, table, write_run
from gpt import GPTModel

LADDER = Path(__file__).with_name("ladder.json")
FEWEST_FOR_A_FIT = 7  # of six numbers
ROUNDS = 15  # timed steps of each recipe
NEW = "new"  # the recipe that the others are compared with
Ladder = dict[str, Any]  # ladder.json: sizes, what all share, recipes, studies


@dataclass(frozen=True)
class Result:
    """A training that has finished."""

    size: str
    recipe: str
    changes: dict[str, Any]  # to the recipe, by key
    tokens: int
    seed: int
    loss: float


def write_base(ladder: Ladder, size: str, recipe: str, folder: Path) -> str:
    """Write the run of a recipe at a size to `folder`, and return its name."""
    values: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for key, value in (ladder["shared"] | ladder["sizes"][size] | ladder["recipes"][recipe]).items():
        values[KEYS[key]][key] = value
    folder.mkdir(parents=True, exist_ok=True)
    write_run(folder / f"{size}-{recipe}", values, seed=1)
    return f"{size}-{recipe}"


def plan_study(ladder: Ladder, entry: dict[str, Any], folder: Path) -> Study:
    """The study of an entry of ladder.json."""
    base = write_base(ladder, entry["size"], entry["recipe"], folder)
    return Study.plan(folder, base, tuple(entry["vary"]), entry["seeds"])


def train(study: Study, datasets: Path) -> int | None:
    """Train what is missing of a study and print its table; return the signal that stopped it, if one did."""
    study.write_configs()
    trainings = ablate.Trainings(study, [sys.executable], datasets)
    trainings.check()
    if stopped := trainings.run():
        return stopped
    require(not trainings.failed, f"{study.base}: {trainings.failed}")
    print(f"\n{table(study)}", flush=True)
    return None


def results(ladder: Ladder, folder: Path) -> list[Result]:
    """All trainings of ladder.json that have finished, each once."""
    found = {}
    for entry in itertools.chain(*ladder["studies"].values()):
        study = plan_study(ladder, entry, folder)
        for variant, seed in itertools.product(study.variants, study.seeds):
            run = study.folder(variant, seed)
            if (loss := final_loss(run)) is not None:
                tokens = variant.values["train"]["min_train_tokens"]
                changes = {key: value for key, value in variant.changes.items() if key != "min_train_tokens"}
                found[run] = Result(entry["size"], entry["recipe"], changes, tokens, seed, loss)
    return list(found.values())


def mean_losses(found: list[Result], size: str, recipe: str) -> list[tuple[int, float, int]]:
    """Of a recipe as it is: tokens, the mean loss over seeds, and how many seeds, by tokens."""
    own = [each for each in found if (each.size, each.recipe, each.changes) == (size, recipe, {})]
    lengths = {n: [each.loss for each in own if each.tokens == n] for n in {each.tokens for each in own}}
    return [(n, statistics.fmean(losses), len(losses)) for n, losses in sorted(lengths.items())]


def tokens_to(loss: float, points: list[tuple[int, float, int]]) -> float | None:
    """After how many tokens a recipe's trainings reach a loss, between two of its lengths.

    At most as many as the shortest has, if that is below the loss; None if none of them reaches it.
    """
    if points and loss >= points[0][1]:
        return points[0][0]
    for (fewer, above, _), (more, below, _) in itertools.pairwise(points):
        if above >= loss >= below:
            return fewer * (more / fewer) ** ((above - loss) / (above - below))
    return None


def fit(points: list[tuple[str, int, int, float]]) -> tuple[float, dict[str, float]]:
    """Fit loss = E + A / parameters^a + B / (k * tokens)^b to (recipe, parameters, tokens, loss) points.

    All but k, one for each recipe, is the same for all (after Hoffmann et al. 2022, approach 3). Returns the
    root mean square error, and k relative to the new recipe's: 0.5 says that a recipe needs twice the tokens.
    No k where only negative terms fit.
    """
    recipes = sorted({recipe for recipe, *_ in points}, key=lambda each: (each != NEW, each))
    size, tokens, losses = (np.array([point[i] for point in points], dtype=float) for i in (1, 2, 3))
    is_of = np.array([[recipe == point[0] for recipe in recipes] for point in points], dtype=float)
    best: tuple[float, dict[str, float]] = (np.inf, {})
    for of_size, of_tokens in itertools.product(np.linspace(0.1, 0.8, 36), repeat=2):
        terms = is_of * (tokens / tokens.min())[:, None] ** -of_tokens
        columns = np.column_stack([np.ones_like(size), (size / size.min()) ** -of_size, terms])
        values = np.linalg.lstsq(columns, losses, rcond=None)[0]
        error = float(np.sqrt(np.mean((columns @ values - losses) ** 2)))
        if error < best[0] and (values >= 0).all():
            factors = (values[2] / values[2:]) ** (1 / of_tokens)
            best = error, dict(zip(recipes, factors.tolist(), strict=True))
    return best


def shares(tokens: int, loss: float, points: list[tuple[int, float, int]], slower: list[float]) -> list[str]:
    """What share of some tokens the new recipe takes to the loss that they gave, times each of `slower`."""
    reached = tokens_to(loss, points)
    if reached is None:
        return [""] * len(slower)
    under = "under " if loss > points[0][1] else ""  # even its shortest training does better
    return [f"{under}{reached / tokens * each:.2f}" for each in slower]


def print_comparison(ladder: Ladder, found: list[Result], folder: Path, *, timed: bool) -> None:
    """A table of each size and recipe: what it comes to, and what share the new recipe takes to the same."""
    of_time = ["of the time"] if timed else []
    header = ["size", "recipe", "tokens", "loss (seeds)", "the new recipe's share of the tokens", *of_time]
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for size in ladder["sizes"]:
        points = mean_losses(found, size, NEW)
        bases = {recipe: write_base(ladder, size, recipe, folder) for recipe in ladder["recipes"]}
        times = step_times(list(bases.values()), folder, ROUNDS) if timed else {}
        for recipe, base in bases.items():
            slower = [1.0, *([times[bases[NEW]] / times[base]] if timed else [])]
            for tokens, loss, seeds in mean_losses(found, size, recipe):
                cells = [""] * len(slower) if recipe == NEW else shares(tokens, loss, points, slower)
                cells = [size, recipe, f"{tokens:,}", f"{loss:.4f} ({seeds})", *cells]
                print(f"| {' | '.join(cells)} |")


def print_fit(ladder: Ladder, found: list[Result]) -> None:
    """How many tokens the new recipe needs for one of each other's, with the range when a training is left
    out of the fit: the spread of the fit alone, not of what lies beyond the ladder."""
    points = []
    for size, shape in ladder["sizes"].items():
        keys = {key: value for key, value in (ladder["shared"] | shape).items() if KEYS[key] == "model"}
        blocks = GPTModel.outline(GPTConfig(**keys)).trf_blocks
        parameters = sum(parameter.numel() for parameter in blocks.parameters())
        for recipe in ladder["recipes"]:
            means = mean_losses(found, size, recipe)
            points += [(recipe, parameters, tokens, loss) for tokens, loss, _ in means]
    print("\nBy a power law in parameters and tokens:")
    for recipe in [each for each in ladder["recipes"] if each != NEW]:
        pair = [point for point in points if point[0] in (NEW, recipe)]
        if len(pair) < FEWEST_FOR_A_FIT:
            print(f"{recipe}: {len(pair)} trainings of it and the new recipe are too few")
            continue
        error, factors = fit(pair)
        if not factors:
            print(f"{recipe}: none fits; it or the new recipe does not get better with size or tokens")
            continue
        fits = (fit(pair[:index] + pair[index + 1 :])[1] for index in range(len(pair)))
        others = [each[recipe] for each in fits if recipe in each]
        spread = f"{min(others):.2f} to {max(others):.2f}" if others else "no range"
        needs = f"the new recipe needs {factors[recipe]:.2f} of its tokens ({spread})"
        print(f"{recipe}: {needs}; error of the fit {error:.3f} nats")


@click.command()
@click.argument("datasets_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--study", "only", multiple=True, help="Train only this study of ladder.json.")
@click.option("--report", is_flag=True, help="Train nothing: show what there is so far.")
@click.option("--time", "timed", is_flag=True, help="Time the steps now, in turns.")
@click.option("--ladder", "path", type=click.Path(dir_okay=False, path_type=Path), default=LADDER)
def main(
    datasets_dir: Path, folder: Path, *, only: tuple[str, ...], report: bool, timed: bool, path: Path
) -> int | None:
    """Train the studies of ladder.json on DATASETS_DIR/local/ladder, in FOLDER, and compare the recipes."""
    ladder = read_json_object(path)
    data = dataset_folder(datasets_dir, ladder["shared"]["dataset"])
    require(data.is_dir(), f"{data}: no such folder; make it with prepare_datasets.py, as {__file__} says")
    for name in only:
        require(name in ladder["studies"], f"--study {name}: {path} has {', '.join(ladder['studies'])}")
    for name in [] if report else only or ladder["studies"]:
        for entry in ladder["studies"][name]:
            if stopped := train(plan_study(ladder, entry, folder), datasets_dir):
                return 128 + stopped
    found = results(ladder, folder)
    print_comparison(ladder, found, folder, timed=timed)
    print_fit(ladder, found)
    return None


if __name__ == "__main__":
    run_command(main)
