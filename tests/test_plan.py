"""Plans for machines that are not here: their table, memory and speed by formulas, budgets and slow runs."""

import dataclasses
import json
import re
import statistics
from pathlib import Path

import footprint as memory_check
import pytest
import roofline as speed_check
import torch
from helpers import Sandbox, refused, run_script
from test_inside_a_run import CLOCK

import checkpointing
from basemodel.common.errors import InputError
from basemodel.model.config import GPTConfig
from basemodel.planning.estimate import WORST_ERROR, Roofline, memory_by_part
from basemodel.planning.footprint import Step
from basemodel.planning.machines import find_machines, gpu_of, read_gpus
from basemodel.training.config import TrainConfig
from basemodel.training.optimizer import allocate_state, make_optimizer
from basemodel.training.processes import World
from basemodel.training.run import Run
from gpt import GPTModel

# ------------------------------------------------------------------------------------------------------------
# The table of machines
# ------------------------------------------------------------------------------------------------------------


def test_a_machine_is_found_by_its_name() -> None:
    gpus = read_gpus()
    for words, name in (("8xA100-40", "8xA100-40"), ("1xrtx3090", "1xRTX3090"), ("h100-80", "1xH100-80")):
        assert [machine.name for machine in find_machines(words, gpus)] == [name]
    everything = [machine.name for machine in find_machines("all", gpus)]
    assert {"1xT4", "2xH100-80", "8xH100-80", "8xA100-40"} <= set(everything) and "8xT4" not in everything
    assert find_machines("8xa100-40", gpus)[0].usd_per_hour == 10.32


def test_a_device_is_known_by_its_name_and_its_memory() -> None:
    """Of which it reports a little less than the data sheet has."""
    for gpu in read_gpus().values():
        assert gpu_of(f"NVIDIA {gpu.cuda}", 0.98 * gpu.memory_gib) is gpu


@pytest.mark.parametrize(
    ("words", "hint"), [("8xA100", "8xA100-40"), ("1xRTX3900", "1xRTX3090"), ("0xT4", "1xT4"), ("8x", "8x")]
)
def test_an_unknown_machine_is_answered_with_the_nearest(words: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"unknown machine '{words}'; the nearest are ")) as error:
        find_machines(words, read_gpus())
    assert hint in str(error.value)


NEW = 'cuda = "X1"\nmemory_gib = 8\ntflops = 50\nbandwidth_gbs = 300\nlink_gbs = 16\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[X1\n", "cannot be read: "),
        ("X1 = 3\n", "'X1' must be in the table of a GPU, such as [RTX3090]"),
        ("[X1]\nmemory_gb = 3\n", "[X1]: unknown key 'memory_gb'; did you mean 'memory_gib'?"),
        ("[X1]\nmemory_gib = 3\n", "[X1]: the key 'cuda' is missing"),
        (f"[X1]\n{NEW}bf16 = 1\n", "[X1]: bf16 must be true or false, not 1"),
        (f"[X1]\n{NEW}usd_per_hour = 3\n", "[X1]: usd_per_hour must be a table or null, not 3"),
        (f"[X1]\n{NEW}usd_per_hour = {{ 8 = true }}\n", "[X1]: usd_per_hour.8 must be a number, not true"),
        (f"[X1]\n{NEW}usd_per_hour = {{ one = 3 }}\n", "[X1]: usd_per_hour is by number of GPUs"),
        (f"[X1]\n{NEW.replace('50', '-3')}", "[X1]: tflops must be more than 0, not -3"),
        (None, "cannot be read: "),
    ],
)
def test_a_malformed_table_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_gpus(file)
    assert str(error.value).startswith(f"{file}: ")


def test_options_of_plans_need_a_plan_and_a_length(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"min_train_tokens": -1})
    command = [*sandbox.command("tiny")]
    assert refused(*command, "--on", "all", env=sandbox.env) == "--on goes with --plan"
    assert "unknown machine 'T5'; the nearest are 1x" in refused(
        *command, "--plan", "--on", "T5", env=sandbox.env
    )
    runs = "--runs-dir", sandbox.path / "runs"
    line = refused("ddp_train.py", "tiny", *runs, "--plan", "--on", "T4", env=sandbox.env)
    assert line.startswith("min_train_tokens is -1, all there are, and the data are not here")


# ------------------------------------------------------------------------------------------------------------
# Memory and work
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1M", "1M, dropout"])
def test_estimated_memory_is_what_the_allocator_hands_out(name: str) -> None:
    estimated = memory_check.estimated(name, compiled=False)
    assert estimated == pytest.approx(memory_check.measured(name, compiled=False), rel=0.05)


