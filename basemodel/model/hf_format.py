"""A model from its configuration: this project's model.json, or the config.json of a Hugging Face GPT-2."""

from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.json_config import checked_config, read_config, read_json_object
from basemodel.model.config import GPTConfig
from gpt import GPTModel

# Hugging Face's names for the forms of GELU -> PyTorch's.
GELU_FORMS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}

# What else config.json may ask for, and the only value that gpt.py computes.
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def build_model(path: Path) -> GPTModel:
    """The model that a model.json or config.json describes, with initial weights. Raises InputError."""
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: holds weights; MODEL_JSON comes first, then MODEL_SAFETENSORS")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the model.json or config.json in it")
    values = read_json_object(path)
    if not values.keys() & {"model_type", "n_embd"}:
        return GPTModel(read_config(GPTConfig, path))
    model = GPTModel(checked_config(GPTConfig, from_huggingface_config(values, path), path))
    set_gelu(model, GELU_FORMS[values.get("activation_function", "gelu_new")])
    return model


def from_huggingface_config(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys of model.json for those of a Hugging Face GPT-2's config.json. Raises InputError for a model
    that gpt.py cannot compute.

    Keys left out have GPT2Config's defaults. End-of-text tells the tokenizer: 50,256 is that of "gpt2", 256
    that of "bytes", and any other that of a tokenizer.json in the folder of the weights.
    """
    for key, wanted in FIXED.items():
        if (found := values.get(key, wanted)) != wanted:
            raise InputError(f"{path}: {key} is {found!r}; only {wanted!r} can be computed here")
    activation, width = values.get("activation_function", "gelu_new"), values.get("n_embd", 768)
    if activation not in GELU_FORMS:
        raise InputError(f"{path}: activation_function is {activation!r}, not one of {', '.join(GELU_FORMS)}")
    if isinstance(width, int) and values.get("n_inner") not in (None, 4 * width):
        raise InputError(f"{path}: n_inner is {values['n_inner']}; only 4 x n_embd can be computed here")
    end_of_text = values.get("eos_token_id", 50_256)
    known = {50_256: "gpt2", 256: "bytes"}
    tokenizer = known.get(end_of_text, "dataset") if isinstance(end_of_text, int) else "gpt2"
    return {
        "vocab_size": values.get("vocab_size", 50_257),
        "context_length": values.get("n_positions", 1024),
        "emb_dim": width,
        "n_heads": values.get("n_head", 12),
        "n_layers": values.get("n_layer", 12),
        "drop_rate": values.get("resid_pdrop", 0.1),
        "qkv_bias": True,
        "tie_weights": values.get("tie_word_embeddings", True),
        "tokenizer": tokenizer,
        "end_of_text_id": end_of_text if tokenizer == "dataset" else None,
    }


def set_gelu(model: GPTModel, form: str) -> None:
    """Compute GELU in its "tanh" form, as GPT-2 does, or exactly ("none"), as nanoGPT does."""
    for block in model.trf_blocks:
        block.ff.layers[1].approximate = form


def gelu_name(model: GPTModel) -> str:
    """Hugging Face's name for the form of GELU that a model computes."""
    form = model.trf_blocks[0].ff.layers[1].approximate
    return next(name for name, ours in GELU_FORMS.items() if ours == form)
