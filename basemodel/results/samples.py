"""Samples from a model in training: samples.jsonl.

tiktoken is imported only where it is used, because a run without samples does not need it.
"""

import json
from typing import Any

from basemodel.common.files import replace_text
from basemodel.training.run import Run
from basemodel.training.run_folder import read_samples
from gpt import GPTModel

# The same samples as `test_smoke.py --tokens 50 --seed RANDOM_SEED` draws from a checkpoint.
SAMPLE_TOKENS = 50
TEMPERATURE, TOP_K = 1.0, 25


def require_tokenizer(run: Run) -> None:
    """Raise InputError if the run's prompts cannot be encoded. A data set's own tokenizer encodes anything,
    and `open_data` checks that it exists."""
    shape = run.model_config
    if run.config.sample_interval is not None and shape.tokenizer != "dataset":
        from basemodel.data.tokenizer import get_tokenizer
        from basemodel.model.generation import encode_prompts

        encode_prompts(get_tokenizer(shape.tokenizer), run.config.sample_prompts, shape.vocab_size)


def continue_prompts(run: Run, model: GPTModel, step: int) -> list[dict[str, Any]]:
    """Continue the run's prompts after `step` steps; return the lines of samples.jsonl, one per prompt.

    Training is not affected: a twin with the same weights, never compiled and never in training mode, does
    the computing, and the random numbers come from a separate generator.
    """
    from basemodel.data.tokenizer import get_tokenizer
    from basemodel.model.generation import Sampling, continuations, random_generator

    twin = GPTModel.outline(model.config).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    sampling = Sampling(TEMPERATURE, TOP_K, random_generator(model, run.config.random_seed))
    tokenizer, prompts = get_tokenizer(model.config.tokenizer, run.data.folder), run.config.sample_prompts
    texts = continuations(twin, tokenizer, prompts, SAMPLE_TOKENS, sampling)
    seen = {"step": step, "tokens": run.plan.tokens(step)}
    return [{**seen, "prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def keep_samples(run: Run, step: int, samples: list[dict[str, Any]]) -> None:
    """Replace the lines of samples.jsonl for `step` and later steps, which a resumed run repeats."""
    lines = [line for line in read_samples(run.samples) if line["step"] < step] + samples
    replace_text(run.samples, "".join(json.dumps(line) + "\n" for line in lines), durable=True)
