"""The chart of a training run, in xkcd style."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from basemodel.common.xkcd import xkcd_chart
from basemodel.training.run_folder import read_metrics


def draw_chart(metrics: Path, chart: Path, title: str) -> None:
    """Draw loss, learning rate and gradient norm over the steps of a metrics.jsonl as a PNG. Steps are
    grouped into at most 200 bins, drawn as means and, for the loss, a band from min to max."""
    lines = read_metrics(metrics)
    trained = [line for line in lines if "train_loss" in line]
    validated = [line for line in lines if "val_loss" in line]
    bins = [part for part in np.array_split(np.arange(len(trained)), 200) if len(part)]

    def binned(key: str, statistic: Callable[[list[float]], float]) -> list[float]:
        values = ([trained[i][key] for i in part if trained[i][key] is not None] for part in bins)
        return [float(statistic(numbers)) if numbers else math.nan for numbers in values]

    with xkcd_chart(chart, (11, 11)) as figure:
        loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
        steps = binned("step", np.mean)
        low, high = binned("train_loss", min), binned("train_loss", max)
        loss.fill_between(steps, low, high, alpha=0.3, linewidth=0, label="train loss, min to max")
        loss.plot(steps, binned("train_loss", np.mean), label="train loss")
        if validated:
            points = [line["step"] for line in validated], [line["val_loss"] for line in validated]
            loss.plot(*points, marker="o", label="validation loss")
        loss.set(title=title, ylabel="nats per token")
        loss.legend()
        rate.plot(steps, binned("learning_rate", np.mean), color="tab:green")
        rate.set(ylabel="learning rate")
        norm.plot(steps, binned("grad_norm", np.mean), color="tab:red")
        norm.set(ylabel="gradient norm", xlabel="global step")
