#!/usr/bin/env python3
"""Turn text into a data set that ddp_train.py trains on: uint16 tokens in safetensors, split by document.

    python prepare_datasets.py python-docs datasets/local/python-docs --tokenizer bytes
    python prepare_datasets.py my-texts/ datasets/me/my-texts --stats       .parquet, .jsonl(.gz, .zst), .txt
    python prepare_datasets.py fineweb/sample/10BT datasets/me/fineweb-10b --workers 8

Each input file is encoded by one worker, straight to disk, and the parts are joined in the files' order. So
the same text gives the same bytes whatever the number of workers, and memory does not grow with the data.
"""

import ast
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import tiktoken
from tqdm import tqdm

from config import InputError, RunError, require, run_command

SPLITS = ("train", "validation")
FILE_TYPES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
PYTHON_DOCS = "python-docs"


# ------------------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------------------


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


def encode_document(text: str, tokenizer: tiktoken.Encoding) -> np.ndarray:
    """The tokens of one document and the end-of-text token after it, uint16.

    The text `<|endoftext|>` in a document is text like any other, never the token.
    """
    tokens = tokenizer.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
    return np.append(tokens.astype(np.uint16), np.uint16(tokenizer.eot_token))


# ------------------------------------------------------------------------------------------------------------
# Documents
# ------------------------------------------------------------------------------------------------------------


def find_files(source: Path) -> list[Path]:
    """The text files of a folder (recursively, sorted by path), or the one that was named."""
    if source.is_file():
        files = [source]
    else:
        require(source.is_dir(), f"{source}: no such file or folder; the source may also be '{PYTHON_DOCS}'")
        files = sorted(
            path for path in source.rglob("*") if path.is_file() and path.name.endswith(FILE_TYPES)
        )
    named = ", ".join(FILE_TYPES)
    require(bool(files), f"{source}: holds no {named} files")
    require(files[0].name.endswith(FILE_TYPES), f"{source}: is of no known type; known are {named}")
    return files


def read_documents(path: Path, text_column: str) -> Iterator[str]:
    """The documents of one file: rows of .parquet, lines of .jsonl, a whole .txt. Raises InputError."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet_documents(path, text_column)
        elif path.suffix == ".txt":
            yield path.read_bytes().decode("utf-8", errors="replace")
        else:
            yield from _jsonl_documents(path, text_column)
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def _parquet_documents(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow  # comes with `datasets`
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        require(
            text_column in names, f"{path}: has no column '{text_column}'; --text-column is one of {names}"
        )
        kind = file.schema_arrow.field(text_column).type
        strings = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
        require(
            any(is_kind(kind) for is_kind in strings), f"{path}: column '{text_column}' is {kind}, not text"
        )
        for batch in file.iter_batches(batch_size=256, columns=[text_column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: no whole parquet file: {' '.join(str(error).split())}") from None


def _jsonl_documents(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow  # reads gzip and zstandard by a file's ending

    with pyarrow.input_stream(str(path)) as stream:
        for number, line in enumerate(io.BufferedReader(stream), start=1):
            if line.strip():
                try:
                    text = json.loads(line)[text_column]
                except (ValueError, KeyError, TypeError, RecursionError):
                    text = None
                if not isinstance(text, str):
                    raise InputError(f'{path}: line {number} is no JSON object with a text "{text_column}"')
                yield text


def python_docs() -> list[str]:
    """The text that every Python carries: the language reference and the standard library's docstrings.

    Deduplicated, and in an order that is fixed for one version of Python.
    """
    from pydoc_data.topics import topics

    documents = {text.strip() for text in topics.values()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"test", "tests", "site-packages", "dist-packages"} & set(path.relative_to(library).parts):
            documents |= set(_docstrings(path))
    ordered = sorted(documents - {""})
    random.Random(0).shuffle(ordered)
    return ordered


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # broken on purpose, like some modules of lib2to3
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (ast.get_docstring(node) or "").strip()


# ------------------------------------------------------------------------------------------------------------
# Encoding, one input file per worker
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a split holds; `bytes` of UTF-8 text, for bits per byte."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Part:
    """What one input became: a file of raw uint16 tokens per split, and what is in them."""

    path: Path  # without .train or .validation
    counts: dict[str, Counts] = field(default_factory=lambda: {split: Counts() for split in SPLITS})
    replaced: int = 0  # characters put in place of invalid UTF-8
    last_train_document: int = 0  # tokens

    def file(self, name: str) -> Path:
        """The file of raw tokens of a split, or of the documents' "lengths"."""
        return self.path.with_name(f"{self.path.name}.{name}")


@dataclass(frozen=True)
class Settings:
    """How to encode, the same for every input."""

    tokenizer: str
    validation_fraction: float
    text_column: str


