"""How a run is configured (`train.json`), and what every script does with what a user gave it.

A run is two JSON files, each read into a frozen dataclass by `read_config`: an unknown key, a missing one or
a wrong type is an error that names the file and the key; ranges are checked by the dataclass itself.
`GPTConfig`, what `model.json` holds, stands in gpt.py beside the model. Each script ends with
`run_command(main)`, which turns errors into one line, `Error: ...`, and an exit status.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import click

Config = TypeVar("Config")

# How long a torchrun process other than the node's first waits with an error, in seconds: all processes of a
# node meet the same error, the first one says it, and torchrun then ends the others. One that still lives met
# it alone.
SILENCE_SECONDS = 5.0


class InputError(ValueError):
    """Something a user gave (an option, a config, a data set) is wrong. One line: the thing and the fix."""


class RunError(RuntimeError):
    """A run failed while it was running, for a reason that one line can say."""


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains, as `train.json` gives it. Intervals are in global steps, batches in sequences."""

    dataset: str  # OWNER/NAME, on the Hub and under DATASETS_DIR
    microbatch_size: int  # sequences per process per forward pass
    min_train_tokens: int  # over all epochs, rounded up to whole global batches; -1: all there are
    dataset_revision: str | None = None
    gradient_accumulation_steps: int | None = None  # 1, or what global_batch_size makes it
    global_batch_size: int | None = None  # per optimiser step, over all processes
    epochs: int = 1
    start_train_token: int = 0
    start_val_token: int = 0
    checkpoint_interval: int | None = None  # null: validation_interval
    validation_interval: int | None = None  # null: no validation
    validation_batches: int = 0  # microbatches per validation, over all processes
    learning_rate: float = 0.0004
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    decay_all_parameters: bool = True  # false: only matrices, not embeddings, norms and biases
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the hidden matrices, AdamW on the rest
    muon_learning_rate: float = 0.02  # of the hidden matrices; learning_rate is that of the rest
    schedule_learning_rate: bool = False  # true: "lr_schedule": "cosine"
    lr_schedule: Literal["constant", "cosine", "wsd"] | None = None  # null: as schedule_learning_rate says
    warmup_period_percent: float = 0.0
    decay_period_percent: float = 60.0  # of "wsd"
    clipping_max_norm: float | None = None
    document_masking: bool = False  # tokens attend to their own document alone
    use_amp: bool = True  # false: precision "fp32"
    precision: Literal["auto", "fp32", "tf32", "fp16", "bf16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    random_seed: int = 42
    keep_checkpoints: int | None = None  # the newest N and the best; null: all
    usd_per_hour: float | None = None

    def __post_init__(self) -> None:
        require_dataset_id(self.dataset)
        for key in ("microbatch_size", "epochs"):
            require(getattr(self, key) >= 1, f"{key} must be at least 1, not {getattr(self, key)}")
        positive_if_set = ("gradient_accumulation_steps", "global_batch_size", "checkpoint_interval")
        for key in (
            *positive_if_set,
            "validation_interval",
            "keep_checkpoints",
            "clipping_max_norm",
            "usd_per_hour",
        ):
            value = getattr(self, key)
            require(value is None or value > 0, f"{key} must be more than 0 or null, not {value}")
        for key in (
            "start_train_token",
            "start_val_token",
            "validation_batches",
            "weight_decay",
            "random_seed",
        ):
            require(getattr(self, key) >= 0, f"{key} must be at least 0, not {getattr(self, key)}")
        tokens = self.min_train_tokens
        require(
            tokens == -1 or tokens > 0, f"min_train_tokens must be more than 0, or -1 for all, not {tokens}"
        )
        require(self.random_seed < 2**63, f"random_seed must be below 2^63, not {self.random_seed}")
        for key in ("learning_rate", "muon_learning_rate"):
            require(getattr(self, key) > 0, f"{key} must be more than 0, not {getattr(self, key)}")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas must be at least 0 and below 1, not {self.betas}",
        )
        for key in ("warmup_period_percent", "decay_period_percent"):
            percent = getattr(self, key)
            require(0 <= percent <= 100, f"{key} must be from 0 to 100, not {percent}")
        self._check_schedule()
        require(
            self.optimizer == "muon" or self.muon_learning_rate == TrainConfig.muon_learning_rate,
            'muon_learning_rate does nothing without "optimizer": "muon"',
        )
        require(
            self.use_amp or self.precision in ("auto", "fp32"),
            f'precision "{self.precision}" is at odds with "use_amp": false, which means "fp32"; drop one',
        )
        require(
            self.validation_interval is None or self.validation_batches > 0,
            "validation_batches must be at least 1 where validation_interval is set",
        )

    def _check_schedule(self) -> None:
        require(
            not self.schedule_learning_rate or self.schedule == "cosine",
            f'lr_schedule "{self.lr_schedule}" is at odds with "schedule_learning_rate": true, which means '
            '"cosine"; drop one',
        )
        warmup, decay = self.warmup_period_percent, self.decay_period_percent
        require(
            self.lr_schedule != "constant" or warmup == 0,
            'lr_schedule "constant" has no warm-up; "wsd" with "decay_period_percent": 0 has one',
        )
        require(
            self.schedule != "wsd" or warmup + decay <= 100,
            f"warmup_period_percent {warmup:g} and decay_period_percent {decay:g} make more than 100",
        )
        require(
            self.schedule == "wsd" or decay == TrainConfig.decay_period_percent,
            'decay_period_percent does nothing without "lr_schedule": "wsd"',
        )

    @property
    def schedule(self) -> str:
        """How the learning rate goes: "constant", "cosine" or "wsd"."""
        return self.lr_schedule or ("cosine" if self.schedule_learning_rate else "constant")

    @property
    def splits(self) -> list[str]:
        """The parts of the data set that the run reads."""
        return ["train"] if self.validation_interval is None else ["train", "validation"]

    def accumulation_for(self, processes: int) -> int:
        """Microbatches per process per optimiser step. Raises InputError when the batch does not divide."""
        size, asked = self.global_batch_size, self.gradient_accumulation_steps
        if size is None:
            return asked or 1
        at_once = self.microbatch_size * processes
        accumulation, rest = divmod(size, at_once)
        if rest:
            per_process = size // processes if size % processes == 0 else 0
            fitting = [m for m in range(1, min(per_process, 10_000) + 1) if per_process % m == 0]
            near = sorted(sorted(fitting, key=lambda m: abs(m - self.microbatch_size))[:4])
            sizes = f"global_batch_size {accumulation * at_once or at_once} or {(accumulation + 1) * at_once}"
            hint = f"microbatch_size {' or '.join(map(str, near))}, or {sizes}" if near else sizes
            raise InputError(
                f"global_batch_size {size} is no multiple of microbatch_size {self.microbatch_size} x "
                f"{processes} "
                f"processes; {hint} would work"
            )
        if asked not in (None, accumulation):
            raise InputError(
                f"global_batch_size {size} and gradient_accumulation_steps {asked} are at odds: with "
                f"microbatch_size {self.microbatch_size} and {processes} processes "
                f"gradient_accumulation_steps {accumulation} or global_batch_size {at_once * asked} works"
            )
        return accumulation


