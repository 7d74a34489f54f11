"""The settings of a training run: the keys of `train.json`."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from basemodel.common.errors import InputError
from basemodel.common.json_config import check_ranges, key, with_defaults
from basemodel.common.names import require_repo_id

# Old keys, still in the published runs: the value that has an effect, and the current key and value for it.
OLD_KEYS = {
    "schedule_learning_rate": (True, "lr_schedule", "cosine"),
    "use_amp": (False, "precision", "fp32"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings in `train.json`. Intervals are in global steps, batch sizes in sequences.

    Optimizer defaults are those of the published runs; runs/*-best have better values.
    """

    # Data
    dataset: str = key("data set on the Hub and in DATASETS_DIR, as OWNER/NAME")
    microbatch_size: int = key("sequences per process in each forward pass", min=1)
    min_train_tokens: int = key("tokens to train on over all epochs, rounded up to full batches; -1: all")
    dataset_revision: str | None = key("commit or tag of the data set; null: the latest", None)
    epochs: int = key("maximum passes over the data; each pass after the first is shuffled", 1, min=1)
    start_train_token: int = key("index of the first training token to use", 0, min=0)
    start_val_token: int = key("index of the first validation token to use", 0, min=0)
    document_masking: bool = key("whether attention and positions are confined to each document", False)
    # Batch
    gradient_accumulation_steps: int | None = key(
        "microbatches per process and global step; null: 1, or as global_batch_size implies", None, above=0
    )
    global_batch_size: int | None = key(
        "sequences per global step; null: microbatch_size x accumulation x processes", None, above=0
    )
    half_batch_percent: float = key(
        "percentage of tokens, at the start, to train on in half-size global batches", 0.0, min=0, max=100
    )
    short_sequence_percent: float = key(
        "percentage of tokens, at the start, to train on in quarter-length sequences", 0.0, min=0, max=100
    )
    # Optimizer
    optimizer: Literal["adamw", "muon"] = key(
        "adamw: AdamW for all parameters; muon: Muon for the blocks' matrices, AdamW for the rest", "adamw"
    )
    learning_rate: float = key("peak learning rate of AdamW", 0.0004, above=0)
    muon_learning_rate: float = key("peak learning rate of Muon", 0.02, above=0)
    muon_momentum: float = key("momentum of Muon; lower it for short runs", 0.95, min=0, below=1)
    embedding_learning_rate: float | None = key(
        "peak learning rate of the token embedding; null: learning_rate", None, above=0
    )
    head_learning_rate: float | None = key("peak rate of the output head; null: learning_rate", None, above=0)
    weight_decay: float = key("decoupled weight decay", 0.1, min=0)
    decay_all_parameters: bool = key(
        "true: weight decay on all parameters; false: only on matrices that are not embeddings", True
    )
    betas: tuple[float, float] = key("AdamW's beta1 and beta2", (0.9, 0.999), min=0, below=1)
    clipping_max_norm: float | None = key("maximum gradient norm; null: no clipping", None, above=0)
    # Learning-rate schedule
    lr_schedule: Literal["constant", "cosine", "wsd"] | None = key(
        "constant or null; cosine: warm-up, cosine to a tenth; wsd: warm-up, constant, linear to zero", None
    )
    warmup_period_percent: float = key("percentage of the steps spent on warm-up", 0.0, min=0, max=100)
    decay_period_percent: float = key("percentage of the steps that wsd's decay takes", 60.0, min=0, max=100)
    # Precision and speed
    precision: Literal["auto", "fp32", "tf32", "fp16", "bf16"] = key(
        "precision of matrix products; auto: bf16 if the hardware has it, else fp16 on CUDA, else fp32",
        "auto",
    )
    compile: bool | Literal["auto"] = key("whether to use torch.compile; auto: only on CUDA", "auto")
    deterministic: bool = key("true: bit-for-bit reproducible on CUDA too, but slower", False)
    # Validation, checkpoints and reports
    validation_interval: int | None = key("global steps between validations; null: never", None, above=0)
    validation_batches: int = key("microbatches per validation, in total over all processes", 0, min=0)
    checkpoint_interval: int | None = key(
        "global steps between checkpoints; null: same as validation_interval", None, above=0
    )
    checkpoint_minutes: float | None = key(
        "minutes between checkpoints, in place of checkpoint_interval; null: by steps", None, above=0
    )
    keep_checkpoints: int | None = key("newest checkpoints kept besides the best; null: all", None, above=0)
    random_seed: int = key("seed for weights, dropout and shuffling", 42, min=0, below=2**63)
    usd_per_hour: float | None = key(
        "dollars an hour of this machine (machines.toml has others), for costs; null: no cost", None, above=0
    )
    max_hours: float | None = key("hours in which to complete the schedule; null: no limit", None, above=0)
    max_usd: float | None = key("the same limit in dollars, at usd_per_hour; null: no limit", None, above=0)
    sample_interval: int | None = key("global steps between samples; null: never", None, above=0)
    sample_prompts: tuple[str, ...] = key("prompts for the samples to continue", ("Every effort moves you",))
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = key(
        "trackers that also receive the values in metrics.jsonl", ()
    )

    @staticmethod
    def from_old_keys(values: dict[str, Any]) -> dict[str, Any]:
        """The values of a train.json with OLD_KEYS replaced. Raises InputError for a contradiction."""
        values = dict(values)
        for old, (trigger, new, meaning) in OLD_KEYS.items():
            flag = values.pop(old, not trigger)
            if type(flag) is not bool:
                raise InputError(f"{old} must be true or false, not {json.dumps(flag)}")
            if flag is not trigger:
                continue
            if values.get(new) not in (None, "auto", meaning):
                other = f'"{old}": {json.dumps(flag)}, which means "{meaning}"'
                raise InputError(f'{new} "{values[new]}" contradicts {other}; remove one')
            values[new] = meaning
        return values

    def __post_init__(self) -> None:
        require_repo_id(self.dataset)
        check_ranges(self)
        if self.min_train_tokens != -1 and self.min_train_tokens <= 0:
            raise InputError(f"min_train_tokens must be above 0, or -1 for all, not {self.min_train_tokens}")
        warmup, decay = self.warmup_period_percent, self.decay_period_percent
        if self.lr_schedule == "constant" and warmup != 0:
            raise InputError('lr_schedule "constant" has no warm-up; use "wsd", "decay_period_percent": 0')
        if self.lr_schedule == "wsd" and warmup + decay > 100:
            both = f"warmup_period_percent {warmup:g} and decay_period_percent {decay:g}"
            raise InputError(f"{both} add up to more than 100")
        if self.lr_schedule != "wsd" and decay != TrainConfig.decay_period_percent:
            raise InputError('decay_period_percent has no effect without "lr_schedule": "wsd"; leave it out')
        for name in ("muon_learning_rate", "muon_momentum"):
            if self.optimizer != "muon" and getattr(self, name) != getattr(TrainConfig, name):
                raise InputError(f'{name} has no effect without "optimizer": "muon"; leave it out')
        if self.max_usd is not None and self.usd_per_hour is None:
            raise InputError("max_usd needs usd_per_hour, the price of the machine")
        if self.validation_interval is not None and self.validation_batches <= 0:
            raise InputError("validation_batches must be at least 1 when validation_interval is set")
        if None not in (self.checkpoint_interval, self.checkpoint_minutes):
            raise InputError("checkpoint_interval and checkpoint_minutes exclude each other; leave one out")
        if self.sample_interval is not None and not self.sample_prompts:
            raise InputError("sample_prompts must have at least one prompt when sample_interval is set")

    @property
    def max_seconds(self) -> float | None:
        """Seconds of training that max_hours and max_usd allow; None: no limit."""
        hours = [] if self.max_hours is None else [self.max_hours]
        hours += [] if self.max_usd is None else [self.max_usd / self.usd_per_hour]
        return 3600 * min(hours) if hours else None

    @property
    def splits(self) -> list[str]:
        return ["train"] if self.validation_interval is None else ["train", "validation"]

    def compiles_on(self, device_type: str) -> bool:
        return self.compile is True or (self.compile == "auto" and device_type == "cuda")

    def precision_on(self, device_type: str, *, has_bf16: bool) -> str:
        """The precision of matrix products on a type of device."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if has_bf16 else "fp16" if device_type == "cuda" else "fp32"

    @property
    def may_accumulate(self) -> bool:
        """Whether a step may have several microbatches, depending on the number of processes."""
        return self.global_batch_size is not None or self.gradient_accumulation_steps not in (None, 1)

    def accumulation_for(self, processes: int) -> int:
        """Microbatches per process per optimizer step. Raises InputError when the batch does not divide."""
        size, requested = self.global_batch_size, self.gradient_accumulation_steps
        if size is None:
            return requested or 1
        unit = self.microbatch_size * processes
        accumulation, remainder = divmod(size, unit)
        if remainder:
            per_process = size // processes if size % processes == 0 else 0
            divisors = [m for m in range(1, min(per_process, 10_000) + 1) if per_process % m == 0]
            nearest = sorted(sorted(divisors, key=lambda m: abs(m - self.microbatch_size))[:4])
            sizes = f"global_batch_size {accumulation * unit or unit} or {(accumulation + 1) * unit}"
            hint = f"microbatch_size {' or '.join(map(str, nearest))}, or {sizes}" if nearest else sizes
            product = f"microbatch_size {self.microbatch_size} x {processes} processes"
            raise InputError(f"global_batch_size {size} is not a multiple of {product}; {hint} would work")
        if requested not in (None, accumulation):
            raise InputError(
                f"global_batch_size {size} and gradient_accumulation_steps {requested} disagree; "
                f"with microbatch_size {self.microbatch_size} and {processes} processes, use "
                f"gradient_accumulation_steps {accumulation} or global_batch_size {unit * requested}"
            )
        return accumulation


def optimizer_in_words(train: dict[str, Any]) -> str:
    """The optimizer settings of a train.json, which an older version may have written, in one line."""
    values = with_defaults(TrainConfig, train)
    text = f"{values['optimizer']}, learning rate {values['learning_rate']:g}"
    for part, name in (("embedding", "token embedding"), ("head", "head")):
        if rate := values[f"{part}_learning_rate"]:
            text += f", {name} {rate:g}"
    if values["optimizer"] == "muon":
        text += f", hidden matrices {values['muon_learning_rate']:g}"
        text += f" (momentum {values['muon_momentum']:g})"
    warmup = f"warm-up {values['warmup_period_percent']:g}%"
    schedule = {
        "constant": "constant",
        "cosine": f"{warmup}, cosine to a tenth",
        "wsd": f"{warmup}, linear to zero over the last {values['decay_period_percent']:g}%",
    }[values["lr_schedule"] or "constant"]
    first, second = values["betas"]
    return f"{text}, {schedule}, weight decay {values['weight_decay']:g}, betas {first:g} and {second:g}"
