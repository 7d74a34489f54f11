"""What saving costs a run: the stall of training per checkpoint, slower steps while one is written, and the
time from SIGTERM to a durable checkpoint.

    python benchmarks/saving.py original --microbatch 1 --interval 6

Trains the run RUN on synthetic tokens in a temporary folder, saves every few steps, and stops it by SIGTERM.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from common import ROOT, runs_dir_option, spread
from safetensors.numpy import save_file

from basemodel.common.command_line import run_command
from basemodel.common.errors import RunError
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig


def write_run(folder: Path, source: Path, microbatch: int | None, interval: int, saves: int) -> Path:
    """A copy of a run that saves every `interval` steps, with tokens for it; returns its folder."""
    model = read_config(GPTConfig, source / "model.json")
    config = read_config(TrainConfig, source / "train.json")
    microbatch = microbatch or config.microbatch_size
    config = dataclasses.replace(
        config,
        dataset="local/noise",
        microbatch_size=microbatch,
        global_batch_size=None,
        gradient_accumulation_steps=None,
        min_train_tokens=100 * saves * interval * microbatch * model.context_length,
        epochs=100,
        validation_interval=None,
        checkpoint_interval=interval,
        keep_checkpoints=1,
    )
    target = folder / "runs" / source.name
    target.mkdir(parents=True)
    for name, values in (("model", model), ("train", config)):
        (target / f"{name}.json").write_text(json.dumps(dataclasses.asdict(values)))
    data = folder / "datasets/local/noise"
    data.mkdir(parents=True)
    count = saves * interval * microbatch * model.context_length + 1
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, count, dtype=np.uint16)
    save_file({"tokens": tokens}, data / "train.safetensors")
    return target


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, 0 for none."""
    steps = [int(path.name.rpartition("-")[2]) for path in (run_dir / "checkpoints").glob("2*-iteration-*")]
    return max(steps, default=0)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.option("--microbatch", type=int, help="In place of the run's.")
@click.option("--interval", type=click.IntRange(3), default=6, show_default=True, help="Steps between saves.")
@click.option("--saves", type=click.IntRange(2), default=4, show_default=True, help="Before SIGTERM.")
@runs_dir_option
def main(run: str, microbatch: int | None, interval: int, saves: int, runs_dir: Path) -> None:
    """Measure what the checkpoints of RUN, a folder of runs/, cost it."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = write_run(Path(folder), runs_dir / run, microbatch, interval, saves)
        command = ["ddp_train.py", run, f"{folder}/datasets", "--runs-dir", f"{folder}/runs"]
        training = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
        while saved_step(run_dir) < saves * interval and training.poll() is None:
            time.sleep(0.05)
        start = time.monotonic()
        training.send_signal(signal.SIGTERM)
        status = training.wait()
        stopped = time.monotonic() - start
        if status != 128 + signal.SIGTERM:
            raise RunError(f"the training ended with status {status}, not by the signal")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        newest = max((run_dir / "checkpoints").glob("2*-iteration-*"))
        size = sum(path.stat().st_size for path in newest.iterdir())
    tokens = lines[0]["tokens"]
    seconds = {line["step"]: tokens / line["tokens_per_second"] for line in lines[2:]}
    # A save is written while the next step runs, and perhaps the one after.
    during = [value for step, value in seconds.items() if step % interval in (1, 2) and step > interval]
    others = [value for step, value in seconds.items() if step % interval not in (1, 2)]
    stalls = [line["checkpoint_seconds"] for line in lines if line["step"] % interval == 0 and line["step"]]
    print(f"Checkpoint:              {size / 1e9:.2f} GB")
    print(f"Stall per save:          {spread(stalls, '.3f')} s")
    print(f"Step:                    {spread(others)} s")
    print(f"Step while one is saved: {spread(during)} s")
    print(f"SIGTERM to exit:         {stopped:.1f} s, with a checkpoint that is durable")


if __name__ == "__main__":
    run_command(main)
