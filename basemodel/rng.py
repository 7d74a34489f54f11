"""The state of the random number generators, as text for meta.json."""

import base64

import torch


def rng_state(device: torch.device) -> dict[str, str]:
    """The state of the random number generators that dropout draws from, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(states: dict[str, str], device: torch.device) -> None:
    """Restore what `rng_state` returned. On another type of device, dropout masks will differ."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.get_device_module(device).set_rng_state(state)
