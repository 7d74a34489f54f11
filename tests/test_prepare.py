"""Preparing data: the tokens are tiktoken's, whatever interrupts it and whichever library encodes."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import ROOT, needs_gpt2, run_script
from huggingface_hub import DatasetCard
from safetensors.numpy import load_file

from basemodel.documents import TextFile, in_validation, safe_cut
from basemodel.tokenizer import (
    WHITE_SPACE,
    GigatokenEncoder,
    TiktokenEncoder,
    encode_with_tiktoken,
    get_tokenizer,
    is_usual,
    set_up_engine,
)

OUTPUTS = ("train.safetensors", "validation.safetensors", "meta.json")
NASTY = [
    *(
        "a",
        "B",
        "\u00e9",
        "\u4e2d\u6587",
        "1",
        "\u0663",
        "\u00bd",
        "'",
        "'s",
        "'S",
        "'ll",
        "\u2019",
        ".",
        "--",
    ),
    *(" ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\0", "\x7f"),
    *(
        "\u200b",
        "\ufeff",
        "\ufffd",
        "\u0301",
        "\ud55c",
        "\U0001f600",
        "\U0001f468\u200d\U0001f469",
        "<|endoftext|>",
    ),
]
# New in Unicode 17: a Cyrillic-like letter of Latin Extended-D, a Sidetic letter, a Chinese character.
NEW_LETTERS = "\ua7ce\U00010940\U000323b0"
needs_gigatoken = pytest.mark.skipif(not find_spec("gigatoken"), reason="gigatoken: pip install -e '.[fast]'")
ENGINES = ["tiktoken", pytest.param("gigatoken", marks=needs_gigatoken)]


def nasty_text(rng: random.Random, most: int) -> str:
    return "".join(rng.choices(NASTY, k=rng.randrange(most)))


def random_characters(rng: random.Random, count: int) -> str:
    points = (
        rng.choice((rng.randrange(0x300), rng.randrange(0x3000), rng.randrange(0x40000)))
        for _ in range(count)
    )
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def write_parquet(path: Path, texts: list[str]) -> Path:
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=50, compression="zstd")
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(source: Path | str, output: Path, *options: str, **more: object) -> str:
    done = run_script("prepare_datasets.py", source, output, *options, **more)
    assert done.returncode == 0, done.stderr
    assert not output.with_name(output.name + ".incomplete").exists()
    return done.stdout + done.stderr


def refused(source: Path | str, output: Path, *options: str, status: int = 2, **more: object) -> str:
    """Prepare what must be refused, in one line; return it."""
    done = run_script("prepare_datasets.py", source, output, *options, **more)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("encoding: ")]
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    return lines[0].removeprefix("Error: ")


def sha256(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OUTPUTS}


def small_shards(source: Path, output: Path, *options: str) -> list[str]:
    """The command line, behind `python`, that prepares in shards of 20 kB in place of 64 MB."""
    code = "import documents, prepare_datasets as p; documents.SHARD_BYTES = 20_000; p.run_command(p.main)"
    return ["-c", code, str(source), str(output), *options]


# --- the tokens


@needs_gpt2
@pytest.mark.parametrize("engine", ENGINES)
def test_every_document_is_as_tiktoken_encodes_it(tmp_path: Path, engine: str) -> None:
    rng = random.Random(0)
    texts = [nasty_text(rng, 200) for _ in range(300)] + [random_characters(rng, 100) for _ in range(300)]
    texts += ["", "<|endoftext|>", "a<|endoftext|>b", "\0\x01\x02", *(f"{c}'s {c}1{c}" for c in NEW_LETTERS)]
    folder = tmp_path / "in"
    folder.mkdir()
    write_parquet(folder / "a.parquet", texts[::2])
    write_jsonl(folder / "b.jsonl", texts[1::2])
    (folder / "c.txt").write_text("x" * 5_000_000)
    invalid = b"caf\xe9 \xff \xe4\xb8 and \xef\xbf\xbd"
    (folder / "d.txt").write_bytes(invalid)
    out = prepare(folder, tmp_path / "out", "--engine", engine, "--validation-fraction", "0.2")
    assert "Invalid UTF-8 was replaced by 3 characters U+FFFD" in out and f"with {engine}" in out
    assert "unlike" not in out

    encoding = get_tokenizer("gpt2")
    expected: dict[str, list[int]] = {"train": [], "validation": []}
    for text in [*texts[::2], *texts[1::2], "x" * 5_000_000, invalid.decode(errors="replace")]:
        split = "validation" if in_validation([text.encode()], 0.2) else "train"
        expected[split] += [*encoding.encode_ordinary(text), encoding.eot_token]
    for split, tokens in expected.items():
        found = load_file(tmp_path / f"out/{split}.safetensors")["tokens"]
        assert np.array_equal(found, np.array(tokens, np.uint16)), split


@needs_gpt2
def test_marks_stand_in_for_looking_ahead() -> None:
    """Every run of up to three white-space characters, in every surrounding, and much else, many at once."""
    tokenizer = get_tokenizer("gpt2")
    encode, rng = TiktokenEncoder(tokenizer), random.Random(6)
    runs = ["".join(run) for length in (1, 2, 3) for run in itertools.product(WHITE_SPACE, repeat=length)]
    texts = [
        template.format(run)
        for run in [*(run for run in runs if len(run) < 3 or run.isascii()), *rng.sample(runs, 2000)]
        for template in ("a{}b", "{}'s 1", "\u201c{}", "{0}--{0}", "{}")
    ]
    texts += [random_characters(rng, 50) + nasty_text(rng, 8) for _ in range(5000)]
    texts += ["", "", " ", "\x1e", "a\x1f b", "  \x1e ", "\x1f\x1e", "x" * 5000 + " " * 5000]
    rng.shuffle(texts)
    for first in range(0, len(texts), 100):
        batch = texts[first : first + 100]
        expected = [token for text in batch for token in (*tokenizer.encode_ordinary(text), 50256)]
        assert encode([text.encode() for text in batch]).tolist() == expected, ascii(batch)
    usual = [text for text in texts if is_usual(text.encode())]
    assert len(usual) > 3000 and any("\u4e2d" in text for text in usual)
    assert all(re.fullmatch(r"\s", c) for c in WHITE_SPACE)


@needs_gpt2
def test_a_text_may_be_cut_where_it_is_cut() -> None:
    rng, encoding, cuts = random.Random(1), get_tokenizer("gpt2"), 0
    for _ in range(3000):
        text = nasty_text(rng, 30)
        if cut := safe_cut(text):
            cuts += 1
            parts = encoding.encode_ordinary(text[:cut]) + encoding.encode_ordinary(text[cut:])
            assert parts == encoding.encode_ordinary(text), ascii((text[:cut], text[cut:]))
    assert cuts > 1000


def test_a_long_text_is_read_in_fragments(tmp_path: Path) -> None:
    rng = random.Random(2)
    parts = [nasty_text(rng, 30) + "word " * rng.randrange(20) for _ in range(60_000)]
    data = "".join(parts).encode() + b" \xff\xf0\x9f" + b"y" * 3_000_000 + b"\xf0\x9f"
    path = tmp_path / "long.txt"
    path.write_bytes(data)
    document = TextFile(path)
    fragments = list(document)
    assert b"".join(fragments).decode() == data.decode(errors="replace")
    assert len(fragments) > 3 and max(map(len, fragments[:-1])) < 3_000_000
    assert document.replaced == 3


def test_a_long_text_is_one_document(tmp_path: Path) -> None:
    """Its fragments are encoded in several batches, of which others hold documents before and behind it."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = ["the first", "word " * 700_000, "another", "many words " * 200_000, "the last"]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    out = prepare(folder, tmp_path / "out", "--tokenizer", "bytes", "--stats")
    tokens = [load_file(tmp_path / "out" / name)["tokens"] for name in OUTPUTS[:2]]
    assert np.array_equal(
        np.concatenate(tokens), np.concatenate([[*text.encode(), 256] for text in texts])
    ), "the last one is for validation, since none else is"
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    counts = {"documents": 1, "tokens": len(texts[-1]) + 1, "bytes": len(texts[-1])}
    assert meta["splits"]["validation"] == counts
    assert meta["splits"]["train"]["bytes"] == sum(map(len, texts[:-1]))
    lengths = [len(text) + 1 for text in texts]
    assert f"mean {np.mean(lengths):,.1f}, median {np.median(lengths):,.0f}; {sum(lengths):,} tokens" in out


