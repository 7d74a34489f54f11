"""The tokenizers by name, and the two libraries that can encode with them: tiktoken and gigatoken."""

import base64
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from basemodel.common.errors import InputError
from basemodel.common.names import TOKENIZER_FILE
from basemodel.data.tokenizer_json import read_tokenizer

Encoder = Callable[[Sequence[bytes]], np.ndarray]  # UTF-8 texts -> their tokens, end-of-text after each


def get_tokenizer(name: str, folder: Path | None = None) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50,257 tokens), "bytes" (the 256 bytes and end-of-text, no download needed) or
    "dataset", whose tokenizer.json is in `folder`: a data set, a checkpoint, or where a model's weights are.

    Raises InputError if the GPT-2 vocabulary is neither cached nor downloadable, or tokenizer.json is missing
    or cannot be used.
    """
    if name == "dataset":
        if not (folder / TOKENIZER_FILE).exists():
            raise InputError(
                f"{folder / TOKENIZER_FILE}: no such file; the tokenizer 'dataset' needs the one of the data "
                "set, which every checkpoint also has: copy it there"
            )
        return read_tokenizer(folder / TOKENIZER_FILE)
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # anything a network can raise
        raise InputError(
            f"the GPT-2 vocabulary is not cached and could not be downloaded ({type(error).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it, or use the tokenizer 'bytes'"
        ) from None


def encode(tokenizer: tiktoken.Encoding, text: bytes) -> np.ndarray:
    """Tokenize UTF-8 text with tiktoken. `<|endoftext|>` in the text is ordinary text, never the token."""
    return tokenizer.encode_to_numpy(text.decode(), allowed_special=set(), disallowed_special=())


def token_byte_lengths(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The bytes of text that each of the 65,536 possible tokens stands for, int64; end-of-text has none."""
    lengths = np.zeros(65_536, np.int64)
    pieces = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    lengths[: len(pieces)] = [len(piece) for piece in pieces]
    lengths[tokenizer.eot_token] = 0
    return lengths


def encode_each(encode_one: Callable[[bytes], np.ndarray], texts: Sequence[bytes], end: int) -> np.ndarray:
    """The tokens of texts that are encoded one by one, each followed by end-of-text."""
    return np.concatenate([part for text in texts for part in (encode_one(text), [end])])


class MarkingEncoder:
    """An Encoder that uses tiktoken, in little more than half the time of encoding text by text.

    It encodes many texts at once. Besides, GPT-2's pattern uses look-ahead to leave the last of several
    white-space characters to the word after them, which rules out tiktoken's fastest regular expressions.
    Here numpy inserts a mark before that character, so that the pattern needs no look-ahead; the marks are
    removed from the tokens. Works for any tokenizer with GPT-2's pattern and a token for each byte.
    """

    END, MARK = b"\x1e", b"\x1f"  # of a text; of white space that belongs to the word after it
    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x1e\x1f]+|\s+|[\x1e\x1f]"
    # The UTF-8 of white space beyond ASCII, as numbers of two bytes and of three. Texts with such, or with a
    # mark, are encoded one by one.
    OTHER_SPACE_2 = (0xC285, 0xC2A0)
    OTHER_SPACE_3 = (0xE19A80, *range(0xE28080, 0xE2808B), 0xE280A8, 0xE280A9, 0xE280AF, 0xE2819F, 0xE38080)

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        ranks, self._end = tokenizer._mergeable_ranks, tokenizer.eot_token
        self._marking = tiktoken.Encoding(
            f"{tokenizer.name}-with-marks",
            pat_str=self.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self._end},  # without any, tiktoken is slow
        )
        self._tokenizer, self._end_mark, self._mark = tokenizer, ranks[self.END], ranks[self.MARK]

    def __call__(self, texts: Sequence[bytes]) -> np.ndarray:
        """Tokenize UTF-8 texts."""
        codes = self._joined(texts)
        unusual = self._unusual(texts, codes)
        if not unusual:
            return self._encode_usual(codes)
        tokens = self._encode_usual(self._joined(b"" if i in unusual else t for i, t in enumerate(texts)))
        parts = np.split(tokens, np.flatnonzero(tokens == self._end) + 1)
        for i in unusual:
            parts[i] = encode_each(functools.partial(encode, self._tokenizer), [texts[i]], self._end)
        return np.concatenate(parts)

    def _joined(self, texts: Iterable[bytes]) -> np.ndarray:
        return np.frombuffer(self.END.join([*texts, b""]), np.uint8)

    def _unusual(self, texts: Sequence[bytes], codes: np.ndarray) -> set[int]:
        """The numbers of the texts with white space beyond ASCII, or with a mark in them."""
        ends = np.cumsum([len(text) + 1 for text in texts])
        leads = np.flatnonzero((codes == 0xC2) | (codes - 0xE1 < 3))
        three = sum(codes[leads + i].astype(np.uint32) << 16 - 8 * i for i in range(3))  # END comes last
        spaces = leads[np.isin(three >> 8, self.OTHER_SPACE_2) | np.isin(three, self.OTHER_SPACE_3)]
        marks = np.flatnonzero(codes == self.MARK[0])
        end_marks = np.setdiff1d(np.flatnonzero(codes == self.END[0]), ends - 1)
        return set(np.searchsorted(ends, np.concatenate([spaces, marks, end_marks]), "right").tolist())

    def _encode_usual(self, codes: np.ndarray) -> np.ndarray:
        space = (codes == ord(" ")) | (codes - ord("\t") < 5)  # tab to carriage return; less than tab wraps
        word_begins = ~space & (codes != self.END[0])
        places = np.flatnonzero(space[:-2] & space[1:-1] & word_begins[2:]) + 1
        tokens = encode(self._marking, np.insert(codes, places, self.MARK[0]).tobytes())
        tokens = tokens[tokens != self._mark]
        tokens[tokens == self._end_mark] = self._end
        return tokens


