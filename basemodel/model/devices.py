"""The accelerator, and GPUs that this PyTorch cannot use: on their machines a run would train on the CPU."""

import os
import re
from pathlib import Path

import torch

from basemodel.common.errors import InputError

# What is there only if there is an NVIDIA GPU: on Linux, in WSL2
GPU_FILES = (Path("/dev/nvidia0"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def current_accelerator() -> torch.device | None:
    """The kind of accelerator; None if there is only a CPU, or CUDA_VISIBLE_DEVICES is empty. Raises
    InputError for an NVIDIA GPU that PyTorch cannot use, often because its driver is too old."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    gpu = next(filter(Path.exists, GPU_FILES), None)
    if gpu is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    found = re.search(r"\d{3,}\.[\d.]+", DRIVER_FILE.read_text()) if DRIVER_FILE.exists() else None
    driver = f"driver {found[0]}" if found else "this driver"
    problem = f"for CUDA {torch.version.cuda} cannot use it with {driver}; update the driver, or install "
    problem += "PyTorch for an older CUDA"
    if torch.version.cuda is None:
        problem = "is built without CUDA; install PyTorch with CUDA"
    raise InputError(
        f"{gpu} is there, but PyTorch {torch.__version__} {problem}, or set CUDA_VISIBLE_DEVICES= to train "
        "on the CPU"
    )


def require_kernels(device: torch.device) -> None:
    """Raise InputError if PyTorch was built without kernels for this CUDA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return
    ours = torch.cuda.get_device_capability(device)
    kinds = [re.match(r"(sm|compute)_(\d+)(\d)", name).groups() for name in torch.cuda.get_arch_list()]
    built = [(kind, (int(major), int(minor))) for kind, major, minor in kinds]
    # Binaries run on later GPUs of the same generation, PTX ("compute") on all later ones.
    if not any(each <= ours and (kind == "compute" or each[0] == ours[0]) for kind, each in built):
        name, architecture = torch.cuda.get_device_name(device), "sm_{}{}".format(*ours)
        raise InputError(
            f"{name} is {architecture}, for which PyTorch {torch.__version__} has no kernels, only for "
            f"{', '.join(torch.cuda.get_arch_list())}; install PyTorch for an older CUDA"
        )
