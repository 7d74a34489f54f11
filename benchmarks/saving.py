"""What saving costs a run: the stall of training per checkpoint, slower steps while one is written, and the
time from SIGTERM to a durable checkpoint.

    python benchmarks/saving.py original --microbatch 1 --interval 6

Trains the run RUN on synthetic tokens in a temporary folder, saves every few steps, and stops it by SIGTERM.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from basemodel.command_line import run_command
from basemodel.config import TrainConfig
from basemodel.json_config import read_config
from gpt import GPTConfig


def write_run(folder: Path, run: str, microbatch: int | None, interval: int, saves: int) -> Path:
    """A copy of a run that saves every `interval` steps, with tokens for it; returns its folder."""
    model = read_config(GPTConfig, ROOT / "runs" / run / "model.json")
    config = read_config(TrainConfig, ROOT / "runs" / run / "train.json")
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
    target = folder / "runs" / run
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
@click.option("--interval", type=int, default=6, show_default=True, help="Steps between checkpoints.")
@click.option("--saves", type=int, default=4, show_default=True, help="Checkpoints before SIGTERM.")
def main(run: str, microbatch: int | None, interval: int, saves: int) -> None:
    """Measure what the checkpoints of RUN, a folder of runs/, cost it."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = write_run(Path(folder), run, microbatch, interval, saves)
        command = ["ddp_train.py", run, f"{folder}/datasets", "--runs-dir", f"{folder}/runs"]
        training = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
        while saved_step(run_dir) < saves * interval and training.poll() is None:
            time.sleep(0.05)
        start = time.monotonic()
        os.kill(training.pid, signal.SIGTERM)
        training.wait()
        stopped = time.monotonic() - start
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        newest = max((run_dir / "checkpoints").glob("2*-iteration-*"))
        size = sum(path.stat().st_size for path in newest.iterdir())
    tokens = lines[0]["tokens"]
    seconds = {line["step"]: tokens / line["tokens_per_second"] for line in lines[2:]}
    # A save is written while the next step runs, and perhaps the one after.
    during = [value for step, value in seconds.items() if step % interval in (1, 2) and step > interval]
    others = [value for step, value in seconds.items() if step % interval not in (1, 2)]
    stalls = [line["checkpoint_seconds"] for line in lines if line["step"] % interval == 0 and line["step"]]
    print(f"Checkpoint:             {size / 1e9:.2f} GB")
    print(
        f"Stall per save:         {statistics.median(stalls):.3f} s ({min(stalls):.3f} to {max(stalls):.3f})"
    )
    print(
        f"Step:                   {statistics.median(others):.2f} s ({min(others):.2f} to {max(others):.2f})"
    )
    print(
        f"Step while one is saved: {statistics.median(during):.2f} s ({min(during):.2f} to {max(during):.2f})"
    )
    print(f"SIGTERM to exit:        {stopped:.1f} s, with a checkpoint that is durable")


if __name__ == "__main__":
    run_command(main)
