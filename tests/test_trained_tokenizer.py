"""Tokenizers of a data set's own: the ids are those of the library `tokenizers`, wherever text is encoded."""

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folder_hub import use_hub
from helpers import MODEL, Sandbox, refused, run_script, write_dataset
from safetensors.numpy import load_file
from texts import EDGES, assert_holds, nasty_text, prepare, random_characters, split_texts, write_jsonl

from basemodel.common.errors import InputError
from basemodel.common.output import printable
from basemodel.data.hub import fetch_dataset, fingerprint_files
from basemodel.data.sequences import match_tokenizer
from basemodel.data.tokenizer import (
    byte_characters,
    get_tokenizer,
    read_tokenizer,
    same_tokenizer,
    train_tokenizer,
)
from basemodel.model.config import GPTConfig
from basemodel.model.loss import NextTokenLoss
from basemodel.prepare import encoding
from basemodel.prepare.readers import cut_into_pieces
from basemodel.training.run_folder import read_samples
from gpt import GPTModel

os.environ["TOKENIZERS_PARALLELISM"] = "true"
torch.set_num_threads(1)
tokenizers = pytest.importorskip("tokenizers")
SIZE = 600


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts in words that recur, of three scripts, and of characters that do not."""
    rng = random.Random(seed)
    words = [
        "Größe",
        "Straße",
        " und",
        " the",
        " tokens",
        "'s",
        "語言",
        "язык",
        " 1024",
        "\n\n",
        "\t",
        " ",
        "  (",
    ]
    make = [lambda: "".join(rng.choices(words, k=rng.randrange(1, 60)))] * 3
    make += [lambda: nasty_text(rng, 60), lambda: random_characters(rng, 30)]
    texts = [rng.choice(make)() for _ in range(count)]
    return [text for text in texts if text]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    train_tokenizer(iter(some_texts(400)), SIZE, path)
    return path


def library(path: Path) -> Any:
    """The library's tokenizer, for which end-of-text inside a text is text."""
    found = tokenizers.Tokenizer.from_file(str(path))
    found.encode_special_tokens = True
    return found


def assert_same_ids(path: Path, texts: list[str]) -> None:
    ours, theirs = read_tokenizer(path), library(path)
    for text in texts:
        ids = theirs.encode(text).ids
        assert encoding.encode(ours, text.encode()).tolist() == ids == ours.encode_ordinary(text), repr(text)
        assert ours.decode(ids) == text


def test_ids_are_the_librarys(trained: Path) -> None:
    tokenizer = read_tokenizer(trained)
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (SIZE, SIZE - 1)
    texts = [*some_texts(300, seed=1), "", "<|endoftext|>", " " * 3000, "a" * 3000, "Größe" * 500]
    texts += [
        "\n".join(f"{chr(point)}'s  {chr(point)}" for point in range(first, first + 256))
        for first in range(0, 0x20000, 256)
        if not 0xD800 <= first < 0xE000
    ]
    texts += ["".join(each) for each in itertools.product(EDGES, repeat=3)][::97]
    assert_same_ids(trained, texts)


def test_the_same_texts_train_the_same_file(trained: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(some_texts(400)), SIZE, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == trained.read_bytes()


# ------------------------------------------------------------------------------------------------------------
# Files that others trained
# ------------------------------------------------------------------------------------------------------------


def renumber(content: dict, end: int) -> None:
    """Give end-of-text the id `end`, and move up those behind."""
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: value + (value >= end) for token, value in vocab.items()}
    content["added_tokens"][0]["id"] = end


