"""Samples while training: what the model says is kept and shown, and training does not notice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    BYTES,
    MODEL,
    NO_CHART,
    TORTURED_MODEL,
    TORTURED_TRAIN,
    Sandbox,
    assert_same_tensors,
    make_sandbox,
    refused,
)
from safetensors.torch import load_file

from basemodel.data.tokenizer import get_tokenizer
from basemodel.model.generation import Sampling, continuations
from basemodel.model.weights import load_model
from basemodel.results.reporting import continue_prompts
from basemodel.training.run import Run, open_data
from basemodel.training.run_folder import read_samples
from basemodel.training.schedule import BatchPlan
from gpt import GPTModel

# Bytes below 64 are in the vocabulary of the tests' runs.
SAMPLED = {"sample_interval": 5, "sample_prompts": ["12: ", "\n()"]}
SLOW_OR_BROKEN = f"""{NO_CHART}
import os, time
from basemodel.results import reporting
def sample(run, model, step):
    time.sleep(2.5)
    raise ValueError("nothing to say")
reporting.continue_prompts = sample
"""


def sampling_sandbox(path: Path, *runs: str, interval: int = 5) -> Sandbox:
    """Runs like those of make_sandbox, with samples."""
    sandbox = make_sandbox(path)
    for run in runs:
        train = {**TORTURED_TRAIN, **SAMPLED, "microbatch_size": 4, "sample_interval": interval}
        sandbox.write_run(run, {**TORTURED_MODEL, "tokenizer": "bytes"}, train)
    return sandbox


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sandbox, str]:
    """A run like `whole` that two processes have trained, with samples; and what it printed."""
    sandbox = sampling_sandbox(tmp_path_factory.mktemp("sampled"), "tiny")
    return sandbox, sandbox.train(processes=2)


def test_training_is_the_same_to_the_bit_with_and_without(sampled: tuple[Sandbox, str], whole: Path) -> None:
    """Two processes, dropout, clipping, validation: weights, optimizer state and random number generators."""
    sampled, _ = sampled
    last = next(whole.glob("checkpoints/2*-iteration-30"))
    without = {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}
    assert_same_tensors(sampled.final_tensors(), without)
    files, others = sampled.meta()["files"], json.loads((last / "meta.json").read_text())["files"]
    assert files["model.safetensors"]["sha256"] == others["model.safetensors"]["sha256"]
    assert sampled.meta()["rng"] == json.loads((last / "meta.json").read_text())["rng"]


def test_samples_are_what_the_model_of_that_step_says(sampled: tuple[Sandbox, str]) -> None:
    sampled, shown = sampled
    lines = read_samples(sampled.run_dir() / "samples.jsonl")
    assert [(line["step"], line["tokens"], line["prompt"]) for line in lines] == [
        (step, (step - min(step, 10) / 2) * 8 * 16, prompt)
        for step in range(5, 31, 5)
        for prompt in SAMPLED["sample_prompts"]
    ]
    for checkpoint in sampled.checkpoints()[-2:]:
        step = int(checkpoint.name.split("-")[-1])
        model = load_model(sampled.run_dir() / "model.json", checkpoint / "model.safetensors")
        sampling = Sampling(1.0, 25, torch.Generator().manual_seed(42))
        said = continuations(model, get_tokenizer("bytes"), SAMPLED["sample_prompts"], 50, sampling)
        assert [line["text"] for line in lines if line["step"] == step] == said
    assert lines[-1]["text"] != lines[1]["text"], "it has learned something"
    samples = [line for line in shown.splitlines() if line.startswith(("step 30: 12: ", r"step 30: \n()"))]
    assert len(samples) == 2, "each in one line"


def test_the_other_processes_wait_and_a_failure_is_a_warning(sandbox: Sandbox) -> None:
    """Sampling takes longer than processes wait for one another in a step."""
    sandbox.write_run(train={"sample_interval": 8, "sample_prompts": ["1"]}, model={"tokenizer": "bytes"})
    sandbox.write_run("without")
    out = sandbox.train("tiny", "--collective-timeout", "1", processes=2, before=SLOW_OR_BROKEN)
    assert (
        "Warning: could not continue the prompts after step 8: ValueError: nothing to say" in out.splitlines()
    )
    assert not (sandbox.run_dir() / "samples.jsonl").exists()
    sandbox.train("without", processes=2)
    assert_same_tensors(sandbox.final_tensors(), sandbox.final_tensors("without"))


@pytest.mark.parametrize(
    ("model", "prompts", "error"),
    [
        ({"tokenizer": "gpt2"}, ["a"], "the GPT-2 vocabulary is not cached and could not be downloaded"),
        (
            {"tokenizer": "bytes"},
            ["1", "a"],
            "the prompt 'a' has tokens outside the vocabulary of 64",
        ),
        ({}, [], "sample_prompts must have at least one prompt when sample_interval is set"),
    ],
)
def test_prompts_that_cannot_be_encoded_end_a_run_before_it_begins(
    sandbox: Sandbox, model: dict, prompts: list[str], error: str
) -> None:
    """Before data are looked for, too."""
    train = {"dataset": "not/here", "sample_interval": 4, "sample_prompts": prompts}
    sandbox.write_run("tiny", model, train)
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    env = {**nowhere, "TIKTOKEN_CACHE_DIR": str(sandbox.path / "empty"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert error in refused(*sandbox.command("tiny"), env=env)
    assert sorted(path.name for path in sandbox.run_dir().iterdir()) == ["model.json", "train.json"]


def test_the_modules_that_sample_are_not_compiled_and_drop_nothing_out(sandbox: Sandbox) -> None:
    """Compiled blocks would be compiled again for every length."""
    sandbox.write_run("tiny", {**MODEL, **BYTES, "drop_rate": 0.5, "tie_weights": True}, {"random_seed": 7})
    run = Run.read(sandbox.path / "runs", "tiny")
    data = open_data(run.config, run.model_config, sandbox.datasets)
    run = replace(run, data=data, plan=BatchPlan(1, 1, 1, 16, 1))
    model = GPTModel(run.model_config)
    alike = GPTModel(run.model_config).eval()
    alike.load_state_dict(model.state_dict())
    for block in model.trf_blocks:
        block._compiled_call_impl = "no function"  # in place of what `block.compile()` sets
    before = torch.get_rng_state()
    said = continue_prompts(run, model, 3)[0]["text"]
    assert torch.equal(torch.get_rng_state(), before) and model.training and model.trf_blocks[0].training
    sampling = Sampling(1.0, 25, torch.Generator().manual_seed(7))
    assert [said] == continuations(alike, get_tokenizer("bytes"), ["Every effort moves you"], 50, sampling)
