"""The optimiser, the learning rate of each step, and the decision to leave a step out."""

import math

import torch
from torch import Tensor, nn

from config import TrainConfig
from gpt import GPTModel


def make_optimizer(model: GPTModel, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; weight decay on everything, or only on matrices that are not embeddings."""
    embeddings = {id(model.tok_emb.weight), id(model.pos_emb.weight)}
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        decays = config.decay_all_parameters or (parameter.dim() == 2 and id(parameter) not in embeddings)
        groups[config.weight_decay if decays else 0.0].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters],
        lr=config.learning_rate,
        betas=config.betas,
        fused=device.type in ("cpu", "cuda"),
    )


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimiser make its state now, by a step that changes nothing, and not in the midst of training.

    So memory that stays does not lie scattered among what each step takes and frees, and too little shows at
    once.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        if "step" in state:  # the count of updates, which has to begin at none
            state["step"].zero_()


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`: constant, or a linear warm-up that reaches its
    peak with the last of the first warmup_period_percent of the steps, then half a cosine down to a tenth at
    the last step."""
    peak = config.learning_rate
    if not config.schedule_learning_rate:
        return peak
    warmup = round(steps * config.warmup_period_percent / 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Step the optimiser, or leave everything as it is where the gradients are not finite.

    A fused optimiser decides on the device; with any other the host waits for it.
    """
    if scaler.is_enabled():  # it has looked at the gradients itself, and lowers its scale
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = 1 - finite.float()  # as a scaler would set it
        optimizer.step()
    elif finite.item():
        optimizer.step()
