#!/usr/bin/env python3
"""Can it write? Continue prompts with a trained model.

python test_smoke.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors --prompt "Return the"
python test_smoke.py ... --prompt "Return the" --prompt "If the file" --samples 3 --seed 42
python test_smoke.py ... --interactive
"""

from pathlib import Path

import click

from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError
from basemodel.common.output import printable
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation.prompt_line import PromptLine
from basemodel.model.generation import Sampling, continuations, random_generator
from basemodel.model.weights import folder_of, load_model

PROMPT = "Every effort moves you"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model_json", type=Path)
@click.argument("model_safetensors", type=Path)
@click.option("--prompt", "prompts", multiple=True, default=[PROMPT], help="Text to continue; repeatable.")
@click.option("--tokens", type=click.IntRange(1), default=20, help="Tokens to add at most.")
@click.option(
    "--temperature", type=click.FloatRange(0, 1000), default=1.0, help="Randomness; 0: the most likely token."
)
@click.option("--top-k", type=click.IntRange(0), default=25, help="Sample from the k likeliest; 0: from all.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed that makes samples reproducible.")
@click.option("--samples", type=click.IntRange(1), default=1, help="Continuations per prompt.")
@click.option("--interactive", is_flag=True, help="Read prompts and settings from a prompt line.")
@click.pass_context
def main(
    ctx: click.Context,
    model_json: Path,
    model_safetensors: Path,
    prompts: tuple[str, ...],
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int | None,
    samples: int,
    interactive: bool,
) -> None:
    """Continue prompts with the model in MODEL_SAFETENSORS, ours or a Hugging Face GPT-2."""
    sources = [ctx.get_parameter_source(name).name for name in ("prompts", "samples")]
    if interactive and "COMMANDLINE" in sources:
        raise InputError("--interactive reads its prompts itself; leave out --prompt and --samples")
    model = load_model(model_json, model_safetensors)
    tokenizer = get_tokenizer(model.config.tokenizer, folder_of(model_safetensors))
    if interactive:
        settings = {"temperature": temperature, "top_k": top_k, "tokens": tokens, "seed": seed}
        options = [option for option in ctx.command.params if option.name in settings]
        return PromptLine(model, tokenizer, settings, options).run()
    starts = [prompt for prompt in prompts for _ in range(samples)]
    sampling = Sampling(temperature, top_k, random_generator(model, seed))
    texts = continuations(model, tokenizer, starts, tokens, sampling)
    print("\n\n".join(printable(start + text) for start, text in zip(starts, texts, strict=True)))


if __name__ == "__main__":
    run_command(main)
