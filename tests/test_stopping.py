"""Processes that train together stop together: for a signal, for an error, and when one dies or hangs.

Trainings are forked from a process that has imported everything and computed nothing (see torture.py); so is
torchrun, where its own part is under test.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
import torch.distributed as dist
from forked import forked
from helpers import (
    FORKED,
    NO_CHART,
    Sandbox,
    Script,
    forked_children_of,
    is_alive,
    make_sandbox,
    random_tokens,
    reserve_port,
    step_reached,
    wait_for,
    write_dataset,
)
from torture import Training, assert_same_end, train

import checkpointing
from basemodel.common import command_line
from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError, RunError
from basemodel.training import processes, stopping
from basemodel.training.pending import PendingSteps

# ------------------------------------------------------------------------------------------------------------
# Signals
# ------------------------------------------------------------------------------------------------------------


def slow_save(rank: int) -> None:
    real = checkpointing.Saver._save
    checkpointing.Saver._save = lambda *arguments: time.sleep(1) or real(*arguments)


def slow_validation(rank: int) -> None:
    real = processes.World.any

    def slow(world: processes.World, flag: object) -> bool:
        if isinstance(flag, stopping.StopSignal):  # validation asks for it before each microbatch
            print("validating")
            time.sleep(0.3)
        return real(world, flag)

    processes.World.any = slow


def signals_itself(rank: int) -> None:
    """The second process, in step 6: far enough from the validation at step 10, which would tell all."""
    real = PendingSteps.add

    def add(steps: PendingSteps, step: int, result: torch.Tensor) -> None:
        real(steps, step, result)
        if rank == 1 and step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # for the thread that takes it

    PendingSteps.add = add


def second_validation(sandbox: Sandbox, run: str) -> bool:
    """Whether the run is in its second validation: three microbatches are two rounds of two processes."""
    return (sandbox.path / f"{run}.log").read_text().count("validating") >= 2 * 2 + 1


STEPS_WAIT = """
import time
from basemodel.training.pending import PendingSteps
add = PendingSteps.add
PendingSteps.add = lambda *arguments: time.sleep(0.03) or add(*arguments)
"""
MOMENTS = {
    "step": (signals_itself, None),
    "save": (slow_save, lambda sandbox, run: step_reached(sandbox, run, 5)()),
    "validation": (slow_validation, second_validation),
}


@pytest.mark.parametrize(
    ("moment", "number", "rank"),
    [("step", signal.SIGTERM, 1), ("save", signal.SIGINT, None), ("validation", signal.SIGTERM, 0)],
)
@forked
def test_a_signal_stops_all_after_the_same_step(
    tmp_path: Path, whole: Path, moment: str, number: int, rank: int | None
) -> None:
    """A run stops for a signal after the same step everywhere, says so, and goes on as if it had not."""
    sandbox = make_sandbox(tmp_path, "stopped")
    sandbox.run_dir("whole").symlink_to(whole)
    slow, reached = MOMENTS[moment]
    training = Training(sandbox, "stopped", "--collective-timeout", "5", patch=slow)
    if reached:
        training.wait_until(lambda: reached(sandbox, "stopped"))
        training.signal(number, rank)
    if rank is None:  # once more, as torchrun does with what the terminal has sent already
        time.sleep(0.01)
        training.signal(number)
    expected = [128 + number if rank in (None, each) else 128 + signal.SIGTERM for each in (0, 1)]
    assert training.wait() == expected
    status = sandbox.status("stopped")
    assert status["status"] == "preempted"
    (newest,) = sandbox.checkpoints("stopped")[-1:]
    assert newest.name == status["checkpoint"] and newest.name.endswith(f"-{status['step']}")
    if moment == "validation":
        lines = (sandbox.run_dir("stopped") / "metrics.jsonl").read_text().splitlines()
        validated = [line["step"] for line in map(json.loads, lines) if "val_loss" in line]
        assert status["step"] == 10 and 10 not in validated
    if moment == "step":
        assert status["step"] < 10
    train(sandbox, "stopped", "--resume")
    assert_same_end(sandbox, "stopped", "whole")
    assert not sandbox.run_dir("stopped").joinpath("checkpoints/latest").readlink().is_absolute()


@forked
def test_a_second_signal_ends_a_process_at_once_and_leaves_the_old_checkpoint(
    tmp_path: Path, whole: Path
) -> None:
    def patch(rank: int) -> None:
        real = checkpointing.fingerprint

        def stuck_in_the_second(path: Path) -> dict:
            if path.parent.name.startswith(".incomplete") and path.parent.name.endswith("-10"):
                time.sleep(60)
            return real(path)

        checkpointing.fingerprint = stuck_in_the_second
        stopping.REPEAT_SECONDS = 0.1

    sandbox = make_sandbox(tmp_path, "stopped")
    sandbox.run_dir("whole").symlink_to(whole)
    training = Training(sandbox, "stopped", patch=patch)
    training.wait_until(step_reached(sandbox, "stopped", 10))
    training.signal(signal.SIGTERM)
    time.sleep(0.5)  # an earlier one counts as the launcher's copy of the first
    training.signal(signal.SIGTERM)
    assert training.wait(120) == [128 + signal.SIGTERM] * 2
    assert "-iteration-5" in train(sandbox, "stopped", "--resume")
    assert_same_end(sandbox, "stopped", "whole")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_and_a_warning_of_slurm_stop_a_run_too(tmp_path: Path, number: int) -> None:
    sandbox = make_sandbox(tmp_path, "stopped")
    script = sandbox.start("stopped", before=f"{NO_CHART}\n{STEPS_WAIT}")
    wait_for(step_reached(sandbox, "stopped", 7), "the seventh step")
    script.signal(number)
    assert script.wait().returncode == 128 + number
    assert sandbox.status("stopped")["status"] == "preempted"
    assert sandbox.checkpoints("stopped")[-1].name.endswith(f"-{sandbox.status('stopped')['step']}")


def test_nohup_lets_a_run_go_on(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    script = sandbox.start("run", before=f"{NO_CHART}\n{STEPS_WAIT}\n{ignored}")
    wait_for(step_reached(sandbox, "run", 7), "the seventh step")
    script.signal(signal.SIGHUP)
    assert script.wait().returncode == 0


NOBODY_READS = {
    "a pipe whose reader has exited": "reader, out = os.pipe(); os.close(reader)",
    "a terminal that is gone": "import pty; terminal, out = pty.openpty(); os.close(terminal)",
    "a full disk": "out = os.open('/dev/full', os.O_WRONLY)",
    "closed": "out = None",
}
NOWHERE = """
for descriptor in (1, 2):
    os.dup2(out, descriptor) if out else os.close(descriptor)