def every_split(content: dict) -> None:
    """List every way to make a token of two, as transformers does for tiktoken's files."""
    vocab = content["model"]["vocab"]
    pairs = []
    for token in sorted(vocab, key=vocab.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs += [list(cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    content["model"]["merges"] = pairs


OTHERS: dict[str, Callable[[dict], Any]] = {
    "end-of-text first": lambda content: renumber(content, 0),
    "end-of-text in the midst": lambda content: renumber(content, 300),
    "end-of-text in the vocabulary": lambda content: content["model"]["vocab"].update(
        {"<|endoftext|>": SIZE - 1}
    ),
    "merges as strings, no type": lambda content: content["model"].update(
        type="BPE", merges=[" ".join(pair) for pair in content["model"]["merges"]]
    ),
    "GPT-2's post-processor": lambda content: content.update(
        post_processor={
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }
    ),
}


@pytest.mark.parametrize("change", OTHERS)
def test_files_of_others_are_read(trained: Path, tmp_path: Path, change: str) -> None:
    content = json.loads(trained.read_text())
    OTHERS[change](content)
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert_same_ids(tmp_path / "other.json", some_texts(300, seed=2))
    tokenizer = read_tokenizer(tmp_path / "other.json")
    assert tokenizer.eot_token == content["added_tokens"][0]["id"] and tokenizer.n_vocab == SIZE


def swap(content: dict, one: int, other: int) -> None:
    names = {value: token for token, value in content["model"]["vocab"].items()}
    content["model"]["vocab"] |= {names[one]: other, names[other]: one}


def drop(content: dict, token: str) -> None:
    """Take a token out, and move down those behind."""
    vocab = content["model"]["vocab"]
    place = vocab.pop(token)
    content["model"]["vocab"] = {name: value - (value > place) for name, value in vocab.items()}
    content["added_tokens"][0]["id"] -= 1


def added(name: str, value: int = SIZE) -> dict:
    return {"id": value, "content": name, "special": True}


REFUSED: dict[str, Callable[[dict], Any]] = {
    "must be a byte-pair encoding": lambda c: c["model"].update(type="WordPiece"),
    "must be a byte-pair encoding (BPE)": lambda c: c.pop("model"),
    "with a vocab and merges": lambda c: c["model"].pop("merges"),
    "a pre_tokenizer other than": lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
    "no prefix space": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    "its regex": lambda c: c["pre_tokenizer"].update(use_regex=False),
    "has a pre_tokenizer": lambda c: c.update(pre_tokenizer=None),
    "has a normalizer": lambda c: c.update(normalizer={"type": "NFC"}),
    "has a truncation": lambda c: c.update(truncation={"max_length": 512}),
    "has a post_processor": lambda c: c.update(post_processor={"type": "TemplateProcessing"}),
    "has the dropout 0.1": lambda c: c["model"].update(dropout=0.1),
    "has the end_of_word_suffix '</w>'": lambda c: c["model"].update(end_of_word_suffix="</w>"),
    "has no added token <|endoftext|>": lambda c: c.update(added_tokens=[]),
    "has no added token": lambda c: c.update(added_tokens="none"),
    "besides <|endoftext|>: <pad>": lambda c: c["added_tokens"].append(added("<pad>")),
    "lacks 1 of the 256 bytes: 0x00": lambda c: drop(c, "\u0100"),
    "each once": lambda c: c["model"]["vocab"].update(a=7),
    "0 to 599": lambda c: c["added_tokens"][0].update(id=700),
    "599, each": lambda c: c["added_tokens"][0].update(id=None),
    "65,536 tokens; uint16 has room for 65,535": lambda c: c["model"]["vocab"].update(
        {f"x{number}": number for number in range(SIZE - 1, 65_535)}
    ),
    "'語' has a character that stands for no byte": lambda c: c["model"]["vocab"].update({"語": SIZE}),
    "lists merges that do not make its tokens": lambda c: c["model"]["merges"].pop(3),
    "lists merges": lambda c: c["model"]["merges"].append(["a"]),
    "so that tiktoken would encode differently": lambda c: c["model"]["merges"].reverse(),
    "lists merges that do not make its tokens in the order": every_split,
    "no two tokens with lower ids": lambda c: swap(c, 256, SIZE - 2),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_encoded_exactly_is_refused(trained: Path, tmp_path: Path, message: str) -> None:
    content = json.loads(trained.read_text())
    REFUSED[message](content)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        read_tokenizer(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"model":', "\ufeff{}", '{"model": {"a": 1, "a": 2}}', "null"])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer\.json: "):
        read_tokenizer(tmp_path / "tokenizer.json")


def random_file(rng: random.Random, template: dict) -> dict:
    """A tokenizer with random merges of a, b and c: some make a token twice, some are out of order."""
    characters = byte_characters()
    vocab, tokens, pairs = {characters[byte]: byte for byte in range(256)}, ["a", "b", "c"], []
    for _ in range(rng.randrange(1, 12)):
        pair = rng.choice(tokens), rng.choice(tokens)
        pairs.append(pair)
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            tokens.append("".join(pair))
    if rng.random() < 0.3:
        rng.shuffle(pairs)
    end = {"id": len(vocab), "content": "<|endoftext|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = template["model"] | {"vocab": vocab, "merges": pairs}
    return template | {"model": model, "added_tokens": [end]}


def test_random_merges_are_encoded_exactly_or_refused(trained: Path, tmp_path: Path) -> None:
    rng, template, read = random.Random(0), json.loads(trained.read_text()), 0
    for number in range(150):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(random_file(rng, template)))
        try:
            read_tokenizer(path)
        except InputError:
            continue
        read += 1
        assert_same_ids(path, ["".join(rng.choices("abc", k=rng.randrange(60))) for _ in range(60)])
    assert 25 < read < 125, read


# ------------------------------------------------------------------------------------------------------------
# In a data set, in training and after it
# ------------------------------------------------------------------------------------------------------------


def test_a_data_set_is_encoded_with_the_tokenizer_trained_on_it(tmp_path: Path) -> None:
    texts = some_texts(300)
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    small = "from basemodel.prepare import documents; documents.SHARD_BYTES = 20_000"
    options = ("--train-tokenizer", str(SIZE), "--validation-fraction", "0.2")
    prepare(source, tmp_path / "one", *options, "--workers", "1", before=small)
    prepare(source, tmp_path / "two", *options, "--workers", "2", before=small)
    tokenizer = get_tokenizer("dataset", tmp_path / "one")
    splits = split_texts(texts, 0.2)
    meta = assert_holds(tmp_path / "one", splits, tokenizer)
    assert (meta["tokenizer"], meta["vocab_size"], meta["end_of_text"]) == ("dataset", SIZE, SIZE - 1)
    # Trained on the documents for training alone.
    train_tokenizer(iter(splits["train"]), SIZE, tmp_path / "tokenizer.json")
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {
        "tokenizer.json",
        "train.safetensors",
        "validation.safetensors",
        "meta.json",
        "README.md",
    }
    for name in ("tokenizer.json", "train.safetensors", "validation.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    # A file gives the same data set.
    option = ("--tokenizer", str(tmp_path / "tokenizer.json"), "--validation-fraction", "0.2")
    prepare(source, tmp_path / "three", *option, before=small)
    assert_holds(tmp_path / "three", splits, tokenizer)
    assert (
        fingerprint_files(tmp_path / "three", ["train"])["tokenizer.json"]["sha256"]
        == (meta["sha256"]["tokenizer.json"])
    )


def test_a_sample_is_taken_evenly_from_all_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SAMPLE_BYTES", 20_000)
    letters = "abcd"
    paths = [write_jsonl(tmp_path / f"{a}.jsonl", [a * 90 + str(i) for i in range(400)]) for a in letters]
    pieces = [piece for path in paths for piece in cut_into_pieces(path, None, "text")]
    found = list(encoding.sample_texts(pieces, encoding.Settings("bytes", 0.1, "text")))
    sizes = [sum(len(text) for text in found if text[0] == letter) for letter in letters]
    assert 20_000 <= sum(sizes) < 20_500 and max(sizes) - min(sizes) < 200
    assert set(found) <= set(
        split_texts([a * 90 + str(i) for a in letters for i in range(400)], 0.1)["train"]
    )


def test_shards_of_another_tokenizer_are_encoded_again(trained: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", texts := some_texts(200, seed=3))
    other = tmp_path / "other.json"
    content = json.loads(trained.read_text())
    renumber(content, 0)
    other.write_text(json.dumps(content))
    broken = "from basemodel.prepare import assemble; assemble.lay_out = None"
    run_script("prepare_datasets.py", source, tmp_path / "out", "--tokenizer", trained, before=broken)
    assert (tmp_path / "out.incomplete/parts/000000").exists()
    said = prepare(source, tmp_path / "out", "--tokenizer", str(other))
    assert "already encoded" not in said
    assert_holds(tmp_path / "out", split_texts(texts), read_tokenizer(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokenizer", "gtp2"), "must be gpt2, bytes or a tokenizer.json; there is no file 'gtp2'"),
        (("--tokenizer", "README.md"), "README.md: not valid JSON"),
        (("--tokenizer", "bytes", "--train-tokenizer", "300"), "either --tokenizer or --train-tokenizer"),
        (("--train-tokenizer", "257"), "257 is not in the range 258<=x<=65535"),
        (("--train-tokenizer", "65536"), "65536 is not in the range 258<=x<=65535"),
        (("--train-tokenizer", "300", "--engine", "gigatoken"), "with the tokenizer gpt2 only"),
    ],
)  # fmt: skip
def test_options_that_name_no_tokenizer(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", ["text"])
    assert message in refused("prepare_datasets.py", source, tmp_path / "out", *options)
    assert not (tmp_path / "out.incomplete").exists()


def test_training_needs_a_library_that_is_named_where_it_is_missing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", some_texts(50))
    without = "import sys; sys.modules['tokenizers'] = None"
    message = refused(
        "prepare_datasets.py", source, tmp_path / "out", "--train-tokenizer", "300", before=without
    )
    assert message.endswith("needs a library: pip install -e '.[tokenizer]'")


def test_errors_in_the_text_are_said_while_a_tokenizer_is_trained(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "good"}\n{"text": 1}\n')
    message = refused("prepare_datasets.py", source, tmp_path / "out", "--train-tokenizer", "300")
    assert message == f'{source}: line 2 is not a JSON object with a string "text"'


def own_dataset(sandbox: Sandbox, trained: Path, end: int = SIZE - 1) -> Path:
    """A data set with a tokenizer of its own, whose end-of-text token is `end`."""
    content = json.loads(trained.read_text())
    renumber(content, end)
    folder = sandbox.datasets / "test/own"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = get_tokenizer("dataset", folder)
    splits = {}
    for split, seed in (("train", 4), ("validation", 5)):
        texts = some_texts(200, seed)
        splits[split] = np.array(
            [token for text in texts for token in (*tokenizer.encode_ordinary(text), end)], np.uint16
        )
    meta = {"tokenizer": "dataset", "vocab_size": SIZE}
    write_dataset(folder, splits["train"], splits["validation"], meta)
    sandbox.write_run(
        model={"vocab_size": SIZE, "tokenizer": "dataset"},
        train={
            "dataset": "test/own",
            "document_masking": True,
            "validation_interval": 4,
            "validation_batches": 2,
            "checkpoint_interval": 4,
            "sample_interval": 8,
            "sample_prompts": ["Größe und"],
        },
    )
    return folder


def test_the_tokenizer_goes_with_the_model(sandbox: Sandbox, trained: Path) -> None:
    folder = own_dataset(sandbox, trained, end=0)
    sandbox.train()
    last = sandbox.checkpoints()[-1]
    assert (last / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    meta = sandbox.meta()
    assert meta["model_config"]["end_of_text_id"] == 0
    assert meta["files"]["tokenizer.json"]["sha256"] == meta["data"]["tokenizer.json"]["sha256"]
    # A model that was moved, its data set gone, still writes and is exported.
    moved = shutil.copytree(last, sandbox.path / "moved")
    shutil.copyfile(sandbox.run_dir() / "model.json", moved / "model.json")
    model = moved / "model.json", moved / "model.safetensors"
    measured = run_script(
        *("test_loss.py", sandbox.datasets, *model, "--dataset", "test/own"),
        *("--start-token", "0", "--tokens", "160", "--document-masking"),
    )
    assert measured.returncode == 0, measured.stderr
    assert_bits_per_byte(measured.stdout, folder, 160)
    folder.rename(sandbox.path / "elsewhere")
    options = ("--prompt", "Größe und", "--seed", "42", "--tokens", "50")
    written = run_script("test_smoke.py", *model, *options)
    (sample,) = read_samples(sandbox.run_dir() / "samples.jsonl")
    assert written.stdout == printable("Größe und" + sample["text"]) + "\n", written.stderr
    exported = run_script("upload_model.py", *model, sandbox.path / "exported")
    assert exported.returncode == 0, exported.stderr
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(sandbox.path / "exported")
    ours = get_tokenizer("dataset", moved)
    for text in some_texts(100, seed=6):
        if "<|endoftext|>" not in text:
            assert theirs(text)["input_ids"] == ours.encode_ordinary(text)
    assert theirs.eos_token_id == 0
    assert same_tokenizer(read_tokenizer(sandbox.path / "exported/tokenizer.json"), ours)
    (moved / "tokenizer.json").unlink()
    message = refused("test_smoke.py", *model)
    assert message.startswith(f"{moved / 'tokenizer.json'}: no such file; ")


def assert_bits_per_byte(printed: str, folder: Path, tokens: int) -> None:
    lines = dict(line.split(": ") for line in printed.splitlines() if ": " in line)
    targets = load_file(folder / "validation.safetensors")["tokens"][1 : tokens + 1]
    size = len(get_tokenizer("dataset", folder).decode_bytes([int(token) for token in targets if token != 0]))
    nats = np.log(float(lines["Perplexity"])) * tokens
    assert float(lines["Bits per byte"]) == pytest.approx(nats / np.log(2) / size, rel=1e-3)


def test_documents_are_masked_at_the_tokenizers_end_of_text(sandbox: Sandbox, trained: Path) -> None:
    folder = own_dataset(sandbox, trained, end=7)
    sandbox.train()
    tokens = torch.from_numpy(load_file(folder / "train.safetensors")["tokens"][: 8 * 16 + 1].astype(int))
    losses = []
    for end in (7, None):
        torch.manual_seed(42)
        model = GPTModel(
            GPTConfig(**MODEL | {"vocab_size": SIZE, "tokenizer": "dataset", "end_of_text_id": end})
        )
        sequences = torch.stack([tokens[first : first + 17] for first in range(0, 128, 16)])
        losses.append(NextTokenLoss(model, document_masking=True)(sequences).item())
    assert sandbox.metrics()[0] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_a_run_goes_on_with_its_tokenizer_alone(sandbox: Sandbox, trained: Path) -> None:
    folder = own_dataset(sandbox, trained)
    sandbox.train()
    first, last = sandbox.checkpoints()[-2:]
    (last / "tokenizer.json").write_text("{}")
    done = run_script(*sandbox.command("tiny", "--resume"))
    assert done.returncode == 0
    assert f"Skipping {last.name}: {last / 'tokenizer.json'}: damaged" in done.stdout + done.stderr
    content = json.loads((folder / "tokenizer.json").read_text())
    content["version"] = "1.1"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    message = refused(*sandbox.command("tiny", "--resume"))
    assert "the SHA-256 of tokenizer.json in test/own was" in message
    # To be measured, a model needs the tokenizer that it has learnt.
    renumber(content, 0)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    model = sandbox.run_dir() / "model.json", first / "model.safetensors"
    options = ("--dataset", "test/own", "--start-token", "0", "--tokens", "160")
    message = refused("test_loss.py", sandbox.datasets, *model, *options)
    assert message.startswith(f"{first / 'tokenizer.json'}: is not the tokenizer of the data set")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"tokenizer": "gpt2", "vocab_size": 50257}, "tokenizer to 'dataset' and vocab_size to 600 in model"),
        ({"vocab_size": SIZE - 1}, "vocabulary of 600 tokens, the model only 599; set vocab_size to 600"),
        ({"end_of_text_id": 5}, "its end-of-text token is 599, the model's 5; leave end_of_text_id out"),
        ({"end_of_text_id": 599, "vocab_size": 640}, None),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_the_tokenizer(
    sandbox: Sandbox, trained: Path, model: dict, message: str | None
) -> None:
    folder = own_dataset(sandbox, trained)
    config = GPTConfig(**{**MODEL, "vocab_size": SIZE, "tokenizer": "dataset", **model})
    if message is None:
        assert match_tokenizer(folder, config) == config
    else:
        with pytest.raises(InputError) as error:
            match_tokenizer(folder, config)
        assert str(error.value).startswith(f"{folder}: ") and message in str(error.value)


def test_data_sets_without_a_tokenizer_of_their_own(sandbox: Sandbox) -> None:
    config = GPTConfig(**{**MODEL, "tokenizer": "dataset"})
    folder = sandbox.datasets / "test/tokens"
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file; the tokenizer 'dataset' needs"):
        match_tokenizer(folder, config)
    (folder / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    with pytest.raises(InputError, match="set tokenizer to 'bytes' and vocab_size to 257"):
        match_tokenizer(folder, config)


def test_the_tokenizer_is_fetched_with_the_data_set(
    sandbox: Sandbox, trained: Path, serve_hub: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_dataset(sandbox, trained)
    (sandbox.path / "hub").mkdir()
    folder.parent.rename(sandbox.path / "hub/test")
    hub = serve_hub(sandbox.path / "hub")
    use_hub(monkeypatch, hub.url, sandbox.path)
    fetch_dataset(sandbox.datasets, "test/own", None, ["train"])
    there = (sandbox.path / "hub/test/own/tokenizer.json").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == there
    (folder / "tokenizer.json").unlink()
    fetch_dataset(sandbox.datasets, "test/own", None, ["train"])
    assert (folder / "tokenizer.json").read_bytes() == there
    assert hub.downloads("tokenizer.json") == 2 and hub.downloads("train.safetensors") == 1
    assert ("GET", f"/datasets/test/own/resolve/{'0' * 40}/tokenizer.json") in hub.requests
