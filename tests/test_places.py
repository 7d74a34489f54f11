"""Where runs, data and exports may lie: on mount points, behind links, on disks that cannot do everything."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import click
import pytest
from forked import forked
from helpers import (
    NO_CHART,
    Finished,
    Sandbox,
    Script,
    make_sandbox,
    refused,
    run_python,
    run_script,
    write_model,
)
from torture import Training, assert_same_end, train

import checkpointing
from basemodel.common import command_line, files
from basemodel.common.command_line import available_cpus
from basemodel.common.files import followed, free_space

# Statements that mount a file system of the process's own. What it held is copied to PLACE-after at the end.
OWN_DISK = """
import ctypes, os, shutil
from pathlib import Path
libc, uid, gid = ctypes.CDLL(None), os.getuid(), os.getgid()
if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
    os._exit(99)
Path("/proc/self/setgroups").write_text("deny")
for kind, number in (("uid", uid), ("gid", gid)):
    Path(f"/proc/self/{{kind}}_map").write_text(f"0 {{number}} 1")
place, before = Path({place!r}), {before!r}
if libc.mount(b"none", bytes(place), b"tmpfs", 0, {options!r}):
    os._exit(99)
if before:
    shutil.copytree(before, place, symlinks=True, dirs_exist_ok=True)
if {read_only}:
    libc.mount(b"none", bytes(place), b"tmpfs", 0x21, None)  # MS_REMOUNT | MS_RDONLY
def leave(status, really=os._exit, main=os.getpid()):
    if os.getpid() == main and place != Path("/dev/shm"):
        shutil.copytree(place, f"{{place}}-after", symlinks=True, dirs_exist_ok=True)
    really(status)
os._exit = leave
from basemodel.results import run_chart
run_chart.draw_chart = lambda *_: None
"""
FILLED = """
import threading, time
def fill():
    while not (place / "runs/tiny/checkpoints/latest").is_symlink():
        time.sleep(0.005)
    with (place / "other").open("wb", buffering=0) as file:
        while file.write(bytes(4096)) == 4096:
            pass
threading.Thread(target=fill, daemon=True).start()
"""


def on_own_disk(
    place: Path,
    *command: str | Path,
    before: Path | None = None,
    options: bytes = b"size=100m",
    read_only: bool = False,
    then: str = "",
) -> Finished:
    """Run a script that finds a mount point at `place`, which holds a copy of what `before` holds."""
    disk = {"place": str(place), "before": before and str(before), "options": options}
    setup = OWN_DISK.format(**disk, read_only=read_only) + then
    done = Script([str(word) for word in command], before=setup).wait()
    if done.returncode == 99:
        pytest.skip("a file system of one's own needs user namespaces, which are not to be had here")
    return done


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_on_a_mount_point(sandbox: Sandbox, resume: bool) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4})
    sandbox.train()
    folder = sandbox.run_dir() / "checkpoints"
    earlier = {path.name for path in folder.iterdir()}
    first = sandbox.checkpoints()[-1]
    shutil.copytree(folder, old := sandbox.path / "old", symlinks=True)
    if resume:
        shutil.rmtree(old / first.name)
    done = on_own_disk(folder, *sandbox.command("tiny", *["--resume"][: int(resume)]), before=old)
    assert done.returncode == 0, done.stderr
    after = folder.with_name("checkpoints-after")
    assert checkpointing.newest_checkpoint(after, print).meta["global_step"] == 8
    if resume:
        assert "Resuming after step 4" in done.stdout and not list(after.glob("earlier-*"))
    else:
        (aside,) = after.glob("earlier-*")
        assert {path.name for path in aside.iterdir()} == earlier


def test_a_folder_that_cannot_hold_checkpoints_is_noticed_before_the_first_step(sandbox: Sandbox) -> None:
    sandbox.write_run()
    folder = sandbox.run_dir() / "checkpoints"
    folder.mkdir()
    done = on_own_disk(folder, *sandbox.command("tiny"), read_only=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {folder}: cannot hold checkpoints: [Errno 30] Read-only file system: ")
    assert not (sandbox.run_dir() / "metrics.jsonl").exists()


def test_trying_a_disk_leaves_nothing_there(tmp_path: Path) -> None:
    for _ in range(2):
        checkpointing.try_saving(tmp_path / "checkpoints")
        assert not list((tmp_path / "checkpoints").iterdir())
        (tmp_path / "checkpoints/.incomplete-trial/half").mkdir(parents=True)  # by one that was killed
    (tmp_path / "file").touch()
    with pytest.raises(command_line.InputError, match="cannot hold checkpoints"):
        checkpointing.try_saving(tmp_path / "file")


def test_links_that_a_user_made_are_followed(sandbox: Sandbox, tmp_path: Path) -> None:
    """Of a run, a data set's owner and checkpoints/; one among the checkpoints is no checkpoint."""
    big = tmp_path / "big"
    sandbox.write_run("linked", train={"checkpoint_interval": 4})
    big.mkdir()
    shutil.move(sandbox.run_dir("linked"), big / "run")
    sandbox.run_dir("linked").symlink_to(big / "run")
    shutil.move(sandbox.datasets / "test", big / "data")
    (sandbox.datasets / "test").symlink_to(big / "data")
    (big / "checkpoints").mkdir()
    (big / "run/checkpoints").symlink_to(big / "checkpoints")
    sandbox.train("linked")
    first = {path.name for path in sandbox.checkpoints("linked")}
    sandbox.train("linked")
    assert (big / "run/checkpoints").is_symlink() and len(sandbox.checkpoints("linked")) == 2
    (aside,) = (big / "checkpoints").glob("earlier-*")
    assert {path.name for path in aside.iterdir()} == first | {"latest", "best"}
    (big / "checkpoints/mine").symlink_to(aside / "latest")
    error = refused(*sandbox.command("linked", "mine"))
    assert "mine: is a link; name the checkpoint folder itself" in error