if out is None:
    import sys
    sys.stdout = sys.stderr = None
"""


@pytest.mark.parametrize("output", NOBODY_READS)
def test_a_run_whose_output_is_lost_still_saves_when_it_is_stopped(tmp_path: Path, output: str) -> None:
    sandbox = make_sandbox(tmp_path, "stopped")
    before = f"import os; {NOBODY_READS[output]}\n{NOWHERE}\n{NO_CHART}\n{STEPS_WAIT}"
    script = sandbox.start("stopped", before=before)
    wait_for(lambda: step_reached(sandbox, "stopped", 7)() or script.has_ended, "the seventh step")
    script.signal(signal.SIGINT)
    assert script.wait().returncode == 130
    status = sandbox.status("stopped")
    assert status["status"] == "preempted" and status["step"] >= 7
    assert sandbox.checkpoints("stopped")[-1].name.endswith(f"-{status['step']}")


@forked
def test_the_search_for_a_microbatch_stops_for_a_signal(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", "-f")
    training.wait_until(lambda: "microbatch 2: fits" in training.log.read_text())
    training.signal(signal.SIGTERM, rank=1)
    assert training.wait() == [1, 1]
    said = training.log.read_text()
    assert "Error: stopped by a signal; the largest microbatch that fit so far was" in said


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------


def shout_at_once(rank: int) -> None:
    command_line.SILENCE_SECONDS = 0.0


@forked
def test_an_error_of_the_first_process_is_an_error_of_all_and_said_once(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "loud", "usual")
    training = Training(sandbox, "loud", "nonsense", patch=shout_at_once)
    assert training.wait() == [2, 2]
    assert training.log.read_text().count("nonsense: no such checkpoint; available: none") == 2
    # torchrun ends the other processes of a node as soon as the first has left: till then they are silent.
    training = Training(sandbox, "usual", "nonsense")
    assert training.wait(rank=0) == [2]
    time.sleep(0.3)
    said = training.log.read_text()
    training.signal(signal.SIGKILL, rank=1)
    assert training.wait(rank=1) == [-signal.SIGKILL]
    assert said.count("Error: ") == 1


@forked
def test_a_token_outside_the_vocabulary_is_found_by_whichever_process_looks(tmp_path: Path) -> None:
    """Each looks at a half, before the first step: 25 batches of 8 sequences of 16 use tokens 0 to 3200."""
    sandbox = make_sandbox(tmp_path, "run")
    for index in (0, 3000, 3200):
        tokens = random_tokens(4000)
        tokens[index] = 64
        write_dataset(sandbox.datasets / "test/tokens", train=tokens)
        training = Training(sandbox, "run", patch=shout_at_once)
        assert training.wait() == [2, 2]
        error = f"token 64 at index {index} is outside the model's vocabulary of 64"
        assert training.log.read_text().count(error) == 2
        assert not (sandbox.run_dir("run") / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (InputError("runs/x:\n no such run"), 2, "Error: runs/x: no such run\n"),
        (click.UsageError("No such option: --resum"), 2, "Error: No such option: --resum\n"),
        (RunError("another one has died"), 1, "Error: another one has died\n"),
        (OSError(28, "No space left on device"), 1, "Error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nError: interrupted\n"),
        (143, 143, ""),
        (None, 0, ""),
    ],
)
def test_exit_statuses_and_the_line_that_goes_with_them(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, outcome: object, status: int, said: str
) -> None:
    @click.command()
    def command() -> object:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr("sys.argv", ["script.py"])
    for name in ("stdout", "stderr"):  # which are replaced
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as left:
        run_command(command)
    assert (left.value.code, capfd.readouterr().err) == (status, said)


# ------------------------------------------------------------------------------------------------------------
# A process that dies, hangs or never comes
# ------------------------------------------------------------------------------------------------------------


@forked
def test_when_a_process_dies_the_others_end(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run")
    training.wait_until(step_reached(sandbox, "run", 7))
    training.signal(signal.SIGKILL, rank=1)
    assert training.wait(120) == [1, -signal.SIGKILL]
    assert "Error: another training process died or hung" in training.log.read_text()
    assert sandbox.status("run")["status"] == "failed"


@forked
def test_when_a_process_hangs_the_others_end_at_the_timeout(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", "--collective-timeout", "2")
    training.wait_until(step_reached(sandbox, "run", 7))
    training.signal(signal.SIGSTOP, rank=1)
    left = training.wait(30, rank=0)
    training.signal(signal.SIGKILL, rank=1)
    assert (left, training.wait(rank=1)) == ([1], [-signal.SIGKILL])
    assert "died or hung" in training.log.read_text()


def hung_device(rank: int) -> None:
    """The eighth step's result never arrives, and nothing raises an error, as on a GPU when NCCL hangs."""
    real = PendingSteps.add

    def add(self: PendingSteps, step: int, result: torch.Tensor) -> None:
        real(self, step, result)
        if step == 8:
            self._queue[-1] = (*self._queue[-1][:2], SimpleNamespace(synchronize=threading.Event().wait))

    PendingSteps.add = add


