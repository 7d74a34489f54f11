"""Weights in safetensors files: one file, several that an index names, or a folder that holds either; and
loading them into a model by their names: ours, Hugging Face's or nanoGPT's."""

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from basemodel.common.errors import InputError
from basemodel.common.files import followed, refuse_stand_in
from basemodel.common.json_config import read_json_object
from basemodel.common.names import CHECKPOINTS
from basemodel.model.config import GPTConfig
from basemodel.model.devices import current_accelerator
from basemodel.model.hf_format import build_model, from_huggingface, set_gelu
from gpt import GPTModel

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
IS_A_PICKLE = (
    "is a pickle, which can run any code as it is loaded; convert one that you trust with the command in "
    "docs/clients.md"
)
# What DDP, torch.compile, FSDP and activation checkpointing put into the names of the modules they wrap.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def load_model(model_json: Path, weights: Path) -> GPTModel:
    """The model that `model_json` describes, this project's file or Hugging Face's config.json, with weights
    from safetensors files, in evaluation mode, on the accelerator if there is one. Raises InputError."""
    model = build_model(model_json)
    load_weights(model, weights)
    return model.to(current_accelerator() or "cpu").eval()


def load_weights(model: GPTModel, path: Path) -> None:
    """Load weights into `model` from a `path` as for `read_tensors`: ours, the published runs', a Hugging
    Face GPT-2's or nanoGPT's. Prints to standard error what they are, unless they have our names. Raises
    InputError, naming file and tensor, for a damaged file or one that does not fit the model."""
    if remarks := load_tensors(model, read_tensors(path), str(path)):
        print(f"{path}: {', '.join(remarks)}", file=sys.stderr)


def folder_of(path: Path) -> Path:
    """The folder of the files that `read_tensors` reads, which in a checkpoint also holds other files."""
    path = followed(path)
    return path if path.is_dir() else path.parent


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name as the files have them. `path` is a safetensors file, an index of several, or a
    folder that holds either. Raises InputError."""
    if (path := followed(path)).is_dir():
        path = find_weights(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", path.name):
        raise InputError(f"{path}: is one of several shards; give their index or their folder")
    return read_file(path)


def find_weights(folder: Path) -> Path:
    """The safetensors file or index in a folder. Raises InputError, about a pickle if there is one."""
    for name in (MODEL_FILE, INDEX_FILE):
        if (folder / name).exists():
            return folder / name
    hint = f"; a run's are in {folder / CHECKPOINTS}" if (folder / CHECKPOINTS).is_dir() else ""
    if pickles := sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES):
        hint = f"; {pickles[0]} {IS_A_PICKLE}"
    raise InputError(f"{folder}: holds neither {MODEL_FILE} nor {INDEX_FILE}{hint}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: has no weight_map from tensors to files; is it an index of shards?")
    shards = [read_file(index.parent / name) for name in sorted(set(places.values()))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises InputError."""
    try:
        refuse_stand_in(path)
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if path.suffix in PICKLES:
            raise InputError(f"{path}: {IS_A_PICKLE}") from None
        raise InputError(f"{path}: damaged or not a safetensors file: {error}") from None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a new safetensors file of CPU tensors. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # what the umask leaves; safetensors gives its files 0600
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = int((re.search(r"os error (\d+)", str(error)) or [0, errno.EIO])[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)


def load_tensors(model: GPTModel, tensors: dict[str, Tensor], source: str) -> list[str]:
    """Load tensors by name into `model`; errors name their `source`. Returns remarks on what is unusual about
    them. Raises InputError."""
    plain = without_wrappers(tensors, source)
    remarks = ["wrappers' prefixes taken off"] if plain.keys() != tensors.keys() else []
    ours = {name: tensors[theirs] for name, theirs in plain.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    fused = next((tensor for name, tensor in ours.items() if name.endswith("attn.c_attn.weight")), None)
    if fused is not None:
        is_nanogpt = fused.shape[0] == 3 * fused.shape[-1]  # which stores PyTorch's (out, in)
        ours = from_huggingface(ours, qkv_bias=model.config.qkv_bias, transposed=not is_nanogpt)
        remarks.append("nanoGPT's names, with its exact GELU" if is_nanogpt else "Hugging Face's GPT-2")
        if is_nanogpt:
            set_gelu(model, "none")
            if not any(name.endswith(".bias") for name in plain):  # its "bias": false
                ends = (".bias", ".shift")
                ours |= {name: torch.zeros(shapes[name]) for name in shapes if name.endswith(ends)}

    ours = {name: tensor for name, tensor in ours.items() if not name.endswith("att.mask")}
    share_tied(ours, model.config, source)
    if problem := misfit(ours, shapes):
        raise InputError(f"{source}: {problem}{change_config(ours, model.config)}")
    model.load_state_dict(ours)
    return remarks


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


def misfit(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The first reason why tensors do not fit a model whose own have these shapes; None if they fit."""
    if not tensors.keys() & shapes.keys():
        first = f", but '{min(tensors)}'" if tensors else ""
        return f"holds no tensor of a GPT-2, by this project's names or Hugging Face's{first}"
    for name, shape in shapes.items():
        if name not in tensors:
            return f"has no tensor '{name}', which the model's config calls for"
        if (stored := tuple(tensors[name].shape)) != shape:
            return f"{name} has shape {stored}, the model's config makes it {shape}"
        if not tensors[name].is_floating_point():
            return f"{name} is {tensors[name].dtype}; quantized weights cannot be read"
    if strangers := tensors.keys() - shapes.keys():
        return f"tensor '{min(strangers)}' has no place in a model with this config"
    return None


def change_config(tensors: dict[str, Tensor], config: GPTConfig) -> str:
    """The keys to change in a model's config so that it fits tensors of these shapes, to end an error."""
    values: dict[str, Any] = {}
    for name, first_key in (("tok_emb.weight", "vocab_size"), ("pos_emb.weight", "context_length")):
        if name in tensors and tensors[name].dim() == 2:
            values[first_key], values["emb_dim"] = tensors[name].shape
    if blocks := {name.split(".")[1] for name in tensors if name.startswith("trf_blocks.")}:
        values["n_layers"] = len(blocks)
        values["qkv_bias"] = any(name.endswith("W_query.bias") for name in tensors)
    changes = {key: value for key, value in values.items() if value != getattr(config, key)}
    return f"; set {json.dumps(changes)[1:-1]} in the model's config" if changes else ""