NO_LINKS = """
import os
def symlink(*arguments, **options):
    raise OSError(95, "Operation not supported")
os.symlink = symlink
"""
NO_FOLDER_FSYNC = """
import os, stat
fsync = os.fsync
def of_files(handle):
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(22, "Invalid argument")
    fsync(handle)
os.fsync = of_files
"""
FILES_STAY = """
import os
def rmdir(*arguments, **options):
    raise OSError(39, "Directory not empty")
os.rmdir = rmdir
"""
NO_LOCKS = """
import fcntl
def lock(*arguments):
    raise OSError(37, "No locks available")
fcntl.flock = fcntl.lockf = lock
"""
SPACE_UNKNOWN = """
import shutil
shutil.disk_usage = lambda path, real=shutil.disk_usage: type(real(path))(0, 0, 0)
"""
INCAPABLE = "\n".join([NO_LINKS, NO_FOLDER_FSYNC, FILES_STAY, NO_LOCKS, SPACE_UNKNOWN])


def test_what_a_disk_cannot_do_ends_no_run(sandbox: Sandbox) -> None:
    """No symbolic links, fsync of folders, deletion of files in use, locks or free space that is known."""
    before, often = f"{NO_CHART}\n{INCAPABLE}", {"checkpoint_interval": 2, "keep_checkpoints": 1}
    sandbox.write_run(train={**often, "min_train_tokens": 6 * 8 * 16})
    sandbox.train(before=before)
    for steps, start in ((8, "--resume"), (10, "latest")):
        newest = sandbox.checkpoints()[-1].name
        assert files.link_target(sandbox.run_dir() / "checkpoints/latest") == newest
        assert len(sandbox.checkpoints()) <= 2, "the newest and the best"
        sandbox.write_run(train={**often, "min_train_tokens": steps * 8 * 16})
        said = sandbox.train("tiny", start, "--allow-config-change", before=before)
        assert f"Resuming after step {steps - 2}" in said and sandbox.meta()["global_step"] == steps


def test_without_links_best_is_a_file_that_paths_lead_through(tmp_path: Path) -> None:
    model_json, weights = write_model(tmp_path / "20260101Z000000-iteration-4")
    (tmp_path / "best").write_text("20260101Z000000-iteration-4\n")
    assert followed(tmp_path / "best/model.safetensors") == weights
    assert followed(tmp_path / "best") == weights.parent and followed(weights) == weights
    for path in (tmp_path / "best/model.safetensors", tmp_path / "best"):
        done = run_script("test_smoke.py", model_json, path, "--prompt", "a", "--tokens", "2")
        assert done.returncode == 0, done.stderr


