"""What an ablation study came to: which differences stand out of the noise of its seeds."""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import checkpointing
from basemodel.common.errors import InputError
from basemodel.common.json_config import read_json_object
from basemodel.common.xkcd import xkcd_chart
from basemodel.results.intervals import mean_interval, student_t_quantile
from basemodel.results.study import Study, final_loss

CONFIDENCE = 0.95  # of all intervals of a study together
COLORS = {"better": "tab:green", "worse": "tab:red"}
UNKNOWN = "–"


@dataclass(frozen=True)
class Outcome:
    """What the seeds of the base, or of a variation, came to. Losses in nats per token."""

    label: str
    losses: list[float]
    differences: list[float]  # to the base with the same seed, where both have finished; empty for the base
    interval: tuple[float, float] | None  # of their mean; None for less than two
    missing: int  # seeds without a difference

    @property
    def verdict(self) -> str:
        """In words, whether the difference stands out of the noise."""
        if self.interval is None:
            return "needs two seeds"
        low, high = self.interval
        if low == high == 0:
            return "identical"
        return "better" if high < 0 else "worse" if low > 0 else "within noise"


def outcomes(study: Study) -> list[Outcome]:
    """The outcome of each variant, the base first, from the runs that have finished.

    The intervals are Student's t on differences paired by seed, not Welch's on two independent means: a seed
    gives both runs the same order of data and, where shapes agree, the same initial weights. What that adds
    to both losses drops out of the difference, and where it adds nothing the interval holds all the same.
    """
    confidence, base, found = single_confidence(study), {}, []
    for variant in study.variants:
        losses = {seed: final_loss(study.folder(variant, seed)) for seed in study.seeds}
        is_base, base = not base, base or losses
        both = [seed for seed in study.seeds if None not in (losses[seed], base[seed])]
        differences = [] if is_base else [losses[seed] - base[seed] for seed in both]
        interval = mean_interval(differences, confidence) if len(differences) > 1 else None
        finished = [loss for loss in losses.values() if loss is not None]
        missing = len(study.seeds) - len(both)
        found.append(Outcome(variant.label, finished, differences, interval, missing))
    return found


def single_confidence(study: Study) -> float:
    """The confidence of each interval (Bonferroni's), so that all of a study's hold with CONFIDENCE."""
    return 1 - (1 - CONFIDENCE) / max(1, len(study.variants) - 1)


def table(study: Study) -> str:
    """A Markdown table with a row for the base and each variation."""
    percent = f"{100 * single_confidence(study):.4g}%"
    header = "variation", "seeds", "validation loss", "range over seeds", "difference", f"{percent} interval"
    rows = [[*header, "verdict"], ["---"] * 7]
    for index, outcome in enumerate(outcomes(study)):
        cells = [outcome.label.replace("|", "\\|"), str(len(outcome.losses)), *[UNKNOWN] * 5]
        if outcome.losses:
            cells[2] = f"{statistics.fmean(outcome.losses):.4f}"
            cells[3] = f"{min(outcome.losses):.4f} to {max(outcome.losses):.4f}"
        if outcome.differences:
            cells[4] = f"{statistics.fmean(outcome.differences):+.4f}"
        if outcome.interval:
            cells[5] = "{:+.4f} to {:+.4f}".format(*outcome.interval)
        if index:
            lacks = f", {outcome.missing} of {len(study.seeds)} seeds missing" if outcome.missing else ""
            cells[6] = outcome.verdict + lacks
        rows.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def notes(study: Study) -> list[str]:
    """How to read the table, and what to mistrust in it."""
    count, variations = len(study.seeds), len(study.variants) - 1
    confidence = single_confidence(study)
    said = [
        "Losses are of the validation after the last step, in nats per token. A difference is the mean over "
        f"the seeds of the variation's loss minus {study.base}'s with the same seed; its interval is "
        "Student's t on these pairs."
    ]
    if variations > 1:
        said[0] += (
            f" Each interval has {100 * confidence:.4g}% confidence, so that all {variations} together have "
            f"{100 * CONFIDENCE:g}%."
        )
    if count > 1 and any(outcome.verdict == "within noise" for outcome in outcomes(study)[1:]):
        now, more = (student_t_quantile(confidence, n - 1) / n**0.5 for n in (count, count + 2))
        said.append(
            "Within noise means not shown to differ, rather than shown to be equal. With --seeds "
            f"{count + 2} the intervals would be about {more / now:.2f} times as wide."
        )
    if unlike := differing_conditions(study):
        said.append(f"Warning: the runs were not trained alike, which may show: {'; '.join(unlike)}.")
    return said


def differing_conditions(study: Study) -> list[str]:
    """What the last checkpoints say of code, machine and data, where that differs and is not varied."""
    metas = []
    for folder in study.runs():
        for path in checkpointing.list_checkpoints(folder / "checkpoints")[-1:]:
            try:
                metas.append(read_json_object(path / checkpointing.META_FILE))
            except InputError:
                continue
    found = []
    varied = {key for variant in study.variants for key in variant.changes}
    for key in {"git_commit", "versions", "device", "processes", "precision", "data"} - varied:
        values = {json.dumps(meta.get(key)) for meta in metas}
        if len(values) > 1:
            found.append(key if key == "data" else f"{key} {' and '.join(sorted(values))}"[:200])
    return sorted(found)


def draw_chart(study: Study, path: Path) -> None:
    """Draw each variation's difference to the base, with its interval and a dot for each seed, as a PNG."""
    found = [outcome for outcome in outcomes(study) if outcome.differences][::-1]
    with xkcd_chart(path, (11, 2.5 + 0.8 * len(found))) as figure:
        axes = figure.subplots()
        axes.axvline(0, color="black", linewidth=1)
        for row, outcome in enumerate(found):
            color = COLORS.get(outcome.verdict, "tab:gray")
            if outcome.interval:
                axes.plot(outcome.interval, (row, row), color=color, linewidth=4, solid_capstyle="butt")
            axes.plot(outcome.differences, [row] * len(outcome.differences), "o", color=color, alpha=0.6)
            place = {"va": "center", "transform": axes.get_yaxis_transform()}
            axes.text(1.01, row, outcome.verdict, color=color, **place)
        labels = [re.sub(r",(?=\s*\w+\s*=)", ",\n", outcome.label) for outcome in found]
        axes.set_yticks(range(len(found)), labels)
        axes.set(
            ylim=(-0.6, len(found) - 0.4),
            xlabel=f"validation loss minus {study.base}'s, nats per token",
            title="each seed, and the interval of the mean",
        )
