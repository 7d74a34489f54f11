"""Data sets that come from the Hub: cut off, killed, of another size or hash, of one commit."""

import filecmp
import io
import json
import re
import resource
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Hub
from helpers import Sandbox, Script, random_tokens, run_script, wait_for, write_dataset
from huggingface_hub import constants

from basemodel.common.errors import InputError
from basemodel.data import downloads
from basemodel.data.hub import download_files, fetch_dataset

IMPATIENT = "import basemodel.data.downloads as d; d.WAITS = (0.01,) * 6"
SIZE = 24_000_088  # of the file of 12 million tokens, which comes in three parts


def far_run(sandbox: Sandbox, serve_hub: Callable, tmp_path: Path, **train: object) -> Hub:
    """A run whose data set is on a Hub alone."""
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(12_000_000))
    hub = serve_hub(tmp_path / "hub")
    sandbox.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    sandbox.write_run(train={"dataset": "far/away", **train})
    return hub


def come(folder: Path) -> int:
    """How many bytes of a sparse file, which is incomplete, are on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob(".incomplete-*"))


def test_a_file_comes_over_several_connections(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.hold = 1_000_000
    process = sandbox.start()
    wait_for(lambda: len(hub.ranges) == 3 or process.has_ended, "three answers, none of which ends")
    hub.hold = None
    assert process.wait().returncode == 0, process.stderr
    assert sorted(each.start for each in hub.ranges[:3]) == [0, 8 << 20, 16 << 20]
    assert hub.sent == SIZE, "what had come before the cuts was not asked for again"
    assert {path for method, path in hub.requests if method == "GET" and "/resolve/" in path} == {
        f"/datasets/far/away/resolve/{'0' * 40}/train.safetensors"
    }, "no file but the one that the run reads, at the commit that the first answer named"


def test_a_download_that_was_killed_goes_on_where_it_stopped(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.hold = 5_000_000  # of each part
    process = sandbox.start()
    folder = sandbox.datasets / "far/away"
    wait_for(lambda: come(folder) >= 15_000_000 or process.has_ended, "most of each part")
    process.kill()
    hub.hold = None
    sandbox.train()
    assert hub.sent <= SIZE + 3 * (64 << 10), "the last chunk of each part at most came twice"


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        ("ETag", '"' + "a" * 64 + '"', "the Hub announced sha256 aaaa"),
        ("Content-Length", str(SIZE + 1), f"announced size {SIZE + 1}, but {SIZE} bytes"),
    ],
)
def test_a_file_of_another_size_or_hash_is_refused(
    sandbox: Sandbox, serve_hub, tmp_path, header: str, value: str, message: str
) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.headers[header] = value
    done = run_script(*sandbox.command("tiny"), env={**sandbox.env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (sandbox.datasets / "far/away/train.safetensors").exists()
    hub.headers.clear()
    sandbox.train()


def test_the_commit_of_downloaded_data_is_recorded_and_kept(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path, dataset_revision="v1")
    sandbox.train()
    assert ("HEAD", "/datasets/far/away/resolve/v1/train.safetensors") in hub.requests
    meta = json.loads((sandbox.checkpoints()[-1] / "meta.json").read_text())
    assert meta["data"]["train.safetensors"]["revision"] == "0" * 40
    # What is fetched later is of the same commit, even if the branch has moved on.
    validate = {"validation_interval": 8, "validation_batches": 1}
    sandbox.write_run(train={"dataset": "far/away", **validate})
    sandbox.train()
    assert ("GET", f"/datasets/far/away/resolve/{'0' * 40}/validation.safetensors") in hub.requests
    sandbox.write_run(train={"dataset": "far/away", "dataset_revision": "1" * 40})
    done = run_script(*sandbox.command("tiny"))
    assert done.returncode == 2
    assert f"is at commit {'0' * 40}, but dataset_revision asks for {'1' * 40}" in done.stderr


def put_on_xet(file: Path, store: str) -> str:
    """Upload a file; return its hash on Xet. While the session lives, no other process may open the store."""
    hf_xet = pytest.importorskip("hf_xet")
    with hf_xet.XetSession().new_upload_commit(endpoint=store) as commit:
        upload = commit.start_upload_file(str(file))
    return upload.result().xet_info.hash


@pytest.mark.parametrize("xet", ["there", "lost", "disabled"])
def test_hf_xet_is_used_where_the_hub_offers_it(sandbox: Sandbox, serve_hub, tmp_path, xet: str) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    content = tmp_path / "hub/far/away/train.safetensors"
    store = (
        f"local://{tmp_path}/store"  # a folder in place of Xet's server, which hf_xet has for its own tests
    )
    token = {"X-Xet-Access-Token": "token", "X-Xet-Token-Expiration": "9999999999"}
    hub.answers["GET /token"] = 200, {**token, "X-Xet-Cas-Url": store + "s" * (xet == "lost")}
    hub.headers |= {"X-Xet-Hash": put_on_xet(content, store), "X-Xet-Refresh-Route": f"{hub.url}/token"}
    disable = {"HF_HUB_DISABLE_XET": "1"} if xet == "disabled" else {}
    done = run_script(*sandbox.command("tiny"), env=sandbox.env | disable)
    assert done.returncode == 0, done.stderr
    assert (sandbox.datasets / "far/away/train.safetensors").read_bytes() == content.read_bytes()
    assert (hub.sent == 0) == (xet == "there"), done.stderr
    assert ("hf_xet failed" in done.stderr) == (xet == "lost")


def test_cuts_and_kills_cost_little(serve_hub, tmp_path) -> None:
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(12_000_000))
    hub = serve_hub(tmp_path / "hub")
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    fetch = f"hub.fetch_dataset(Path({str(tmp_path)!r}, 'sets'), 'far/away', None, ['train'])"
    before = f"from pathlib import Path; from basemodel.data import hub; {fetch}; raise SystemExit"
    folder = tmp_path / "sets/far/away"
    for step in range(1, 6):
        hub.cuts, hub.hold = [800_000] * 3, 600_000  # each part breaks off, goes on, and stops
        process = Script(["prepare_datasets.py"], env, f"{IMPATIENT}; {before}")
        wait_for(lambda: come(folder) >= step * 4_200_000 or process.has_ended, "a fifth of the file")  # noqa: B023
        process.kill()
    hub.hold = None
    done = Script(["prepare_datasets.py"], env, before).wait()
    assert done.returncode == 0, done.stderr
    assert same_files(folder / "train.safetensors", tmp_path / "hub/far/away/train.safetensors")
    assert hub.sent <= 1.05 * SIZE, "each kill costs a chunk of 64 KiB per connection at most"


# ------------------------------------------------------------------------------------------------------------
# In this process
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(serve_hub, tmp_path, monkeypatch) -> Hub:
    """A Hub that this process asks, and that knows its token."""
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(12_000_000))
    hub = serve_hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template[template.index("/{") :])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(downloads, "WAITS", (0.01,) * 6)
    return hub


def fetch(tmp_path: Path) -> None:
    """Fetch the training tokens, which must be those of the Hub."""
    folder = fetch_dataset(tmp_path / "sets", "far/away", None, ["train"])
    assert same_files(folder / "train.safetensors", tmp_path / "hub/far/away/train.safetensors")
    assert {path.name for path in folder.iterdir()} == {"train.safetensors", ".fingerprints.json"}


def same_files(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def test_links_to_another_server_that_expire_are_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    hub.links = set()
    hub.cuts += [1_000_000] * 3
    fetch(tmp_path)
    assert len(hub.ranges) == 6 and SIZE <= hub.sent < 1.2 * SIZE, "a cut may lose what is on its way"


def test_a_server_without_ranges_sends_one_stream(hub: Hub, tmp_path: Path) -> None:
    hub.has_ranges = False
    fetch(tmp_path)


def test_no_size_is_too_large(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        constants, "MAX_HTTP_DOWNLOAD_SIZE", 1_000_000
    )  # 50 GB, the client's limit without Xet
    fetch(tmp_path)


def test_what_has_come_of_another_content_is_not_used(hub: Hub, tmp_path: Path) -> None:
    hub.cuts += [1_000_000] * 3 + [0] * 30
    with pytest.raises(InputError, match="is missing, and the Hub did not provide it"):
        fetch(tmp_path)
    assert come(tmp_path / "sets/far/away") >= 3_000_000
    hub.cuts.clear()
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(12_000_000, seed=5))
    folder = fetch_dataset(tmp_path / "sets", "far/away", None, ["train"])
    assert same_files(folder / "train.safetensors", tmp_path / "hub/far/away/train.safetensors")


def test_files_of_a_set_come_side_by_side_into_the_hubs_cache_and_once(hub: Hub, tmp_path: Path) -> None:
    there = tmp_path / "hub/far/away"
    (there / "deep").mkdir()
    shutil.copy(there / "validation.safetensors", there / "deep/copy.bin")
    names = ["train.safetensors", "validation.safetensors", "deep/copy.bin"]
    hub.hold = 1_000
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(download_files, "far/away", names, "0" * 40)
        wait_for(lambda: len(hub.ranges) == 4 or running.done(), "three parts and a small file at once")
        hub.hold = None
        paths = running.result()
    assert all(same_files(path, there / name) for path, name in zip(paths, names, strict=True))
    assert hub.sent == SIZE + (there / "validation.safetensors").stat().st_size, "equal files come once"
    hub.requests.clear()
    assert download_files("far/away", names, "0" * 40) == paths
    assert hub.requests == []
    with pytest.raises(InputError, match=r"far/away: could not download nothing\.bin .* has no such file"):
        download_files("far/away", ["nothing.bin"], "0" * 40)


@pytest.mark.parametrize(
    ("method", "status", "headers", "message"),
    [
        ("HEAD", 401, {"X-Error-Code": "GatedRepo"}, "`hf auth login` and accept the terms at PAGE"),
        ("HEAD", 403, {"X-Error-Code": "GatedRepo"}, "`hf auth login` and accept the terms at PAGE"),
        ("HEAD", 404, {"X-Error-Code": "RepoNotFound"}, "check the name 'far/away', or, if"),
        ("HEAD", 404, {"X-Error-Code": "RevisionNotFound"}, "as --revision or dataset_revision"),
        ("HEAD", 401, {}, "check HF_TOKEN"),
        ("HEAD", 403, {}, "your token must not read PAGE"),
        ("HEAD", 200, {}, "was not answered by the Hub, perhaps by a proxy"),
        ("GET", 200, {"Content-Type": "text/html; charset=utf-8"}, "but 0 bytes of text/html came"),
        ("GET", 403, {}, "your token must not read PAGE"),
        ("GET", 503, {"Retry-After": "0"}, "503 Service Unavailable"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    hub: Hub, tmp_path: Path, method: str, status: int, headers: dict, message: str
) -> None:
    for revision in ("main", "0" * 40):
        request = f"{method} /datasets/far/away/resolve/{revision}/train.safetensors"
        hub.answers[request] = status, headers
    with pytest.raises(InputError, match=re.escape(message.replace("PAGE", f"{hub.url}/datasets/far/away"))):
        fetch(tmp_path)
    hub.answers.clear()
    fetch(tmp_path)


def test_a_disk_without_room(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
        with pytest.raises(InputError, match=r"takes 0\.02 GB more, but 0\.00 GB are free; free some space"):
            fetch(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"File too large.*; free some space"):
            fetch(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fetch(tmp_path)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_with_speed_and_time_to_go(
    hub: Hub, tmp_path: Path, monkeypatch, terminal: bool
) -> None:
    monkeypatch.setattr(downloads._Progress, "SECONDS", 0)
    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    shown.isatty = lambda: terminal
    fetch(tmp_path)
    line = r"Fetching far/away: 0\.\d\d of 0\.02 GB, \d+\.\d{3} GB/s, ETA \d\d:\d\d\n"
    bar = r"Fetching far/away: 100%.*24\.0M/24\.0M \[\d\d:\d\d<\d\d:\d\d, [\d.]+[MG]B/s\]"
    assert re.search(bar if terminal else line, shown.getvalue())
