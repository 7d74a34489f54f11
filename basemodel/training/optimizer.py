"""The optimizer, its learning rate at each step, and skipping non-finite steps.

Each parameter group has an `lr_scale`, its peak learning rate divided by the config's `learning_rate`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from gpt import GPTModel


def make_optimizer(model: GPTModel, config: TrainConfig, precision: str, world: World) -> Optimizer:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest.

    To add an optimizer, add it here and to config.py, and say what it stores and computes where they ask for
    "muon": Run.checkpoint_bytes, planning/footprint.py and planning/estimate.py. Its groups need `lr_scale`,
    and its step must change nothing if `found_inf` is 1 (see Muon, MuonWithAdamW); no host waits for it.
    Weight decay applies to everything, or only to matrices that are not embeddings.
    """
    hidden = [p for p in model.trf_blocks.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    adamw = torch.optim.AdamW(
        adamw_groups(model, config, excluded={id(parameter) for parameter in hidden}),
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,  # so that it can skip a step without the host
    )
    if not hidden:
        return adamw
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
    muon = Muon(hidden, config, world, dtype)
    return MuonWithAdamW(muon, adamw)


def adamw_groups(model: GPTModel, config: TrainConfig, excluded: set[int]) -> list[dict[str, Any]]:
    """The parameters whose ids are not in `excluded`, grouped by learning rate and weight decay.

    The config may set separate rates for the token embedding and the head; tied, both have the embedding's.
    A token's row gets a gradient only when the token occurs, so it needs a far higher rate.
    """
    embeddings = {id(model.tok_emb.weight), id(model.pos_emb.weight)}
    rates = {id(model.out_head.weight): config.head_learning_rate}
    rates[id(model.tok_emb.weight)] = config.embedding_learning_rate  # last, because it may be the head too
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if id(parameter) not in excluded:
            decays = config.decay_all_parameters or (parameter.dim() == 2 and id(parameter) not in embeddings)
            rate = rates.get(id(parameter)) or config.learning_rate
            groups.setdefault((rate, config.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": rate / config.learning_rate}
        for (rate, decay), parameters in groups.items()
    ]


class Stack:
    """Matrices (M, N) and (N, M), M <= N, that Muon handles as one tensor (count, M, N)."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices = sorted(matrices, key=lambda matrix: matrix.shape[0] > matrix.shape[1])
        self.wide = sum(matrix.shape[0] <= matrix.shape[1] for matrix in matrices)  # before the tall ones
        self.momentum = torch.zeros_like(self.join(matrices))
        # Larger steps for tall matrices: torch's "original" adjustment.
        factors = [math.sqrt(max(1, rows / columns)) for rows, columns in (m.shape for m in matrices)]
        self.factors = self.momentum.new_tensor(factors)[:, None, None]

    @staticmethod
    def join(matrices: list[Tensor]) -> Tensor:
        return torch.stack([x if x.shape[0] <= x.shape[1] else x.mT for x in matrices]).detach()

    def split(self, stacked: Tensor) -> list[Tensor]:
        """Views of a tensor like `momentum`, each in the shape of its matrix."""
        return [*stacked[: self.wide], *stacked[self.wide :].mT]

    def subtract(self, changes: Tensor) -> None:
        """Subtract a tensor like `momentum` from the matrices, in one kernel, which needs equal strides."""
        changes = [*changes[: self.wide], *changes[self.wide :].mT.contiguous()]
        torch._foreach_sub_(self.matrices, changes)


class Muon(torch.optim.Muon):
    """A faster torch.optim.Muon, which updates matrices by orthogonalized momentum (Jordan et al. 2024).

    Orthogonalizing takes fifteen small matrix products per matrix. Here matrices of the same shape are
    stacked, and each process orthogonalizes its share of every stack, in `dtype`. All processes keep the
    momentum of all matrices, so that the first one can save it, and apply all updates.
    """

    found_inf: Tensor | None = None  # set by `step_if`

    def __init__(
        self, matrices: list[nn.Parameter], config: TrainConfig, world: World, dtype: torch.dtype
    ) -> None:
        rate = config.muon_learning_rate
        group = {"params": matrices, "lr_scale": rate / config.learning_rate}
        decay, momentum = config.weight_decay, config.muon_momentum
        super().__init__([group], lr=rate, weight_decay=decay, momentum=momentum)
        self.world, self.dtype = world, dtype
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        self.stacks = [Stack(each) for each in by_shape.values()]
        for stack in self.stacks:
            for matrix, view in zip(stack.matrices, stack.split(stack.momentum), strict=True):
                self.state[matrix]["momentum_buffer"] = view

    @torch.no_grad()
    def begin_step(self) -> None:
        """Compute this process's updates from averaged gradients, and start to exchange them.

        Nothing changes if `found_inf` is set and not 0; the device decides that, without the host.
        """
        (group,) = self.param_groups
        one = self.stacks[0].factors.new_ones(())
        self._finite = one if self.found_inf is None else one - self.found_inf
        self._updates = []
        for stack in self.stacks:
            gradients = Stack.join([matrix.grad for matrix in stack.matrices])
            gradients = gradients.where(self._finite > 0, stack.momentum)
            stack.momentum.lerp_(gradients, 1 - group["momentum"])
            share = self.world.share_of(len(gradients))
            ahead = gradients[share].lerp(stack.momentum[share], group["momentum"])  # Nesterov's momentum
            updates = orthogonalized(ahead, self.dtype, group["ns_coefficients"], group["ns_steps"])
            self._updates.append(self.world.gather_shares(updates, len(gradients)))

    @torch.no_grad()
    def finish_step(self) -> None:
        """Wait for the updates of all matrices and apply them."""
        (group,) = self.param_groups
        rate = group["lr"] * self._finite
        for stack, updates in zip(self.stacks, self._updates, strict=True):
            torch._foreach_mul_(stack.matrices, 1 - rate * group["weight_decay"])
            stack.subtract(updates().float() * (rate * stack.factors))


def orthogonalized(
    x: Tensor, dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int
) -> Tensor:
    """Bring the singular values of matrices (count, M, N), M <= N, close to one, by Newton-Schulz steps in
    `dtype`."""
    a, b, c = coefficients
    # To singular values of at most one; rounded only then, because gradients may be too small for fp16
    norms = x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = torch.div(x, norms, out=x.new_empty(x.shape, dtype=dtype))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonWithAdamW(Optimizer):
    """Muon and AdamW, each for its own parameters, as one optimizer with one state."""

    found_inf: Tensor | None = None  # set by `step_if`
    _step_supports_amp_scaling = True  # tells GradScaler that `step` itself heeds found_inf

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        self._muon, self._adamw = muon, adamw
        self.state.update(muon.state)
        muon.state = adamw.state = self.state

    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        self._muon.found_inf = self._adamw.found_inf = self.found_inf
        self._muon.begin_step()
        self._adamw.step()  # while processes exchange Muon's updates
        self._muon.finish_step()


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set AdamW's learning rate to `rate`, and Muon's to the same fraction of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def allocate_state(optimizer: Optimizer) -> None:
    """Create an optimizer's state now, by a step that changes nothing, instead of in the first training step.

    This keeps the state from fragmenting the memory that each step allocates and frees, and shows a lack of
    memory immediately.
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
        if "step" in state:  # the number of updates, which must start at zero
            state["step"].zero_()


def step_if(finite: Tensor, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Step the optimizer, or skip the step if not `finite` (see Learner.train_step); the device decides.

    In fp16 the scaler skips the step if the gradients, identical on all processes, are not finite, which they
    never are after a non-finite loss.
    """
    if scaler.is_enabled():  # it has checked the gradients itself, and adapts its scale
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = 1 - finite.float()  # as GradScaler sets it
        optimizer.step()
