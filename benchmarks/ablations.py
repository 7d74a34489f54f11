"""What each change to the demo's recipe does to its loss, beside the noise of seeds, and to its step time.

    python benchmarks/ablations.py datasets /tmp/ablations      runs/demo and every runs/demo-*, three seeds

Has ablate.py train them in FOLDER, the demo-* runs as variations of the demo, and validate each on all of the
validation split. Stopped, it goes on with the same command. Steps are timed afterwards, in turns, when
nothing trains. Prints two Markdown tables.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import runs_dir_option
from torch import Tensor

import ablate
from basemodel.common.command_line import run_command
from basemodel.common.json_config import read_config, read_json_object
from basemodel.data.hub import dataset_folder
from basemodel.data.token_files import TokenFiles
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World, join_world
from basemodel.training.schedule import plan_batches
from ddp_train import Learner


def all_settings(run_dir: Path) -> dict[str, Any]:
    """The keys of a run's two files, with their defaults, but for those of validation."""
    configs = read_config(GPTConfig, run_dir / "model.json"), read_config(TrainConfig, run_dir / "train.json")
    values = {key: value for each in configs for key, value in dataclasses.asdict(each).items()}
    return {key: value for key, value in values.items() if not key.startswith("validation_")}


def variation(run_dir: Path, base: Path) -> str:
    """What a run changes in the base, as `--vary` has it."""
    ours, theirs = all_settings(run_dir), all_settings(base)
    return ",".join(f"{key}={json.dumps(ours[key])}" for key in ours if ours[key] != theirs[key])


def write_base(run_dir: Path, datasets: Path, own: Path, tokens: int | None) -> None:
    """Write the base's two files to `own`: validated on all there is, at the end, and trained on `tokens`."""
    model, config = (read_json_object(run_dir / f"{name}.json") for name in ("model", "train"))
    split = TokenFiles(dataset_folder(datasets, config["dataset"]), "validation")
    batches = (split.count - 1) // model["context_length"] // config["microbatch_size"]
    config |= {"validation_interval": 1_000_000, "validation_batches": batches}
    config |= {"checkpoint_interval": 500, "keep_checkpoints": 1}
    config |= {"min_train_tokens": tokens} if tokens else {}
    own.mkdir(parents=True, exist_ok=True)
    (own / "model.json").write_text(json.dumps(model))
    (own / "train.json").write_text(json.dumps(config))


def steps_of(run_dir: Path, world: World) -> list[tuple[Callable[[], Tensor], float]]:
    """Each kind of a run's training steps, and how many of it come to each whole batch of tokens."""
    model_config = read_config(GPTConfig, run_dir / "model.json")
    config = read_config(TrainConfig, run_dir / "train.json")
    learner, length = Learner(config, model_config, world), model_config.context_length
    plan = plan_batches(config, length, 1, None)
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for step in range(plan.steps):
        kinds.setdefault((step < plan.half_steps, step < plan.short_steps), []).append(step)
    found = []
    for steps in kinds.values():
        shapes = [(count, length + 1) for _, count in plan.microbatches(steps[0], 0)]
        batch = [plan.cut(torch.randint(model_config.vocab_size, shape), steps[0]) for shape in shapes]
        step = functools.partial(learner.train_step, batch, 1e-4)
        found.append((step, len(steps) / plan.batches(plan.steps)))
    return found


def step_times(runs: list[str], runs_dir: Path, rounds: int) -> dict[str, float]:
    """The milliseconds that each run takes for a whole batch of tokens: medians of its kinds of steps, taken
    in turns, times how many of each there are."""
    world = join_world()
    steps = {run: steps_of(runs_dir / run, world) for run in runs}
    taken: dict[str, list[list[float]]] = {run: [[] for _ in kinds] for run, kinds in steps.items()}
    for turn in range(rounds + 3):
        for run, kinds in steps.items():
            for (step, _), times in zip(kinds, taken[run], strict=True):
                start = time.perf_counter()
                step().tolist()
                if turn >= 3:
                    times.append(1e3 * (time.perf_counter() - start))
    medians = {run: [statistics.median(times) for times in kinds] for run, kinds in taken.items()}
    return {
        run: sum(share * median for (_, share), median in zip(kinds, medians[run], strict=True))
        for run, kinds in steps.items()
    }


@click.command()
@click.argument("datasets_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="From 42 on.")
@click.option("--tokens", type=click.IntRange(min=1), help="Of each training; default: the demo's own.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Timed steps of each."
)
@runs_dir_option
def main(
    datasets_dir: Path, folder: Path, seeds: int, tokens: int | None, rounds: int, runs_dir: Path
) -> int | None:
    """Train runs/demo and runs/demo-* on DATASETS_DIR's data, in FOLDER, and compare them."""
    demo = runs_dir / "demo"
    # Two dashes are ablate.py's own runs.
    found = sorted(path.parent for path in runs_dir.glob("demo-*/train.json") if "--" not in path.parent.name)
    varied = {run.name: variation(run, demo) for run in found}
    write_base(demo, datasets_dir, folder / "demo", tokens)
    options = ["--seeds", seeds, "--runs-dir", folder, "--chart", folder / "ablate.png"]
    options += [word for text in varied.values() for word in ("--vary", text)]
    command = [str(word) for word in ("demo", datasets_dir, *options)]
    if status := ablate.main.main(command, standalone_mode=False):
        return status
    times = step_times(["demo", *varied], runs_dir, rounds)
    print("\n| run | change | step, ms | ratio |\n| --- | --- | --- | --- |")
    for run, taken in times.items():
        print(f"| {run} | {varied.get(run, '')} | {taken:.1f} | {taken / times['demo']:.2f} |")
    return None


if __name__ == "__main__":
    run_command(main)
