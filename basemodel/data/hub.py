"""Data sets from the Hugging Face Hub, identified by the SHA-256 of their files, and uploads to it."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub as hub  # loads its parts, and the network's, when they are used
from tqdm import tqdm

from basemodel.common.errors import InputError, RunError
from basemodel.common.files import DISK_FULL, fingerprint, replace_text
from basemodel.common.json_config import read_json_object
from basemodel.common.names import TOKENIZER_FILE, require_inside, require_repo_id
from basemodel.data.downloads import RemoteFile, fetch, look_up, look_up_all
from basemodel.data.token_files import PATTERNS, missing_files, split_files, whole_set

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
    if _own_tokenizer(folder) and not (folder / TOKENIZER_FILE).exists():
        commit = _known_fingerprints(folder).get("meta.json", {}).get("revision")
        _download(folder, dataset, commit or revision, [TOKENIZER_FILE])
    return folder


def _own_tokenizer(folder: Path) -> list[str]:
    """The name of the data set's own tokenizer, if its meta.json says that it has one."""
    meta = read_json_object(folder / "meta.json") if (folder / "meta.json").exists() else {}
    return [TOKENIZER_FILE] if meta.get("tokenizer") == "dataset" else []


def _download(folder: Path, dataset: str, revision: str | None, names: list[str]) -> None:
    """Download files, and meta.json if there is one, from one commit, which is recorded."""
    try:
        files = _look_up_with_meta(dataset, revision, names)
        for path, found in fetch({folder / name: file for name, file in files.items()}, dataset):
            commit = files[path.name].commit
            known = {**found, "mtime_ns": path.stat().st_mtime_ns, "revision": commit}
            _keep_fingerprints(folder, _known_fingerprints(folder) | {path.name: known})
    except InputError:
        raise
    except Exception as error:  # network, proxy and Hub errors have many types
        missing = next((name for name in names if not (folder / name).exists()), names[0])
        fix = advice(error, dataset) or (
            f"check the data set's name '{dataset}' and the network, or prepare it with prepare_datasets.py"
        )
        raise InputError(
            f"{folder / missing} is missing, and the Hub did not provide it ({reason(error)}); {fix}"
        ) from None


def _look_up_with_meta(dataset: str, revision: str | None, names: list[str]) -> dict[str, RemoteFile]:
    """What the Hub has for these names, and of meta.json, at one commit."""
    from huggingface_hub.errors import EntryNotFoundError

    files: dict[str, RemoteFile] = {}
    for name in names:
        files |= _look_up_split(dataset, name, revision)
        revision = next(iter(files.values())).commit
    with contextlib.suppress(EntryNotFoundError):  # older data sets have none
        files["meta.json"] = look_up(dataset, "meta.json", revision)
    return files


def _look_up_split(dataset: str, name: str, revision: str | None) -> dict[str, RemoteFile]:
    """What the Hub has under a file's name, or the several files in which it has the split instead.

    The list of the Hub's files is asked for only then: not every mirror has one.
    """
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return {name: look_up(dataset, name, revision)}
    except EntryNotFoundError:
        found = hub.HfApi().dataset_info(dataset, revision=revision)
        listed = (file.rfilename for file in found.siblings or [])
        names = whole_set(listed, name.removesuffix(".safetensors"), dataset)
        if names in ([], [name]):
            raise
    return dict(zip(names, look_up_all(dataset, names, found.sha), strict=True))


def fingerprint_files(folder: Path, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of the splits' files and of the data set's own tokenizer, and the commit
    ("revision") they were downloaded from.

    They are cached in the folder; a file is hashed again only if its size or modification time changed.
    Raises InputError if a hash differs from the one in the data set's meta.json.
    """
    meta = read_json_object(folder / "meta.json") if (folder / "meta.json").exists() else {}
    promised = meta.get("sha256") if isinstance(meta.get("sha256"), dict) else {}
    before = _known_fingerprints(folder)
    known = dict(before)
    names = [path.name for split in splits for path in split_files(folder, split)]
    names += _own_tokenizer(folder)
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
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    options = {"repo_type": "dataset", "revision": revision, "allow_patterns": pattern}
    with _failures_named(dataset, f"'{pattern}'"):
        try:
            folder = Path(hub.snapshot_download(dataset, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            commit = hub.HfApi().dataset_info(dataset, revision=revision or "main").sha
            names = hub.HfApi().list_repo_files(dataset, repo_type="dataset", revision=commit)
            _bring_into_cache(dataset, list(filter_repo_objects(names, allow_patterns=pattern)), commit)
            # Finds all files in the cache, and notes there that they are all.
            folder = Path(hub.snapshot_download(dataset, **options))
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [folder / name for name in sorted(filter_repo_objects(names, allow_patterns=pattern))], folder.name


def download_files(dataset: str, names: list[str], commit: str) -> list[Path]:
    """The paths of a Hub data set's files at a commit, in the Hub's own cache, shared by all processes.

    The Hub is asked only for those that are missing. Raises InputError, naming the data set, on any failure.
    """
    with _failures_named(dataset, names[0] if len(names) == 1 else f"{len(names)} files"):
        return _bring_into_cache(dataset, names, commit)


def _bring_into_cache(dataset: str, names: list[str], commit: str) -> list[Path]:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    at = {"repo_type": "dataset", "revision": commit}
    paths = {name: hub.try_to_load_from_cache(dataset, name, **at) for name in names}
    missing = [name for name, path in paths.items() if not isinstance(path, str)]
    if missing:
        blobs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=dataset, repo_type="dataset"), "blobs")
        files = {blobs / file.etag: file for file in look_up_all(dataset, missing, commit)}
        for _ in fetch({path: file for path, file in files.items() if not path.exists()}, dataset):
            pass
        with ThreadPoolExecutor(8) as pool:  # finds them in the cache, and links their names to them
            linked = pool.map(lambda name: hub.hf_hub_download(dataset, name, **at), missing)
            paths |= zip(missing, linked, strict=True)
    return [Path(paths[name]) for name in names]


@contextlib.contextmanager
def _failures_named(dataset: str, what: str) -> Iterator[None]:
    """Turn whatever a network, a proxy, a disk or the Hub can raise into one line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{dataset}: could not download {what} from the Hub ({error})") from None
    except Exception as error:
        fix = advice(error, dataset) or "check the name, --files, --revision and the network"
        raise InputError(
            f"{dataset}: could not download {what} from the Hub ({reason(error)}); {fix}, and run the same "
            "command again: finished files are kept"
        ) from None


def advice(error: Exception, dataset: str) -> str:
    """What to do about an error of the Hub or the disk; empty where its message must do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/datasets/{dataset}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"log in with `hf auth login` and accept the terms at {page}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"give a commit, branch or tag of {page} as --revision or dataset_revision"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return f"{page} has no such file; check the name and the revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"check the name '{dataset}', or, if the data set is private, log in with `hf auth login`"
    if status == 401:
        return "the Hub does not know your token: check HF_TOKEN, or log in with `hf auth login`"
    if status == 403:
        return f"your token must not read {page}: give it that right, or log in with `hf auth login`"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "free some space"
    return ""


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
