"""Hugging Face's format of a GPT-2: its config.json, and the names and shapes of its tensors, both ways."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
# Hugging Face's modules -> ours; those of block N stand behind `h.N.` and `trf_blocks.N.`.
MODULES = {
    "wte": "tok_emb",
    "wpe": "pos_emb",
    "ln_1": "norm1",
    "attn.c_proj": "att.out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "ff.layers.0",
    "mlp.c_proj": "ff.layers.2",
    "ln_f": "final_norm",
    "lm_head": "out_head",
}
NORM = {"weight": "scale", "bias": "shift"}
NAMES = {
    f"{theirs}.{kind}": f"{ours}.{NORM[kind] if 'norm' in ours else kind}"
    for theirs, ours in MODULES.items()
    for kind in NORM
}
THEIRS = {ours: theirs for theirs, ours in NAMES.items()}
QKV = ("W_query", "W_key", "W_value")


def build_model(path: Path) -> GPTModel:
    """The model that a model.json or config.json describes, with initial weights. Raises InputError."""
    if path.is_dir() or path.suffix == ".safetensors":
        raise InputError(f"{path}: must be a model.json or config.json; MODEL_JSON comes before the weights")
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
    for key, supported in FIXED.items():
        if (value := values.get(key, supported)) != supported:
            raise InputError(f"{path}: {key} is {value!r}; only {supported!r} can be computed here")
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


def from_huggingface(
    tensors: dict[str, Tensor], *, qkv_bias: bool, transposed: bool = True
) -> dict[str, Tensor]:
    """Convert a Hugging Face GPT-2's tensors to our names; unknown names are kept, for the caller to refuse.

    OpenAI's own files leave off the prefix `transformer.`. A block's matrices are stored (in, out), ours
    (out, in), with Q, K and V side by side in one; not `transposed` are nanoGPT's. `attn.bias` and
    `attn.masked_bias` are masks, not weights.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, part = re.fullmatch(r"(?:transformer\.)?(h\.\d+\.|)(.*)", name, re.DOTALL).groups()
        if block and part in ("attn.bias", "attn.masked_bias"):
            continue
        tensor = tensor.T.contiguous() if block and transposed and tensor.dim() == 2 else tensor
        block = block.replace("h", "trf_blocks")
        if block and part in ("attn.c_attn.weight", "attn.c_attn.bias"):
            kind = part.removeprefix("attn.c_attn.")
            if kind == "weight" or qkv_bias or tensor.any():  # zero biases mean none
                for target, piece in zip(QKV, tensor.chunk(3), strict=True):
                    ours[f"{block}att.{target}.{kind}"] = piece
        else:
            ours[block + NAMES[part] if part in NAMES else name] = tensor
    return ours


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`, for `GPTModel.tensors()`, with the prefix `transformer.`. Q, K and V
    without biases get zero biases. A tied model's head, not among its tensors, is left out."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, part = re.fullmatch(r"(trf_blocks\.\d+\.|)(.+)", name).groups()
        prefix = "" if part == "out_head.weight" else f"transformer.{block.replace('trf_blocks', 'h')}"
        if part in THEIRS:
            theirs[prefix + THEIRS[part]] = tensor.T.contiguous() if block and tensor.dim() == 2 else tensor
        elif part == "att.W_query.weight":
            stem = name.removesuffix("W_query.weight")
            weights = [tensors[f"{stem}{which}.weight"] for which in QKV]
            no_bias = tensor.new_zeros(len(tensor))
            biases = [tensors.get(f"{stem}{which}.bias", no_bias) for which in QKV]
            theirs[f"{prefix}attn.c_attn.weight"] = torch.cat(weights).T.contiguous()
            theirs[f"{prefix}attn.c_attn.bias"] = torch.cat(biases)
    return theirs
