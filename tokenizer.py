"""GPT-2's tokenizer and one of bytes, and the two libraries that encode with them."""

import base64
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from config import InputError, require


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
_FIRST_BYTES = bytes({character.encode()[0] for character in WHITE_SPACE if not character.isascii()})
_OTHER_BYTES = bytes({byte for character in WHITE_SPACE for byte in character.encode()} - set(_FIRST_BYTES))
_TO_SPACES = bytes.maketrans(_OTHER_BYTES, b" " * len(_OTHER_BYTES))


def may_hold_long_space(text: bytes) -> bool:
    """Whether three white-space characters may follow one another in the text, or two end it.

    Always true if it is so, and seldom else: in UTF-8 every byte of white space becomes a space or vanishes.
    """
    spaces = text.translate(_TO_SPACES, delete=_FIRST_BYTES)
    return b"   " in spaces or spaces.endswith(b"  ")


class TiktokenEncoder:
    """Encodes texts with GPT-2's tokenizer from tiktoken, about a tenth faster than it does by itself.

    GPT-2's pattern looks ahead to leave the last of several white-space characters to the word behind. That
    keeps tiktoken from its fastest regular expressions. Without `\\s++$|\\s+(?!\\S)` the pattern gives each
    white-space character a token of its own or leaves it to the word behind, which is the same where no more
    than two follow one another: as in most texts that are not code.
    """

    SIMPLE_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        ranks = {tokenizer.decode_single_token_bytes(rank): rank for rank in range(tokenizer.eot_token)}
        # Without any special token tiktoken looks for an empty one, and finds it everywhere: slowly.
        special = {"<|endoftext|>": tokenizer.eot_token}
        self._tokenizer = tokenizer
        self._simple = tiktoken.Encoding(
            "gpt2-simple", pat_str=self.SIMPLE_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def __call__(self, text: bytes) -> np.ndarray:
        """The tokens of a text in UTF-8."""
        return encode_with_tiktoken(self._tokenizer if may_hold_long_space(text) else self._simple, text)


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

    def __call__(self, text: bytes) -> np.ndarray:
        """The tokens of a text in UTF-8."""
        if self._bytes >= self.RENEW_BYTES:
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
def tiktoken_encoder(name: str) -> Callable[[bytes], np.ndarray]:
    """What encodes texts in UTF-8 with tiktoken and the tokenizer of that name."""
    tokenizer = get_tokenizer(name)
    return (
        TiktokenEncoder(tokenizer) if name == "gpt2" else functools.partial(encode_with_tiktoken, tokenizer)
    )


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
