"""Text to tokens, and which tokens a step takes."""

import gzip
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import Sandbox, needs_gpt2, random_tokens, run_script, write_dataset
from safetensors.numpy import load_file

from basemodel.config import TrainConfig
from basemodel.data import Sequences, TokenFile, plan_batches
from basemodel.documents import in_validation
from basemodel.tokenizer import get_tokenizer
from ddp_train import learning_rate_at

TEXTS = [
    *("Hello, world", "", "  two\n\nlines ", "smile \N{GRINNING FACE} \u4f60\u597d \u0000\u0007 control"),
    *("a <|endoftext|> that is text", "\ud55c\uad6d\uc5b4", "x" * 5000, "na\u00efve caf\u00e9"),
    *(f"document {i} " + "word " * (i % 50) for i in range(300)),
]


def prepare(source: Path | str, output: Path, *options: str) -> str:
    done = run_script("prepare_datasets.py", source, output, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(folder: Path, tokenizer: str) -> dict[str, list[list[int]]]:
    """The documents of each split, as lists of tokens, the end-of-text tokens taken off."""
    end = get_tokenizer(tokenizer).eot_token
    splits = {}
    for split in ("train", "validation"):
        tokens = load_file(folder / f"{split}.safetensors")["tokens"]
        assert tokens.dtype == np.uint16 and tokens.ndim == 1 and tokens[-1] == end
        splits[split] = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]]
        assert all(part.pop() == end for part in splits[split])
    return splits


