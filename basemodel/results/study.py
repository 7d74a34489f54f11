"""An ablation study: a base run and variations of it, each trained with several seeds."""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.files import replace_text
from basemodel.common.json_config import checked_config, read_json_object, require_known
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig
from basemodel.training.resume import FREE_ON_RESUME
from basemodel.training.run import Run
from basemodel.training.run_folder import find_run, read_metrics, read_status

CONFIGS = {"model": GPTConfig, "train": TrainConfig}
KEYS = {field.name: file for file, config in CONFIGS.items() for field in dataclasses.fields(config)}
# Keys that decide which tokens a run is validated on.
SAME_FOR_ALL = {"dataset", "dataset_revision", "tokenizer", "start_val_token"}
SAME_FOR_ALL |= {"validation_batches", "validation_interval"}
# Keys that may change in a study that has begun, because they change no loss.
MAY_CHANGE = FREE_ON_RESUME - SAME_FOR_ALL
MAY_CHANGE -= {"microbatch_size", "gradient_accumulation_steps", "global_batch_size"}
Values = dict[str, dict[str, Any]]  # the contents of model.json and train.json


@dataclass(frozen=True)
class Variant:
    """The base run or a variation of it."""

    label: str  # BASE, or the variation as the user typed it
    values: Values
    changes: dict[str, Any] = field(default_factory=dict)  # to the base, by key

    def run_name(self, base: str, seed: int) -> str:
        """The folder name of its run with a seed, which follows from the changes: studies share runs."""
        parts = [base]
        for key, value in sorted(self.changes.items()):
            text = json.dumps(value).strip('"[]')
            parts.append(f"{key}-{re.sub('[^A-Za-z0-9._-]+', '-', text)}")
        name = "--".join(parts)
        if len(name) > 150:  # a file system's limit is 255
            name = f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return f"{name}--seed-{seed}"


@dataclass(frozen=True)
class Study:
    """The variants of a base run, the base itself first, and the seeds that each is trained with."""

    base: str
    runs_dir: Path
    variants: list[Variant]
    seeds: list[int]

    @classmethod
    def plan(cls, runs_dir: Path, base: str, variations: tuple[str, ...], seeds: int) -> "Study":
        """Check a study and return it. Raises InputError, naming what is wrong in BASE or in a variation."""
        folder = find_run(runs_dir, base)
        config = Run.read(runs_dir, base).config
        if config.validation_interval is None:
            raise InputError(
                f"{folder / 'train.json'}: has no validation, but validation losses are compared; set "
                "validation_interval and validation_batches"
            )
        values = {file: read_json_object(folder / f"{file}.json") for file in CONFIGS}
        variants = [Variant(base, values)]
        for text in variations:
            variant = read_variation(text, variants[0])
            for other in variants:
                if other.changes == variant.changes:
                    raise InputError(f"--vary {text}: is the same as {other.label}; leave it out")
            variants.append(variant)
        first = config.random_seed
        return cls(base, runs_dir, variants, list(range(first, first + seeds)))

    def folder(self, variant: Variant, seed: int) -> Path:
        """The folder of one run."""
        return self.runs_dir / variant.run_name(self.base, seed)

    def runs(self) -> list[Path]:
        """The folders of all runs, in the order of training: every variant with one seed before the next."""
        return [self.folder(variant, seed) for seed in self.seeds for variant in self.variants]

    def write_configs(self) -> None:
        """Write the two files of each run. Raises InputError if a run has begun with other settings."""
        written: dict[Path, str] = {}
        for seed in self.seeds:
            for variant in self.variants:
                folder = self.folder(variant, seed)
                if written.setdefault(folder, variant.label) != variant.label:
                    raise InputError(f"{variant.label} and {written[folder]} would share the folder {folder}")
                write_run(folder, variant.values, seed)