@forked
def test_when_a_gpu_hangs_all_end_at_the_timeout(tmp_path: Path, whole: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    sandbox.run_dir("whole").symlink_to(whole)
    training = Training(sandbox, "run", "--collective-timeout", "1", patch=hung_device)
    assert training.wait(120) == [1, 1]
    line = "Error: another training process died or hung; restart with --resume, or"
    assert training.log.read_text().count(line) == 2
    assert sandbox.status("run")["status"] == "failed" and "died or hung" in sandbox.status("run")["error"]
    assert "Resuming after step 5" in train(sandbox, "run", "--resume")
    assert_same_end(sandbox, "run", "whole")


@forked
def test_a_signal_ends_a_process_that_hangs(tmp_path: Path) -> None:
    def impatient(rank: int) -> None:
        stopping.GRACE_SECONDS = 1.0

    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", patch=impatient)
    training.wait_until(step_reached(sandbox, "run", 7))
    training.signal(signal.SIGSTOP, rank=1)
    time.sleep(0.5)  # till the first waits for it
    training.signal(signal.SIGTERM, rank=0)
    left = training.wait(30, rank=0)
    training.signal(signal.SIGKILL, rank=1)
    assert (left, training.wait(rank=1)) == ([1], [-signal.SIGKILL])
    assert sandbox.status("run")["status"] == "failed" and "died or hung" in training.log.read_text()


@forked
def test_a_save_may_take_longer_than_the_timeout(tmp_path: Path, whole: Path) -> None:
    """The processes wait for it before the next one, and at the end."""

    def very_slow_save(rank: int) -> None:
        real = checkpointing.Saver._save
        checkpointing.Saver._save = lambda *arguments: time.sleep(3) or real(*arguments)

    sandbox = make_sandbox(tmp_path, "run", checkpoint_interval=15)
    train(sandbox, "run", "--collective-timeout", "1", patch=very_slow_save)
    assert [path.name.rpartition("-")[2] for path in sandbox.checkpoints("run")] == ["15", "30"]


def test_processes_wait_ten_minutes_in_all_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each of them: here the second comes in time, and the third too late."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 3)]))
    monkeypatch.setattr(processes, "START_SECONDS", 2.0)
    for rank, seconds in ((1, 1.0), (2, 2.7)):
        threading.Timer(seconds, store.set, (f"member/{rank}", "here")).start()
    with pytest.raises(RunError, match="process 0 of 3 waited 2 s for the others to start"):
        processes.store_of_these_processes(0, 3)
    assert not store.check(["members"])


def test_a_process_whose_others_do_not_start_ends_too(sandbox: Sandbox) -> None:
    sandbox.write_run()
    with reserve_port() as holder:
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(holder.getsockname()[1])
        soon = "from basemodel.training import processes; processes.START_SECONDS = 1.0"
        done = Script(sandbox.command("tiny"), env, before=soon).wait(120)
    error = "Error: process 0 of 2 waited 1 s for the others to start"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, error)


