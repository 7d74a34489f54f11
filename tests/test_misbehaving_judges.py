"""Judges' servers that misbehave: scores are right where they are there, else one line gives the reason."""

import http.server
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import test_ift
from basemodel.common.errors import RunError
from basemodel.evaluation.judging import Judge, judge_all
from basemodel.evaluation.replies import BadReply, parse_scores

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
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": content},
    } | choice
    return json.dumps({"id": "1", "object": "chat.completion", "model": "judge", "choices": [choice]})


class Server:
    """A server that answers each request as a function of its scores and its history says."""

    def __init__(self, serve: Callable[[type], str], way: Callable[["Server", list[int]], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                points = re.findall(r"<answer \d+>\n(\d+)\n</answer", server.prompt)
                answer = way(server, [int(each) for each in points])
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer[0])
                self.send_header("Content-Type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(answer[1].encode())

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
    def first_time(self) -> bool:
        return sum(request["messages"] == self.requests[-1]["messages"] for request in self.requests) == 1


def plain(
    scores: list[int], form: Callable[[int], Any] = lambda score: {"comment": "", "score": score}
) -> str:
    return json.dumps({f"answer_{number}": form(score) for number, score in enumerate(scores, start=1)})


def unless_schema(status: int, reason: str) -> Callable[[Server, list[int]], Answer]:
    return lambda server, s: (status, reason) if server.has_schema else (200, body(plain(s)))


def saying(content: Callable[[list[int]], Any], **choice: Any) -> Callable[[Server, list[int]], Answer]:
    return lambda server, scores: (200, body(content(scores), **choice))


def at_first(answer: Answer) -> Callable[[Server, list[int]], Answer]:
    return lambda server, scores: answer if server.first_time else (200, body(plain(scores)))


def stream(server: Server, scores: list[int]) -> Answer:
    text = plain(scores)
    deltas = [
        {"choices": [{"index": 0, "delta": {"content": text[i : i + 7]}}]} for i in range(0, len(text), 7)
    ]
    events = [": a comment", *(f"data: {json.dumps(delta)}" for delta in deltas), "data: [DONE]"]
    return 200, "\n\n".join(events)


WRONG = '{"answer_1": {"score": 1}, "answer_2": {"score": 2}}'
SCORED = {  # the way: what the server does, and how often it is asked for four questions
    "400 for a schema": (unless_schema(400, '{"error": {"message": "no json_schema"}}'), QUESTIONS + 1),
    "422 for a schema": (unless_schema(422, '{"detail": [{"msg": "extra field"}]}'), QUESTIONS + 1),
    "404 for a schema": (unless_schema(404, '{"error": "no endpoint for response_format"}'), QUESTIONS + 1),
    "500 for a schema": (unless_schema(500, "grammar"), QUESTIONS + 2),
    "200 with an error for a schema": (unless_schema(200, '{"error": "no json_schema"}'), QUESTIONS + 1),
    "braces before": (saying(lambda s: "For {this} and {a: 1}: " + plain(s)), QUESTIONS),
    "braces after": (saying(lambda s: plain(s) + "\n{that} is all {"), QUESTIONS),
    "thoughts": (saying(lambda s: f"<think>{WRONG}</think>\n{plain(s)}"), QUESTIONS),
    "thoughts opened by a template": (saying(lambda s: f"{WRONG}\n</think>\n{plain(s)}"), QUESTIONS),
    "twice": (saying(lambda s: plain(s) + "\n" + plain(s)), QUESTIONS),
    "a draft first": (saying(lambda s: WRONG + "\nOn reflection:\n" + plain(s)), QUESTIONS),
    "strings": (saying(lambda s: plain(s, lambda score: {"score": f"{score}"})), QUESTIONS),
    "out of 100": (saying(lambda s: plain(s, lambda score: {"score": f"{score} / 100"})), QUESTIONS),
    "floats": (saying(lambda s: plain(s, lambda score: {"score": float(score)})), QUESTIONS),
    "bare numbers": (saying(lambda s: plain(s, lambda score: score)), QUESTIONS),
    "extra keys": (
        saying(lambda s: '{"note": {"score": 3}, ' + plain(s, lambda n: {"score": n, "of": 9})[1:]),
        QUESTIONS,
    ),
    "inside another object": (saying(lambda s: f'{{"result": {{"scores": {plain(s)}}}}}'), QUESTIONS),
    "other spelling": (saying(lambda s: plain(s).replace("answer_", "Answer ")), QUESTIONS),
    "a code fence": (saying(lambda s: f"Sure.\n```json\n{plain(s)}\n```"), QUESTIONS),
    "Python": (saying(lambda s: plain(s).replace('"', "'").replace("}}", ",},}")), QUESTIONS),
    "line breaks in strings": (saying(lambda s: plain(s).replace('""', '"one\ntwo"')), QUESTIONS),
    "a flood": (saying(lambda s: "{" * 100_000 + plain(s)), QUESTIONS),
    "in parts": (saying(lambda s: [{"type": "text", "text": plain(s)}]), QUESTIONS),
    "a completion": (lambda server, s: (200, body(None, text=plain(s), message=None)), QUESTIONS),
    "a stream of events": (stream, QUESTIONS),
    "a byte order mark": (lambda server, s: (200, "\ufeff" + body(plain(s))), QUESTIONS),
    "empty at first": (at_first((200, body(""))), 2 * QUESTIONS),
    "busy at first": (at_first((429, '{"error": {"message": "slow down"}}')), 2 * QUESTIONS),
    "down at first": (at_first((503, "")), 2 * QUESTIONS),
    "gone at first": (at_first(None), 2 * QUESTIONS),
}
HTML = "<!doctype html><html><head><title>My router</title></head><body>Hello</body></html>"
STOPPED = {  # the way: what the server does, how often it is asked, and what is said
    "empty": (
        saying(lambda s: "", finish_reason="length"),
        6,
        r"the answer is empty \(finish_reason: length\)",
    ),
    "nothing": (lambda *_: (200, ""), 6, "the last reply: nothing came back"),
    "no answer 2": (saying(lambda s: plain(s[:1])), 6, "scores for answer_1, not answer_1, answer_2"),
    "an answer 3": (
        saying(lambda s: plain([*s, 1])),
        6,
        "scores for answer_1, answer_2, answer_3, not answer_1",
    ),
    "out of range": (saying(lambda s: plain([s[0], 101])), 6, "answer_2 has no score from 0 to 100"),
    "true": (saying(lambda s: plain(s, lambda n: True)), 6, "answer_1 has no score from 0 to 100"),
    "prose": (saying(lambda s: "I like both."), 6, "no scores in the reply, which begins 'I like both.'"),
    "endless thought": (
        saying(lambda s: f"<think>{plain(s)}"),
        6,
        "ends before the judge has stopped thinking",
    ),
    "a refusal": (
        saying(lambda s: None, message={"content": None, "refusal": "I cannot judge colours."}),
        6,
        "the judge refuses: I cannot judge colours",
    ),
    "no choices": (lambda *_: (200, '{"choices": []}'), 6, "no answer came back, but: .*choices"),
    "an error in 200": (
        lambda *_: (200, '{"error": {"message": "model is loading"}}'),
        6,
        "but: model is loading",
    ),
    "plain text": (lambda *_: (200, "upstream timed out"), 6, "no JSON came back, but: upstream timed out"),
    "400": (lambda *_: (400, '{"error": {"message": "prompt too long"}}'), 4, "status 400: prompt too long"),
    "400 without JSON": (lambda *_: (400, "<h1>Bad\nRequest</h1>"), 4, "status 400: Bad Request"),
    "400 of vLLM": (
        lambda *_: (400, '{"object": "error", "message": "too long"}'),
        4,
        "status 400: too long",
    ),
    "401": (lambda *_: (401, '{"error": "no such key"}'), 1, "refuses the key.*no such key"),
    "404": (lambda *_: (404, '{"error": {"message": "no model judge"}}'), 2, "status 404: no model judge"),
    "429 for good": (
        lambda *_: (429, '{"error": {"message": "quota used up"}}'),
        2,
        "status 429: quota used up",
    ),
    "500 for good": (lambda *_: (500, '{"detail": "out of memory"}'), 4, "status 500: out of memory"),
    "a web page": (lambda *_: (200, HTML), 1, "a web page came back: My router; does the address lack /v1"),
    "gone": (lambda *_: None, 2, r"no answer \("),
}


def judge_of(server: Server, folder: Path) -> Judge:
    return Judge("judge", server.url, 1, folder / "cache.jsonl")


@pytest.mark.parametrize("way", SCORED)
def test_scores_that_are_there_are_read(serve, tmp_path: Path, way: str) -> None:
    answer, requests = SCORED[way]
    server = Server(serve, answer)
    assert judge_all(RESULTS, judge_of(server, tmp_path), seed=1, parallel=1).tolist() == RIGHT
    assert len(server.requests) == requests
    judge_all(RESULTS, judge_of(server, tmp_path), seed=1, parallel=4)
    assert len(server.requests) == requests, "nothing is asked twice"


@pytest.mark.parametrize("way", STOPPED)
def test_where_there_are_none_the_reason_is_said(serve, tmp_path: Path, way: str) -> None:
    """With one retry, after three questions."""
    answer, requests, message = STOPPED[way]
    server = Server(serve, answer)
    with pytest.raises(RunError, match=message) as caught:
        judge_all(RESULTS, judge_of(server, tmp_path), seed=1, parallel=1)
    assert str(caught.value).startswith(server.url)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == requests


@pytest.mark.parametrize("spoilt", [(200, body("no")), (400, '{"error": {"message": "filtered"}}')])
def test_a_question_without_scores_is_skipped_and_counted(
    serve, tmp_path: Path, capsys: pytest.CaptureFixture, spoilt: Answer
) -> None:
    server = Server(
        serve, lambda server, s: spoilt if "colour 2." in server.prompt else (200, body(plain(s)))
    )
    paths = [tmp_path / f"{name}-ift-results.json" for name in RESULTS]
    for path, records in zip(paths, RESULTS.values(), strict=True):
        path.write_text(json.dumps(records))
    command = ["judge", *map(str, paths), "--base-url", server.url, "--model", "judge", "--retries", "1"]
    command += ["--cache", str(tmp_path / "cache.jsonl"), "--scores", str(tmp_path / "scores.json")]
    test_ift.main.main(command, standalone_mode=False)
    printed = capsys.readouterr()
    assert "Judged by judge, 3 questions\n1 of 4 questions had no valid scores" in printed.out
    assert f"| good | {(60 + 61 + 63) / 3:.1f} |" in printed.out
    assert "| good minus bad | +50.0 | +50.0 to +50.0 |" in printed.out
    reason = "no scores in the reply, which begins 'no'" if spoilt[0] == 200 else "status 400: filtered"
    assert re.fullmatch(f"Record 2 is skipped: .*{reason}.*\n", printed.err)
    scores = [record["Judged by judge"] for record in json.loads((tmp_path / "scores.json").read_text())]
    assert scores[1:3] == [{"good": 61.0, "bad": 11.0}, {"good": None, "bad": None}]
    asked = len(server.requests)
    test_ift.main.main(command, standalone_mode=False)
    assert all("colour 2." in request["messages"][0]["content"] for request in server.requests[asked:])


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"answer_1": {"score": 5}}', 5),
        ('{"score": 85}', 85),
        ('{"answer_1": 7} but {"score": 85}', 7),
        ('{"answer_1": {"score": 85}', 85),  # cut off
        ('{"answer_1": 87.5}', 87.5),
        ('{"answer_2": 85}', None),
        ('{"answer_1": NaN}', None),
        ('{"answer_1": "85 of 90"}', None),
        ('{"answer_1": {"comment": "85"}}', None),
        ('{"a":' * 5000 + '{"answer_1": 85}', 85),
        ('{"answer_1": ' + "9" * 5000 + "}", None),
        ("answer_1: 85", None),
        ("}{", None),
        ("", None),
    ],
)
def test_the_score_of_a_single_answer(reply: str, score: float | None) -> None:
    if score is None:
        with pytest.raises(BadReply):
            parse_scores(reply, 1)
    else:
        assert parse_scores(reply, 1) == [score]