def in_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is for validation: a matter of its text alone, so copies never lie on both sides."""
    return zlib.crc32(text, 0x9E3779B9) < fraction * 2**32  # started so that empty documents are for training


def encode_input(source: Path | None, part_path: Path, settings: Settings) -> Part:
    """Encode one input file (None: the Python documentation) into the part files of `part_path`."""
    tokenizer, part = get_tokenizer(settings.tokenizer), Part(part_path)
    documents = python_docs() if source is None else read_documents(source, settings.text_column)
    with contextlib.ExitStack() as stack:
        train, validation, lengths = (
            stack.enter_context(part.file(name).open("wb")) for name in (*SPLITS, "lengths")
        )
        for document in documents:
            text = document.encode("utf-8", errors="surrogatepass")
            if b"\xed" in text:  # may be half a surrogate pair, which \u escapes in JSON can make
                document = document.encode("utf-16", "surrogatepass").decode("utf-16", errors="replace")
                text = document.encode("utf-8")
            tokens = encode_document(document, tokenizer)
            split = "validation" if in_validation(text, settings.validation_fraction) else "train"
            tokens.tofile(validation if split == "validation" else train)
            counts = part.counts[split]
            counts.documents += 1
            counts.tokens += len(tokens)
            counts.bytes += len(text)
            if split == "train":
                part.last_train_document = len(tokens)
            lengths.write(len(tokens).to_bytes(4, "little"))
            _report_progress(len(text), len(tokens))
            if source is not None and source.suffix == ".txt":
                part.replaced = document.count("\ufffd") - source.read_bytes().count("\ufffd".encode())
    return part


_progress: Any = None  # documents, bytes and tokens done by all workers; shared memory


def _share_progress(progress: Any) -> None:
    global _progress
    _progress = progress


def _report_progress(size: int, tokens: int) -> None:
    with _progress.get_lock():
        for index, amount in enumerate((1, size, tokens)):
            _progress[index] += amount


def encode_all(sources: list[Path | None], parts_dir: Path, settings: Settings, workers: int) -> list[Part]:
    """Encode all inputs with a pool of workers, showing progress; parts come in the inputs' order."""
    context = multiprocessing.get_context("spawn")
    progress = context.Array("q", 3)
    # Large files first, so that no worker is left with a long one at the end.
    order = sorted(range(len(sources)), key=lambda i: -sources[i].stat().st_size if sources[i] else 0)
    shown = sys.stderr.isatty()
    with (
        ProcessPoolExecutor(min(workers, len(sources)), context, _share_progress, (progress,)) as pool,
        tqdm(unit="B", unit_scale=True, desc="encoding", disable=not shown) as bar,
    ):
        jobs = {
            index: pool.submit(encode_input, sources[index], parts_dir / f"{index:06d}", settings)
            for index in order
        }
        last_line, waiting = time.monotonic(), set(jobs.values())
        while waiting:
            finished, waiting = concurrent.futures.wait(waiting, timeout=0.2)
            documents, size, tokens = progress[:]
            done = f"{documents:,} documents, {tokens:,} tokens"
            bar.set_postfix_str(done, refresh=False)
            bar.update(size - bar.n)
            if not shown and time.monotonic() - last_line > 15:
                last_line = time.monotonic()
                print(f"encoding: {size / 1e6:,.0f} MB, {done}", file=sys.stderr, flush=True)
            try:
                for job in finished:
                    job.result()
            except BrokenProcessPool:
                raise RunError(
                    "a worker was killed, perhaps for want of memory; try fewer --workers"
                ) from None
            except InputError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [jobs[index].result() for index in range(len(sources))]


# ------------------------------------------------------------------------------------------------------------
# The data set
# ------------------------------------------------------------------------------------------------------------


def move_to_validation(parts: list[Part], fraction: float) -> None:
    """Where no document happened to fall to validation, move the last one there; of a single one, its end.

    A text in one file is one document: without this it would have nothing to be validated on.
    """
    part = next(part for part in reversed(parts) if part.counts["train"].documents)
    counts, validation = part.counts["train"], part.counts["validation"]
    alone = sum(part.counts["train"].documents for part in parts) == 1
    tokens = max(1, int(counts.tokens * fraction)) if alone else part.last_train_document
    data = np.fromfile(part.file("train"), dtype=np.uint16)
    data[-tokens:].tofile(part.file("validation"))
    os.truncate(part.file("train"), (len(data) - tokens) * 2)
    size = round(counts.bytes * tokens / counts.tokens)
    counts.tokens, counts.bytes, counts.documents = (
        counts.tokens - tokens,
        counts.bytes - size,
        counts.documents - (not alone),
    )
    validation.tokens, validation.bytes, validation.documents = tokens, size, 1


