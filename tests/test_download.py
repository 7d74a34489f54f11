"""Data sets that come from the Hub: cut off, killed, of another size or hash, of one commit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Hub
from helpers import Sandbox, random_tokens, run_script, wait_for, write_dataset

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