# ------------------------------------------------------------------------------------------------------------
# torchrun
# ------------------------------------------------------------------------------------------------------------


# It names callers in logs that nobody asks for, and to find a name it searches all modules: so long, where
# thousands are loaded, that on a busy machine a launcher takes the other one for dead.
NAMELESS = "from torch.distributed.elastic.rendezvous import dynamic_rendezvous as rendezvous\n"
NAMELESS += "rendezvous.get_method_name = lambda *_: ''"


@pytest.fixture
def torchrun() -> Iterator[Callable[..., Script]]:
    """A function that starts torchrun's agent for a run; with the test all that it has started ends."""
    agents: list[Script] = []

    def start(
        sandbox: Sandbox, run: str, *launch: str, options: tuple[str, ...] = (), before: str = ""
    ) -> Script:
        processes = 1 if "--nnodes" in launch[0] else 2
        command = sandbox.command(run, *options, processes=processes, torchrun=launch)
        # The second: else torchrun (2.13) tells a node that joins later nothing of the store it has kept.
        env = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        agents.append(Script(command, env, f"{before}\n{NAMELESS}\n{FORKED}"))
        return agents[-1]

    yield start
    for agent in agents:
        print(agent.stdout, agent.stderr, sep="\n")  # for whoever looks into a failure
        if not agent.has_ended:
            kill_node(agent)


