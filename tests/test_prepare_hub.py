"""Preparing data from the Hub and for it: the real client against a server on 127.0.0.1."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from folder_hub import Answering, serving, use_hub
from helpers import Finished, Script, requested_range
from huggingface_hub import DatasetCard
from texts import assert_holds, split_texts

from basemodel.common.errors import InputError
from basemodel.data.hub import download
from basemodel.data.tokenizer import get_tokenizer
from prepare_datasets import main

REVISIONS = {"main": "a" * 40, "v1": "b" * 40}
TEXTS = {name: [f"{name} {i}" for i in range(600)] for name in ("one", "two", "old")}
TEXTS["large"] = [f"{i} " + "word " * 160 for i in range(300)]  # 240 kB
LINES = {name: "".join(f'{{"text": "{text}"}}\n' for text in texts).encode() for name, texts in TEXTS.items()}
FILES = {
    "a" * 40: {
        "sample/1.jsonl": LINES["one"],
        "sample/2.jsonl": LINES["two"],
        "other/3.jsonl": b'{"text": "not asked for"}\n',
        "large/4.jsonl": LINES["large"],
        "README.md": b"# A data set\n",
    },
    "b" * 40: {"sample/1.jsonl": LINES["old"]},
}


@dataclass
class FakeHub:
    """What a server serves as the data set test/texts, and what it has been asked and given."""

    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    cut_off: dict[str, int] = field(
        default_factory=dict
    )  # file name: bytes after which the line breaks, once
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


class Handler(Answering):
    """The Hub's API, as far as a data set of a few files needs it."""

    hub: FakeHub

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
        elif found := re.fullmatch(r"/api/datasets/(test/texts|me/mine)/tree/(.+)", path):
            listing = (self.hub.committed if found[1] == "me/mine" else FILES[found[2]]).items()
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
        algorithm = hashlib.sha256 if name.startswith("large/") else hashlib.sha1
        headers = {"X_Repo_Commit": commit, "ETag": f'"{algorithm(data).hexdigest()}"'}
        asked = requested_range(self.headers.get("Range"), len(data))
        if asked is not None:
            headers["Content_Range"] = f"bytes {asked[0]}-{asked[-1]}/{len(data)}"
        body = data if asked is None else data[asked.start : asked.stop]
        if name in self.hub.damaged:
            body = b" " + body[1:]
        if self.command == "GET" and name in self.hub.too_short:
            body = body[:-1]
        headers["X_Length"] = str(len(body))
        if self.command == "GET" and name in self.hub.cut_off:
            body = body[: self.hub.cut_off.pop(name)]
            self.close_connection = True
        self.answer(body, 200 if asked is None else 206, **headers)

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
                elif line["key"] == "deletedFile":
                    del self.hub.committed[value["path"]]
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
    with serving(FakeHub(), Handler) as hub:
        yield hub


def start(
    hub: FakeHub, output: Path, *options: str, files: str = "sample/*", home: Path, before: str = ""
) -> Script:
    command = ["prepare_datasets.py", "test/texts", str(output), "--files", files, "--tokenizer", "bytes"]
    return Script([*command, *options], hub.env(home), before)


def prepare(hub: FakeHub, output: Path, *options: str, files: str = "sample/*", texts: list[str]) -> dict:
    """Prepare these texts from the Hub, with a cache beside the output; return meta.json."""
    done = start(hub, output, *options, files=files, home=output.parent / "home").wait()
    assert done.returncode == 0, done.stderr
    return assert_holds(output, split_texts(texts), get_tokenizer("bytes"))


def refused(done: Finished, status: int = 2) -> str:
    """The one line of error of a process that has refused."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    return error


def test_files_are_downloaded_once_and_then_the_hub_is_not_asked(hub: FakeHub, tmp_path: Path) -> None:
    scripts = [start(hub, tmp_path / name, home=tmp_path / "home") for name in ("first", "second")]
    for script in scripts:
        assert script.wait().returncode == 0, script.stderr
    assert hub.downloads("sample/1.jsonl") == hub.downloads("sample/2.jsonl") == [""]
    assert not hub.downloads("3.jsonl") and not hub.downloads("README.md")
    hub.requests.clear()
    meta = prepare(hub, tmp_path / "third", texts=TEXTS["one"] + TEXTS["two"])
    assert hub.requests == []
    assert meta["revision"] == "a" * 40 and (meta["source"], meta["files"]) == ("test/texts", "sample/*")
    for name in ("first", "second"):
        assert json.loads((tmp_path / name / "meta.json").read_text()) == meta


@pytest.fixture
def asked(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The Hub that this process asks."""
    use_hub(monkeypatch, hub.url, tmp_path / "cache")
    return hub


def test_a_connection_that_breaks_is_opened_again(asked: FakeHub) -> None:
    asked.cut_off["large/4.jsonl"] = 150_000
    folder, names = download("test/texts", ["large/*"], None)
    assert ((folder / names[0]).read_bytes(), folder.name) == (LINES["large"], "a" * 40)


def test_what_killed_downloads_left_is_removed(asked: FakeHub, tmp_path: Path) -> None:
    blobs = tmp_path / "cache/datasets--test--texts/blobs"
    blobs.mkdir(parents=True)
    old, recent = blobs / "etag.0a.incomplete", blobs / "etag.0b.incomplete"
    for path in (old, recent):
        path.touch()
    os.utime(old, (0, 0))
    download("test/texts", ["sample/1.jsonl"], "a" * 40)
    assert not old.exists() and recent.exists(), "another process may still be writing"


