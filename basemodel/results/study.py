"""An ablation study: a base run and variations of it, each trained with several seeds."""

import contextlib
import hashlib
import json
import math
import re
import statistics
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

import checkpointing
from basemodel.common.errors import InputError
from basemodel.common.files import replace_text
from basemodel.common.json_config import checked_config, read_json_object, require_known
from basemodel.common.names import CHECKPOINTS, METRICS
from basemodel.common.output import markdown_table
from basemodel.common.xkcd import xkcd_chart
from basemodel.model.config import GPTConfig
from basemodel.training.config import OLD_KEYS, TrainConfig
from basemodel.training.resume import FREE_ON_RESUME
from basemodel.training.run import Run
from basemodel.training.run_folder import read_metrics, read_status

CONFIGS = {"model": GPTConfig, "train": TrainConfig}
KEYS = {field.name: file for file, config in CONFIGS.items() for field in fields(config)}
# Keys that decide which tokens a run is validated on.
SAME_FOR_ALL = {"dataset", "dataset_revision", "tokenizer", "start_val_token"}
SAME_FOR_ALL |= {"validation_batches", "validation_interval"}
# Keys that may change in a study that has begun, because they change no loss.
MAY_CHANGE = FREE_ON_RESUME - SAME_FOR_ALL
MAY_CHANGE -= {"microbatch_size", "gradient_accumulation_steps", "global_batch_size"}
CONFIDENCE = 0.95  # of all intervals of a study together
COLORS = {"better": "tab:green", "worse": "tab:red"}
UNKNOWN = "–"
Values = dict[str, dict[str, Any]]  # the contents of model.json and train.json


@dataclass(frozen=True)
class Variant:
    """The base run or a variation of it."""

    label: str  # BASE, or the variation as the user typed it
    values: Values
    changes: dict[str, Any] = field(default_factory=dict)  # to the base, by key

    def run_name(self, base: str, seed: int) -> str:
        """The folder name of its run with a seed, which follows from the changes: studies share runs."""
        changes = ((key, json.dumps(value).strip('"[]')) for key, value in sorted(self.changes.items()))
        plain = [f"{key}-{re.sub('[^A-Za-z0-9._-]+', '-', text)}" for key, text in changes]
        name = "--".join([base, *plain])
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
        run = Run.read(runs_dir, base)
        if run.config.validation_interval is None:
            hint = "validation losses are compared; set validation_interval and validation_batches"
            raise InputError(f"{run.directory / 'train.json'}: has no validation, but {hint}")
        values = {file: read_json_object(run.directory / f"{file}.json") for file in CONFIGS}
        values["train"] = TrainConfig.from_old_keys(values["train"])  # so that a variation can replace them
        variants = [Variant(base, values)]
        for text in variations:
            variant = read_variation(text, variants[0])
            if same := next((other for other in variants if other.changes == variant.changes), None):
                raise InputError(f"--vary {text}: is the same as {same.label}; leave it out")
            variants.append(variant)
        first = run.config.random_seed
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
    """The variation of `base` that KEY=VALUE[,KEY=VALUE...] describes; values are JSON or plain words. Raises
    InputError for unknown keys, values that the configs refuse, and losses that could not be compared."""
    source = f"--vary {text}"
    values = {file: dict(contents) for file, contents in base.values.items()}
    changed = []
    for part in re.split(r",(?=\s*\w+\s*=)", text):  # not at the commas inside a list
        key, equals, word = (text.strip() for text in part.partition("="))
        if not (key and equals and word):
            raise InputError(f"{source}: must be KEY=VALUE[,KEY=VALUE...], such as drop_rate=0.1")
        if key in OLD_KEYS:
            raise InputError(f"{source}: {key} is an old key; vary {OLD_KEYS[key][1]} instead")
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
            continue
        values[KEYS[key]][key] = word
        with contextlib.suppress(ValueError):
            values[KEYS[key]][key] = json.loads(word)
    checked, before = as_checked(values, source), as_checked(base.values, base.label)
    if same := next((key for key in changed if checked[key] == before[key]), None):
        raise InputError(f"{source}: {same} is already {json.dumps(before[same])} in {base.label}")
    values["train"]["validation_batches"] = matching_batches(before, checked, source)
    return Variant(text, values, {key: checked[key] for key in changed})


