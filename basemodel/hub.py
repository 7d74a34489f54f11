"""The Hugging Face Hub: downloading a data set's files and uploading folders.

An interrupted download resumes, even after a kill: the Hub's own client would start over.
"""

import fcntl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from basemodel.command_line import require_repo_id
from basemodel.errors import InputError, RunError
from basemodel.files import fingerprint


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


def download(dataset: str, pattern: str, revision: str | None) -> tuple[list[Path], str]:
    """The files of a Hub data set that match a pattern, and the commit they come from.

    They are kept in the Hub's own cache, shared by all processes; when all are there, the Hub is not asked.
    Raises InputError, naming the data set, on any failure.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import filter_repo_objects

    options = {"repo_type": "dataset", "revision": revision, "allow_patterns": pattern}
    try:
        try:
            folder = Path(snapshot_download(dataset, local_files_only=True, **options))
        except LocalEntryNotFoundError:
            commit = HfApi().dataset_info(dataset, revision=revision or "main").sha
            names = HfApi().list_repo_files(dataset, repo_type="dataset", revision=commit)
            blobs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=dataset, repo_type="dataset"), "blobs")

            def fetch(name: str) -> None:
                url = hf_hub_url(dataset, name, repo_type="dataset", revision=commit)
                announced = get_hf_file_metadata(url)
                if not (blobs / announced.etag).exists():
                    download_file(url, blobs / announced.etag, announced)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(fetch, filter_repo_objects(names, allow_patterns=pattern)))
            # Finds these files in the cache, and links them to their names.
            folder = Path(snapshot_download(dataset, **options))
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise InputError(
            f"{dataset}: could not download '{pattern}' from the Hub ({reason(error)}); check the name, "
            "--files, --revision and the network, and run the same command again: finished files are kept"
        ) from None
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [folder / name for name in sorted(filter_repo_objects(names, allow_patterns=pattern))], folder.name


def check_push(repo_id: str) -> None:
    """Raise InputError unless `repo_id` is OWNER/NAME and the Hub accepts this user's token."""
    from huggingface_hub import HfApi, get_token

    require_repo_id(repo_id, "repository")
    if get_token() is None:
        raise InputError("--push: there is no Hub token; set HF_TOKEN, or run: hf auth login")
    try:
        HfApi().whoami()
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise InputError(
            f"--push {repo_id}: the Hub denies access ({reason(error)}); try `hf auth login`"
        ) from None


def push(folder: Path, repo_id: str, message: str, **options: Any) -> str:
    """Upload a folder to a repository, created if need be, and return the commit's URL.

    `options` are HfApi.create_repo's. Raises RunError; the same call then uploads only what is missing.
    """
    from huggingface_hub import HfApi

    api, kind = HfApi(), options.get("repo_type")
    try:
        api.create_repo(repo_id, exist_ok=True, **options)
        done = api.upload_folder(repo_id=repo_id, repo_type=kind, folder_path=folder, commit_message=message)
    except Exception as error:  # anything a network, a proxy or the Hub can raise
        raise RunError(
            f"{repo_id}: the upload failed ({reason(error)}); run the same command again to resume it"
        ) from None
    return done.commit_url


def reason(error: Exception) -> str:
    """An error's message as part of a line; the Hub's messages give a status first, then the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