@forked
def test_a_save_is_tried_again_where_that_may_help(tmp_path: Path, whole: Path) -> None:
    """That of step 10 fails twice, that of step 20 for good."""
    sandbox = make_sandbox(tmp_path, "run")
    sandbox.run_dir("whole").symlink_to(whole)

    def patch(rank: int) -> None:
        checkpointing.PAUSES = (0.01, 0.02, 0.03)
        real, tries = checkpointing.save_checkpoint, {10: 2, 20: 4}

        def save(folder: Path, model: dict, optimizer: dict, meta: dict, *rest: bytes | None) -> Path:
            if tries.get(step := meta["global_step"], 0):
                tries[step] -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))
            return real(folder, model, optimizer, meta, *rest)

        checkpointing.save_checkpoint = save

    training = Training(sandbox, "run", patch=patch)
    assert training.wait()[0] == 1
    problem = "could not save the checkpoint of step {}: [Errno 116] Stale file handle: "
    said = [line for line in training.log.read_text().splitlines() if "could not save" in line]
    again = [line.rpartition("; ")[2] for line in said]
    assert again[:5] == [f"trying again in {pause} s" for pause in (0.01, 0.02, 0.01, 0.02, 0.03)]
    assert [line.startswith("Warning: " + problem.format(10)) for line in said] == [True] * 2 + [False] * 4
    assert said[5].startswith("Error: " + problem.format(20))
    assert again[5] == f"--resume continues from {sandbox.checkpoints('run')[-1].name}"
    assert "Resuming after step 15" in train(sandbox, "run", "--resume")
    assert_same_end(sandbox, "run", "whole")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EDQUOT])
def test_errors_that_may_pass(code: int) -> None:
    assert code in checkpointing.MAY_PASS


def test_a_file_system_of_2_mb_runs_full(tmp_path: Path) -> None:
    """`then` someone else fills it, as soon as there is a checkpoint."""
    sandbox = make_sandbox(tmp_path)
    (disk := tmp_path / "disk").mkdir()
    command = ["ddp_train.py", "tiny", str(sandbox.datasets), "--runs-dir", str(disk / "runs")]

    def on_small_disk(config: dict, then: str = "") -> Finished:
        sandbox.write_run("tiny", {}, {"checkpoint_interval": 1, **config})
        (content := tmp_path / "content").mkdir(exist_ok=True)
        shutil.copytree(tmp_path / "runs", content / "runs", dirs_exist_ok=True)
        return on_own_disk(disk, *command, before=content, options=b"size=2m", then=then)

    refused = on_small_disk({})
    assert refused.returncode == 2, refused.stderr
    error = "8 checkpoints take 2.9 MB, but only 2.1 MB is free; free some space, or set keep_checkpoints"
    assert error in refused.stderr
    many = {"keep_checkpoints": 1, "epochs": 40, "min_train_tokens": 500 * 8 * 16}
    full = on_small_disk(many, then=FILLED)
    assert full.returncode == 1, full.stderr
    assert full.stderr.splitlines()[-1].startswith("Error: could not save the checkpoint")
    assert "No space left on device" in full.stderr.splitlines()[-1]
    left = checkpointing.list_checkpoints(tmp_path / "disk-after/runs/tiny/checkpoints")
    assert left and all(checkpointing.load_checkpoint(each).meta["global_step"] >= 1 for each in left)


# ------------------------------------------------------------------------------------------------------------
# Data and exports
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (folder := tmp_path / "texts").mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"This is text {number}.")
    return folder


