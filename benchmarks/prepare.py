"""Tokens/s and memory of prepare_datasets.py beside a plain loop over tiktoken's encode_ordinary_batch.

    python benchmarks/prepare.py [--megabytes 450] [--rounds 3] [--corpus FOLDER]
    python benchmarks/prepare.py --megabytes 2300 --rounds 1 --no-plain          the memory for much text

Makes a corpus of mixed text in four parquet files, then runs in turns: the plain loop in one process, and
prepare_datasets.py with each engine and number of workers, timed from the start of the process to its end;
also, with tiktoken, on the same text in files of other types (`--only csv` runs that one alone).
Memory is resident memory, read from /proc ten times a second: of the largest process, and of all together.
Linux only. The GPT-2 vocabulary must be at hand.
"""

import csv
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import pyarrow
import pyarrow.parquet
from common import ROOT, spread
from safetensors import safe_open
from safetensors.numpy import save_file

from basemodel.common.output import markdown_table
from basemodel.data.tokenizer import get_tokenizer
from basemodel.prepare.readers import python_docs

FILES = 4
OTHER_TYPES = ("jsonl.zst", "json", "csv", "arrow")


# --- the corpus


def paragraphs() -> tuple[list[str], list[str]]:
    """Paragraphs of English and of code that every Python carries."""
    prose = [" ".join(part.split()) for text in python_docs() for part in text.split("\n\n") if part.strip()]
    code = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="replace")
            code += [part for part in text.split("\n\n") if part.strip()]
    return prose, code


def foreign_paragraph(rng: random.Random) -> str:
    """Chinese characters, Cyrillic words, words that nobody has seen, or numbers with emoji, at random."""

    def words(alphabet: str, least: int, most: int) -> str:
        lengths = (rng.randint(least, most) for _ in range(rng.randint(5, 80)))
        return " ".join("".join(rng.choices(alphabet, k=length)) for length in lengths)

    chinese = "".join(chr(0x4E00 + int(rng.paretovariate(0.7) * 20) % 0x5000) for _ in range(100))
    cyrillic = "".join(map(chr, range(0x430, 0x450)))
    return rng.choice(
        (
            lambda: words(chinese, 10, 40),
            lambda: words(cyrillic, 2, 12),
            lambda: words("eeeetttaaooiinnsshhrrdlucmfwypvbgkjqxz", 2, 14),
            lambda: words("0123456789.-\N{GRINNING FACE}\N{ROCKET}\N{THUMBS UP SIGN}", 1, 12),
        )
    )()


def random_documents(rng: random.Random, prose: list[str], code: list[str]) -> Iterator[str]:
    """Documents of about 2,600 characters, some much longer: three quarters prose, a quarter code."""
    while True:
        source, joint = (prose, "\n") if rng.random() < 0.75 else (code, "\n\n")
        parts, left = [], rng.lognormvariate(7.4, 1.0)
        while left > 0:
            parts.append(foreign_paragraph(rng) if rng.random() < 0.02 else rng.choice(source))
            left -= len(parts[-1])
        yield joint.join(parts)


def write_corpus(folder: Path, megabytes: float) -> None:
    """Write text into parquet files, in row groups of up to 1,000 documents; the same every time."""
    folder.mkdir(parents=True)
    prose, code = paragraphs()
    for index in range(FILES):
        documents = random_documents(random.Random(index), prose, code)
        schema, left = pyarrow.schema({"text": pyarrow.string()}), megabytes * 1e6 / FILES
        with pyarrow.parquet.ParquetWriter(folder / f"{index:03}.parquet", schema) as writer:
            while left > 0:
                count = min(1000, 1 + int(left / 2600))
                table = pyarrow.table({"text": list(itertools.islice(documents, count))}, schema=schema)
                writer.write_table(table)
                left -= table.nbytes


def write_as(kind: str, corpus: Path, folder: Path) -> None:
    """Write the same documents into files of another type."""
    folder.mkdir()
    for file in sorted(corpus.glob("*.parquet")):
        path = folder / f"{file.stem}.{kind}"
        tables = (
            pyarrow.Table.from_batches([b]) for b in pyarrow.parquet.ParquetFile(file).iter_batches(1000)
        )
        if kind == "arrow":
            with pyarrow.ipc.new_stream(path, pyarrow.schema({"text": pyarrow.string()})) as out:
                for table in tables:
                    out.write_table(table)
            continue
        texts = (text for table in tables for text in table["text"].to_pylist())
        if kind == "csv":
            with path.open("w", newline="", encoding="utf-8") as out:
                csv.writer(out).writerows(itertools.chain([["text"]], ([text] for text in texts)))
        elif kind == "json":
            with path.open("w", encoding="utf-8") as out:
                for i, text in enumerate(texts):
                    out.write((",\n" if i else "[") + json.dumps({"text": text}))
                out.write("]")
        else:
            with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
                for text in texts:
                    out.write(json.dumps({"text": text}).encode() + b"\n")


# --- the sides


def plain(corpus: Path, path: Path) -> None:
    """What one would write first: every document in turn, all tokens in memory, saved at the end."""
    encoding, arrays = get_tokenizer("gpt2"), []
    for file in sorted(corpus.glob("*.parquet")):
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024, columns=["text"]):
            for tokens in encoding.encode_ordinary_batch(batch["text"].to_pylist()):
                arrays.append(np.array([*tokens, encoding.eot_token], dtype=np.uint16))
    save_file({"tokens": np.concatenate(arrays)}, path)