def as_checked(values: Values, source: str) -> dict[str, Any]:
    """All keys of both configs, with their defaults, checked; errors name their `source`."""
    configs = (checked_config(config, values[file], source) for file, config in CONFIGS.items())
    return {key: value for config in configs for key, value in asdict(config).items()}


def matching_batches(base: dict[str, Any], config: dict[str, Any], source: str) -> int:
    """The validation_batches that make `config` validate on the base's tokens, whatever its microbatch.
    Raises InputError if no number does."""
    base_batch, batch = (keys["microbatch_size"] * keys["context_length"] for keys in (base, config))
    tokens = base["validation_batches"] * base_batch
    batches, rest = divmod(tokens, batch)
    if rest:
        multiple = math.lcm(base_batch, batch) // base_batch
        problem = f"its validation batches of {batch:,} tokens do not fill the base's {tokens:,}"
        raise InputError(f"{source}: {problem}; make the base's validation_batches a multiple of {multiple}")
    return batches


def write_run(folder: Path, values: Values, seed: int) -> None:
    """Write a run's two files with a seed. Raises InputError if the run has begun with other settings, apart
    from those that may change."""
    values = {**values, "train": {**values["train"], "random_seed": seed}}
    if (folder / METRICS).exists():
        earlier = {file: read_json_object(folder / f"{file}.json") for file in CONFIGS}
        old, new = as_checked(earlier, str(folder)), as_checked(values, str(folder))
        changed = [key for key in new if old[key] != new[key] and key not in MAY_CHANGE]
        changes = ", ".join(f"{key} {json.dumps(old[key])}, not {json.dumps(new[key])}" for key in changed)
        if changes:
            raise InputError(f"{folder}: was begun with {changes}; undo that or remove the folder")
    folder.mkdir(exist_ok=True)
    for file, contents in values.items():
        replace_text(folder / f"{file}.json", json.dumps(contents, indent=4) + "\n")
    Run.read(folder.parent, folder.name)


def final_loss(folder: Path) -> float | None:
    """The validation loss after a run's last step; None if it has not finished."""
    status = read_status(folder)
    if status.get("status") != "finished":
        return None
    losses = {line["step"]: line.get("val_loss") for line in read_metrics(folder / METRICS)}
    return losses.get(status.get("total_steps"))


def student_t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = `confidence`, in (0, 1), for Student's t; 4.303 for 0.95 and 2 degrees."""
    # With t = sqrt(degrees) tan(angle), the density is proportional to cos(angle) ** (degrees - 1).
    angles = np.linspace(0, math.pi / 2, 10_001)
    density = np.cos(angles) ** (degrees - 1)
    probabilities = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(degrees) * math.tan(np.interp(confidence * probabilities[-1], probabilities, angles))


@dataclass(frozen=True)
class Outcome:
    """The results of all seeds of the base or of a variation. Losses in nats per token."""

    label: str
    losses: list[float]
    differences: list[float]  # to the base with the same seed, where both have finished; empty for the base
    interval: tuple[float, float] | None  # of their mean; None for fewer than two

    @property
    def verdict(self) -> str:
        """Whether the difference stands out from the noise, in words."""
        if self.interval is None:
            return "needs two seeds"
        low, high = self.interval
        if low == high == 0:
            return "identical"
        return "better" if high < 0 else "worse" if low > 0 else "within noise"


def outcomes(study: Study) -> list[Outcome]:
    """The outcome of each variant, the base first, from the runs that have finished.

    The intervals are Student's t on differences paired by seed, not Welch's on two independent means: a seed
    gives both runs the same order of data and, where shapes agree, the same initial weights. Their effect on
    both losses cancels in the difference, and the interval holds even where they have none.
    """
    confidence, base, results = single_confidence(study), None, []
    for variant in study.variants:
        losses = {seed: final_loss(study.folder(variant, seed)) for seed in study.seeds}
        losses = {seed: loss for seed, loss in losses.items() if loss is not None}
        if base is None:
            base, differences = losses, []
        else:
            differences = [loss - base[seed] for seed, loss in losses.items() if seed in base]
        interval = None
        if (count := len(differences)) > 1:
            mean, spread = statistics.fmean(differences), statistics.stdev(differences)
            reach = student_t_quantile(confidence, count - 1) * spread / math.sqrt(count)
            interval = mean - reach, mean + reach
        results.append(Outcome(variant.label, list(losses.values()), differences, interval))
    return results


