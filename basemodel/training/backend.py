"""The precision of matrix products, and whether a run has the same bits each time."""

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.utils.deterministic
from torch import nn
from tqdm import tqdm

from basemodel.common.errors import RunError
from basemodel.model.loss import NextTokenLoss
from basemodel.model.memory import is_out_of_memory
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World


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


def compile_if_wanted(
    loss: NextTokenLoss,
    config: TrainConfig,
    world: World,
    try_out: Callable[[nn.Module], None],
    *,
    any_size: bool = False,
) -> None:
    """Compile the loss if the config says so ("auto": on CUDA) and `try_out`, a pass through it, succeeds.

    If that fails, "auto" says why and goes on uncompiled, and `true` raises RunError.
    """
    if config.compile is False or (config.compile == "auto" and world.device.type != "cuda"):
        return
    if world.device.type == "cpu" and world.local_size > 1:
        # Processes that write the same compiled library at the same time corrupt it.
        own = Path(tempfile.gettempdir()) / f"torchinductor-{os.getuid()}-{world.local_rank}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))
    loss.compile(any_size=any_size)
    problem = None
    try:
        try_out(loss)
    except Exception as error:  # compilers fail in many ways, but before training starts
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    problem = next((found for found in world.all_gather(problem) if found), None)
    if problem is None:
        return
    if config.compile is True:
        raise RunError(f'torch.compile failed ({problem}); "compile": "auto" or false trains without')
    loss.uncompile()
    if world.is_first:
        tqdm.write(f"Training without torch.compile, which failed: {problem}")