def write_corpus(folder: Path) -> Path:
    """TEXTS in files of every known type, in the order in which they will be read."""
    folder.mkdir()
    thirds = TEXTS[:100], TEXTS[100:200], TEXTS[200:300]
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in texts) for texts in thirds]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(100), "text": thirds[0]}), folder / "a.parquet")
    (folder / "b.jsonl").write_text(lines[1])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines[2].encode()))
    rest = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[300:])
    with pyarrow.CompressedOutputStream(str(folder / "d.jsonl.zst"), "zstd") as file:
        file.write(rest.encode())
    (folder / "sub").mkdir()
    (folder / "sub/e.txt").write_text("the last document")
    (folder / "README.md").write_text("not text to train on")
    return folder


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_every_document_is_encoded_as_tiktoken_does(tmp_path: Path, tokenizer: str) -> None:
    prepare(
        write_corpus(tmp_path / "in"),
        tmp_path / "out",
        "--tokenizer",
        tokenizer,
        "--validation-fraction",
        "0.2",
    )
    encoding = get_tokenizer(tokenizer)
    expected = {"train": [], "validation": []}
    for text in [*TEXTS, "the last document"]:
        split = "validation" if in_validation([text.encode()], 0.2) else "train"
        expected[split].append(encoding.encode_ordinary(text))
    assert documents(tmp_path / "out", tokenizer) == expected
    assert 0.1 < len(expected["validation"]) / len(TEXTS) < 0.3
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["token_dtype"]) == (
        tokenizer,
        encoding.n_vocab,
        "uint16",
    )
    for split, found in expected.items():
        counts = meta["splits"][split]
        assert counts["documents"] == len(found)
        assert counts["tokens"] == sum(map(len, found)) + len(found)
        assert counts["bytes"] == sum(len(encoding.decode_bytes(tokens)) for tokens in found)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in")
    for workers in ("1", "3"):
        prepare(tmp_path / "in", tmp_path / workers, "--tokenizer", "bytes", "--workers", workers)
    for name in ("train.safetensors", "validation.safetensors", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_one_text_file_is_split_near_its_end(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    prepare(tmp_path / "input.txt", tmp_path / "out", "--tokenizer", "bytes", "--validation-fraction", "0.1")
    train, validation = (
        load_file(tmp_path / f"out/{s}.safetensors")["tokens"] for s in ("train", "validation")
    )
    assert bytes(np.concatenate([train, validation])[:-1].astype(np.uint8)).decode() == text
    assert len(validation) == pytest.approx(0.1 * len(text), abs=1)


def test_invalid_utf8_is_replaced_counted_and_said(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.txt").write_bytes(b"caf\xe9 and \xff, but \xef\xbf\xbd was there")
    (tmp_path / "in/good.txt").write_text("caf\u00e9")
    out = prepare(tmp_path / "in", tmp_path / "out", "--tokenizer", "bytes")
    assert "replaced by 2 characters" in out


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "another"}\n')
    prepare(tmp_path / "in.jsonl", tmp_path / "out", "--tokenizer", "bytes")
    found = documents(tmp_path / "out", "bytes")
    assert list("a\ufffdb".encode()) in found["train"] + found["validation"]


def test_python_docs_are_prepared_with_stats_and_trained_on_at_once(sandbox: Sandbox) -> None:
    folder = sandbox.datasets / "local/python-docs"
    out = prepare("python-docs", folder, "--tokenizer", "bytes", "--stats")
    assert "mean" in out and "median" in out
    assert (folder / "document-lengths.png").read_bytes().startswith(b"\x89PNG")
    meta = json.loads((folder / "meta.json").read_text())
    assert 1_500_000 < meta["splits"]["train"]["bytes"] < 10_000_000
    text = b"".join(bytes(tokens) for tokens in documents(folder, "bytes")["train"])
    assert b"with statement" in text and b"Traceback" in text
    bytes_model = {"vocab_size": 257, "tokenizer": "bytes"}
    sandbox.write_run(model=bytes_model, train={"dataset": "local/python-docs"})
    sandbox.train()


# --- which tokens a step takes


def sequences(tmp_path: Path, tokens: int = 1000, start: int = 0, length: int = 10) -> Sequences:
    write_dataset(tmp_path, train=np.arange(tokens, dtype=np.uint16))
    return Sequences(TokenFile(tmp_path / "train.safetensors"), start, length, seed=42)


def config(**values: object) -> TrainConfig:
    return TrainConfig(**{"dataset": "a/b", "microbatch_size": 4, "min_train_tokens": -1, **values})


def test_sequence_i_of_the_first_epoch_is_where_the_contract_says(tmp_path: Path) -> None:
    data = sequences(tmp_path, start=7)
    batch = data.read(3, 2).tolist()
    assert batch == [list(range(37, 48)), list(range(47, 58))]


@pytest.mark.parametrize(
    ("tokens", "start", "count"), [(101, 0, 10), (100, 0, 9), (111, 10, 10), (10, 0, 0), (5, 9, 0)]
)
def test_an_epoch_holds_whole_sequences_with_their_targets(tmp_path: Path, tokens, start, count) -> None:
    assert sequences(tmp_path, tokens, start).count == count


def test_later_epochs_go_through_the_same_sequences_in_orders_of_their_own(tmp_path: Path) -> None:
    data = sequences(tmp_path)
    epochs = [data.read(epoch * data.count, data.count)[:, 0].tolist() for epoch in range(3)]
    assert epochs[0] == sorted(epochs[0])
    assert sorted(epochs[1]) == sorted(epochs[2]) == epochs[0]
    assert epochs[1] != epochs[0] and epochs[2] != epochs[1]
    assert sequences(tmp_path).read(data.count, data.count)[:, 0].tolist() == epochs[1]
    straddling = data.read(data.count - 2, 4)[:, 0].tolist()
    assert straddling == epochs[0][-2:] + epochs[1][:2]


def test_the_global_batch_is_the_same_however_it_is_split() -> None:
    splits = [(12, 1, 1), (4, 1, 3), (2, 3, 2), (1, 2, 6)]  # microbatch, accumulation, processes
    for step in (0, 5):
        batches = []
        for microbatch, accumulation, processes in splits:
            plan = plan_batches(
                config(microbatch_size=microbatch, gradient_accumulation_steps=accumulation),
                10,
                processes,
                1000,
            )
            firsts = [first for rank in range(processes) for first in plan.microbatches(step, rank)]
            batches.append(sorted(n for first in firsts for n in range(first, first + microbatch)))
        assert all(batch == list(range(step * 12, step * 12 + 12)) for batch in batches)


@pytest.mark.parametrize(("minimum", "steps"), [(1, 1), (40, 1), (41, 2), (400, 10), (-1, 25)])
def test_tokens_are_rounded_up_to_whole_global_batches_and_exact_multiples_stay(
    minimum: int, steps: int
) -> None:
    assert plan_batches(config(min_train_tokens=minimum), 10, 1, 103).steps == steps


def test_learning_rate_warms_up_then_falls_along_a_cosine_to_a_tenth() -> None:
    scheduled = config(learning_rate=1.0, schedule_learning_rate=True, warmup_period_percent=10)
    rates = [learning_rate_at(step, 100, scheduled) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1)
    middle = rates[10:]
    assert all(one > other for one, other in itertools.pairwise(middle))
    assert middle[44] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))
    assert learning_rate_at(99, 100, config(learning_rate=0.3)) == 0.3


def test_random_tokens_can_be_learnt() -> None:
    """The tests' data are not noise: otherwise none of them would notice training that does nothing."""
    tokens = random_tokens(1000).astype(int)
    assert set((np.diff(tokens) % 64).tolist()) == {0, 1, 2, 3, 4}
