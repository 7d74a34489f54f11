"""What a run spends beside its training steps: logging, validation, checkpoints, charts.

    python benchmarks/overhead.py demo datasets

Times the logging of a step by itself, then trains the run RUN in a temporary folder to its end and adds up
what its metrics.jsonl says.
"""

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import click
from common import run_python, runs_dir_option

from basemodel.common.command_line import run_command
from basemodel.results.reporting import Reporter
from basemodel.training.budget import Clock
from basemodel.training.run import Run
from basemodel.training.run_folder import read_metrics
from basemodel.training.schedule import plan_batches


def seconds_per_log(run_dir: Path, folder: Path) -> float:
    """How long it takes to log a step, on average of 20,000."""
    run = Run.read(run_dir.parent, run_dir.name)
    plan = plan_batches(run.config, run.model_config.context_length, 1, None)
    run = dataclasses.replace(run, directory=folder, plan=plan)
    clock = Clock(run, 0, 0.0)
    reporter = Reporter(run, clock, 0, "cpu")
    start = time.perf_counter()
    for step in range(1, 20_001):
        values = {"train_loss": 3.1415926, "grad_norm": 0.57721566, "learning_rate": 0.0004}
        reporter.step(step, values, clock.count(step, 0.1))
    return (time.perf_counter() - start) / 20_000


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.argument("datasets_dir", type=click.Path(path_type=Path))
@runs_dir_option
def main(run: str, datasets_dir: Path, runs_dir: Path) -> None:
    """Measure what RUN, a folder of runs/, spends beside its training steps."""
    with tempfile.TemporaryDirectory() as folder:
        log = seconds_per_log(runs_dir / run, Path(folder))
        run_dir = Path(folder) / "runs" / run
        run_dir.mkdir(parents=True)
        for name in ("model.json", "train.json"):
            shutil.copy(runs_dir / run / name, run_dir)
        command = ["ddp_train.py", run, str(datasets_dir.resolve()), "--runs-dir", f"{folder}/runs"]
        run_python(*command)
        lines = read_metrics(run_dir / "metrics.jsonl")
    total, steps = lines[-1]["seconds"], lines[-1]["step"]
    shares = {
        "logging": log * steps,
        "validation": sum(line.get("validation_seconds", 0.0) for line in lines),
        "checkpoints, the stall": sum(line.get("checkpoint_seconds", 0.0) for line in lines),
    }
    print(f"\n{total:.1f} s, {steps:,} steps, {log * 1e6:.0f} µs to log each")
    for name, seconds in shares.items():
        print(f"{name + ':':24}{seconds:6.2f} s, {seconds / total:.2%}")


if __name__ == "__main__":
    run_command(main)
