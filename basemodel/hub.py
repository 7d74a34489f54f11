"""The Hugging Face Hub: files of data sets that are fetched from it, folders that are uploaded to it.

A download goes on where an earlier one was cut off, by a kill too: the Hub's own client begins anew then.
"""

import fcntl
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from basemodel.command_line import require_dataset_id
from basemodel.errors import InputError, RunError
from basemodel.files import fingerprint


def download_file(url: str, path: Path, *, size: int | None, etag: str | None) -> dict[str, Any]:
    """Fetch one file, from where an earlier try was cut off; return its size and SHA-256.

    Until it is whole it has another name beside `path`; of several processes one fetches it, the others wait.
    Raises InputError if it is not what was announced (a large file's `etag` is its SHA-256), and whatever the
    Hub's client raises.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    etag = etag or ""
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
                    f"{path}: the Hub announced {what} {announced} and sent {found[what]}; what came was "
                    "removed, start again to fetch it anew"
                )
        partial.replace(path)
    return found


def download(dataset: str, pattern: str, revision: str | None) -> tuple[list[Path], str]:
    """The files of a Hub data set that match a pattern, and the commit that they are of.

    They are kept in the Hub's own cache, once for all processes; where all are there, the Hub is not asked.
    Raises InputError, naming the data set, where that fails.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    options = {"repo_type": "dataset", "revision": revision, "allow_patterns": pattern}
    try:
        try:
            folder = Path(snapshot_download(dataset, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            commit = HfApi().dataset_info(dataset, revision=revision or "main").sha
            names = HfApi().list_repo_files(dataset, repo_type="dataset", revision=commit)
            fetch = functools.partial(_download_to_cache, dataset, commit)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(fetch, filter_repo_objects(names, allow_patterns=pattern)))
            # Finds these files in the cache, and links them to their names.
            folder = Path(snapshot_download(dataset, **options))
    except Exception as error:  # whatever a network, a proxy or the Hub can think of
        raise InputError(
            f"{dataset}: the Hub did not give '{pattern}' ({reason(error)}); check name, --files, "
            "--revision and network, and run the same command again: what has come is kept"
        ) from None
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [folder / name for name in sorted(filter_repo_objects(names, allow_patterns=pattern))], folder.name


def _download_to_cache(dataset: str, commit: str, name: str) -> None:
    """Fetch a file to where the Hub's client keeps its content, blobs/ETAG, if it is not there."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    url = hf_hub_url(dataset, name, repo_type="dataset", revision=commit)
    theirs = get_hf_file_metadata(url)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=dataset, repo_type="dataset")
    blob = folder / "blobs" / theirs.etag
    if not blob.exists():
        download_file(url, blob, size=theirs.size, etag=theirs.etag)


def check_push(repo_id: str) -> None:
    """Raise InputError unless the Hub knows who is about to upload to `repo_id`."""
    from huggingface_hub import HfApi

    require_dataset_id(repo_id)
    try:
        HfApi().whoami()
    except Exception as error:  # whatever a network, a proxy or the Hub can think of
        raise InputError(
            f"--push {repo_id}: the Hub does not let you in ({reason(error)}); try `hf auth login`"
        ) from None


def push(folder: Path, repo_id: str) -> None:
    """Upload a data set to the Hub. Raises RunError; the same command then uploads what is missing."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        result = api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Upload tokens"
        )
    except Exception as error:  # whatever a network, a proxy or the Hub can think of
        raise RunError(
            f"{folder} is whole, but could not be uploaded to {repo_id} ({reason(error)}); the same "
            "command with --push goes on"
        ) from None
    print(f"Uploaded to {repo_id}: {result.commit_url}")


def reason(error: Exception) -> str:
    """What an error says, in part of a line; the Hub's say a status first, and then what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
