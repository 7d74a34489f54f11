"""How much faster a model continues text with a key-value cache than without, in turns, same tokens required.

python benchmarks/generation.py original
python benchmarks/generation.py original --tokens 512 --batch-size 8 --rounds 1
"""

import platform
import statistics
import time
from pathlib import Path

import click
import torch
from common import runs_dir_option, spread

from basemodel.common.command_line import run_command
from basemodel.common.errors import RunError
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.model.generation import Sampling, generate
from gpt import GPTModel


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.option("--tokens", type=click.IntRange(1), default=256, show_default=True, help="New ones a row.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=4, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@runs_dir_option
def main(run: str, tokens: int, prompt_tokens: int, batch_size: int, rounds: int, runs_dir: Path) -> None:
    """Measure greedy generation by a random model of runs/RUN's shape."""
    torch.manual_seed(0)
    model = GPTModel(read_config(GPTConfig, runs_dir / run / "model.json")).eval()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = model.to(device)
    prompt = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), device=device)

    def seconds(*, use_cache: bool, count: int = tokens) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        continued = generate(model, prompt, count, Sampling(0, use_cache=use_cache)).cpu()
        return time.perf_counter() - start, continued

    seconds(use_cache=True, count=8)
    seconds(use_cache=False, count=8)
    cached, plain = [], []
    for _ in range(rounds):
        for times, use_cache in ((cached, True), (plain, False)):
            taken, continued = seconds(use_cache=use_cache)
            times.append(taken)
            if use_cache:
                expected = continued
            elif not torch.equal(continued, expected):
                raise RunError("the two sides gave different tokens")
    ratios = [b / a for a, b in zip(cached, plain, strict=True)]
    print(f"{run}: {tokens} new tokens after {prompt_tokens}, batch {batch_size}, {rounds} rounds in turns")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {platform.machine()}")
    for name, times in (("with cache", cached), ("without", plain)):
        middle = statistics.median(times)
        print(f"{name:11}{spread(times)} s, {batch_size * tokens / middle:.1f} tokens/s")
    print(f"ratio      {spread(ratios)}")


if __name__ == "__main__":
    run_command(main)
