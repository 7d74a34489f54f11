"""Where text comes from: files in a folder, or a data set on the Hub as the library `datasets` sees it."""

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from basemodel.common.errors import InputError
from basemodel.common.names import META
from basemodel.data.hub import download, reason
from basemodel.prepare.assemble import NANOGPT_FILES
from basemodel.prepare.documents import KNOWN_TYPES, PYTHON_DOCS, TYPES, file_type
from basemodel.prepare.encoding import start_workers

# The words by which the library `datasets` recognizes a split.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Files that describe a data set's tables and lie beside them.
DESCRIPTIONS = ("readme.md", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Request:
    """The text that was asked for, by the names of the command line."""

    source: str
    name: str | None = None  # a configuration of a Hub data set
    split: str = "train"
    files: str | None = None  # a pattern
    revision: str | None = None


@dataclass
class Source:
    """The files to read in order, each with its split, or None where the text of each document decides."""

    files: list[tuple[Path, str | None]]
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> number of files
    commit: str | None = None  # of a Hub data set
    nanogpt: Path | None = None  # a folder of nanoGPT's, which holds tokens
    is_python_docs: bool = False


def find_source(request: Request, leave_out: Path | None) -> Callable[[], Source]:
    """Locate the text without reading it; the function returned downloads it if need be. The folder
    `leave_out`, which is to hold the tokens, is not searched. Raises InputError."""
    path = Path(request.source)
    if request.source == PYTHON_DOCS:
        return lambda: Source([], is_python_docs=True)
    if (path / NANOGPT_FILES["train"]).is_file():
        return lambda: Source([(path / name, split) for split, name in NANOGPT_FILES.items()], nanogpt=path)
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+", request.source)
    if path.exists() or file_type(path) or not is_hub_id:
        for option in ("name", "revision"):
            if getattr(request, option) is not None:
                raise InputError(f"--{option} is for a data set on the Hub; {path} is a folder or file here")
        source = find_files(path, request, leave_out)
        return lambda: source
    if request.files is not None:
        return lambda: _fetch_matching(request)
    with start_workers(1) as pool:  # `datasets` is 90 MB that forked workers would carry along
        found = pool.submit(resolve_on_hub, request).result()
    return lambda: _fetch(request.source, *found)


def find_files(source: Path, request: Request, leave_out: Path | None) -> Source:
    """The text files in a folder, recursively and sorted by path, or the file itself. Hidden files and
    folders are skipped, and files that describe a data set's tables. Raises InputError."""
    if source.is_file():
        if file_type(source) is None:
            raise InputError(f"{source}: unknown file type; known are {KNOWN_TYPES}")
        return Source([(source, None)])
    if not source.is_dir():
        others = f"the source may also be '{PYTHON_DOCS}', or a data set on the Hub, OWNER/NAME"
        raise InputError(f"{source}: no such file or folder; {others}")
    paths, skipped = _walk(source, leave_out.resolve() if leave_out else None)
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


def _walk(source: Path, leave_out: Path | None) -> tuple[list[Path], Counter[str]]:
    paths, skipped = [], Counter()
    for folder, folders, names in os.walk(source):
        skipped["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        outputs = {name: Path(folder, name.removesuffix(".incomplete")).resolve() for name in folders}
        folders[:] = [name for name in folders if outputs[name] != leave_out]
        if META in names and any(fnmatch.fnmatch(name, "train*.safetensors") for name in names):
            skipped["prepared data sets"] += 1
            continue
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file() and file_type(path):
                paths.append(path)
            else:
                skipped[path.suffix.lower() or "no suffix"] += 1
    return sorted(paths), skipped


def _in_splits(source: Path, paths: list[Path], skipped: Counter[str], train_split: str) -> Source:
    """The files of the split to train on and of the one for validation, if every file's path names a split;
    otherwise all files, for the text of each document to decide. Raises InputError if `train_split` is not
    "train" and there is no such split."""
    splits = {path: named_split(path.relative_to(source).as_posix(), train_split) for path in paths}
    names = set(splits.values())
    if None in names or train_split not in names:
        if train_split != "train":
            problem = f"the paths of its files do not tell which belong to the split '{train_split}'"
            raise InputError(f"{source}: {problem}; leave --split out to read them all")
        return Source([(path, None) for path in paths], skipped)
    has_validation = "validation" in names - {train_split}
    role = {"validation": "validation", train_split: "train" if has_validation else None}
    skipped += Counter(f"of the split '{split}'" for split in splits.values() if split not in role)
    return Source([(path, role[split]) for path, split in splits.items() if split in role], skipped)


def named_split(path: str, train_split: str) -> str | None:
    """The split that a file's path names, such as validation for data/val-00000-of-00001.parquet."""
    words = re.findall("[a-z]+", path.lower())
    if train_split not in SPLIT_WORDS and train_split in path:
        return train_split
    return next((split for word in words[::-1] for split in SPLIT_WORDS if word in SPLIT_WORDS[split]), None)


def resolve_on_hub(request: Request) -> tuple[list[tuple[str, str | None]], Counter[str], str]:
    """The names of a data set's files, each with its split; how many files of other splits it has; and the
    commit. Raises InputError."""
    os.environ["USE_TORCH"] = "0"  # not needed, and slow
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = datasets.load_dataset_builder(request.source, request.name, revision=request.revision)
    except Exception as error:  # network, proxy, Hub and `datasets` have errors of many types
        problem = reason(error)
        hint = "check --name, --revision and the network; a private or gated data set needs: hf auth login"
        if "scripts are no longer supported" in problem:
            hint = "the Hub may have made tables of it: --revision refs/convert/parquet"
        missing = f"no such file or folder here, and the Hub did not provide it ({problem})"
        raise InputError(f"{request.source}: {missing}; {hint}") from None
    splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if request.split not in splits:
        raise InputError(f"{request.source}: has no split '{request.split}'; --split is one of {[*splits]}")
    held_out = [name for name in SPLIT_WORDS["validation"] if name in splits and name != request.split][:1]
    files = []
    for split in (request.split, *held_out):
        role = "validation" if split in held_out else "train" if held_out else None
        for url in splits[split]:
            commit, _, name = url.removeprefix(f"hf://datasets/{request.source}@").partition("/")
            if file_type(Path(name)) is None:
                raise InputError(f"{request.source}: {name} has an unknown type; known are {KNOWN_TYPES}")
            files.append((name, role))
    others = {split: len(urls) for split, urls in splits.items() if split not in (request.split, *held_out)}
    return files, Counter({f"of the split '{split}'": count for split, count in others.items()}), commit


def _fetch(dataset: str, files: list[tuple[str, str | None]], skipped: Counter[str], commit: str) -> Source:
    folder, _ = download(dataset, [glob.escape(name) for name, _ in files], commit)
    return Source([(folder / name, split) for name, split in files], skipped, commit)


def _fetch_matching(request: Request) -> Source:
    folder, names = download(request.source, [request.files], request.revision)
    paths = [folder / name for name in names]
    texts = [path for path in paths if file_type(path)]
    if not texts:
        raise InputError(f"{request.source}: has no {KNOWN_TYPES} files that match --files '{request.files}'")
    skipped = Counter(path.suffix.lower() or "no suffix" for path in paths if not file_type(path))
    return Source([(path, None) for path in texts], skipped, folder.name)
