"""GPT-2's tokenizer and one of bytes, and the two libraries that encode with them."""

import base64
import functools
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from basemodel.errors import InputError, require

# From texts in UTF-8 to their tokens, each text followed by end-of-text: (tokens,) uint16.
Encoder = Callable[[list[bytes]], np.ndarray]


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50,257 tokens), or "bytes": the 256 bytes and end-of-text, which needs no file.

    Raises InputError if the GPT-2 vocabulary is neither cached nor to be had.
    """
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network thinks of
        raise InputError(
            "the GPT-2 vocabulary is not here and could not be downloaded "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it, "
            "or use "
            "the tokenizer 'bytes'"
        ) from None


def encode_with_tiktoken(tokenizer: tiktoken.Encoding, text: bytes) -> np.ndarray:
    """The tokens of a text in UTF-8. `<|endoftext|>` in it is text like any other, never the token."""
    return tokenizer.encode_to_numpy(text.decode(), allowed_special=set(), disallowed_special=())


WHITE_SPACE = [chr(c) for c in (*range(0x9, 0xE), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B))]
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u3000"
# Separate texts that are encoded together, and parts of one; texts that hold them are encoded by themselves.
TEXT_END, MARK = b"\x1e", b"\x1f"
# What a byte is a part of: a word for all but white space of ASCII and the end of a text.
_WORD, _SPACE, _END = range(3)
_KINDS = bytes(
    _END if byte == TEXT_END[0] else _SPACE if chr(byte) in WHITE_SPACE[:6] else _WORD for byte in range(256)
)
_SPACES_BEYOND_ASCII = [character.encode() for character in WHITE_SPACE if not character.isascii()]
_SUSPECTS = [TEXT_END, MARK, *_SPACES_BEYOND_ASCII]
_SUSPECT = re.compile(b"|".join(_SUSPECTS))
_HARMLESS_BYTES = bytes(set(range(256)) - set(b"".join(_SUSPECTS)))
# White space before or behind such a character, which is of two or three bytes.
_BESIDE = rb"(?:(?=[\t-\r ]|%b)|(?<=[\t-\r ]..)|(?<=[\t-\r ]...))" % b"|".join(_SPACES_BEYOND_ASCII)
_UNUSUAL = re.compile(
    b"|".join([TEXT_END, MARK, *(space + _BESIDE for space in _SPACES_BEYOND_ASCII)]), re.DOTALL
)


def is_usual(text: bytes) -> bool:
    """Whether a text in UTF-8 holds no separator of ours, and no white space beyond ASCII beside other.

    Most texts are told by the few bytes of them that such characters are made of. (Some pass for unusual.)
    """
    suspect = _SUSPECT.search(text.translate(None, delete=_HARMLESS_BYTES))
    return not suspect or not _UNUSUAL.search(text)


def mark_white_space(text: bytes) -> np.ndarray:
    """A usual text with MARK before the last of several white-space characters, where a word follows.

    Returns its bytes, (bytes,) uint8. The text must end in TEXT_END, which is no word.
    """
    kinds = np.frombuffer(text.translate(_KINDS), np.uint8)
    space = kinds == _SPACE
    places = np.flatnonzero(space[:-2] & space[1:-1] & (kinds[2:] == _WORD)) + 1
    return np.insert(np.frombuffer(text, np.uint8), places, MARK[0])


class TiktokenEncoder:
    """Encodes texts with GPT-2's tokenizer from tiktoken, many at once and faster than it does by itself.

    GPT-2's pattern looks ahead, to leave the last of several white-space characters to the word behind them.
    That keeps tiktoken from its fastest regular expressions. Here numpy puts a mark into the text where to
    end, so that the pattern does without, and the marks are taken out of the tokens again.
    """

    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x1e\x1f]+|\s+|[\x1e\x1f]"

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        self._tokenizer, end = tokenizer, tokenizer.eot_token
        ranks = {tokenizer.decode_single_token_bytes(rank): rank for rank in range(end)}
        self._mark = end + 1
        self._with_marks = tiktoken.Encoding(
            "gpt2-with-marks",
            pat_str=self.PATTERN,
            mergeable_ranks=ranks | {TEXT_END: end, MARK: self._mark},
            # Without any special token tiktoken looks for an empty one, and finds it everywhere: slowly.
            special_tokens={"<|endoftext|>": end + 2},
        )

    def __call__(self, texts: list[bytes]) -> np.ndarray:
        """The tokens of texts in UTF-8, each followed by end-of-text: (tokens,) uint16."""
        encoded = []
        for usual, group in itertools.groupby(texts, is_usual):
            if usual:
                marked = mark_white_space(TEXT_END.join([*group, b""]))
                tokens = encode_with_tiktoken(self._with_marks, marked.tobytes())
                encoded.append(tokens[tokens != self._mark].astype(np.uint16))
            else:
                one = functools.partial(encode_with_tiktoken, self._tokenizer)
                encoded.append(encode_each(one, group, self._tokenizer.eot_token))
        return np.concatenate(encoded)


def encode_each(encode: Callable[[bytes], np.ndarray], texts: Iterable[bytes], end: int) -> np.ndarray:
    """The tokens of texts, encoded one by one, each followed by the token `end`: (tokens,) uint16."""
    tokens = itertools.chain.from_iterable((encode(text), [end]) for text in texts)
    return np.concatenate(list(tokens), dtype=np.uint16, casting="unsafe")


class EnginesDisagree(Exception):
    """gigatoken gave other tokens than tiktoken."""


@dataclass(frozen=True)
class GigatokenSetup:
    """What a worker needs to encode with gigatoken as tiktoken would."""

    ranks: Path  # the vocabulary in tiktoken's file format
    differing: str  # the characters that the two treat differently

    @classmethod
    def make(cls, tokenizer: tiktoken.Encoding, ranks: Path) -> "GigatokenSetup":
        """Write the vocabulary to `ranks` and compare the engines. Raises whatever gigatoken raises."""
        pieces = (tokenizer.decode_single_token_bytes(rank) for rank in range(tokenizer.eot_token))
        lines = (b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces))
        ranks.write_bytes(b"".join(lines))
        return cls(ranks, "".join(differing_characters(tokenizer, load_gigatoken(ranks))))


def load_gigatoken(ranks: Path) -> Any:
    """A gigatoken.Tokenizer of GPT-2's that knows no special tokens: it would find them in the text."""
    import gigatoken

    return gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="gpt2", special_tokens={})


