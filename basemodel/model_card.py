"""The model card of an exported model: metadata for the Hub, usage, and what is known about its training."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from basemodel.config import optimizer_in_words
from basemodel.errors import InputError
from basemodel.json_config import read_json_object
from basemodel.measured_loss import read_test_loss
from checkpointing import META_FILE
from gpt import GPTModel

CHART = "training-run-chart.png"
# What the card takes from a checkpoint's meta.json.
CARD_META = {
    *("train_config", "model_config", "tokens_seen", "global_batch", "global_step", "total_steps"),
    *("train_loss", "val_loss", "processes", "device", "precision", "seconds", "versions"),
}


def write_model_card(folder: Path, name: str, model: GPTModel, weights: Path, license: str | None) -> None:
    """Write README.md for a model from a weights file and, for one of a run's checkpoints, copy the run's
    chart."""
    from huggingface_hub import ModelCard, ModelCardData

    meta = read_checkpoint_meta(weights)
    facts = model_facts(model) | (training_facts(meta) if meta else {}) | test_loss_facts(weights.parent)
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    chart = weights.resolve().parent.parent.parent / CHART  # runs/RUN/checkpoints/NAME/model.safetensors
    if meta and chart.exists():
        shutil.copyfile(chart, folder / CHART)
        rows += f"\n\n![Loss, learning rate and gradient norm during training]({CHART})"
    dataset = meta["train_config"]["dataset"] if meta else "local/"
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        datasets=None if dataset.startswith("local/") else [dataset],
    )
    body = f"""# {name}

A GPT-2 model, trained from scratch with one script and two JSON files.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Every effort moves you", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=25)[0]))
```

It is a base model: it continues text, and was not trained to follow instructions or to be correct or safe.

| | |
| --- | --- |
{rows}
"""
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def read_checkpoint_meta(weights: Path) -> dict[str, Any]:
    """meta.json of the checkpoint that a weights file belongs to; empty if it is not a checkpoint of ours."""
    try:
        meta = read_json_object(weights.parent / META_FILE)
    except InputError:
        return {}
    return meta if meta.keys() >= CARD_META else {}


def model_facts(model: GPTModel) -> dict[str, str]:
    """Size and shape of a model, as rows of the card."""
    config = model.config
    shape = (
        f"{config.n_layers} layers of {config.emb_dim}, {config.n_heads} heads, context "
        f"{config.context_length:,}, vocabulary {config.vocab_size:,} ({config.tokenizer}), "
        f"{'tied' if config.tie_weights else 'untied'}, QKV bias {'on' if config.qkv_bias else 'off'}, "
        f"dropout {config.drop_rate:g}"
    )
    return {"Parameters": f"{sum(p.numel() for p in model.parameters()):,}", "Shape": shape}


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


def test_loss_facts(checkpoint: Path) -> dict[str, str]:
    """The test loss, if test_loss.py has measured this checkpoint, as a row of the card."""
    if (test := read_test_loss(checkpoint)) is None:
        return {}
    bits = f", {test.bits_per_byte:.4f} bits per byte" if test.bits_per_byte is not None else ""
    data = f"{test.dataset}, {test.split}, {test.tokens:,} tokens from {test.start_token:,} on"
    loss = f"{test.loss:.3f} nats per token, perplexity {test.perplexity:.2f}"
    return {"Test loss": f"{loss}{bits} ({data})"}