def prepare(texts: Path, output: Path) -> list[str]:
    return ["prepare_datasets.py", str(texts), str(output), "--tokenizer", "bytes", "--workers", "1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("README.md",)}


def test_a_data_set_on_a_mount_point_behind_a_link_and_in_a_new_folder(texts: Path, tmp_path: Path) -> None:
    new, mount, real = tmp_path / "a/new", tmp_path / "mount", tmp_path / "real"
    assert run_script(*prepare(texts, new)).returncode == 0
    mount.mkdir()
    (lost := tmp_path / "ext4/lost+found").mkdir(parents=True)
    done = on_own_disk(mount, *prepare(texts, mount), before=lost.parent)
    assert done.returncode == 0, done.stderr
    (after := tmp_path / "mount-after").joinpath("lost+found").rmdir()
    assert contents(after) == contents(new)
    (tmp_path / "link").symlink_to(real)
    for place in ("absent", "empty"):
        done = run_script(*prepare(texts, tmp_path / "link"))
        assert done.returncode == 0, done.stderr
        assert contents(real) == contents(new), place
        assert (tmp_path / "link").is_symlink()
        shutil.rmtree(real)
        real.mkdir()
    assert not list(tmp_path.rglob("*incomplete*")) and not list(tmp_path.rglob("*.trial"))


def test_files_move_into_a_mount_point_all_or_none_and_the_decisive_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    (finished := target / ".incomplete/finished").mkdir(parents=True)
    for name in ("train.safetensors", "a.json", "z.json"):
        (finished / name).touch()
    real, moved = Path.rename, []

    def rename(path: Path, new: Path) -> Path:
        if path.name == broken:
            raise OSError(errno.EIO, "Input/output error")
        moved.append(path.name)
        return real(path, new)

    monkeypatch.setattr(Path, "rename", rename)
    broken = "train.safetensors"
    with pytest.raises(OSError, match="Input/output"):
        files.publish(finished, target, last="train")
    assert moved == ["a.json", "z.json"] and not list(target.glob("*.json"))
    (target / "a.json").touch()  # by one that was killed
    assert files.contents(target) == []
    shutil.rmtree(finished)
    assert files.contents(target) == [target / "a.json"]


def test_an_export_on_a_mount_point_behind_a_link(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = write_model(tmp_path / "model", context_length=64)
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mount")
    done = on_own_disk(tmp_path / "mount", "upload_model.py", *model, tmp_path / "link")
    assert done.returncode == 0, done.stderr
    written = contents(tmp_path / "mount-after")
    assert written.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "vocab.json"}
    assert len(written["model.safetensors"]) > 1000 and not any("incomplete" in name for name in written)


def test_what_a_disk_cannot_do_ends_no_preparation(texts: Path, tmp_path: Path) -> None:
    command = prepare(texts, tmp_path / "shm")
    done = on_own_disk(Path("/dev/shm"), *command, read_only=True)
    assert done.returncode == 0, done.stderr
    assert "Warning: using one process, because /dev/shm does not work" in done.stderr
    done = run_script(*prepare(texts, tmp_path / "incapable"), before=INCAPABLE)
    assert done.returncode == 0, done.stderr
    assert "cannot be locked (No locks available)" in done.stdout
    assert contents(tmp_path / "shm") == contents(tmp_path / "incapable")
    assert json.loads((tmp_path / "shm/meta.json").read_text())["splits"]["train"]["documents"] > 150


# ------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------


def test_cpus_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count()))
    assert available_cpus() == len(allowed)
    if sys.platform == "linux":
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert available_cpus() == 1
        finally:
            os.sched_setaffinity(0, allowed)


@forked
def test_without_a_home_there_is_one(tmp_path: Path) -> None:
    """As in a container whose user has no entry in /etc/passwd."""
    del os.environ["HOME"]
    Path.home = classmethod(lambda cls: cls(os.environ["HOME"]) if "HOME" in os.environ else no_home())
    command = click.Command("home", callback=lambda: (tmp_path / "said").write_text(str(Path.home())))
    sys.argv = ["home"]
    with pytest.raises(SystemExit) as end:
        command_line.run_command(command)
    assert end.value.code not in (1, 2) and Path((tmp_path / "said").read_text()).is_dir()


def no_home() -> None:
    raise RuntimeError("Could not determine home directory.")


def test_a_notebooks_backend_draws_charts_too(tmp_path: Path) -> None:
    draw = (
        "from pathlib import Path; from basemodel.common.xkcd import xkcd_chart\n"
        f"with xkcd_chart(Path({str(tmp_path / 'chart.png')!r}), (2, 1)) as figure: figure.add_subplot()"
    )
    done = run_python("-c", draw, env={"MPLBACKEND": "module://notebooks.backend_that_is_not_here"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_free_space_that_is_not_known_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    checkpointing.require_space(tmp_path / "not/yet/there", 1000, None, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    assert free_space(tmp_path) == 5
