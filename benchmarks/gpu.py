"""The acceptance run on one CUDA GPU, offline: is it right, how fast is it, does a real run get through?

    python benchmarks/gpu.py all                  every part, each in a process of its own, 8 minutes at most
    python benchmarks/gpu.py speed --out DIR      one part; its table is printed and kept in DIR/speed.md
    python benchmarks/gpu.py run --datasets-dir DIR       on the tokens of DIR/OWNER/NAME
    python benchmarks/gpu.py lease --minutes 9    what tells most in minutes: lease.py
    python benchmarks/gpu.py all --tiny           a rehearsal with a tiny model, on a CPU too

`correct` runs `pytest -m gpu`. `speed` measures GPT-2 small's training step, one change at a time, beside the
plain step of reference.py. `run` finds the largest microbatch, trains GPT-2 small, kills the training and
resumes it. `recipe` trains it by the best published, an earlier and the recommended recipe, on the same
tokens. MFU is a share of the device's peak rate in basemodel/planning/machines.py, whatever the precision.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import lease
from common import ROOT, measured_code, require, run_python
from gpu_parts import LIMIT, VOCABULARY_CACHE, Report, Setup, measure, recipe, run, speed

from basemodel.common.command_line import run_command
from basemodel.common.errors import RunError


def correct(setup: Setup, report: Report) -> None:
    """Run the tests that are marked gpu. Raises RunError if one fails, or if all are skipped."""
    try:
        import pytest
    except ImportError:
        raise RunError("pytest is missing: pip install pytest") from None
    table, outcomes = report, []
    table.table("test", "result", "seconds", "why")

    class Tabulator:
        """A plugin of pytest that makes each test a row of the table as soon as it has ended."""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes.append(report.outcome)
                skip = report.longrepr[2] if report.outcome == "skipped" else ""
                crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", skip)
                name, why = (
                    " ".join(text.split()).replace("|", "\\|")[:200]
                    for text in (report.nodeid.rpartition("::")[2], crash)
                )
                table.row(f"`{name}`", report.outcome, f"{report.duration:.1f}", why)

    # Neither conftest.py nor xdist, and what they need, is needed here.
    options = ["-m", "gpu", "-o", "addopts=", "-q", "--tb=short", "--noconftest", "-p", "no:cacheprovider"]
    if setup.tiny:  # a rehearsal has no GPU, and the test suite runs what needs none
        options += ["-k", "cuda"]
    table.silent = True  # while pytest prints
    status = pytest.main([*options, str(ROOT / "tests/test_gpu.py")], plugins=[Tabulator()])
    table.silent = False
    print("\n" + table.path.read_text(encoding="utf-8"), end="", flush=True)
    if status:
        raise RunError(f"{outcomes.count('failed')} of {len(outcomes)} tests failed (pytest {int(status)})")
    if set(outcomes) == {"skipped"} and not setup.tiny:
        raise RunError("all tests were skipped")


PARTS = {"correct": correct, "speed": speed, "run": run, "recipe": recipe}


def run_all(out: Path, arguments: list[str]) -> int:
    """Run each part in a process of its own; return 1 if one failed or took too long, else 0."""
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory(
        ignore_cleanup_errors=True
    ) as folder:  # also for what a part that is killed leaves behind
        for part in PARTS:
            print(f"\n# {part}\n", flush=True)
            start = time.monotonic()
            command = [sys.executable, __file__, part, *arguments]
            env = {**os.environ, "TMPDIR": folder, "TIKTOKEN_CACHE_DIR": str(VOCABULARY_CACHE)}
            process = subprocess.Popen(command, env=env, process_group=0)
            try:
                status = process.wait(LIMIT)
                result = "passed" if status == 0 else f"FAILED with status {status}"
            except subprocess.TimeoutExpired:
                result = f"FAILED: not finished after {LIMIT:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
            results[part] = f"{result} | {time.monotonic() - start:.0f}"
    report = Report(out / "all.md")
    report.table("part", "result", "seconds")
    for part, result in results.items():
        report.row(part, result)
    return int(any("FAILED" in result for result in results.values()))


def device_facts() -> dict[str, str | float]:
    """The device's name and memory in GiB, from another process: this one leaves the device alone."""
    code = """if True:
        import json, torch
        there = torch.cuda.is_available()
        device = torch.cuda.get_device_properties(0) if there else None
        name, memory = (device.name, device.total_memory / 2**30) if there else ("no GPU", 0.0)
        print(json.dumps({"name": name, "memory": memory, "cuda": torch.version.cuda or "none"}))
    """
    return json.loads(run_python("-c", code))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("part", type=click.Choice([*PARTS, "all", "lease"]))
@click.option("--datasets-dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu-results"), show_default=True)
@click.option("--tiny", is_flag=True, help="A tiny model, for a CPU.")
@click.option("--minutes", type=float, default=9.0, show_default=True, help="The most that lease may take.")
@click.option("--only", help="Stages of lease, separated by commas.  [default: all]")
@click.option("--measure", "setting", hidden=True)
@click.option("--worker", hidden=True)
def main(
    part: str,
    datasets_dir: Path | None,
    out: Path,
    *,
    tiny: bool,
    minutes: float,
    only: str | None,
    setting: str | None,
    worker: str | None,
) -> int:
    """Run PART of the acceptance run, or all; exit status 1 if something failed.

    Tokens are those of DATASETS_DIR/OWNER/NAME, by default the documentation that comes with Python.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without what is below each `finally`
    if setting:
        print(json.dumps(measure(json.loads(setting))))
        return 0
    stages = (worker or only or ",".join(lease.STAGES)).split(",")
    unknown = [stage for stage in stages if stage not in lease.STAGES]
    require(not unknown, f"--only: no stage {', '.join(unknown)}; there are {', '.join(lease.STAGES)}")
    options = ["--datasets-dir", str(datasets_dir)] if datasets_dir else []
    options += ["--out", str(out), *["--tiny"] * tiny]
    if part == "lease" and not worker:
        return lease.conduct(stages, out, minutes, options)
    facts = device_facts()
    require(tiny or facts["memory"] > 0, "torch.cuda is not available; --tiny rehearses on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    if part == "all":
        return run_all(out, options)
    if part == "lease":
        lease.work(stages, Setup(datasets_dir, tiny, facts["name"], facts["memory"]), out, minutes)
        return 0
    report = Report(out / f"{part}.md")
    code = measured_code()
    report.say(
        f"{part}: {facts['name']}, {facts['memory']:.0f} GiB, CUDA {facts['cuda']}, torch {code['torch']}"
    )
    report.say(
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, commit {code['commit']}{', tiny' * tiny}"
    )
    setup = Setup(datasets_dir, tiny, facts["name"], facts["memory"])
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(setup):
            setup.folder = Path(folder)
            PARTS[part](setup, report)
    except Exception as error:
        report.say(f"\nFAILED after {setup.seconds():.0f} s: {' '.join(str(error).split())}")
        raise
    report.say(f"\nPassed in {setup.seconds():.0f} s")
    return 0


if __name__ == "__main__":
    run_command(main)
