"""Write the pages of docs/ that follow from the code: `make docs`. A test checks that they are current."""

import ast
import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
from basemodel.common.json_config import described
from basemodel.common.output import markdown_table
from basemodel.model.config import GPTConfig
from basemodel.training.config import OLD_KEYS, TrainConfig

ROOMS = {
    "common": "Errors, files, tables and command lines, for all other rooms. Imports no torch.",
    "model": "GPT-2: its shape, loss, weights and text generation.",
    "data": "Token files, tokenizers and the Hub, for training and evaluation.",
    "prepare": "Turns text into token files. Imports no torch.",
    "training": "A training run: configs, batches, optimizer, processes, stopping and resuming.",
    "planning": "How much memory, time and money a run takes, here or on a rented machine.",
    "evaluation": "Test loss, benchmark tasks, instruction fine-tuning and judging.",
    "results": "Logs and charts of a run; exports, comparisons and studies of finished ones.",
}

CODE_INTRODUCTION = """\
# The code, file by file

Start with [`gpt.py`](../gpt.py), the model. Then read [`ddp_train.py`](../ddp_train.py) from top to bottom:
`Learner` takes a training step, `Trainer` loops over steps, and the command puts the two together.
[`checkpointing.py`](../checkpointing.py) saves, finds and loads checkpoints. Everything else is in the rooms
of `basemodel/`. [tests/test_layout.py](../tests/test_layout.py) lists which rooms a room may import.

This page is generated from the docstrings by `make docs`; edit those instead.
"""


def code_page() -> str:
    """docs/code.md: every script and module with the first sentence of its docstring, by room."""
    lines = [
        CODE_INTRODUCTION,
        "## The root: scripts, and two files to read",
        "",
        *_table("file", ROOT.glob("*.py")),
    ]
    for room, purpose in ROOMS.items():
        modules = (ROOT / "basemodel" / room).glob("*.py")
        lines += ["", f"## basemodel/{room}/", "", purpose, "", *_table("module", modules)]
    return "\n".join(lines) + "\n"


KEYS_INTRODUCTION = """\
# The keys of model.json and train.json

A run is a folder `runs/RUN` with these two files. A key that is unknown or out of range, or that contradicts
another, is an error that names the file, the key and the fix. A key without a default is required.
[surviving.md](surviving.md) lists the keys that may change when a run is resumed.

This page is generated from `GPTConfig` and `TrainConfig` by `make docs`; edit those instead.
"""


def keys_page() -> str:
    """docs/keys.md: every key of model.json and train.json with its type, default, range and meaning."""
    old = [
        (f"`{key}`", f"`{json.dumps(trigger)}` means `{json.dumps({new: value})[1:-1]}`")
        for key, (trigger, new, value) in OLD_KEYS.items()
    ]
    parts = [
        KEYS_INTRODUCTION,
        "## model.json\n\n" + _keys_table(GPTConfig),
        "## train.json\n\n" + _keys_table(TrainConfig),
        "Two keys of the published runs are still read:",
        markdown_table(["key", "meaning"], old),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _keys_table(config: type) -> str:
    hints, rows = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        required = field.default is dataclasses.MISSING
        default = "required" if required else f"`{json.dumps(field.default)}`"
        limits, meaning = field.metadata["range"] or "", field.metadata["meaning"]
        rows.append([f"`{field.name}`", described(hints[field.name]), default, limits, meaning])
    return markdown_table(["key", "type", "default", "range", "meaning"], rows)


PAGES: dict[str, Callable[[], str]] = {"code.md": code_page, "keys.md": keys_page}


def _table(heading: str, paths: Iterable[Path]) -> list[str]:
    rows = [
        f"| [`{path.name if path.parent == ROOT else path.stem}`]"
        f"(../{path.relative_to(ROOT)}) | {first_sentence(path)} |"
        for path in sorted(paths)
    ]
    return [f"| {heading} | purpose |", "| --- | --- |", *rows]


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring. Raises ValueError if the module has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path}: has no docstring")
    sentence = " ".join(docstring.partition("\n\n")[0].split()).partition(". ")[0]
    return sentence if sentence.endswith("?") else sentence.rstrip(".:") + "."


def main() -> None:
    """Write every page."""
    for name, make_page in PAGES.items():
        (DOCS / name).write_text(make_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
