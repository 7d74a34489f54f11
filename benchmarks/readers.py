"""How much memory of its own each of several processes takes that read the same token file to its end.

    python benchmarks/readers.py --gigabytes 2 --readers 8

Prints, for each reader, how resident memory and its unshared part (USS) grew while it read. Linux only.
"""

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import click
import common  # noqa: F401  the project is found through it
import numpy as np
from safetensors.numpy import save_file

from basemodel.common.command_line import run_command
from basemodel.common.errors import RunError
from basemodel.data.sequences import Sequences
from basemodel.data.token_files import TokenFiles

LENGTH, BATCH = 1024, 64


def memory() -> tuple[float, float]:
    """Resident memory of this process and the part that no other one shares, in MB."""
    values: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, amount = line.split()[:2]
        values[key] = int(amount)
    return values["Rss:"] / 1024, (values["Private_Clean:"] + values["Private_Dirty:"]) / 1024


def read(path: Path, barrier: Any, results: Any) -> None:
    """Read the file as training does, and report by how much memory grew while all readers hold it."""
    sequences = Sequences(TokenFiles(path.parent, "train"), 0, LENGTH, seed=42)
    sequences.read(0, BATCH)
    barrier.wait()
    before = memory()
    for first in range(0, sequences.count - BATCH, BATCH):
        sequences.read(first, BATCH)
    barrier.wait()
    after = memory()
    barrier.wait()
    results.put([late - early for late, early in zip(after, before, strict=True)])


@click.command()
@click.option(
    "--gigabytes",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Size of the token file.",
)
@click.option(
    "--readers", type=click.IntRange(1), default=8, show_default=True, help="Processes that read the file."
)
def main(gigabytes: float, readers: int) -> None:
    """Make a file, have it read, print the growth."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.safetensors"
        tokens = np.arange(int(gigabytes * 5e8), dtype=np.uint32).astype(np.uint16)
        save_file({"tokens": tokens}, path)
        del tokens
        barrier, results = context.Barrier(readers, timeout=600), context.SimpleQueue()
        processes = [context.Process(target=read, args=(path, barrier, results)) for _ in range(readers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RunError(f"readers ended with status {[process.exitcode for process in processes]}")
    growth = [results.get() for _ in processes]
    print(f"{readers} readers of one file of {gigabytes} GB")
    print(f"{'resident, grew by MB':28}" + " ".join(f"{resident:8.1f}" for resident, _ in growth))
    print(f"{'of it unshared, MB':28}" + " ".join(f"{unshared:8.1f}" for _, unshared in growth))


if __name__ == "__main__":
    run_command(main)
