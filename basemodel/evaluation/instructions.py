"""Instruction data: records with an instruction, an input and an output, and prompts made from them."""

import json
import urllib.request
from pathlib import Path

from basemodel.common.errors import InputError
from basemodel.common.files import replace_text

FIELDS = ("instruction", "input", "output")
Record = dict[str, str]


def parse_records(text: bytes, source: str, fields: tuple[str, ...] = FIELDS) -> list[Record]:
    """Parse a JSON list of objects with the string `fields`. Raises InputError, naming the first bad one."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{source}: must contain a JSON list of records")
    for index, record in enumerate(records):
        for field in fields:
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise InputError(f'{source}: record {index} has no string "{field}"')
    return records


def read_records(path: Path, fields: tuple[str, ...] = FIELDS) -> list[Record]:
    """The records in a file. Raises InputError."""
    try:
        return parse_records(path.read_bytes(), str(path), fields)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def fetch_records(folder: Path, url: str) -> list[Record]:
    """The records at `url`, downloaded once and kept in `folder`. Raises InputError."""
    path = folder / "instruction-data.json"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                text = reply.read()
        except (OSError, ValueError) as error:
            raise InputError(f"could not download {url} ({error}); --data FILE takes a copy of it") from None
        parse_records(text, url)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, text.decode("utf-8"))
    return read_records(path)


def split_records(records: list[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """Training, validation and test records: in file order 85% for training, 10% for testing, the rest for
    validation, as in the book. Raises InputError if a split is empty."""
    train, test = int(len(records) * 0.85), int(len(records) * 0.1)
    parts = records[:train], records[train + test :], records[train : train + test]
    if not all(parts):
        raise InputError(f"{len(records)} records are too few to train, validate and test on; use 10 or more")
    return parts


def prompt_of(record: Record) -> str:
    """The instruction, with its input if it has one, in Alpaca style (Taori et al. 2023)."""
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{record['instruction']}"
    )
    prompt += f"\n\n### Input:\n{record['input']}" if record["input"] else ""
    return prompt + "\n\n### Response:\n"