def read_variation(text: str, base: Variant) -> Variant:
    """The variation of `base` that KEY=VALUE[,KEY=VALUE...] describes; values are JSON or plain words.

    Raises InputError for unknown keys, values that the configs refuse, and losses that could not be compared.
    """
    source = f"--vary {text}"
    values = {file: dict(contents) for file, contents in base.values.items()}
    changed = []
    for part in re.split(r",(?=\s*\w+\s*=)", text):  # not at the commas inside a list
        key, equals, word = (text.strip() for text in part.partition("="))
        if not (key and equals and word):
            raise InputError(f"{source}: must be KEY=VALUE[,KEY=VALUE...], such as drop_rate=0.1")
        require_known(key, KEYS, source)
        if key in changed:
            raise InputError(f"{source}: {key} appears twice; keep one")
        if key == "random_seed":
            raise InputError(f"{source}: all variations are trained with the same seeds; use --seeds")
        if key in SAME_FOR_ALL:
            raise InputError(f"{source}: {key} cannot vary, because the losses could not be compared")
        changed.append(key)
        if word == "default":
            values[KEYS[key]].pop(key, None)
        else:
            values[KEYS[key]][key] = json_or_word(word)
    checked, before = as_checked(values, source), as_checked(base.values, base.label)
    changes = {key: checked[key] for key in changed if checked[key] != before[key]}
    if len(changes) < len(changed):
        same = next(key for key in changed if key not in changes)
        raise InputError(f"{source}: {same} is already {json.dumps(before[same])} in {base.label}")
    values["train"]["validation_batches"] = matching_batches(before, checked, source)
    return Variant(text, values, changes)


def json_or_word(text: str) -> Any:
    """A value in JSON, or else the text itself, as a string without its quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def as_checked(values: Values, source: str) -> dict[str, Any]:
    """All keys of both configs, with their defaults, checked; errors name their `source`."""
    configs = (checked_config(config, values[file], source) for file, config in CONFIGS.items())
    return {key: value for config in configs for key, value in dataclasses.asdict(config).items()}


def matching_batches(base: dict[str, Any], config: dict[str, Any], source: str) -> int:
    """The validation_batches that make `config` validate on the base's tokens, whatever its microbatch.

    Raises InputError if no number does.
    """
    base_batch, batch = (keys["microbatch_size"] * keys["context_length"] for keys in (base, config))
    tokens = base["validation_batches"] * base_batch
    batches, rest = divmod(tokens, batch)
    if rest:
        raise InputError(
            f"{source}: its validation batches of {batch:,} tokens do not fill the base's {tokens:,}; "
            f"make the base's validation_batches a multiple of {math.lcm(base_batch, batch) // base_batch}"
        )
    return batches


def write_run(folder: Path, values: Values, seed: int) -> None:
    """Write a run's two files with a seed.

    Raises InputError if the run has begun with other settings, apart from those that may change.
    """
    values = {**values, "train": {**values["train"], "random_seed": seed}}
    if (folder / "metrics.jsonl").exists():
        earlier = {file: read_json_object(folder / f"{file}.json") for file in CONFIGS}
        old, new = as_checked(earlier, str(folder)), as_checked(values, str(folder))
        changes = [
            f"{key} {json.dumps(old[key])}, not {json.dumps(new[key])}"
            for key in new
            if old[key] != new[key] and key not in MAY_CHANGE
        ]
        if changes:
            raise InputError(
                f"{folder}: was begun with {', '.join(changes)}; undo the change, or remove the folder"
            )
    folder.mkdir(exist_ok=True)
    for file, contents in values.items():
        replace_text(folder / f"{file}.json", json.dumps(contents, indent=4) + "\n")
    Run.read(folder.parent, folder.name)


def final_loss(folder: Path) -> float | None:
    """The validation loss after a run's last step; None if it has not finished."""
    status = read_status(folder)
    if status.get("status") != "finished":
        return None
    losses = {line["step"]: line.get("val_loss") for line in read_metrics(folder / "metrics.jsonl")}
    return losses.get(status.get("total_steps"))