@needs_gpt2
@needs_gigatoken
def test_gigatoken_agrees_on_all_characters(tmp_path: Path) -> None:
    tokenizer = get_tokenizer("gpt2")
    encode = GigatokenEncoder(tokenizer, set_up_engine("gigatoken", tokenizer, tmp_path))
    rng = random.Random(3)
    for _ in range(20_000):
        text = (random_characters(rng, 30) + nasty_text(rng, 10) + random_characters(rng, 30)).encode()
        assert np.array_equal(encode([text])[:-1], encode_with_tiktoken(tokenizer, text)), ascii(
            text.decode()
        )


BROKEN_GIGATOKEN = """
import numpy, tiktoken
class Tokenizer:
    @classmethod
    def from_tiktoken(cls, path, pretokenizer, special_tokens):
        {start}
        return cls()
    def encode(self, data):
        tokens = tiktoken.get_encoding("gpt2").encode_ordinary(data.decode())
        return numpy.array([0] if b"number 7 " in data else tokens, numpy.uint32)
"""


@needs_gpt2
def test_tiktoken_takes_over_where_gigatoken_is_wrong(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [f"the number {i} is a number" for i in range(100)])
    prepare(source, tmp_path / "right", "--engine", "tiktoken")
    for start, message in (
        (
            "pass",
            "gigatoken encodes the text b'the number 7 is a number'... unlike tiktoken; encoded shard 0",
        ),
        ("raise OSError('no AVX')", "gigatoken does not work here (OSError: no AVX); encoding with tiktoken"),
    ):
        library = tmp_path / start[:4]
        library.mkdir()
        (library / "gigatoken.py").write_text(BROKEN_GIGATOKEN.format(start=start))
        env = {"PYTHONPATH": str(library)}
        assert message in prepare(source, library / "out", env=env)
        assert sha256(library / "out") == sha256(tmp_path / "right")
    error = refused(source, tmp_path / "out", "--engine", "gigatoken", env=env)
    assert (
        "--engine gigatoken: gigatoken does not work here (OSError: no AVX); try --engine tiktoken" in error
    )


