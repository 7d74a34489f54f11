"""The ranges of every key: the last value that is taken, and the first that is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers import MODEL

from basemodel.common.errors import InputError
from basemodel.common.json_config import checked_config, read_config
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig

TRAIN = {"dataset": "owner/name", "microbatch_size": 1, "min_train_tokens": 1}
WSD, MUON = {"lr_schedule": "wsd", "warmup_period_percent": 0.0}, {"optimizer": "muon"}
RANGES = [  # key, values that are taken, values that are refused
    ("dataset", ["a/b", "A-1._/b"], ["b", "a/b/c", "a/..", "../b", "/b", "a/", "a/b c", "a\\b/c"]),
    ("microbatch_size", [1], [0, -1, 1.5, None, "1", True]),
    ("min_train_tokens", [1, -1], [0, -2, 1.0]),
    ("dataset_revision", [None, "main"], [1]),
    ("gradient_accumulation_steps", [None, 1], [0, -1]),
    ("global_batch_size", [None, 1], [0, -1]),
    ("epochs", [1], [0, -1, None]),
    ("start_train_token", [0], [-1]),
    ("start_val_token", [0], [-1]),
    ("checkpoint_interval", [None, 1], [0, -1]),
    ("validation_batches", [0], [-1, None]),
    ("learning_rate", [1e-9, 1], [0, -1, None, "0.1"]),
    ("weight_decay", [0], [-0.1]),
    ("betas", [[0, 0.999]], [[1, 0.9], [0.9, 1], [-0.1, 0.9], [0.9], [0.9, 0.9, 0.9], 0.9]),
    ("optimizer", ["adamw", "muon"], ["sgd", "AdamW"]),
    ("lr_schedule", [None, "cosine", "wsd", "constant"], ["linear"]),
    ("half_batch_percent", [0, 30.5, 100], [-1, 101, None]),
    ("short_sequence_percent", [0, 30.5, 100], [-1, 101, None]),
    ("warmup_period_percent", [0, 100], [-1, 101]),
    ("clipping_max_norm", [None, 0.1], [0, -1]),
    ("precision", ["auto", "fp32", "tf32", "fp16", "bf16"], ["float16", None]),
    ("compile", [True, False, "auto"], ["yes", 1, None]),
    ("deterministic", [True, False], [0, "true"]),
    ("random_seed", [0, 2**63 - 1], [-1, 2**63]),
    ("keep_checkpoints", [None, 1], [0, -1]),
    ("usd_per_hour", [None, 0.1], [0, -1]),
    ("embedding_learning_rate", [None, 0.3], [0, -0.1, "0.3"]),
    ("head_learning_rate", [None, 0.004], [0, -0.1, "0.3"]),
    ("sample_interval", [None, 1], [0, -1, 0.5]),
    ("sample_prompts", [["a"], ["a", ""], []], ["a", [1], None]),
    ("report_to", [[], ["wandb"], ["trackio", "tensorboard"]], ["wandb", ["wandb", "tensorbord"], None]),
]
DEPENDENT = [  # values that go together, and such as do not
    ({"validation_interval": 1, "validation_batches": 1}, {"validation_interval": 1}),
    (
        {"validation_interval": 1, "validation_batches": 1},
        {"validation_interval": 0, "validation_batches": 1},
    ),
    ({**WSD, "decay_period_percent": 100}, {**WSD, "decay_period_percent": 101}),
    ({**WSD, "warmup_period_percent": 40}, {**WSD, "warmup_period_percent": 41}),
    ({**MUON, "muon_learning_rate": 0.1}, {"muon_learning_rate": 0.1}),
    ({**MUON, "muon_learning_rate": 0.1}, {**MUON, "muon_learning_rate": 0}),
    *(({**MUON, "muon_momentum": m}, {**MUON, "muon_momentum": 1 + m}) for m in (0, 0.99)),
    ({**MUON, "muon_momentum": 0.9}, {"muon_momentum": 0.9}),
    ({"sample_prompts": ()}, {"sample_prompts": (), "sample_interval": 1}),
]
MODELS = [
    *((key, [], [0, -1, 1.5]) for key in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")),
    ("vocab_size", [1, 65_536], [65_537]),
    ("emb_dim", [2, 4], [1, 3]),  # of two heads
    ("drop_rate", [0, 0.999], [-0.1, 1, None]),
    ("qkv_bias", [True, False], [None, 1]),
    ("init", ["pytorch", "gpt2", "zero"], ["normal"]),
    ("tokenizer", ["gpt2", "bytes", "dataset"], ["gpt3"]),
    ("end_of_text_id", [None], [0, -1, "0"]),  # of GPT-2's tokenizer
]
# The contract's tables, key by key.
DEFAULTS = {
    "dataset_revision": None,
    "global_batch_size": None,
    "epochs": 1,
    "start_train_token": 0,
    "start_val_token": 0,
    "checkpoint_interval": None,
    "validation_interval": None,
    "validation_batches": 0,
    "learning_rate": 0.0004,
    "weight_decay": 0.1,
    "betas": (0.9, 0.999),
    "decay_all_parameters": True,
    "optimizer": "adamw",
    "warmup_period_percent": 0,
    "clipping_max_norm": None,
    "precision": "auto",
    "compile": "auto",
    "deterministic": False,
    "random_seed": 42,
    "keep_checkpoints": None,
    "usd_per_hour": None,
    "sample_interval": None,
    "sample_prompts": ("Every effort moves you",),
    "report_to": (),
}


@pytest.mark.parametrize(
    ("config", "valid", "ranges"), [(TrainConfig, TRAIN, RANGES), (GPTConfig, MODEL, MODELS)]
)
def test_each_key_has_its_range(tmp_path: Path, config: type, valid: dict, ranges: list) -> None:
    path = tmp_path / "config.json"
    for key, taken, refused in ranges:
        for value in taken:
            path.write_text(json.dumps(valid | {key: value}))
            found = getattr(read_config(config, path), key)
            assert found == (tuple(value) if isinstance(value, list) else value), key
        if all(type(value) in (int, float) for value in taken if value is not None):
            refused = [*refused, True, False, "1", [1], {}]
        for value in refused:
            path.write_text(json.dumps(valid | {key: value}))
            with pytest.raises(InputError) as error:
                read_config(config, path)
            assert str(error.value).startswith(f"{path}: ") and key in str(error.value), (key, value)


@pytest.mark.parametrize(("taken", "refused"), DEPENDENT)
def test_keys_that_depend_on_one_another(taken: dict, refused: dict) -> None:
    TrainConfig(**TRAIN, **taken)
    with pytest.raises(InputError):
        TrainConfig(**TRAIN, **refused)


OLD = [  # keys of the published runs, what they mean today, and what contradicts them
    ({"schedule_learning_rate": True}, {"lr_schedule": "cosine"}, {"lr_schedule": "constant"}),
    ({"schedule_learning_rate": False}, {"lr_schedule": None}, {}),
    ({"use_amp": False}, {"precision": "fp32"}, {"precision": "tf32"}),
    ({"use_amp": True}, {"precision": "auto"}, {}),
]


@pytest.mark.parametrize(("old", "today", "contradiction"), OLD)
def test_old_keys_mean_todays(old: dict, today: dict, contradiction: dict) -> None:
    config = checked_config(TrainConfig, TRAIN | old, "train.json")
    assert config == TrainConfig(**TRAIN, **today)
    assert checked_config(TrainConfig, TRAIN | old | today, "train.json") == config
    (key,) = old
    for wrong in [{key: 0}, {key: "true"}, *([old | contradiction] if contradiction else [])]:
        with pytest.raises(InputError, match=rf"^train.json: .*{key}"):
            checked_config(TrainConfig, TRAIN | wrong, "train.json")


def test_defaults_are_the_contracts() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert DEFAULTS.items() <= defaults.items()
    assert TrainConfig(**TRAIN).accumulation_for(1) == 1
    model = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
    assert {"tie_weights": False, "init": "pytorch", "tokenizer": "gpt2"}.items() <= model.items()
