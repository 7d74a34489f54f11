"""Data sets that come from the Hub: cut off, killed, of another size or hash, of one commit."""

import filecmp
import hashlib
import json
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Hub
from folder_hub import use_hub
from helpers import Script, random_tokens, wait_for, write_dataset
from huggingface_hub import constants

from basemodel.common import output
from basemodel.common.errors import InputError
from basemodel.data import hub as hub_module
from basemodel.data.hub import fetch_dataset

TOKENS = 1_000_000
SIZE = 2 * TOKENS + 80
CHUNK = 64 << 10  # in place of 10 MB, which http_get writes at once
FIRST = "0" * 40  # the commit of every data set, unless a test says otherwise


@pytest.fixture
def hub(serve_hub: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub that this process asks for far/away, and whose connections break without a pause."""
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(TOKENS))
    hub = serve_hub(tmp_path / "hub")
    use_hub(monkeypatch, hub.url, tmp_path / "cache")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(hub_module, "PAUSES", ())
    return hub


def fetch(tmp_path: Path, *splits: str, revision: str | None = None) -> Path:
    """Fetch the training tokens, or these splits, which must be those of the Hub."""
    splits = splits or ("train",)
    folder = fetch_dataset(tmp_path / "sets", "far/away", revision, splits)
    for split in splits:
        name = f"{split}.safetensors"
        assert filecmp.cmp(folder / name, tmp_path / "hub/far/away" / name, shallow=False)
    return folder


def incomplete_sizes(tmp_path: Path) -> list[int]:
    return [path.stat().st_size for path in (tmp_path / "sets/far/away").glob(".incomplete-*")]


def start(hub: Hub, tmp_path: Path) -> Script:
    """Fetch the training tokens in another process."""
    code = (
        f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}; "
        "from pathlib import Path; from basemodel.data import hub; "
        f"hub.fetch_dataset(Path({str(tmp_path)!r}, 'sets'), 'far/away', None, ['train']); raise SystemExit"
    )
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    return Script(["prepare_datasets.py"], env, code)


def test_what_is_needed_comes_once_with_progress(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(output, "LINE_SECONDS", 0.0)
    folder = fetch(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "train.safetensors",
        ".fingerprints.json",
    }, "no split that nobody asked for, and nothing incomplete"
    assert re.search(r"Fetching away/train\.safetensors: 2\.00M/2\.00M \[.*B/s\]", capsys.readouterr().err)
    hub.requests.clear()
    fetch(tmp_path)
    assert hub.requests == [], "offline, a data set that is there can be used"


def test_a_download_that_was_killed_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.hold = 1_500_000
    process = start(hub, tmp_path)
    wait_for(lambda: sum(incomplete_sizes(tmp_path)) > 1_400_000 or process.has_ended, "most of the file")
    process.kill()
    hub.hold = None
    fetch(tmp_path)
    assert hub.sent <= SIZE + CHUNK and incomplete_sizes(tmp_path) == []


def test_two_processes_download_once(hub: Hub, tmp_path: Path) -> None:
    hub.hold = 1_000_000
    processes = [start(hub, tmp_path) for _ in range(2)]
    wait_for(lambda: hub.downloads("train.safetensors") or all(p.has_ended for p in processes), "it")
    time.sleep(2)  # the other asks for the lock
    hub.hold = None
    outputs = [process.wait() for process in processes]
    assert [done.returncode for done in outputs] == [0, 0], outputs
    fetch(tmp_path)
    assert hub.sent < 1.1 * SIZE


def test_a_link_that_has_expired_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    hub.links = set()
    hub.cuts += [1_000_000] * 2
    fetch(tmp_path)
    assert len(hub.ranges) == 2 and SIZE <= hub.sent < 1.2 * SIZE, "a cut loses a chunk at most"


def test_a_server_without_ranges_sends_all_again(hub: Hub, tmp_path: Path) -> None:
    hub.has_ranges = False
    hub.cuts += [1_000_000]
    fetch(tmp_path)


def test_a_network_that_is_lost_costs_nothing_that_has_arrived(hub: Hub, tmp_path: Path) -> None:
    hub.cuts += [1_500_000] + [0] * 20
    with pytest.raises(InputError, match="run the same command again: what has arrived is kept"):
        fetch(tmp_path)
    assert sum(incomplete_sizes(tmp_path)) > 1_400_000
    hub.cuts.clear()
    fetch(tmp_path)
    assert hub.sent <= SIZE + CHUNK


def test_a_network_that_comes_back_is_waited_for(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    """Longer than the Hub's client tries for by itself."""
    monkeypatch.setattr(hub_module, "PAUSES", (0.0, 0.0))
    hub.cuts += [1_500_000] + [0] * 7
    fetch(tmp_path)
    assert hub.cuts == [] and hub.sent <= SIZE + CHUNK


def test_what_has_arrived_of_another_content_is_not_used(hub: Hub, tmp_path: Path) -> None:
    hub.cuts += [1_500_000] + [0] * 20
    with pytest.raises(InputError):
        fetch(tmp_path)
    hub.cuts.clear()
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(TOKENS, seed=5))
    fetch(tmp_path)
    assert incomplete_sizes(tmp_path) == []


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        ("ETag", '"' + "a" * 64 + '"', "the Hub announced sha256 aaaa"),
        ("Content-Length", str(SIZE - 1), f"announced size {SIZE - 1} but sent {SIZE}"),
    ],
)
def test_a_file_of_another_size_or_hash_is_refused(
    hub: Hub, tmp_path: Path, header: str, value: str, message: str
) -> None:
    hub.headers[header] = value
    with pytest.raises(InputError, match=message):
        fetch(tmp_path)
    assert not list((tmp_path / "sets").rglob("*train*"))
    hub.headers.clear()
    fetch(tmp_path)


