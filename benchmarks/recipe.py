"""Loss against seconds: the demo's recipe beside nanoGPT's for CPUs, on the bytes of one text.

    python benchmarks/recipe.py TEXT          a file of about a megabyte; its last tenth is for validation

nanoGPT's recipe (github karpathy/nanoGPT, "I only have a macbook"): 4 layers of 128, 4 heads, context 64,
batches of 12, 2,000 steps of AdamW from 1e-3 to 1e-4, float32, not compiled, with its estimates of the loss
every 250 steps. Then `ddp_train.py` trains runs/demo on the same text, in about a quarter of the seconds
that this took, and in about all of them. Of nanoGPT's side the training loop alone is timed, of ours the
whole command, from Python's start to the last checkpoint and chart, with the demo's own validations. What
is compared is the loss on all of the last tenth, each at its own context, after the time is taken.
"""

import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from common import require, run_python, runs_dir_option
from safetensors.numpy import save_file
from torch import Tensor, nn

from basemodel.common.command_line import run_command
from basemodel.data.token_files import TokenFiles
from basemodel.model.loss import NextTokenLoss
from basemodel.model.weights import load_model

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, STEPS = 4, 128, 4, 64, 12, 2000
PEAK, LEAST, WARMUP = 1e-3, 1e-4, 100
TRIAL_TOKENS = 409_600  # of a run that shows how fast this machine is


class Block(nn.Module):
    """A transformer block without biases or dropout, as nanoGPT's recipe for CPUs has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class Model(nn.Module):
    """A GPT of 257 tokens with one matrix for embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(257, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "narrow.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * LAYERS) if residual else 1))

    def forward(self, sequences: Tensor) -> Tensor:
        """Map sequences (B, T + 1) to the mean cross-entropy in nats per byte."""
        x = self.tokens(sequences[:, :-1]) + self.positions.weight
        logits = self.norm(self.blocks(x)) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())


def train_nanogpt(train: Tensor, validation: Tensor, *, seed: int, steps: int) -> tuple[float, float]:
    """Train by nanoGPT's recipe; return the seconds of the training and the loss on `validation`."""
    start = time.monotonic()
    torch.manual_seed(seed)
    model = Model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))

    def batch(tokens: Tensor) -> Tensor:
        starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH,)).tolist()
        return torch.stack([tokens[start : start + CONTEXT + 1] for start in starts]).long()

    for step in range(steps + 1):
        progress = (step - WARMUP) / max(1, steps - WARMUP)
        cosine = LEAST + 0.5 * (1 + math.cos(math.pi * progress)) * (PEAK - LEAST)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * (step + 1) / (WARMUP + 1) if step < WARMUP else cosine
        if step % 250 == 0:
            with torch.no_grad():
                for part in (train, validation):
                    torch.stack([model(batch(part)) for _ in range(20)]).mean().item()
        loss = model(batch(train))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.monotonic() - start, validation_loss(model, validation, CONTEXT)


@torch.no_grad()
def validation_loss(model: nn.Module, validation: Tensor, context: int) -> float:
    """The mean over all sequences of `validation` of what `model` makes of each, (1, context + 1)."""
    rows = validation.unfold(0, context + 1, context).long()
    return torch.stack([model(row[None]) for row in rows]).mean().item()


def run_demo(folder: Path, demo: Path, seed: int, tokens: int) -> tuple[float, float]:
    """Train the demo's recipe over so many tokens of the text: the seconds of the whole command, and the
    tokens per second of its steps."""
    run = folder / "runs/demo"
    run.mkdir(parents=True, exist_ok=True)
    model = json.loads((demo / "model.json").read_text())
    train = json.loads((demo / "train.json").read_text())
    train |= {"dataset": "bytes/text", "min_train_tokens": tokens, "random_seed": seed}
    train["epochs"] = math.ceil(1.1 * tokens / TokenFiles(folder / "bytes/text", "train").count)
    (run / "model.json").write_text(json.dumps(model))
    (run / "train.json").write_text(json.dumps(train))
    start = time.monotonic()
    run_python("ddp_train.py", "demo", folder, "--runs-dir", run.parent)
    seconds = time.monotonic() - start
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return seconds, statistics.median(line["tokens_per_second"] for line in lines if "train_loss" in line)


def demo_loss(folder: Path, validation: Tensor) -> float:
    """The loss of the demo that was trained last."""
    run = folder / "runs/demo"
    model = load_model(run / "model.json", run / "checkpoints/latest/model.safetensors").cpu()
    return validation_loss(NextTokenLoss(model), validation, model.config.context_length)


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=STEPS, show_default=True, help="Of nanoGPT's.")
@click.option(
    "--tokens", type=click.IntRange(1), help="Of the demo's; default: what the seconds of nanoGPT's allow."
)
@runs_dir_option
def main(text: Path, rounds: int, steps: int, tokens: int | None, runs_dir: Path) -> None:
    """Compare the demo's recipe with nanoGPT's on the bytes of the file TEXT."""
    read = np.frombuffer(text.read_bytes(), dtype=np.uint8).astype(np.uint16)
    require(len(read) >= 100_000, f"{text}: {len(read):,} bytes are too few; a megabyte would do")
    parts = {"train": read[: len(read) * 9 // 10], "validation": read[len(read) * 9 // 10 :]}
    print(f"{text.name}: {len(read):,} bytes; {os.cpu_count()} cores, torch {torch.__version__}")
    print("timed: of nanoGPT's recipe its training loop alone, of the demo's the whole command")
    print("\n| round | recipe | seconds | of nanoGPT's | validation loss, nats per byte |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bytes/text").mkdir(parents=True)
        for split, part in parts.items():
            save_file({"tokens": part}, folder / f"bytes/text/{split}.safetensors")
        demo = runs_dir / "demo"
        if tokens is None:
            whole, speed = run_demo(folder, demo, 0, TRIAL_TOKENS)
            around = whole - TRIAL_TOKENS / speed
        training, validation = (torch.from_numpy(part) for part in parts.values())
        for turn in range(1, rounds + 1):
            nanogpt, loss = train_nanogpt(training, validation, seed=turn, steps=steps)
            print(f"| {turn} | nanoGPT's | {nanogpt:.1f} | 1 | {loss:.3f} |", flush=True)
            for share in (1 / 4, 1.0) if tokens is None else (1.0,):
                budget = tokens or int((0.9 * share * nanogpt - around) * speed)
                require(budget > 0, f"{share * nanogpt:.0f} s is what starting takes; is the machine busy?")
                seconds, _ = run_demo(folder, demo, turn, budget)
                loss = demo_loss(folder, validation)
                row = f"| {turn} | the demo's | {seconds:.1f} | {seconds / nanogpt:.2f} | {loss:.3f} |"
                print(row, flush=True)


if __name__ == "__main__":
    run_command(main)
