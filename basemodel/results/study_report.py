"""The results of an ablation study: which differences stand out from the noise of its seeds."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import checkpointing
from basemodel.common.errors import InputError
from basemodel.common.json_config import read_json_object
from basemodel.common.tables import markdown_table
from basemodel.common.xkcd import xkcd_chart
from basemodel.results.study import Study, final_loss

CONFIDENCE = 0.95  # of all intervals of a study together
COLORS = {"better": "tab:green", "worse": "tab:red"}
UNKNOWN = "–"


def student_t_within(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(theta)) for Student's t with a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    odd, cosine = degrees % 2, math.cos(theta)
    term = math.sin(theta) * (cosine if odd else 1.0)
    total = 0.0
    for factor in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * factor / (factor + 1)
    return 2 / math.pi * (theta + total) if odd else total


def student_t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = `confidence`, in (0, 1), by bisection; 4.303 for 0.95 and 2 degrees."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """The t interval around the mean of two or more independent values."""
    reach = student_t_quantile(confidence, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


@dataclass(frozen=True)
class Outcome:
    """The results of all seeds of the base or of a variation. Losses in nats per token."""

    label: str
    losses: list[float]
    differences: list[float]  # to the base with the same seed, where both have finished; empty for the base
    interval: tuple[float, float] | None  # of their mean; None for fewer than two
    missing: int  # seeds without a difference

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
    confidence, base, results = single_confidence(study), {}, []
    for variant in study.variants:
        losses = {seed: final_loss(study.folder(variant, seed)) for seed in study.seeds}
        is_base, base = not base, base or losses
        pairs = [(losses[seed], base[seed]) for seed in study.seeds]
        pairs = [(loss, base_loss) for loss, base_loss in pairs if None not in (loss, base_loss)]
        differences = [] if is_base else [loss - base_loss for loss, base_loss in pairs]
        interval = mean_interval(differences, confidence) if len(differences) > 1 else None
        finished = [loss for loss in losses.values() if loss is not None]
        missing = len(study.seeds) - len(pairs)
        results.append(Outcome(variant.label, finished, differences, interval, missing))
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
            missing = f", {outcome.missing} of {len(study.seeds)} seeds missing" if outcome.missing else ""
            cells[6] = outcome.verdict + missing
        rows.append(cells)
    return markdown_table([*header, "verdict"], rows)


def notes(study: Study) -> list[str]:
    """How to read the table, and what to mistrust in it."""
    count, variations = len(study.seeds), len(study.variants) - 1
    confidence = single_confidence(study)
    paragraphs = [
        "Losses are those of the validation after the last step, in nats per token. A difference is the loss "
        f"of the variation minus the loss of {study.base} with the same seed, averaged over the seeds; its "
        "interval is Student's t on these pairs."
    ]
    if variations > 1:
        paragraphs[0] += (
            f" Each interval has {100 * confidence:.4g}% confidence, so that all {variations} together have "
            f"{100 * CONFIDENCE:g}%."
        )
    if count > 1 and any(outcome.verdict == "within noise" for outcome in outcomes(study)[1:]):
        now, more = (student_t_quantile(confidence, n - 1) / n**0.5 for n in (count, count + 2))
        paragraphs.append(
            "Within noise means not shown to differ, rather than shown to be equal. With --seeds "
            f"{count + 2} the intervals would be about {more / now:.2f} times as wide."
        )
    if conditions := differing_conditions(study):
        differences = "; ".join(conditions)
        paragraphs.append(f"Warning: the losses may differ because the conditions did: {differences}.")
    return paragraphs


def differing_conditions(study: Study) -> list[str]:
    """Code, machine and data as the last checkpoints record them, where they differ and are not varied."""
    metas = []
    for folder in study.runs():
        for path in checkpointing.list_checkpoints(folder / "checkpoints")[-1:]:
            try:
                metas.append(read_json_object(path / checkpointing.META_FILE))
            except InputError:
                continue
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
