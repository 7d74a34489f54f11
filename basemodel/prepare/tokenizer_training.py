"""Training a tokenizer on a data set's own text."""

import os
from collections.abc import Iterator
from pathlib import Path

from basemodel.common.errors import InputError
from basemodel.data.tokenizer import END_OF_TEXT

MIN_TOKENS = 256 + 1 + 1  # the bytes, end-of-text and one merge


def require_tokenizers() -> None:
    """Raise InputError if the library `tokenizers`, which trains, is not installed."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise InputError(
            "--train-tokenizer needs the library tokenizers; install it with: pip install -e '.[tokenizer]'"
        ) from None


def train_tokenizer(texts: Iterator[str], size: int, path: Path) -> None:
    """Train a tokenizer of `size` tokens on texts and write it to `path`. The same texts give the same file.

    The first 256 tokens are the bytes, the last one is end-of-text. There are fewer than `size` if the texts
    have too few pairs that occur twice.
    """
    # All cores, and no warning from each worker that is forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(path))
