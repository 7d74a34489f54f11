"""Whose kernels compute with a tensor: those of its device or, while a plan is made, of a GPU elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_planned: list[str] = []  # the type of the device that a plan is made for


def device_type(tensor: Tensor) -> str:
    """The type of device, such as "cuda", that computes with `tensor`."""
    return _planned[-1] if _planned else tensor.device.type


def is_planned() -> bool:
    """Whether the tensors of this moment only stand for those of another device."""
    return bool(_planned)


@contextmanager
def planned_for(device_type: str) -> Iterator[None]:
    """Choose kernels as on a device of another type, for tensors without data."""
    _planned.append(device_type)
    try:
        yield
    finally:
        _planned.pop()
