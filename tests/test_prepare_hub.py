"""Preparing data from the Hub and for it: the real client against a server on 127.0.0.1."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Sandbox, run_script
from huggingface_hub import DatasetCard

REVISIONS = {"main": "a" * 40, "v1": "b" * 40}
LINES = {name: "".join(f'{{"text": "{name} {i}"}}\n' for i in range(3000)) for name in ("one", "two", "old")}
FILES = {
    "a" * 40: {
        "sample/1.jsonl": LINES["one"].encode(),
        "sample/2.jsonl": LINES["two"].encode(),
        "other/3.jsonl": b'{"text": "not asked for"}\n',
        "large/4.jsonl": b"".join(b'{"text": "%d %b"}\n' % (i, b"word " * 200_000) for i in range(12)),
        "README.md": b"# A data set\n",
    },
    "b" * 40: {"sample/1.jsonl": LINES["old"].encode()},
}


@dataclass
class FakeHub:
    """What a server serves as the data set test/texts, and what it has been asked and given."""

    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    cut_off: dict[str, int] = field(
        default_factory=dict
    )  # file name: bytes after which the line breaks, once
    # Set: a line that broke stays open, and silent.
    stall: threading.Event = field(default_factory=threading.Event)
    too_short: set[str] = field(default_factory=set)  # files of which the last byte is never sent
    damaged: set[str] = field(default_factory=set)  # files of which the first byte is another
    stored: dict[str, bytes] = field(default_factory=dict)  # uploaded objects by SHA-256
    committed: dict[str, bytes] = field(default_factory=dict)
    refuse_after: int | None = None  # uploads

    def env(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            # The protocol for large files that a small server can speak.
            "HF_HUB_DISABLE_XET": "1",
        }

    def downloads(self, name: str) -> list[str]:
        """The ranges that were asked for of a file; "" for the whole."""
        return [part for method, path, part in self.requests if method == "GET" and path.endswith(name)]


class Handler(http.server.BaseHTTPRequestHandler):
    """The Hub's API, as far as a data set of a few files needs it."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("X_Length", str(len(data))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self) -> None:
        self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") == "Bearer hf_test":
                self.answer({"name": "test", "type": "user", "orgs": []})
            else:
                self.answer({"error": "Invalid token"}, 401)
        elif found := re.fullmatch(r"/api/datasets/test/texts/revision/(.+)", path):
            commit = REVISIONS.get(found[1], found[1])
            if commit in FILES:
                self.answer({"id": "test/texts", "sha": commit, "siblings": []})
            else:
                self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif found := re.fullmatch(r"/api/datasets/test/texts/tree/(.+)", path):
            listing = FILES[found[1]].items()
            blobs = ((name, data, hashlib.sha1(data).hexdigest()) for name, data in listing)
            self.answer([{"type": "file", "path": n, "size": len(d), "oid": oid} for n, d, oid in blobs])
        elif found := re.fullmatch(r"/datasets/test/texts/resolve/(\w+)/(.+)", path):
            self.send_file(found[1], found[2])
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, commit: str, name: str) -> None:
        data = FILES[commit].get(name)
        if data is None:
            self.missing()
            return
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").partition("-")[0]))
        algorithm = hashlib.sha256 if name.startswith("large/") else hashlib.sha1
        headers = {"X_Repo_Commit": commit, "ETag": f'"{algorithm(data).hexdigest()}"'}
        body = b" " + data[1:] if name in self.hub.damaged else data[start:]
        if self.command == "GET" and name in self.hub.too_short:
            body = body[:-1]
        if self.command == "GET" and name in self.hub.cut_off:
            body = body[: self.hub.cut_off.pop(name)]
            headers["X_Length"] = str(len(data) - start)
            self.close_connection = True
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(body, 206 if start else 200, **headers)
        while self.close_connection and self.hub.stall.is_set():
            time.sleep(0.05)

    def do_POST(self) -> None:
        self.hub.requests.append((self.command, self.path, ""))
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        )
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.hub.url}/datasets/me/mine"})
        elif self.path.startswith("/api/datasets/me/mine/preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]
            self.answer({"files": files})
        elif self.path == "/datasets/me/mine.git/info/lfs/objects/batch":
            objects = [{"oid": part["oid"], "size": part["size"]} for part in json.loads(body)["objects"]]
            for part in objects:
                if part["oid"] not in self.hub.stored:
                    part["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{part['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path.startswith("/api/datasets/me/mine/commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.committed[value["path"]] = self.hub.stored[value["oid"]]
            url = f"{self.hub.url}/datasets/me/mine/commit/{'c' * 40}"
            self.answer({"success": True, "commitOid": "c" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.missing()

    def do_PUT(self) -> None:
        self.hub.requests.append((self.command, self.path, ""))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.refuse_after == len(self.hub.stored):
            self.answer({"error": "no more today"}, 403)
            return
        self.hub.stored[self.path.rpartition("/")[2]] = body
        self.answer({})


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("HandlerOfOneHub", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


def command(output: Path, *options: str, files: str = "sample/*") -> list[str | Path]:
    source = ["prepare_datasets.py", "test/texts", output, "--files", files]
    return [*source, "--tokenizer", "bytes", *options]


def prepare(hub: FakeHub, home: Path, output: Path, *options: str) -> dict[str, Any]:
    """Prepare from the Hub; return meta.json."""
    done = run_script(*command(output, *options), env=hub.env(home))
    assert done.returncode == 0, done.stderr
    return json.loads((output / "meta.json").read_text())


def refused(hub: FakeHub, home: Path, *line: str | Path, status: int = 2) -> str:
    done = run_script(*line, env=hub.env(home))
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_files_are_downloaded_once_and_then_the_hub_is_not_asked(hub: FakeHub, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command(tmp_path / name))],
            cwd=ROOT,
            env={**os.environ, **hub.env(tmp_path / "home")},
            stderr=subprocess.PIPE,
        )
        for name in ("first", "second")
    ]
    for process in processes:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error
    assert hub.downloads("sample/1.jsonl") == hub.downloads("sample/2.jsonl") == [""]
    assert not hub.downloads("3.jsonl") and not hub.downloads("README.md")
    hub.requests.clear()
    meta = prepare(hub, tmp_path / "home", tmp_path / "third")
    assert hub.requests == []
    assert meta["revision"] == "a" * 40 and (meta["source"], meta["files"]) == ("test/texts", "sample/*")
    assert sum(split["documents"] for split in meta["splits"].values()) == 6000
    assert len({(tmp_path / name / "meta.json").read_text() for name in ("first", "second", "third")}) == 1


def check_large_file(hub: FakeHub, home: Path, output: Path) -> None:
    """Prepare from the large file, of which 11 MB have been sent: the rest alone is asked for."""
    done = run_script(*command(output, files="large/*"), env=hub.env(home))
    assert done.returncode == 0, done.stderr
    # The client writes 10 MiB at a time, so so much was there.
    assert hub.downloads("large/4.jsonl") == ["", f"bytes={10 << 20}-"]
    splits = json.loads((output / "meta.json").read_text())["splits"].values()
    assert sum(split["bytes"] for split in splits) == sum(len(f"{i} ") + 1_000_000 for i in range(12))


def test_a_download_that_was_cut_off_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_off["large/4.jsonl"] = 11_000_000
    check_large_file(hub, tmp_path / "home", tmp_path / "out")


def test_a_download_that_was_killed_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_off["large/4.jsonl"] = 11_000_000
    hub.stall.set()
    line = [sys.executable, *map(str, command(tmp_path / "out", files="large/*"))]
    env = {**os.environ, **hub.env(tmp_path / "home")}
    with subprocess.Popen(line, cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in tmp_path.rglob(".incomplete-*")) < 10 << 20:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.kill()
    hub.stall.clear()
    check_large_file(hub, tmp_path / "home", tmp_path / "out")
    assert not list(tmp_path.rglob(".incomplete-*"))


def test_a_file_of_another_hash_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.damaged.add("large/4.jsonl")
    error = refused(hub, tmp_path / "home", *command(tmp_path / "out", files="large/*"))
    assert "test/texts: the Hub did not give 'large/*'" in error and "the Hub announced sha256" in error
    hub.damaged.clear()
    done = run_script(*command(tmp_path / "out", files="large/*"), env=hub.env(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert hub.downloads("large/4.jsonl") == ["", ""], "nothing of what was wrong is kept"


def test_a_file_of_the_wrong_size_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.too_short.add("sample/2.jsonl")
    error = refused(hub, tmp_path / "home", *command(tmp_path / "out"))
    assert "test/texts: the Hub did not give 'sample/*'" in error and "should be of size" in error
    assert not list(tmp_path.glob("out*"))
    hub.too_short.clear()
    hub.requests.clear()
    prepare(hub, tmp_path / "home", tmp_path / "out")
    assert hub.downloads("sample/2.jsonl") == [f"bytes={len(LINES['two']) - 1}-"], "what has come stays"
    assert hub.downloads("sample/1.jsonl") == []


def test_a_revision_is_pinned(hub: FakeHub, tmp_path: Path) -> None:
    meta = prepare(hub, tmp_path / "home", tmp_path / "out", "--revision", "v1")
    assert meta["revision"] == "b" * 40 and meta["splits"]["train"]["documents"] < 3000
    hub.requests.clear()
    again = prepare(hub, tmp_path / "home", tmp_path / "again", "--revision", "b" * 40)
    assert again == meta and hub.requests == []
    error = refused(hub, tmp_path / "home", *command(tmp_path / "none", "--revision", "v9"))
    assert "test/texts: the Hub did not give 'sample/*'" in error and "--revision" in error


def test_what_the_hub_does_not_have(hub: FakeHub, tmp_path: Path) -> None:
    error = refused(hub, tmp_path / "home", *command(tmp_path / "out", files="smaple/*"))
    assert "test/texts: has no .parquet, .jsonl" in error and "that match --files 'smaple/*'" in error
    line = ["prepare_datasets.py", "test/nothing", tmp_path / "out", "--files", "*", "--tokenizer", "bytes"]
    error = refused(hub, tmp_path / "home", *line)
    assert "test/nothing: the Hub did not give '*' (404 Client Error. Repository Not Found" in error
    assert not list(tmp_path.glob("out*"))


def test_a_data_set_is_uploaded_and_trained_on(hub: FakeHub, sandbox: Sandbox) -> None:
    output = sandbox.datasets / "me/mine"
    line = command(output, "--push", "me/mine", "--stats")
    hub.refuse_after = 1
    error = refused(hub, sandbox.path / "home", *line, status=1)
    assert "is whole, but could not be uploaded to me/mine" in error and "--push goes on" in error
    assert not hub.committed
    hub.refuse_after = None
    hub.requests.clear()
    done = run_script(*line, env=hub.env(sandbox.path / "home"))
    assert done.returncode == 0, done.stderr
    assert "already prepared" in done.stdout and "Uploaded to me/mine" in done.stdout
    assert sum(method == "PUT" for method, _, _ in hub.requests) == 1, "what was there is not sent again"
    assert hub.committed == {path.name: path.read_bytes() for path in output.iterdir()}
    assert DatasetCard(hub.committed["README.md"].decode()).data.source_datasets == ["test/texts"]

    bytes_model = {"vocab_size": 257, "tokenizer": "bytes"}
    sandbox.write_run(model=bytes_model, train={"dataset": "me/mine"})
    sandbox.train()


def test_an_upload_needs_a_token_before_anything_is_prepared(hub: FakeHub, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "home") | {"HF_TOKEN": "wrong"}
    (tmp_path / "in.txt").write_text("text")
    line = ["prepare_datasets.py", tmp_path / "in.txt", tmp_path / "out", "--tokenizer", "bytes", "--push"]
    done = run_script(*line, "me/mine", env=env)
    assert done.returncode == 2 and "Error: --push me/mine: the Hub does not let you in" in done.stderr
    assert not list(tmp_path.glob("out*"))
    assert "must be OWNER/NAME" in refused(hub, tmp_path / "home", *line, "mine")
