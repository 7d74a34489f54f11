"""How a run trains: the keys of `train.json`."""

from dataclasses import dataclass
from typing import Any, Literal

from basemodel.common.command_line import require_repo_id
from basemodel.common.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains, as `train.json` gives it. Intervals are in global steps, batches in sequences."""

    # Required
    dataset: str  # OWNER/NAME, on the Hub and under DATASETS_DIR
    microbatch_size: int  # sequences per process per forward pass
    min_train_tokens: int  # over all epochs, rounded up to whole global batches; -1: all there are
    # Data
    dataset_revision: str | None = None  # a commit or tag
    epochs: int = 1
    start_train_token: int = 0
    start_val_token: int = 0
    document_masking: bool = False  # attention and positions stay within each document
    # Batch
    gradient_accumulation_steps: int | None = None  # null: 1, or what global_batch_size makes it
    global_batch_size: int | None = None  # per optimizer step, over all processes
    half_batch_percent: float = 0.0  # of all tokens: the first ones, learned in half global batches
    short_sequence_percent: float = 0.0  # of all tokens: the first ones, in quarters of sequences
    # Optimizer. The defaults are those of the published runs; runs/*-best have better values.
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the hidden matrices, AdamW on the rest
    learning_rate: float = 0.0004  # the peak, after the warm-up
    muon_learning_rate: float = 0.02  # of the hidden matrices; learning_rate is that of the rest
    muon_momentum: float = 0.95  # lower where steps are few
    embedding_learning_rate: float | None = None  # of the token embedding; null: learning_rate
    head_learning_rate: float | None = None  # of the head; null: learning_rate
    weight_decay: float = 0.1
    decay_all_parameters: bool = True  # false: only matrices, not embeddings, norms and biases
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    clipping_max_norm: float | None = None  # null: no clipping
    # Learning-rate schedule
    lr_schedule: Literal["constant", "cosine", "wsd"] | None = None  # null: constant
    warmup_period_percent: float = 0.0  # of all steps
    decay_period_percent: float = 60.0  # of all steps, for "wsd"
    # Precision and speed
    precision: Literal["auto", "fp32", "tf32", "fp16", "bf16"] = "auto"  # the best the machine has
    compile: bool | Literal["auto"] = "auto"  # on CUDA
    deterministic: bool = False  # the same bits on every run on CUDA too, slower
    # Validation, checkpoints and the rest
    validation_interval: int | None = None  # null: no validation
    validation_batches: int = 0  # microbatches per validation, over all processes
    checkpoint_interval: int | None = None  # null: validation_interval
    keep_checkpoints: int | None = None  # the newest N and the best; null: all
    random_seed: int = 42
    usd_per_hour: float | None = None  # for the cost so far
    max_hours: float | None = None  # the run then ends in time, with its schedule finished
    max_usd: float | None = None  # the same, in dollars at usd_per_hour
    sample_interval: int | None = None  # null: no samples
    sample_prompts: tuple[str, ...] = ("Every effort moves you",)
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # the values of metrics.jsonl
    # Older spellings, of published runs
    schedule_learning_rate: bool = False  # true: "lr_schedule": "cosine"
    use_amp: bool = True  # false: "precision": "fp32"

    def __post_init__(self) -> None:
        require_repo_id(self.dataset)
        for key, least in AT_LEAST.items():
            if getattr(self, key) < least:
                raise InputError(f"{key} must be at least {least}, not {getattr(self, key)}")
        for key in POSITIVE:
            if getattr(self, key) <= 0:
                raise InputError(f"{key} must be more than 0, not {getattr(self, key)}")
        for key in POSITIVE_OR_NULL:
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise InputError(f"{key} must be more than 0 or null, not {getattr(self, key)}")
        if self.min_train_tokens != -1 and self.min_train_tokens <= 0:
            raise InputError(
                f"min_train_tokens must be more than 0, or -1 for all, not {self.min_train_tokens}"
            )
        if self.random_seed >= 2**63:
            raise InputError(f"random_seed must be below 2^63, not {self.random_seed}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be at least 0 and below 1, not {self.betas}")
        if not 0 <= self.muon_momentum < 1:
            raise InputError(f"muon_momentum must be at least 0 and below 1, not {self.muon_momentum}")
        for key in PERCENT:
            if not 0 <= getattr(self, key) <= 100:
                raise InputError(f"{key} must be from 0 to 100, not {getattr(self, key)}")
        self._check_schedule()
        for key in ("muon_learning_rate", "muon_momentum"):
            if self.optimizer != "muon" and getattr(self, key) != getattr(TrainConfig, key):
                raise InputError(f'{key} has no effect without "optimizer": "muon"; leave it out')
        if not self.use_amp and self.precision not in ("auto", "fp32"):
            raise InputError(
                f'precision "{self.precision}" contradicts "use_amp": false, which means "fp32"; drop one'
            )
        if self.max_usd is not None and self.usd_per_hour is None:
            raise InputError("max_usd needs usd_per_hour, the price of the machine")
        if self.validation_interval is not None and self.validation_batches <= 0:
            raise InputError("validation_batches must be at least 1 where validation_interval is set")
        if self.sample_interval is not None and not self.sample_prompts:
            raise InputError("sample_prompts must have at least one prompt where sample_interval is set")

    def _check_schedule(self) -> None:
        if self.schedule_learning_rate and self.schedule != "cosine":
            raise InputError(
                f'lr_schedule "{self.lr_schedule}" contradicts "schedule_learning_rate": true, which means '
                '"cosine"; drop one'
            )
        warmup, decay = self.warmup_period_percent, self.decay_period_percent
        if self.lr_schedule == "constant" and warmup != 0:
            raise InputError(
                'lr_schedule "constant" has no warm-up; "wsd" with "decay_period_percent": 0 has one'
            )
        if self.schedule == "wsd" and warmup + decay > 100:
            raise InputError(
                f"warmup_period_percent {warmup:g} and decay_period_percent {decay:g} add up to more than 100"
            )
        if self.schedule != "wsd" and decay != TrainConfig.decay_period_percent:
            raise InputError('decay_period_percent has no effect without "lr_schedule": "wsd"; leave it out')

    @property
    def schedule(self) -> str:
        """The learning-rate schedule: "constant", "cosine" or "wsd"."""
        return self.lr_schedule or ("cosine" if self.schedule_learning_rate else "constant")

    @property
    def max_seconds(self) -> float | None:
        """How long the run may train, by max_hours and max_usd; None: as long as it takes."""
        hours = [] if self.max_hours is None else [self.max_hours]
        hours += [] if self.max_usd is None else [self.max_usd / self.usd_per_hour]
        return 3600 * min(hours) if hours else None

    @property
    def splits(self) -> list[str]:
        """The parts of the data set that the run reads."""
        return ["train"] if self.validation_interval is None else ["train", "validation"]

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


AT_LEAST = {
    "microbatch_size": 1,
    "epochs": 1,
    "start_train_token": 0,
    "start_val_token": 0,
    "validation_batches": 0,
    "weight_decay": 0,
    "random_seed": 0,
}
PERCENT = "half_batch_percent", "short_sequence_percent", "warmup_period_percent", "decay_period_percent"
POSITIVE = ("learning_rate", "muon_learning_rate")
POSITIVE_OR_NULL = (
    "embedding_learning_rate",
    "head_learning_rate",
    "gradient_accumulation_steps",
    "global_batch_size",
    "checkpoint_interval",
    "validation_interval",
    "keep_checkpoints",
    "sample_interval",
    "clipping_max_norm",
    "usd_per_hour",
    "max_hours",
    "max_usd",
)


def optimizer_in_words(train: dict[str, Any]) -> str:
    """One line that sums up the optimizer settings of a train.json.

    It may come from an old checkpoint that lacks newer keys.
    """
    said = f"{train['optimizer']}, learning rate {train['learning_rate']:g}"
    for part, name in (("embedding", "token embedding"), ("head", "head")):
        if rate := train.get(f"{part}_learning_rate"):
            said += f", of the {name} {rate:g}"
    if train["optimizer"] == "muon":
        said += f", of the hidden matrices {train['muon_learning_rate']:g}"
        said += f" with momentum {train.get('muon_momentum', TrainConfig.muon_momentum):g}"
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
