"""What a run does inside, watched at the libraries that it calls: which tokens a step takes, in which
precision, whether compiled, when gradients are exchanged, what is drawn, and what speed and cost are.

The statements that watch run in the training's own process, before the script, and know nothing of its code.
"""

import json
import re
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import MODEL, NO_CHART, Sandbox, assert_same_tensors, write_dataset
from reference import PlainGPT
from safetensors.torch import load_file

from basemodel.model.config import GPTConfig
from basemodel.planning.machines import peak_flops

VALIDATE = {"validation_interval": 4, "validation_batches": 2}
# One step that moves a weight by 1e-30 at most.
UNTRAINED = {"learning_rate": 1e-30, "weight_decay": 0.0, "min_train_tokens": 1}


def watched(stdout: str, word: str) -> list:
    """What the lines that begin with `word` say, as JSON."""
    lines = [line.removeprefix(word) for line in stdout.splitlines() if line.startswith(word)]
    assert lines, f"nothing was seen of {word}"
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------------------
# Which tokens a step takes
# ------------------------------------------------------------------------------------------------------------

WATCH_TOKENS = f"""{NO_CHART}
import torch
def watch(module, inputs):
    tokens = inputs[0]
    if tokens.dim() == 2 and tokens.any():  # an embedding of tokens, not of positions, and not tried out
        print("took", (tokens[:, 0] // 16).tolist(), flush=True)
        assert (tokens - tokens[:, :1]).equal(torch.arange(16).expand_as(tokens))
make = torch.nn.Embedding.__init__
def make_and_watch(self, *arguments, **options):
    make(self, *arguments, **options)
    self.register_forward_pre_hook(watch)
torch.nn.Embedding.__init__ = make_and_watch
"""


def order_of_sequences(sandbox: Sandbox, run: str, processes: int) -> list[list[int]]:
    """The sequences of each global batch, in order, by the microbatches that the processes took."""
    finished = sandbox.launch(run, processes=processes, before=WATCH_TOKENS)
    assert {done.returncode for done in finished} == {0}, finished[0].stderr
    per_process = [watched(done.stdout, "took") for done in finished]
    turns = [sequence for turn in zip(*per_process, strict=True) for taken in turn for sequence in taken]
    return [turns[first : first + 8] for first in range(0, len(turns), 8)]


def test_global_batches_are_the_same_sequences_in_the_same_order(sandbox: Sandbox) -> None:
    """By two processes. Sequence i is tokens 16 i to 16 i + 16; of 33, epochs do not end where batches do."""
    tokens = np.arange(16 * 33 + 1, dtype=np.uint16)
    write_dataset(sandbox.datasets / "test/tokens", train=tokens)
    orders = {}
    for run, seed in (("one", 1), ("two", 2)):
        train = {"random_seed": seed, "epochs": 3, "min_train_tokens": 12 * 8 * 16}
        sandbox.write_run(run, {"vocab_size": 1024}, train)
        batches = order_of_sequences(sandbox, run, 2)
        assert batches[:4] == [list(range(step * 8, step * 8 + 8)) for step in range(4)], "in file order"
        order = [sequence for batch in batches for sequence in batch]
        epochs = order[:33], order[33:66], order[66:]
        assert sorted(epochs[1]) == list(range(33)) and len(set(epochs[2])) == 30
        assert epochs[1] != sorted(epochs[1]) and epochs[2] != epochs[1][:30]
        orders[seed] = epochs[1]
    assert orders[1] != orders[2]
    assert orders[1] == np.random.default_rng((1, 1)).permutation(33).tolist()


