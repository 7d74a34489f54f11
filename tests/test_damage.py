"""Damaged files, full disks, numbers that are none, data that have changed, paths that lead astray."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    Hub,
    Sandbox,
    forked,
    make_sandbox,
    random_tokens,
    run_script,
    step_reached,
    write_dataset,
)
from safetensors.torch import load_file
from torture import Training, assert_same_end, train

import checkpointing
import loss
import reporting
from config import InputError


def write_checkpoints(folder: Path, steps: int = 3) -> list[Path]:
    """Small checkpoints of step 1 to `steps`, the second the best, with their links."""
    paths = []
    for step in range(1, steps + 1):
        tensors = {"value": torch.full((8,), float(step))}
        meta = {key: {} for key in checkpointing.REQUIRED_META - {"files"}}
        meta |= {"global_step": step, "is_best": step <= 2}
        paths.append(checkpointing.save_checkpoint(folder, tensors, tensors, meta))
        checkpointing.point_link(folder, "latest", paths[-1])
        if step <= 2:
            checkpointing.point_link(folder, "best", paths[-1])
    return paths


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(position: int) -> Callable[[Path], None]:
    def flip_byte(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return flip_byte


def flip_digit(path: Path) -> None:
    path.write_text(path.read_text().replace('"global_step": 3', '"global_step": 2'))


FILES = [checkpointing.MODEL_FILE, checkpointing.OPTIMIZER_FILE, checkpointing.META_FILE]
DAMAGES = [
    (file, damage) for file in FILES for damage in (truncate, flip(0), flip(12), flip(-1), Path.unlink)
]


@pytest.mark.parametrize(("file", "damage"), [*DAMAGES, (checkpointing.META_FILE, flip_digit)])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, file: str, damage: Callable) -> None:
    paths = write_checkpoints(tmp_path)
    damage(paths[-1] / file)
    said: list[str] = []
    found = checkpointing.newest_checkpoint(tmp_path, said.append)
    assert found.meta["global_step"] == 2 and found.model["value"].eq(2).all()
    assert len(said) == 1 and paths[-1].name in said[0] and file in said[0]
    # `latest` is a hint, a folder's name is not.
    assert checkpointing.named_checkpoint(tmp_path, "latest", said.append).meta["global_step"] == 2
    with pytest.raises(InputError, match=file):
        checkpointing.named_checkpoint(tmp_path, paths[-1].name, said.append)


@pytest.mark.parametrize(
    "target", ["gone", "latest", "best", "../../elsewhere", "/etc", ".", "strangers", None]
)
@pytest.mark.parametrize("link", ["latest", "best"])
def test_a_link_that_leads_nowhere_is_passed_over(tmp_path: Path, link: str, target: str | None) -> None:
    folder = tmp_path / "run/checkpoints"
    write_checkpoints(folder)
    shutil.copytree(folder, tmp_path / "elsewhere", symlinks=True)
    (folder / "strangers").mkdir()
    (folder / link).unlink()
    if target:
        (folder / link).symlink_to(target)
    said: list[str] = []
    found = checkpointing.named_checkpoint(folder, link, said.append)
    assert found.path.parent == folder
    # With `latest` pointing at `best` and the other way round, the newest is meant, or the last best.
    assert found.meta["global_step"] == {"latest": 3, "best": 2}[link]
    assert any(line.startswith(f"Passing over {link}: ") for line in said)


def test_strangers_are_left_alone_and_leftovers_are_not(tmp_path: Path) -> None:
    paths = write_checkpoints(tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints"
    leftover = folder / (checkpointing.TEMPORARY_PREFIX + paths[0].name)
    shutil.copytree(paths[0], leftover)
    (folder / f"{checkpointing.TEMPORARY_PREFIX}latest").symlink_to("x")
    strangers = [folder / name for name in (".incomplete-notes", "20261121Z-iteration-x", "backup")]
    for path in strangers:
        path.mkdir()
    (folder / ".incomplete-best").mkdir()
    (folder / "20261121Z999999-iteration-9").symlink_to(paths[0].name)
    checkpointing.remove_leftovers(folder)
    checkpointing.prune_checkpoints(folder, 1)
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in (*strangers, *paths[1:])} | {
        *("latest", "best", ".incomplete-best", "20261121Z999999-iteration-9")
    }


def test_neither_the_best_nor_the_newest_is_pruned(tmp_path: Path) -> None:
    paths = write_checkpoints(tmp_path, 5)
    checkpointing.prune_checkpoints(tmp_path, 1)
    assert checkpointing.list_checkpoints(tmp_path) == [paths[1], paths[4]]
    (tmp_path / "best").unlink()  # what is the best follows from the checkpoints
    checkpointing.prune_checkpoints(tmp_path, 1)
    assert checkpointing.list_checkpoints(tmp_path) == [paths[1], paths[4]]


# ------------------------------------------------------------------------------------------------------------
# Disks
# ------------------------------------------------------------------------------------------------------------


@forked
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "whole", "full")
    train(sandbox, "whole")

    def patch(rank: int) -> None:
        real = checkpointing.save_checkpoint

        def save(folder: Path, model: dict, optimizer: dict, meta: dict) -> Path:
            if meta["global_step"] == 10:  # larger files than that are refused from now on
                resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
            return real(folder, model, optimizer, meta)

        checkpointing.save_checkpoint = save

    training = Training(sandbox, "full", patch=patch)
    assert training.wait()[0] == 1
    said = training.log.read_text()
    assert "Error: the checkpoint of step 10 could not be saved: " in said
    assert "it takes 0.4 MB, " in said and "go on from" in said
    assert sandbox.status("full")["status"] == "failed"
    (left,) = sandbox.checkpoints("full")
    assert left.name.endswith("-iteration-5") and left.name in said
    assert "Going on after step 5" in train(sandbox, "full", "--resume")
    assert_same_end(sandbox, "full", "whole")


def test_a_file_system_of_2_mb_runs_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("a file system of one's own needs user namespaces, which are not to be had here")
    sandbox = make_sandbox(tmp_path)

    def run(train: dict, meanwhile: str) -> subprocess.CompletedProcess:
        """Train on a small disk of its own, while something else happens there; the disk ends in after/."""
        sandbox.write_run("tiny", {}, {"checkpoint_interval": 1, **train})
        script = f"""
            mount -t tmpfs -o size=2m none {disk} || exit 99
            cp -r {tmp_path}/runs {disk}
            ({meanwhile}) &
            {sys.executable} ddp_train.py tiny {tmp_path}/datasets --runs-dir {disk}/runs
            status=$?; rm -rf {tmp_path}/after; cp -r {disk}/runs {tmp_path}/after; exit $status"""
        return subprocess.run([*unshare, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)

    refused = run({}, "true")
    if refused.returncode == 99:
        pytest.skip("mounting is not allowed here")
    assert refused.returncode == 2, refused.stderr
    assert (
        "8 checkpoints take 2.9 MB, only 2.1 MB are free; free some, or set keep_checkpoints"
        in refused.stderr
    )
    latest = f"{disk}/runs/tiny/checkpoints/latest"
    full = run(
        {"keep_checkpoints": 1, "epochs": 40, "min_train_tokens": 500 * 8 * 16},
        f"until [ -L {latest} ]; do sleep 0.01; done; head -c 3000000 /dev/zero > {disk}/other",
    )
    assert full.returncode == 1, full.stderr
    # Whichever of the two is written first.
    error = full.stderr.splitlines()[-1]
    assert error.startswith(
        ("Error: the checkpoint of step ", f"Error: {disk}/runs/tiny/metrics.jsonl could not")
    )
    assert "No space left on device" in error
    for left in checkpointing.list_checkpoints(tmp_path / "after/tiny/checkpoints"):
        assert checkpointing.load_checkpoint(left).meta["global_step"] >= 1


def test_a_disk_too_small_is_noticed_before_the_first_step(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    checkpointing.require_space(tmp_path / "checkpoints", 10, None, free // 130)
    with pytest.raises(InputError, match=r"11 checkpoints take .* keep_checkpoints"):
        checkpointing.require_space(tmp_path / "checkpoints", 11, None, free // 130)
    checkpointing.require_space(tmp_path / "checkpoints", 1000, 3, free // 130)


@forked
def test_a_chart_that_cannot_be_drawn_is_a_warning(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    real = reporting.draw_chart

    def patch(rank: int) -> None:
        reporting.draw_chart = real

    (sandbox.run_dir("run") / "training-run-chart.png.incomplete").mkdir()
    said = train(sandbox, "run", patch=patch)
    assert "Warning: the chart could not be drawn: IsADirectoryError" in said
    assert "Training complete" in said


# ------------------------------------------------------------------------------------------------------------
# Numbers that are none
# ------------------------------------------------------------------------------------------------------------


def poison(ranks: tuple[int, ...], when: Callable[[int], bool]) -> Callable[[int], None]:
    """A patch by which the loss of some passes in training is no number, on some processes."""

    def patch(rank: int) -> None:
        real, passes = loss.NextTokenLoss.forward, 0

        def forward(self: loss.NextTokenLoss, sequences: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            result = real(self, sequences)
            if self.training:
                passes += 1
                if rank in ranks and when(passes):
                    result = result * torch.nan
            return result

        loss.NextTokenLoss.forward = forward

    return patch


@forked
def test_a_loss_that_is_no_number_on_one_process_skips_the_step_on_all(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "one", "all")
    # The first pass is the one that sorts buckets; each step is two.
    for run, ranks in (("one", (1,)), ("all", (0, 1))):
        said = train(sandbox, run, patch=poison(ranks, lambda number: number == 1 + 2 * 6 + 1))
        assert said.count("Skipped: the training loss is nan, the gradient norm nan at step 7;") == 1
    assert_same_end(sandbox, "one", "all")
    assert sandbox.metrics("one", "train_loss")[6] is None


@forked
def test_too_many_skipped_steps_end_the_run(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", patch=poison((1,), lambda number: number > 1 + 2 * 6))
    assert training.wait() == [1, 1]
    said = training.log.read_text()
    assert "at step 22, and 16 steps in a row were skipped" in said
    newest = checkpointing.last_checkpoint(sandbox.run_dir("run") / "checkpoints")
    assert f"the last checkpoint is {newest.name}" in said
    good = checkpointing.load_checkpoint(newest)
    assert all(tensor.isfinite().all() for tensor in (*good.model.values(), *good.optimizer.values()))


@forked
def test_a_count_of_skipped_steps_survives_a_resume(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path, "run")
    training = Training(sandbox, "run", patch=poison((1,), lambda number: number > 1 + 2 * 6))
    training.wait_until(step_reached(sandbox, "run", 11))
    training.signal(signal.SIGTERM)
    assert training.wait() == [143, 143]
    training = Training(sandbox, "run", "--resume", patch=poison((1,), lambda number: number > 1))
    assert training.wait() == [1, 1]
    assert "at step 22, and 16 steps in a row were skipped" in training.log.read_text()


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_data_are_compared_with_their_hashes_once(sandbox: Sandbox) -> None:
    folder = sandbox.datasets / "test/tokens"
    (folder / "meta.json").write_text(json.dumps({"sha256": hashes(folder)}))
    sandbox.write_run()
    sandbox.train()
    known = folder / ".fingerprints.json"
    assert json.loads(known.read_text())["train.safetensors"]["sha256"] == hashes(folder)["train.safetensors"]
    read = known.stat().st_mtime_ns
    sandbox.train("tiny", "--resume")
    assert known.stat().st_mtime_ns == read, "not read again"
    data = bytearray((folder / "train.safetensors").read_bytes())
    data[-2] ^= 1
    (folder / "train.safetensors").write_bytes(data)
    done = run_script(*sandbox.command("tiny"))
    assert done.returncode == 2
    assert (
        "train.safetensors: damaged (its SHA-256 is not meta.json's); fetch or prepare it again"
        in done.stderr
    )


def test_other_data_or_configs_under_a_resumed_run_are_refused_unless_allowed(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4})
    sandbox.train()
    shutil.rmtree(sandbox.checkpoints()[-1])
    write_dataset(sandbox.datasets / "test/tokens", train=random_tokens(4000, seed=7))
    sandbox.write_run(train={"checkpoint_interval": 4, "learning_rate": 0.02})
    done = run_script(*sandbox.command("tiny", "--resume"))
    assert done.returncode == 2
    for part in (
        "train.json: learning_rate was 0.01, is 0.02",
        "train.safetensors of test/tokens had the SHA-256",
        "--allow-config-change",
    ):
        assert part in done.stderr
    assert len(sandbox.checkpoints()) == 1
    said = sandbox.train("tiny", "--resume", "--allow-config-change")
    assert "Going on, as allowed, although train.json: learning_rate was 0.01, is 0.02; train.safeten" in said
    assert sandbox.metrics(key="learning_rate") == [0.01] * 4 + [0.02] * 4


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_an_allowed_change_of_optimiser_keeps_the_weights_and_begins_its_state_afresh(
    sandbox: Sandbox, before: str, after: str
) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4, "optimizer": before})
    sandbox.train()
    shutil.rmtree(sandbox.checkpoints()[-1])
    sandbox.write_run(train={"checkpoint_interval": 4, "optimizer": after})
    said = sandbox.train("tiny", "--resume", "--allow-config-change")
    assert f'optimizer was "{before}", is "{after}"' in said
    assert "Going on after step 4" in said
    state = load_file(sandbox.checkpoints()[-1] / "optimizer.safetensors")
    of_matrices = {key.rsplit(".", 1)[1] for key in state if ".ff.layers.0.weight." in key}
    assert of_matrices == ({"momentum_buffer"} if after == "muon" else {"exp_avg", "exp_avg_sq", "step"})
    assert state["out_head.weight.step"] == 8


def test_a_checkpoint_behind_the_end_that_a_changed_config_has_is_refused(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 6})
    sandbox.train()
    sandbox.write_run(train={"checkpoint_interval": 6, "min_train_tokens": 4 * 8 * 16})
    done = run_script(*sandbox.command("tiny", "--resume", "--allow-config-change"))
    assert done.returncode == 2
    assert "is past the run's end, 4 steps; raise min_train_tokens, or name an earlier" in done.stderr


def far_run(sandbox: Sandbox, serve_hub: Callable, tmp_path: Path, **train: object) -> Hub:
    """A run whose data set is on a Hub alone: 24 MB, for the Hub's client writes by pieces of 10 MB."""
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(12_000_000))
    hub = serve_hub(tmp_path / "hub")
    sandbox.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    sandbox.write_run(train={"dataset": "far/away", **train})
    return hub


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.cuts += [15_000_000]
    sandbox.train()
    assert hub.ranges == [f"bytes={10 << 20}-"]
    assert {path for method, path in hub.requests if method == "GET" and "/resolve/" in path} == {
        f"/datasets/far/away/resolve/{'0' * 40}/train.safetensors"
    }, "no file but the one that the run reads, at the commit that the first answer named"


