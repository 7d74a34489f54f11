"""A data set's files: downloaded from the Hub if missing, and identified by their SHA-256."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from basemodel.command_line import require_inside, require_repo_id
from basemodel.errors import InputError
from basemodel.files import fingerprint, replace_text
from basemodel.hub import download_file, reason
from basemodel.json_config import read_json_object

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
    names = [f"{split}.safetensors" for split in splits]
    missing = [name for name in names if not (folder / name).exists()]
    known = _known_fingerprints(folder)
    commits = [known[name].get("revision") for name in names if name in known and name not in missing]
    for commit in filter(None, commits):
        if revision is not None and len(revision) >= 40 and revision != commit:
            raise InputError(
                f"{folder}: is at commit {commit}, but dataset_revision asks for {revision}; move it away"
            )
    if missing:
        _download(folder, dataset, revision or next(filter(None, commits), None), missing)
    return folder


def _download(folder: Path, dataset: str, revision: str | None, names: list[str]) -> None:
    """Download files, and meta.json if there is one, from one commit, which is recorded."""
    # Imported here: most runs have their files and start faster without it.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    for name in [*names, "meta.json"]:
        try:
            theirs = get_hf_file_metadata(hf_hub_url(dataset, name, repo_type="dataset", revision=revision))
            revision = theirs.commit_hash or revision
            url = hf_hub_url(dataset, name, repo_type="dataset", revision=revision)
            found = download_file(url, folder / name, theirs)
            known = {**found, "mtime_ns": (folder / name).stat().st_mtime_ns, "revision": revision}
            _keep_fingerprints(folder, _known_fingerprints(folder) | {name: known})
        except InputError:
            raise
        except Exception as error:  # network, proxy and Hub errors have many types
            if name == "meta.json" and isinstance(error, EntryNotFoundError):
                continue  # older data sets have none
            raise InputError(
                f"{folder / name} is missing, and the Hub did not provide it ({reason(error)}); check the "
                f"data set's name '{dataset}' and the network, or prepare it with prepare_datasets.py"
            ) from None


def fingerprint_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The size and SHA-256 of a data set's files, and the commit ("revision") they were downloaded from.

    They are cached in the folder; a file is hashed again only if its size or modification time changed.
    Raises InputError if a hash differs from the one in the data set's meta.json.
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
    """The fingerprints of one node if those of all nodes agree. Raises InputError if they differ."""
    for name in nodes[0]:
        hashes = {node[name]["sha256"] for node in nodes}
        if len(hashes) != 1:
            raise InputError(
                f"{name} is not the same on all nodes; delete the wrong one to download it again"
            )
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