def differing_characters(tokenizer: tiktoken.Encoding, gigatoken: Any) -> Iterator[str]:
    """The characters that the two engines take for different things, say one for a letter, one for a symbol.

    The two may be of different Unicode versions, which only the characters that are new in one shows. Letters
    and digits stand in the first four planes of Unicode. Before "'s" they give other tokens than symbols do,
    which join the apostrophe.
    """

    def differs(text: str) -> bool:
        data = text.encode()
        return not np.array_equal(encode_with_tiktoken(tokenizer, data), gigatoken.encode(data))

    for block in range(0, 0x40000, 256):
        characters = [chr(c) for c in range(block, block + 256) if not 0xD800 <= c < 0xE000]
        if differs("\n".join(f"{character}'s" for character in characters)):
            yield from (character for character in characters if differs(f"{character}'s"))


class GigatokenEncoder:
    """Encodes texts as tiktoken does, with gigatoken. Raises EnginesDisagree where a sample shows otherwise.

    The sample is the first 16 texts and one in 512 of the others. A text with a character that the engines
    are known to treat differently is left to tiktoken.
    """

    RENEW_BYTES = 32_000_000  # of text, after which the words that gigatoken remembers are forgotten

    def __init__(self, tokenizer: tiktoken.Encoding, setup: GigatokenSetup) -> None:
        self._tokenizer, self._setup = tokenizer, setup
        self._differing = {character.encode() for character in setup.differing}
        first_bytes = bytes({character[0] for character in self._differing})
        self._harmless = bytes(set(range(256)) - set(first_bytes))
        self._suspects = re.compile(b"[%b][\x80-\xbf]*" % re.escape(first_bytes or b"\xff"))
        self._texts, self._bytes = 0, self.RENEW_BYTES

    def __call__(self, texts: list[bytes]) -> np.ndarray:
        """The tokens of texts in UTF-8, each followed by end-of-text: (tokens,) uint16."""
        return encode_each(self._encode, texts, self._tokenizer.eot_token)

    def _encode(self, text: bytes) -> np.ndarray:
        if self._bytes >= self.RENEW_BYTES:
            self._gigatoken = None  # so that the old one's memory serves the new one
            self._gigatoken, self._bytes = load_gigatoken(self._setup.ranks), 0
        if self._may_differ(text):
            return encode_with_tiktoken(self._tokenizer, text)
        tokens = self._gigatoken.encode(text)
        if self._texts < 16 or self._texts % 512 == 0:
            expected = encode_with_tiktoken(self._tokenizer, text)
            if not np.array_equal(tokens, expected):
                raise EnginesDisagree(f"gigatoken encodes the text {text[:40]!r}... unlike tiktoken")
        self._texts += 1
        self._bytes += len(text)
        return tokens

    def _may_differ(self, text: bytes) -> bool:
        # A fast test for bytes that begin such a character, then one for the character.
        if text.isascii() or not text.translate(None, delete=self._harmless):
            return False
        return not self._differing.isdisjoint(self._suspects.findall(text))


@functools.cache
def tiktoken_encoder(name: str) -> Encoder:
    """What encodes texts with tiktoken and the tokenizer of that name."""
    tokenizer = get_tokenizer(name)
    if name == "gpt2":
        return TiktokenEncoder(tokenizer)
    one = functools.partial(encode_with_tiktoken, tokenizer)
    return functools.partial(encode_each, one, end=tokenizer.eot_token)


def set_up_engine(engine: str, tokenizer: tiktoken.Encoding, folder: Path) -> GigatokenSetup | None:
    """Whether to encode with gigatoken, and how; `folder` keeps its vocabulary. None: with tiktoken.

    Raises InputError if "gigatoken" is asked for and not to be had; "auto" then says why it does without.
    """
    installed = importlib.util.find_spec("gigatoken") is not None
    if engine == "tiktoken" or tokenizer.name != "gpt2" or (engine == "auto" and not installed):
        return None
    require(installed, "--engine gigatoken: it is not installed; pip install -e '.[fast]' brings it")
    try:
        return GigatokenSetup.make(tokenizer, folder / "gpt2.tiktoken")
    except Exception as error:  # whatever a library that is no good on this machine raises
        reason = f"gigatoken does not work here ({type(error).__name__}: {error})"
        require(engine == "auto", f"--engine gigatoken: {reason}; try --engine tiktoken")
        print(f"{reason}; encoding with tiktoken", file=sys.stderr)
        return None
