"""Data sets from the Hugging Face Hub, identified by the SHA-256 of their files, and uploads to it.

An interrupted download resumes, even after a kill: the Hub's own client would start over.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub as hub  # loads its parts, and the network's, when they are used
from tqdm import tqdm

from basemodel.command_line import require_inside, require_repo_id
from basemodel.errors import InputError, RunError
from basemodel.files import fingerprint, replace_text
from basemodel.json_config import read_json_object
from basemodel.token_files import PATTERNS, missing_files, split_files, whole_set

FINGERPRINTS = ".fingerprints.json"  # in a data set's folder: the hashes of its files


def dataset_folder(datasets_dir: Path, dataset: str) -> Path:
    """The folder of data set OWNER/NAME. Raises InputError for any other name, or a link that leads out."""
    require_repo_id(dataset)
    folder = datasets_dir.joinpath(*dataset.split("/"))
    require_inside(datasets_dir, folder)
    return folder


def fetch_dataset(datasets_dir: Path, dataset: str, revision: str | None, splits: Iterable[str]) -> Path:
    """Download the token files of `splits` that are missing; return the data set's folder.

    All files come from one commit, and an interrupted download resumes where it stopped. Raises InputError,
    naming the data set, if that fails.
    """
    folder = dataset_folder(datasets_dir, dataset)
    if datasets_dir.is_file():
        raise InputError(f"{datasets_dir}: is a file; DATASETS_DIR is the folder of the data sets")
    missing, known = missing_files(folder, splits), _known_fingerprints(folder)
    names = [path.name for split in splits for path in split_files(folder, split) if path.exists()]
    commits = [known[name].get("revision") for name in names if name in known]
    for commit in filter(None, commits):
        if revision is not None and len(revision) >= 40 and revision != commit:
            raise InputError(
                f"{folder}: is at commit {commit}, but dataset_revision asks for {revision}; move it away"
            )
    if missing:
        _download(folder, dataset, next(filter(None, commits), revision), missing)
    return folder


def _download(folder: Path, dataset: str, revision: str | None, names: list[str]) -> None:
    """Download files, and meta.json if there is one, from one commit, which is recorded.

    Raises InputError, naming the file that failed.
    """
    announced: dict[str, Any] = {}
    try:
        for name in [*names, "meta.json"]:
            announced |= _announced(dataset, name, revision)
            revision = next((each.commit_hash for each in announced.values()), None) or revision
        for name, theirs in announced.items():
            url = hub.hf_hub_url(dataset, name, repo_type="dataset", revision=revision)
            found = download_file(url, folder / name, theirs)
            known = {**found, "mtime_ns": (folder / name).stat().st_mtime_ns, "revision": revision}
            _keep_fingerprints(folder, _known_fingerprints(folder) | {name: known})
    except InputError:
        raise
    except Exception as error:  # network, proxy and Hub errors have many types
        raise InputError(
            f"{folder / name} is missing, and the Hub did not provide it ({reason(error)}); check the "
            f"data set's name '{dataset}' and the network, or prepare it with prepare_datasets.py"
        ) from None


def _announced(dataset: str, name: str, revision: str | None) -> dict[str, Any]:
    """What the Hub announces for a file: an HfFileMetadata under its name.

    If the Hub has the split in several files instead, they are all announced; if it lacks meta.json, as older
    data sets do, nothing is. The list of files is asked for only then: not every mirror has one.
    """
    from huggingface_hub.errors import EntryNotFoundError

    try:
        url = hub.hf_hub_url(dataset, name, repo_type="dataset", revision=revision)
        return {name: hub.get_hf_file_metadata(url)}
    except EntryNotFoundError:
        if name == "meta.json":
            return {}
        found = hub.HfApi().dataset_info(dataset, revision=revision)
        listed = (file.rfilename for file in found.siblings)
        names = whole_set(listed, name.removesuffix(".safetensors"), dataset)
        if names in ([], [name]):
            raise
    return {each: data for part in names for each, data in _announced(dataset, part, found.sha).items()}


def fingerprint_files(folder: Path, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of the splits' files, and the commit ("revision") they were downloaded from.

    They are cached in the folder; a file is hashed again only if its size or modification time changed.
    Raises InputError if a hash differs from the one in the data set's meta.json.
    """
    meta = read_json_object(folder / "meta.json") if (folder / "meta.json").exists() else {}
    promised = meta.get("sha256") if isinstance(meta.get("sha256"), dict) else {}
    before = _known_fingerprints(folder)
    known = dict(before)
    names = [path.name for split in splits for path in split_files(folder, split)]
    for name in names:
        path, stat = folder / name, (folder / name).stat()
        seen = known.get(name, {})
        if (seen.get("size"), seen.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
            if stat.st_size > 1 << 30:
                tqdm.write(f"Checking {path} ({stat.st_size / 1e9:.1f} GB), once")
            known[name] = {**fingerprint(path), "mtime_ns": stat.st_mtime_ns}
        if promised.get(name) not in (None, known[name]["sha256"]):
            raise InputError(f"{path}: damaged (its SHA-256 is not meta.json's); fetch or prepare it again")
    if known != before:
        _keep_fingerprints(folder, known)
    return {name: known[name] for name in names}


def same_on_all_nodes(nodes: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The fingerprints of one node if those of all nodes agree. Raises InputError if they differ."""
    for name in sorted({name for node in nodes for name in node}):
        hashes = {node[name]["sha256"] if name in node else None for node in nodes}
        if len(hashes) != 1:
            what = "on all nodes" if None in hashes else "the same on all nodes"
            raise InputError(f"{name} is not {what}; delete the wrong files to download the data set again")
    return nodes[0]


def _keep_fingerprints(folder: Path, known: dict[str, dict[str, Any]]) -> None:
    # In a read-only folder the next run hashes the files again.
    with contextlib.suppress(OSError):
        replace_text(folder / FINGERPRINTS, json.dumps(known, indent=1))


def _known_fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_json_object(folder / FINGERPRINTS)
    except InputError:
        return {}


def download(dataset: str, pattern: str, revision: str | None) -> tuple[list[Path], str]:
    """The files of a Hub data set that match a pattern, and the commit they come from.

    They are kept in the Hub's own cache, shared by all processes; when all are there, the Hub is not asked.
    Raises InputError, naming the data set, on any failure.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import filter_repo_objects

    options = {"repo_type": "dataset", "revision": revision, "allow_patterns": pattern}
    try:
        try:
            folder = Path(hub.snapshot_download(dataset, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            commit = hub.HfApi().dataset_info(dataset, revision=revision or "main").sha
            names = hub.HfApi().list_repo_files(dataset, repo_type="dataset", revision=commit)
            blobs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=dataset, repo_type="dataset"), "blobs")

            def fetch(name: str) -> None:
                url = hub.hf_hub_url(dataset, name, repo_type="dataset", revision=commit)
                announced = hub.get_hf_file_metadata(url)
                if not (blobs / announced.etag).exists():
                    download_file(url, blobs / announced.etag, announced)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(fetch, filter_repo_objects(names, allow_patterns=pattern)))
            # Finds these files in the cache, and links them to their names.
            folder = Path(hub.snapshot_download(dataset, **options))
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise InputError(
            f"{dataset}: could not download '{pattern}' from the Hub ({reason(error)}); check the name, "
            "--files, --revision and the network, and run the same command again: finished files are kept"
        ) from None
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [folder / name for name in sorted(filter_repo_objects(names, allow_patterns=pattern))], folder.name


def download_files(dataset: str, names: list[str], commit: str) -> list[Path]:
    """The files of a Hub data set with these names, in the Hub's own cache. Raises InputError."""
    return [download(dataset, name, commit)[0][0] for name in names]


def download_file(url: str, path: Path, metadata: Any) -> dict[str, Any]:
    """Download one file, resuming an earlier attempt; return its size and SHA-256.

    An incomplete file has another name beside `path`; of several processes one downloads, the others wait.
    Raises InputError if the file differs from what its HfFileMetadata announced (a large file's `etag` is its
    SHA-256), and whatever the Hub's client raises.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    size, etag = metadata.size, metadata.etag or ""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".incomplete-{path.name}-{etag[:16]}")
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            partial.unlink(missing_ok=True)
            return fingerprint(path)
        http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size)
        file.flush()
        found = fingerprint(partial)
        for what, announced in (("size", size), ("sha256", etag if len(etag) == 64 else None)):
            if announced not in (None, found[what]):
                partial.unlink()
                raise InputError(
                    f"{path}: the Hub announced {what} {announced} but sent {found[what]}; the file was "
                    "removed, run the same command again to download it"
                )
        partial.replace(path)
    return found


def check_push(repo_id: str) -> None:
    """Raise InputError unless `repo_id` is OWNER/NAME and the Hub accepts this user's token."""
    require_repo_id(repo_id, "repository")
    if hub.get_token() is None:
        raise InputError("--push: there is no Hub token; set HF_TOKEN, or run: hf auth login")
    try:
        hub.HfApi().whoami()
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise InputError(
            f"--push {repo_id}: the Hub denies access ({reason(error)}); try `hf auth login`"
        ) from None


def push(folder: Path, repo_id: str, message: str, **options: Any) -> str:
    """Upload a folder to a repository, created if need be, and return the commit's URL.

    `options` are HfApi.create_repo's. Raises RunError; the same call then uploads only what is missing. A
    data set's token files replace all that are there: others, of an earlier one, would be read with them.
    """
    api, kind = hub.HfApi(), options.get("repo_type")
    files = {"folder_path": folder, "delete_patterns": PATTERNS if kind == "dataset" else None}
    try:
        api.create_repo(repo_id, exist_ok=True, **options)
        done = api.upload_folder(repo_id=repo_id, repo_type=kind, commit_message=message, **files)
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise RunError(
            f"{repo_id}: the upload failed ({reason(error)}); run the same command again to resume it"
        ) from None
    return done.commit_url


def reason(error: Exception) -> str:
    """An error's message as part of a line; the Hub's messages give a status first, then the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
