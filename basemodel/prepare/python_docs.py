"""The text that ships with every Python."""

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path


def python_docs() -> list[str]:
    """The text that ships with Python: the language reference and the standard library's docstrings,
    deduplicated, in an order that is fixed for each version of Python."""
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
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # deliberately broken, like some of lib2to3's modules
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (ast.get_docstring(node) or "").strip()
