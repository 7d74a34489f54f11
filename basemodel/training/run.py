"""A run: its two JSON files, and the plan that follows from them and the data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

import checkpointing
from basemodel.common import names
from basemodel.common.errors import InputError
from basemodel.common.json_config import read_config
from basemodel.common.output import warned
from basemodel.data import hub
from basemodel.data.sequences import Sequences, match_tokenizer
from basemodel.data.token_files import TokenFiles
from basemodel.model.config import GPTConfig
from basemodel.training import run_folder
from basemodel.training.config import TrainConfig
from basemodel.training.processes import World
from basemodel.training.schedule import BatchPlan, learning_rate_at, plan_batches


@dataclass(frozen=True)
class RunData:
    """The data that a run trains and validates on."""

    train: Sequences
    validation: Sequences | None
    model_config: GPTConfig  # with the data set's end-of-text token
    tokenizer: bytes | None  # the content of the data set's tokenizer.json, if it has one
    folder: Path


@dataclass
class Run:
    """What is trained, on which data, and where the results go.

    During training only a budget changes it, by adjusting the number of steps in its plan.
    """

    directory: Path
    config: TrainConfig
    model_config: GPTConfig
    plan: BatchPlan | None = None  # None until the number of processes and the data are known
    data: RunData | None = None  # None until the data are here
    files: dict[str, dict[str, Any]] | None = None  # the data's files: size, SHA-256, revision
    launchers: tuple[str, ...] = ()  # names of torchrun's launchers, one per node

    @classmethod
    def read(cls, runs_dir: Path, name: str) -> Self:
        """Read the run `name` of `runs_dir`. Raises InputError if it is missing or its configs are wrong."""
        folder = run_folder.find_run(runs_dir, name)
        model_config = read_config(GPTConfig, folder / names.MODEL_JSON)
        config = read_config(TrainConfig, folder / names.TRAIN_JSON)
        if config.document_masking and model_config.end_of_text >= model_config.vocab_size:
            raise InputError(
                f"document_masking needs the end-of-text token, {model_config.end_of_text}, which is not in "
                f"a vocabulary of {model_config.vocab_size} tokens; raise vocab_size"
            )
        if config.head_learning_rate is not None and model_config.tie_weights:
            raise InputError(
                f"{folder / names.TRAIN_JSON}: head_learning_rate has no effect with tie_weights, where the "
                "head is the token embedding; leave it out"
            )
        return cls(folder, config, model_config)

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def checkpoints(self) -> Path:
        return self.directory / names.CHECKPOINTS

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint: float32 weights with two moments each, or one where Muon updates them."""
        with_one = self.model_config.hidden_parameters if self.config.optimizer == "muon" else 0
        return 4 * (3 * self.model_config.parameter_count - with_one)

    @property
    def metrics(self) -> Path:
        return self.directory / names.METRICS

    @property
    def samples(self) -> Path:
        """The texts that the model generated during this run."""
        return self.directory / names.SAMPLES

    @property
    def checkpoint_interval(self) -> int | None:
        """Global steps between two checkpoints; None: only one, at the end."""
        return self.config.checkpoint_interval or self.config.validation_interval

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step` (from 0). The schedule counts full global batches."""
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
        interval = self.config.sample_interval
        return step > 0 and interval is not None and step % interval == 0

    def has_work_after(self, step: int) -> bool:
        return self.validates_after(step) or self.samples_after(step) or self.saves_after(step)

    def saves_from(self, step: int) -> int:
        return times_due(self.checkpoint_interval, step, self.plan.steps)

    @property
    def validations(self) -> int:
        interval = self.config.validation_interval
        return 0 if interval is None else 1 + times_due(interval, 0, self.plan.steps)


def times_due(interval: int | None, after: int, last: int) -> int:
    """How many of the steps from `after` + 1 to `last` are a multiple of the interval, or the last."""
    if last <= after or interval is None:
        return int(last > after)
    return last // interval - after // interval + (last % interval > 0)


def prepare_run(run: Run, datasets_dir: Path, world: World, checkpoint: str | None, *, resume: bool) -> Run:
    """Lock the run's folder, download missing data once per node, and check every token the run will use.
    Returns the run with its data and plan. Raises InputError, before a download, without the `checkpoint`."""
    config, model_config = run.config, run.model_config
    config.accumulation_for(world.size)  # raises an error here, not after a download
    if checkpoint is not None and not resume:
        world.agree(lambda: checkpointing.require_named(run.checkpoints, checkpoint), on=world.is_first)
    say = tqdm.write if resume else None
    locked = world.agree(lambda: run_folder.lock_run(run.directory, say), on=world.is_first)
    if locked:
        with warned("remove what interrupted saves have left"):
            checkpointing.remove_leftovers(run.checkpoints)
    elif world.is_first:
        tqdm.write(f"Warning: {run.directory} cannot be locked; do not start this run twice")
    dataset, on_each_node = (config.dataset, config.dataset_revision), world.local_rank == 0
    folder = world.agree(lambda: hub.fetch_dataset(datasets_dir, *dataset, config.splits), on=on_each_node)
    data = world.agree(lambda: open_data(config, model_config, datasets_dir))
    plan = plan_batches(config, model_config.context_length, world.size, data.train.count)
    used = plan.sequences(plan.steps), config.validation_batches * config.microbatch_size
    share = world.local_rank, world.local_size
    world.agree(lambda: check_tokens(data, *used, share=share))
    files = world.agree(lambda: hub.fingerprint_files(folder, config.splits), on=on_each_node)
    files = hub.same_on_all_nodes([node for node in world.all_gather(files) if node is not None])
    return replace(run, model_config=data.model_config, plan=plan, data=data, files=files)


def open_data(config: TrainConfig, model: GPTConfig, datasets_dir: Path) -> RunData:
    """Open a run's token files. Raises InputError for a file that is missing, damaged or too short."""
    folder = hub.dataset_folder(datasets_dir, config.dataset)
    model = match_tokenizer(folder, model)
    tokenizer = (folder / names.TOKENIZER_FILE).read_bytes() if model.tokenizer == "dataset" else None

    def sequences(split: str, start: int) -> Sequences:
        return Sequences(TokenFiles(folder, split), start, model.context_length, config.random_seed)

    train = sequences("train", config.start_train_token)
    if train.count <= 0:
        raise InputError(
            f"{train.tokens}: too short: {train.tokens.count} tokens do not fill one sequence of "
            f"{model.context_length} after start_train_token {config.start_train_token}"
        )
    if config.validation_interval is None:
        return RunData(train, None, model, tokenizer, folder)
    validation = sequences("validation", config.start_val_token)
    available = validation.count // config.microbatch_size
    if config.validation_batches > available:
        raise InputError(
            f"{validation.tokens}: too short: its {validation.tokens.count} tokens fill {available} "
            f"validation batches of {config.microbatch_size} x {model.context_length} after start_val_token "
            f"{config.start_val_token}, not {config.validation_batches}"
        )
    return RunData(train, validation, model, tokenizer, folder)


def check_tokens(data: RunData, train: int, validation: int, *, share: tuple[int, int]) -> None:
    """Check the tokens of the first `train` and `validation` sequences, of which `share` (index, count) is
    this process's part among those of its node. Raises InputError for one outside the vocabulary."""
    index, parts = share
    for sequences, count in ((data.train, min(train, data.train.count)), (data.validation, validation)):
        if sequences is not None:
            tokens = count * sequences.length + 1
            first, stop = (sequences.start + tokens * part // parts for part in (index, index + 1))
            sequences.tokens.check_vocabulary(first, stop, data.model_config.vocab_size)
