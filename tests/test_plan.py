"""Plans for machines that are not here: the table, counted memory, estimated speed, budgets."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import footprint as memory_check
import pytest
import roofline as speed_check
import torch
import torch.nn.functional as F
from helpers import TRAIN, Sandbox, refused, run_script
from test_inside_a_run import CLOCK
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from basemodel.common.errors import InputError
from basemodel.planning import machines, roofline
from basemodel.planning.deviation import SpeedWatch
from basemodel.planning.footprint import StepCounter, counting_backend
from basemodel.planning.machines import find_machines, read_gpus

# ------------------------------------------------------------------------------------------------------------
# The table of machines
# ------------------------------------------------------------------------------------------------------------


def test_a_machine_is_found_as_one_types_it() -> None:
    gpus = read_gpus()
    for words, name in (
        ("8xA100-40", "8xA100-40"),
        ("1xrtx3090", "1xRTX3090"),
        ("rtx 3090", "1xRTX3090"),
        ("8 x H100", "8xH100-80"),
        ("2xNVIDIA RTX A5000", "2xA5000"),
    ):
        assert [machine.name for machine in find_machines(words, gpus)] == [name]
    everything = [machine.name for machine in find_machines("all", gpus)]
    assert {"1xT4", "2xH100-80", "8xH100-80", "8xA100-40"} <= set(everything) and "8xT4" not in everything
    assert find_machines("8xa100-40", gpus)[0].usd_per_hour == 10.32


@pytest.mark.parametrize(
    ("words", "hint"),
    [("8xA100", "8xA100-40 or 8xA100-80"), ("1xRTX3900", "1xRTX3090"), ("0xT4", "1xT4"), ("8x", "8xRTX3090")],
)
def test_an_unknown_machine_is_answered_with_the_nearest(words: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"unknown machine '{words}'; try ")) as error:
        find_machines(words, read_gpus())
    assert hint in str(error.value)


NEW = 'cuda = "X1"\nmemory_gib = 8\ntflops = 50\nbandwidth_gbs = 300\nlink_gbs = 16\n'


def test_a_file_adds_machines_and_overrides_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[A100-40]\nusd_per_hour = {{ 1 = 1.5 }}\n[X1]\n{NEW}")
    gpus = read_gpus(file)
    assert gpus["A100-40"].usd_per_hour == {1: 1.5, 8: 10.32} and gpus["A100-40"].tflops == 312
    assert gpus["X1"].memory_gib == 8
    monkeypatch.setattr(machines, "OWN_TABLE", file)
    assert "X1" in read_gpus()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[X1\n", "not valid TOML"),
        ("X1 = 3\n", "'X1' stands outside a GPU's table"),
        ("[X1]\nmemory_gb = 3\n", "[X1]: unknown key 'memory_gb'; did you mean 'memory_gib'?"),
        ("[X1]\nmemory_gib = 3\n", "[X1] lacks cuda, tflops, bandwidth_gbs, link_gbs"),
        ("[T4]\ntflops = -3\n", "[T4]: tflops must be a number above 0, not -3"),
        ("[T4]\ntflops = true\n", "[T4]: tflops must be a number above 0, not True"),
        ("[T4]\nbf16 = 1\n", "[T4]: bf16 must be true or false, not 1"),
        ("[T4]\nusd_per_hour = 3\n", "[T4]: usd_per_hour must be dollars by number of GPUs"),
        ("[T4]\nusd_per_hour = { one = 3 }\n", "[T4]: usd_per_hour must be dollars by number of GPUs"),
        ('["my GPU"]\ntflops = 3\n', "[my GPU]: a GPU's name is letters, digits"),
        (None, "no such file"),
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
    assert "unknown machine 'T5'; try 1x" in refused(*command, "--plan", "--on", "T5", env=sandbox.env)
    runs = "--runs-dir", sandbox.path / "runs"
    line = refused("ddp_train.py", "tiny", *runs, "--plan", "--on", "T4", env=sandbox.env)
    assert line.startswith("min_train_tokens is -1, all there are, and the data are not here")


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1M", "5M, dropout"])
def test_counted_memory_is_what_the_allocator_hands_out(name: str) -> None:
    counted, measured = (
        memory_check.counted(name, compiled=False),
        memory_check.measured(name, compiled=False),
    )
    assert counted == pytest.approx(measured, rel=0.12)


def test_compiled_code_is_counted_as_fused() -> None:
    """Two products with GELU between them: the first yields 4 MiB, GELU keeps 4 MiB, the second 1 MiB."""

    def two_layers(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.gelu(x @ up, approximate="tanh") @ down

    with FakeTensorMode(), StepCounter() as counter, torch.no_grad():
        x, up, down = torch.empty(1024, 256), torch.empty(256, 1024), torch.empty(1024, 256)
        counter.peak = counter.live.copy()
        before, start = counter.live.total(), counter.work
        torch.compile(two_layers, backend=counting_backend(counter), dynamic=False)(x, up, down)
        work = counter.work + start * -1
    torch._dynamo.reset()
    assert before == 3 * 2**20
    assert counter.peak.total() - before == (4 + 1) * 2**20, "GELU writes over what it reads"
    assert work.flops == 2 * 2 * 1024 * 256 * 1024
    assert work.products == 1024 * 1024 + 1024 * 256
    assert work.bytes == 2 * 4 * 2**20, "GELU reads 4 MiB and writes 4 MiB"
    assert work.kernels == 3


def test_the_published_codes_largest_microbatches() -> None:
    peaks = {size: memory_check.published_peak(size) for size in (2, 8)}
    for each in memory_check.PUBLISHED:
        found = memory_check.published_largest(each, peaks)
        assert found == pytest.approx(each.microbatch, rel=0.12), each.machine


# ------------------------------------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------------------------------------


def test_published_speeds_are_estimated_by_one_another() -> None:
    footprint = speed_check.gpt2_small()
    errors = [abs(error) for error in speed_check.leave_one_out(footprint)]
    assert max(errors) < 0.20 and statistics.median(errors) < 0.12
    assert max(errors) <= roofline.WORST_ERROR, "as plans say"
    gpus = read_gpus()
    known = [(find_machines(each.machine, gpus)[0], each.tokens_per_second) for each in speed_check.PUBLISHED]
    attainable, product = speed_check.fit(footprint, known)
    assert attainable == pytest.approx(roofline.ATTAINABLE, rel=0.01)
    assert product == pytest.approx(roofline.PRODUCT_SECONDS, rel=0.01)
    parameters = 163_009_536 - 50257 * 768
    assert footprint.memory["weights"] == pytest.approx(4 * parameters, rel=0.001)


SMALL = f"""
[X1]
{NEW}usd_per_hour = {{ 1 = 1, 2 = 1.5 }}
[SMALLEST]
{NEW.replace('"X1"', '"X0"').replace("memory_gib = 8", "memory_gib = 0.00001")}
"""


def test_plans_for_machines(sandbox: Sandbox) -> None:
    """A table sorted by cost, one machine in detail, a budget, and a measurement that beats the estimate."""
    folder = sandbox.write_run(train={"precision": "auto", "compile": False})
    (sandbox.path / "mine.toml").write_text(SMALL)
    runs = "--runs-dir", str(sandbox.path / "runs"), "--machines", str(sandbox.path / "mine.toml")

    def plan(*options: str) -> str:
        done = run_script("ddp_train.py", "tiny", "--plan", *options, *runs, env=sandbox.env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    rows = [
        line.strip("| ").split(" | ")
        for line in plan("--on", "all").splitlines()
        if re.match(r"\| \d+x", line)
    ]
    costs = [float(row[7].strip("~$")) for row in rows if row[7] != "not known"]
    assert costs == sorted(costs) and [row[7] for row in rows[len(costs) :]] == ["not known"] * (
        len(rows) - len(costs)
    )
    by_name = {row[0]: row for row in rows}
    assert re.fullmatch(r"does not fit: [1-9] MiB short", by_name["1xSMALLEST"][8])
    assert by_name["2xX1"][2] == "4 x 1" and by_name["1xX1"][2] == "8 x 1", "the global batch is 8"

    out = plan("--on", "2xX1")
    assert re.search(
        r"^Microbatch: +at most \d+; for the global batch of 8: 2 GPUs x microbatch 4 x accum", out, re.M
    )
    assert re.search(
        r"^Memory: .* weights .*gradients .*buckets .*optimizer .*activations .*logits .*reserve 1\.60",
        out,
        re.M,
    )
    assert "Estimated (~), not measured: off by at most 15%" in out
    assert "2xX1" in json.loads((folder / "plan.json").read_text())
    assert re.search(r"^Cost: +not known$", plan("--on", "1xRTX3090"), re.M), "it has no price"

    out = plan("--budget", "3", "--on", "2xX1")
    tokens = int(re.search(r'"min_train_tokens": (\d+)', out)[1])
    cost = float(json.loads((folder / "plan.json").read_text())["2xX1"]["tokens_per_second"])
    assert tokens == pytest.approx(2 * 3600 * cost, rel=0.01), "two hours of it" and tokens % 128 == 0

    from basemodel.model.config import GPTConfig
    from basemodel.planning.speeds import Figure, add_figure, speed_hash
    from basemodel.training.config import TrainConfig

    model = GPTConfig(**json.loads((folder / "model.json").read_text()))
    config = TrainConfig(**json.loads((folder / "train.json").read_text()))
    hash_ = speed_hash(model, config, compiled=False)
    add_figure(folder.parent, Figure("NVIDIA X1", 7.9, 2, hash_, 4, 1234.0, None, "make gpu", "2026-11-28"))
    out = plan("--on", "2xX1")
    assert "1,234 tokens/s" in out and "measured by make gpu, 2026-11-28" in out


def test_a_run_slower_than_before_says_so(sandbox: Sandbox) -> None:
    """By a clock that goes twice as fast; 128 tokens in 16 s are 8 tokens/s."""
    sandbox.write_run(train={"min_train_tokens": 100 * 128, "epochs": 100})
    done = sandbox.launch("tiny", processes=1, before=CLOCK)[0]
    assert "Slower than planned" not in done.stdout
    (line,) = map(json.loads, (sandbox.path / "runs/figures.jsonl").read_text().splitlines())
    assert line["tokens_per_second"] == pytest.approx(8) and line["source"] == "run tiny"
    done = sandbox.launch("tiny", processes=1, before=CLOCK.replace("go_on(16)", "go_on(32)"))[0]
    assert done.stdout.count("Slower than planned: 4 tokens/s, 50% below the 8 measured by run tiny") == 1


def test_likely_reasons_for_a_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = object.__new__(SpeedWatch)
    watch.planned, watch.source, watch._next_look = 100.0, "as planned", 1
    watch._on_cuda, watch._compiled, watch._wants_compiled = True, False, True
    assert watch.look(5, 81.0, 0.0) is None
    assert watch.look(20, 79.0, 0.0).endswith(
        "21% below the 100 as planned; likely because it is not compiled"
    )
    assert watch.look(40, 50.0, 0.0) is None, "said once"
    watch._compiled = True
    assert watch._reason(0.5).startswith("reading data takes 50% of the time")
    answers: dict[str, Any] = {"clocks": [["900", "1980"]], "apps": [["1"]]}
    monkeypatch.setattr("basemodel.planning.deviation.shutil.which", lambda _: "nvidia-smi")
    monkeypatch.setattr(
        "basemodel.planning.deviation._ask", lambda query: answers["clocks" if "clocks" in query else "apps"]
    )
    assert watch._reason(0.0) == "a GPU runs at 900 of 1980 MHz: heat, or a limit of its power?"
    answers |= {"clocks": [["1900", "1980"]], "apps": [["1"], ["2"]]}
    assert watch._reason(0.0) == "another process uses a GPU: 2 on 1 GPUs"


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


def test_a_run_ends_in_time_with_its_schedule_finished(sandbox: Sandbox) -> None:
    """At 16 s a step and 30 s a validation, 1,800 s are enough for some 90 of 1,000 steps."""
    budget = {"max_usd": 1.0, "usd_per_hour": 2.0, "checkpoint_interval": 1000}
    sandbox.write_run(train=LONG | budget)
    (out,) = sandbox.launch("tiny", processes=1, before=CLOCK)
    assert out.returncode == 0, out.stderr
    status, rates = sandbox.status(), sandbox.metrics(key="learning_rate")
    steps = status["step"]
    assert status["status"] == "finished" and status["total_steps"] == steps == len(rates)
    assert 1800 * 0.95 < status["seconds"] <= 1800 and 0.95 < status["cost_usd"] <= 1.0
    assert rates[-1] == pytest.approx(TRAIN["learning_rate"] / (round(0.6 * steps) + 1)), (
        "the last of the fall"
    )
    assert rates[int(0.3 * steps)] == TRAIN["learning_rate"]
    assert sandbox.meta()["global_step"] == steps

    again = sandbox.train("tiny", "--resume")
    assert f"already has all {steps} steps" in again
    sandbox.write_run(train=LONG | budget | {"max_usd": 2.0})
    (out,) = sandbox.launch("tiny", "--resume", processes=1, before=CLOCK)
    assert out.returncode == 0, out.stderr
    status, rates = sandbox.status(), sandbox.metrics(key="learning_rate")
    assert 3600 * 0.95 < status["seconds"] <= 3600 and 1.8 * steps < status["step"] < 2.2 * steps
    assert rates[steps + 2] > 20 * rates[steps - 1] and rates[-1] < 0.02 * TRAIN["learning_rate"]


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
