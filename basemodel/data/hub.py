"""Data sets from the Hugging Face Hub, identified by the SHA-256 of their files, and uploads to it.

Text to prepare comes by snapshot_download. That begins a file anew after a kill, or once the network was gone
for some seconds, which is too dear for token files of up to 40 GB: hf_xet or HTTP writes these to a file that
the next try continues over HTTP.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub as hub  # loads its parts, and the network's, when they are used
from tqdm import tqdm

from basemodel.common.errors import InputError, RunError
from basemodel.common.files import fingerprint, free_space, locked, replace_text, sync
from basemodel.common.json_config import read_json_object
from basemodel.common.names import META, TOKENIZER_FILE, require_repo_id
from basemodel.common.output import Progress
from basemodel.data.token_files import PATTERNS, read_meta, split_files, whole_set

FINGERPRINTS = ".fingerprints.json"  # in a data set's folder: the hashes of its files
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before another try when a connection breaks
STALE_SECONDS = 3600  # after which nobody writes to an incomplete file in the Hub's cache any more


def dataset_folder(datasets_dir: Path, dataset: str) -> Path:
    """The folder of data set OWNER/NAME. Raises InputError for any other name."""
    require_repo_id(dataset)
    return datasets_dir.joinpath(*dataset.split("/"))


def fetch_dataset(datasets_dir: Path, dataset: str, revision: str | None, splits: Iterable[str]) -> Path:
    """Download what is missing of the token files of `splits`, all from one commit; return the data set's
    folder. The same call continues an interrupted download. Raises InputError, naming the data set."""
    folder, splits = dataset_folder(datasets_dir, dataset), list(splits)
    commit = _commit_of(folder, splits)
    if None not in (commit, revision) and len(revision) >= 40 and revision != commit:
        raise InputError(f"{folder}: is at {commit}, but dataset_revision asks for {revision}; move it away")
    if missing := [name for name in _file_names(folder, splits) if not (folder / name).exists()]:
        if dataset.startswith("local/"):  # prepared here, as the README does it
            hint = f"prepare it with: python prepare_datasets.py SOURCE {folder}"
            raise InputError(f"{folder}: has no {' and no '.join(missing)}; {hint}")
        with _failures_in_one_line(folder, ", ".join(missing)):
            info = hub.HfApi().dataset_info(dataset, revision=commit or revision)
            folder.mkdir(parents=True, exist_ok=True)
            waiting = f"Waiting for another process that is downloading {dataset}"
            with locked(folder, math.inf, lambda: tqdm.write(waiting)):
                _download(folder, info, splits)
    return folder


def _commit_of(folder: Path, splits: list[str]) -> str | None:
    """The commit that the files in a folder were downloaded from, if any was."""
    paths = [folder / META, *(path for split in splits for path in split_files(folder, split))]
    known = _known_fingerprints(folder)
    commits = (known.get(path.name, {}).get("revision") for path in paths if path.exists())
    return next(filter(None, commits), None)


def _file_names(folder: Path, splits: Iterable[str]) -> list[str]:
    """The names of the splits' files, and of the data set's own tokenizer if meta.json says it has one."""
    names = [path.name for split in splits for path in split_files(folder, split)]
    return [*names, TOKENIZER_FILE] if read_meta(folder).get("tokenizer") == "dataset" else names


def _download(folder: Path, info: "hub.DatasetInfo", splits: list[str]) -> None:
    """Download what is missing of the splits, meta.json and the tokenizer, from one commit; record it."""
    if _commit_of(folder, splits) not in (None, info.sha):
        raise InputError("another process has fetched another commit; run the same command again")
    listed = {file.rfilename for file in info.siblings or []}
    names = [name for name in (META, TOKENIZER_FILE) if name in listed]  # older data sets have none
    here = {path.name for path in folder.iterdir()}
    for split in splits:
        names += whole_set(listed | here, split, info.id) or [f"{split}.safetensors"]
    for name in names:
        if name not in here:
            url = hub.hf_hub_url(info.id, name, repo_type="dataset", revision=info.sha)
            arrived = {**_fetch(folder / name, url), "revision": info.sha}
            arrived["mtime_ns"] = (folder / name).stat().st_mtime_ns
            _record_fingerprints(folder, _known_fingerprints(folder) | {name: arrived})


def _fetch(path: Path, url: str) -> dict[str, Any]:
    """Download a file, continuing what an earlier try left; return its size and SHA-256. Raises InputError if
    the disk is too small or the file is not what the Hub announced, and what the Hub's client raises."""
    file = hub.get_hf_file_metadata(url)
    incomplete = path.with_name(f".incomplete-{path.name}-{file.etag[:16]}")
    for stale in path.parent.glob(f".incomplete-{path.name}-*"):
        if stale != incomplete or stale.stat().st_size > (file.size or 0):
            stale.unlink()  # of another content
    incomplete.touch()
    missing, free = (file.size or 0) - incomplete.stat().st_size, free_space(path.parent)
    if missing > free:
        sizes = f"{missing / 1e9:,.2f} GB more, but {free / 1e9:,.2f} GB are free"
        raise InputError(f"{path.name} takes {sizes}; free some space, and run the same command again")
    _receive(file, url, incomplete, f"Fetching {path.parent.name}/{path.name}")
    arrived = fingerprint(incomplete)
    for what, announced in (("size", file.size), ("sha256", file.etag if len(file.etag) == 64 else None)):
        if announced not in (None, arrived[what]):
            incomplete.unlink()
            problem = f"the Hub announced {what} {announced} but sent {arrived[what]}"
            raise InputError(f"{path.name}: {problem}; run the same command again to download it anew")
    sync(incomplete)
    incomplete.replace(path)
    return arrived


