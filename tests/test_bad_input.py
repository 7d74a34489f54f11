"""What a tired person types at 2 a.m.: each mistake gets one line that names the thing and the fix."""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from helpers import MODEL, TRAIN, Sandbox, random_tokens, refused, run_script, write_dataset
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import ddp_train
from basemodel.common.errors import InputError
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig
from gpt import GPTModel

VALIDATE = {"validation_interval": 4, "validation_batches": 2}


def refused_run(sandbox: Sandbox, *options: str | Path, run: str = "tiny") -> str:
    """What a training that must be refused says, in this process, which keeps the run's lock."""

    def files() -> list[Path]:
        return sorted(path for path in sandbox.path.rglob("*") if path.name != ".fingerprints.json")

    before = files()
    with pytest.raises((InputError, click.ClickException)) as caught:
        ddp_train.main(sandbox.command(run, *options)[1:], standalone_mode=False)
    assert files() == before, "nothing is written but, at most, what the data set's hashes are"
    return caught.value.format_message() if hasattr(caught.value, "format_message") else str(caught.value)


CONFIGS = {
    "unknown key": (
        {},
        {"learningrate": 1},
        "train.json: unknown key 'learningrate'; did you mean 'learning_rate'?",
    ),
    "old key": ({}, {"minibatch_size": 6}, "did you mean 'microbatch_size'?"),
    "unknown model key": ({"n_head": 2}, {}, "model.json: unknown key 'n_head'; did you mean 'n_heads'?"),
    "missing key": ({}, {"dataset": ...}, "train.json: the key 'dataset' is missing"),
    "missing model key": ({"emb_dim": ...}, {}, "model.json: the key 'emb_dim' is missing"),
    "text for a number": ({}, {"microbatch_size": "6"}, 'microbatch_size must be an integer, not "6"'),
    "true for a number": ({}, {"microbatch_size": True}, "microbatch_size must be an integer, not true"),
    "fraction for an integer": ({"n_layers": 1.5}, {}, "n_layers must be an integer, not 1.5"),
    "number for true": ({"qkv_bias": 0}, {}, "qkv_bias must be true or false, not 0"),
    "unknown choice": ({}, {"precision": "fp8"}, 'precision must be "auto" or "fp32"'),
    "one beta": ({}, {"betas": [0.9]}, "betas must be a list of 2 numbers, not [0.9]"),
    "no sequences": ({}, {"microbatch_size": 0}, "microbatch_size must be at least 1, not 0"),
    "no tokens": ({}, {"min_train_tokens": 0}, "min_train_tokens must be above 0, or -1 for all"),
    "no layers": ({"n_layers": 0}, {}, "n_layers must be at least 1"),
    "heads": ({"n_heads": 5}, {}, "emb_dim 32 must be a multiple of n_heads 5"),
    "dropout": ({"drop_rate": 1.0}, {}, "drop_rate must be at least 0 and below 1"),
    "negative rate": ({}, {"learning_rate": -0.1}, "learning_rate must be more than 0, not -0.1"),
    "dataset's name": ({}, {"dataset": "tokens"}, "dataset must be OWNER/NAME, not 'tokens'"),
    "dataset above": ({}, {"dataset": "../tokens"}, "the dataset's owner '..' must be a plain name"),
    "absolute dataset": ({}, {"dataset": "/etc/x"}, "the dataset's owner '' must be a plain name"),
    "schedules at odds": (
        {},
        {"schedule_learning_rate": True, "lr_schedule": "wsd"},
        'lr_schedule "wsd" contradicts "schedule_learning_rate": true, which means "cosine"; remove one',
    ),
    "schedule too long": (
        {},
        {"lr_schedule": "wsd", "warmup_period_percent": 50},
        "warmup_period_percent 50 and decay_period_percent 60 add up to more than 100",
    ),
    "half of an odd batch": (
        {},
        {"microbatch_size": 1, "global_batch_size": 1, "half_batch_percent": 30},
        "half_batch_percent halves the 1 x 1 sequences that a process reads in a step; make their number",
    ),
    "quarters of an odd length": (
        {"context_length": 18},
        {"short_sequence_percent": 30},
        "short_sequence_percent cuts sequences into 4 parts; make context_length a multiple of 4, not 18",
    ),
    "no warm-up": ({}, {"lr_schedule": "constant", "warmup_period_percent": 5}, 'constant" has no warm-up'),
    "Muon's rate": ({}, {"muon_learning_rate": 0}, "muon_learning_rate must be more than 0, not 0"),
    "Muon's rate without it": (
        {},
        {"muon_learning_rate": 0.03},
        'muon_learning_rate has no effect without "optimizer": "muon"',
    ),
    "Muon's momentum without it": (
        {},
        {"muon_momentum": 0.9},
        'muon_momentum has no effect without "optimizer": "muon"',
    ),
    "the rate of a tied head": (
        {"tie_weights": True},
        {"head_learning_rate": 0.004},
        "train.json: head_learning_rate has no effect with tie_weights",
    ),
    "decay of no wsd": (
        {},
        {"schedule_learning_rate": True, "decay_period_percent": 20},
        'decay_period_percent has no effect without "lr_schedule": "wsd"',
    ),
    "documents without an end": (
        {},
        {"document_masking": True},
        "document_masking needs the end-of-text token, 50256, which is not in a vocabulary of 64 tokens",
    ),
    "amp and precision": ({}, {"use_amp": False, "precision": "bf16"}, "contradicts"),
    "no batches": ({}, {"validation_interval": 5}, "validation_batches must be at least 1"),
    "indivisible": (
        {},
        {"global_batch_size": 9},
        "global_batch_size 9 is not a multiple of microbatch_size 2 x 1 processes; microbatch_size 1 or 3 or "
        "9, or "
        "global_batch_size 8 or 10 would work",
    ),
    "at odds": (
        {},
        {"gradient_accumulation_steps": 3},
        "use gradient_accumulation_steps 4 or global_batch_size 6",
    ),
    "too few tokens": (
        {},
        {"min_train_tokens": 10_000},
        "has 249 sequences of 16 tokens in 1 epochs after start_train_token 0, but the run needs 632",
    ),
    "epochs it would take": (
        {},
        {"min_train_tokens": 10_000},
        "set epochs to 3, or min_train_tokens to -1 to use all",
    ),
    "too few for one step": (
        {},
        {"min_train_tokens": -1, "microbatch_size": 25, "global_batch_size": 500},
        "set epochs to 3, or a global batch of at most 249, with global_batch_size or microbatch_size",
    ),
    "start too late": (
        {},
        {"start_train_token": 3990},
        "too short: 4000 tokens do not fill one sequence of 16",
    ),
    "validation too short": (
        {},
        {**VALIDATE, "validation_batches": 99},
        "fill 62 validation batches of 2 x 16",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(sandbox: Sandbox, case: str) -> None:
    model, train, message = CONFIGS[case]
    sandbox.write_run(model=model, train=train)
    assert message in refused_run(sandbox)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must contain a JSON object"),
        ('{"epochs": 1, "epochs": 2}', "the key 'epochs' appears twice"),
        ('{"learning_rate": NaN}', "NaN is not a JSON number"),
    ],
)
def test_malformed_json(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(TrainConfig, tmp_path / "train.json")


def test_missing_run_and_missing_file(sandbox: Sandbox) -> None:
    for name in ("other", "tiny-wide", "tin", "a", "b"):
        sandbox.write_run(name)
    assert refused_run(sandbox).endswith("no such run; nearest: tin, tiny-wide, other, b")
    (sandbox.run_dir("other") / "train.json").unlink()
    assert refused_run(sandbox, run="other").endswith("train.json: no such file")


def test_a_local_data_set_that_is_not_there_is_not_asked_of_the_hub(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"dataset": "local/poems"})
    folder = sandbox.datasets / "local/poems"
    hint = f"prepare it with: python prepare_datasets.py SOURCE {folder}"
    assert refused_run(sandbox).endswith(f"{folder}: has no train.safetensors; {hint}")


