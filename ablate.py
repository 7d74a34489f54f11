#!/usr/bin/env python3
"""Which changes to a run help, and which differences are only the noise of the seed?

    python ablate.py demo datasets --vary drop_rate=0.1 --vary tie_weights=true,learning_rate=0.01
    python ablate.py baseline datasets --vary qkv_bias=true --seeds 5 --launch "torchrun --nproc_per_node=8"

Trains BASE and each variation with several seeds, one after another, as plain runs in runs/ that are named by
their changes: demo--drop_rate-0.1--seed-42. After a stop or a kill the same command continues; with more
--seeds or another --vary, it trains only the missing runs.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from basemodel.common.command_line import require_file_path, run_command, runs_dir_option
from basemodel.common.errors import InputError, RunError
from basemodel.common.names import METRICS
from basemodel.results.study import Study, draw_chart, final_loss, notes, outcomes, table
from basemodel.training.run_folder import is_locked, read_status


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("base", metavar="BASE")
@click.argument("datasets_dir", type=Path)
@click.option(
    "--vary",
    "variations",
    multiple=True,
    required=True,
    metavar="KEY=VALUE[,KEY=VALUE...]",
    help="Keys of train.json and model.json with the values of a variation; `default` leaves a key out.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, help="Number of seeds, from BASE's random_seed.")
@click.option(
    "--launch",
    default=shlex.quote(sys.executable),
    show_default="this Python",
    help='Command that starts ddp_train.py, such as "torchrun --nproc_per_node=8".',
)
@click.option("--chart", type=Path, default="ablate.png", help="PNG file to draw the chart to.")
@click.option("--report", is_flag=True, help="Train nothing and show the results so far.")
@click.option("--write", is_flag=True, help="Write the runs' folders and print their names; train nothing.")
@runs_dir_option
def main(
    base: str,
    datasets_dir: Path,
    variations: tuple[str, ...],
    seeds: int,
    launch: str,
    chart: Path,
    report: bool,
    write: bool,
    runs_dir: Path,
) -> int:
    """Train the run BASE and variations of it with several seeds, on data sets kept in DATASETS_DIR, and say
    which differences in validation loss stand out from the noise."""
    study = Study.plan(runs_dir, base, variations, seeds)
    require_file_path(chart)
    failed: dict[str, str] = {}
    if write:  # for a queue to train, such as SLURM's
        study.write_configs()
        print(*(folder.name for folder in study.runs()), sep="\n")
        return 0
    if not report:
        study.write_configs()
        trainings = Trainings(study, find_launcher(launch), datasets_dir)
        trainings.check()
        if stopped := trainings.run():
            print("Stopped; the same command continues", flush=True)
            return 128 + stopped
        failed = trainings.failed
    print(f"\n{table(study)}")
    for note in notes(study):
        print(f"\n{note}")
    if any(outcome.differences for outcome in outcomes(study)):
        draw_chart(study, chart)
        print(f"\nChart: {chart}")
    if failed:
        reasons = "; ".join(f"{name} {reason}" for name, reason in failed.items())
        raise RunError(f"{len(failed)} trainings failed; the same command tries them again: {reasons}")
    return 0


def find_launcher(launch: str) -> list[str]:
    """The command line that starts ddp_train.py. Raises InputError if there is no such program."""
    try:
        name, *options = shlex.split(launch)
    except ValueError:  # an open quote, or nothing at all
        raise InputError("--launch: must be a command, such as torchrun --nproc_per_node=8") from None
    # First beside this Python, because its environment may not be activated.
    program = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if program is None:
        raise InputError(f"--launch {launch}: there is no program '{name}'")
    return [program, *options]


class Trainings:
    """Trains the runs of a study one after another. A signal to stop also stops the current training."""

    def __init__(self, study: Study, launcher: list[str], datasets_dir: Path) -> None:
        self.study, self.launcher, self.datasets_dir = study, launcher, datasets_dir
        self.failed: dict[str, str] = {}  # reasons, by the run's name
        self.stopped: int | None = None  # by this signal
        self._process: subprocess.Popen | None = None

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
                signal.signal(number, self._stop)

    def _stop(self, number: int, _: object) -> None:
        self.stopped = self.stopped or number
        if self._process:
            self._process.terminate()  # it saves a checkpoint first

    def check(self) -> None:
        """Check each variant that has not begun, by `--plan` with this launcher and data. Raises InputError
        for the first that cannot be trained."""
        for variant in self.study.variants:
            folder = self.study.folder(variant, self.study.seeds[0])
            if self.stopped or (folder / METRICS).exists():
                continue
            process = self._start(folder, "--plan", output=subprocess.PIPE)
            _, output = process.communicate()
            if process.returncode and not self.stopped:
                errors = re.findall("^Error: (.*)", output, re.MULTILINE) or output.strip().splitlines()[-1:]
                raise InputError(f"{folder.name}: {errors[0] if errors else 'it cannot be started'}")

    def run(self) -> int | None:
        """Train the runs that have not finished; return the signal that stopped it, if one did. After a
        training that fails, the others still go on. Raises RunError if it is the first one."""
        runs = self.study.runs()
        for number, folder in enumerate(runs, start=1):
            self._wait_for_others()
            if not self.stopped and final_loss(folder) is None:
                print(f"\n[{number}/{len(runs)}] {folder.name}", flush=True)
                self._train(folder)
            if self.stopped:
                return self.stopped
            if self.failed and number == 1:
                raise RunError(f"{folder.name} {self.failed[folder.name]}")
        return None

    def _train(self, folder: Path) -> None:
        """Train one run to its end, or as far as it gets."""
        status = self._start(folder, "--resume").wait()
        self._process = None
        loss = final_loss(folder)
        # Stopped from outside, as on a preempted machine; torchrun says only that its workers failed.
        signals = [number for number in (signal.SIGTERM, signal.SIGINT) if status in (-number, 128 + number)]
        if not self.stopped and signals:
            self.stopped = signals[0]
        elif status == 0 and loss is not None:
            print(f"{folder.name}: validation loss {loss:.4f}", flush=True)
        elif not self.stopped:
            error = read_status(folder).get("error")
            ending = f"ended with exit status {status}" + ("" if status else ", without a result")
            self.failed[folder.name] = f"failed: {error}" if error else ending
            print(f"{folder.name} {self.failed[folder.name]}", flush=True)

    def _start(self, folder: Path, option: str, output: int | None = None) -> subprocess.Popen:
        """Start ddp_train.py for a run, in a process group of its own, so that Ctrl-C reaches it once."""
        words = [str(Path(__file__).with_name("ddp_train.py")), folder.name, str(self.datasets_dir), option]
        command = [*self.launcher, *words, "--runs-dir", str(folder.parent)]
        self._process = subprocess.Popen(command, process_group=0, stdout=output, stderr=output, text=True)
        if self.stopped:
            self._process.terminate()
        return self._process

    def _wait_for_others(self) -> None:
        """Wait for processes that still train runs of the study: a killed ablate.py leaves its training."""
        for folder in self.study.runs():
            if not self.stopped and is_locked(folder):
                pid = read_status(folder).get("pid")
                print(f"Waiting for process {pid}, which trains {folder.name}", flush=True)
            while not self.stopped and is_locked(folder):
                time.sleep(0.2)


if __name__ == "__main__":
    run_command(main)
