"""How long commands take that compute nothing, beside `python -c "import torch"`, in turns.

python benchmarks/startup.py --rounds 7
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time

import click
from common import ROOT

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "ddp_train.py --help": ["ddp_train.py", "--help"],
    "ddp_train.py --plan": ["ddp_train.py", "demo"],
    "ddp_train.py --plan --on all": ["ddp_train.py", "original", "--plan", "--on", "all"],
    "prepare_datasets.py --help": ["prepare_datasets.py", "--help"],
    "compare_runs.py --help": ["compare_runs.py", "--help"],
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=7, help="Times that each command is measured.")
@click.option("--only", default="", help="Measure only the commands whose line contains this word.")
def main(rounds: int, only: str) -> None:
    """Print the median seconds of each command, and its median ratio to `import torch`."""
    commands = {name: words for name, words in COMMANDS.items() if name == "import torch" or only in name}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as datasets:
        COMMANDS["ddp_train.py --plan"] += [datasets, "--plan"]
        for number, (name, command) in itertools.product(range(rounds + 1), commands.items()):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            if number > 0:  # the first round fills the caches
                seconds[name].append(time.perf_counter() - start)
    base = seconds["import torch"]
    print("| command | seconds | least to most | beside import torch |\n| --- | --- | --- | --- |")
    for name, values in seconds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, base, strict=True))
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {name} | {statistics.median(values):.2f} | {spread} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