def test_a_download_that_was_killed_goes_on_where_it_stopped(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.cuts.append(15_000_000)
    # The server stops in the midst of the file and keeps the connection.
    hub.stall.set()
    process = subprocess.Popen(
        [sys.executable, *sandbox.command("tiny")], cwd=ROOT, env={**os.environ, **sandbox.env}
    )
    folder = sandbox.datasets / "far/away"
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in folder.glob(".incomplete-*")) < 10 << 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    hub.stall.clear()
    sandbox.train()
    assert hub.ranges == [f"bytes={10 << 20}-"]


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        ("ETag", '"' + "a" * 64 + '"', "the Hub announced sha256 aaaa"),
        ("Content-Length", "24000081", "far/away/train.safetensors"),
    ],
)
def test_a_file_of_another_size_or_hash_is_refused(
    sandbox: Sandbox, serve_hub, tmp_path, header: str, value: str, message: str
) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.headers[header] = value
    done = run_script(*sandbox.command("tiny"), env={**sandbox.env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (sandbox.datasets / "far/away/train.safetensors").exists()
    hub.headers.clear()
    sandbox.train()


def test_the_commit_of_downloaded_data_is_recorded_and_kept(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path, dataset_revision="v1")
    sandbox.train()
    assert ("HEAD", "/datasets/far/away/resolve/v1/train.safetensors") in hub.requests
    meta = json.loads((sandbox.checkpoints()[-1] / "meta.json").read_text())
    assert meta["data"]["train.safetensors"]["revision"] == "0" * 40
    # What is fetched later is of the same commit, even if the branch has moved on.
    validate = {"validation_interval": 8, "validation_batches": 1}
    sandbox.write_run(train={"dataset": "far/away", **validate})
    sandbox.train()
    assert ("GET", f"/datasets/far/away/resolve/{'0' * 40}/validation.safetensors") in hub.requests
    sandbox.write_run(train={"dataset": "far/away", "dataset_revision": "1" * 40})
    done = run_script(*sandbox.command("tiny"))
    assert done.returncode == 2
    assert f"is of commit {'0' * 40}, dataset_revision asks for {'1' * 40}" in done.stderr


@pytest.mark.parametrize("index", [0, 1000, 1024])
def test_a_token_outside_the_vocabulary_is_found_before_the_first_step(sandbox: Sandbox, index: int) -> None:
    tokens = random_tokens(4000)
    tokens[index] = 64  # 8 steps of 8 sequences of 16 use tokens 0 to 1024
    write_dataset(sandbox.datasets / "test/tokens", train=tokens)
    sandbox.write_run()
    done = run_script(*sandbox.command("tiny", processes=2))
    assert done.returncode == 1
    assert f"token 64 at index {index} is outside the model's vocabulary of 64" in done.stderr
    assert not (sandbox.run_dir("tiny") / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------
# Paths
# ------------------------------------------------------------------------------------------------------------


def test_links_in_names_lead_nowhere(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.write_run("real", train={"checkpoint_interval": 4})
    sandbox.train("real")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(sandbox.run_dir("real"), elsewhere)
    sandbox.run_dir("linked").symlink_to(elsewhere)
    shutil.move(sandbox.datasets / "test", tmp_path / "data")
    (sandbox.datasets / "test").symlink_to(tmp_path / "data")
    shutil.copytree(elsewhere, sandbox.run_dir("run"), symlinks=True)
    checkpoints = sandbox.run_dir("run") / "checkpoints"
    (checkpoints / "mine").symlink_to(elsewhere / "checkpoints/latest")
    for command, message in (
        (("linked",), "linked: is a link that leads out of"),
        (("run",), "datasets/test/tokens: is a link that leads out of"),
        (("run", "mine"), "mine: is a link; name the checkpoint's own folder"),
    ):
        done = run_script(*sandbox.command(*command))
        assert done.returncode == 2 and message in done.stderr, done.stderr
