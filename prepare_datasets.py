#!/usr/bin/env python3
"""Turn text into a data set that ddp_train.py trains on: uint16 tokens in safetensors, split by document.

    python prepare_datasets.py python-docs datasets/local/python-docs --tokenizer bytes
    python prepare_datasets.py my-texts/ datasets/me/my-texts --stats        any text files
    python prepare_datasets.py roneneldan/TinyStories datasets/me/tiny-stories           a data set on the Hub
    python prepare_datasets.py HuggingFaceFW/fineweb datasets/me/fineweb-10b --name sample-10BT
    python prepare_datasets.py german-texts/ datasets/me/german --train-tokenizer 16384   other languages

The input is cut into shards of about 64 MB of text. Workers encode each shard straight to disk, and the
results are joined in the order of the input. So the same text gives the same bytes whatever the number of
workers, memory does not grow with the data, and an interrupted run resumes after its last finished shard.
Work in progress is kept in OUTPUT_DIR.incomplete (OUTPUT_DIR/.incomplete where that is a mount point);
OUTPUT_DIR has its contents once they are complete.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from basemodel.common.command_line import available_cpus, run_command
from basemodel.common.errors import InputError
from basemodel.common.files import DISK_FULL, contents, fingerprint, make_folder, publish, work_folder
from basemodel.common.json_config import read_json_object
from basemodel.common.names import META, TOKENIZER_FILE
from basemodel.data.hub import check_push, push
from basemodel.data.token_files import as_one_path, split_files
from basemodel.data.tokenizer import MAX_TOKENS, MIN_TOKENS, get_tokenizer, read_tokenizer, train_tokenizer
from basemodel.prepare.assemble import Layout, count_skipped, lay_out, lay_out_nanogpt, write_dataset
from basemodel.prepare.dataset_card import card, counted, draw_lengths, excerpts, summary, token_excerpts
from basemodel.prepare.documents import Piece, make_shards
from basemodel.prepare.encoding import Settings, encode_all, find_gigatoken, sample_texts
from basemodel.prepare.readers import cut_into_pieces
from basemodel.prepare.sources import Request, Source, find_source

ENGINES = click.Choice(["auto", "tiktoken", "gigatoken"])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("source")
@click.argument("output_dir", type=Path)
@click.option(
    "--tokenizer",
    metavar="gpt2|bytes|FILE",
    help="Tokenizer to use; FILE is a tokenizer.json.  [default: gpt2]",
)
@click.option(
    "--train-tokenizer",
    "train_size",
    type=click.IntRange(MIN_TOKENS, MAX_TOKENS),
    metavar="SIZE",
    help="Train a tokenizer of SIZE tokens on the text.",
)
@click.option("--validation-fraction", type=float, default=0.01, help="Share of documents held out.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=available_cpus(),
    show_default=False,
    help="Processes that encode.  [default: cores]",
)
@click.option("--engine", type=ENGINES, default="auto", help="Library that encodes; the tokens are the same.")
@click.option("--text-column", default="text", help="Column or JSON key of the text.")
@click.option("--name", metavar="CONFIG", help="Configuration of a Hub data set.")
@click.option("--split", default="train", help="Split to train on.")
@click.option("--files", metavar="PATTERN", help="Take only the matching files, such as 'sample/10BT/*'.")
@click.option("--revision", help="Commit, tag or branch of a Hub data set.")
@click.option("--stats", is_flag=True, help="Also draw a histogram of document lengths.")
@click.option("--quiet", is_flag=True, help="Leave out the excerpts of the text.")
@click.option("--push", "repo_id", metavar="OWNER/NAME", help="Then upload the data set to the Hub.")
def main(
    source: str,
    output_dir: Path,
    tokenizer: str | None,
    train_size: int | None,
    validation_fraction: float,
    workers: int,
    engine: str,
    text_column: str,
    name: str | None,
    split: str,
    files: str | None,
    revision: str | None,
    repo_id: str | None,
    *,
    stats: bool,
    quiet: bool,
) -> None:
    """Encode SOURCE into the data set OUTPUT_DIR: train.safetensors, validation.safetensors and meta.json.

    SOURCE is a folder or file of .parquet, .arrow, .jsonl, .json, .csv, .txt or .md, compressed or not; the
    OWNER/NAME of a data set on the Hub; a folder with nanoGPT's train.bin and val.bin; or the word
    python-docs.
    """
    if not 0 < validation_fraction < 1:
        raise InputError(f"--validation-fraction must be between 0 and 1, not {validation_fraction}")
    if not source or str(output_dir) == ".":
        raise InputError("SOURCE and OUTPUT_DIR must be named")
    own_tokenizer = choose_tokenizer(tokenizer, train_size)
    settings = Settings(validation_fraction=validation_fraction, text_column=text_column, **own_tokenizer)
    if engine == "gigatoken" and settings.tokenizer != "gpt2":
        raise InputError("--engine gigatoken works with the tokenizer gpt2 only")
    request = Request(source, name, split, files, revision)
    fetch = find_source(request, leave_out=output_dir)
    if repo_id:
        check_push(repo_id)
    if repo_id and (output_dir / META).exists():
        check_prepared(output_dir, {**asdict(request), **settings.identity()})
        print(f"{output_dir}: already prepared")
    else:
        require_empty(output_dir)
        with unfinished_folder(output_dir) as folder:
            finished = folder / "finished"
            finished.mkdir()
            require_empty(output_dir)  # nobody else can fill it now
            vocabulary = None
            if settings.tokenizer != "dataset":
                vocabulary = find_gigatoken(engine, get_tokenizer(settings.tokenizer), folder)
            text = fetch()
            if settings.tokenizer == "dataset":
                settings = add_tokenizer(folder, tokenizer, text, settings)
            layout, counts, shown = lay_out_text(text, folder / "parts", settings, vocabulary, workers)
            form = "one tensor 'tokens' per split, end-of-text after each document"
            meta = {"description": f"{source} as tokens: {form}", **asdict(request), **counts}
            meta |= write_dataset(finished, layout, settings)
            if stats:
                title = f"{output_dir.name}: document lengths"
                print(draw_lengths(layout, meta["end_of_text"], finished / "document-lengths.png", title))
            publish_dataset(finished, output_dir, meta, [] if quiet else shown)
    if repo_id:
        url = push(output_dir, repo_id, "Upload tokens", repo_type="dataset")
        print(f"Uploaded to {repo_id}: {url}")


def choose_tokenizer(tokenizer: str | None, train_size: int | None) -> dict[str, Any]:
    """The values of Settings for the tokenizer that the options ask for. Raises InputError."""
    if train_size is not None:
        if tokenizer is not None:
            raise InputError("use either --tokenizer or --train-tokenizer, not both")
        if importlib.util.find_spec("tokenizers") is None:
            raise InputError("--train-tokenizer needs a library: pip install -e '.[tokenizer]'")
        return {"tokenizer": "dataset", "train_tokenizer": train_size}
    if tokenizer in (None, "gpt2", "bytes"):
        return {"tokenizer": tokenizer or "gpt2"}
    file = Path(tokenizer)
    if not file.is_file():
        raise InputError(f"--tokenizer must be gpt2, bytes or a tokenizer.json; there is no file '{file}'")
    read_tokenizer(file)
    return {"tokenizer": "dataset", "tokenizer_sha256": fingerprint(file)["sha256"]}


def add_tokenizer(folder: Path, file: str | None, source: Source, settings: Settings) -> Settings:
    """Put the data set's own tokenizer into a folder: a copy of a file, or one trained on the source. Returns
    settings that name it. Raises InputError."""
    path, size = folder / TOKENIZER_FILE, settings.train_tokenizer
    if size is None:
        shutil.copyfile(file, path)
    elif source.nanogpt:
        raise InputError(f"{source.nanogpt}: contains tokens, not text to train a tokenizer on")
    else:
        print(f"Training a tokenizer of {size:,} tokens")
        train_tokenizer(sample_texts(find_pieces(source, settings), settings), size, path)
        if (count := read_tokenizer(path).n_vocab) < size:
            print(f"The text has enough repeated pairs for {count:,} tokens only")
    return replace(settings, tokenizer_sha256=fingerprint(path)["sha256"], folder=folder)


def lay_out_text(
    source: Source, parts_dir: Path, settings: Settings, vocabulary: Path | None, workers: int
) -> tuple[Layout, dict[str, Any], list[str]]:
    """Encode the text. Returns where each split's tokens are, counts, and excerpts. Raises InputError."""
    counts = {"revision": source.commit, "files_read": len(source.files), "files_skipped": source.skipped}
    if source.nanogpt:
        tokenizer = get_tokenizer(settings.tokenizer, settings.folder)
        layout = lay_out_nanogpt(source.nanogpt, tokenizer)
        return layout, counts, token_excerpts(source.files[0][0], tokenizer)
    parts = encode_all(make_shards(find_pieces(source, settings)), parts_dir, settings, vocabulary, workers)
    try:
        return lay_out(parts, settings), counts | count_skipped(parts), excerpts(parts)
    except InputError:
        for part in parts:  # of no use with any other source
            shutil.rmtree(part.folder)
        raise


