"""Preparing text: what comes out is the text, and what is no text is refused."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import Sandbox, assert_modes_are_the_umasks, refused
from huggingface_hub import DatasetCard
from safetensors.numpy import load_file
from texts import (
    assert_holds,
    nasty_text,
    prepare,
    random_characters,
    split_texts,
    write_jsonl,
    write_parquet,
)

from basemodel.common.errors import InputError
from basemodel.data.tokenizer import get_tokenizer
from prepare_datasets import main


def write_corpus(folder: Path) -> list[str]:
    """Files of every known type, and one of none; return their documents, in the order of reading."""
    rng = random.Random(0)
    texts = [nasty_text(rng, 200) + random_characters(rng, 50) for _ in range(300)]
    texts += ["<|endoftext|>", "a<|endoftext|>b", "\0\x01\x02\x1e\x1f", "twice", "\ud55c\uad6d\uc5b4"]
    texts[::60] = ["twice"] * len(texts[::60])
    (folder / "sub").mkdir(parents=True)
    first, second, third, fourth = (texts[part::4] for part in range(4))
    write_parquet(folder / "a.parquet", [*first, None, ""])
    write_jsonl(folder / "b.jsonl", [*second, "half a pair: \ud800.", None])
    lines = write_jsonl(folder / "c", third).read_bytes()
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(folder / "d.jsonl.zst"), "zstd") as file:
        file.write(write_jsonl(folder / "c", fourth).read_bytes())
    (folder / "README.md").write_text("not text to train on")
    invalid = b"caf\xe9 \xff \xe4\xb8 and \xef\xbf\xbd"
    (folder / "sub/e.txt").write_bytes(invalid)
    return [*first, *second, "half a pair: \ufffd.", *third, *fourth, invalid.decode(errors="replace")]


@pytest.mark.parametrize("engine", ["auto", "tiktoken", "gigatoken", "bytes"])
def test_every_document_is_encoded_as_tiktoken_does(tmp_path: Path, gpt2: Any, engine: str) -> None:
    texts = write_corpus(tmp_path / "in")
    options = ["--tokenizer", "bytes"] if engine == "bytes" else ["--engine", engine]
    said = prepare(tmp_path / "in", tmp_path / "out", "--validation-fraction", "0.2", *options)
    assert "Invalid UTF-8 sequences that became U+FFFD: 4" in said
    assert "Empty documents skipped: 1\nNulls skipped: 2\n" in said
    assert ("with gigatoken" in said) == (engine in ("auto", "gigatoken"))
    assert "differently" not in said
    encoding = get_tokenizer("bytes") if engine == "bytes" else gpt2
    splits = split_texts(texts, 0.2)
    meta = assert_holds(tmp_path / "out", splits, encoding)
    assert 0.1 < len(splits["validation"]) / len(texts) < 0.3
    assert (meta["tokenizer"], meta["vocab_size"]) == (encoding.name, encoding.n_vocab)
    assert (meta["token_dtype"], meta["end_of_text"]) == ("uint16", encoding.eot_token)


def test_long_documents_of_either_split_are_whole(tmp_path: Path) -> None:
    """Their fragments are encoded in several batches, of which others hold documents before and behind."""
    sizes = [10, 1_300_000, 20, 1_100_000, 30, 2_400_000]
    texts = [f"{i} " + "word " * (size // 5) for i, size in enumerate(sizes, start=11)]
    splits = split_texts(texts, 0.5)
    assert all(max(map(len, documents)) > 1_200_000 for documents in splits.values())
    (tmp_path / "in").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / f"in/{i}.txt").write_text(text)
    options = ("--tokenizer", "bytes", "--validation-fraction", "0.5")
    out = prepare(tmp_path / "in", tmp_path / "out", *options, "--stats")
    assert_holds(tmp_path / "out", splits, get_tokenizer("bytes"))
    lengths = [len(text) + 1 for text in texts]
    assert f"mean {np.mean(lengths):,.1f}, median {np.median(lengths):,.0f}; {sum(lengths):,} tokens" in out


def test_of_one_text_the_end_is_for_validation(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    prepare(tmp_path / "input.txt", tmp_path / "out", "--tokenizer", "bytes", "--validation-fraction", "0.1")
    train, validation = (
        load_file(tmp_path / f"out/{s}.safetensors")["tokens"] for s in ("train", "validation")
    )
    assert bytes(np.concatenate([train, validation])[:-1].astype(np.uint8)).decode() == text
    assert len(validation) == pytest.approx(0.1 * len(text), abs=1)


def test_text_is_taken_from_the_column_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = [f"text {i}" for i in range(40)]
    columns = {"text": ["not this"] * 20, "body": texts[:20]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "in/a.parquet")
    lines = (json.dumps({"text": "not this", "body": text}) + "\n" for text in texts[20:])
    (tmp_path / "in/b.jsonl").write_text("".join(lines))
    options = ("--tokenizer", "bytes", "--validation-fraction", "0.2", "--text-column", "body")
    prepare(tmp_path / "in", tmp_path / "out", *options)
    assert_holds(tmp_path / "out", split_texts(texts, 0.2), get_tokenizer("bytes"))


def test_meta_card_and_stats(tmp_path: Path) -> None:
    rng = random.Random(4)
    texts = [f"{i} " + "word " * rng.randrange(400) for i in range(500)]
    source, output = write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "my-texts"
    out = prepare(source, output, "--tokenizer", "bytes", "--stats")
    meta = assert_holds(output, split_texts(texts, 0.01), get_tokenizer("bytes"))
    title, *excerpts = out.splitlines()[-4:]
    begin = [(text + " ")[:100].strip() for text in (texts[0], texts[255], texts[-1])]
    assert title == "Excerpts:" and [line.strip() for line in excerpts] == [f"{source}: {b}" for b in begin]
    assert "Excerpts" not in prepare(source, tmp_path / "quiet", "--tokenizer", "bytes", "--quiet")
    assert meta["splits"]["validation"]["documents"] > 1
    assert meta["validation_fraction"] == 0.01
    assert (meta["source"], meta["revision"], meta["replaced"]) == (str(source), None, 0)
    assert_modes_are_the_umasks(output)
    card = DatasetCard.load(output / "README.md")
    assert card.data.pretty_name == "my-texts" and "text-generation" in card.data.task_categories
    assert meta["sha256"]["train.safetensors"] in card.text

    lengths = np.array([len(text) + 1 for text in texts])
    figures = f"mean {lengths.mean():,.1f}, median {np.median(lengths):,.0f}; {lengths.sum():,} tokens in all"
    assert figures in out
    lost = 1 - np.minimum(lengths, 1024).sum() / lengths.sum()
    assert lost > 0.1
    assert f"Cropping every document to 1,024 tokens would lose {lost:.1%}" in out
    assert (output / "document-lengths.png").read_bytes().startswith(b"\x89PNG")


def test_python_docs_are_prepared_and_trained_on_at_once(sandbox: Sandbox) -> None:
    folder = sandbox.datasets / "local/python-docs"
    prepare("python-docs", folder, "--tokenizer", "bytes")
    tokens = load_file(folder / "train.safetensors")["tokens"]
    assert 1_500_000 < len(tokens) < 10_000_000
    documents = bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8)).decode().split("\0")
    assert len(set(documents)) == len(documents), "none comes twice"
    text = "\n".join(documents)
    assert "with statement" in text and "Traceback" in text
    model = {"vocab_size": 257, "tokenizer": "bytes"}
    sandbox.write_run(model=model, train={"dataset": "local/python-docs", "min_train_tokens": 128})
    sandbox.train()


def test_sources_that_are_no_good(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", ["a"])
    broken = write_parquet(tmp_path / "broken.parquet", ["text"] * 1000)
    broken.write_bytes(broken.read_bytes()[:-100])
    numbers = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), numbers)
    empty = write_parquet(tmp_path / "empty.parquet", [])
    options = ["--tokenizer", "bytes"]
    for source, more, message in (
        (good, ["--text-column", "body"], "good.parquet: has no 'body'; set --text-column to one of"),
        (good, ["--validation-fraction", "1"], "--validation-fraction must be between 0 and 1, not 1.0"),
        (good, ["--revision", "v1"], "--revision is for a data set on the Hub"),
        (good, ["--name", "a"], "--name is for a data set on the Hub"),
        (good, ["--engine", "gigatoken"], "--engine gigatoken works with the tokenizer gpt2 only"),
        (numbers, [], "column 'text' is not text: Unsupported cast from int64"),
        (broken, [], "broken.parquet: cannot be read: "),
        (empty, [], "contains no documents to train on"),
        ("../fineweb", ["--files", "*"], "no such file or folder; the source may also be 'python-docs'"),
    ):
        with pytest.raises(InputError) as error:
            main.main([str(source), str(tmp_path / "out"), *options, *more], standalone_mode=False)
        assert message in str(error.value)
        assert not list(tmp_path.glob("out*")), "nothing half written is left"


def test_texts_that_turn_out_to_be_no_good(tmp_path: Path) -> None:
    cut = write_parquet(tmp_path / "cut.parquet", [f"{i} " * 1000 for i in range(1000)])
    data = bytearray(cut.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 1000] = b"\0" * 1000
    cut.write_bytes(data)
    (tmp_path / "empty.txt").write_text("")
    second = write_jsonl(tmp_path / "second.jsonl", [f"{i}" for i in range(5000)])
    with second.open("a") as file:
        file.write('{"body": "not"}\n')
    small_shards = "from basemodel.prepare import documents; documents.SHARD_BYTES = 20_000"
    for source, before, message in (
        (cut, "", "cut.parquet: cannot be read: "),
        (tmp_path / "empty.txt", "", "contains no documents to train on"),
        # The number of the line counts those of other shards.
        (second, small_shards, "line 5001 has no 'text'; set --text-column to one of ['body']"),
    ):
        command = ("prepare_datasets.py", source, tmp_path / "out", "--tokenizer", "bytes")
        error = refused(*command, before=before)
        assert message in error
        if not before:
            assert not list(tmp_path.glob("out*")), "nothing half written is left"


def tokens_of(folder: Path) -> dict[str, bytes]:
    """The bytes of text that each split holds, with \\0 for end-of-text."""
    tokens = {
        split: load_file(folder / f"{split}.safetensors")["tokens"] for split in ("train", "validation")
    }
    return {split: bytes(np.where(some == 256, 0, some).astype(np.uint8)) for split, some in tokens.items()}


BOOK = "".join(f"line {i} of the book\n" for i in range(1200))


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        (["", BOOK], [BOOK]),
        ([BOOK, "", "short"], [BOOK, "short"]),
        (["a", "b", BOOK], ["a", "b", BOOK]),
        ([BOOK, BOOK], [BOOK]),
        ([BOOK, "other", BOOK], [BOOK, "other"]),
    ],
)
def test_where_no_text_falls_to_validation_its_end_does(
    tmp_path: Path, files: list[str], kept: list[str]
) -> None:
    """The fraction that was asked for, of the tokens; and nothing of it is in training data too."""
    assert split_texts(kept)["validation"] == []
    (tmp_path / "in").mkdir()
    for i, text in enumerate(files):
        (tmp_path / f"in/{i}.txt").write_text(text)
    said = prepare(tmp_path / "in", tmp_path / "out", "--tokenizer", "bytes")
    assert ("Documents that are copies of others: 1" in said) == (len(set(files)) < len(files))
    assert ("Empty documents skipped: 1" in said) == ("" in files)
    found = tokens_of(tmp_path / "out")
    whole = "".join(f"{text}\0" for text in kept).encode()
    assert found["train"] + found["validation"] == whole
    assert len(found["validation"]) == int(0.01 * len(whole))
    splits = json.loads((tmp_path / "out/meta.json").read_text())["splits"]
    begins = np.cumsum([0, *(len(text) + 1 for text in kept)])[:-1]
    assert splits["train"] == {
        "documents": (begun := int((begins < len(found["train"])).sum())),
        "tokens": len(found["train"]),
        "bytes": len(found["train"].replace(b"\0", b"")),
    }
    assert splits["validation"]["documents"] == len(kept) - begun, "each is counted once, where it begins"
    assert splits["validation"]["bytes"] == len(found["validation"].replace(b"\0", b""))


def test_copies_are_counted_and_lie_on_one_side(tmp_path: Path) -> None:
    rng = random.Random(5)
    texts = [f"text {rng.randrange(300)}" for _ in range(1000)]
    said = prepare(
        write_jsonl(tmp_path / "in.jsonl", texts),
        tmp_path / "out",
        "--tokenizer",
        "bytes",
        "--validation-fraction",
        "0.3",
    )
    assert f"Documents that are copies of others: {len(texts) - len(set(texts))}" in said
    sides = [set(text.split(b"\0")[:-1]) for text in tokens_of(tmp_path / "out").values()]
    assert all(sides) and not sides[0] & sides[1]
    assert sides[0] | sides[1] == {text.encode() for text in texts}


def test_a_validation_split_of_its_own(tmp_path: Path) -> None:
    for split, texts in (("train", ["a", "b", "both"]), ("validation", ["c", "both"])):
        (tmp_path / f"in/{split}").mkdir(parents=True)
        write_jsonl(tmp_path / f"in/{split}/texts.jsonl", texts)
    prepare(tmp_path / "in", tmp_path / "out", "--tokenizer", "bytes")
    assert tokens_of(tmp_path / "out") == {"train": b"a\0b\0both\0", "validation": b"c\0both\0"}


def test_tokens_of_nanogpt(tmp_path: Path, gpt2: Any) -> None:
    texts = {"train": ["a text", "another one"], "val": ["a third"]}
    (tmp_path / "in").mkdir()
    for name, some in texts.items():
        tokens = [token for text in some for token in (*gpt2.encode_ordinary(text), gpt2.eot_token)]
        np.array(tokens, np.uint16).tofile(tmp_path / f"in/{name}.bin")
    (tmp_path / "in/input.txt").write_text("what they were made from")
    said = prepare(tmp_path / "in", tmp_path / "out", "--stats")
    assert_holds(tmp_path / "out", {"train": texts["train"], "validation": texts["val"]}, gpt2)
    assert "mean" in said
    command = ("prepare_datasets.py", tmp_path / "in", tmp_path / "out2")
    np.array([5, 60_000], np.uint16).tofile(tmp_path / "in/val.bin")
    assert "in/val.bin: token 60000 is outside the vocabulary" in refused(*command)
    np.array([5, 6], np.uint32).tofile(tmp_path / "in/val.bin")
    assert "in/val.bin: holds uint32 or wider numbers" in refused(*command)
    (tmp_path / "in/val.bin").write_bytes(b"odd")
    assert "in/val.bin: damaged: not a whole number of uint16" in refused(*command)
    (tmp_path / "in/val.bin").unlink()
    assert "in/val.bin: is missing" in refused(*command)
    (tmp_path / "in/meta.pkl").write_bytes(b"")
    assert "meta.pkl says that its tokens are nanoGPT's own for single characters" in refused(*command)