@pytest.mark.parametrize("run", ["../tiny", "/tmp", "..", "a b"])
def test_run_names_lead_nowhere_else(sandbox: Sandbox, run: str) -> None:
    assert f"run '{run}' must be a plain name" in refused_run(sandbox, run=run)


@pytest.mark.parametrize("checkpoint", ["../../other", "/etc", ".."])
def test_checkpoint_names_lead_nowhere_else(sandbox: Sandbox, checkpoint: str) -> None:
    sandbox.write_run()
    assert f"checkpoint '{checkpoint}' must be a plain name" in refused_run(sandbox, checkpoint)


def test_usage(sandbox: Sandbox) -> None:
    sandbox.write_run()
    assert "No such option" in refused_run(sandbox, "--resum")
    assert "DATASETS_DIR is missing" in refused("ddp_train.py", "tiny", "--runs-dir", sandbox.path / "runs")
    assert "either a checkpoint's name or --resume" in refused_run(sandbox, "latest", "--resume")


LAUNCHES = {
    "a rank in words": (
        {"RANK": "one"},
        "RANK=one, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1: not whole numbers",
    ),
    "a rank alone": ({"RANK": "1"}, "RANK is 1, too large for a WORLD_SIZE of 1"),
    "rank missing": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
    "port missing": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        "WORLD_SIZE is 2, but MASTER_PORT is not set",
    ),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launch(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Variables that a shell, or a cluster's scheduler, has left."""
    env, message = LAUNCHES[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    sandbox.write_run()
    fix = "; launch with torchrun, or `unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE` for one process"
    assert refused_run(sandbox) == message + fix


TOKENS = random_tokens(4000)
WRONG_TOKEN = TOKENS.copy()
WRONG_TOKEN[700] = 64
TOKEN_FILES = {
    "wrong type": (
        {"tokens": TOKENS.astype(np.int32)},
        "one 1-D uint16 tensor named 'tokens', not {'tokens': ('I32', 1)}",
    ),
    "wrong shape": (
        {"tokens": TOKENS.reshape(2, -1)},
        "must contain one 1-D uint16 tensor named 'tokens', not {'tokens': ('U16', 2)}",
    ),
    "wrong name": (
        {"input_ids": TOKENS},
        "must contain one 1-D uint16 tensor named 'tokens', not {'input",
    ),
    "too short": ({"tokens": TOKENS[:16]}, "too short: 16 tokens do not fill one sequence of 16"),
    "outside the vocabulary": (
        {"tokens": WRONG_TOKEN},
        "token 64 at index 700 is outside the model's vocabulary of 64",
    ),
}


@pytest.mark.parametrize("case", TOKEN_FILES)
def test_token_file(sandbox: Sandbox, case: str) -> None:
    tensors, message = TOKEN_FILES[case]
    sandbox.write_run()
    save_file(tensors, sandbox.datasets / "test/tokens/train.safetensors")
    error = refused_run(sandbox)
    assert "train.safetensors: " in error
    assert message in error


def test_damaged_token_file(sandbox: Sandbox) -> None:
    sandbox.write_run()
    file = sandbox.datasets / "test/tokens/train.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "train.safetensors: damaged" in refused_run(sandbox)


def test_validation_file_is_looked_at_too(sandbox: Sandbox) -> None:
    sandbox.write_run(train=VALIDATE)
    save_file({"tokens": TOKENS + 60}, sandbox.datasets / "test/tokens/validation.safetensors")
    assert "validation.safetensors: token 6" in refused_run(sandbox)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"tokenizer": "bytes"}, "its tokenizer is 'bytes', the model's 'gpt2'"),
        ({"vocab_size": 65}, "has a vocabulary of 65 tokens, the model only 64"),
    ],
)
def test_data_set_of_another_tokenizer(sandbox: Sandbox, meta: dict, message: str) -> None:
    write_dataset(sandbox.datasets / "test/tokens", meta=meta)
    sandbox.write_run()
    assert message in refused_run(sandbox)