def find_pieces(source: Source, settings: Settings) -> list[Piece]:
    """The pieces to encode. Raises InputError."""
    if source.is_python_docs:
        return [Piece(None, "python-docs", size=2_000_000)]
    pieces = [
        piece for path, split in source.files for piece in cut_into_pieces(path, split, settings.text_column)
    ]
    if not pieces:
        raise InputError("the source contains no documents to train on")
    return pieces


def require_empty(output_dir: Path) -> None:
    """Raise InputError if the output folder exists and contains anything."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir}: is a file, not a folder")
    if names := [path.name for path in contents(output_dir)[:3]]:
        raise InputError(f"{output_dir}: already contains {' and '.join(names)}; remove it or choose another")


def check_prepared(folder: Path, options: dict[str, Any]) -> None:
    """Raise InputError unless the folder holds an undamaged data set prepared with these options."""
    meta = read_json_object(folder / META)
    for key, value in options.items():
        if key != "revision" and meta.get(key) != value:  # meta.json has the commit instead
            raise InputError(f"{folder}: contains a data set with another {key}, '{meta.get(key)}'")
    for name, sha256 in meta.get("sha256", {}).items():
        if not (folder / name).exists() or fingerprint(folder / name)["sha256"] != sha256:
            raise InputError(f"{folder / name}: is damaged; remove {folder} and prepare it again")


@contextlib.contextmanager
def unfinished_folder(output_dir: Path) -> Iterator[Path]:
    """The folder for work in progress, locked for this process; it stays if it holds finished parts. Raises
    InputError if another process prepares the same data set, or the folder cannot be written to."""
    folder = work_folder(output_dir)
    parts = folder / "parts"
    try:
        make_folder(parts)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created or written to: {error.strerror}") from None
    try:
        # Not flock, which forked workers share: one that outlives this process would go on holding it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{output_dir}: another process is preparing it; wait for it or stop it") from None
    except OSError as error:
        print(f"Warning: {folder}: cannot be locked ({error.strerror}); do not prepare it twice at once")
    remove_unfinished(folder)
    try:
        yield folder
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        problem = f"cannot be written: {error.strerror}; free some space, about 4 bytes per token"
        again = "and run the same command again, which keeps finished shards"
        raise InputError(f"{folder}: {problem}, {again}") from None
    finally:
        with contextlib.suppress(OSError):
            remove_unfinished(folder)
            parts.rmdir()  # unless it holds finished parts
            shutil.rmtree(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove all but finished parts: a half-joined data set, and NUMBER.PROCESS of killed workers."""
    for path in (folder / "finished", *folder.glob("parts/*.*")):
        shutil.rmtree(path, ignore_errors=True)


def publish_dataset(finished: Path, output_dir: Path, meta: dict[str, Any], shown: list[str]) -> None:
    """Add meta.json and the card to a finished folder, make it OUTPUT_DIR, remove what is left of the work,
    and print a summary with the excerpts `shown`."""
    (finished / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    (finished / "README.md").write_text(card(output_dir.name, meta), encoding="utf-8")
    lines = summary(meta)
    for split, counts in meta["splits"].items():
        files = as_one_path([output_dir / path.name for path in split_files(finished, split)])
        documents, tokens = counted(counts["documents"], "document"), counted(counts["tokens"], "token")
        lines.append(f"{files}: {documents}, {tokens}")
    publish(finished, output_dir, last="train")
    shutil.rmtree(finished.parent, ignore_errors=True)
    print(*lines, *(["Excerpts:"] if shown else []), *(f"  {excerpt}" for excerpt in shown), sep="\n")


if __name__ == "__main__":
    run_command(main)