@pytest.mark.parametrize("start", [0, 21])
def test_validation_is_the_mean_loss_of_the_sequences_from_start_val_token_on(
    sandbox: Sandbox, start: int
) -> None:
    sandbox.write_run(train={**UNTRAINED, **VALIDATE, "validation_batches": 3, "start_val_token": start})
    sandbox.train()
    model = PlainGPT(GPTConfig(**MODEL))
    model.load_state_dict(load_file(sandbox.checkpoints()[-1] / "model.safetensors"))
    tokens = load_file(sandbox.datasets / "test/tokens/validation.safetensors")["tokens"].long()
    sequences = torch.stack([tokens[start + 16 * i : start + 16 * i + 17] for i in range(3 * 2)])
    with torch.no_grad():
        loss = F.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())
    assert sandbox.metrics(key="val_loss") == pytest.approx([loss.item()] * 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Initial weights
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pytorch", "gpt2", "zero"])
def test_a_run_begins_with_the_weights_that_init_names(sandbox: Sandbox, init: str) -> None:
    """By their statistics: torch's Linear is uniform in +-1/sqrt(inputs), its Embedding normal(0, 1)."""
    sandbox.write_run(
        model={"init": init, "emb_dim": 64, "n_layers": 3, "context_length": 64}, train=UNTRAINED
    )
    sandbox.train()
    weights = load_file(sandbox.checkpoints()[-1] / "model.safetensors")
    for name, tensor in weights.items():
        residual = "out_proj" in name or "layers.2" in name
        if name.endswith("shift") or (init == "zero" and residual):
            assert tensor.abs().max() < 1e-20, name
        elif name.endswith("scale"):
            assert tensor.eq(1).all()
        elif init == "gpt2" and name.endswith("bias"):
            assert tensor.abs().max() < 1e-20, name
        elif init == "gpt2":
            std = 0.02 / 6**0.5 if residual else 0.02
            assert tensor.std().item() == pytest.approx(std, rel=0.07), name
            assert tensor.abs().max() > 3 * std, f"{name} is not normal"
        elif "emb" in name:
            std = 0.02 if (init, name) == ("zero", "pos_emb.weight") else 1
            assert tensor.std().item() == pytest.approx(std, rel=0.07), name
        else:
            bound = 1 / weights[name.replace("bias", "weight")].shape[1] ** 0.5
            assert 0.8 * bound < tensor.abs().max() <= bound, name


# ------------------------------------------------------------------------------------------------------------
# Precision and compilation
# ------------------------------------------------------------------------------------------------------------

WATCH_PRECISION = f"""{NO_CHART}
import json, pathlib, torch
seen = set()
def watch(module, inputs, output):
    if isinstance(module, torch.nn.GELU):  # inside the blocks, behind a Linear
        found = str(inputs[0].dtype), torch.get_float32_matmul_precision(), module.training
        if found not in seen:
            seen.add(found)
            print("computed", json.dumps(found), flush=True)
torch.nn.modules.module.register_module_forward_hook(watch)
read_text = pathlib.Path.read_text
def read(self, *arguments, **options):
    return "flags: FLAGS\\n" if str(self) == "/proc/cpuinfo" else read_text(self, *arguments, **options)
pathlib.Path.read_text = read
"""
FULL, HALF = "torch.float32", "torch.bfloat16"


@pytest.mark.parametrize(
    ("settings", "flags", "dtype", "products", "said"),
    [
        ({"precision": "fp32"}, "avx512_bf16", FULL, "highest", "fp32"),
        ({"use_amp": False, "precision": "auto"}, "avx512_bf16", FULL, "highest", "fp32"),
        ({"precision": "tf32"}, "", FULL, "high", "tf32"),
        ({"precision": "bf16"}, "", HALF, "high", "bf16"),
        ({"precision": "fp16"}, "", "torch.float16", "high", "fp16"),
        ({"precision": "auto"}, "avx2 avx512_bf16", HALF, "high", "bf16"),
        ({"precision": "auto"}, "avx2 amx_bf16", HALF, "high", "bf16"),
        ({"precision": "auto"}, "avx2 avx512f", FULL, "highest", "fp32"),
    ],
)
def test_blocks_compute_in_the_precision_that_is_asked_for(
    sandbox: Sandbox, settings: dict, flags: str, dtype: str, products: str, said: str
) -> None:
    """Both in training and in validation; "auto" is bf16 where the CPU multiplies it, and is said."""
    sandbox.write_run(train={**VALIDATE, **settings})
    out = sandbox.train(before=WATCH_PRECISION.replace("FLAGS", flags))
    found = sorted(watched(out, "computed"))
    assert found == [[dtype, products, False], [dtype, products, True]]
    assert f"precision {said}" in out
    assert sandbox.meta()["precision"] == said
    saved = load_file(sandbox.checkpoints()[-1] / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert saved.keys() == dict(PlainGPT(GPTConfig(**MODEL)).named_parameters()).keys(), "and no buffers"


WATCH_COMPILER = f"""{NO_CHART}
import torch
real = torch.compile
def backend(graph, inputs):
    print("compiled", len(list(graph.graph.nodes)), flush=True)
    return graph.forward
torch.compile = lambda *module, **options: real(*module, **(options | {{"backend": backend}}))
"""


def test_a_compiled_run_runs_compiled_code_and_learns_the_same(sandbox: Sandbox) -> None:
    """With a compiler that takes graphs as they are: whatever is asked for, and only then, there are two, the
    blocks (each block more than ten operations) and the loss."""
    for run, compiled in (("eager", False), ("auto", "auto"), ("compiled", True)):
        sandbox.write_run(run, train={"compile": compiled})
    graphs = watched(sandbox.train("compiled", before=WATCH_COMPILER), "compiled")
    assert len(graphs) >= 2 and max(graphs) > 2 * 10
    for run in ("eager", "auto"):
        assert "compiled" not in sandbox.train(run, before=WATCH_COMPILER), "on a CPU"
    assert_same_tensors(sandbox.final_tensors("eager"), sandbox.final_tensors("auto"))
    eager, compiled = sandbox.final_tensors("eager"), sandbox.final_tensors("compiled")
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


WATCH_EXCHANGES = f"""{NO_CHART}
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
def count(group, bucket):
    print("exchanged", bucket.buffer().numel(), flush=True)
    return allreduce_hook(group, bucket)
make = DistributedDataParallel.__init__
def make_and_watch(self, *arguments, **options):
    make(self, *arguments, **options)
    self.register_comm_hook(None, count)
DistributedDataParallel.__init__ = make_and_watch
"""


@pytest.mark.parametrize("microbatch_size", [4, 1])
def test_gradients_are_exchanged_once_per_step_whatever_the_accumulation(
    sandbox: Sandbox, microbatch_size: int
) -> None:
    sandbox.write_run(train={"microbatch_size": microbatch_size})
    for done in sandbox.launch("tiny", processes=2, before=WATCH_EXCHANGES):
        assert done.returncode == 0, done.stderr
        exchanged = watched(done.stdout, "exchanged")
        assert sum(exchanged) == (2 + 8) * 29_888, "all gradients, when tried out and in each of 8 steps"


# ------------------------------------------------------------------------------------------------------------
# Speed and cost
# ------------------------------------------------------------------------------------------------------------

CLOCK = f"""{NO_CHART}
import time, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
now = [1000.0]
def go_on(seconds):
    now[0] += seconds
time.monotonic = lambda: now[0]
register_optimizer_step_post_hook(lambda *_: go_on(16))
def validate(module, inputs, output):
    if isinstance(module, torch.nn.Dropout) and not module.training:
        go_on(3)
torch.nn.modules.module.register_module_forward_hook(validate)
"""


def test_speed_time_and_cost_are_those_of_the_clock(sandbox: Sandbox) -> None:
    """A step of 128 tokens takes 16 s, a pass through the model in validation 5 x 3 s; $225 an hour."""
    sandbox.write_run(train={**VALIDATE, "usd_per_hour": 225.0})
    out = sandbox.launch("tiny", processes=1, before=CLOCK)[0]
    assert out.returncode == 0, out.stderr
    assert sandbox.metrics(key="tokens_per_second") == [8.0] * 8, "without validation"
    assert sandbox.metrics(key="validation_seconds") == [30.0] * 3
    assert sandbox.metrics(key="tokens") == [128 * step for step in range(9)]
    # Each line of metrics.jsonl ends with the step, or with what follows it.
    ends = [30, 46, 62, 78, 124, 140, 156, 172, 218]
    assert sandbox.metrics(key="seconds") == ends
    lines = out.stdout.splitlines()[-5:]
    assert lines[:3] == [
        "Training complete in 218.000 seconds",
        "Tokens seen: 1,024",
        f"Throughput: {1024 / 218:,.0f} tokens/second",
    ]
    shown = re.findall(
        r"step (\d)/8: .* (\d+) tokens/s, \$(\d+\.\d\d) of \$(\d+\.\d\d), ETA (\S+)", out.stderr
    )
    costs = [f"{end / 16:.2f}" for end in (46, 62, 78, 94, 140, 156, 172, 188)]
    left = ["01:52", "01:36", "01:20", "01:04", "00:48", "00:32", "00:16", "00:00"]
    expected = [
        f"{(end + 16 * (8 - step)) / 16:.2f}"
        for step, end in enumerate((46, 62, 78, 94, 140, 156, 172, 188), 1)
    ]
    assert shown == list(zip("12345678", "8" * 8, costs, expected, left, strict=True))
    status = sandbox.status()
    assert status["tokens_per_second"] == pytest.approx(8)
    assert status["seconds"] == 218 and status["cost_usd"] == pytest.approx(218 / 16)
    assert status["expected_cost_usd"] == status["cost_usd"]
    assert status["eta_seconds"] == 0

    plan = sandbox.train("tiny", "--plan")
    assert re.search(r"ETA: +0:02:08 at 8 tokens/s", plan), "1,024 tokens"
    assert re.search(r"Cost: +\$8\.00 at \$225\.00 an hour", plan)


GPU = """
from basemodel.planning import machines
known = machines.peak_flops("NVIDIA A100-SXM4-40GB")
machines.peak_flops = lambda _: known and 1e6
"""


def test_mfu_is_a_share_of_the_peak_of_all_devices(sandbox: Sandbox) -> None:
    """8 tokens/s of 172,032 FLOPs each, on two devices of 1,000,000 FLOP/s."""
    sandbox.write_run()
    out, _ = sandbox.launch("tiny", processes=2, before=CLOCK + GPU)
    assert out.returncode == 0, out.stderr
    share = 8 * (6 * 26_624 + 12 * 2 * 32 * 16) / 2e6
    assert sandbox.metrics(key="mfu") == [pytest.approx(share, abs=1e-4)] * 8
    assert sandbox.status()["mfu"] == pytest.approx(share, abs=1e-4)
    assert f" 8 tokens/s, {share:.0%} MFU, ETA" in out.stderr


def test_mfu_is_left_out_where_the_peak_is_unknown(sandbox: Sandbox) -> None:
    sandbox.write_run()
    out, _ = sandbox.launch("tiny", processes=2, before=CLOCK + GPU.replace("A100-SXM4-40GB", "T1000"))
    assert (out.returncode, sandbox.metrics(key="mfu")) == (0, [])
    assert "mfu" not in sandbox.status() and "MFU" not in out.stderr


def test_peaks_go_by_whole_words_of_the_name() -> None:
    names = {"NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A10": 125e12, "Tesla T4": 65e12}
    names |= {"NVIDIA A10G": None, "NVIDIA RTX A1000": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None}
    assert {name: peak_flops(name) for name in names} == names


def test_the_plan_counts_floating_point_operations(sandbox: Sandbox) -> None:
    """6 a token for each weight of a matrix product, and attention's 12 x layers x width x context."""
    sandbox.write_run()
    blocks, head, attention = 2 * (4 * 32 * 32 + 2 * 4 * 32 * 32), 64 * 32, 12 * 2 * 32 * 16
    per_token = 6 * (blocks + head) + attention
    out = sandbox.train("tiny", "--plan")
    assert f"{1024 * per_token:.2e}, {per_token:,} per token" in out


# ------------------------------------------------------------------------------------------------------------
# The chart
# ------------------------------------------------------------------------------------------------------------

WATCH_CHART = """
import json
from matplotlib.figure import Figure
save = Figure.savefig
def watch(self, *arguments, **options):
    for axes in self.axes:
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        bands = {band.get_label(): band.get_paths()[0].vertices.tolist() for band in axes.collections}
        named = axes.get_title(), axes.get_xlabel(), axes.get_ylabel()
        legend = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
        print("drew", json.dumps([named, lines, bands, legend]), flush=True)
    return save(self, *arguments, **options)
Figure.savefig = watch
"""


def points(steps: Iterable[int], values: list[float]) -> list[list[float]]:
    return [[step, value] for step, value in zip(steps, values, strict=True)]


def test_the_chart_shows_what_was_logged(sandbox: Sandbox) -> None:
    sandbox.write_run(train={**VALIDATE, "schedule_learning_rate": True})
    panels = watched(sandbox.train(before=WATCH_CHART), "drew")[-3:]
    (title, _, unit), lines, bands, legend = panels[0]
    assert (title, unit) == ("tiny", "nats per token")
    losses = sandbox.metrics(key="train_loss")
    assert lines["train loss"] == points(range(1, 9), losses)
    assert lines["validation loss"] == points((0, 4, 8), sandbox.metrics(key="val_loss"))
    assert legend == ["train loss, min to max", "train loss", "validation loss"]
    (band,) = bands.values()
    assert {loss for _, loss in band} == set(losses)
    for panel, label in ((panels[1], "learning rate"), (panels[2], "gradient norm")):
        named, lines, _, _ = panel
        key = {"learning rate": "learning_rate", "gradient norm": "grad_norm"}[label]
        assert named[2] == label
        assert list(lines.values()) == [points(range(1, 9), sandbox.metrics(key=key))]
    assert panels[2][0][1] == "global step"


def test_long_runs_are_drawn_as_means_in_a_band_of_extremes(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    from basemodel.results.run_chart import draw_chart

    losses = np.random.default_rng(0).normal(5, 1, 1000)
    lines = [
        {"step": step, "train_loss": loss, "learning_rate": 0.1, "grad_norm": 1.0}
        for step, loss in enumerate(losses.tolist(), start=1)
    ]
    lines[500]["train_loss"] = None  # it was not finite
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn, bands = [], []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **_: drawn.append((x, y)))
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: bands.append((low, high)))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    draw_chart(tmp_path / "metrics.jsonl", tmp_path / "chart.png", "long")
    bins = [np.delete(losses[first : first + 5], [0] if first == 500 else []) for first in range(0, 1000, 5)]
    (x, y), ((low, high),) = drawn[0], bands
    assert y == pytest.approx([part.mean() for part in bins])
    assert low == [part.min() for part in bins] and high == [part.max() for part in bins]
    assert all(one < other for one, other in pairwise(x)) and len(x) == 200


WATCH_DETERMINISM = f"""{NO_CHART}
import os, torch
step = torch.optim.AdamW.step
def watch(self, *arguments, **options):
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    print("stepped", json.dumps([torch.are_deterministic_algorithms_enabled(), workspace]), flush=True)
    return step(self, *arguments, **options)
import json
torch.optim.AdamW.step = watch
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deterministic_run_allows_no_other_kernels(sandbox: Sandbox, optimizer: str) -> None:
    """All that a step, masked documents included, and a validation need has a deterministic kernel here."""
    train = {**VALIDATE, "optimizer": optimizer, "document_masking": True}
    model = {"vocab_size": 257, "tokenizer": "bytes", "drop_rate": 0.1}
    for run, deterministic, expected in (("free", False, [False, None]), ("fixed", True, [True, ":4096:8"])):
        sandbox.write_run(run, model, {**train, "deterministic": deterministic})
        steps = watched(sandbox.train(run, before=WATCH_DETERMINISM), "stepped")
        assert all(step == expected for step in steps)
    assert_same_tensors(sandbox.final_tensors("free"), sandbox.final_tensors("fixed"))