def test_data_set_that_is_nowhere(sandbox: Sandbox, serve_hub) -> None:
    sandbox.env |= {"HF_ENDPOINT": serve_hub(sandbox.path).url, "HF_HOME": str(sandbox.path)}
    sandbox.write_run(train={"dataset": "no/where"})
    error = refused(*sandbox.command("tiny"), env=sandbox.env)
    assert "no/where: could not download train.safetensors from the Hub" in error
    assert not (sandbox.datasets / "no").exists()
    assert not (sandbox.run_dir("tiny") / "status.json").exists()


def test_checkpoint_of_another_batch(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4})
    sandbox.train()
    shutil.rmtree(sandbox.checkpoints()[-1])
    sandbox.write_run(train={"checkpoint_interval": 4, "global_batch_size": 16})
    message = "trained with global batches of 8 sequences, not 16"
    assert message in refused(*sandbox.command("tiny", sandbox.checkpoints()[0].name))
    assert message in refused_run(sandbox, "--resume")


def test_checkpoint_that_is_not_there(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4})
    assert "no valid checkpoint; start without 'latest'" in refused(*sandbox.command("tiny", "latest"))
    sandbox.train()
    names = ", ".join(path.name for path in sandbox.checkpoints())
    assert f"nonsense: no such checkpoint; available: {names}" in refused_run(sandbox, "nonsense")


