"""A split in several files is read as one: by training, evaluation, hashes, the Hub and back."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Hub
from helpers import (
    MODEL,
    TRAIN,
    Sandbox,
    assert_same_tensors,
    random_tokens,
    refused,
    run_script,
    write_dataset,
    write_model,
)
from huggingface_hub import DatasetCard
from safetensors.numpy import load_file, save_file
from texts import assert_holds, prepare, split_texts, write_jsonl

from basemodel.common.errors import InputError
from basemodel.data.hub import fingerprint_files, same_on_all_nodes
from basemodel.data.sequences import Sequences
from basemodel.data.token_files import TokenFile, TokenFiles
from basemodel.data.tokenizer import get_tokenizer
from basemodel.model.config import GPTConfig
from basemodel.model.weights import read_file
from basemodel.prepare.assemble import lay_out_nanogpt
from basemodel.training.config import TrainConfig
from basemodel.training.run import check_tokens, open_data

VALIDATE = {"validation_interval": 3, "validation_batches": 3, "checkpoint_interval": 3}
THREE = [f"train-0000{index}-of-00003.safetensors" for index in range(3)]


def cut(folder: Path, *places: int, split: str = "train") -> list[Path]:
    """Cut a split's single file at these tokens; return the new files."""
    tokens = load_file(folder / f"{split}.safetensors")["tokens"]
    (folder / f"{split}.safetensors").unlink()
    parts = np.split(tokens, places)
    paths = [folder / f"{split}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save_file({"tokens": part}, path)
    return paths


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, list[str]]:
    texts = [f"{i} " + "word " * (i % 37) for i in range(400)]
    return write_jsonl(tmp_path / "in.jsonl", texts), texts


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [(), (500,), (11, 12), (50, 55, 55, 60, 64, 700), (0, 999), (1000,)])
def test_every_range_is_that_of_the_whole(tmp_path: Path, places: Sequence[int]) -> None:
    """Files shorter than a sequence and empty ones too."""
    whole = np.arange(1000, dtype=np.uint16)
    write_dataset(tmp_path, train=whole)
    if places:
        cut(tmp_path, *places)
    tokens = TokenFiles(tmp_path, "train")
    assert tokens.count == 1000
    edges = sorted({0, 1, 499, 1000, *(place + more for place in places for more in (-1, 0, 1))} - {-1, 1001})
    for start, stop in itertools.combinations(edges, 2):
        found = tokens.read(start, stop)
        assert found.dtype == np.uint16 and np.array_equal(found, whole[start:stop]), (start, stop)
    sequences = Sequences(tokens, 7, 10, seed=42)
    assert sequences.count == 99
    first = sequences.read(0, 99).numpy()
    assert np.array_equal(first, [whole[7 + 10 * i : 18 + 10 * i] for i in range(99)])
    later = sequences.read(99, 99).numpy()
    assert np.array_equal(later[later[:, 0].argsort()], first)