def test_gigatoken_is_an_extra(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["text"] * 9)
    error = refused(source, tmp_path / "out", "--tokenizer", "bytes", "--engine", "gigatoken")
    assert "--engine gigatoken goes with the tokenizer gpt2 only" in error
    if os.environ.get("TIKTOKEN_CACHE_DIR") and not find_spec("gigatoken"):
        error = refused(source, tmp_path / "out", "--engine", "gigatoken")
        assert "it is not installed; pip install -e '.[fast]' brings it" in error


# --- shards, workers, interruption


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """2,400 documents in shards of 20 kB: of parquet by row groups, of .jsonl by lines, files together."""
    folder, rng = tmp_path / "in", random.Random(4)
    folder.mkdir()
    texts = [f"{i} " + "word " * rng.randrange(100) + nasty_text(rng, 20) for i in range(2400)]
    write_parquet(folder / "a.parquet", texts[:1000])
    write_jsonl(folder / "b.jsonl", texts[1000:2000])
    for i, text in enumerate(texts[2000:]):
        (folder / f"c{i:03}.txt").write_bytes(text.encode())
    return folder


def parts(output: Path) -> list[Path]:
    return [path.parent for path in output.with_name(output.name + ".incomplete").glob("parts/*/record.json")]


def test_shards_and_workers_change_nothing(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "whole", "--tokenizer", "bytes")
    for workers in ("1", "3"):
        output = tmp_path / workers
        done = run_script(*small_shards(corpus, output, "--tokenizer", "bytes", "--workers", workers))
        assert done.returncode == 0, done.stderr
        assert sha256(output) == sha256(tmp_path / "whole")


