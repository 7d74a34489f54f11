"""Where text comes from: files in a folder, or a data set on the Hub as the library `datasets` sees it."""

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError
from basemodel.common.names import require_repo_id
from basemodel.data.hub import download, download_files, reason
from basemodel.prepare.documents import PYTHON_DOCS
from basemodel.prepare.encoding import CONTEXT
from basemodel.prepare.formats import KNOWN, TYPES, file_type
from basemodel.prepare.nanogpt import BINS

VALIDATION = re.compile(r"(?<![a-z])(validation|valid|val|dev)(?![a-z])")  # what `datasets` takes for that
# What a data set's folder has beside its tables.
DESCRIPTIONS = ("readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Request:
    """The text that was asked for, in the words of the command line."""

    source: str
    name: str | None = None  # a configuration of a Hub data set
    split: str = "train"
    files: str | None = None  # a pattern
    revision: str | None = None


@dataclass
class Source:
    """The files to read in order, each with the split it belongs to or, for its text to decide, None."""

    files: list[tuple[Path, str | None]]
    skipped: Counter[str] = field(default_factory=Counter)  # why -> how many
    commit: str | None = None  # of a Hub data set
    bins: Path | None = None  # a folder of nanoGPT's, which holds tokens
    is_python_docs: bool = False


def find_source(request: Request, leave_out: Iterable[Path]) -> Callable[[], Source]:
    """Look where the text is, without reading it; the result fetches what has to be fetched.

    `leave_out` are folders in which no text is looked for. Raises InputError.
    """
    path = Path(request.source)
    if request.source == PYTHON_DOCS:
        return lambda: Source([], is_python_docs=True)
    if (path / BINS["train"]).is_file():
        return lambda: Source([(path / name, split) for split, name in BINS.items()], bins=path)
    if path.exists() or not _may_be_on_hub(request.source):
        for option in ("name", "revision"):
            if getattr(request, option) is not None:
                raise InputError(f"--{option} is for a data set on the Hub; {path} is a folder or file here")
        found = find_files(path, request, leave_out)
        return lambda: found
    require_repo_id(request.source)
    if request.files is not None:
        return lambda: _fetch_matching(request)
    files, commit = in_another_process(resolve_on_hub, request)
    return lambda: _fetch(request.source, files, commit)


def in_another_process(function: Callable, *arguments: Any) -> Any:
    """Call a function that imports `datasets`: 90 MB that forked workers need not carry with them."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(function, *arguments).result()


# ------------------------------------------------------------------------------------------------------------
# Here
# ------------------------------------------------------------------------------------------------------------


def find_files(source: Path, request: Request, leave_out: Iterable[Path] = ()) -> Source:
    """The text files in a folder, recursively and sorted by path, or the file itself. Raises InputError.

    Hidden files and folders are skipped, and what describes a data set's tables.
    """
    if source.is_file():
        if file_type(source) is None:
            raise InputError(f"{source}: unknown file type; known are {KNOWN}")
        return Source([(source, None)])
    if not source.is_dir():
        raise InputError(
            f"{source}: no such file or folder; the source may also be '{PYTHON_DOCS}', or a data set on the "
            "Hub, OWNER/NAME"
        )
    paths, skipped = _walk(source, {path.resolve() for path in leave_out})
    if request.files is not None:
        paths = [p for p in paths if fnmatch.fnmatch(p.relative_to(source).as_posix(), request.files)]
    if any(file_type(path) != "text" for path in paths):
        descriptions = {path for path in paths if path.name.lower() in DESCRIPTIONS}
        paths = [path for path in paths if path not in descriptions]
        skipped["descriptions of data sets"] += len(descriptions)
    if not paths:
        matching = f" that match --files '{request.files}'" if request.files else ""
        raise InputError(f"{source}: contains no {', '.join(TYPES)} files{matching}, compressed or not")
    return _in_splits(source, paths, skipped, request.split)


def _walk(source: Path, leave_out: set[Path]) -> tuple[list[Path], Counter[str]]:
    paths, skipped = [], Counter()
    for folder, folders, names in os.walk(source):
        skipped["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in folders if Path(folder, name).resolve() not in leave_out]
        if "meta.json" in names and any(fnmatch.fnmatch(name, "train*.safetensors") for name in names):
            skipped["prepared data sets"] += 1
            continue
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file() and file_type(path):
                paths.append(path)
            else:
                skipped[path.suffix.lower() or "no suffix"] += 1
    return sorted(paths), skipped


def _in_splits(source: Path, paths: list[Path], skipped: Counter[str], wanted: str) -> Source:
    """The files with the splits that `datasets` sees in their names, provided that it finds one for each."""
    names = {path: path.relative_to(source).as_posix() for path in paths}
    if wanted != "train" or any(VALIDATION.search(name.lower()) for name in names.values()):
        splits = in_another_process(splits_by_name, source)
        split_of = {Path(file): split for split, files in splits.items() for file in files}
        if (
            wanted != "validation"
            and {wanted, "validation"} <= set(splits)
            and all(path.absolute() in split_of for path in paths)
        ):
            splits_in_order = [(path, split_of[path.absolute()]) for path in paths]
            others = (split for _, split in splits_in_order if split not in (wanted, "validation"))
            skipped += Counter(f"of the split '{split}'" for split in others)
            as_named = {wanted: "train", "validation": "validation"}
            return Source([(p, as_named[s]) for p, s in splits_in_order if s in as_named], skipped)
        if wanted != "train":
            raise InputError(
                f"{source}: the names of its files and folders tell no split '{wanted}' and another for "
                "validation; leave --split out to read them all"
            )
    return Source([(path, None) for path in paths], skipped)


def splits_by_name(folder: Path) -> dict[str, list[str]]:
    """The files of each split, as `datasets` finds them by the names of files and folders."""
    os.environ["USE_TORCH"] = "0"
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(str(folder.absolute()))
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    return {str(split): list(files) for split, files in found.items()}


# ------------------------------------------------------------------------------------------------------------
# On the Hub
# ------------------------------------------------------------------------------------------------------------


def _may_be_on_hub(source: str) -> bool:
    return (
        file_type(Path(source)) is None
        and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+", source) is not None
    )


def resolve_on_hub(request: Request) -> tuple[list[tuple[str, str | None]], str]:
    """The names of a data set's files, each with its split, and the commit. Raises InputError."""
    os.environ["USE_TORCH"] = "0"  # not needed, and slow
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = datasets.load_dataset_builder(request.source, request.name, revision=request.revision)
    except Exception as error:  # network, proxy, Hub and `datasets` have errors of many types
        raise _why_not(request, error) from None
    found = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if request.split not in found:
        raise InputError(f"{request.source}: has no split '{request.split}'; --split is one of {list(found)}")
    validation = next((name for name in found if VALIDATION.fullmatch(name) and name != request.split), None)
    files = []
    for split in filter(None, (request.split, validation)):
        for url in found[split]:
            commit, _, name = url.removeprefix(f"hf://datasets/{request.source}@").partition("/")
            if file_type(Path(name)) is None:
                raise InputError(f"{request.source}: {name} is of no known file type; known are {KNOWN}")
            files.append((name, None if validation is None else "train" if split != validation else split))
    return files, commit


def _why_not(request: Request, error: Exception) -> InputError:
    """What `datasets` raised, as one line that says what to do."""
    import datasets

    dataset, message = request.source, str(error)
    if "gated dataset" in message:
        page = f"{datasets.config.HF_ENDPOINT}/datasets/{dataset}"
        return InputError(f"{dataset}: is gated; accept its terms at {page} and log in with: hf auth login")
    if "doesn't exist on the Hub" in message:
        return InputError(
            f"{dataset}: no such file or folder here, and no such data set on the Hub; if it is private, log "
            "in with: hf auth login"
        )
    if "Config name is missing" in message or "BuilderConfig" in message:
        names = datasets.get_dataset_config_names(dataset, revision=request.revision)
        return InputError(f"{dataset}: has several configurations; --name is one of {', '.join(names)}")
    return InputError(
        f"{dataset}: no such file or folder here, and the Hub did not provide it ({reason(error)}); check "
        "the name, --revision and the network"
    )


def _fetch(dataset: str, files: list[tuple[str, str | None]], commit: str) -> Source:
    paths = download_files(dataset, [name for name, _ in files], commit)
    return Source([(path, split) for path, (_, split) in zip(paths, files, strict=True)], commit=commit)


def _fetch_matching(request: Request) -> Source:
    paths, commit = download(request.source, request.files, request.revision)
    known = [path for path in paths if file_type(path)]
    if not known:
        raise InputError(f"{request.source}: has no {KNOWN} files that match --files '{request.files}'")
    skipped = Counter(path.suffix.lower() or "no suffix" for path in paths if path not in known)
    return Source([(path, None) for path in known], skipped, commit)
