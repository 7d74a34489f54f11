"""What each change to the demo's recipe does to its loss, time and memory, beside the noise of seeds.

    python benchmarks/ablations.py datasets /tmp/ablations      runs/demo and every runs/demo-*, three seeds

Trains every run with every seed by `ddp_train.py`, `--at-once` of them at a time on their share of the cores,
and validates each on all of the validation split. Stopped, it goes on with the same command. Steps are timed
afterwards, in turns on all cores, when nothing trains. Prints a Markdown table.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from common import ROOT, measured_code, require, runs_dir_option, spread

from basemodel.command_line import run_command
from basemodel.config import TrainConfig
from basemodel.distributed import join_world
from basemodel.errors import RunError
from basemodel.hub import dataset_folder
from basemodel.json_config import read_config, read_json_object
from basemodel.token_files import TokenFiles
from ddp_train import Learner
from gpt import GPTConfig

RESULT = "ablation.json"  # in the folder of a run that is done


def changes(run: str, runs_dir: Path) -> str:
    """What a run changes in the demo's two files."""
    said = []
    for name in ("model", "train"):
        ours, demo = (read_json_object(runs_dir / each / f"{name}.json") for each in (run, "demo"))
        keys = [key for key in {**ours, **demo} if ours.get(key) != demo.get(key)]
        keys = [key for key in keys if not key.startswith("validation_")]
        said += [f"{key} {json.dumps(ours[key]) if key in ours else 'left out'}" for key in keys]
    return ", ".join(said)


def train(
    run_dir: Path, seed: int, datasets: Path, folder: Path, *, threads: int, tokens: int | None
) -> None:
    """Train a run with a seed, or go on with it, and keep its loss and its process's peak memory."""
    own = folder / f"{run_dir.name}-{seed}"
    model, config = (read_json_object(run_dir / f"{name}.json") for name in ("model", "train"))
    split = TokenFiles(dataset_folder(datasets, config["dataset"]), "validation")
    batches = (split.count - 1) // model["context_length"] // config["microbatch_size"]
    config |= {"random_seed": seed, "validation_interval": 1_000_000, "validation_batches": batches}
    config |= {"checkpoint_interval": 500, "keep_checkpoints": 1}
    config |= {"min_train_tokens": tokens} if tokens else {}
    of = [model, config, measured_code()]
    if (own / RESULT).exists():
        was = read_json_object(own / RESULT).get("of")
        require(was == of, f"{own} is of another recipe, length, commit or PyTorch; name another FOLDER")
        return
    own.mkdir(parents=True, exist_ok=True)
    (own / "model.json").write_text(json.dumps(model))
    (own / "train.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "ddp_train.py",
        own.name,
        str(datasets.resolve()),
        "--resume",
        "--runs-dir",
        folder,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (own / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RunError(f"{own.name} failed; see {own / 'output.txt'}")
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    loss = [line["val_loss"] for line in lines if "val_loss" in line][-1]
    result = {"loss": loss, "gibibytes": used.ru_maxrss / 2**20, "of": of}
    (own / RESULT).write_text(json.dumps(result))
    print(f"{own.name}: {loss:.4f}", flush=True)


def step_times(runs: list[str], runs_dir: Path, rounds: int) -> dict[str, float]:
    """The median milliseconds of a training step of each run, taken in turns."""
    world, steps = join_world(), {}
    for run in runs:
        model_config = read_config(GPTConfig, runs_dir / run / "model.json")
        config = read_config(TrainConfig, runs_dir / run / "train.json")
        learner = Learner(config, model_config, world)
        shape = config.microbatch_size, model_config.context_length + 1
        batch = [torch.randint(model_config.vocab_size, shape) for _ in range(config.accumulation_for(1))]
        steps[run] = functools.partial(learner.train_step, batch, 1e-4)
    taken: dict[str, list[float]] = {run: [] for run in runs}
    for turn in range(rounds + 3):
        for run, step in steps.items():
            start = time.perf_counter()
            step().tolist()
            if turn >= 3:
                taken[run].append(1e3 * (time.perf_counter() - start))
    return {run: statistics.median(each) for run, each in taken.items()}


def print_table(
    runs: dict[str, str], results: dict[tuple[str, int], dict[str, Any]], times: dict[str, float]
) -> None:
    """A row for each run: its change, loss, difference to the demo with the same seed, time and memory."""
    seeds = sorted({seed for _, seed in results})
    print(f"\nseeds {', '.join(map(str, seeds))}; median (least to most) over them\n")
    print("| run | change | validation loss | less the demo's | step, ms | ratio | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for run, change in runs.items():
        losses = [results[run, seed]["loss"] for seed in seeds]
        lesser = [results[run, seed]["loss"] - results["demo", seed]["loss"] for seed in seeds]
        mean, less = spread(losses, ".3f"), spread(lesser, "+.3f")
        memory = max(results[run, seed]["gibibytes"] for seed in seeds)
        cells = run, change, mean, less if run != "demo" else "", f"{times[run]:.1f}"
        print(f"| {' | '.join(cells)} | {times[run] / times['demo']:.2f} | {memory:.2f} |")


@click.command()
@click.argument("datasets_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="From 42 on.")
@click.option("--tokens", type=click.IntRange(min=1), help="Of each training; default: the runs' own.")
@click.option(
    "--at-once", type=click.IntRange(min=1), default=2, show_default=True, help="Trainings at a time."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=30, show_default=True, help="Timed steps of each."
)
@runs_dir_option
def main(
    datasets_dir: Path,
    folder: Path,
    seeds: int,
    tokens: int | None,
    at_once: int,
    rounds: int,
    runs_dir: Path,
) -> None:
    """Train runs/demo and runs/demo-* on DATASETS_DIR's data, in FOLDER, and compare them."""
    runs = ["demo", *sorted(path.parent.name for path in runs_dir.glob("demo-*/train.json"))]
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    todo = [(run, seed) for seed, run in product(range(42, 42 + seeds), runs)]
    common = {"datasets": datasets_dir, "folder": folder.resolve(), "threads": threads, "tokens": tokens}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for done in [pool.submit(train, runs_dir / run, seed, **common) for run, seed in todo]:
                done.result()
        finally:  # after a failure or Ctrl-C no other begins
            pool.shutdown(wait=False, cancel_futures=True)
    results = {(run, seed): read_json_object(folder / f"{run}-{seed}" / RESULT) for run, seed in todo}
    print_table({run: changes(run, runs_dir) for run in runs}, results, step_times(runs, runs_dir, rounds))


if __name__ == "__main__":
    run_command(main)
