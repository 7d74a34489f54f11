"""The learning rate at each step."""

import math

from basemodel.training.config import TrainConfig


def learning_rate_at(step: float, steps: float, config: TrainConfig) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    "constant" never changes. The others start with a linear warm-up over warmup_period_percent of the steps,
    whose last step has the peak rate. Then "cosine" falls along half a cosine to a tenth of the peak at the
    last step; "wsd" stays at the peak and, over the last decay_period_percent of the steps, falls linearly,
    reaching zero one step after the last (Hägele et al. 2024).
    """
    peak = config.learning_rate
    if config.lr_schedule in (None, "constant"):
        return peak
    warmup = round(steps * config.warmup_period_percent / 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "wsd":
        decay = round(steps * config.decay_period_percent / 100)
        return peak * min(1.0, (steps - step) / (decay + 1))
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
