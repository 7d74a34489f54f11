"""Encoding: the tokens are tiktoken's, whichever library encodes and wherever a long text is cut."""

import json
import random
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken
from helpers import needs_gpt2
from texts import nasty_text, random_characters

from basemodel.common.errors import InputError, RunError
from basemodel.data.tokenizer import get_tokenizer
from basemodel.prepare import documents, readers
from basemodel.prepare.documents import LongText, in_validation, safe_cut
from basemodel.prepare.encoding import (
    COMPARED,
    DIFFERING,
    GigatokenEncoder,
    encode,
    find_gigatoken,
    load_gigatoken,
)


def test_bytes_are_their_own_tokens() -> None:
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)
    text = "a<|endoftext|>\u00e9 \n\U0001f600"
    assert tokenizer.encode_ordinary(text) == list(text.encode())


@needs_gpt2
@pytest.mark.parametrize("engine", ["tiktoken", "gigatoken"])
def test_gpt2_has_its_published_tokens(tmp_path: Path, engine: str) -> None:
    tokenizer = get_tokenizer("gpt2")
    vocabulary = find_gigatoken(engine, tokenizer, tmp_path)
    encoder = GigatokenEncoder(tokenizer, vocabulary) if vocabulary else partial(encode, tokenizer)
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    assert encoder(b"Every effort moves you").tolist() == [6109, 3626, 6100, 345]
    tokens = [15496, 11, 220, 995, 198, 198, 27, 91, 437, 1659, 5239, 91, 29]
    assert encoder(b"Hello,  world\n\n<|endoftext|>").tolist() == tokens


def test_a_text_may_be_cut_where_it_is_cut(gpt2: tiktoken.Encoding) -> None:
    rng, cuts = random.Random(1), 0
    for _ in range(3000):
        text = nasty_text(rng, 30)
        if cut := safe_cut(text):
            cuts += 1
            parts = gpt2.encode_ordinary(text[:cut]) + gpt2.encode_ordinary(text[cut:])
            assert parts == gpt2.encode_ordinary(text), ascii((text[:cut], text[cut:]))
    assert cuts > 1000


def test_a_long_text_is_read_in_fragments(tmp_path: Path) -> None:
    rng = random.Random(2)
    parts = [nasty_text(rng, 30) + "word " * rng.randrange(20) for _ in range(20_000)]
    data = "".join(parts).encode() + b" \xff\xf0\x9f" + b"y" * 2_500_000 + b"\xf0\x9f"
    path = tmp_path / "long.txt"
    path.write_bytes(data)
    document = LongText(path)
    fragments = list(document)
    assert b"".join(fragments).decode() == data.decode(errors="replace")
    assert len(fragments) > 2 and max(map(len, fragments[:-1])) < 2_500_000
    assert document.replaced == 3


