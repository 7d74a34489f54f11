"""The precision of matrix products: which one a run trains in, and the context that switches it on."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from basemodel.config import TrainConfig


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """The precision that a run trains in on `device`; for "auto" the best that it supports."""
    if not config.use_amp:
        return "fp32"
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 matrix products; without them bf16 is slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context for forward passes, in which fp16 and bf16 runs multiply matrices in half precision."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()