SMALL_GPT2 = GPTConfig(50257, 1024, 768, 12, 3, drop_rate=0.0, qkv_bias=False)


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, {"qkv_bias": True, "n_layers": 2}])
def test_formulas_count_a_models_parameters(changes: dict) -> None:
    shape = dataclasses.replace(SMALL_GPT2, **changes)
    model = GPTModel.outline(shape)
    assert shape.parameter_count == sum(parameter.numel() for parameter in model.parameters())
    hidden = [p.numel() for p in model.trf_blocks.parameters() if p.dim() == 2]
    assert shape.hidden_parameters == sum(hidden)
    products = sum(hidden) + model.out_head.weight.numel()
    assert shape.flops_per_token == 6 * products + 12 * shape.n_layers * shape.emb_dim * shape.context_length


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_of_a_checkpoint_is_that_of_its_tensors(tmp_path: Path, optimizer: str) -> None:
    shape = GPTConfig(257, 16, 32, 2, 2, drop_rate=0.0, qkv_bias=False)
    config, model = TrainConfig("local/none", 1, 1, optimizer=optimizer), GPTModel(shape)
    alone = World(0, 0, 1, 1, torch.device("cpu"), control=None)
    state = make_optimizer(model, config, "fp32", alone)
    allocate_state(state)
    tensors = [*model.tensors().values(), *checkpointing.optimizer_tensors(model, state).values()]
    size = sum(tensor.nbytes for tensor in tensors)
    assert Run(tmp_path, config, shape).checkpoint_bytes == pytest.approx(size, rel=0.001)


@pytest.mark.parametrize(
    ("microbatch", "changes", "memory", "work"),
    [
        (4, {}, 3_516_165_348, (1.6066e12, 438_927_360, 6_325_701_216, 153)),
        (64, {}, 9_037_616_060, (2.5705e13, 6_704_332_800, 57_234_954_528, 243)),
        (4, {"precision": "fp16"}, 3_535_039_728, (1.6066e12, 438_927_360, 6_627_691_164, 158)),
        (4, {"optimizer": "muon"}, 3_431_230_620, (1.6066e12, 438_927_360, 6_325_701_216, 153)),
        (4, {"compile": False}, 4_378_167_528, (1.6066e12, 438_927_360, 14_319_093_380, 245)),
        (4, {"precision": "tf32"}, 5_187_734_756, (1.6066e12, 438_927_360, 9_303_424_096, 144)),
    ],
)
def test_formulas_agree_with_counts(
    microbatch: int, changes: dict, memory: int, work: tuple[float, int, int, int]
) -> None:
    """Every operation of a step of three layers was counted once, on tensors without data. Since then a chunk
    of the loss moves 4 bytes less for each logit in bf16, by Inductor's count, and for each weight; and the
    residual stream in bf16 moves 32 and keeps 2 less for each activation."""
    config = TrainConfig("local/none", microbatch, 1, **{"precision": "bf16", **changes})
    step = Step(SMALL_GPT2, config, microbatch)
    assert sum(step.memory().values()) == pytest.approx(memory, rel=0.002)
    estimated = step.microbatch_work()
    flops, products, traffic, kernels = work
    assert (estimated.flops, estimated.products) == (pytest.approx(flops, rel=1e-3), products)
    assert estimated.bytes == pytest.approx(traffic, rel=0.02)
    assert estimated.kernels == pytest.approx(kernels, rel=0.07)


def test_auto_is_planned_in_the_precision_of_the_gpu(tmp_path: Path) -> None:
    """A T4 has no bf16, and in fp16 the residual stream is in float32."""
    (t4,), (a100,) = (find_machines(name, read_gpus()) for name in ("1xT4", "1xA100-40"))
    runs = {
        p: Run(tmp_path, TrainConfig("a/b", 1, 1, precision=p), SMALL_GPT2) for p in ("auto", "fp16", "bf16")
    }
    assert memory_by_part(runs["auto"], t4, 4) == memory_by_part(runs["fp16"], t4, 4)
    assert memory_by_part(runs["auto"], a100, 4) == memory_by_part(runs["bf16"], a100, 4)
    assert memory_by_part(runs["bf16"], a100, 4) != memory_by_part(runs["fp16"], a100, 4)


def test_the_published_codes_largest_microbatches() -> None:
    for machine in memory_check.PUBLISHED:
        largest = memory_check.published_largest(machine)
        assert largest == pytest.approx(machine.microbatch, rel=0.12), machine.machine


# ------------------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------------------


def test_published_speeds_are_estimated_by_one_another() -> None:
    errors = [abs(error) for error in speed_check.leave_one_out()]
    assert max(errors) < 0.20 and statistics.median(errors) < 0.12
    assert max(errors) <= WORST_ERROR, "as plans say"
    fitted, used = speed_check.fit(speed_check.known_speeds()), Roofline()
    assert fitted.attainable == pytest.approx(used.attainable, rel=0.01)
    assert fitted.product_seconds == pytest.approx(used.product_seconds, rel=0.01)


MACHINES = f"""
[X1]
{NEW}usd_per_hour = {{ 1 = 1, 2 = 1.5 }}
[X2]
{NEW.replace('"X1"', '"X2"')}
[SMALLEST]
{NEW.replace('"X1"', '"X0"').replace("memory_gib = 8", "memory_gib = 0.00001")}
"""