def test_each_file_is_checked_and_named(tmp_path: Path) -> None:
    tokens = np.zeros(200, dtype=np.uint16)
    tokens[[101, 150]] = 64
    write_dataset(tmp_path / "a/b", train=tokens)
    paths = cut(tmp_path / "a/b", 50, 100, 140)
    config = TrainConfig(**{**TRAIN, "dataset": "a/b"})
    model = GPTConfig(**MODEL)
    data = open_data(config, model, tmp_path)
    check_tokens(data, 6, 0, share=(0, 1))  # 97 tokens
    with pytest.raises(InputError, match=rf"^{paths[2]}: token 64 at index 1 is outside"):
        check_tokens(data, 7, 0, share=(0, 1))
    check_tokens(data, 12, 0, share=(0, 2))
    with pytest.raises(InputError, match=rf"^{paths[2]}: token 64 at index 1 "):
        check_tokens(data, 12, 0, share=(1, 2))
    with pytest.raises(InputError, match=r"train-\*-of-00004.safetensors: too short: 200 tokens do not fill"):
        open_data(TrainConfig(**{**TRAIN, "dataset": "a/b", "start_train_token": 190}), model, tmp_path)
    save_file({"tokens": tokens.astype(np.int32)}, paths[1])
    with pytest.raises(InputError, match=rf"^{paths[1]}: must contain one 1-D uint16"):
        TokenFiles(tmp_path / "a/b", "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [*THREE, "train.safetensors"],
            f"{THREE[0]} to train.safetensors are not one set numbered from 00000",
        ),
        (
            [*THREE, "train-00001-of-00002.safetensors"],
            f"{THREE[0]} to {THREE[2]} are not one set",
        ),
        ([*THREE, "train-00003-of-00003.safetensors"], "train-00003-of-00003.safetensors are not one set"),
        (
            ["train-00003-of-00003.safetensors"],
            "are not one set numbered from 00000",
        ),
        (
            ["train-00000-of-00000.safetensors"],
            "are not one set numbered from 00000",
        ),
        ([THREE[0], THREE[2]], f"{THREE[1]}: no such file"),
        (THREE[:1], f"{THREE[1]}: no such file"),
        (["train-00000-of-00001.safetensors", "train.safetensors"], "are not one set"),
        (["train-0-of-3.safetensors", ".incomplete-train.safetensors-0"], "train.safetensors: no such file"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        save_file({"tokens": random_tokens(100)}, tmp_path / name)
    (tmp_path / "validation.safetensors").touch()
    with pytest.raises(InputError, match=message):
        TokenFiles(tmp_path, "train")


def test_a_single_file_may_be_numbered(tmp_path: Path) -> None:
    """As the Hub's own libraries number it."""
    save_file({"tokens": random_tokens(100)}, tmp_path / "train-00000-of-00001.safetensors")
    assert np.array_equal(TokenFiles(tmp_path, "train").read(0, 100), random_tokens(100))


# ------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_training_is_the_same_and_goes_on_across_a_boundary(sandbox: Sandbox, processes: int) -> None:
    """A file ends after 3.1 steps, amid a sequence; the next holds less than one sequence."""
    shutil.copytree(sandbox.datasets / "test/tokens", sandbox.datasets / "test/cut")
    files = cut(sandbox.datasets / "test/cut", 402, 411, 2000)
    files += cut(sandbox.datasets / "test/cut", 700, split="validation")
    for run, dataset in (("whole", "test/tokens"), ("cut", "test/cut")):
        sandbox.write_run(run, {"drop_rate": 0.1}, {"dataset": dataset, **VALIDATE})
        sandbox.train(run, processes=processes)
    assert sandbox.metrics("cut") == sandbox.metrics("whole")
    assert sandbox.metrics("cut", "val_loss") == sandbox.metrics("whole", "val_loss")
    assert_same_tensors(sandbox.final_tensors("cut"), sandbox.final_tensors("whole"))
    weights = [sandbox.checkpoints(run)[-1] / "model.safetensors" for run in ("whole", "cut")]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}) == 1
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert {name: found["sha256"] for name, found in sandbox.meta("cut")["data"].items()} == hashes

    for path in sandbox.checkpoints("cut")[1:]:
        shutil.rmtree(path)
    assert "Resuming after step 3" in sandbox.train("cut", "--resume", processes=processes)
    assert sandbox.metrics("cut") == sandbox.metrics("whole")
    assert_same_tensors(sandbox.final_tensors("cut"), sandbox.final_tensors("whole"))


def test_a_data_set_that_is_cut_otherwise_is_another_unless_allowed(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4})
    sandbox.train()
    expected = sandbox.final_tensors()
    shutil.rmtree(sandbox.checkpoints()[-1])
    cut(sandbox.datasets / "test/tokens", 1000)
    error = refused(*sandbox.command("tiny", "--resume"))
    names = "in train.safetensors and are now in train-00001-of-00002.safetensors"
    changed = f"the train tokens of test/tokens were {names}"
    assert f"-iteration-4 belongs to another run: {changed}; undo the changes" in error
    # Without validation until now, there is nothing to compare with.
    cut(sandbox.datasets / "test/tokens", 1000, split="validation")
    sandbox.write_run(train=VALIDATE)
    said = sandbox.train("tiny", "--resume", "--allow-config-change")
    assert f"Continuing despite changes, as requested: {changed}\n" in said
    assert_same_tensors(expected, sandbox.final_tensors())


def test_nodes_with_other_files_are_told_so() -> None:
    one, other = ({name: {"size": 8, "sha256": "a" * 64}} for name in (THREE[0], "train.safetensors"))
    for nodes in ([one, other], [one, {**one, THREE[1]: one[THREE[0]]}]):
        with pytest.raises(InputError, match=r"safetensors is not on all nodes; delete the wrong files"):
            same_on_all_nodes(nodes)