def kill_node(agent: Script) -> None:
    """End an agent and its workers, each of which leads a group of its own, as a power cut would."""
    workers = forked_children_of(agent.pid)
    agent.kill()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def test_torchrun_restarts_a_run_as_often_as_it_may(tmp_path: Path, whole: Path, torchrun) -> None:
    sandbox = make_sandbox(tmp_path, "killed")
    sandbox.run_dir("whole").symlink_to(whole)
    # Without --resume too: a process that is started again goes on.
    agent = torchrun(sandbox, "killed", "--standalone", "--max-restarts=1")
    wait_for(step_reached(sandbox, "killed", 7), "the seventh step")
    os.kill(forked_children_of(agent.pid)[-1], signal.SIGKILL)
    wait_for(lambda: "Resuming after step" in agent.stdout, "the restart")
    workers = forked_children_of(agent.pid)
    os.kill(workers[0], signal.SIGKILL)
    assert agent.wait().returncode == 1
    assert len(workers) == 2 and not any(map(is_alive, workers))
    assert not list(sandbox.run_dir("killed").glob("earlier-*"))
    sandbox.train("killed", "--resume", processes=2)
    assert_same_end(sandbox, "killed", "whole")


def test_a_node_that_was_killed_and_started_again_is_taken_back(
    tmp_path: Path, whole: Path, torchrun
) -> None:
    sandbox = make_sandbox(tmp_path, "killed")
    sandbox.run_dir("whole").symlink_to(whole)
    with reserve_port() as holder:
        port = holder.getsockname()[1]
        launch = (
            *("--nnodes=2", "--max-restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"),
            "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=5",
        )
        nodes = [torchrun(sandbox, "killed", *launch)]
        wait_for(lambda: listens(port), "the node that holds the rendezvous")
        nodes.append(torchrun(sandbox, "killed", *launch))
        wait_for(step_reached(sandbox, "killed", 7), "the seventh step")
        kill_node(nodes.pop())
        nodes.append(torchrun(sandbox, "killed", *launch))
        for node in nodes:
            done = node.wait()
            assert done.returncode == 0, done.stderr
    assert_same_end(sandbox, "killed", "whole")


# Else the run could be over before the other node is there.
STOPPED_ONCE = """
import os, signal
from basemodel.results.reporting import Reporter
log = Reporter.step
def step(self, number, *arguments):
    log(self, number, *arguments)
    marker = self.run.directory / "stopped"
    if number == 7 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
Reporter.step = step
"""


def test_a_node_that_joins_later_restarts_the_run_where_it_was(tmp_path: Path, whole: Path, torchrun) -> None:
    """Without --resume, and although no launcher counts that as a restart."""
    sandbox = make_sandbox(tmp_path, "joined")
    sandbox.run_dir("whole").symlink_to(whole)
    with reserve_port() as holder:
        launch = (
            *("--nnodes=1:2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{holder.getsockname()[1]}"),
            *("--rdzv_id=same", "--rdzv_conf=last_call_timeout=1"),
        )
        nodes = [torchrun(sandbox, "joined", *launch, before=STOPPED_ONCE)]
        wait_for((sandbox.run_dir("joined") / "stopped").exists, "the seventh step")
        (worker,) = forked_children_of(nodes[0].pid)
        nodes.append(torchrun(sandbox, "joined", *launch))
        wait_for(lambda: is_asked_to_stop(worker), "the first launcher to notice the second")
        os.kill(worker, signal.SIGCONT)
        for node in nodes:
            done = node.wait()
            assert done.returncode == 0, done.stderr
        assert any("Resuming after step" in node.stdout for node in nodes)
        assert sandbox.metrics("joined", "step") == sandbox.metrics("whole", "step")
        assert sandbox.metrics("joined") == pytest.approx(sandbox.metrics("whole"), rel=0.05)
        assert not list(sandbox.run_dir("joined").glob("earlier-*"))


