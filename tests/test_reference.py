"""The weights after 20 steps of a real run are those of a plain reference that reads the same two JSON files.

The reference is the plain model of benchmarks/reference.py with torch's own AdamW and clipping, and Muon
written out, on whole global batches in one process, without accumulation.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Sandbox
from reference import PlainGPT
from safetensors.torch import load_file
from torch import Tensor

from basemodel.model.config import GPTConfig

STEPS = 20
COMMON = {
    "random_seed": 7,
    "min_train_tokens": STEPS * 8 * 16,
    "start_train_token": 5,
    "weight_decay": 0.3,
    "betas": [0.8, 0.95],
    "clipping_max_norm": 0.2,
    "warmup_period_percent": 25,
    "decay_all_parameters": False,
}
CASES = {
    "adamw": {"schedule_learning_rate": True},
    "muon": {
        "optimizer": "muon",
        "muon_learning_rate": 0.03,
        "muon_momentum": 0.8,
        "embedding_learning_rate": 0.05,
        "head_learning_rate": 0.004,
        "lr_schedule": "wsd",
    },
}
CASES["halves"] = {**CASES["muon"], "half_batch_percent": 40}
CASES["short"] = {**CASES["halves"], "short_sequence_percent": 60}  # its first four whole batches too


def rate(step: float, train: dict) -> float:
    """The share of the peak to learn with after `step` whole batches."""
    warmup = STEPS * train["warmup_period_percent"] // 100
    if step < warmup:
        return (step + 1) / warmup
    if train.get("lr_schedule") == "wsd":
        return min(1.0, (STEPS - step) / (STEPS * 60 // 100 + 1))
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (STEPS - 1 - warmup))


def orthogonal(x: Tensor) -> Tensor:
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


def muon_step(matrix: Tensor, momentum: Tensor, lr: float, train: dict) -> None:
    kept, decay = train["muon_momentum"], train["weight_decay"]
    momentum.mul_(kept).add_(matrix.grad, alpha=1 - kept)
    ahead = (1 - kept) * matrix.grad + kept * momentum
    rows, columns = matrix.shape
    update = orthogonal(ahead) if rows <= columns else orthogonal(ahead.T).T
    matrix.mul_(1 - lr * decay).sub_(update, alpha=lr * math.sqrt(max(1, rows / columns)))


def reference_run(run: Path, tokens: Tensor) -> tuple[dict[str, Tensor], list[tuple[float, float, float]]]:
    """The weights, and of each step the loss, the gradient's norm before clipping and the learning rate."""
    model_config, train = (json.loads((run / f"{name}.json").read_text()) for name in ("model", "train"))
    torch.manual_seed(train.get("random_seed", 42))
    model = PlainGPT(GPTConfig(**model_config))
    parameters = dict(model.named_parameters())
    hidden = [n for n, p in parameters.items() if n.startswith("trf_blocks") and p.dim() == 2]
    by_muon = hidden if train.get("optimizer") == "muon" else []
    by_adamw = [name for name in parameters if name not in by_muon]
    decaying = {*hidden, "out_head.weight"}
    embedding, head = (train.get(f"{part}_learning_rate") for part in ("embedding", "head"))
    own = {"tok_emb.weight": embedding, "out_head.weight": head}
    peaks = {name: own.get(name) or train["learning_rate"] for name in by_adamw}
    decays = {name: train["weight_decay"] if name in decaying else 0.0 for name in by_adamw}
    groups = [{"params": [parameters[name]], "weight_decay": decays[name]} for name in by_adamw]
    adamw = torch.optim.AdamW(groups, betas=tuple(train["betas"]), foreach=False)
    momenta = {name: torch.zeros_like(parameters[name]) for name in by_muon}
    length, batch, said = model_config["context_length"], train["global_batch_size"], []
    halves = 2 * STEPS * train.get("half_batch_percent", 0) // 100
    sizes = [batch // 2] * halves + [batch] * (STEPS - halves // 2)
    for number, size in enumerate(sizes):
        before = sum(sizes[:number])
        starts = [train["start_train_token"] + (before + i) * length for i in range(size)]
        if before < batch * STEPS * train.get("short_sequence_percent", 0) / 100:
            starts = [start + quarter * length // 4 for start in starts for quarter in range(4)]
            sequences = torch.stack([tokens[start : start + length // 4 + 1] for start in starts])
        else:
            sequences = torch.stack([tokens[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train["clipping_max_norm"]).item()
        share = rate(before / batch, train)
        for name, group in zip(by_adamw, adamw.param_groups, strict=True):
            group["lr"] = peaks[name] * share
        adamw.step()
        with torch.no_grad():
            for name, momentum in momenta.items():
                lr = train["muon_learning_rate"] * share
                muon_step(parameters[name], momentum, lr, train)
        said.append((loss.item(), norm, train["learning_rate"] * share))
    return {name: parameter.detach() for name, parameter in parameters.items()}, said


@pytest.mark.parametrize(("case", "processes"), [(case, n) for case in CASES for n in (1, 2)])
def test_20_steps_end_with_the_weights_of_the_reference(sandbox: Sandbox, case: str, processes: int) -> None:
    run = sandbox.write_run(train={**COMMON, **CASES[case]})
    sandbox.train(processes=processes)
    tokens = load_file(sandbox.datasets / "test/tokens/train.safetensors")["tokens"].long()
    expected, said = reference_run(run, tokens)
    losses, norms, rates = zip(*said, strict=True)
    assert sandbox.metrics(key="train_loss") == pytest.approx(losses, rel=1e-4)
    assert sandbox.metrics(key="grad_norm") == pytest.approx(norms, rel=1e-2)
    assert sandbox.metrics(key="learning_rate") == pytest.approx(rates, rel=1e-6)
    assert min(norms) > COMMON["clipping_max_norm"], "every step is clipped"
    weights = load_file(sandbox.checkpoints()[-1] / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).norm() < 2e-3 * tensor.norm(), name