def test_a_part_of_the_files_in_the_cache_is_not_taken_for_all(asked: FakeHub) -> None:
    huggingface_hub.hf_hub_download("test/texts", "sample/1.jsonl", repo_type="dataset", revision="a" * 40)
    folder, names = download("test/texts", ["sample/*"], "a" * 40)
    assert [(folder / name).read_bytes() for name in names] == [LINES["one"], LINES["two"]]


def test_a_file_of_another_hash_or_size_is_refused(asked: FakeHub) -> None:
    asked.damaged.add("large/4.jsonl")
    problem = "test/texts: could not download 'large/.' from the Hub: .*the Hub announced sha256"
    with pytest.raises(InputError, match=problem):
        download("test/texts", ["large/*"], None)
    asked.damaged.clear()
    folder, _ = download("test/texts", ["large/*"], None)
    assert (folder / "large/4.jsonl").read_bytes() == LINES["large"], "nothing of what was wrong is kept"
    asked.too_short.add("sample/2.jsonl")
    with pytest.raises(InputError, match=r"could not download 2 files .*should be of size"):
        download("test/texts", ["sample/1.jsonl", "sample/2.jsonl"], "a" * 40)
    asked.too_short.clear()
    asked.requests.clear()
    download("test/texts", ["sample/1.jsonl", "sample/2.jsonl"], "a" * 40)
    assert not asked.downloads("sample/1.jsonl"), "finished files are kept"


def test_a_revision_is_pinned(hub: FakeHub, tmp_path: Path) -> None:
    meta = prepare(hub, tmp_path / "out", "--revision", "v1", texts=TEXTS["old"])
    assert meta["revision"] == "b" * 40
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert fetched == [f"/datasets/test/texts/resolve/{'b' * 40}/sample/1.jsonl"]
    hub.requests.clear()
    again = prepare(hub, tmp_path / "again", "--revision", "b" * 40, texts=TEXTS["old"])
    assert again == meta and hub.requests == []
    error = refused(start(hub, tmp_path / "none", "--revision", "v9", home=tmp_path / "home").wait())
    assert "test/texts: could not download 'sample/*' from the Hub" in error and "Revision Not Found" in error


def test_what_the_hub_does_not_have(hub: FakeHub, tmp_path: Path) -> None:
    error = refused(start(hub, tmp_path / "out", files="smaple/*", home=tmp_path / "home").wait())
    assert "test/texts: has no .parquet, .arrow" in error and "that match --files 'smaple/*'" in error
    command = ["prepare_datasets.py", "test/nothing", str(tmp_path / "out"), "--files", "*"]
    command += ["--tokenizer", "bytes"]
    error = refused(Script(command, hub.env(tmp_path / "home")).wait())
    assert (
        "test/nothing: could not download '*' from the Hub (404 Client Error. Repository Not Found" in error
    )
    assert not list(tmp_path.glob("out*"))


def test_a_data_set_is_uploaded(hub: FakeHub, tmp_path: Path) -> None:
    output, home = tmp_path / "mine", tmp_path / "home"
    hub.refuse_after = 1
    error = refused(start(hub, output, "--push", "me/mine", home=home).wait(), status=1)
    assert "me/mine: the upload failed" in error and "run the same command again to resume it" in error
    assert not hub.committed
    hub.refuse_after = None
    hub.requests.clear()
    done = start(hub, output, "--push", "me/mine", home=home).wait()
    assert done.returncode == 0, done.stderr
    assert "already prepared" in done.stdout and "Uploaded to me/mine" in done.stdout
    assert sum(method == "PUT" for method, _, _ in hub.requests) == 1, "what was there is not sent again"
    assert hub.committed == {path.name: path.read_bytes() for path in output.iterdir()}
    assert DatasetCard(hub.committed["README.md"].decode()).data.source_datasets == ["test/texts"]


def test_an_uploaded_data_set_replaces_the_one_before(hub: FakeHub, tmp_path: Path) -> None:
    """Token files of another cut would be found beside its own; what else is there stays."""
    old = ("train.safetensors", "train-00001-of-00002.safetensors", "validation.safetensors")
    hub.committed |= dict.fromkeys((*old, "trainer.safetensors", "notes.md"), b"before")
    output, home = tmp_path / "mine", tmp_path / "home"
    small = "from basemodel.prepare import assemble; assemble.MAX_FILE_SIZE = 15_000"
    done = start(hub, output, "--push", "me/mine", home=home, before=small).wait()
    assert done.returncode == 0, done.stderr
    ours = {path.name: path.read_bytes() for path in output.iterdir()}
    assert {"train-00000-of-00002.safetensors", "train-00001-of-00002.safetensors"} < ours.keys()
    assert hub.committed == {"trainer.safetensors": b"before", "notes.md": b"before", **ours}


def test_an_upload_needs_a_token_before_anything_is_prepared(hub: FakeHub, tmp_path: Path) -> None:
    env = hub.env(tmp_path / "home") | {"HF_TOKEN": "wrong"}
    (tmp_path / "in.txt").write_text("text")
    command = ["prepare_datasets.py", str(tmp_path / "in.txt"), str(tmp_path / "out"), "--tokenizer", "bytes"]
    error = refused(Script([*command, "--push", "me/mine"], env).wait())
    assert "me/mine: the Hub denies access" in error
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(InputError, match="must be OWNER/NAME"):
        main.main([*command[1:], "--push", "mine"], standalone_mode=False)