def join_parts(parts: list[Part], split: str, path: Path) -> str:
    """Write the parts of a split as one safetensors file, a stream with nothing held; return its SHA-256."""
    size = 2 * sum(part.counts[split].tokens for part in parts)
    description = {"tokens": {"dtype": "U16", "shape": [size // 2], "data_offsets": [0, size]}}
    header = json.dumps(description, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format's alignment of what follows
    digest = hashlib.sha256()
    with path.open("wb") as out:

        def write(data: bytes) -> None:
            digest.update(data)
            out.write(data)

        write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            with part.file(split).open("rb") as file:
                while block := file.read(1 << 20):
                    write(block)
        out.flush()
        os.fsync(out.fileno())
    require(path.stat().st_size == 8 + len(header) + size, f"{path}: came out with a wrong size")
    return digest.hexdigest()


def draw_lengths(parts: list[Part], path: Path, title: str) -> tuple[float, float]:
    """Draw a histogram of the documents' lengths in tokens, in xkcd style; return their mean and median."""
    from reporting import xkcd_figure  # here, because it brings torch, which the workers need not hold

    lengths = np.concatenate([np.fromfile(part.file("lengths"), dtype="<u4") for part in parts])
    mean, median = float(lengths.mean()), float(np.median(lengths))
    with xkcd_figure((10, 6)) as figure:
        axes = figure.subplots()
        axes.hist(lengths, bins=np.geomspace(1, lengths.max() + 1, 60))
        axes.set(xscale="log", title=title, xlabel="tokens in a document", ylabel="documents")
        axes.axvline(mean, color="tab:red", label=f"mean {mean:,.0f}")
        axes.axvline(median, color="tab:green", label=f"median {median:,.0f}")
        axes.legend()
        figure.savefig(path, dpi=90)
    return mean, median


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option("--tokenizer", type=click.Choice(["gpt2", "bytes"]), default="gpt2", show_default=True)
@click.option(
    "--validation-fraction", type=float, default=0.01, show_default=True, help="Share of the documents."
)
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count(), help="Default: one per core.")
@click.option("--text-column", default="text", show_default=True, help="Of .parquet and .jsonl files.")
@click.option("--stats", is_flag=True, help="Also draw a histogram of document lengths.")
def main(
    source: str,
    output_dir: Path,
    tokenizer: str,
    validation_fraction: float,
    workers: int,
    text_column: str,
    *,
    stats: bool,
) -> None:
    """Encode SOURCE into the data set OUTPUT_DIR: train.safetensors, validation.safetensors and meta.json.

    SOURCE is a folder or file of .parquet, .jsonl or .txt, or the word python-docs.
    """
    require(
        0 < validation_fraction < 1,
        f"--validation-fraction must be between 0 and 1, not {validation_fraction}",
    )
    outputs = ("train.safetensors", "validation.safetensors", "meta.json")
    have = [name for name in outputs if (output_dir / name).exists()]
    require(not have, f"{output_dir}: already holds {' and '.join(have)}; remove it or choose another folder")
    require(bool(source) and str(output_dir) != ".", "SOURCE and OUTPUT_DIR must be named")
    sources = [None] if source == PYTHON_DOCS else find_files(Path(source))
    encoding = get_tokenizer(tokenizer)
    settings = Settings(tokenizer, validation_fraction, text_column)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=output_dir))
    except OSError as error:
        raise InputError(f"{output_dir}: cannot be made or written to: {error.strerror}") from None
    try:
        parts = encode_all(sources, unfinished, settings, workers)
        require(
            any(part.counts["train"].tokens for part in parts), f"{source}: holds no documents to train on"
        )
        if not any(part.counts["validation"].documents for part in parts):
            move_to_validation(parts, validation_fraction)
        meta = describe(source, settings, encoding, parts)
        for split in SPLITS:
            meta["sha256"][f"{split}.safetensors"] = join_parts(
                parts, split, unfinished / f"{split}.safetensors"
            )
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        if stats:
            chart = "document-lengths.png"
            mean, median = draw_lengths(parts, unfinished / chart, f"{output_dir.name}: document lengths")
            (unfinished / chart).replace(output_dir / chart)
            print(f"Tokens per document: mean {mean:,.1f}, median {median:,.0f}; see {output_dir / chart}")
        for name in outputs:
            (unfinished / name).replace(output_dir / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if replaced := sum(part.replaced for part in parts):
        print(f"Invalid UTF-8 was replaced by {replaced:,} characters U+FFFD")
    for split, counts in meta["splits"].items():
        print(
            f"{output_dir / split}.safetensors: {counts['documents']:,} documents, {counts['tokens']:,} "
            "tokens"
        )


def describe(
    source: str, settings: Settings, encoding: tiktoken.Encoding, parts: list[Part]
) -> dict[str, Any]:
    """What meta.json says of the data set."""
    totals = {
        split: {key: sum(getattr(part.counts[split], key) for part in parts) for key in asdict(Counts())}
        for split in SPLITS
    }
    return {
        "description": f"{source} as tokens: one tensor 'tokens' per split, end-of-text after each document",
        "tokenizer": settings.tokenizer,
        "vocab_size": encoding.n_vocab,
        "token_dtype": "uint16",
        "end_of_text": encoding.eot_token,
        "splits": totals,
        "validation_fraction": settings.validation_fraction,
        "source": source,
        "sha256": {},
        "versions": {"python": platform.python_version(), "tiktoken": importlib.metadata.version("tiktoken")},
    }


if __name__ == "__main__":
    run_command(main)
