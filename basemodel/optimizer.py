"""The optimiser, the learning rate of each step, and the decision to leave a step out."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from basemodel.config import TrainConfig
from gpt import GPTModel


class Peers(Protocol):
    """The processes among which Muon shares out its matrices, and which of them this one is."""

    rank: int
    size: int

    def share(self, shares: list[list[Tensor]]) -> None:
        """Send the tensors of `shares[rank]` from each process to all others, in place."""


def make_optimizer(
    model: GPTModel, config: TrainConfig, precision: str, peers: Peers
) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for the hidden matrices and AdamW for the rest.

    Weight decay is on everything, or only on matrices that are not embeddings.
    """
    hidden = [p for p in model.trf_blocks.parameters() if p.dim() == 2] if config.optimizer == "muon" else []
    apart = {id(parameter) for parameter in hidden}
    embeddings = {id(model.tok_emb.weight), id(model.pos_emb.weight)}
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        if id(parameter) not in apart:
            decays = config.decay_all_parameters or (parameter.dim() == 2 and id(parameter) not in embeddings)
            groups[config.weight_decay if decays else 0.0].append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "relative_rate": 1.0}
            for decay, parameters in groups.items()
            if parameters
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=model.out_head.weight.device.type in ("cpu", "cuda"),
    )
    if not hidden:
        return adamw
    group = {"params": hidden, "relative_rate": config.muon_learning_rate / config.learning_rate}
    muon = Muon(
        group,
        peers=peers,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        lr=config.muon_learning_rate,
        weight_decay=config.weight_decay,
    )
    return MuonWithAdamW(muon, adamw)


class Muon(torch.optim.Muon):
    """torch's Muon, which moves a matrix by its momentum made orthogonal (Jordan et al. 2024), in less time.

    That takes fifteen small matrix products a matrix. Here matrices of one shape are multiplied at a time, in
    `dtype`, and processes share out the matrices: each moves some and sends them to the others. All keep the
    momentum of all, so that any of them can save it.
    """

    def __init__(self, group: dict[str, Any], *, peers: Peers, dtype: torch.dtype, **options: float) -> None:
        super().__init__([group], **options)
        self.peers, self.dtype = peers, dtype
        matrices = self.param_groups[0]["params"]
        self.shares = share_out(matrices, [p.numel() * min(p.shape) for p in matrices], peers.size)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices from gradients that are the same on all processes."""
        (group,) = self.param_groups
        for matrix in group["params"]:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
        of_one_size: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in self.shares[self.peers.rank]:
            of_one_size.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        for alike in of_one_size.values():
            for matrix, update in zip(alike, self._updates(alike, group), strict=True):
                # Larger steps for more rows than columns: torch's "original" adjustment.
                rate = group["lr"] * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
        self.peers.share(self.shares)

    def _updates(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
        """For matrices (M, N) or (N, M), M <= N, their momentum, a step ahead (Nesterov), made orthogonal."""
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        ahead = [p.grad.lerp(m, group["momentum"]) for p, m in zip(matrices, momenta, strict=True)]
        batch = torch.stack([x if x.shape[0] <= x.shape[1] else x.mT for x in ahead]).to(self.dtype)
        updates = orthogonalized(batch, group["ns_coefficients"], group["ns_steps"])
        return [u if u.shape == m.shape else u.mT for u, m in zip(updates, matrices, strict=True)]


def orthogonalized(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Bring the singular values of matrices (count, M, N), M <= N, near to one, by Newton and Schulz's
    iteration with the coefficients of torch.optim.Muon."""
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of one at most
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW, each for its own parameters, as one optimiser with one state."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        self._muon, self._adamw = muon, adamw

    def step(self, closure: None = None) -> None:
        """Update all parameters."""
        # Loading a checkpoint has put other groups and another state in the place of those that were shared.
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state
        self._muon.step()
        self._adamw.step()


def share_out(items: list[nn.Parameter], costs: list[int], shares: int) -> list[list[nn.Parameter]]:
    """Divide items into `shares` lists of about the same cost: the dearest first, to the least loaded."""
    lists: list[list[nn.Parameter]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for index in sorted(range(len(items)), key=lambda index: -costs[index]):
        least = loads.index(min(loads))
        lists[least].append(items[index])
        loads[least] += costs[index]
    return lists


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give AdamW's parameters the learning rate `rate`, Muon's as large a part of their own peak."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["relative_rate"]


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
    """The learning rate of step `step` (from 0) of `steps`.

    "constant" is one rate. The others begin with a linear warm-up that reaches the peak with the last of the
    first warmup_period_percent of the steps. Then "cosine" is half a cosine, down to a tenth at the last
    step; "wsd" stays at the peak and, over the last decay_period_percent of the steps, falls in a line that
    reaches zero one step behind the last (Hägele et al. 2024).
    """
    peak = config.learning_rate
    if config.schedule == "constant":
        return peak
    warmup = round(steps * config.warmup_period_percent / 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "wsd":
        decay = round(steps * config.decay_period_percent / 100)
        return peak * min(1.0, (steps - step) / (decay + 1))
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
