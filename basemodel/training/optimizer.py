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
    muon = Muon(hidden, config, world, torch.float32 if precision == "fp32" else torch.bfloat16)
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


class Muon(torch.optim.Muon):
    """A faster torch.optim.Muon, which updates matrices by orthogonalized momentum (Jordan et al. 2024).

    Orthogonalizing takes fifteen small matrix products per matrix. Here matrices of the same shape are
    batched, in `dtype`, and each process updates its share of the matrices and broadcasts them. Every process
    keeps the momentum of all matrices, so that the first one can save it.
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
        self.shares = share_out(matrices, [p.numel() * min(p.shape) for p in matrices], world.size)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices from gradients that are already averaged over the processes.

        Nothing changes if `found_inf` is set and not 0; the device decides that, without the host.
        """
        (group,) = self.param_groups
        matrices = group["params"]
        finite = matrices[0].new_zeros(()) == 0 if self.found_inf is None else self.found_inf == 0
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            momentum = state["momentum_buffer"]
            momentum.lerp_(matrix.grad.where(finite, momentum), 1 - group["momentum"])
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in self.shares[self.world.rank]:
            by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        for batch in by_shape.values():
            for matrix, update in zip(batch, self._updates(batch, group), strict=True):
                # Larger steps for tall matrices: torch's "original" adjustment.
                rate = group["lr"] * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
                updated = matrix.mul(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
                matrix.copy_(updated.where(finite, matrix))
        self.world.broadcast_shards(self.shares)

    def _updates(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
        """The orthogonalized Nesterov momentum of matrices (M, N) or (N, M), M <= N."""
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        ahead = [p.grad.lerp(m, group["momentum"]) for p, m in zip(matrices, momenta, strict=True)]
        batch = torch.stack([x if x.shape[0] <= x.shape[1] else x.mT for x in ahead]).to(self.dtype)
        updates = orthogonalized(batch, group["ns_coefficients"], group["ns_steps"])
        return [u if u.shape == m.shape else u.mT for u, m in zip(updates, matrices, strict=True)]


def orthogonalized(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Bring the singular values of matrices (count, M, N), M <= N, close to one, by Newton-Schulz steps."""
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most one
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

    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        # Loading a checkpoint replaces the groups and state that both share with this optimizer.
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state
        self._muon.found_inf = self._adamw.found_inf = self.found_inf
        self._muon.step()
        self._adamw.step()


def share_out(items: list[nn.Parameter], costs: list[int], shares: int) -> list[list[nn.Parameter]]:
    """Divide items into `shares` lists of similar cost: each, the costliest first, goes to the lightest."""
    lists: list[list[nn.Parameter]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for index in sorted(range(len(items)), key=lambda index: -costs[index]):
        lightest = loads.index(min(loads))
        lists[lightest].append(items[index])
        loads[lightest] += costs[index]
    return lists


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