def test_plans_for_machines(sandbox: Sandbox) -> None:
    """A table sorted by cost, one machine in detail, a budget, and a measurement that beats the estimate."""
    folder = sandbox.write_run(train={"precision": "auto", "compile": False})
    (sandbox.path / "mine.toml").write_text(MACHINES)
    runs = "--runs-dir", str(sandbox.path / "runs"), "--machines", str(sandbox.path / "mine.toml")

    def plan(*options: str) -> str:
        done = run_script("ddp_train.py", "tiny", "--plan", *options, *runs, env=sandbox.env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = plan("--on", "all").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d+x", line)]
    costs = [row[7] for row in rows]
    assert costs == [*sorted(costs[:2]), "unknown", "unknown"]
    by_name = {row[0]: row for row in rows}
    assert re.fullmatch(r"does not fit: [1-9] MiB short", by_name["1xSMALLEST"][-1])
    assert by_name["2xX1"][2] == "4 x 1" and by_name["1xX1"][2] == "8 x 1", "the global batch is 8"

    out = plan("--on", "2xX1")
    assert re.search(
        r"^Microbatch: +at most \d+; for the global batch of 8: 2 GPUs x microbatch 4 x accum", out, re.M
    )
    assert re.search(r"^Memory: .* weights .*gradients .*buckets .*optimizer .*reserve 1\.60", out, re.M)
    assert "Estimated (~), not measured: off by at most 15%" in out
    speed = float(re.search(r"^Speed: +([\d,]+) tokens/s", out, re.M)[1].replace(",", ""))

    out = plan("--budget", "3", "--on", "2xX1")
    tokens = int(re.search(r'"min_train_tokens": (\d+)', out)[1])
    assert tokens == pytest.approx(2 * 3600 * speed, rel=0.01), "two hours of it"
    assert tokens % 128 == 0

    status = {"device": "NVIDIA H100 80GB HBM3", "device_gib": 79.6, "processes": 2, "microbatch_size": 4}
    (folder / "status.json").write_text(json.dumps(status | {"tokens_per_second": 1234.0}))
    done = run_script("ddp_train.py", "tiny", "--plan", "--on", "2xH100-80", *runs[:2], env=sandbox.env)
    assert re.search(r"^Speed: +1,234 tokens/s in bf16, .* as in the last run on it$", done.stdout, re.M)


ON_A_GPU = f"""{CLOCK}
from basemodel.training.processes import World
World.device_name = "NVIDIA GeForce GTX 1660"
from basemodel.training import backend
backend.compile_if_configured = lambda *_, **__: "no gcc"
"""


def test_a_run_far_slower_than_estimated_says_so_once(sandbox: Sandbox) -> None:
    """128 tokens in 16 s by its clock, which are 8 tokens/s."""
    sandbox.write_run(train={"min_train_tokens": 102 * 128, "epochs": 102, "precision": "tf32"})
    (done,) = sandbox.launch("tiny", processes=1, before=ON_A_GPU)
    (line,) = re.findall(r"^Slower than planned: .*", done.stdout, re.M)
    assert re.fullmatch(
        r"Slower than planned: 8 tokens/s, 100% below the estimated [\d,]+; it is not compiled", line
    )
    status = sandbox.status()
    assert (status["device"], status["processes"]) == ("NVIDIA GeForce GTX 1660", 1)
    assert status["microbatch_size"] == 2


# ------------------------------------------------------------------------------------------------------------
# A budget
# ------------------------------------------------------------------------------------------------------------

LONG = {
    "min_train_tokens": 1000 * 8 * 16,
    "epochs": 1000,
    "lr_schedule": "wsd",
    "validation_interval": 20,
    "validation_batches": 10,
}


def test_time_lost_in_a_crash_is_paid_for(sandbox: Sandbox) -> None:
    """Killed after step 15, 10 steps after its last checkpoint, it goes on with that much less."""
    sandbox.write_run(train=LONG | {"max_hours": 0.25, "validation_interval": None, "checkpoint_interval": 6})
    crash = "import os\nfrom basemodel.results.reporting import Reporter\nlog = Reporter.step\n"
    crash += (
        "def step(self, number, *a, **k):\n    log(self, number, *a, **k)\n    number == 11 and os._exit(9)\n"
    )
    (out,) = sandbox.launch("tiny", processes=1, before=f"{CLOCK}{crash}Reporter.step = step\n")
    assert out.returncode == 9
    paid = sandbox.status()["paid_seconds"]
    (out,) = sandbox.launch("tiny", "--resume", processes=1, before=CLOCK)
    assert out.returncode == 0, out.stderr
    status = sandbox.status()
    lost = paid - 6 * 16
    assert lost >= 60 and status["paid_seconds"] - status["seconds"] == pytest.approx(lost)
    assert 900 * 0.95 < status["paid_seconds"] <= 900 and status["step"] == status["total_steps"]
