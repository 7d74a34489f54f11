"""Preparing by several workers, in shards, with kills and full disks: the tokens are as if undisturbed."""

import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import forked
from helpers import Finished, Script, children_of, is_alive, refused, wait_for
from texts import assert_holds, split_texts, write_jsonl, write_parquet

import prepare_datasets
from basemodel.data.tokenizer import get_tokenizer

SMALL_SHARDS = "from basemodel.prepare import documents, encoding; documents.SHARD_BYTES = 20_000"
SLOW_SHARDS = """
import time
from basemodel.prepare import encoding
write = encoding.write_part
def slow(*arguments):
    time.sleep(0.1)
    return write(*arguments)
encoding.write_part = slow
"""


@pytest.fixture
def texts() -> list[str]:
    rng = random.Random(4)
    return [f"{i} \u4e2d\u00e9 " + "word " * rng.randrange(100) for i in range(1200)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    """1,200 documents in shards of 20 kB: of .jsonl by lines, of parquet by row groups, files together."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts[:500])
    write_parquet(folder / "b.parquet", texts[500:1000])
    for i, text in enumerate(texts[1000:]):
        (folder / f"c{i:03}.txt").write_text(text)
    return folder


def start(corpus: Path, output: Path, *options: str, before: str = "") -> Script:
    """Begin to prepare in shards of 20 kB in place of 64 MB."""
    command = ["prepare_datasets.py", str(corpus), str(output), "--tokenizer", "bytes", *options]
    return Script(command, before=f"{SMALL_SHARDS}\n{before}")


def finish(corpus: Path, output: Path, texts: list[str], *options: str, fraction: float = 0.01) -> Finished:
    """Prepare to the end; what comes out must be these texts."""
    done = start(corpus, output, *options).wait()
    assert done.returncode == 0, done.stderr
    assert_holds(output, split_texts(texts, fraction), get_tokenizer("bytes"))
    assert not output.with_name(output.name + ".incomplete").exists()
    return done


def parts(output: Path) -> list[Path]:
    """The folders of finished shards, which have their final names, and whole records."""
    folders = output.with_name(output.name + ".incomplete").glob("parts/??????")
    return [path for path in folders if (path / "record.json").exists()]


def wait_for_parts(script: Script, output: Path, count: int) -> None:
    wait_for(lambda: len(parts(output)) >= count or script.has_ended, f"{count} finished shards")


@contextlib.contextmanager
def interrupted(corpus: Path, output: Path, count: int) -> Iterator[Script]:
    """A preparation that has finished some shards, and is slow enough not to end; killed afterwards."""
    script = start(corpus, output, "--workers", "1", before=SLOW_SHARDS)
    try:
        wait_for_parts(script, output, count)
        yield script
    finally:
        script.kill()


@pytest.mark.parametrize("workers", ["1", "3"])
def test_shards_and_workers_change_nothing(
    corpus: Path, tmp_path: Path, texts: list[str], workers: str
) -> None:
    finish(corpus, tmp_path / "out", texts, "--workers", workers)


def test_kills_change_nothing(corpus: Path, tmp_path: Path, texts: list[str]) -> None:
    output, finished = tmp_path / "out", []
    for goal in (0, 1, 1, 2, 2, 4, 4):  # shards: each start gets further than the one before, or nowhere
        script = start(corpus, output, "--workers", "2")
        wait_for_parts(script, output, goal)
        script.kill()
        assert script.wait().returncode == -signal.SIGKILL
        finished.append(len(parts(output)))
        assert not output.exists(), "nothing has its final name before it is whole"
    assert finished == sorted(finished) and finished[-1] >= 4, "what is finished is kept"
    kept = int(finish(corpus, output, texts).stdout.split(" of ")[0])
    assert kept == finished[-1]


def test_workers_end_with_the_main_process(corpus: Path, tmp_path: Path, texts: list[str]) -> None:
    """And one that cannot, for the time being, is not in the way of the next start."""
    # In this process's group: the kernel ends stopped members of one of which the leader has gone.
    before = "import os; os.setpgid(0, os.getpgid(os.getppid()))"
    script = start(corpus, tmp_path / "out", "--workers", "2", before=before)
    wait_for_parts(script, tmp_path / "out", 1)
    workers = children_of(script.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)
    script.signal(signal.SIGKILL)
    assert script.wait().returncode == -signal.SIGKILL
    finish(corpus, tmp_path / "out", texts)
    os.kill(workers[0], signal.SIGCONT)
    wait_for(lambda: not any(map(is_alive, workers)), "the end of the workers", seconds=20)


def test_damaged_parts_are_made_again(corpus: Path, tmp_path: Path, texts: list[str]) -> None:
    with interrupted(corpus, tmp_path / "out", 3):
        pass
    finished = sorted(parts(tmp_path / "out"))
    damaged = finished[0] / "train"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (finished[1] / "record.json").write_text("{")
    done = finish(corpus, tmp_path / "out", texts)
    assert done.stdout.startswith(f"{len(finished) - 2} of "), "what is sound is kept"


@pytest.mark.parametrize("change", ["files", "fraction", "column"])
def test_parts_of_other_input_are_made_again(
    corpus: Path, tmp_path: Path, texts: list[str], change: str
) -> None:
    others = [text.swapcase() for text in texts[:500]]
    if change == "column":
        rows = ({"text": text, "other": other} for text, other in zip(texts, others, strict=False))
        (corpus / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (corpus / "b.parquet").unlink()
    with interrupted(corpus, tmp_path / "out", 10):  # the largest shards first, of all kinds of files
        pass
    options, fraction = (), 0.01
    if change == "files":
        texts = [text.swapcase() for text in texts]  # of the same size
        write_jsonl(corpus / "a.jsonl", texts[:500])
        write_parquet(corpus / "b.parquet", texts[500:1000])
        for i, text in enumerate(texts[1000:]):
            (corpus / f"c{i:03}.txt").write_text(text)
    elif change == "column":
        options, texts = ("--text-column", "other"), others + texts[1000:]
    else:
        options, fraction = ("--validation-fraction", "0.5"), 0.5
    finish(corpus, tmp_path / "out", texts, *options, fraction=fraction)


def test_what_is_left_in_the_source_itself_is_no_text(corpus: Path, texts: list[str]) -> None:
    with interrupted(corpus, corpus / "out", 1):
        pass
    kept = len(parts(corpus / "out"))
    assert finish(corpus, corpus / "out", texts).stdout.startswith(f"{kept} of ")


def test_an_empty_output_folder_does_not_end_what_is_finished(
    corpus: Path, tmp_path: Path, texts: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    with interrupted(corpus, tmp_path / "out", 1) as script:
        script.signal(signal.SIGINT)
        assert script.wait().returncode == 130
    kept = len(parts(tmp_path / "out"))
    assert kept > 0
    assert finish(corpus, tmp_path / "out", texts).stdout.startswith(f"{kept} of ")


@forked
def test_all_is_on_the_disk_before_it_has_its_name(corpus: Path, tmp_path: Path) -> None:
    on_disk, fsync, replace = set(), os.fsync, Path.replace

    def record(handle: int) -> None:
        fsync(handle)
        on_disk.add(os.fstat(handle).st_ino)

    def check(folder: Path, target: Path) -> Path:
        missing = [path.name for path in (folder, *folder.iterdir()) if path.stat().st_ino not in on_disk]
        assert not missing, missing
        on_disk.clear()
        return replace(folder, target)

    output = tmp_path / "out"
    os.fsync, Path.replace = record, check
    prepare_datasets.main([str(corpus), str(output), "--tokenizer", "bytes"], standalone_mode=False)
    assert on_disk == {output.parent.stat().st_ino}, "the folder that has the new name in it"
    written = {"train.safetensors", "validation.safetensors", "meta.json", "README.md"}
    assert {path.name for path in output.iterdir()} == written


def test_an_output_folder_in_use(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ("prepare_datasets.py", corpus, output, "--tokenizer", "bytes")
    with interrupted(corpus, output, 1) as script:
        script.signal(signal.SIGSTOP)
        assert "another process is preparing it" in refused(*command)
        script.signal(signal.SIGCONT)
        assert script.wait().returncode == 0
    error = refused(*command)
    assert "out: already contains README.md and meta.json and train.safetensors; remove it" in error


def test_a_full_disk(corpus: Path, tmp_path: Path, texts: list[str]) -> None:
    """A limit on the size of files stands in for the disk: the system call fails in the same way."""
    before = sorted(corpus.iterdir())
    for limit in (5_000, 150_000):  # bytes: too few for a shard, and for the joined file only
        limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        done = start(corpus, tmp_path / "out", before=limited).wait()
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: ") and "cannot be written: File too large; free some space" in line
        assert not (tmp_path / "out").exists() and sorted(corpus.iterdir()) == before
    kept = len(parts(tmp_path / "out"))
    assert kept > 0, "what was finished is kept"
    assert finish(corpus, tmp_path / "out", texts).stdout.startswith(
        f"{kept} of {kept} shards were already encoded"
    )
