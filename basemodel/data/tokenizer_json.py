"""Tokenizers trained on a data set's own text: training one, and reading its tokenizer.json for tiktoken.

Both are byte-level byte-pair encodings with GPT-2's pattern. The library `tokenizers` trains one and
replaces pairs in the order of a list of merges; tiktoken, which encodes faster and needs no other library,
joins the neighbours whose joined bytes are the token of the lowest id. `read_tokenizer` accepts a file
only if both give the same ids for every text.
"""

import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basemodel.common.errors import InputError
from basemodel.common.json_config import read_json_object

if TYPE_CHECKING:
    import tiktoken  # slow to import, and not needed to train on tokens


END_OF_TEXT = "<|endoftext|>"
# GPT-2's, as tiktoken writes it: possessive, because words never give characters back.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MOST_TOKENS = 65_535


def read_tokenizer(path: Path) -> "tiktoken.Encoding":
    """The tokenizer of a tokenizer.json, as a tiktoken encoding with the same ids.

    Raises InputError, saying what is different, for anything but a byte-level BPE with GPT-2's pattern and
    one added token, end-of-text, and for one that tiktoken would encode differently.
    """
    try:
        stat = path.stat()
    except OSError:
        raise InputError(f"{path}: no such file") from None
    return _read_tokenizer(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)  # until the file changes
def _read_tokenizer(path: Path, mtime_ns: int, size: int) -> "tiktoken.Encoding":
    import tiktoken

    content = read_json_object(path)
    try:
        model = _checked_model(content)
        ids = {**model["vocab"], END_OF_TEXT: _end_of_text(content)}
        _check_ids(list(ids.values()))
        end = ids.pop(END_OF_TEXT)
        ranks = {_bytes_of(token): value for token, value in ids.items()}
        _check_merges(ranks, model["merges"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return tiktoken.Encoding(
        "dataset", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end}
    )


def same_tokenizer(one: "tiktoken.Encoding", other: "tiktoken.Encoding") -> bool:
    """Whether two tokenizers of `read_tokenizer` give the same ids."""
    return (one._mergeable_ranks, one.eot_token) == (other._mergeable_ranks, other.eot_token)


def _checked_model(content: dict[str, Any]) -> dict[str, Any]:
    """The part of a tokenizer.json that holds vocabulary and merges, if all else is as GPT-2 has it."""
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise InputError(f"must be a byte-pair encoding (BPE), not {kind or 'a file without a model'}")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise InputError("must be a byte-pair encoding (BPE) with a vocab and merges")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"has the {key} {model[key]!r}, which must be null")
    for key in ("normalizer", "truncation", "padding"):
        if content.get(key):
            raise InputError(f"has a {key}, which must be null")
    splitting = {"type": None, "add_prefix_space": True, "use_regex": True}
    splitting |= _object(content.get("pre_tokenizer"))
    if [splitting[key] for key in ("type", "add_prefix_space", "use_regex")] != ["ByteLevel", False, True]:
        raise InputError("has another pre_tokenizer than GPT-2's: ByteLevel, its regex, no prefix space")
    processor = _object(content.get("post_processor"))
    if processor.get("type") == "TemplateProcessing" and processor.get("special_tokens") == {}:
        processor = {}  # transformers writes a template that adds nothing
    if processor.get("type", "ByteLevel") != "ByteLevel":
        raise InputError("has a post_processor that adds tokens, which must be null")
    return model


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _end_of_text(content: dict[str, Any]) -> Any:
    """The id of the one token that may be added to the vocabulary."""
    added = content.get("added_tokens")
    tokens = [_object(token) for token in added] if isinstance(added, list) else []
    ids = {str(token.get("content")): token.get("id") for token in tokens}
    if END_OF_TEXT not in ids:
        raise InputError(f"has no added token {END_OF_TEXT}, which must end each document")
    if others := [name for name in ids if name != END_OF_TEXT]:
        raise InputError(f"has added tokens besides {END_OF_TEXT}: {', '.join(others[:5])}")
    return ids[END_OF_TEXT]


def _check_ids(ids: list[Any]) -> None:
    if len(ids) > MOST_TOKENS:
        raise InputError(f"has {len(ids):,} tokens; {MOST_TOKENS:,} are the most that uint16 can hold here")
    if not all(type(value) is int for value in ids) or sorted(ids) != list(range(len(ids))):
        raise InputError(f"has {len(ids):,} tokens, so their ids must be 0 to {len(ids) - 1}, each once")


@functools.cache
def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a tokenizer.json: its own in Latin-1 where that is visible,
    else the next from U+0100 on (Radford et al. 2019, encoder.py)."""
    others = map(chr, itertools.count(256))
    visible = {byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "}
    return {byte: chr(byte) if byte in visible else next(others) for byte in range(256)}


@functools.cache
def _byte_values() -> dict[str, int]:
    return {character: byte for byte, character in byte_characters().items()}


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(map(_byte_values().__getitem__, token))
    except KeyError as error:
        raise InputError(
            f"is not byte-level: no byte is written as {error.args[0]!r}, in {token!r}"
        ) from None


def _check_merges(ranks: dict[bytes, int], listed: list[Any]) -> None:
    """Raise InputError unless replacing pairs as `listed` gives the tokens that tiktoken gives with `ranks`.

    For tiktoken each token is the merge of one pair, given by `merges`, and no other neighbours ever have the
    bytes of that token joined: what happens between the ends of a token is the same in any word, unless a
    merge crosses them. So it is enough that these pairs are listed, in the order of the ids of their tokens.
    Pairs that are listed besides them never occur.
    """
    missing = [f"{byte:#04x}" for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(f"lacks {len(missing)} of the 256 bytes: {', '.join(missing[:5])}")
    if b"" in ranks:
        raise InputError("has an empty token")
    place = {}
    for index, pair in enumerate(listed):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise InputError(f"has a merge that is no pair of tokens: {pair!r}")
        place[_bytes_of(parts[0]), _bytes_of(parts[1])] = index  # of two equal pairs, the last one counts
    last = -1
    for pair in merges(ranks):
        if pair not in place:
            raise InputError(f"has no merge of {pair[0]!r} and {pair[1]!r}, though their token is there")
        if place[pair] < last:
            raise InputError(
                f"numbers its tokens in another order than its merges, from {b''.join(pair)!r} on, so that "
                "tiktoken would encode differently"
            )
        last = place[pair]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a byte-pair encoding, in order: each token comes from the two parts that are left of it
    once all merges of lower rank have been applied, lowest first.

    transformers' TikTokenConverter lists every possible split instead, 108,299 for GPT-2's 50,000 merges.
    Raises InputError for a token that no merge can make.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            first = min(range(len(joined)), key=joined.__getitem__)
            if joined[first] >= rank:
                raise InputError(f"has a token, {token!r}, that no two tokens with lower ids make")
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs
