"""The precision of matrix products, and whether a run has the same bits each time."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.utils.deterministic

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


def set_up_arithmetic(precision: str, *, deterministic: bool) -> None:
    """Set how PyTorch multiplies float32 matrices, and whether it avoids kernels that add in varying order.

    Call it before the first matrix product, because cuBLAS reads its setting then. An operation without a
    deterministic kernel raises RuntimeError.
    """
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # would only help to find bugs, and takes time
    )
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


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