def test_launches_have_names_of_their_own_and_their_attempts_have_not(monkeypatch) -> None:
    """By the folders that torchrun makes, whatever its --rdzv_id."""

    def launcher(folder: str, attempt: int = 0) -> tuple[str, ...]:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "same")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/{folder}/same_x/attempt_{attempt}/0/error.json")
        return processes.World(0, 0, 1, 1, torch.device("cpu"), control=None).launchers()

    assert launcher("torchelastic_a") == launcher("torchelastic_a", 1) != launcher("torchelastic_b")


def is_asked_to_stop(process: int) -> bool:
    """Whether a stopped process has a SIGTERM to look at once it goes on."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)[1]
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_restart_waits_for_what_a_killed_launcher_has_left(tmp_path: Path, whole: Path, torchrun) -> None:
    sandbox = make_sandbox(tmp_path, "orphaned")
    sandbox.run_dir("whole").symlink_to(whole)
    launcher = torchrun(sandbox, "orphaned", "--standalone")
    wait_for(step_reached(sandbox, "orphaned", 7), "the seventh step")
    orphans = forked_children_of(launcher.pid)
    for orphan in orphans:
        os.kill(orphan, signal.SIGSTOP)
    launcher.signal(signal.SIGKILL)
    restarted = torchrun(sandbox, "orphaned", "--standalone", options=("--resume",))
    try:
        waiting = f"Waiting up to 900 s for another process of this run (pid {orphans[0]}) to end"
        wait_for(lambda: waiting in restarted.stdout or restarted.has_ended, "the one that waits")
        assert not restarted.has_ended, restarted.stderr
    finally:
        for orphan in orphans:
            os.kill(orphan, signal.SIGCONT)
    done = restarted.wait()
    assert done.returncode == 0, done.stderr
    assert "Resuming after step" in done.stdout and not any(map(is_alive, orphans))
    assert_same_end(sandbox, "orphaned", "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_that_goes_takes_no_step_with_it_under_torchrun(
    tmp_path: Path, torchrun, number: int
) -> None:
    """As with `2>&1 | tee log`: all get the signal, torchrun passes it on once more, later than anybody else
    might wait, and nobody reads on."""
    sandbox = make_sandbox(tmp_path, "stopped")
    before = f"import os; {NOBODY_READS['a pipe whose reader has exited']}\n{NOWHERE}\n{STEPS_WAIT}"
    before += "\nfrom basemodel.training import stopping; stopping.REPEAT_SECONDS = 0.0"
    agent = torchrun(sandbox, "stopped", "--standalone", before=before)
    wait_for(step_reached(sandbox, "stopped", 7), "the seventh step")
    for process in (*forked_children_of(agent.pid), agent.pid):
        os.kill(process, number)
    assert agent.wait().returncode != 0
    status = sandbox.status("stopped")
    assert status["status"] == "preempted" and status["step"] < 30
    assert sandbox.checkpoints("stopped")[-1].name.endswith(f"-{status['step']}")


def listens(port: int) -> bool:
    """Whether a process of this machine listens on a port."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_torchrun_passes_the_one_line_on(sandbox: Sandbox, torchrun) -> None:
    sandbox.write_run(train={"min_train_tokens": 10_000})
    done = torchrun(sandbox, "tiny", "--standalone").wait()
    assert done.returncode == 1, "torchrun's own"
    assert sum(line.startswith("Error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert not (sandbox.run_dir("tiny") / "status.json").exists()
