"""The card of a shared model: metadata for the Hub, how to use it, and what is known about its training."""

import contextlib
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.json_config import read_json_object
from basemodel.common.names import CHART
from basemodel.common.tables import markdown_table
from basemodel.evaluation.measurements import headlines, read_task_results, read_test_loss
from basemodel.model.config import GPTConfig
from basemodel.model.weights import folder_of
from basemodel.training.config import optimizer_in_words
from checkpointing import META_FILE
from gpt import GPTModel

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

    For a checkpoint of a run, also copy the run's chart.
    """
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
        data += ", in lm-evaluation-harness's windows" if test.windows != "sequences" else ""
        loss = f"{test.loss:.3f} nats per token, perplexity {test.perplexity:.2f}"
        facts["Test loss"] = f"{loss}{bits} ({data})"
    for result in headlines(read_task_results(checkpoint)):
        facts[result.title] = f"{result} (lm-evaluation-harness {result.harness})"
    return facts
