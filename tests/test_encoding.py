"""Encoding: the tokens are tiktoken's, whichever library encodes and wherever a long text is cut."""

import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken
from helpers import needs_gpt2
from texts import assert_holds, nasty_text, prepare, random_characters, split_texts, write_jsonl

from basemodel.common.errors import InputError
from basemodel.data.tokenizer import (
    EnginesDisagree,
    GigatokenEncoder,
    MarkingEncoder,
    get_tokenizer,
    set_up_engine,
    tiktoken_encoder,
)
from basemodel.prepare import documents, readers
from basemodel.prepare.documents import LongText, in_validation, safe_cut

# New in Unicode 17: a letter of Latin Extended-D, a Sidetic letter, a Chinese character.
NEW_LETTERS = "\ua7ce\U00010940\U000323b0"


def test_bytes_are_their_own_tokens() -> None:
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)
    text = "a<|endoftext|>\u00e9 \n\U0001f600"
    assert tokenizer.encode_ordinary(text) == list(text.encode())


@needs_gpt2
@pytest.mark.parametrize("engine", ["tiktoken", "gigatoken"])
def test_gpt2_has_its_published_tokens(tmp_path: Path, engine: str) -> None:
    tokenizer = get_tokenizer("gpt2")
    encode = set_up_engine(engine, tokenizer, tmp_path) or tiktoken_encoder("gpt2")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    known = [6109, 3626, 6100, 345, 50256]
    known += [15496, 11, 220, 995, 198, 198, 27, 91, 437, 1659, 5239, 91, 29, 50256]
    assert encode([b"Every effort moves you", b"Hello,  world\n\n<|endoftext|>"]).tolist() == known


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


def test_gigatoken_agrees_on_all_characters(gpt2: tiktoken.Encoding, tmp_path: Path) -> None:
    encode = set_up_engine("gigatoken", gpt2, tmp_path)
    rng = random.Random(3)
    texts = [random_characters(rng, 30) + nasty_text(rng, 10) for _ in range(5000)]
    texts += [f"{letter}'s {letter}1{letter}" for letter in NEW_LETTERS]
    for text in texts:
        assert encode([text.encode()]).tolist() == [*gpt2.encode_ordinary(text), gpt2.eot_token], ascii(text)


WRONG_GIGATOKEN = """
import sys, types, numpy, tiktoken
class Tokenizer:
    @classmethod
    def from_tiktoken(cls, path, pretokenizer, special_tokens):
        return cls()
    def encode(self, data):
        tokens = tiktoken.get_encoding("gpt2").encode_ordinary(data.decode())
        return numpy.array([0] if b"number 7 " in data else tokens, numpy.uint32)
sys.modules["gigatoken"] = types.ModuleType("gigatoken")
sys.modules["gigatoken"].__spec__ = sys.modules["gigatoken"].Tokenizer = Tokenizer
from basemodel.data import tokenizer
tokenizer.differing_characters = lambda *_: ""  # a second's work
"""


def test_tiktoken_takes_over_where_gigatoken_is_wrong(gpt2: tiktoken.Encoding, tmp_path: Path) -> None:
    texts = [f"the number {i} is a number" for i in range(100)]
    said = prepare(
        write_jsonl(tmp_path / "in.jsonl", texts),
        *(tmp_path / "out", "--workers", "1", "--validation-fraction", "0.2"),
        before=WRONG_GIGATOKEN,
    )
    message = (
        "gigatoken and tiktoken encode the text b'the number 7 is a number'... differently; encoded shard 0"
    )
    assert message in said
    assert_holds(tmp_path / "out", split_texts(texts, 0.2), gpt2)


@pytest.fixture
def gigatoken(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library of that name, whose tokenizer a test can make what it likes."""
    module = SimpleNamespace(__spec__=object())
    module.Tokenizer = SimpleNamespace(from_tiktoken=lambda *_, **__: module)
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    return module


def test_a_sample_of_texts_is_compared(gpt2: tiktoken.Encoding, tmp_path: Path, gigatoken: Any) -> None:
    right = gigatoken.encode = lambda data: np.array(gpt2.encode_ordinary(data.decode()), np.uint32)
    encode = GigatokenEncoder(gpt2, tmp_path / "ranks", differing="\u00e9")
    encode([b"text"] * 600)
    gigatoken.encode = lambda data: right(data)[:-1]
    encode([b"text"] * 424)
    differs = "caf\u00e9"
    assert encode([differs.encode()]).tolist() == [*gpt2.encode_ordinary(differs), gpt2.eot_token]
    with pytest.raises(EnginesDisagree, match="encode the text b'text'"):
        encode([b"text"])


def test_gigatoken_that_does_not_work_here(
    gpt2: tiktoken.Encoding, tmp_path: Path, gigatoken: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no AVX")

    gigatoken.Tokenizer.from_tiktoken = fail
    reason = "gigatoken does not work here (OSError: no AVX)"
    assert set_up_engine("auto", gpt2, tmp_path) is None
    assert capsys.readouterr().err == f"{reason}; encoding with tiktoken\n"
    with pytest.raises(InputError, match=re.escape(f"--engine gigatoken: {reason}; try --engine tiktoken")):
        set_up_engine("gigatoken", gpt2, tmp_path)
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if it were not installed
    assert set_up_engine("auto", gpt2, tmp_path) is None
    with pytest.raises(InputError, match=re.escape("not installed; pip install -e '.[fast]' brings it")):
        set_up_engine("gigatoken", gpt2, tmp_path)
    assert capsys.readouterr().err == ""


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


def test_marks_give_the_tokens_of_the_pattern_that_looks_ahead(gpt2: tiktoken.Encoding) -> None:
    marking, rng = MarkingEncoder(gpt2), random.Random(0)
    characters = " \t\n\r\x0b\x0c\x1e\x1f\x85\xa0\u2003\u3000ab1'.s\u4e2d\u0301\U0001f600"
    usual = re.sub(r"[\x1e\x1f\x85\xa0\u2003\u3000]", "", characters)
    for _ in range(1000):
        texts = ["".join(rng.choices(usual, k=rng.randrange(12))) for _ in range(rng.randrange(1, 8))]
        if rng.random() < 0.7:
            texts[rng.randrange(len(texts))] = "".join(rng.choices(characters, k=rng.randrange(12)))
        known = [token for text in texts for token in (*gpt2.encode_ordinary(text), gpt2.eot_token)]
        assert marking([text.encode() for text in texts]).tolist() == known, repr(texts)
