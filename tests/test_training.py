"""The training script from outside: what it computes must not depend on how it is split, stopped or
launched."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import (
    NO_CHART,
    Sandbox,
    Script,
    assert_modes_are_the_umasks,
    rank_environment,
    refused,
    reserve_port,
    run_script,
    wait_for,
    write_dataset,
)

from basemodel.common.errors import InputError
from basemodel.training.processes import join_world

SCHEDULE = {"schedule_learning_rate": True, "warmup_period_percent": 25, "clipping_max_norm": 0.5}


def test_a_run_writes_what_the_contract_says(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"validation_interval": 4, "validation_batches": 3, "usd_per_hour": 36.0})
    lines = sandbox.train(before="").splitlines()[-5:]
    assert re.fullmatch(r"Training complete in [\d,]+\.\d{3} seconds", lines[0])
    assert lines[1] == "Tokens seen: 1,024"
    assert re.fullmatch(r"Throughput: [\d,]+ tokens/second", lines[2])
    assert re.fullmatch(r"Final train loss: \d+\.\d{3}", lines[3])
    assert re.fullmatch(r"Final val loss: \d+\.\d{3}", lines[4])

    folder = sandbox.run_dir("tiny")
    assert [path.name.split("-iteration-")[1] for path in sandbox.checkpoints()] == ["4", "8"]
    assert all(re.fullmatch(r"\d{8}Z\d{6}-iteration-\d+", path.name) for path in sandbox.checkpoints())
    assert (folder / "checkpoints/latest").readlink().name == sandbox.checkpoints()[-1].name
    losses = sandbox.metrics(key="val_loss")
    assert len(losses) == 3, "before the first step, at the interval, and at the end, which coincide here"
    assert losses[-1] < losses[0]
    best = sandbox.checkpoints()[losses[1:].index(min(losses[1:]))]
    assert (folder / "checkpoints/best").readlink().name == best.name
    assert (folder / "training-run-chart.png").read_bytes().startswith(b"\x89PNG")
    assert_modes_are_the_umasks(folder)

    assert sandbox.metrics(key="step") == list(range(9)), "one line per step"
    assert sandbox.metrics(key="learning_rate") == [0.01] * 8
    assert all(norm > 0 for norm in sandbox.metrics(key="grad_norm"))
    status = sandbox.status()
    assert (status["status"], status["step"], status["total_steps"]) == ("finished", 8, 8)
    assert 0 < status["cost_usd"] < 1
    meta = json.loads((best / "meta.json").read_text())
    assert {
        "global_step",
        "train_loss",
        "val_loss",
        "learning_rate",
        "scaler",
        "rng",
        "versions",
        "files",
    } <= set(meta)


def test_splitting_a_batch_otherwise_changes_rounding_only(sandbox: Sandbox) -> None:
    sandbox.write_run("one", train={**SCHEDULE, "validation_interval": 4, "validation_batches": 3})
    sandbox.write_run("two", train={**SCHEDULE, "validation_interval": 4, "validation_batches": 3})
    sandbox.train("one")
    sandbox.train("two", processes=2)
    assert sandbox.metrics("one") == pytest.approx(sandbox.metrics("two"), rel=1e-4)
    assert sandbox.metrics("one", "grad_norm") == pytest.approx(sandbox.metrics("two", "grad_norm"), rel=1e-3)
    assert sandbox.metrics("one", "val_loss") == pytest.approx(sandbox.metrics("two", "val_loss"), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_like_full(sandbox: Sandbox, precision: str) -> None:
    for run, settings in (("full", {}), ("half", {"precision": precision})):
        sandbox.write_run(run, train={**SCHEDULE, "microbatch_size": 8, **settings})
        sandbox.train(run)
    assert sandbox.metrics("half") == pytest.approx(sandbox.metrics("full"), rel=0.02)
    assert sandbox.metrics("half", "grad_norm") == pytest.approx(
        sandbox.metrics("full", "grad_norm"), rel=0.1
    )
    assert bool(sandbox.meta("half")["scaler"]) == (precision == "fp16")


def test_two_nodes_fetch_the_data_once_each_and_train_like_one(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    write_dataset(tmp_path / "hub/test/tokens", meta={"tokenizer": "gpt2", "token_dtype": "uint16"})
    hub = serve_hub(tmp_path / "hub")
    validate = {"validation_interval": 4, "validation_batches": 2}
    for run in ("one", "two"):
        sandbox.write_run(run, train=validate)
    sandbox.train("one", processes=2)

    with reserve_port() as holder:
        nodes = []
        for node in range(2):
            command = sandbox.command("two")
            command[command.index(str(sandbox.datasets))] = str(tmp_path / f"node{node}")
            env = rank_environment(node, 2, holder) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / f"home{node}")}
            nodes.append(Script(command, env, NO_CHART))
        for node in nodes:
            assert node.wait().returncode == 0, node.stderr
    for name in ("train.safetensors", "validation.safetensors", "meta.json"):
        assert hub.downloads(name) == 2, name
        assert (tmp_path / "node0/test/tokens" / name).exists() and (
            tmp_path / "node1/test/tokens" / name
        ).exists()
    assert sandbox.metrics("two") == pytest.approx(sandbox.metrics("one"), rel=1e-6)
    assert sandbox.metrics("two", "val_loss") == pytest.approx(sandbox.metrics("one", "val_loss"), rel=1e-6)


def test_the_hub_is_not_asked_when_the_files_are_there(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = serve_hub(tmp_path / "hub")
    sandbox.env["HF_ENDPOINT"] = hub.url
    sandbox.write_run(train={"validation_interval": 8, "validation_batches": 1})
    sandbox.train()
    assert hub.requests == []


def test_a_data_set_without_meta_json_comes_from_the_hub(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    write_dataset(tmp_path / "hub/far/away")
    hub = serve_hub(tmp_path / "hub")
    sandbox.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    sandbox.write_run(train={"dataset": "far/away"})
    sandbox.train()
    assert hub.downloads("train.safetensors") == 1
    assert hub.downloads("validation.safetensors") == 0, "no validation, no need for the file"


def test_plan_says_what_would_happen_and_does_nothing(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"usd_per_hour": 2.5, "checkpoint_interval": 3})
    out = sandbox.train("tiny", "--plan", processes=2)
    for expected in (
        "29,888 parameters",
        "8 sequences, 128 tokens",
        "accumulation 2",
        "Steps:        8, 1,024 tokens",
        "Optimizer:    adamw, learning rate 0.01, constant, weight decay 0.1, betas 0.9 and 0.999",
    ):
        assert expected in out
    assert "3 checkpoints" in out and "$2.50 an hour" in out
    assert sorted(path.name for path in sandbox.run_dir("tiny").iterdir()) == ["model.json", "train.json"]
    # A run that was trained before tells how long it takes.
    sandbox.train()
    assert re.search(r"ETA: +\d+:\d\d:\d\d at [\d,]+ tokens/s", sandbox.train("tiny", "--plan"))


def test_plan_says_which_steps_are_small(sandbox: Sandbox) -> None:
    """Of eight whole batches two are halved and four have short sequences."""
    sandbox.write_run(train={"half_batch_percent": 25, "short_sequence_percent": 50})
    steps = "half of it in each of the first 4 steps; sequences of 4 tokens in the first 6 steps"
    assert steps in sandbox.train("tiny", "--plan")


ROOM = """
import resource
from pathlib import Path
held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
limit = 1024 * int(held.split()[1]) + (60 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
"""


def test_the_largest_microbatch_is_found_without_data(sandbox: Sandbox) -> None:
    """In a process that gets 60 MB on top of what it holds when it begins."""
    sandbox.write_run(model={"context_length": 2048}, train={"dataset": "not/here"})
    out = sandbox.train("tiny", "-f", before=ROOM)
    size = int(re.fullmatch(r"Max microbatch size was (\d+)", out.splitlines()[-1])[1])
    assert size > 1
    assert re.search(rf"microbatch {size}: fits, \d+\.\d\d GiB, [\d,]+ tokens/s", out)
    assert f"microbatch {size + 1}: too large" in out
    assert not (sandbox.run_dir("tiny") / "checkpoints").exists()


SMALL_MEMORY = """
import os, gpt
features = gpt.GPTModel.features
def limited(self, tokens, *arguments, **options):
    if len(tokens) > (13, 11)[int(os.environ.get("RANK", 0))]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    return features(self, tokens, *arguments, **options)
gpt.GPTModel.features = limited
"""


@pytest.mark.parametrize(
    ("processes", "optimizer", "expected"), [(1, "adamw", 13), (1, "muon", 13), (2, "muon", 11)]
)
def test_the_search_finds_what_fits_on_every_process(
    sandbox: Sandbox, processes: int, optimizer: str, expected: int
) -> None:
    """The first process has room for 13 sequences, the second for 11."""
    sandbox.write_run(train={"optimizer": optimizer})
    out = sandbox.train("tiny", "-f", processes=processes, before=SMALL_MEMORY)
    assert out.splitlines()[-1] == f"Max microbatch size was {expected}"


def test_a_non_finite_loss_ends_the_run_and_says_what_is_left(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"learning_rate": 1e38, "checkpoint_interval": 1})
    done = run_script(*sandbox.command("tiny"))
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: the weights are NaN or infinite after step 1; there is no checkpoint yet")
    assert sandbox.status()["status"] == "failed"
    assert sandbox.checkpoints() == []

    long = {"min_train_tokens": 40 * 8 * 16, "epochs": 2}
    sandbox.write_run(train={"learning_rate": 1e30, "checkpoint_interval": 1, **long})
    done = run_script(*sandbox.command("tiny"))
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: the training loss is nan and the gradient norm nan at step ")
    assert "16 steps in a row were skipped" in error
    assert sandbox.checkpoints()[-1].name in error
    assert sandbox.status()["status"] == "failed" and sandbox.status()["loss"] is None


def test_two_trainings_of_one_run_at_a_time_are_refused(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"min_train_tokens": 100_000, "epochs": 30})
    first = sandbox.start()
    wait_for((sandbox.run_dir() / "status.json").exists, "the first to train")
    assert sandbox.status()["status"] == "running"
    second = refused(*sandbox.command("tiny"))
    first.kill()
    assert f"is being trained by another process (pid {first.pid})" in second
    sandbox.write_run()
    sandbox.train()  # a holder that was killed blocks nobody


def test_runs_are_looked_up_beside_the_script_and_the_demo_is_one(tmp_path: Path) -> None:
    done = run_script("ddp_train.py", "demo", tmp_path, "--plan")
    assert done.returncode == 0, done.stderr
    assert re.search(r"Run: +demo, seed \d+\n", done.stdout)
    assert re.search(r"Data: +local/python-docs, not here yet", done.stdout)
    assert re.search(r"Steps: +\d+", done.stdout)


@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (2, 1), (1, 8)])
def test_a_process_takes_the_device_that_torch_finds(
    monkeypatch: pytest.MonkeyPatch, processes: int, devices: int
) -> None:
    """Apple's GPU is one device and trains as one process; of more devices each process takes its own."""
    chosen = []
    monkeypatch.setattr(torch.version, "cuda", None)
    finds = {
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("mps" if devices == 1 else "cuda"),
        "device_count": lambda: devices,
        "set_device_index": chosen.append,
    }
    for name, find in finds.items():
        monkeypatch.setattr(torch.accelerator, name, find)
    if devices == 8:
        monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if processes > devices:
        with pytest.raises(InputError, match="2 processes for 1 devices; use --nproc_per_node=1"):
            join_world()
        return
    world = join_world()
    with monkeypatch.context() as left_over:
        left_over.setenv("LOCAL_RANK", str(devices))
        with pytest.raises(InputError, match=f"LOCAL_RANK is {devices} on a node with {devices} devices; "):
            join_world()
    assert (world.size, world.control) == (1, None)
    assert world.device == torch.device("cuda:7" if devices == 8 else "mps:0")
    assert chosen == [world.device.index]
