"""Loading and saving weights, ours and Hugging Face's, and converting between the two naming schemes."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from basemodel.errors import InputError
from basemodel.json_config import read_config
from gpt import GPTConfig, GPTModel

# Hugging Face's names -> ours, outside the blocks and within block N (behind `h.N.` and `trf_blocks.N.`).
HUGGINGFACE_NAMES = {
    "wte.weight": "tok_emb.weight",
    "wpe.weight": "pos_emb.weight",
    "ln_f.weight": "final_norm.scale",
    "ln_f.bias": "final_norm.shift",
    "lm_head.weight": "out_head.weight",
}
HUGGINGFACE_BLOCK_NAMES = {
    "attn.c_proj.weight": "att.out_proj.weight",
    "attn.c_proj.bias": "att.out_proj.bias",
    "mlp.c_fc.weight": "ff.layers.0.weight",
    "mlp.c_fc.bias": "ff.layers.0.bias",
    "mlp.c_proj.weight": "ff.layers.2.weight",
    "mlp.c_proj.bias": "ff.layers.2.bias",
    "ln_1.weight": "norm1.scale",
    "ln_1.bias": "norm1.shift",
    "ln_2.weight": "norm2.scale",
    "ln_2.bias": "norm2.shift",
}
QKV = ("W_query", "W_key", "W_value")


def load_model(model_json: Path, weights: Path) -> GPTModel:
    """The model that `model_json` describes, with weights from a safetensors file, in evaluation mode, on the
    accelerator if there is one. Raises InputError."""
    model = GPTModel(read_config(GPTConfig, model_json))
    load_weights(model, weights)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def load_weights(model: GPTModel, path: Path) -> None:
    """Load a safetensors file into `model`: ours, the published runs', or a Hugging Face GPT-2's.

    Raises InputError, naming the file and the tensor, for a damaged file or one that does not fit the model.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file: {error}") from None
    load_tensors(model, tensors, str(path))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a new safetensors file of CPU tensors. Raises OSError or SafetensorError."""
    path.touch()
    mode = path.stat().st_mode  # what the umask leaves; safetensors gives its files 0600
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def load_tensors(model: GPTModel, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors by name into `model`; errors name their `source`. Raises InputError."""
    if any(name.endswith("attn.c_attn.weight") for name in tensors):
        tensors = from_huggingface(tensors, qkv_bias=model.config.qkv_bias)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("att.mask")}
    # If only one of the two tensors that can be tied is there, it serves for both.
    head, embedding = tensors.get("out_head.weight"), tensors.get("tok_emb.weight")
    if head is None and embedding is not None:
        tensors["out_head.weight"] = embedding
    elif embedding is None and head is not None:
        tensors["tok_emb.weight"] = head
    elif model.config.tie_weights and head is not None and not torch.equal(head, embedding):
        raise InputError(f"{source}: out_head.weight differs from tok_emb.weight; set tie_weights to false")
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in tensors:
            raise InputError(f"{source}: has no tensor '{name}', which the model's config calls for")
        if (found := tuple(tensors[name].shape)) != shape:
            raise InputError(f"{source}: {name} has shape {found}, the model's config makes it {shape}")
    for name in tensors:
        if name not in wanted:
            raise InputError(f"{source}: tensor '{name}' has no place in a model with this config")
    model.load_state_dict(tensors)


def from_huggingface(tensors: dict[str, Tensor], *, qkv_bias: bool) -> dict[str, Tensor]:
    """Convert a Hugging Face GPT-2's tensors to our names; unknown names are kept, for the caller to refuse.

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
            if kind == "weight" or qkv_bias or tensor.any():  # zero biases mean none
                for target, piece in zip(QKV, tensor.chunk(3), strict=True):
                    ours[f"trf_blocks.{layer}.att.{target}.{kind}"] = piece
        elif part in HUGGINGFACE_BLOCK_NAMES:
            ours[f"trf_blocks.{layer}.{HUGGINGFACE_BLOCK_NAMES[part]}"] = tensor
        else:
            ours[full_name] = tensor
    return ours


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`, for `GPTModel.tensors()`, with the prefix `transformer.`.

    Q, K and V without biases get zero biases. A tied model's head, not among its tensors, is left out.
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
