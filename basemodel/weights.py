"""Loading and saving weights, ours and Hugging Face's, and converting between the two naming schemes."""

import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from basemodel.errors import InputError
from basemodel.json_config import read_config
from gpt import GPTConfig, GPTModel

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
QKV = ("W_query", "W_key", "W_value")


def load_model(model_json: Path, weights: Path) -> GPTModel:
    """The model that `model_json` describes, with weights from a safetensors file, in evaluation mode, on the
    accelerator if there is one. Raises InputError."""
    model = GPTModel(read_config(GPTConfig, model_json))
    load_weights(model, weights)
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()


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
    for name, tensor in tensors.items():
        match = re.match(r"(?:transformer\.)?(h\.\d+\.|)", name)
        block, part = match[1], name[match.end() :]
        if block and part in ("attn.bias", "attn.masked_bias"):
            continue
        tensor = tensor.T.contiguous() if block and tensor.dim() == 2 else tensor
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
    """The inverse of `from_huggingface`, for `GPTModel.tensors()`, with the prefix `transformer.`.

    Q, K and V without biases get zero biases. A tied model's head, not among its tensors, is left out.
    """
    names = {ours: theirs for theirs, ours in NAMES.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, part = re.fullmatch(r"(trf_blocks\.\d+\.|)(.+)", name).groups()
        prefix = "" if part == "out_head.weight" else "transformer." + block.replace("trf_blocks", "h")
        if part in names:
            theirs[prefix + names[part]] = tensor.T.contiguous() if block and tensor.dim() == 2 else tensor
        elif part == "att.W_query.weight":
            stem = name.removesuffix("W_query.weight")
            weights = [tensors[f"{stem}{which}.weight"] for which in QKV]
            no_bias = tensor.new_zeros(len(tensor))
            biases = [tensors.get(f"{stem}{which}.bias", no_bias) for which in QKV]
            theirs[f"{prefix}attn.c_attn.weight"] = torch.cat(weights).T.contiguous()
            theirs[f"{prefix}attn.c_attn.bias"] = torch.cat(biases)
    return theirs