@dataclass
class Runs:
    """Time and memory that the runs of one side took."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of all processes and threads
    largest: int = 0  # bytes of memory of the largest process
    together: int = 0


def memory_of_tree(process: int) -> list[int]:
    """Resident bytes of a process and of all that it has started."""
    sizes, waiting = [], [process]
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        try:
            sizes.append(int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            waiting += map(int, (folder / f"task/{folder.name}/children").read_text().split())
        except (OSError, IndexError):  # it has just ended
            continue
    return sizes


def children_cpu_seconds() -> float:
    """What the processes that this one has started, and theirs, have computed so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(command: list[str], runs: Runs) -> None:
    """Run a command to its end and add to `runs` what it took."""
    start, cpu_start = time.perf_counter(), children_cpu_seconds()
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            sizes = memory_of_tree(process.pid)
            runs.largest = max(runs.largest, *sizes, 0)
            runs.together = max(runs.together, sum(sizes))
            time.sleep(0.1)
    runs.seconds.append(time.perf_counter() - start)
    runs.cpu_seconds.append(children_cpu_seconds() - cpu_start)
    if process.returncode:
        sys.exit(f"{command[0]} failed")


@click.command()
@click.option("--megabytes", type=float, default=450, show_default=True, help="Size of the corpus.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Number of runs of each side."
)
@click.option("--corpus", type=click.Path(path_type=Path), help="Folder that keeps the corpus.")
@click.option("--only", multiple=True, help="Run only the plain loop and sides whose names begin so.")
@click.option("--no-plain", is_flag=True, help="Leave out the plain loop, and the ratios to it.")
@click.option("--plain-to", type=click.Path(path_type=Path), hidden=True)
def main(
    megabytes: float,
    rounds: int,
    corpus: Path | None,
    only: tuple[str, ...],
    plain_to: Path | None,
    *,
    no_plain: bool,
) -> None:
    """Measure all sides in turns, and print medians with the least and the most."""
    if plain_to:
        plain(corpus, plain_to)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        corpus = corpus or Path(temporary) / "corpus"
        if not corpus.exists():
            write_corpus(corpus, megabytes)
        output = Path(temporary) / "output"
        plain_side = [__file__, "--corpus", str(corpus), "--plain-to", str(output)]
        sides = {} if no_plain else {"plain loop": plain_side}
        engines = ["tiktoken", *(["gigatoken"] if find_spec("gigatoken") else [])]
        counts = sorted({1, 2, os.cpu_count() or 1})
        for engine, workers in itertools.product(engines, counts):
            options = ["--engine", engine, "--workers", str(workers)]
            sides[f"{engine}, {workers}"] = ["prepare_datasets.py", str(corpus), str(output), *options]
        for kind in OTHER_TYPES:
            options = ["--engine", "tiktoken", "--workers", str(counts[-1])]
            sides[kind] = ["prepare_datasets.py", f"{corpus}-{kind}", str(output), *options]
        if only:
            sides = {name: side for name, side in sides.items() if name.startswith(("plain", *only))}
        for kind in OTHER_TYPES:
            if kind in sides and not Path(f"{corpus}-{kind}").exists():
                write_as(kind, corpus, Path(f"{corpus}-{kind}"))
        results = {name: Runs() for name in sides}
        tokens: set[int] = set()
        hashes: set[str] = set()
        for _, (name, command) in itertools.product(range(rounds), sides.items()):
            measure(command, results[name])
            print(f"{name}: {results[name].seconds[-1]:.1f} s", file=sys.stderr, flush=True)
            if output.is_dir():
                meta = json.loads((output / "meta.json").read_text())
                tokens.add(sum(split["tokens"] for split in meta["splits"].values()))
                hashes.add(json.dumps(meta["sha256"]))
                shutil.rmtree(output)
            else:
                with safe_open(output, framework="np") as file:
                    tokens.add(file.get_slice("tokens").get_shape()[0])
                output.unlink()
    if len(tokens) != 1 or len(hashes) != 1:
        sys.exit(f"the sides do not agree: {tokens} tokens, {len(hashes)} different files")
    report(results, tokens.pop())


def report(results: dict[str, Runs], tokens: int) -> None:
    """Print a Markdown table of what was measured."""
    print(f"{tokens:,} tokens; all runs of prepare_datasets.py wrote the same bytes")
    if "plain loop" in results:
        print("the plain loop keeps all tokens in memory, and neither splits the text nor hashes its file")
    print()
    columns = (
        "side, workers",
        "million tokens/s (min to max)",
        "ratio (min to max)",
        "CPU s",
        "MiB: largest, all",
    )
    rows, base = [], results.get("plain loop")
    for name, runs in results.items():
        speed = spread([tokens / seconds / 1e6 for seconds in runs.seconds])
        ratio = "not measured"
        if base:
            ratio = spread([one / other for one, other in zip(base.seconds, runs.seconds, strict=True)])
        memory = f"{runs.largest >> 20}, {runs.together >> 20}"
        rows.append((name, speed, ratio, f"{statistics.median(runs.cpu_seconds):.1f}", memory))
    print(markdown_table(columns, rows))


if __name__ == "__main__":
    main()
