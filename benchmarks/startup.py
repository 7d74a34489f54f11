"""How long commands take that compute nothing, beside `python -c "import torch"`, in turns.

python benchmarks/startup.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import tempfile
import time

from common import ROOT

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "ddp_train.py --help": ["ddp_train.py", "--help"],
    "ddp_train.py --plan": ["ddp_train.py", "demo"],
    "ddp_train.py --plan --on all": ["ddp_train.py", "original", "--plan", "--on", "all"],
    "prepare_datasets.py --help": ["prepare_datasets.py", "--help"],
    "compare_runs.py --help": ["compare_runs.py", "--help"],
}


def main() -> None:
    """Print the median seconds of each command, and its median ratio to the first."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as datasets:
        COMMANDS["ddp_train.py --plan"] += [datasets, "--plan"]
        for _ in range(rounds + 1):
            for name, command in COMMANDS.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
    base, *_ = (values[1:] for values in seconds.values())  # the first round fills the caches
    print("| command | seconds | least to most | beside import torch |\n| --- | --- | --- | --- |")
    for name, (_, *values) in seconds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, base, strict=True))
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {name} | {statistics.median(values):.2f} | {spread} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
