"""A data set's files: fetched from the Hub where they are missing, and known by their SHA-256."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from basemodel.command_line import require_dataset_id, require_inside
from basemodel.errors import InputError
from basemodel.files import fingerprint, replace_text
from basemodel.hub import download_file, reason
from basemodel.json_config import read_json_object

FINGERPRINTS = ".fingerprints.json"  # in a data set's folder: what its files were found to be


def dataset_folder(datasets_dir: Path, dataset: str) -> Path:
    """Where the data set OWNER/NAME is kept. Raises InputError for any other form of name, or a link away."""
    require_dataset_id(dataset)
    folder = datasets_dir.joinpath(*dataset.split("/"))
    require_inside(datasets_dir, folder)
    return folder


def fetch_dataset(datasets_dir: Path, dataset: str, revision: str | None, splits: Iterable[str]) -> Path:
    """Make sure that the token files of `splits` are in the data set's folder, and return it.

    The Hub is asked only for what is missing, by name and at one commit; a download that was cut off goes on
    where it stopped. Raises InputError, naming the data set, where that fails.
    """
    folder = dataset_folder(datasets_dir, dataset)
    if datasets_dir.is_file():
        raise InputError(f"{datasets_dir}: is a file; DATASETS_DIR is the folder of the data sets")
    names = [f"{split}.safetensors" for split in splits]
    missing = [name for name in names if not (folder / name).exists()]
    known = _known_fingerprints(folder)
    commits = [known[name].get("revision") for name in names if name in known and name not in missing]
    for commit in filter(None, commits):
        if revision is not None and len(revision) >= 40 and revision != commit:
            raise InputError(
                f"{folder}: is of commit {commit}, dataset_revision asks for {revision}; move it away"
            )
    if missing:
        _download(folder, dataset, revision or next(filter(None, commits), None), missing)
    return folder


def _download(folder: Path, dataset: str, revision: str | None, names: list[str]) -> None:
    """Fetch files, and meta.json if there is one, all as they were at one commit, which is recorded."""
    # Here, because most runs find their files, and start sooner without.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for name in [*names, "meta.json"]:
        try:
            theirs = get_hf_file_metadata(hf_hub_url(dataset, name, repo_type="dataset", revision=revision))
            revision = theirs.commit_hash or revision
            url = hf_hub_url(dataset, name, repo_type="dataset", revision=revision)
            found = download_file(url, folder / name, size=theirs.size, etag=theirs.etag)
            known = {**found, "mtime_ns": (folder / name).stat().st_mtime_ns, "revision": revision}
            _keep_fingerprints(folder, _known_fingerprints(folder) | {name: known})
        except InputError:
            raise
        except Exception as error:  # whatever a network, a proxy or the Hub can think of
            if name == "meta.json" and isinstance(error, EntryNotFoundError):
                continue  # older data sets have none
            raise InputError(
                f"{folder / name} is not there, and the Hub did not give it ({reason(error)}); check the "
                f"data set's name '{dataset}' and the network, or prepare it with prepare_datasets.py"
            ) from None


def fingerprint_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of files of a data set, and the commit ("revision") that they were fetched at.

    They are kept in the folder, and a file is read again only when its size or time of change is another.
    Raises InputError if one is not what the data set's meta.json says.
    """
    meta = read_json_object(folder / "meta.json") if (folder / "meta.json").exists() else {}
    promised = meta.get("sha256") if isinstance(meta.get("sha256"), dict) else {}
    before = _known_fingerprints(folder)
    known = dict(before)
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
    """What `fingerprint_files` found on each node, if it is the same. Raises InputError where it is not."""
    for name in nodes[0]:
        hashes = {node[name]["sha256"] for node in nodes}
        if len(hashes) != 1:
            raise InputError(f"{name} is not the same on all nodes; remove the wrong one to fetch it anew")
    return nodes[0]


def _keep_fingerprints(folder: Path, known: dict[str, dict[str, Any]]) -> None:
    # A folder that cannot be written to is read again by the next run.
    with contextlib.suppress(OSError):
        replace_text(folder / FINGERPRINTS, json.dumps(known, indent=1))


def _known_fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_json_object(folder / FINGERPRINTS)
    except InputError:
        return {}
