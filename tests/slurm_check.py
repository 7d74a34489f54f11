"""`make slurm`: jobs of a real SLURM of two nodes that are requeued and run out of time end with the bits of
one that is left alone. It starts one by slurm_cluster.sh, as root."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Sandbox, random_tokens, wait_for, write_dataset

CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
# Steps of about a quarter of a second.
MODEL = {"context_length": 128, "emb_dim": 128, "n_layers": 4, "drop_rate": 0.1}
TRAIN = {"microbatch_size": 16, "global_batch_size": 32, "epochs": 999, "min_train_tokens": 300 * 32 * 128}
TRAIN |= {"checkpoint_interval": 100, "learning_rate": 0.001}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([CLUSTER, "start", folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        wait_for(lambda: said("sinfo", "--noheader").count("idle") == 1, "two idle nodes", 30)
        yield folder
    print((folder / "jobs.log").read_text())
    subprocess.run([CLUSTER, "stop", folder], check=True)


@pytest.fixture
def runs(tmp_path: Path) -> Sandbox:
    sandbox = Sandbox(tmp_path)
    write_dataset(sandbox.datasets / "test/tokens", validation=random_tokens(4000, seed=1))
    for run in ("whole", "halted"):
        sandbox.write_run(run, MODEL, TRAIN)
    return sandbox


def said(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def submit(sandbox: Sandbox, run: str, *options: str) -> str:
    """Submit a training; return the job's number."""
    words = ["sbatch", "--parsable", f"--output={sandbox.path}/%x-%j.log", *options]
    script = [ROOT / "slurm/train.sbatch", run, sandbox.datasets, "--runs-dir", sandbox.path / "runs"]
    return said(*words, f"--job-name={run}", *script).strip()


def shown(job: str, key: str) -> str:
    return re.search(rf"{key}=(\S+)", said("scontrol", "show", "job", job))[1]


def wait_for_job(job: str, condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    """Wait for a job, which need not sit in the queue for two minutes before SLURM starts it again."""

    def holds() -> bool:
        if condition():
            return True
        time.sleep(0.5)
        if shown(job, "JobState") == "PENDING":
            time.sleep(3)  # else SLURM takes the job for the one that it has just ended
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)
        return False

    wait_for(holds, what, seconds)


def wait_for_step(sandbox: Sandbox, job: str, run: str, step: int) -> None:
    """Wait until a run is under way and past a step."""

    def has_trained() -> bool:
        status = sandbox.run_dir(run) / "status.json"
        now = json.loads(status.read_text()) if status.exists() else {"status": None}
        return now["status"] == "running" and now["step"] >= step

    wait_for_job(job, has_trained, f"step {step} of {run}")


def wait_for_end(sandbox: Sandbox, job: str, seconds: float = 900) -> None:
    ends = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED")
    wait_for_job(job, lambda: shown(job, "JobState") in ends, f"the end of job {job}", seconds)
    log = "".join(path.read_text() for path in sandbox.path.glob(f"*-{job}.log"))
    assert shown(job, "JobState") == "COMPLETED", log


def sha256_of(sandbox: Sandbox, run: str) -> list[str]:
    last = sandbox.checkpoints(run)[-1]
    return [
        hashlib.sha256((last / f"{part}.safetensors").read_bytes()).hexdigest()
        for part in ("model", "optimizer")
    ]


@pytest.mark.parametrize("options", [(), ("--nodes=2",)])
def test_a_job_requeued_three_times_and_once_out_of_time_ends_like_one_left_alone(
    slurm: Path, runs: Sandbox, options: tuple[str, ...]
) -> None:
    wait_for_end(runs, submit(runs, "whole", *options))
    job = submit(runs, "halted", *options, "--time=1", "--signal=B:TERM@10")
    for restarts in range(3):
        wait_for_step(runs, job, "halted", 10 + 10 * restarts)
        said("scontrol", "requeue", job)
        wait_for_job(job, lambda: shown(job, "JobState") == "PENDING", "the queue")
        status = runs.status("halted")
        assert status["status"] == "preempted" and status["checkpoint"].endswith(f"-{status['step']}")
    wait_for_end(runs, job)
    assert int(shown(job, "Restarts")) >= 4, "three of the test's, and its time"
    stops = [int(path.name.rpartition("-")[2]) for path in runs.checkpoints("halted")]
    hashes = {run: sha256_of(runs, run) for run in ("whole", "halted")}
    print(json.dumps({"checkpoints": stops, **hashes}, indent=1))
    assert hashes["halted"] == hashes["whole"]


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Path, runs: Sandbox) -> None:
    job = submit(runs, "halted")
    wait_for_step(runs, job, "halted", 5)
    said("scancel", job)
    wait_for(lambda: not said("squeue", "--noheader"), "its end", 60)
    assert shown(job, "JobState") == "CANCELLED"
    assert runs.status("halted")["status"] == "preempted"
    assert runs.checkpoints("halted")[-1].name.endswith(f"-iteration-{runs.status('halted')['step']}")


def test_an_array_trains_the_runs_that_ablate_writes(slurm: Path, runs: Sandbox) -> None:
    """And only the one whose time is up saves and is queued again."""
    train = {**TRAIN, "min_train_tokens": 20 * 32 * 128, "validation_interval": 10, "validation_batches": 1}
    runs.write_run("base", MODEL, train)
    study = [ROOT / "ablate.py", "base", runs.datasets, "--vary", "drop_rate=0", "--seeds", "2"]
    study = [sys.executable, *study, "--runs-dir", runs.path / "runs", "--chart", runs.path / "chart.png"]
    names = said(*study, "--write").split()
    assert len(names) == 4
    (runs.path / "runs.txt").write_text("".join(f"{name}\n" for name in names))
    words = ["sbatch", "--parsable", "--array=1-4", f"--output={runs.path}/%x-%A-%a.log"]
    script = [ROOT / "slurm/train.sbatch", runs.path / "runs.txt", runs.datasets, "--runs-dir"]
    array = said(*words, *script, runs.path / "runs").strip()
    last = f"{array}_4"
    wait_for_step(runs, last, names[3], 3)
    said("scancel", "--batch", "--signal=TERM", last)  # what --signal=B:TERM@120 does
    wait_for_job(last, lambda: not said("squeue", "--noheader"), "the array", 600)
    assert {runs.status(name)["status"] for name in names} == {"finished"}
    assert [shown(f"{array}_{task}", "Restarts") for task in range(1, 5)] == ["0", "0", "0", "1"]
    assert "| drop_rate=0 | 2 |" in said(*study, "--report")
