#!/usr/bin/env python3
"""Does it speak? Continue a prompt with a trained model.

python test_smoke.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors --prompt "Return the"
"""

import sys
from pathlib import Path

import click
import torch

from config import require, run_command
from gpt import generate, load_model
from tokenizer import get_tokenizer


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_json", type=click.Path(path_type=Path))
@click.argument("model_safetensors", type=click.Path(path_type=Path))
@click.option("--prompt", default="Every effort moves you", show_default=True)
@click.option(
    "--tokens", type=click.IntRange(1), default=20, show_default=True, help="How many to add at most."
)
@click.option(
    "--temperature", type=click.FloatRange(0, 1000), default=1.0, show_default=True, help="0: the likeliest."
)
@click.option("--top-k", type=click.IntRange(1), default=25, show_default=True, help="Draw from so many.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="For the same samples every time.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True)
def main(
    model_json: Path,
    model_safetensors: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int | None,
    samples: int,
) -> None:
    """Continue a prompt with the model in MODEL_SAFETENSORS, ours or a Hugging Face GPT-2's."""
    model = load_model(model_json, model_safetensors)
    tokenizer = get_tokenizer(model.config.tokenizer)
    require(temperature == temperature, "--temperature must be a number")
    encoded = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]
    vocab_size = model.config.vocab_size
    require(
        max(encoded) < vocab_size, f"the prompt has tokens outside the model's vocabulary of {vocab_size}"
    )

    device = model.tok_emb.weight.device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    start = torch.tensor([encoded] * samples, device=device)
    continued = generate(model, start, tokens, temperature=temperature, top_k=top_k, generator=generator)

    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have what a model dreams up
    for row in continued.tolist():
        new = row[len(encoded) :]
        new = new[: new.index(tokenizer.eot_token)] if tokenizer.eot_token in new else new
        print(prompt + tokenizer.decode([token for token in new if token < tokenizer.n_vocab]))


if __name__ == "__main__":
    run_command(main)