@functools.cache
def tiktoken_encoder(name: str, folder: Path | None = None) -> Encoder:
    """An encoder that uses tiktoken with the tokenizer that `get_tokenizer` gives."""
    tokenizer = get_tokenizer(name, folder)
    if name != "bytes":
        return MarkingEncoder(tokenizer)
    one = functools.partial(encode, tokenizer)
    return functools.partial(encode_each, one, end=tokenizer.eot_token)


class EnginesDisagree(Exception):
    """gigatoken and tiktoken produced different tokens."""


def load_gigatoken(ranks: Path) -> Any:
    """A gigatoken.Tokenizer for GPT-2 without special tokens, which it would recognize inside the text."""
    import gigatoken

    return gigatoken.Tokenizer.from_tiktoken(ranks, pretokenizer="gpt2", special_tokens={})


def differing_characters(tokenizer: tiktoken.Encoding, gigatoken: Any) -> Iterator[str]:
    """The characters that the two libraries classify differently, such as a letter for one, a symbol for the
    other.

    Their Unicode versions may differ, which shows only in characters that are new in one of them. Letters and
    digits lie in the first four Unicode planes. Followed by "'s" they give other tokens than symbols do,
    because a symbol joins the apostrophe.
    """

    def differs(text: str) -> bool:
        data = text.encode()
        return not np.array_equal(encode(tokenizer, data), gigatoken.encode(data))

    for block in range(0, 0x40000, 256):
        characters = [chr(c) for c in range(block, block + 256) if not 0xD800 <= c < 0xE000]
        if differs("\n".join(f"{character}'s" for character in characters)):
            yield from (character for character in characters if differs(f"{character}'s"))


class GigatokenEncoder:
    """An Encoder that uses gigatoken. Raises EnginesDisagree when a sampled text gets other tokens than
    tiktoken's.

    The sample is the first 16 texts and every 512th after them. Texts with one of the characters `differing`,
    which the libraries treat differently, go to tiktoken. `ranks` is the vocabulary in tiktoken's format.
    """

    RENEW_BYTES = 32_000_000  # of text, after which gigatoken's ever-growing cache of words is dropped

    def __init__(self, tokenizer: tiktoken.Encoding, ranks: Path, differing: Iterable[str]) -> None:
        self._tokenizer, self._ranks = tokenizer, ranks
        self._differing = {character.encode() for character in differing}
        first_bytes = bytes({character[0] for character in self._differing})
        self._harmless = bytes(set(range(256)) - set(first_bytes))
        self._suspects = re.compile(b"[%b][\x80-\xbf]*" % re.escape(first_bytes or b"\xff"))
        self._texts, self._bytes = 0, self.RENEW_BYTES

    def __call__(self, texts: Sequence[bytes]) -> np.ndarray:
        """Tokenize UTF-8 texts."""
        return encode_each(self._encode_one, texts, self._tokenizer.eot_token)

    def _encode_one(self, text: bytes) -> np.ndarray:
        if self._bytes >= self.RENEW_BYTES:
            self._gigatoken = None  # free the old one before the new one is loaded
            self._gigatoken, self._bytes = load_gigatoken(self._ranks), 0
        # A fast check for the first bytes of differing characters, then one for the characters themselves.
        suspicious = not text.isascii() and text.translate(None, delete=self._harmless)
        if suspicious and not self._differing.isdisjoint(self._suspects.findall(text)):
            return encode(self._tokenizer, text)
        tokens = self._gigatoken.encode(text)
        sampled = self._texts < 16 or self._texts % 512 == 0
        if sampled and not np.array_equal(tokens, encode(self._tokenizer, text)):
            raise EnginesDisagree(f"gigatoken and tiktoken encode the text {text[:40]!r}... differently")
        self._texts += 1
        self._bytes += len(text)
        return tokens


def set_up_engine(engine: str, tokenizer: tiktoken.Encoding, folder: Path) -> GigatokenEncoder | None:
    """The encoder for engine "gigatoken" or "auto", with its vocabulary in `folder`; None means tiktoken.

    Raises InputError if "gigatoken" is asked for and does not work; "auto" prints why it falls back.
    """
    installed = importlib.util.find_spec("gigatoken") is not None
    if engine == "tiktoken" or tokenizer.name != "gpt2" or (engine == "auto" and not installed):
        return None
    if not installed:
        raise InputError("--engine gigatoken: it is not installed; pip install -e '.[fast]' brings it")
    ranks = folder / "gpt2.tiktoken"
    pieces = (tokenizer.decode_single_token_bytes(rank) for rank in range(tokenizer.eot_token))
    lines = (b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces))
    ranks.write_bytes(b"".join(lines))
    try:
        return GigatokenEncoder(tokenizer, ranks, differing_characters(tokenizer, load_gigatoken(ranks)))
    except Exception as error:  # anything a library built for another machine can raise
        reason = f"gigatoken does not work here ({type(error).__name__}: {error})"
        if engine == "gigatoken":
            raise InputError(f"--engine gigatoken: {reason}; try --engine tiktoken") from None
        print(f"{reason}; encoding with tiktoken", file=sys.stderr)
        return None