def test_ten_kills_change_nothing(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "undisturbed", "--tokenizer", "bytes")
    rng, output, finished, killed = random.Random(5), tmp_path / "out", [], 0
    command = [sys.executable, *small_shards(corpus, output, "--tokenizer", "bytes", "--workers", "2")]
    while killed < 10 or not finished[-1:] > [0]:
        # Each start gets as far as a shard or two beyond the one before, or dies before its first.
        goal = len(parts(output)) + rng.choice((0, 1, 2))
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 30
            while len(parts(output)) < goal and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.random() * (0.02 if goal else 0.5))
            process.send_signal(signal.SIGKILL)
        if process.returncode == 0:  # faster than the dice: once more from the start
            assert sha256(output) == sha256(tmp_path / "undisturbed")
            shutil.rmtree(output)
            finished.clear()
            continue
        assert process.returncode == -signal.SIGKILL
        killed += 1
        finished.append(len(parts(output)))
        assert not output.exists(), "nothing has its final name before it is whole"
    assert finished == sorted(finished) and finished[-1] > 0, "what is finished is kept"
    done = run_script(*command[1:])
    assert done.returncode == 0, done.stderr
    kept = int(done.stdout.split(" of ")[0])
    assert finished[-1] <= kept + 2 and kept > 0
    assert sha256(output) == sha256(tmp_path / "undisturbed")
    assert not output.with_name("out.incomplete").exists()