def test_the_test_loss_is_the_same(sandbox: Sandbox) -> None:
    """Over files that begin and end within sequences."""
    tokens = random_tokens(1000, vocab_size=256)
    folder = write_dataset(sandbox.datasets / "test/tokens", validation=tokens)
    options = ("--dataset", "test/tokens", "--start-token", "5", "--tokens", "960")
    command = ("test_loss.py", sandbox.datasets, *write_model(sandbox.path / "model"), *options)
    whole = run_script(*command)
    cut(folder, 333, 340, 777, split="validation")
    parts = run_script(*command)
    assert whole.returncode == parts.returncode == 0, parts.stderr
    assert "\nBits per byte: " in whole.stdout
    assert parts.stdout == whole.stdout.replace("validation.", "validation-*-of-00004.")


def test_every_file_is_hashed_and_compared_with_meta_json(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    paths = cut(tmp_path, 1000, 3000)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    (tmp_path / "meta.json").write_text(json.dumps({"sha256": hashes}))
    found = fingerprint_files(tmp_path, ["train"])
    assert {name: each["sha256"] for name, each in found.items()} == hashes
    data = bytearray(paths[2].read_bytes())
    data[-2] ^= 1
    paths[2].write_bytes(data)
    with pytest.raises(InputError, match=rf"^{paths[2]}: damaged \(its SHA-256 is not meta.json's\)"):
        fingerprint_files(tmp_path, ["train"])


# ------------------------------------------------------------------------------------------------------------
# Preparing
# ------------------------------------------------------------------------------------------------------------


def largest_file(size: int) -> str:
    """A statement that lowers the size above which a split is written in several files."""
    return f"from basemodel.prepare import assemble; assemble.MAX_FILE_SIZE = {size}"


def test_a_large_split_is_written_in_several_files(tmp_path: Path, corpus: tuple[Path, list[str]]) -> None:
    source, texts = corpus
    out, options = tmp_path / "out", ("--tokenizer", "bytes", "--validation-fraction", "0.05")
    prepare(source, tmp_path / "one", *options)
    expected = assert_holds(tmp_path / "one", split_texts(texts, 0.05), get_tokenizer("bytes"))
    said = prepare(source, out, *options, before=largest_file(10_000))
    meta = json.loads((out / "meta.json").read_text())
    card = DatasetCard.load(out / "README.md").text
    for split in ("train", "validation"):
        paths = sorted(out.glob(f"{split}*"))
        names = [f"{split}-{i:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))]
        names = names if len(paths) > 1 else [f"{split}.safetensors"]
        assert [path.name for path in paths] == names
        tokens = np.concatenate([load_file(path)["tokens"] for path in paths])
        assert np.array_equal(tokens, load_file(tmp_path / f"one/{split}.safetensors")["tokens"])
        sizes = [path.stat().st_size for path in paths]
        assert all(9_990 < size <= 10_000 for size in sizes[:-1]) and sizes[-1] <= 10_000
        for path in paths:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            assert meta["sha256"][path.name] == sha256 and f"| {path.name} | `{sha256}` |" in card
    assert len(list(out.glob("train-*"))) > 5
    assert len(meta["sha256"]) == len(list(out.glob("*.safetensors")))
    assert meta["splits"] == expected["splits"]
    count, documents = len(list(out.glob("train*"))), expected["splits"]["train"]["documents"]
    assert f"{out}/train-*-of-{count:05d}.safetensors: {documents} documents, " in said

    code, names = card.partition("```python\n")[2].partition("```")[0], {}
    with contextlib.chdir(out):
        exec(code, names)  # as the card says that they are read
    assert np.array_equal(names["tokens"], load_file(tmp_path / "one/train.safetensors")["tokens"])


def test_a_file_exactly_as_large_as_allowed_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x" * 4000)
    options = ("--tokenizer", "bytes", "--validation-fraction", "0.1")
    prepare(tmp_path / "in.txt", tmp_path / "one", *options)
    size = (tmp_path / "one/train.safetensors").stat().st_size
    for most, files in ((size, 1), (size - 1, 2)):
        prepare(tmp_path / "in.txt", tmp_path / str(most), *options, before=largest_file(most))
        assert len(list((tmp_path / str(most)).glob("train*"))) == files


# ------------------------------------------------------------------------------------------------------------
# The Hub
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def far(sandbox: Sandbox, serve_hub: Callable[[Path], Hub]) -> Hub:
    """A Hub alone has the run's data set far/away, with train tokens in three files."""
    folder = write_dataset(sandbox.path / "hub/far/away", meta={"description": "tokens"})
    cut(folder, 1000, 3000)
    hub = serve_hub(sandbox.path / "hub")
    sandbox.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(sandbox.path / "home")}
    sandbox.write_run(train={"dataset": "far/away", "validation_interval": 8, "validation_batches": 1})
    return hub


def test_several_files_are_fetched_and_the_hub_is_not_asked_again(sandbox: Sandbox, far: Hub) -> None:
    sandbox.train(processes=2)
    fetched = sandbox.datasets / "far/away"
    for path in (sandbox.path / "hub/far/away").iterdir():
        assert (fetched / path.name).read_bytes() == path.read_bytes()
        assert far.downloads(path.name) == 1
    known = json.loads((fetched / ".fingerprints.json").read_text())
    assert {known[name]["revision"] for name in THREE} == {"0" * 40}
    whole = sandbox.final_tensors()
    far.requests.clear()
    sandbox.train()
    assert far.requests == []
    sandbox.write_run("one", train={"validation_interval": 8, "validation_batches": 1})
    sandbox.train("one", processes=2)
    assert_same_tensors(whole, sandbox.final_tensors("one"))


def test_what_is_missing_of_a_set_is_fetched_from_the_same_commit(sandbox: Sandbox, far: Hub) -> None:
    """As after a kill between two files; the branch may have moved on since."""
    sandbox.write_run(train={"dataset": "far/away", "dataset_revision": "main"})
    sandbox.train()
    fetched = sandbox.datasets / "far/away"
    (fetched / THREE[1]).unlink()
    far.requests.clear()
    sandbox.train()
    paths = [path for method, path in far.requests if method == "GET" and "/datasets/" in path]
    commit = "0" * 40
    assert paths == [
        f"/api/datasets/far/away/revision/{commit}",
        f"/datasets/far/away/resolve/{commit}/{THREE[1]}",
    ]
    # Where the Hub does not have it either, the error says which.
    for folder in (fetched, sandbox.path / "hub/far/away"):
        (folder / THREE[1]).unlink()
    error = refused(*sandbox.command("tiny"), env=sandbox.env)
    assert f"far/away: could not download {THREE[1]} from the Hub" in error
    (fetched / "train.safetensors").touch()
    error = refused(*sandbox.command("tiny"), env=sandbox.env)
    assert f"{THREE[0]} to train.safetensors are not one set numbered from 00000; move strays" in error


def test_a_hub_that_has_two_sets_is_not_guessed_at(sandbox: Sandbox, far: Hub) -> None:
    (sandbox.path / "hub/far/away/train-00000-of-00001.safetensors").touch()
    error = refused(*sandbox.command("tiny"), env=sandbox.env)
    assert f"far/away: train-00000-of-00001.safetensors to {THREE[2]} are not one set" in error
    assert not list(sandbox.datasets.glob("far/away/*.safetensors"))


def test_the_plan_needs_all_files(sandbox: Sandbox, far: Hub) -> None:
    sandbox.train()
    assert "far/away, 4,000 training tokens" in sandbox.train("tiny", "--plan")
    (sandbox.datasets / "far/away" / THREE[1]).unlink()
    far.requests.clear()
    assert "far/away, not here yet" in sandbox.train("tiny", "--plan")
    assert far.requests == []


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 999\n", "Git LFS pointer"),
        (b"\x93NUMPY\x01\0v\0{'descr': '<u2', 'fortran_order': False}", "NumPy array with a header"),
    ],
)
def test_what_stands_in_for_tokens_or_weights_is_named(tmp_path: Path, start: bytes, what: str) -> None:
    """Of an even number of bytes, so that it could be uint16 too."""
    for name in ("train.bin", "val.bin", "train.safetensors"):
        (tmp_path / name).write_bytes(start + b" " * (len(start) % 2))
        assert (tmp_path / name).stat().st_size % 2 == 0
    path = tmp_path / "train.safetensors"
    for read in (TokenFile, read_file, lambda _: lay_out_nanogpt(tmp_path, get_tokenizer("bytes"))):
        with pytest.raises(InputError, match=f"{what}, not the file itself"):
            read(path)