def optimizer_in_words(train: dict[str, Any]) -> str:
    """How a run's weights are updated, from the values of its train.json, for people.

    Checkpoints that are older than a key do without it.
    """
    said = f"{train['optimizer']}, learning rate {train['learning_rate']:g}"
    if train["optimizer"] == "muon":
        said += f", of the hidden matrices {train['muon_learning_rate']:g}"
    schedule = train.get("lr_schedule") or ("cosine" if train["schedule_learning_rate"] else "constant")
    falls = {
        "constant": "constant",
        "cosine": f"warm-up {train['warmup_period_percent']:g}%, cosine to a tenth",
        "wsd": f"warm-up {train['warmup_period_percent']:g}%, a fall to zero over the last "
        f"{train.get('decay_period_percent', 0):g}%",
    }
    first, second = train["betas"]
    return (
        f"{said}, {falls[schedule]}, weight decay {train['weight_decay']:g}, betas {first:g} and {second:g}"
    )


def read_config(config_class: type[Config], path: Path) -> Config:
    """Read a JSON object from `path` into the dataclass `config_class`.

    Raises InputError, naming the file and the key, for a missing or malformed file, a key that the class does
    not know (with the nearest that it does), a required key left out, a wrong type, or a value that the class
    refuses.
    """
    values = read_json_object(path)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key in values:
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise InputError(f"{path}: unknown key '{key}'; did you mean '{nearest}'?")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{path}: the key '{name}' is missing")
    hints = typing.get_type_hints(config_class)
    try:
        return config_class(**{key: _checked(key, value, hints[key]) for key, value in values.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read one JSON object, refusing repeated keys and NaN. Raises InputError, naming the place."""

    def object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"{path}: the key '{key}' is there twice; keep one")
        return dict(pairs)

    def refuse_constant(name: str) -> NoReturn:
        raise InputError(f"{path}: {name} is no JSON number")

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=object_once, parse_constant=refuse_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a JSON object, {{...}}")
    return values


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, or raise InputError. An integer passes for a float."""
    for option in (
        typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    ):
        if typing.get_origin(option) is typing.Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is tuple:
            if isinstance(value, list) and len(value) == len(typing.get_args(option)):
                return tuple(_checked(key, v, t) for v, t in zip(value, typing.get_args(option), strict=True))
        elif option is float and type(value) in (int, float) and abs(value) < sys.float_info.max:
            return float(value)
        elif option is not float and type(value) is option:
            return value
    raise InputError(f"{key} must be {_described(hint)}, not {json.dumps(value)}")


def _described(hint: Any) -> str:
    """Say a type hint as a user of JSON would."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(typing.get_args(hint))} numbers"
    if typing.get_args(hint):
        return " or ".join(_described(option) for option in typing.get_args(hint))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    return names[hint]


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


def require_plain_name(name: str, what: str) -> str:
    """Return `name` if it is a plain folder name, so that it cannot lead out of the folder it is looked up
    in.

    Raises InputError otherwise. Plain is `[A-Za-z0-9._-]+`, and neither `.` nor `..`.
    """
    plain = re.fullmatch(r"[A-Za-z0-9._-]+", name) and name not in (".", "..")
    require(bool(plain), f"{what} '{name}' must be a plain name of letters, digits, '.', '_' and '-'")
    return name


def require_inside(folder: Path, path: Path) -> None:
    """Raise InputError if `path`, by way of links, leads out of the folder that it was looked up in."""
    require(
        path.resolve().is_relative_to(folder.resolve()),
        f"{path}: is a link that leads out of {folder}; give the folder itself",
    )


def require_dataset_id(dataset: str) -> None:
    """Raise InputError unless `dataset` is a Hub data set id, OWNER/NAME, both of them plain names."""
    owner, slash, name = dataset.partition("/")
    require(bool(slash), f"dataset must be OWNER/NAME, not '{dataset}'")
    require_plain_name(owner, "the dataset's owner")
    require_plain_name(name, "the dataset's name")


def run_command(command: click.Command, leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a click command and `leave` with the exit status: what the command returns (None is 0), 2 for wrong
    usage, configs or data, 1 for a failure while running.

    Errors that the user can fix are one line on standard error, `Error: ...`; any other exception is a bug
    in this project and keeps its traceback.
    """
    try:
        status = command.main(standalone_mode=False) or 0
    except click.exceptions.Abort:
        status = _say_error("interrupted", 130)
    except (InputError, click.ClickException) as error:
        status = _say_error(
            error.format_message() if isinstance(error, click.ClickException) else str(error), 2
        )
    except (RunError, OSError) as error:
        status = _say_error(str(error), 1)
    sys.stdout.flush()
    leave(status)


def _say_error(message: str, status: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SILENCE_SECONDS)
    print("Error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status