def test_workers_end_with_the_main_process(corpus: Path, tmp_path: Path) -> None:
    """And one that cannot, for the time being, is not in the way of the next start."""
    command = small_shards(corpus, tmp_path / "out", "--tokenizer", "bytes", "--workers", "2")
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not parts(tmp_path / "out") and process.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        for worker in workers[:1]:
            os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGKILL)
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    for worker in workers[:1]:
        os.kill(worker, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    return False


@contextlib.contextmanager
def interrupted(corpus: Path, output: Path) -> Iterator[list[Path]]:
    """A preparation that was killed when some of its shards were finished."""
    command = [sys.executable, *small_shards(corpus, output, "--tokenizer", "bytes", "--workers", "1")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while len(parts(output)) < 3 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    yield sorted(parts(output))


def test_damaged_parts_are_made_again(corpus: Path, tmp_path: Path) -> None:
    with interrupted(corpus, tmp_path / "out") as finished:
        damaged = finished[0] / "train"
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        (finished[1] / "record.json").write_text("{")
    done = run_script(*small_shards(corpus, tmp_path / "out", "--tokenizer", "bytes"))
    assert done.returncode == 0, done.stderr
    prepare(corpus, tmp_path / "afresh", "--tokenizer", "bytes")
    assert sha256(tmp_path / "out") == sha256(tmp_path / "afresh")


@pytest.mark.parametrize("change", ["files", "options"])
def test_parts_of_other_input_are_made_again(corpus: Path, tmp_path: Path, change: str) -> None:
    with interrupted(corpus, tmp_path / "out"):
        options = ["--tokenizer", "bytes"]
    if change == "files":
        write_parquet(corpus / "a.parquet", [f"another text {i} " * 30 for i in range(1000)])
        write_jsonl(corpus / "b.jsonl", [f"yet another text {i} " * 30 for i in range(1000)])
    else:
        options += ["--validation-fraction", "0.5"]
    done = run_script(*small_shards(corpus, tmp_path / "out", *options))
    assert done.returncode == 0, done.stderr
    prepare(corpus, tmp_path / "afresh", *options)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "afresh")


# --- what comes out


def test_meta_card_and_stats(corpus: Path, tmp_path: Path) -> None:
    out = prepare(corpus, tmp_path / "my-texts", "--tokenizer", "bytes", "--stats")
    meta = json.loads((tmp_path / "my-texts/meta.json").read_text())
    assert meta["sha256"] == {name: sha256(tmp_path / "my-texts")[name] for name in OUTPUTS[:2]}
    assert (meta["source"], meta["revision"], meta["tokenizer"]) == (str(corpus), None, "bytes")
    train, validation = meta["splits"]["train"], meta["splits"]["validation"]
    assert train["documents"] + validation["documents"] == 2400 and validation["documents"] > 5
    assert train["bytes"] == train["tokens"] - train["documents"], "of bytes each but the last is text"
    card = DatasetCard.load(tmp_path / "my-texts/README.md")
    assert card.data.pretty_name == "my-texts" and "text-generation" in card.data.task_categories
    assert meta["sha256"]["train.safetensors"] in card.text

    tokens = np.concatenate([load_file(tmp_path / "my-texts" / name)["tokens"] for name in OUTPUTS[:2]])
    lengths = np.diff(np.flatnonzero(tokens == 256), prepend=-1)
    assert (
        f"mean {lengths.mean():,.1f}, median {np.median(lengths):,.0f}; {len(tokens):,} tokens in all" in out
    )
    lost = 1 - np.minimum(lengths, 1024).sum() / len(tokens)
    assert f"Cropping every document to 1,024 tokens would lose {lost:.1%}" in out
    assert (tmp_path / "my-texts/document-lengths.png").read_bytes().startswith(b"\x89PNG")


CHECK_DURABILITY = """
import os, sys
from pathlib import Path
import prepare_datasets
on_disk, fsync, replace = set(), os.fsync, Path.replace
def record(handle):
    fsync(handle)
    on_disk.add(os.fstat(handle).st_ino)
def check(folder, target):
    missing = [path.name for path in (folder, *folder.iterdir()) if path.stat().st_ino not in on_disk]
    assert not missing, missing
    on_disk.clear()
    return replace(folder, target)
os.fsync, Path.replace = record, check
prepare_datasets.main(sys.argv[1:], standalone_mode=False)
assert on_disk == {Path(sys.argv[2]).parent.stat().st_ino}, "the folder that has the new name in it"
"""


def test_all_is_on_the_disk_before_it_has_its_name(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run_script("-c", CHECK_DURABILITY, corpus, output, "--tokenizer", "bytes", "--stats")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in output.iterdir()} == {*OUTPUTS, "README.md", "document-lengths.png"}


# --- what goes wrong


def test_sources_that_are_no_good(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", ["a"])
    broken = write_parquet(tmp_path / "broken.parquet", ["text"] * 1000)
    broken.write_bytes(broken.read_bytes()[:-100])
    numbers = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), numbers)
    cut = write_parquet(tmp_path / "cut.parquet", [f"{i} " * 1000 for i in range(1000)])
    data = bytearray(cut.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 1000] = b"\0" * 1000
    cut.write_bytes(data)
    empty = write_parquet(tmp_path / "empty.parquet", [])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder").mkdir()
    second = write_jsonl(tmp_path / "second.jsonl", [f"{i}" for i in range(20_000)])
    with second.open("a") as file:
        file.write('{"body": "not"}\n')
    for source, options, message in (
        (good, ["--text-column", "body"], "good.parquet: has no column 'body'; --text-column is one of"),
        (numbers, [], "column 'text' is int64, not text"),
        (broken, [], "broken.parquet: no whole parquet file"),
        (cut, [], "cut.parquet: no whole parquet file"),
        (empty, [], "holds no documents to train on"),
        (tmp_path / "empty.txt", [], "no text for validation beside that for training"),
        (tmp_path / "folder", [], "holds no .parquet, .jsonl"),
        (second, [], 'line 20001 is no JSON object with a text "text"'),
        ("HuggingFaceFW/fineweb", [], "no such file or folder; the source may also be 'python-docs'"),
        ("../fineweb", ["--files", "*"], "the dataset's owner '..' must be a plain name"),
    ):
        error = refused(source, tmp_path / "out", "--tokenizer", "bytes", *options)
        assert message in error
        assert not list(tmp_path.glob("out*")), "nothing half written is left"
    # With shards so small that the last line's number counts those of other shards.
    done = run_script(*small_shards(second, tmp_path / "out", "--tokenizer", "bytes"))
    assert "line 20001 is no JSON object" in done.stderr


def test_an_output_folder_in_use(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, *small_shards(corpus, output, "--tokenizer", "bytes", "--workers", "1")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not parts(output) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        try:
            error = refused(corpus, output, "--tokenizer", "bytes")
        finally:
            process.send_signal(signal.SIGCONT)
        assert "another process is preparing it" in error
        assert process.wait(60) == 0
    error = refused(corpus, output, "--tokenizer", "bytes")
    assert "out: already holds README.md and meta.json and train.safetensors; remove it" in error


def test_a_full_disk(corpus: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the system call fails in the same way."""
    before = sorted(corpus.iterdir())
    for limit in (5_000, 300_000):  # bytes: too few for a shard, and for the joined file only
        done = run_script(
            *small_shards(corpus, tmp_path / "out", "--tokenizer", "bytes"),
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: ") and "cannot be written: File too large; make room" in line
        assert not (tmp_path / "out").exists() and sorted(corpus.iterdir()) == before
    assert parts(tmp_path / "out"), "what was finished is kept"
    done = run_script(*small_shards(corpus, tmp_path / "out", "--tokenizer", "bytes"))
    assert done.returncode == 0 and "shards were there from an earlier start" in done.stdout
