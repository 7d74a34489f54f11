#!/usr/bin/env python3
"""Does it speak? Continue prompts with a trained model.

python test_smoke.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors --prompt "Return the"
python test_smoke.py ... --prompt "Return the" --prompt "If the file" --samples 3 --seed 42
"""

import re
import sys
from pathlib import Path

import click
import torch

from basemodel.command_line import run_command
from basemodel.errors import require
from basemodel.generation import continuations
from basemodel.tokenizer import get_tokenizer
from basemodel.weights import load_model


# Rows continued at once. One row of GPT-2 small, full, holds 75 MB of keys and values.
def printable(text: str) -> str:
    """The text with control characters, which could upset a terminal, written as escapes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_json", type=click.Path(path_type=Path))
@click.argument("model_safetensors", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    default=["Every effort moves you"],
    show_default=True,
    help="May be given several times.",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=20, show_default=True, help="How many to add at most."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 1000), default=1.0, show_default=True, help="0: the likeliest."
)
@click.option("--top-k", type=click.IntRange(1), default=25, show_default=True, help="Draw from so many.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="For the same samples every time.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Of each prompt.")
def main(
    model_json: Path,
    model_safetensors: Path,
    prompts: tuple[str, ...],
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int | None,
    samples: int,
) -> None:
    """Continue prompts with the model in MODEL_SAFETENSORS, ours or a Hugging Face GPT-2's."""
    require(temperature == temperature, "--temperature must be a number")
    model = load_model(model_json, model_safetensors)
    tokenizer = get_tokenizer(model.config.tokenizer)
    generator = torch.Generator(model.tok_emb.weight.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    starts = [prompt for prompt in prompts for _ in range(samples)]
    sampling = {"temperature": temperature, "top_k": top_k, "generator": generator}
    texts = continuations(model, tokenizer, starts, tokens, **sampling)

    # A terminal may not have what a model dreams up.
    sys.stdout.reconfigure(errors="backslashreplace")
    separator = "\n\n" if len(texts) > 1 else "\n"
    print(separator.join(printable(start + text) for start, text in zip(starts, texts, strict=True)))


if __name__ == "__main__":
    run_command(main)