def test_about_the_fraction_of_long_and_short_texts_is_for_validation() -> None:
    """By the text alone, whole or in fragments; the larger fraction holds what the smaller does."""
    texts = [f"{i} ".encode() * size for i in range(1000) for size in (1, 10)]
    texts += [b"%d " % i * 600_000 for i in range(20)]
    smaller = [False] * len(texts)
    for fraction in (0.1, 0.5):
        chosen = [in_validation([text], fraction) for text in texts]
        assert sum(chosen) == pytest.approx(fraction * len(texts), rel=0.15)
        assert any(chosen[-20:]), "texts of over a megabyte too"
        halves = ([text[: len(text) // 2], text[len(text) // 2 :]] for text in texts)
        assert [in_validation(parts, fraction) for parts in halves] == chosen
        assert all(now for now, before in zip(chosen, smaller, strict=True) if before)
        smaller = chosen
    assert not in_validation([b""], 0.5)


def test_gigatoken_agrees_on_all_characters_but_those_that_go_to_tiktoken(
    gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    """The comparison that COMPARED and DIFFERING record, by the stand-in's tokens, which show every cut. The
    Unicode planes above the fourth have no letters or digits."""
    vocabulary = find_gigatoken("gigatoken", gpt2, tmp_path)
    gigatoken = load_gigatoken(vocabulary)
    characters = [chr(c) for c in range(0x40000) if not 0xD800 <= c < 0xE000]
    compared = [character for character in characters if not DIFFERING.match(character)]
    assert len(characters) - len(compared) < 7000
    for block in range(0, len(compared), 256):
        text = "\n".join(f"a{c}1{c} {c}'s  {c}" for c in compared[block : block + 256]).encode()
        assert np.array_equal(gigatoken.encode(text), encode(gpt2, text)), ascii(compared[block])
    rng, encoder = random.Random(3), GigatokenEncoder(gpt2, vocabulary)
    texts = [random_characters(rng, 30) + nasty_text(rng, 10) for _ in range(3000)]
    # A letter of Latin Extended-D, a Sidetic letter and a Chinese character, new in Unicode 17.
    texts += [f"{letter}'s {letter}1{letter}" for letter in "\ua7ce\U00010940\U000323b0"]
    for text in texts:
        assert encoder(text.encode()).tolist() == gpt2.encode_ordinary(text), ascii(text)


@pytest.fixture
def gigatoken(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library of that name, whose tokenizer a test can make what it likes."""
    module = SimpleNamespace(__spec__=object())
    module.Tokenizer = SimpleNamespace(from_tiktoken=lambda *_, **__: module)
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    return module


def test_a_sample_of_texts_is_compared(gpt2: tiktoken.Encoding, tmp_path: Path, gigatoken: Any) -> None:
    right = gigatoken.encode = lambda data: np.array(gpt2.encode_ordinary(data.decode()), np.uint32)
    encoder = GigatokenEncoder(gpt2, tmp_path / "vocabulary")
    for _ in range(600):
        encoder(b"text")
    gigatoken.encode = lambda data: right(data)[:-1]
    for _ in range(424):
        encoder(b"text")
    differing = "caf\u00e9 \ua7ce"
    assert encoder(differing.encode()).tolist() == gpt2.encode_ordinary(differing)
    with pytest.raises(
        RunError, match=r"gigatoken encodes b'text'\.\.\. unlike tiktoken; try --engine tiktoken"
    ):
        encoder(b"text")


def test_gigatoken_that_does_not_work_here(
    gpt2: tiktoken.Encoding, tmp_path: Path, gigatoken: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no AVX")

    gigatoken.Tokenizer.from_tiktoken = fail
    problem = "gigatoken does not work here (OSError: no AVX)"
    assert find_gigatoken("auto", gpt2, tmp_path) is None
    assert capsys.readouterr().err == f"{problem}; encoding with tiktoken\n"
    with pytest.raises(InputError, match=re.escape(f"--engine gigatoken: {problem}; install it")):
        find_gigatoken("gigatoken", gpt2, tmp_path)
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if it were not installed
    assert find_gigatoken("auto", gpt2, tmp_path) is None
    with pytest.raises(InputError, match=re.escape("install it with: pip install -e '.[fast]'")):
        find_gigatoken("gigatoken", gpt2, tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("library", COMPARED)
def test_versions_that_have_not_been_compared_are_not_mixed(
    gpt2: tiktoken.Encoding, tmp_path: Path, gigatoken: Any, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    assert find_gigatoken("auto", gpt2, tmp_path) is not None
    monkeypatch.setitem(COMPARED, library, "0.0.1")
    assert find_gigatoken("auto", gpt2, tmp_path) is None
    with pytest.raises(InputError, match=r"gigatoken .* and tiktoken .* have not been compared"):
        find_gigatoken("gigatoken", gpt2, tmp_path)


def test_lines_are_read_once_wherever_a_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of one length, so that some of the cuts are exactly between two of them."""
    texts = [f"{number:02}" for number in range(60)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for size in range(5, 200):
        monkeypatch.setattr(documents, "SHARD_BYTES", size)
        pieces = list(readers.cut_into_pieces(path, None, "text"))
        found = [b"".join(text) for piece in pieces for text in readers.read_documents(piece, "text")]
        assert found == [text.encode() for text in texts], size
