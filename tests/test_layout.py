"""The code's layout: scripts at the root, the package that they lean on, and which imports which."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from mutants import MUTANTS, mutated

FILES = [*ROOT.glob("*.py"), *ROOT.glob("basemodel/**/*.py")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
# What each room may import besides itself. gpt.py counts as model, checkpointing.py as training.
ROOMS = {
    "common": set(),
    "model": {"common"},
    "data": {"common", "model"},
    "prepare": {"common", "data"},
    "training": {"common", "model", "data"},
    "planning": {"common", "model", "data", "training"},
    "evaluation": {"common", "model", "data"},
    "results": {"common", "model", "data", "training", "planning", "evaluation"},
}
SHARED = {"gpt", "checkpointing"}  # at the root because one must read them, not because one runs them


def imported_modules(path: Path) -> Iterator[str]:
    """The project's modules that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from names or {node.module} & MODULES.keys()


def room_of(module: str) -> str:
    """The room that a module is in; a script's own name."""
    return {"gpt": "model", "checkpointing": "training"}.get(module) or module.split(".")[-2:][0]


def test_imports_have_no_cycle_and_lead_from_no_script_to_another() -> None:
    graph = {module: set(imported_modules(path)) for module, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    scripts = {module for module in MODULES if "." not in module} - SHARED
    assert {"ddp_train", "prepare_datasets", "test_loss"} <= scripts and len(scripts | SHARED) <= 12
    for module, imported in graph.items():
        assert not imported & scripts, module


def test_rooms_import_only_what_the_plan_allows() -> None:
    for module, path in MODULES.items():
        if (room := room_of(module)) in ROOMS:
            for imported in imported_modules(path):
                assert room_of(imported) in {room, *ROOMS[room]}, f"{module} imports {imported}"


TORCH = ["torch"]
SLOW = ["torch._dynamo", "torch._inductor", "matplotlib", "tiktoken", "datasets", "pyarrow", "openai"]
SLOW += ["transformers"]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("prepare_datasets", [*TORCH, "datasets", "pyarrow"]),
        ("compare_runs", [*TORCH, "matplotlib"]),
        ("basemodel.model.config", TORCH),
        ("basemodel.training.config", TORCH),
        ("ddp_train", SLOW),
    ],
)
def test_what_is_slow_is_imported_where_it_is_used(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print(*(name for name in {unwanted} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_functions_are_short_and_take_few_parameters() -> None:
    assert len((ROOT / "ddp_train.py").read_text().splitlines()) <= 650
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([each for each in arguments if each.arg not in ("self", "cls", "ctx")])
                if not any("command" in ast.unparse(decorator) for decorator in node.decorator_list):
                    assert count <= 5, f"{path.name}: {node.name} takes {count} parameters"
                    assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name} is too long"


def test_every_mutant_still_has_what_it_would_break() -> None:
    for mutant in MUTANTS:
        assert mutated(mutant) != (ROOT / mutant.file).read_text(encoding="utf-8"), mutant.name
