"""How long `python ddp_train.py --help` takes beside `python -c "import torch"`, in turns.

python benchmarks/startup.py [ROUNDS]
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {"import torch": ["-c", "import torch"], "ddp_train.py --help": ["ddp_train.py", "--help"]}


def main() -> None:
    """Print the median of each command, and of the ratio of the two."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    base, ours = (values[1:] for values in seconds.values())  # the first round fills the caches
    ratios = [our / one for our, one in zip(ours, base, strict=True)]
    for name, values in zip(COMMANDS, (base, ours), strict=True):
        print(f"{name:22}{statistics.median(values):6.2f} s  (min {min(values):.2f}, max {max(values):.2f})")
    print(f"{'ratio':22}{statistics.median(ratios):6.2f}    (min {min(ratios):.2f}, max {max(ratios):.2f})")


if __name__ == "__main__":
    main()
