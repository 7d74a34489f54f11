"""Data sets that come from the Hub: cut off, killed, of another size or hash, of one commit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Hub
from helpers import Sandbox, random_tokens, run_script, wait_for, write_dataset


def far_run(sandbox: Sandbox, serve_hub: Callable, tmp_path: Path, **train: object) -> Hub:
    """A run whose data set is on a Hub alone: 24 MB, for the Hub's client writes by pieces of 10 MB."""
    write_dataset(tmp_path / "hub/far/away", train=random_tokens(12_000_000))
    hub = serve_hub(tmp_path / "hub")
    sandbox.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    sandbox.write_run(train={"dataset": "far/away", **train})
    return hub


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.cuts += [15_000_000]
    sandbox.train()
    assert hub.ranges == [f"bytes={10 << 20}-"]
    assert {path for method, path in hub.requests if method == "GET" and "/resolve/" in path} == {
        f"/datasets/far/away/resolve/{'0' * 40}/train.safetensors"
    }, "no file but the one that the run reads, at the commit that the first answer named"


def test_a_download_that_was_killed_goes_on_where_it_stopped(sandbox: Sandbox, serve_hub, tmp_path) -> None:
    hub = far_run(sandbox, serve_hub, tmp_path)
    hub.cuts.append(15_000_000)
    # The server stops in the midst of the file and keeps the connection.
    hub.stall.set()
    process = sandbox.start()
    folder = sandbox.datasets / "far/away"
    wait_for(
        lambda: sum(path.stat().st_size for path in folder.glob(".incomplete-*")) >= 10 << 20,
        "the first piece of the file",
    )
    process.kill()
    hub.stall.clear()
    sandbox.train()
    assert hub.ranges == [f"bytes={10 << 20}-"]


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        ("ETag", '"' + "a" * 64 + '"', "the Hub announced sha256 aaaa"),
        ("Content-Length", "24000081", "far/away/train.safetensors"),
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
