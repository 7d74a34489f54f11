"""A model as a standard GPT-2 folder for transformers: weights, config.json, tokenizer, and a check."""

import contextlib
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import tiktoken
import torch

from basemodel.common.errors import InputError, RunError
from basemodel.common.json_config import read_json_object
from basemodel.common.names import CHART
from basemodel.common.output import markdown_table
from basemodel.data.tokenizer import byte_characters, merges
from basemodel.evaluation.measurements import headlines, read_task_results, read_test_loss
from basemodel.model.config import GPTConfig
from basemodel.model.hf_format import gelu_name, to_huggingface
from basemodel.model.weights import folder_of, save_tensors
from basemodel.training.config import optimizer_in_words
from checkpointing import META_FILE
from gpt import GPTModel

# Where the tokenizers must agree: words, spaces, digits, contractions, scripts, an emoji of four parts.
SAMPLE_TEXT = "It's 1,024 tokens,\n\tisn't it?   Größe, 語言, язык, العربية 👩‍👩‍👧‍👦 x==y"


def write_model(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Write weights, configuration and tokenizer files into an empty folder."""
    end_of_text = tokenizer.eot_token
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    if model.config.context_length < 512:  # a pipeline's default, 256, would run past the last position
        generation["max_new_tokens"] = model.config.context_length // 2
    config = huggingface_config(model.config, end_of_text) | {"activation_function": gelu_name(model)}
    for name, values in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_tensors(to_huggingface(model.tensors()), folder / "model.safetensors")
    write_tokenizer(folder, tokenizer, model.config.context_length)


def huggingface_config(config: GPTConfig, end_of_text: int) -> dict[str, Any]:
    """A GPTConfig under Hugging Face's names, for config.json."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": config.drop_rate,
        "embd_pdrop": config.drop_rate,
        "resid_pdrop": config.drop_rate,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def write_tokenizer(folder: Path, tokenizer: tiktoken.Encoding, context_length: int) -> None:
    """Write a tiktoken encoding as a Hugging Face GPT-2 tokenizer, in the old and the new file format."""
    from transformers import GPT2Tokenizer

    characters, end_of_text = byte_characters(), tokenizer.decode([tokenizer.eot_token])

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ranks = tokenizer._mergeable_ranks
    vocab = {written(token): rank for token, rank in ranks.items()} | {end_of_text: tokenizer.eot_token}
    pairs = [(written(a), written(b)) for a, b in merges(ranks)]
    # Batches need padding; generation needs it before the text.
    padding = {"pad_token": end_of_text, "padding_side": "left"}
    exported = GPT2Tokenizer(vocab=vocab, merges=pairs, model_max_length=context_length, **padding)
    try:
        exported.save_pretrained(folder)
        exported.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    except Exception as error:  # the library's errors have no type of their own
        raise RunError(f"{folder}: could not write the tokenizer: {error}") from error


@torch.no_grad()
def check_folder(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Compare a written folder, as transformers loads it, with the model on the CPU: the logits of two full
    sequences, and the tokens of a text. Raises RunError if they differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        exported = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = AutoTokenizer.from_pretrained(folder)(SAMPLE_TEXT, verbose=False)["input_ids"]
    except Exception as error:  # of many types
        raise RunError(f"{folder}: cannot be read back: {error}") from error
    shape = (2, model.config.context_length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    difference, largest = (logits - exported(tokens).logits).abs().max().item(), logits.abs().max().item()
    sizes = f"{difference:.1e} (logits up to {largest:.1f})"
    print(f"Largest logit difference between transformers and gpt.py: {sizes}")
    if not difference <= 2e-5 * max(1.0, largest):
        raise RunError(f"the export's logits differ from gpt.py's by {sizes}; the export was removed")
    if ids != tokenizer.encode_ordinary(SAMPLE_TEXT):
        raise RunError("the exported tokenizer's tokens differ from the model's; the export was removed")


CARD = """# {name}

A GPT-2 model, trained from scratch with one script and two JSON files.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Every effort moves you", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=25)[0]))
```

It is a base model: it continues text, and was not trained to follow instructions or to be correct or safe.

{table}
"""


def write_model_card(folder: Path, name: str, model: GPTModel, weights: Path, license: str | None) -> None:
    """Write README.md for a model from a weights file: metadata for the Hub, how to use it, and its figures.
    For a checkpoint of a run, also copy the run's chart."""
    from huggingface_hub import ModelCardData

    checkpoint, meta = folder_of(weights), {}
    facts = {"Parameters": f"{model.config.parameter_count:,}", "Shape": shape_in_words(model.config)}
    with contextlib.suppress(InputError, KeyError):  # no meta.json, or not one of ours
        meta = read_json_object(checkpoint / META_FILE)
        facts |= training_facts(meta)
    facts |= evaluation_facts(checkpoint)
    if model.config.tokenizer != "gpt2":
        facts["llama.cpp"] = "not convertible: its converter does not know this tokenizer, only GPT-2's"
    table = markdown_table(("", ""), facts.items())
    chart = checkpoint.resolve().parent.parent / CHART  # of runs/RUN/checkpoints/NAME
    if "Data" in facts and chart.exists():
        shutil.copyfile(chart, folder / CHART)
        table += f"\n\n![Loss, learning rate and gradient norm during training]({CHART})"
    dataset = meta["train_config"]["dataset"] if "Data" in facts else "local/"
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        datasets=None if dataset.startswith("local/") else [dataset],
    )
    text = f"---\n{metadata.to_yaml()}\n---\n\n{CARD.format(name=name, table=table)}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def shape_in_words(config: GPTConfig) -> str:
    """A model's shape in one line."""
    return (
        f"{config.n_layers} layers of {config.emb_dim}, {config.n_heads} heads, context "
        f"{config.context_length:,}, vocabulary {config.vocab_size:,} ({config.tokenizer}), "
        f"{'tied' if config.tie_weights else 'untied'}, QKV bias {'on' if config.qkv_bias else 'off'}, "
        f"dropout {config.drop_rate:g}"
    )


def training_facts(meta: dict[str, Any]) -> dict[str, str]:
    """How a checkpoint was trained, as rows of the card."""
    train, length = meta["train_config"], meta["model_config"]["context_length"]
    facts = {
        "Data": f"{train['dataset']}, {meta['tokens_seen']:,} tokens, at most {train['epochs']} epochs",
        "Global batch": f"{meta['global_batch']:,} sequences of {length:,} tokens",
        "Steps": f"{meta['global_step']:,} of {meta['total_steps']:,}",
        "Optimizer": optimizer_in_words(train),
    }
    if meta["train_loss"] is not None:
        facts["Training loss"] = f"{meta['train_loss']:.3f} nats per token"
    if meta["val_loss"] is not None:
        within = ", within documents" if train.get("document_masking") else ""
        facts["Validation loss"] = f"{meta['val_loss']:.3f} nats per token{within}"
    facts["Hardware"] = f"{meta['processes']} x {meta['device']}, precision {meta['precision']}"
    facts["Time"] = f"{timedelta(seconds=round(meta['seconds']))} (hours, minutes, seconds)"
    if train.get("usd_per_hour") is not None:
        facts["Cost"] = f"${train['usd_per_hour'] * meta['seconds'] / 3600:.2f}"
    facts["Software"] = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return facts


def evaluation_facts(checkpoint: Path) -> dict[str, str]:
    """How well a checkpoint did in the evaluations whose results lie beside it, as rows of the card."""
    facts = {}
    if test := read_test_loss(checkpoint):
        bits = f", {test.bits_per_byte:.4f} bits per byte" if test.bits_per_byte is not None else ""
        data = f"{test.dataset}, {test.split}, {test.tokens:,} tokens from {test.start_token:,} on"
        loss = f"{test.loss:.3f} nats per token, perplexity {test.perplexity:.2f}"
        facts["Test loss"] = f"{loss}{bits} ({data})"
    for result in headlines(read_task_results(checkpoint)):
        facts[result.title] = f"{result} (lm-evaluation-harness {result.harness})"
    return facts