def test_all_files_come_from_one_commit(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub/far/away/meta.json").write_text("{}")
    hub.cuts += [2, *[0] * 20]  # meta.json comes, then nothing
    with pytest.raises(InputError):
        fetch(tmp_path)
    hub.cuts.clear()
    asked_of_branch = "/api/datasets/far/away"
    moved = json.dumps({"id": "far/away", "sha": "1" * 40, "siblings": []}).encode()
    hub.answers[f"GET {asked_of_branch}"] = hub.answers[f"GET {asked_of_branch}/revision/main"] = (
        200,
        {},
        moved,
    )
    hub.requests.clear()
    folder = fetch(tmp_path, "train", "validation")
    files = {path for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    page = f"/datasets/far/away/resolve/{FIRST}"
    assert files == {f"{page}/train.safetensors", f"{page}/validation.safetensors"}
    known = json.loads((folder / ".fingerprints.json").read_text())
    assert {entry["revision"] for entry in known.values()} == {FIRST}
    with pytest.raises(InputError, match=f"is at {FIRST}, but dataset_revision asks for {'1' * 40}"):
        fetch(tmp_path, revision="1" * 40)


def test_a_revision_can_be_given(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, revision="v1")
    assert ("GET", "/api/datasets/far/away/revision/v1") in hub.requests


@pytest.mark.parametrize(
    ("request_line", "answer", "message"),
    [
        ("GET /api", (401, {"X-Error-Code": "GatedRepo"}), "Cannot access gated repo"),
        ("GET /api", (404, {"X-Error-Code": "RevisionNotFound"}), "Revision Not Found"),
        ("GET /api", (401, {}), "check the name, the network and your access (`hf auth login`)"),
        ("GET ", (403, {}), "403 Forbidden"),
        ("GET ", (200, {}, b"<html>"), f"announced size {SIZE} but sent 6"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    hub: Hub, tmp_path: Path, request_line: str, answer: tuple, message: str
) -> None:
    path = "/datasets/far/away" + ("" if "api" in request_line else f"/resolve/{FIRST}/train.safetensors")
    hub.answers[request_line + path] = answer
    with pytest.raises(InputError, match=re.escape(message)):
        fetch(tmp_path)
    hub.answers.clear()
    fetch(tmp_path)


def test_a_disk_without_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
        with pytest.raises(InputError, match=r"takes 0\.00 GB more, but 0\.00 GB are free"):
            fetch(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(InputError, match="File too large"):
            fetch(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fetch(tmp_path)


def put_on_xet(file: Path, store: str) -> str:
    """Upload a file; return its hash on Xet. While the session lives, no other process may open the store."""
    hf_xet = pytest.importorskip("hf_xet")
    with hf_xet.XetSession().new_upload_commit(endpoint=store) as commit:
        upload = commit.start_upload_file(str(file))
    return upload.result().xet_info.hash


@pytest.mark.parametrize("xet", ["there", "begun", "lost", "disabled"])
def test_hf_xet_is_used_where_the_hub_offers_it(
    hub: Hub, tmp_path: Path, xet: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # A folder in place of Xet's server, which hf_xet has for its own tests.
    store = f"local://{tmp_path}/store"
    token = {"X-Xet-Access-Token": "token", "X-Xet-Token-Expiration": "9999999999"}
    hub.answers["GET /token"] = 200, {**token, "X-Xet-Cas-Url": store + "s" * (xet == "lost")}
    address = put_on_xet(tmp_path / "hub/far/away/train.safetensors", store)
    hub.headers |= {"X-Xet-Hash": address, "X-Xet-Refresh-Route": f"{hub.url}/token"}
    if xet == "begun":  # as a kill leaves it
        content = (tmp_path / "hub/far/away/train.safetensors").read_bytes()
        name = f".incomplete-train.safetensors-{hashlib.sha256(content).hexdigest()[:16]}"
        (tmp_path / "sets/far/away").mkdir(parents=True)
        (tmp_path / "sets/far/away" / name).write_bytes(content[:500_000])
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", xet == "disabled")
    fetch(tmp_path)
    assert hub.sent == {"there": 0, "begun": SIZE - 500_000}.get(xet, SIZE)
    assert ("hf_xet failed" in capsys.readouterr().err) == (xet == "lost")
