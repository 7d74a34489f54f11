"""A run: two JSON files, and what follows from them and the data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from basemodel.common.command_line import require_inside
from basemodel.common.errors import InputError
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.training.batches import BatchPlan, RunData
from basemodel.training.config import TrainConfig
from basemodel.training.run_folder import find_run
from basemodel.training.schedule import learning_rate_at


@dataclass(frozen=True)
class Run:
    """What is trained, on which data, and where the results go. Only a budget changes its end."""

    directory: Path
    config: TrainConfig
    model_config: GPTConfig
    plan: BatchPlan | None = None  # None until the number of processes and the data are known
    data: RunData | None = None  # None until the data are here
    files: dict[str, dict[str, Any]] | None = None  # the data's files: size, SHA-256, revision
    launchers: tuple[str, ...] = ()  # of its processes: one per node under torchrun

    @classmethod
    def read(cls, runs_dir: Path, name: str) -> Self:
        """Read the run `name` of `runs_dir`. Raises InputError if it is missing or its configs are wrong."""
        folder = find_run(runs_dir, name)
        require_inside(runs_dir, folder)
        model_config = read_config(GPTConfig, folder / "model.json")
        config = read_config(TrainConfig, folder / "train.json")
        if config.document_masking and model_config.end_of_text >= model_config.vocab_size:
            raise InputError(
                f"document_masking needs the end-of-text token, {model_config.end_of_text}, which a "
                f"vocab_size of {model_config.vocab_size} leaves out"
            )
        if config.head_learning_rate is not None and model_config.tie_weights:
            raise InputError(
                f"{folder / 'train.json'}: head_learning_rate has no effect with tie_weights, where the head "
                "is the token embedding; leave it out"
            )
        return cls(folder, config, model_config)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.directory.name

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.directory / "checkpoints"

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint: float32 weights with two moments each, or one where Muon updates them."""
        with_one = self.model_config.hidden_parameters if self.config.optimizer == "muon" else 0
        return 4 * (3 * self.model_config.parameters - with_one)

    @property
    def metrics(self) -> Path:
        """The log of this run's steps."""
        return self.directory / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model said at some of this run's steps."""
        return self.directory / "samples.jsonl"

    @property
    def checkpoint_interval(self) -> int | None:
        """Global steps between two checkpoints; None: only one, at the end."""
        return self.config.checkpoint_interval or self.config.validation_interval

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, from 0. Its schedule counts whole batches."""
        return learning_rate_at(self.plan.batches(step), self.plan.batches(self.plan.steps), self.config)

    def validates_after(self, step: int) -> bool:
        """Whether to validate after `step` steps: before the first, at the interval, and at the end."""
        interval = self.config.validation_interval
        return interval is not None and (step % interval == 0 or step == self.plan.steps)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps: at its interval and at the end."""
        interval = self.checkpoint_interval
        return step == self.plan.steps or (step > 0 and interval is not None and step % interval == 0)

    def samples_after(self, step: int) -> bool:
        """Whether samples are due after `step` steps: at their interval."""
        interval = self.config.sample_interval
        return step > 0 and interval is not None and step % interval == 0

    def has_work_after(self, step: int) -> bool:
        """Whether a validation, samples or a checkpoint are due after `step` steps."""
        return self.validates_after(step) or self.samples_after(step) or self.saves_after(step)

    def saves_from(self, step: int) -> int:
        """How many checkpoints are due after step `step`."""
        return _times_due(self.checkpoint_interval, step, self.plan.steps)

    @property
    def validations(self) -> int:
        """How often the whole run validates."""
        interval = self.config.validation_interval
        return 0 if interval is None else 1 + _times_due(interval, 0, self.plan.steps)


def _times_due(interval: int | None, after: int, last: int) -> int:
    """How many of the steps from `after` + 1 to `last` are a multiple of the interval, or the last."""
    if last <= after or interval is None:
        return int(last > after)
    return last // interval - after // interval + (last % interval > 0)
