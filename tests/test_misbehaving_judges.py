"""Judges' servers that misbehave: valid scores are read, anything else is one line with the reason."""

import http.server
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import test_ift
from basemodel.common.errors import InputError, RunError
from basemodel.evaluation.judging import BadReply, Judge, judge_all, parse_scores

Answer = tuple[int, str] | None  # a status and a body; None: the connection is closed
QUESTIONS = 4
RESULTS = {
    name: [
        {"instruction": f"Name colour {i}.", "input": "", "output": "red", "model_response": str(start + i)}
        for i in range(QUESTIONS)
    ]
    for name, start in (("good", 60), ("bad", 10))
}
RIGHT = [[60 + i for i in range(QUESTIONS)], [10 + i for i in range(QUESTIONS)]]


def body(content: Any, **choice: Any) -> str:
    """A chat completion with this content."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message} | choice
    return json.dumps({"id": "1", "object": "chat.completion", "model": "judge", "choices": [choice]})


class Server:
    """A server that answers each request by a function of the server and the right scores."""

    def __init__(self, serve: Callable[[type], str], answer: Callable[["Server", list[int]], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                points = re.findall(r"<answer \d+>\n(\d+)\n</answer", server.prompt)
                reply = answer(server, [int(number) for number in points])
                if reply is None:
                    self.close_connection = True
                    return
                self.send_response(reply[0])
                self.send_header("Content-Type", "text/html" if "<html>" in reply[1] else "application/json")
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(reply[1].encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.url = serve(Handler) + "/v1"

    @property
    def prompt(self) -> str:
        return self.requests[-1]["messages"][0]["content"]

    @property
    def has_schema(self) -> bool:
        return "response_format" in self.requests[-1]

    @property
    def is_first_time(self) -> bool:
        return sum(request["messages"] == self.requests[-1]["messages"] for request in self.requests) == 1


def plain(scores: list[int]) -> str:
    entries = enumerate(scores, start=1)
    return json.dumps({f"answer_{number}": {"comment": "", "score": score} for number, score in entries})


def unless_schema(status: int, reason: str) -> Callable[[Server, list[int]], Answer]:
    return lambda server, s: (status, reason) if server.has_schema else (200, body(plain(s)))


def saying(content: Callable[[list[int]], Any], **choice: Any) -> Callable[[Server, list[int]], Answer]:
    return lambda server, scores: (200, body(content(scores), **choice))


def at_first(answer: Answer) -> Callable[[Server, list[int]], Answer]:
    return lambda server, scores: answer if server.is_first_time else (200, body(plain(scores)))


DRAFT = '{"answer_1": {"score": 1}, "answer_2": {"score": 2}}'
SCORED = {  # what the server does, and the number of requests for four questions
    "400 for a schema": (unless_schema(400, '{"error": {"message": "no json_schema"}}'), QUESTIONS + 1),
    "500 for a schema": (unless_schema(500, "grammar"), QUESTIONS + 2),
    "empty for a schema": (unless_schema(200, body("")), QUESTIONS + 1),
    "thoughts": (saying(lambda s: f"<think>{DRAFT}</think>\n{plain(s)}"), QUESTIONS),
    "thoughts opened by a template": (saying(lambda s: f"{DRAFT}\n</think>\n{plain(s)}"), QUESTIONS),
    "a code fence": (saying(lambda s: f"Sure.\n```json\n{plain(s)}\n```"), QUESTIONS),
    "empty at first": (at_first((200, body(""))), 2 * QUESTIONS),
    "busy at first": (at_first((429, '{"error": {"message": "slow down"}}')), 2 * QUESTIONS),
}
HTML = "<!doctype html><html><head><title>My router</title></head><body>Hello</body></html>"
STOPPED = {  # what the server does, and the reason that is reported
    "a cut reply": (saying(lambda s: "", finish_reason="length"), '"finish_reason":"length"'),
    "an answer without a score": (saying(lambda s: plain(s[:1])), "no score from 0 to 100 for each answer"),
    "a third answer": (saying(lambda s: plain([*s, 1])), "no score from 0 to 100"),
    "out of range": (saying(lambda s: plain([s[0], 101])), "no score from 0 to 100"),
    "prose": (saying(lambda s: "I like both."), "answer, 1 to 2, in 'I like both.'"),
    "an endless thought": (saying(lambda s: f"<think>{plain(s)}"), "no score from 0 to 100"),
    "a refusal": (saying(lambda s: None, message={"content": None, "refusal": "I will not."}), "I will not."),
    "an answer in parts": (saying(lambda s: [{"type": "text", "text": plain(s)}]), "no answer came back"),
    "an error in 200": (lambda *_: (200, '{"error": {"message": "loading"}}'), "but: .*loading"),
    "400": (lambda *_: (400, '{"error": {"message": "prompt too long"}}'), "status 400: .*prompt too long"),
    "401": (
        lambda *_: (401, '{"error": "no such key"}'),
        "status 401: .*no such key.*set OPENAI_API_KEY to a key",
    ),
    "404": (lambda *_: (404, '{"error": {"message": "no model judge"}}'), "status 404: .*no model judge"),
    "a web page": (lambda *_: (200, HTML), "not JSON: .*My router.*does the address lack /v1"),
    "no JSON": (lambda *_: (200, "upstream timed out"), "not JSON"),
    "gone": (lambda *_: None, r"no answer \("),
}


def judge_of(server: Server, folder: Path) -> Judge:
    return Judge("judge", server.url, 1, folder / "cache.jsonl")


@pytest.mark.parametrize("case", SCORED)
def test_valid_scores_are_read(serve: Callable[[type], str], tmp_path: Path, case: str) -> None:
    answer, requests = SCORED[case]
    server = Server(serve, answer)
    assert judge_all(RESULTS, judge_of(server, tmp_path), seed=1, parallel=1).tolist() == RIGHT
    assert len(server.requests) == requests
    judge_all(RESULTS, judge_of(server, tmp_path), seed=1, parallel=4)
    assert len(server.requests) == requests, "nothing is asked twice"


@pytest.mark.parametrize("case", STOPPED)
def test_without_scores_the_reason_is_reported(
    serve: Callable[[type], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """With one retry, after three questions."""
    answer, message = STOPPED[case]
    server = Server(serve, answer)
    server.url = server.url.removesuffix("/v1") if case == "a web page" else server.url
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it asks again
    with pytest.raises(RunError, match=message) as caught:
        judge_all(RESULTS, judge_of(server, tmp_path), seed=1, parallel=1)
    assert str(caught.value).startswith(server.url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoilt", [(200, body("no")), (400, '{"error": {"message": "filtered"}}')])
def test_a_question_without_scores_is_skipped_and_counted(
    serve: Callable[[type], str], tmp_path: Path, capsys: pytest.CaptureFixture, spoilt: Answer
) -> None:
    server = Server(
        serve, lambda server, s: spoilt if "colour 2." in server.prompt else (200, body(plain(s)))
    )
    paths = [tmp_path / f"{name}-ift-results.json" for name in RESULTS]
    for path, records in zip(paths, RESULTS.values(), strict=True):
        path.write_text(json.dumps(records))
    command = ["judge", *map(str, paths), "--base-url", server.url, "--model", "judge", "--retries", "1"]
    command += ["--cache", str(tmp_path / "cache.jsonl")]
    test_ift.main.main(command, standalone_mode=False)
    printed = capsys.readouterr()
    assert "Judged by judge, 3 questions\n1 of 4 questions have no valid scores" in printed.out
    assert f"| good | {(60 + 61 + 63) / 3:.1f} |" in printed.out
    assert "| good minus bad | +50.0 | +50.0 to +50.0 |" in printed.out
    reason = "for each answer, 1 to 2, in 'no'" if spoilt[0] == 200 else "status 400: .*filtered.*"
    assert re.fullmatch(f"Record 2 is skipped: .*{reason}\n", printed.err)
    asked = len(server.requests)
    test_ift.main.main(command, standalone_mode=False)
    assert all("colour 2." in request["messages"][0]["content"] for request in server.requests[asked:])


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"answer_1": {"score": 87.5}}', 87.5),
        ('{"answer_1": {"score": 85}', None),  # cut off
        ('{"answer_1": {"score": true}}', None),
        ('{"answer_1": {"score": NaN}}', None),
        ('{"answer_1": {"comment": "85"}}', None),
        ('["answer_1"]', None),
        ('{"a":' * 5000, None),
        ("}{", None),
    ],
)
def test_the_score_of_a_single_answer(reply: str, score: float | None) -> None:
    if score is None:
        with pytest.raises(BadReply):
            parse_scores(reply, 1)
    else:
        assert parse_scores(reply, 1) == [score]


@pytest.mark.parametrize(("proxy", "address"), [("nonsense://127.0.0.1:9", "127.0.0.1:9"), ("", "a:b")])
def test_a_proxy_or_an_address_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str, address: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(
        InputError, match=r"cannot set up requests to the judge: .*; check --base-url, .*ALL_PROXY"
    ):
        Judge("judge", f"http://{address}/v1", 0, tmp_path)
