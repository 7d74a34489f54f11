"""Files of weights: one safetensors file, several that an index names, or a folder that holds either."""

import re
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from basemodel.common.errors import InputError
from basemodel.common.json_config import read_json_object

MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# What files that are no safetensors files begin with, and what to do about it.
BEGINNINGS = {
    rb"PK\x03\x04|\x80[\x02-\x05]": "is a pickle, which can run any code as it is loaded, so nothing here "
    "opens one; where you trust it, convert it with the command in docs/clients.md",
    rb"GGUF": "is llama.cpp's GGUF; give the safetensors file that it was made from",
    rb"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch that with: git lfs pull",
    rb"\s*<": "is a web page, not the file itself; download that again",
    rb"\s*\{": "is JSON, not weights; MODEL_JSON comes first, then MODEL_SAFETENSORS",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors by name as the files have them, and the number of files.

    `path` is a safetensors file, an index of several, or a folder that holds either. Raises InputError.
    """
    if path.is_dir():
        path = find_weights(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if part := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", path.name):
        raise InputError(
            f"{path}: is one of {int(part[2])} shards; give their index, "
            f"{path.with_name(part[1] + '.safetensors.index.json')}, or the folder"
        )
    return read_file(path), 1


def folder_of(path: Path) -> Path:
    """The folder of the files that `read_tensors` reads, where a checkpoint keeps what is known of it."""
    return path if path.is_dir() else path.parent


def find_weights(folder: Path) -> Path:
    """The safetensors file or index in a folder. Raises InputError, about a pickle if there is one."""
    for name in (MODEL_FILE, INDEX_FILE):
        if (folder / name).exists():
            return folder / name
    hint = f"; a run's are in {folder / 'checkpoints'}" if (folder / "checkpoints").is_dir() else ""
    pickles = (path for pattern in PICKLES for path in sorted(folder.glob(pattern)))
    if (pickle := next(pickles, None)) and (reason := explanation(pickle)):
        hint = f"; {pickle.name} {reason}"
    raise InputError(f"{folder}: holds neither {MODEL_FILE} nor {INDEX_FILE}{hint}")


def _read_shards(index: Path) -> tuple[dict[str, Tensor], int]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: has no weight_map from tensors to files; is it an index of shards?")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index}: names '{name}', which is not a file beside it")
        if not (index.parent / name).exists():
            raise InputError(f"{index}: its shard {name} is missing; download it into the same folder")
    shards = {name: read_file(index.parent / name) for name in names}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise InputError(f"{index.parent / name}: has no tensor '{tensor}', which {index.name} looks for")
    return {tensor: shards[name][tensor] for tensor, name in places.items()}, len(names)


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Raises InputError, saying what the file is instead."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        reason = explanation(path) or f"damaged or not a safetensors file: {error}"
        raise InputError(f"{path}: {reason}") from None


def explanation(path: Path) -> str:
    """What a file that is no safetensors file is, by its first bytes; empty if that is unknown."""
    with path.open("rb") as file:
        beginning = file.read(64)
    for pattern, reason in BEGINNINGS.items():
        if re.match(pattern, beginning):
            return reason
    return ""
