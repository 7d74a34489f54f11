"""Files of weights: ours, the published runs' and Hugging Face's, whose names are others.

They all load; a Hugging Face GPT-2's tensors are put under this project's names, and the other way round.
"""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from basemodel.errors import InputError, require
from basemodel.json_config import read_config
from gpt import GPTConfig, GPTModel

# Hugging Face's names for our parameters: outside the blocks, and inside block N behind `h.N.`
HUGGINGFACE_NAMES = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
QKV = ("W_query", "W_key", "W_value")
HUGGINGFACE_MATRICES = {"attn.c_proj": "att.out_proj", "mlp.c_fc": "ff.layers.0", "mlp.c_proj": "ff.layers.2"}
HUGGINGFACE_BLOCK_NAMES = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in HUGGINGFACE_MATRICES.items()
    for kind in ("weight", "bias")
}
for _n in (1, 2):
    HUGGINGFACE_BLOCK_NAMES |= {f"ln_{_n}.weight": f"norm{_n}.scale", f"ln_{_n}.bias": f"norm{_n}.shift"}


def load_model(model_json: Path, weights: Path) -> GPTModel:
    """The model that `model_json` describes with the weights of a safetensors file, for evaluation, on the
    accelerator if there is one. Raises InputError."""
    model = GPTModel(read_config(GPTConfig, model_json))
    load_weights(model, weights)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def load_weights(model: GPTModel, path: Path) -> None:
    """Fill `model` from a safetensors file: ours, the published runs', or a Hugging Face GPT-2's.

    Raises InputError, naming the file and the tensor, for a damaged file or one of a model of another shape.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: no readable safetensors file: {error}") from None
    load_tensors(model, tensors, str(path))


def load_tensors(model: GPTModel, tensors: dict[str, Tensor], source: str) -> None:
    """Fill `model` from tensors by name; `source` says in errors where they came from. Raises InputError."""
    if any(name.endswith("attn.c_attn.weight") for name in tensors):
        tensors = from_huggingface(tensors, qkv_bias=model.config.qkv_bias)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("att.mask")}
    # A tied model's file may hold either of the two names, and either serves both.
    head, embedding = tensors.get("out_head.weight"), tensors.get("tok_emb.weight")
    tensors |= {"out_head.weight": embedding if head is None else head} if embedding is not None else {}
    tensors |= {"tok_emb.weight": head} if embedding is None and head is not None else {}
    both = head is not None and embedding is not None
    if model.config.tie_weights and both and not torch.equal(head, embedding):
        raise InputError(f"{source}: out_head.weight differs from tok_emb.weight; set tie_weights to false")
    wanted = model.state_dict()
    for name, parameter in wanted.items():
        require(name in tensors, f"{source}: has no tensor '{name}'; the model is configured otherwise")
        found, right = tuple(tensors[name].shape), tuple(parameter.shape)
        require(found == right, f"{source}: {name} has shape {found}, the model's config makes it {right}")
    for name in tensors:
        require(name in wanted, f"{source}: tensor '{name}' has no place in a model configured so")
    model.load_state_dict(tensors)


def from_huggingface(tensors: dict[str, Tensor], *, qkv_bias: bool) -> dict[str, Tensor]:
    """Rename a Hugging Face GPT-2's tensors; a name that is not known stays, for the caller to refuse.

    OpenAI's own files leave off the prefix `transformer.`. A block's matrices are stored (in, out), ours
    (out, in), with Q, K and V side by side in one. `attn.bias` and `attn.masked_bias` are masks, not weights.
    """
    ours: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("transformer.")
        if not name.startswith("h.") or name.count(".") < 2:
            ours[HUGGINGFACE_NAMES.get(name, full_name)] = tensor
            continue
        _, layer, part = name.split(".", 2)
        if part in ("attn.bias", "attn.masked_bias"):
            continue
        tensor = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        if part in ("attn.c_attn.weight", "attn.c_attn.bias"):
            kind = part.removeprefix("attn.c_attn.")
            if kind == "weight" or qkv_bias or tensor.any():  # zero biases say what no biases say
                for target, piece in zip(QKV, tensor.chunk(3), strict=True):
                    ours[f"trf_blocks.{layer}.att.{target}.{kind}"] = piece
        elif part in HUGGINGFACE_BLOCK_NAMES:
            ours[f"trf_blocks.{layer}.{HUGGINGFACE_BLOCK_NAMES[part]}"] = tensor
        else:
            ours[full_name] = tensor
    return ours


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_huggingface` for `GPTModel.tensors()`, with Hugging Face's own prefix `transformer.`.

    Q, K and V without biases get biases of zero; a tied model's head, not among its tensors, stays left out.
    """
    outside = {ours: theirs for theirs, ours in HUGGINGFACE_NAMES.items()}
    inside = {ours: theirs for theirs, ours in HUGGINGFACE_BLOCK_NAMES.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in outside:
            prefix = "" if name == "out_head.weight" else "transformer."
            theirs[prefix + outside[name]] = tensor
            continue
        _, layer, part = name.split(".", 2)
        block = f"transformer.h.{layer}."
        if part in inside:
            theirs[block + inside[part]] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        elif part == "att.W_query.weight":
            stem = name.removesuffix("W_query.weight")
            weights = [tensors[f"{stem}{which}.weight"] for which in QKV]
            no_bias = tensor.new_zeros(len(tensor))
            biases = [tensors.get(f"{stem}{which}.bias", no_bias) for which in QKV]
            theirs[f"{block}attn.c_attn.weight"] = torch.cat(weights).T.contiguous()
            theirs[f"{block}attn.c_attn.bias"] = torch.cat(biases)
    return theirs
