"""As much of a W&B server as a run needs that sends values, dies, and goes on."""

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

USER = {"id": "U", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "P", "name": "p", "entity": {"id": "E", "name": "us"}}


class WandbServer(http.server.ThreadingHTTPServer):
    """Keeps the lines of each run's history, as JSON, by the run's id."""

    def __init__(self) -> None:
        self.history: dict[str, list[str]] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def env(self) -> dict[str, str]:
        """What makes wandb use this server, with credentials."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data that a GraphQL query asks for."""
        run = {"id": "R", "name": variables.get("name"), "displayName": "", "project": PROJECT}
        lines = self.history.get(run["name"], [])
        run |= {"historyLineCount": len(lines), "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]"}
        run |= {"summaryMetrics": "{}", "config": "{}", "wandbConfig": '{"t": 1}', "tags": []}
        run |= {"logLineCount": 0, "eventsLineCount": 0}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": run, "inserted": not lines}}
        if "RunResumeStatus" in query:
            return {"model": {**PROJECT, "bucket": run if lines else None}}
        return {"viewer": USER, "entity": {"organization": {"coreWeaveOrganizationId": None}}}


class Handler(http.server.BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        asked, answer = json.loads(body or "{}"), {}
        if "query" in asked:
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif run := re.search(r"/([^/]+)/file_stream", self.path):
            sent = (asked.get("files") or {}).get("wandb-history.jsonl")
            if sent:
                lines = self.server.history.setdefault(run[1], [])
                lines[sent["offset"] :] = sent["content"]
        self.reply(json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply(b"{}")

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server, until the block ends."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
