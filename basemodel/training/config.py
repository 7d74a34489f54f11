"""How a run trains: the keys of `train.json`."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from basemodel.common.errors import InputError
from basemodel.common.json_config import check_ranges, key, with_defaults
from basemodel.common.names import require_repo_id

# Keys of the published runs, by the value that has a meaning, and today's key and value for it.
OLD_KEYS = {
    "schedule_learning_rate": (True, "lr_schedule", "cosine"),
    "use_amp": (False, "precision", "fp32"),
}


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains, as `train.json` gives it. Intervals are in global steps, batches in sequences.

    The defaults of the optimizer are those of the published runs; runs/*-best have better values.
    """

    # Data
    dataset: str = key("OWNER/NAME of the data set, on the Hub and under DATASETS_DIR")
    microbatch_size: int = key("sequences per process and forward pass", least=1)
    min_train_tokens: int = key("tokens to train on over all epochs, rounded up to whole batches; -1: all")
    dataset_revision: str | None = key("commit or tag of the data set; null: the newest", None)
    epochs: int = key("how often the data may be read; each epoch after the first is shuffled", 1, least=1)
    start_train_token: int = key("first training token to read", 0, least=0)
    start_val_token: int = key("first validation token to read", 0, least=0)
    document_masking: bool = key("whether attention and positions stay within each document", False)
    # Batch
    gradient_accumulation_steps: int | None = key(
        "microbatches per process and global step; null: 1, or what global_batch_size implies", None, above=0
    )
    global_batch_size: int | None = key(
        "sequences per global step over all processes; null: microbatch_size x "
        "gradient_accumulation_steps x processes",
        None,
        above=0,
    )
    half_batch_percent: float = key(
        "share of the tokens, at the start, that is trained on in half global batches", 0.0, least=0, most=100
    )
    short_sequence_percent: float = key(
        "share of the tokens, at the start, that is trained on in quarter-length sequences",
        0.0,
        least=0,
        most=100,
    )
    # Optimizer
    optimizer: Literal["adamw", "muon"] = key(
        "adamw for all parameters, or muon for the blocks' matrices and adamw for the rest", "adamw"
    )
    learning_rate: float = key("peak learning rate of AdamW", 0.0004, above=0)
    muon_learning_rate: float = key("peak learning rate of Muon", 0.02, above=0)
    muon_momentum: float = key("momentum of Muon; lower it for runs of few steps", 0.95, least=0, below=1)
    embedding_learning_rate: float | None = key(
        "peak learning rate of the token embedding; null: learning_rate", None, above=0
    )
    head_learning_rate: float | None = key(
        "peak learning rate of the output head; null: learning_rate", None, above=0
    )
    weight_decay: float = key("decoupled weight decay", 0.1, least=0)
    decay_all_parameters: bool = key(
        "true: weight decay on all parameters; false: only on matrices that are not embeddings", True
    )
    betas: tuple[float, float] = key("AdamW's beta1 and beta2", (0.9, 0.999), least=0, below=1)
    clipping_max_norm: float | None = key("largest gradient norm; null: no clipping", None, above=0)
    # Learning-rate schedule
    lr_schedule: Literal["constant", "cosine", "wsd"] | None = key(
        "constant; cosine: warm-up, then a cosine to a tenth of the peak; wsd: warm-up, constant, then "
        "linearly to zero; null: constant",
        None,
    )
    warmup_period_percent: float = key("share of the steps spent warming up", 0.0, least=0, most=100)
    decay_period_percent: float = key(
        'share of the steps over which "wsd" falls to zero', 60.0, least=0, most=100
    )
    # Precision and speed
    precision: Literal["auto", "fp32", "tf32", "fp16", "bf16"] = key(
        "precision of matrix products; auto: bf16 where the hardware has it, else fp16 on CUDA and fp32 on "
        "CPUs",
        "auto",
    )
    compile: bool | Literal["auto"] = key("whether to use torch.compile; auto: on CUDA", "auto")
    deterministic: bool = key("the same bits on every run on CUDA too, but slower", False)
    # Validation, checkpoints and reports
    validation_interval: int | None = key("global steps between validations; null: none", None, above=0)
    validation_batches: int = key("microbatches per validation, over all processes", 0, least=0)
    checkpoint_interval: int | None = key(
        "global steps between checkpoints; null: validation_interval", None, above=0
    )
    keep_checkpoints: int | None = key(
        "how many of the newest checkpoints to keep, besides the best; null: all", None, above=0
    )
    random_seed: int = key("seed of the weights, dropout and shuffling", 42, least=0, below=2**63)
    usd_per_hour: float | None = key("price of the machine, to report the cost; null: no cost", None, above=0)
    max_hours: float | None = key(
        "hours after which the run ends, with its schedule complete; null: no limit", None, above=0
    )
    max_usd: float | None = key("the same in dollars, at usd_per_hour; null: no limit", None, above=0)
    sample_interval: int | None = key("global steps between samples; null: none", None, above=0)
    sample_prompts: tuple[str, ...] = key("prompts that samples continue", ("Every effort moves you",))
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = key(
        "trackers that get the values of metrics.jsonl too", ()
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
                raise InputError(
                    f'{new} "{values[new]}" contradicts "{old}": {json.dumps(flag)}, which means '
                    f'"{meaning}"; drop one'
                )
            values[new] = meaning
        return values

    def __post_init__(self) -> None:
        require_repo_id(self.dataset)
        check_ranges(self)
        if self.min_train_tokens != -1 and self.min_train_tokens <= 0:
            raise InputError(
                f"min_train_tokens must be more than 0, or -1 for all, not {self.min_train_tokens}"
            )
        self._check_schedule()
        for name in ("muon_learning_rate", "muon_momentum"):
            if self.optimizer != "muon" and getattr(self, name) != getattr(TrainConfig, name):
                raise InputError(f'{name} has no effect without "optimizer": "muon"; leave it out')
        if self.max_usd is not None and self.usd_per_hour is None:
            raise InputError("max_usd needs usd_per_hour, the price of the machine")
        if self.validation_interval is not None and self.validation_batches <= 0:
            raise InputError("validation_batches must be at least 1 where validation_interval is set")
        if self.sample_interval is not None and not self.sample_prompts:
            raise InputError("sample_prompts must have at least one prompt where sample_interval is set")

    def _check_schedule(self) -> None:
        warmup, decay = self.warmup_period_percent, self.decay_period_percent
        if self.lr_schedule == "constant" and warmup != 0:
            raise InputError(
                'lr_schedule "constant" has no warm-up; "wsd" with "decay_period_percent": 0 has one'
            )
        if self.lr_schedule == "wsd" and warmup + decay > 100:
            raise InputError(
                f"warmup_period_percent {warmup:g} and decay_period_percent {decay:g} add up to more than 100"
            )
        if self.lr_schedule != "wsd" and decay != TrainConfig.decay_period_percent:
            raise InputError('decay_period_percent has no effect without "lr_schedule": "wsd"; leave it out')

    @property
    def max_seconds(self) -> float | None:
        """The longest that the run may train, by max_hours and max_usd; None: no limit."""
        hours = [] if self.max_hours is None else [self.max_hours]
        hours += [] if self.max_usd is None else [self.max_usd / self.usd_per_hour]
        return 3600 * min(hours) if hours else None

    @property
    def splits(self) -> list[str]:
        """The splits of the data set that the run reads."""
        return ["train"] if self.validation_interval is None else ["train", "validation"]

    def compiles_on(self, device_type: str) -> bool:
        """Whether training is to be compiled on a type of device."""
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
                f"global_batch_size {size} is not a multiple of microbatch_size {self.microbatch_size} x "
                f"{processes} processes; {hint} would work"
            )
        if asked not in (None, accumulation):
            raise InputError(
                f"global_batch_size {size} and gradient_accumulation_steps {asked} contradict each other: "
                f"with microbatch_size {self.microbatch_size} and {processes} processes "
                f"gradient_accumulation_steps {accumulation} or global_batch_size {at_once * asked} works"
            )
        return accumulation


def optimizer_in_words(train: dict[str, Any]) -> str:
    """One line that sums up the optimizer settings of a train.json, also of an older version's."""
    values = with_defaults(TrainConfig, train)
    text = f"{values['optimizer']}, learning rate {values['learning_rate']:g}"
    for part, name in (("embedding", "token embedding"), ("head", "head")):
        if rate := values[f"{part}_learning_rate"]:
            text += f", of the {name} {rate:g}"
    if values["optimizer"] == "muon":
        text += f", of the hidden matrices {values['muon_learning_rate']:g}"
        text += f" with momentum {values['muon_momentum']:g}"
    warmup = f"warm-up {values['warmup_period_percent']:g}%"
    schedule = {
        "constant": "constant",
        "cosine": f"{warmup}, cosine to a tenth",
        "wsd": f"{warmup}, linear to zero over the last {values['decay_period_percent']:g}%",
    }[values["lr_schedule"] or "constant"]
    first, second = values["betas"]
    return f"{text}, {schedule}, weight decay {values['weight_decay']:g}, betas {first:g} and {second:g}"
