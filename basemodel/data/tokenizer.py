"""The tokenizers "gpt2", "bytes" and "dataset", which is a data set's own tokenizer.json, for tiktoken.

The library `tokenizers` trains a tokenizer.json and replaces pairs in the order of a list of merges. tiktoken
joins the neighbours whose joined bytes are the token of the lowest id; it encodes faster, and nothing else is
needed where a model is trained or used. A file is accepted only if both give the same ids.
"""

import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from basemodel.common.errors import InputError
from basemodel.common.json_config import read_json_object
from basemodel.common.names import TOKENIZER_FILE

END_OF_TEXT = "<|endoftext|>"
# GPT-2's, as tiktoken writes it: possessive, because words never give characters back.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MIN_TOKENS, MAX_TOKENS = 256 + 1 + 1, 65_535  # at least the bytes, end-of-text and one merge


def get_tokenizer(name: str, folder: Path | None = None) -> tiktoken.Encoding:
    """The tokenizer "gpt2" (50,257 tokens), "bytes" (the 256 bytes and end-of-text, no download needed) or
    "dataset", whose tokenizer.json is in `folder`: a data set, a checkpoint, or where a model's weights are.
    Raises InputError if the GPT-2 vocabulary cannot be downloaded, or the tokenizer.json cannot be used."""
    if name == "dataset":
        if not (path := folder / TOKENIZER_FILE).exists():
            need = "the tokenizer 'dataset' needs that of the data set or of a checkpoint trained on it"
            raise InputError(f"{path}: no such file; {need}: copy it there")
        return read_tokenizer(path)
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # anything a network can raise
        raise InputError(
            f"the GPT-2 vocabulary is not cached and could not be downloaded ({type(error).__name__}); set "
            "TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it, or use the tokenizer 'bytes'"
        ) from None


def token_byte_lengths(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The bytes of text that each of the 65,536 possible tokens stands for, int64; end-of-text has none."""
    lengths = np.zeros(65_536, np.int64)
    pieces = tokenizer.decode_tokens_bytes(range(tokenizer.n_vocab))
    lengths[: len(pieces)] = [len(piece) for piece in pieces]
    lengths[tokenizer.eot_token] = 0
    return lengths


def same_tokenizer(one: tiktoken.Encoding, other: tiktoken.Encoding) -> bool:
    """Whether two tokenizers give the same ids, if both have GPT-2's pattern."""
    return (one._mergeable_ranks, one.eot_token) == (other._mergeable_ranks, other.eot_token)


@functools.lru_cache(maxsize=8)
def read_tokenizer(path: Path) -> tiktoken.Encoding:
    """The tokenizer of a tokenizer.json, as a tiktoken encoding with the same ids. Raises InputError, saying
    what is different, for anything but a byte-level BPE with GPT-2's pattern and one added token,
    end-of-text, and for one that tiktoken would encode differently."""
    content = read_json_object(path)
    try:
        model = _checked_model(content)
        ids = {**model["vocab"], END_OF_TEXT: _end_of_text(content)}
        _check_ids(list(ids.values()))
        special = {END_OF_TEXT: ids.pop(END_OF_TEXT)}
        values = {character: byte for byte, character in byte_characters().items()}
        if unknown := [token for token in ids if not values.keys() >= set(token)]:
            raise InputError(f"is not byte-level: {unknown[0]!r} has a character that stands for no byte")
        ranks = {bytes(map(values.__getitem__, token)): rank for token, rank in ids.items()}
        _check_merges(ranks, model["merges"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return tiktoken.Encoding("dataset", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _checked_model(content: dict[str, Any]) -> dict[str, Any]:
    """The part of a tokenizer.json that holds vocabulary and merges, if all else is as in GPT-2's."""
    parts = ("model", "pre_tokenizer", "post_processor")
    model, splitting, processor = (_object(content.get(part)) for part in parts)
    is_bpe = isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list)
    if not is_bpe or model.get("type", "BPE") != "BPE":
        raise InputError("must be a byte-pair encoding (BPE) with a vocab and merges")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise InputError(f"has the {key} {model[key]!r}, which must be null")
    for key in ("normalizer", "truncation", "padding"):
        if content.get(key):
            raise InputError(f"has a {key}, which must be null")
    is_gpt2s = splitting.get("type") == "ByteLevel" and splitting.get("add_prefix_space") is False
    if not is_gpt2s or splitting.get("use_regex", True) is not True:
        raise InputError("has a pre_tokenizer other than GPT-2's: ByteLevel, its regex, no prefix space")
    # transformers writes a template that adds nothing.
    adds_nothing = processor.get("type") == "TemplateProcessing" and processor.get("special_tokens") == {}
    if not adds_nothing and processor.get("type", "ByteLevel") != "ByteLevel":
        raise InputError("has a post_processor that adds tokens, which must be null")
    return model


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _end_of_text(content: dict[str, Any]) -> Any:
    """The id of end-of-text, which must be the only token added to the vocabulary."""
    added = content.get("added_tokens")
    tokens = [_object(token) for token in added] if isinstance(added, list) else []
    ids = {str(token.get("content")): token.get("id") for token in tokens}
    if END_OF_TEXT not in ids:
        raise InputError(f"has no added token {END_OF_TEXT}, which must end each document")
    if others := [name for name in ids if name != END_OF_TEXT]:
        raise InputError(f"has added tokens besides {END_OF_TEXT}: {', '.join(others[:5])}")
    return ids[END_OF_TEXT]


def _check_ids(ids: list[Any]) -> None:
    if len(ids) > MAX_TOKENS:
        raise InputError(f"has {len(ids):,} tokens; uint16 has room for {MAX_TOKENS:,} at most")
    if not all(type(value) is int for value in ids) or sorted(ids) != list(range(len(ids))):
        raise InputError(f"has {len(ids):,} tokens, so their ids must be 0 to {len(ids) - 1}, each once")


@functools.cache
def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a tokenizer.json: its own in Latin-1 where that is visible,
    else the next from U+0100 on (Radford et al. 2019, encoder.py)."""
    others = map(chr, itertools.count(256))
    visible = {byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "}
    return {byte: chr(byte) if byte in visible else next(others) for byte in range(256)}


def _check_merges(ranks: dict[bytes, int], listed: list[Any]) -> None:
    """Raise InputError unless the merges `listed` are those by which tiktoken makes its tokens from `ranks`.

    The trainer lists exactly these, in the order of the ids, because a token has one pair that makes it: what
    happens between the ends of a token is the same in any word, unless a merge crosses them.
    """
    if missing := [f"{byte:#04x}" for byte in range(256) if bytes([byte]) not in ranks]:
        raise InputError(f"lacks {len(missing)} of the 256 bytes: {', '.join(missing[:5])}")
    characters = byte_characters()
    expected = [["".join(map(characters.get, part)) for part in pair] for pair in merges(ranks)]
    if [pair.split(" ") if isinstance(pair, str) else pair for pair in listed] != expected:
        raise InputError(
            "lists merges that do not make its tokens in the order of their ids, so that tiktoken would "
            "encode differently; train a tokenizer with --train-tokenizer"
        )


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


def train_tokenizer(texts: Iterator[str], size: int, path: Path) -> None:
    """Train a tokenizer of `size` tokens on texts, or of fewer if too few pairs occur twice, and write it to
    `path`. The first 256 tokens are the bytes, the last is end-of-text. The same texts give the same file."""
    # All cores, and no warning from each worker that is forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(path))