def single_confidence(study: Study) -> float:
    """The confidence of each interval, by Bonferroni, so that all of a study's hold with CONFIDENCE."""
    return 1 - (1 - CONFIDENCE) / max(1, len(study.variants) - 1)


def table(study: Study) -> str:
    """A Markdown table with a row for the base and each variation."""
    percent = f"{100 * single_confidence(study):.4g}%"
    header = "variation", "seeds", "validation loss", "range over seeds", "difference", f"{percent} interval"
    rows = []
    for index, outcome in enumerate(outcomes(study)):
        cells = [outcome.label, str(len(outcome.losses)), *[UNKNOWN] * 5]
        if outcome.losses:
            cells[2] = f"{statistics.fmean(outcome.losses):.4f}"
            cells[3] = f"{min(outcome.losses):.4f} to {max(outcome.losses):.4f}"
        if outcome.differences:
            cells[4] = f"{statistics.fmean(outcome.differences):+.4f}"
        if outcome.interval:
            cells[5] = "{:+.4f} to {:+.4f}".format(*outcome.interval)
        if index:
            missing = len(study.seeds) - len(outcome.differences)
            note = f", {missing} of {len(study.seeds)} seeds missing" if missing else ""
            cells[6] = outcome.verdict + note
        rows.append(cells)
    return markdown_table([*header, "verdict"], rows)


def notes(study: Study) -> list[str]:
    """How to read the table, and what to mistrust in it."""
    count, percent = len(study.variants) - 1, f"{100 * single_confidence(study):.4g}%"
    paragraphs = [
        "Losses are those of the validation after the last step, in nats per token. A difference is the loss "
        f"of the variation minus the loss of {study.base} with the same seed, averaged over the seeds; its "
        "interval is Student's t on these pairs."
    ]
    if count > 1:
        paragraphs[0] += f" Each interval has {percent} confidence, all {count} together {CONFIDENCE:.0%}."
    if any(outcome.verdict == "within noise" for outcome in outcomes(study)[1:]):
        meaning = "Within noise means not shown to differ, rather than shown to be equal"
        paragraphs.append(f"{meaning}. More --seeds make the intervals narrower.")
    if conditions := differing_conditions(study):
        differences = "; ".join(conditions)
        paragraphs.append(f"Warning: the losses may differ because the conditions did: {differences}.")
    return paragraphs


def differing_conditions(study: Study) -> list[str]:
    """Code, machine and data as the last checkpoints record them, where they differ and are not varied."""
    metas = []
    for folder in study.runs():
        for path in checkpointing.list_checkpoints(folder / CHECKPOINTS)[-1:]:
            with contextlib.suppress(InputError):
                metas.append(read_json_object(path / checkpointing.META_FILE))
    conditions = []
    varied = {key for variant in study.variants for key in variant.changes}
    for key in {"git_commit", "versions", "device", "processes", "precision", "data"} - varied:
        values = {json.dumps(meta.get(key)) for meta in metas}
        if len(values) > 1:
            conditions.append(key if key == "data" else f"{key} {' and '.join(sorted(values))}"[:200])
    return sorted(conditions)


def draw_chart(study: Study, path: Path) -> None:
    """Draw the difference of each variation to the base, with its interval and a dot per seed, as a PNG."""
    variations = [outcome for outcome in outcomes(study) if outcome.differences][::-1]
    with xkcd_chart(path, (11, 2.5 + 0.8 * len(variations))) as figure:
        axes = figure.subplots()
        axes.axvline(0, color="black", linewidth=1)
        for row, outcome in enumerate(variations):
            color = COLORS.get(outcome.verdict, "tab:gray")
            if outcome.interval:
                axes.plot(outcome.interval, (row, row), color=color, linewidth=4, solid_capstyle="butt")
            axes.plot(outcome.differences, [row] * len(outcome.differences), "o", color=color, alpha=0.6)
            transform = axes.get_yaxis_transform()
            axes.text(1.01, row, outcome.verdict, color=color, va="center", transform=transform)
        labels = [re.sub(r",(?=\s*\w+\s*=)", ",\n", outcome.label) for outcome in variations]
        axes.set_yticks(range(len(variations)), labels)
        axes.set(
            ylim=(-0.6, len(variations) - 0.4),
            xlabel=f"validation loss minus {study.base}'s, nats per token",
            title="each seed, and the interval of the mean",
        )
