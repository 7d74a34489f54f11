"""A Hugging Face Hub on 127.0.0.1 that serves folders as data sets, for the real clients."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class FolderHub:
    """What is served: FOLDER/OWNER/NAME is a data set with one commit, on the branch main."""

    folder: Path
    url: str = ""
    gated: set[str] = field(default_factory=set)  # data sets; a token does not help
    requests: list[str] = field(default_factory=list)  # method and path

    def env(self, home: Path) -> dict[str, str]:
        """The environment of a process that is to use this Hub alone."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub's API does: JSON, or bytes."""

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


class _Handler(Answering):
    hub: FolderHub

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+))?(?:/(.*))?", path)
        if not found or not (self.hub.folder / found[1]).is_dir():
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        dataset, what, revision, rest = found[1], found[2] or "revision", found[3] or "main", found[4]
        if dataset in self.hub.gated:
            status = 403 if "Authorization" in self.headers else 401
            self.answer({"error": "Access is restricted"}, status, X_Error_Code="GatedRepo")
        elif revision not in ("main", COMMIT):
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        else:
            getattr(self, f"_{what.replace('-', '_')}")(self.hub.folder / dataset, rest or "", body)

    do_HEAD = do_POST = do_GET

    def _revision(self, root: Path, _: str, __: bytes) -> None:
        names = [{"rfilename": e["path"]} for e in self.entries(root, root) if e["type"] == "file"]
        self.answer({"id": "/".join(root.parts[-2:]), "sha": COMMIT, "siblings": names})

    def _tree(self, root: Path, rest: str, _: bytes) -> None:
        deep = "recursive=true" in self.path.lower()
        if not (root / rest).is_dir():
            self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            return
        self.answer(self.entries(root, root / rest, deep))

    def _paths_info(self, root: Path, _: str, body: bytes) -> None:
        asked = (
            json.loads(body)["paths"]
            if body.startswith(b"{")
            else urllib.parse.parse_qs(body.decode())["paths"]
        )
        self.answer([e for e in self.entries(root, root) if e["path"] in asked])

    def _resolve(self, root: Path, rest: str, _: bytes) -> None:
        path = root / rest
        if not path.is_file():
            self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            return
        data = path.read_bytes()
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.answer(data, **headers, Accept_Ranges="bytes")
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.answer(data[start:stop], 206, **headers)

    @staticmethod
    def entries(root: Path, folder: Path, deep: bool = True) -> list[dict[str, Any]]:
        """What the Hub says of the files and folders in a folder."""
        found = []
        for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
            name = path.relative_to(root).as_posix()
            if path.is_dir():
                found.append({"type": "directory", "path": name, "size": 0, "oid": "0" * 40})
            else:
                oid = hashlib.sha1(path.read_bytes()).hexdigest()
                found.append({"type": "file", "path": name, "size": path.stat().st_size, "oid": oid})
        return found


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Have this process ask the Hub at an address, and keep what it downloads in another cache."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template[template.index("/{") :])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_test")


@contextlib.contextmanager
def serving(hub: Any, handler: type[Answering]) -> Iterator[Any]:
    """A Hub that answers for a while, by a handler whose `hub` it is, at its `url`."""
    own = type("HandlerOfOneHub", (handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


def serve_folder(folder: Path) -> contextlib.AbstractContextManager[FolderHub]:
    """Serve the data sets in a folder for a while."""
    return serving(FolderHub(folder), _Handler)
