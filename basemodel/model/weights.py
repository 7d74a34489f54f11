"""Loading and saving weights, ours and Hugging Face's, and converting between the two naming schemes."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from basemodel.common.errors import InputError
from basemodel.model.config import GPTConfig
from basemodel.model.hf_format import build_model, set_gelu
from basemodel.model.weight_files import read_tensors
from gpt import GPTModel

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

# What DDP, torch.compile, FSDP and activation checkpointing put into the names of the modules they wrap.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def load_model(model_json: Path, weights: Path) -> GPTModel:
    """The model that `model_json` describes, this project's file or Hugging Face's config.json, with weights
    from safetensors files, in evaluation mode, on the accelerator if there is one. Raises InputError."""
    model = build_model(model_json)
    load_weights(model, weights)
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()


def load_weights(model: GPTModel, path: Path) -> None:
    """Load weights into `model`: ours, the published runs', a Hugging Face GPT-2's or nanoGPT's. `path` is a
    safetensors file, an index of shards, or a folder that holds either.

    Says on standard error what it found, where that is not simply one file with our names. Raises InputError,
    naming the file and the tensor as the file has it, for a damaged file or one that does not fit the model.
    """
    tensors, files = read_tensors(path)
    found = [f"{files} shards"] if files > 1 else []
    if found := found + load_tensors(model, tensors, str(path)):
        print(f"{path}: {', '.join(found)}", file=sys.stderr)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a new safetensors file of CPU tensors. Raises OSError or SafetensorError."""
    path.touch()
    mode = path.stat().st_mode  # what the umask leaves; safetensors gives its files 0600
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def load_tensors(model: GPTModel, tensors: dict[str, Tensor], source: str) -> list[str]:
    """Load tensors by name into `model`; errors name their `source`. Returns what is unusual about them, in
    words. Raises InputError."""
    plain = without_wrappers(tensors, source)
    unusual = ["wrappers' prefixes taken off"] if plain.keys() != tensors.keys() else []
    found = {name: tensors[theirs] for name, theirs in plain.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    fused = next((tensor for name, tensor in found.items() if name.endswith("attn.c_attn.weight")), None)
    if fused is not None:
        transposed = fused.shape[0] != 3 * fused.shape[-1]  # nanoGPT keeps PyTorch's (out, in)
        found = from_huggingface(found, qkv_bias=model.config.qkv_bias, transposed=transposed)
        unusual.append("Hugging Face's GPT-2" if transposed else "nanoGPT's names, with its exact GELU")
        if not transposed:
            set_gelu(model, "none")
            if not any(name.endswith(".bias") for name in plain):  # its "bias": false
                ends = (".bias", ".shift")
                found |= {name: torch.zeros(wanted[name]) for name in wanted if name.endswith(ends)}

    def named(ours: str) -> str:
        """A tensor's name in the file, whether it is there or missing."""
        theirs = huggingface_name(ours) if fused is not None else ours
        prefix = "transformer." if any(name.startswith("transformer.") for name in plain) else ""
        return plain.get(theirs) or plain.get(prefix + theirs) or prefix + theirs

    found = {name: tensor for name, tensor in found.items() if not name.endswith("att.mask")}
    share_tied(found, model.config, source)
    check_fit(found, wanted, named, f"{source}: ", change_config(found, model.config))
    model.load_state_dict(found)
    return unusual


def without_wrappers(tensors: dict[str, Tensor], source: str) -> dict[str, str]:
    """The names of tensors without what wrappers add, each with its own name. Raises InputError if two
    become one."""
    plain: dict[str, str] = {}
    for name in tensors:
        stripped = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if stripped in plain:
            raise InputError(f"{source}: '{name}' and '{plain[stripped]}' are one tensor; keep one of them")
        plain[stripped] = name
    return plain


def share_tied(tensors: dict[str, Tensor], config: GPTConfig, source: str) -> None:
    """Let one of the two tensors that can be tied serve for both where the other is missing. Raises
    InputError if both are there and differ, but should be tied."""
    head, embedding = tensors.get("out_head.weight"), tensors.get("tok_emb.weight")
    if head is None and embedding is not None:
        tensors["out_head.weight"] = embedding
    elif embedding is None and head is not None:
        tensors["tok_emb.weight"] = head
    elif config.tie_weights and head is not None and not torch.equal(head, embedding):
        raise InputError(f"{source}: out_head.weight differs from tok_emb.weight; set tie_weights to false")


def change_config(tensors: dict[str, Tensor], config: GPTConfig) -> str:
    """What to change in a model's config so that it fits tensors of these shapes, as the end of an error."""
    found: dict[str, Any] = {}
    for name, keys in {
        "tok_emb.weight": ("vocab_size", "emb_dim"),
        "pos_emb.weight": ("context_length", "emb_dim"),
    }.items():
        if name in tensors and tensors[name].dim() == 2:
            found |= dict(zip(keys, tensors[name].shape, strict=True))
    if blocks := {name.split(".")[1] for name in tensors if name.startswith("trf_blocks.")}:
        found["n_layers"] = len(blocks)
        found["qkv_bias"] = any(name.endswith("W_query.bias") for name in tensors)
    changes = [
        f'"{key}": {json.dumps(value)}' for key, value in found.items() if value != getattr(config, key)
    ]
    return f"; set {', '.join(changes)} in the model's config" if changes else ""


def check_fit(
    tensors: dict[str, Tensor],
    wanted: dict[str, tuple[int, ...]],
    named: Callable[[str], str],
    source: str,
    hint: str,
) -> None:
    """Raise InputError unless `tensors` are those `wanted`, in their shapes. `named`: a name in the file."""
    if not tensors.keys() & wanted.keys():
        first = f", but '{min(tensors)}'" if tensors else ""
        raise InputError(
            f"{source}holds no tensor of a GPT-2, by this project's names or Hugging Face's{first}"
        )
    for name, shape in wanted.items():
        if name not in tensors:
            raise InputError(
                f"{source}has no tensor '{named(name)}', which the model's config calls for{hint}"
            )
        if (found := tuple(tensors[name].shape)) != shape:
            raise InputError(
                f"{source}{named(name)} has shape {found}, the model's config makes it {shape}{hint}"
            )
        if not tensors[name].is_floating_point():
            raise InputError(
                f"{source}{named(name)} is {tensors[name].dtype}; quantized weights cannot be read"
            )
    for name in tensors:
        if name not in wanted:
            raise InputError(f"{source}tensor '{named(name)}' has no place in a model with this config{hint}")


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
        match = re.match(r"(?:transformer\.)?(h\.\d+\.|)", name)
        block, part = match[1], name[match.end() :]
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


def huggingface_name(name: str) -> str:
    """The name that Hugging Face gives one of our tensors, without `transformer.`; an unknown one is kept."""
    block, part = re.fullmatch(r"(trf_blocks\.\d+\.|)(.+)", name).groups()
    part = re.sub(rf"^att\.(?:{'|'.join(QKV)})\.", "attn.c_attn.", THEIRS.get(part, part))
    return block.replace("trf_blocks", "h") + part


def to_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_huggingface`, for `GPTModel.tensors()`, with the prefix `transformer.`.

    Q, K and V without biases get zero biases. A tied model's head, not among its tensors, is left out.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, part = re.fullmatch(r"(trf_blocks\.\d+\.|)(.+)", name).groups()
        target = ("" if part == "out_head.weight" else "transformer.") + huggingface_name(name)
        if part in THEIRS:
            theirs[target] = tensor.T.contiguous() if block and tensor.dim() == 2 else tensor
        elif part == "att.W_query.weight":
            stem = name.removesuffix("W_query.weight")
            weights = [tensors[f"{stem}{which}.weight"] for which in QKV]
            no_bias = tensor.new_zeros(len(tensor))
            biases = [tensors.get(f"{stem}{which}.bias", no_bias) for which in QKV]
            theirs[target] = torch.cat(weights).T.contiguous()
            theirs[target.removesuffix("weight") + "bias"] = torch.cat(biases)
    return theirs