def _receive(file: "hub.HfFileMetadata", url: str, incomplete: Path, label: str) -> None:
    """Write a file: by hf_xet if the Hub offers it and nothing has arrived, else the rest over HTTP."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import http_get, xet_get
    from huggingface_hub.utils import build_hf_headers
    from huggingface_hub.utils._runtime import is_xet_available

    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # for ranges of the file itself
    start = incomplete.stat().st_size
    with Progress(total=file.size, initial=start, desc=label, unit="B", unit_scale=True) as bar:
        request = {"headers": headers, "expected_size": file.size, "_tqdm_bar": bar}
        if start == 0 and file.xet_file_data is not None and is_xet_available():
            try:
                xet_get(incomplete_path=incomplete, xet_file_data=file.xet_file_data, **request)
                return
            except Exception as error:  # hf_xet's have no common type
                tqdm.write(f"{label}: hf_xet failed ({reason(error)}); continuing over HTTP", file=sys.stderr)
        with incomplete.open("ab") as stream:
            for pause in (*PAUSES, None):
                try:
                    http_get(url, stream, resume_size=stream.tell(), **request)
                    return
                except HTTPError as error:
                    if pause is None or getattr(error, "response", None) is not None:
                        raise  # after the last pause, or because the Hub answered
                    time.sleep(pause)
                except OSError as error:
                    if error.errno is None:
                        return  # of another size than expected, as a proxy's page is: the caller refuses it
                    raise


def fingerprint_files(folder: Path, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of the splits' files and of the data set's own tokenizer, and the commit
    ("revision") they were downloaded from, cached until a file's size or modification time changes. Raises
    InputError if a hash differs from the one in the data set's meta.json."""
    meta = read_meta(folder)
    promised = meta.get("sha256") if isinstance(meta.get("sha256"), dict) else {}
    recorded = _known_fingerprints(folder)
    known = dict(recorded)
    names = _file_names(folder, splits)
    for name in names:
        path, stat = folder / name, (folder / name).stat()
        entry = known.get(name, {})
        if (entry.get("size"), entry.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
            if stat.st_size > 1 << 30:
                tqdm.write(f"Checking {path} ({stat.st_size / 1e9:.1f} GB), once")
            known[name] = {**fingerprint(path), "mtime_ns": stat.st_mtime_ns}
        if promised.get(name) not in (None, known[name]["sha256"]):
            raise InputError(f"{path}: damaged (its SHA-256 is not meta.json's); fetch or prepare it again")
    if known != recorded:
        _record_fingerprints(folder, known)
    return {name: known[name] for name in names}


def same_on_all_nodes(nodes: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The fingerprints of one node if those of all nodes agree. Raises InputError if they differ."""
    for name in sorted({name for node in nodes for name in node}):
        hashes = {node[name]["sha256"] if name in node else None for node in nodes}
        if len(hashes) != 1:
            what = "on all nodes" if None in hashes else "the same on all nodes"
            raise InputError(f"{name} is not {what}; delete the wrong files to download the data set again")
    return nodes[0]


def _record_fingerprints(folder: Path, known: dict[str, dict[str, Any]]) -> None:
    # In a read-only folder the next run hashes the files again.
    with contextlib.suppress(OSError):
        replace_text(folder / FINGERPRINTS, json.dumps(known, indent=1))


def _known_fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_json_object(folder / FINGERPRINTS)
    except InputError:
        return {}


def download(dataset: str, patterns: list[str], revision: str | None) -> tuple[Path, list[str]]:
    """Download the files of a Hub data set that match the patterns, unless the Hub's cache has them all.
    Returns the folder there, which has the commit's name, and the names of the files in it. Raises
    InputError, naming the data set, on any failure."""
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    place, started = {"repo_type": "dataset", "revision": revision}, time.time()
    what = f"'{patterns[0]}'" if len(patterns) == 1 else f"{len(patterns)} files"
    with _failures_in_one_line(dataset, what):
        try:
            hub.get_cached_repo_tree(dataset, **place)  # without which a part of the files would pass for all
            folder = hub.snapshot_download(dataset, allow_patterns=patterns, local_files_only=True, **place)
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            folder = hub.snapshot_download(dataset, allow_patterns=patterns, tqdm_class=Progress, **place)
        listed = hub.get_cached_repo_tree(dataset, repo_type="dataset", revision=Path(folder).name)
        names = sorted(filter_repo_objects((file.path for file in listed), allow_patterns=patterns))
        for path in (Path(folder, name) for name in names):
            blob = path.readlink().name if path.is_symlink() else ""  # a large file's is its SHA-256
            if len(blob) == 64 and path.stat().st_mtime > started and fingerprint(path)["sha256"] != blob:
                path.resolve().unlink()
                raise InputError(
                    f"{path.name}: the Hub announced sha256 {blob} but sent another content; run the same "
                    "command again to download it anew"
                )
    for leftover in Path(folder).parents[1].glob("blobs/*.incomplete"):  # killed downloads never use it again
        if started - leftover.stat().st_mtime > STALE_SECONDS:
            leftover.unlink(missing_ok=True)
    return Path(folder), names


@contextlib.contextmanager
def _failures_in_one_line(target: object, what: str) -> Iterator[None]:
    """Turn whatever a network, a proxy, a disk or the Hub can raise into one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except InputError as error:  # says what to do
        raise InputError(f"{target}: could not download {what} from the Hub: {error}") from None
    except Exception as error:
        # snapshot_download puts advice about the network in front of what the Hub answered.
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise InputError(
            f"{target}: could not download {what} from the Hub ({reason(cause or error)}); check the name, "
            "the network and your access (`hf auth login`), and run the same command again: what has "
            "arrived is kept"
        ) from None


def check_push(repo_id: str) -> None:
    """Raise InputError unless `repo_id` is OWNER/NAME and the Hub accepts this user's token."""
    require_repo_id(repo_id, "repository")
    try:
        hub.HfApi().whoami()
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise InputError(f"{repo_id}: the Hub denies access ({reason(error)}); try `hf auth login`") from None


def push(
    folder: Path, repo_id: str, message: str, repo_type: str = "model", private: bool | None = None
) -> str:
    """Upload a folder to a repository, created if need be, and return the commit's URL.

    Raises RunError; the same call then uploads only what is missing. A data set's token files replace all
    that are there: others, of an earlier one, would be read with them.
    """
    api = hub.HfApi()
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=repo_type,
            commit_message=message,
            delete_patterns=PATTERNS if repo_type == "dataset" else None,
        ).commit_url
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise RunError(
            f"{repo_id}: the upload failed ({reason(error)}); run the same command again to resume it"
        ) from None


def reason(error: Exception) -> str:
    """An error's message as part of a line; the Hub's messages give a status first, then the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
