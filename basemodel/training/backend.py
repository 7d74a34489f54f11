"""How PyTorch computes: precision, determinism, and compilation."""

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.utils.deterministic
from torch import nn
from tqdm import tqdm

from basemodel.common.command_line import available_cpus
from basemodel.common.errors import RunError
from basemodel.model.loss import NextTokenLoss
from basemodel.model.memory import is_out_of_memory
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """The precision that a run trains in on `device`."""
    return config.precision_on(device.type, has_bf16=_has_bf16(device))


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bf16; a CPU without the instructions does so slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return device.type == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def set_up_arithmetic(precision: str, *, deterministic: bool) -> None:
    """Set the precision of float32 matrix products, and whether operations without a deterministic kernel
    raise RuntimeError. Call it before the first matrix product, which is when cuBLAS reads its setting."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # The default on Hopper and Blackwell without dropout, with reports of NaN (pytorch issue 196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.compiler.config.cache_key_tag = "no cuDNN attention"  # compiled code on disk has a choice built in
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time and only helps find bugs
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of forward passes: in fp16 and bf16 runs it multiplies matrices in half precision."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def compile_if_configured(
    loss: NextTokenLoss,
    config: TrainConfig,
    world: World,
    warm_up: Callable[[nn.Module], None],
    *,
    any_size: bool = False,
) -> str | None:
    """Compile the loss if the config says so and `warm_up`, passes through it, succeeds. If it fails, "auto"
    continues uncompiled, reports why and returns the reason; `true` raises RunError."""
    if not config.compiles_on(world.device.type):
        return None
    # As many as all processes of the node can use: Inductor would start 32 for each of them.
    threads = max(1, available_cpus() // world.local_size)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    if world.device.type == "cpu" and world.local_size > 1:
        # Processes that write the same compiled library concurrently corrupt it.
        cache = Path(tempfile.gettempdir()) / f"torchinductor-{os.getuid()}-{world.local_rank}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    problem = missing_build_tools() if world.device.type == "cuda" else None
    try:
        if problem is None:
            loss.compile(any_size=any_size)
            warm_up(loss)
    except Exception as error:  # compilers fail in many ways, but only before training starts
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    problem = next(filter(None, world.all_gather(problem)), None)
    if problem is None:
        return None
    if config.compile is True:
        raise RunError(f'torch.compile failed ({problem}); set "compile" to "auto" or false')
    loss.uncompile()
    if world.is_first:
        tqdm.write(f"Warning: training without torch.compile, which failed: {problem}")
    return problem


def missing_build_tools() -> str | None:
    """What Triton lacks to build what launches its kernels; None if it has all."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) and header.exists():
        return None
    return f"it needs a C compiler and {header}; on Ubuntu, apt install build-essential python3-dev"
