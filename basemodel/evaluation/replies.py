"""Reading what a judge's server sends: the text in an HTTP body, and the scores in that text."""

import ast
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

MOST_CHARACTERS = 20_000  # of a reply, from its end: no scores take more
OBJECT_START = re.compile(r"\{(?=\s*[\"'])")


class BadReply(Exception):
    """A reply without the scores it was asked for. One line: why, in the server's own words if it has any."""


class RefusedQuestion(BadReply):
    """A question that the server will not answer, however often it is asked."""


class WebPage(BadReply):
    """A page for people: the address is wrong."""


# ------------------------------------------------------------------------------------------------------------
# From an HTTP body to a text
# ------------------------------------------------------------------------------------------------------------


def message_in(body: str) -> str:
    """The message in the body of a chat completion: one JSON object, or a stream of them, one a line, as
    server-sent events or bare. Raises BadReply."""
    if body.lstrip().startswith("<"):
        raise WebPage(f"a web page came back: {reason_in(body)}")
    chunks = json_chunks(body)
    if not chunks:
        raise BadReply(f"no JSON came back, but: {reason_in(body)}" if body.strip() else "nothing came back")
    choices = [chunk["choices"][0] for chunk in chunks if _is_filled(chunk.get("choices"))]
    if text := "".join(_content(choice) for choice in choices):
        return text
    if not choices:
        raise BadReply(f"no answer came back, but: {reason_in(json.dumps(chunks[-1]))}")
    messages = [message for choice in choices if isinstance(message := choice.get("message"), dict)]
    refusal = next((message["refusal"] for message in messages if message.get("refusal")), "")
    ending = next((choice["finish_reason"] for choice in choices if choice.get("finish_reason")), "unknown")
    raise BadReply(
        f"the judge refuses: {_short(str(refusal))}"
        if refusal
        else f"the answer is empty (finish_reason: {ending})"
    )


def json_chunks(body: str) -> list[dict[str, Any]]:
    """The JSON objects of a body, which is one or has one on each line."""
    for texts in ([body], body.splitlines()):
        parsed = []
        for text in texts:
            try:
                parsed.append(json.loads(text.strip("\ufeff \r\n").removeprefix("data:")))
            except (ValueError, RecursionError):
                continue
        if chunks := [value for value in parsed if isinstance(value, dict)]:
            return chunks
    return []


def _is_filled(choices: Any) -> bool:
    return isinstance(choices, list) and bool(choices) and isinstance(choices[0], dict)


def _content(choice: dict[str, Any]) -> str:
    """The text of a choice: of a message, of a piece of one, or of a plain completion."""
    message = choice.get("message") or choice.get("delta") or {}
    content = message.get("content") if isinstance(message, dict) else message
    content = choice.get("text") if content is None else content
    if isinstance(content, list):  # in parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def reason_in(body: str) -> str:
    """What a server says went wrong: the message of an error in JSON, in the forms of OpenAI, Ollama, vLLM
    and FastAPI, the title of a page, or the text itself, cut short."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        title = re.search(r"<title[^>]*>(.*?)</title>", body, re.DOTALL | re.IGNORECASE)
        return _short(title[1] if title else re.sub(r"<[^>]*>", " ", body)) or "no reason given"
    for key in ("error", "detail", "message", "msg"):
        while isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return _short(value if isinstance(value, str) else json.dumps(value))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + "..."


# ------------------------------------------------------------------------------------------------------------
# From a text to scores
# ------------------------------------------------------------------------------------------------------------


def parse_scores(reply: str, count: int) -> list[float]:
    """The scores, from 0 to 100, of `count` answers in a judge's reply. Raises BadReply.

    The last object counts that has, itself or in an object inside it, a score for each answer and for no
    other: under `answer_N`, in any case and with any separator or none, a number, a number in quotes, or an
    object with a `score`. For one answer alone, `{"score": 85}` will do. Objects are JSON or in Python's
    spelling. Thoughts in `<think>` are no reply; text around the object and other keys are passed over.
    """
    text = without_thoughts(reply)[-MOST_CHARACTERS:]
    objects = list(objects_in(text))
    complaint = f"no scores in the reply, which begins {text[:80]!r} and ends {text[-40:]!r}"
    for value in (inner for outer in reversed(objects) for inner in _with_inner(outer)):
        answers = {number: entry for key, entry in value.items() if (number := _answer_number(key))}
        if answers.keys() != set(range(1, count + 1)):
            complaint = (
                f"scores for {_listed(answers)}, not {_listed(range(1, count + 1))}" if answers else complaint
            )
            continue
        scores = [_number(answers[number]) for number in range(1, count + 1)]
        if None not in scores:
            return scores
        complaint = f"answer_{scores.index(None) + 1} has no score from 0 to 100 in the reply"
    for outer in reversed(objects):
        if count == 1 and not any(map(_answer_number, outer)) and (score := _number(outer)) is not None:
            return [score]
    raise BadReply(complaint)


def without_thoughts(reply: str) -> str:
    """A reply without what a reasoning model thought before it. Raises BadReply if it never stopped."""
    text = re.sub(r"<think(ing)?>.*?</think(ing)?>", "", reply, flags=re.DOTALL | re.IGNORECASE)
    text = re.split(r"</think(?:ing)?>", text, flags=re.IGNORECASE)[-1]  # opened by the server's template
    if re.search(r"<think(ing)?>", text, re.IGNORECASE):
        raise BadReply("the reply ends before the judge has stopped thinking")
    if not text.strip():
        raise BadReply("the reply is empty")
    return text


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """The objects in a text, JSON or Python, one after another, none inside another."""
    decoder, ends, end = json.JSONDecoder(strict=False), _brace_ends(text), 0
    for start in (match.start() for match in OBJECT_START.finditer(text)):
        if start < end:  # inside the one before
            continue
        try:
            value, stop = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            stop = ends.get(start, start)
            value = _python_object(text[start:stop])
        if isinstance(value, dict):
            end = stop
            yield value


def _python_object(text: str) -> Any:
    """What a literal of Python stands for; None for anything else."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _brace_ends(text: str) -> dict[int, int]:
    """Where each brace that is closed ends."""
    ends, opened = {}, []
    for match in re.finditer(r"[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            ends[opened.pop()] = match.end()
    return ends


def _with_inner(value: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
    waiting: list[Any] = [value]
    while waiting:
        yield (inner := waiting.pop(0))
        waiting += [each for each in inner.values() if isinstance(each, dict)]


def _answer_number(key: Any) -> int:
    """N of a key answer_N; 0 for any other."""
    match = re.fullmatch(r"\W*answer[\W_]*(\d{1,6})\W*", str(key), re.IGNORECASE)
    return int(match[1]) if match else 0


def _number(value: Any) -> float | None:
    """A score from 0 to 100, if the value is or holds one."""
    if isinstance(value, dict):
        value = next((inner for key, inner in value.items() if str(key).strip().lower() == "score"), None)
    if isinstance(value, str) and (
        match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*100|%)?\s*", value, re.ASCII)
    ):
        value = float(match[1])
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= 100 else None


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(f"answer_{number}" for number in numbers)
