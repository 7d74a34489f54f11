"""What GPUs can do at best: the peak rates that MFU (model FLOPs utilization) is a share of."""

import re

import torch

# TFLOP/s of dense matrix products in bf16 with float32 accumulation, from the makers' data sheets; in fp16
# for V100 and T4, which have no bf16. A key is words of the name that CUDA gives the device.
PEAK_TFLOPS = {
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 210,
    "RTX A5000": 111,
    "A6000": 155,
    "A10": 125,
    "L40S": 362,
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "V100": 125,
    "T4": 65,
}
# What marks a variant with another rate, such as "RTX 4090 Laptop GPU".
VARIANTS = re.compile(r"\b(Ti|D|Laptop|Mobile|Max-Q|NVL|H100 PCIe|V100-PCIE)\b")


def peak_flops(device_name: str) -> float | None:
    """The peak rate of a device in FLOP/s, by its name; None for an unknown one.

    Only whole words count: an A100 is no A10, and a GB200 has another rate than a B200.
    """
    if VARIANTS.search(device_name):
        return None
    rates = [rate for name, rate in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)]
    return 1e12 * rates[0] if rates else None


def current_device_name() -> str:
    """The name of this process's CUDA device; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