def test_more_processes_than_divide_the_batch() -> None:
    config = TrainConfig(**{**TRAIN, "global_batch_size": 6})
    error = (
        "^global_batch_size 6 is not a multiple of microbatch_size 2 x 2 processes; microbatch_size 1 or 3"
    )
    with pytest.raises(InputError, match=error):
        config.accumulation_for(2)


# --- the other scripts


@pytest.fixture
def model_files(tmp_path: Path) -> tuple[Path, Path]:
    config = {**MODEL, "vocab_size": 257, "tokenizer": "bytes"}
    (tmp_path / "model.json").write_text(json.dumps(config))
    save_torch(GPTModel(GPTConfig(**config)).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.json", tmp_path / "model.safetensors"


def test_evaluation_of_what_is_not_there(model_files: tuple[Path, Path], sandbox: Sandbox) -> None:
    config, weights = model_files
    assert "nothing.safetensors: no such file" in refused(
        "test_smoke.py", config, weights.with_name("nothing.safetensors")
    )
    assert "nothing.json: no such file" in refused("test_smoke.py", config.with_name("nothing.json"), weights)
    assert "model.json: damaged or not a safetensors file" in refused("test_smoke.py", config, config)
    loss = ("test_loss.py", sandbox.datasets, *model_files, "--dataset")
    error = refused(*loss, "test/tokens", "--start-token", "50000000")
    assert "has 2,000 tokens, not one sequence of 16 and its target after --start-token 50000000" in error
    assert "--start-token can be at most 1983" in error
    assert "must be OWNER/NAME" in refused(*loss, "tokens")
    assert "must be a plain name" in refused(*loss, "../tokens")


def test_preparation_of_what_is_no_text(tmp_path: Path) -> None:
    prepare = ("prepare_datasets.py",)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"body": "not"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "text.doc").write_text("words")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8b nonsense")
    out = tmp_path / "out"
    for source, message in (
        ("nothing", "nothing: no such file or folder"),
        ("empty", "empty: contains no .parquet, .arrow, .jsonl"),
        ("text.doc", "text.doc: unknown file type"),
        ("broken.jsonl", "broken.jsonl: line 2 has no 'text'; set --text-column to one of ['body']"),
        ("broken.jsonl.gz", "broken.jsonl.gz: cannot be read"),
        ("broken.parquet", "broken.parquet: cannot be read: Parquet magic bytes not found"),
    ):
        done = run_script(*prepare, tmp_path / source, out, "--tokenizer", "bytes")
        assert done.returncode == 2, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("Error: ") and message in last, done.stderr
        assert "Traceback" not in done.stderr
        assert not list(out.glob("*")), "nothing half done is left"
    # A misspelt path is noticed before GPT-2's vocabulary is looked for, which is not to be had here.
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    assert "nothing: no such file or folder" in refused(*prepare, tmp_path / "nothing", out, env=nowhere)


def test_preparation_replaces_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path / "out")
    before = (tmp_path / "out/train.safetensors").read_bytes()
    (tmp_path / "in.txt").write_text("text")
    error = refused("prepare_datasets.py", tmp_path / "in.txt", tmp_path / "out", "--tokenizer", "bytes")
    assert (
        "already contains train.safetensors and validation.safetensors; remove it or choose another" in error
    )
    assert (tmp_path / "out/train.safetensors").read_bytes() == before


def test_the_gpt2_vocabulary_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("text")
    nowhere = {
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "",
    }
    error = refused("prepare_datasets.py", tmp_path / "in.txt", tmp_path / "out", env=nowhere)
    assert "the GPT-2 vocabulary is not cached" in error and "TIKTOKEN_CACHE_DIR" in error
