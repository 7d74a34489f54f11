"""Whatever call on files fails, and whenever the power is cut, nothing is lost or half there: a sample of
what `make torture` enumerates.

A library that stands before libc makes the calls fail, and records them. It needs Linux and a C compiler.
"""

import errno
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faults import cut_power_everywhere, fail_every_call
from forked import forked
from forkserver import start_forkserver
from shim import library, read_calls
from watched import get_ready

import checkpointing


@pytest.fixture(autouse=True)
def _the_library() -> None:
    if not start_forkserver():
        pytest.skip("makes calls fail through a library that needs Linux and a C compiler, cc")


def watch(folder: Path, number: int = 0, error: int = 0, *, forever: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    library().arm(bytes(folder), number, error, forever)


def save(folder: Path) -> Path:
    tensors = {"value": torch.arange(1000.0)}
    meta = {key: {} for key in checkpointing.REQUIRED_META - {"files"}}
    return checkpointing.save_checkpoint(folder, tensors, tensors, {**meta, "global_step": 1})


@forked
def test_what_safetensors_writes_is_seen(tmp_path: Path) -> None:
    watch(tmp_path / "seen")
    library().record(bytes(tmp_path / "calls"))
    for folder in ("seen", "seen-not"):
        (tmp_path / folder).mkdir(exist_ok=True)
        safetensors.torch.save_file({"value": torch.arange(1000.0)}, tmp_path / folder / "file")
    calls = read_calls(tmp_path / "calls")
    assert library().count() == len(calls) and not any("seen-not" in call.path for call in calls)
    written = b"".join(call.data for call in calls if call.name == "write")
    assert written == (tmp_path / "seen-not/file").read_bytes()


@forked
def test_each_fsync_of_a_save_that_fails_fails_the_save(tmp_path: Path) -> None:
    watch(tmp_path / "calm")
    library().record(bytes(tmp_path / "calls"))
    save(tmp_path / "calm/checkpoints")
    calls = read_calls(tmp_path / "calls")
    fsyncs = [number for number, call in enumerate(calls, start=1) if call.name == "fsync"]
    assert len(fsyncs) == 6, "the run, two files of tensors, meta.json, the new folder, checkpoints/"
    for number in fsyncs:
        folder = tmp_path / str(number)
        watch(folder, number, errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            save(folder / "checkpoints")
        library().disarm()
        checkpointing.remove_leftovers(folder / "checkpoints")
        for path in checkpointing.list_checkpoints(folder / "checkpoints"):
            assert number == fsyncs[-1], "it had its name before it was on the disk"
            checkpointing.load_checkpoint(path)


@forked
def test_a_full_disk_takes_half_of_a_write_before_it_refuses(tmp_path: Path) -> None:
    watch(tmp_path / "disk", 2, errno.ENOSPC, forever=True)
    with (tmp_path / "disk/file").open("wb", buffering=0) as file:
        assert file.write(b"12345678") == 4
        with pytest.raises(OSError, match="No space left"):
            file.write(b"5678")
        library().disarm()
    assert (tmp_path / "disk/file").read_bytes() == b"1234"


@pytest.mark.parametrize(("subject", "most"), [("training", 5), ("resumption", 3), ("preparation", 3)])
@forked
def test_a_call_that_fails_loses_nothing(tmp_path: Path, subject: str, most: int) -> None:
    get_ready()
    found = fail_every_call(tmp_path / "all", subject, most)
    assert found["calls"] > 60 and found["faults"] == most
    assert not found["problems"], "\n".join(found["problems"])


@pytest.mark.parametrize(("subject", "most"), [("training", 3), ("preparation", 3)])
@forked
def test_a_power_cut_loses_nothing(tmp_path: Path, subject: str, most: int) -> None:
    get_ready()
    found = cut_power_everywhere(tmp_path / "all", subject, most)
    assert found["left"] > 3000 and found["gone on from"] == most
    assert not found["problems"], "\n".join(found["problems"])
