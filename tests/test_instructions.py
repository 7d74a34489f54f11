"""test_ift.py: fine-tuning as in the book, and judging by a server that may be slow, wrong or missing."""

import http.server
import json
import random
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import Script, wait_for, write_model

import test_ift
from basemodel.common.errors import InputError, RunError
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation import instructions, judging
from basemodel.evaluation.instructions import FineTuning
from basemodel.model.generation import GREEDY, continuations
from basemodel.model.weights import load_model
from gpt import GPTModel

torch.set_num_threads(1)
KEY = "sk-secret-0123456789"
COLOURS = ("red", "green", "blue", "black", "white")
RECORDS = [
    {"instruction": f"Name colour {i}.", "input": "one word" if i % 2 else "", "output": COLOURS[i % 5]}
    for i in range(40)
]


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ------------------------------------------------------------------------------------------------------------


def test_records_are_split_in_their_order_85_5_10() -> None:
    records = [{"instruction": str(i), "input": "", "output": ""} for i in range(1100)]
    train, validation, test = instructions.split_records(records)
    assert (train, test, validation) == (records[:935], records[935:1045], records[1045:])


def test_records_without_input_and_by_line() -> None:
    records = [{"instruction": str(i), "output": "o"} for i in range(3)]
    records[1]["input"] = None
    expected = [{"instruction": str(i), "input": "", "output": "o"} for i in range(3)]
    array, lines = json.dumps(records), "\n".join(map(json.dumps, records))
    for text in (array, lines + "\n", "\ufeff" + lines.replace("\n", "\r\n\n")):
        assert instructions.parse_records(text.encode(), "data") == expected


def test_prompts_are_those_of_alpaca() -> None:
    start = "Below is an instruction that describes a task. "
    start += "Write a response that appropriately completes the request."
    with_input, without = instructions.prompt_of(RECORDS[1]), instructions.prompt_of(RECORDS[0])
    assert without == f"{start}\n\n### Instruction:\nName colour 0.\n\n### Response:\n"
    assert "\n\n### Instruction:\nName colour 1.\n\n### Input:\none word\n\n### Response:\n" in with_input


def test_padding_is_masked_as_in_the_book() -> None:
    """Its example in section 7.3: [0, 1, 2, 3, 4], [5, 6] and [7, 8, 9] with end-of-text 50256."""
    inputs, targets = instructions.collate([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]], 1024, 50256)
    end, no = 50256, -100
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, end, end, end], [7, 8, 9, end, end]]
    assert targets.tolist() == [[1, 2, 3, 4, end], [6, end, no, no, no], [8, 9, end, no, no]]
    inputs, targets = instructions.collate([[0, 1, 2, 3, 4], [5, 6]], 3, 50256)
    assert (inputs.tolist(), targets.tolist()) == ([[0, 1, 2], [5, 6, end]], [[1, 2, 3], [6, end, no]])


def test_fine_tuning_ends_when_the_validation_loss_rises_with_the_best_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = load_model(*write_model(tmp_path, context_length=64, drop_rate=0.3)).cpu()
    train, validation = [[1, 2, 3, 4]] * 8, [[1, 2, 3, 4], [1, 2, 9, 9]]
    how = FineTuning(0.02, 0.0, batch_size=4, drop_rate=0.0, max_epochs=50, seed=0)
    instructions.fine_tune(model, train, validation, how, 256)
    losses = [float(loss) for loss in re.findall(r"epoch.*validation loss ([\d.]+)", capsys.readouterr().out)]
    *falling, last = losses[:-1]  # the last line names the best again
    assert len(falling) >= 2
    assert falling == sorted(falling, reverse=True)
    assert last > falling[-1] == losses[-1]
    assert instructions.mean_loss(model, validation, 4, 256) == pytest.approx(falling[-1], abs=1e-4)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert {block.att.drop_rate for block in model.trf_blocks} == {0.0}


def test_the_mean_loss_counts_each_token_once(tmp_path: Path) -> None:
    model: GPTModel = load_model(*write_model(tmp_path, context_length=64)).cpu()
    records = [[5, 6, 7, 8, 9, 10], [1], [2, 3]]
    total = 0.0
    for tokens in records:
        logits = model(torch.tensor([tokens]))[0].log_softmax(-1)
        total -= sum(row[target].item() for row, target in zip(logits, [*tokens[1:], 256], strict=True))
    assert instructions.mean_loss(model, records, 2, 256) == pytest.approx(total / 9, rel=1e-5)


def test_generate_end_to_end_with_data_that_are_fetched_once(
    tmp_path: Path, serve: Callable[[type], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(RECORDS).encode())

        def log_message(self, *args: Any) -> None:
            pass

    model = write_model(tmp_path / "model", context_length=256)
    monkeypatch.setattr(instructions, "DATA_URL", f"{serve(Handler)}/data.json")
    options = ("--datasets-dir", tmp_path / "data", "--output-dir", tmp_path)
    options += ("--max-epochs", "2", "--max-new-tokens", "8", "--learning-rate", "1e-12")
    options += ("--drop-rate", "0.1")
    command = ["generate", "one", *map(str, (*model, *options))]
    printed = CliRunner().invoke(test_ift.main, command, catch_exceptions=False).stdout
    assert "34 records to train on, 2 to validate, 4 to answer" in printed
    assert "batch 8, dropout 0.1" in printed
    assert json.loads((tmp_path / "data/instruction-data.json").read_text()) == RECORDS
    answered = json.loads((tmp_path / "one-ift-results.json").read_text())
    # So low a learning rate leaves the answers what they were.
    prompts = [instructions.prompt_of(record) for record in RECORDS[34:38]]
    responses = continuations(load_model(*model), get_tokenizer("bytes"), prompts, 8, GREEDY)
    assert len(set(responses)) > 1
    assert [record.pop("model_response") for record in answered] == [text.strip() for text in responses]
    assert answered == RECORDS[34:38]
    assert instructions.fetch_records(tmp_path / "data") == RECORDS
    assert fetched == ["/data.json"]
    with pytest.raises(InputError, match="already exists"):
        test_ift.main.main(command, standalone_mode=False)


def test_wrong_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model", context_length=16)
    command = ["generate", "new", *map(str, model), "--output-dir", str(tmp_path), "--data"]
    file = tmp_path / "data.json"
    for content, message in (
        (None, "data.json' does not exist"),
        ("[", "not valid JSON"),
        ("3", "must contain a JSON list of objects, or one object per line"),
        ("{}", 'record 0 has no string "instruction"'),
        ('{"instruction": "a", "output": "b"}\nno', "record 1 is not valid JSON"),
        ('[{"instruction": "a", "input": ""}]', 'record 0 has no string "output"'),
        (json.dumps(RECORDS[:5]), "5 records are too few"),
        (json.dumps(RECORDS), "context_length 16 leaves no room for a response"),
    ):
        if content is not None:
            file.write_text(content)
        with pytest.raises((InputError, click.UsageError), match=message):
            test_ift.main.main([*command, str(file)], standalone_mode=False)
    monkeypatch.setattr(instructions, "DATA_URL", "http://127.0.0.1:9/data.json")
    with pytest.raises(InputError, match=r"could not download .* --data FILE"):
        instructions.fetch_records(tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "model"]


# ------------------------------------------------------------------------------------------------------------
# Judging
# ------------------------------------------------------------------------------------------------------------


def write_results(folder: Path, **answer: Callable[[int], str]) -> list[Path]:
    """Results files, one for each model, from functions of the question's number."""
    paths = []
    for name, respond in answer.items():
        records = [{**record, "model_response": respond(i)} for i, record in enumerate(RECORDS[:12])]
        paths.append(folder / f"{name}-ift-results.json")
        paths[-1].write_text(json.dumps(records))
    return paths


class JudgeServer:
    """An OpenAI-compatible server that gives an answer the number of points that it asks for."""

    def __init__(self, serve: Callable[[type], str]) -> None:
        self.requests: list[dict] = []
        # A reply, or a status, in place of the good one.
        self.spoil: Callable[[int], str | int | None] = lambda count: None
        self.lock = threading.Lock()
        judge = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge.lock:
                    judge.requests.append({**request, "authorization": self.headers["Authorization"]})
                    spoilt = judge.spoil(len(judge.requests))
                status = spoilt if isinstance(spoilt, int) else 200
                content = spoilt if isinstance(spoilt, str) else judge.good_reply(request)
                message = {"role": "assistant", "content": content}
                reply = {
                    **{"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]},
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                }
                if status != 200:
                    reply = {"error": {"message": f"no: {self.headers['Authorization']}"}}
                body = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.url = serve(Handler) + "/v1"

    @staticmethod
    def answers(request: dict) -> list[str]:
        return re.findall(r"<answer \d+>\n(.*?)\n</answer \d+>", request["messages"][0]["content"], re.DOTALL)

    def good_reply(self, request: dict) -> str:
        scores = [int(re.search(r"\d+", answer)[0]) for answer in self.answers(request)]
        entries = {f"answer_{n}": {"comment": "", "score": score} for n, score in enumerate(scores, start=1)}
        if "response_format" in request:
            assert request["response_format"]["json_schema"]["schema"]["required"] == [*entries]
        return json.dumps(entries)


@pytest.fixture
def judge(serve: Callable[[type], str]) -> JudgeServer:
    return JudgeServer(serve)


def judge_command(judge_url: str, results: list[Path], *options: str) -> list[str]:
    folder = results[0].parent
    start = ["judge", *map(str, results), "--base-url", judge_url, "--model", "judge"]
    return [*start, "--cache", str(folder / "cache.jsonl"), *options]


def run_judge(command: list[str], key: str = KEY) -> str:
    """What the command prints; its errors are raised."""
    env = {"OPENAI_API_KEY": key}
    return CliRunner().invoke(test_ift.main, command, env=env, catch_exceptions=False).output


def test_scores_arrive_and_malformed_replies_are_asked_for_again(tmp_path: Path, judge: JudgeServer) -> None:
    results = write_results(tmp_path, good=lambda i: f"{60 + i} points", bad=lambda i: f"{i} points")
    spoilt = {2: "I like the first.", 3: '{"answer_1": {"comment": "", "score": 101}}', 5: 503}
    judge.spoil = lambda count: spoilt.get(count)
    printed = run_judge(judge_command(judge.url, results, "--parallel", "1"))
    assert len(judge.requests) == 12 + len(spoilt)
    assert "| good | 65.5 |" in printed
    assert "| bad | 5.5 |" in printed
    assert "| good minus bad | +60.0 | +60.0 to +60.0 |" in printed
    # Both answers in one prompt, in an order that changes from question to question.
    orders = {
        tuple("good" if int(answer.split()[0]) >= 60 else "bad" for answer in judge.answers(request))
        for request in judge.requests
    }
    assert orders == {("good", "bad"), ("bad", "good")}
    assert judge.requests[0]["authorization"] == f"Bearer {KEY}"
    assert judge.requests[0]["response_format"]["json_schema"]["strict"] is True
    # The same again costs nothing, and gives the same.
    assert run_judge(judge_command(judge.url, results)) == printed
    assert len(judge.requests) == 12 + len(spoilt)
    # Another judge is asked: click takes the last --model, and `localhost` is another server for all we know.
    run_judge(judge_command(judge.url, results, "--model", "another"))
    run_judge(judge_command(judge.url.replace("127.0.0.1", "localhost"), results))
    assert len(judge.requests) == 3 * 12 + len(spoilt)
    assert KEY not in printed + "".join(path.read_text() for path in tmp_path.iterdir())


def test_a_killed_judging_goes_on_without_asking_again(tmp_path: Path, judge: JudgeServer) -> None:
    results = write_results(tmp_path, good=lambda i: f"{60 + i}", bad=lambda i: f"{i}")
    go_on = threading.Event()
    judge.spoil = lambda count: go_on.wait(60) and None if count > 5 else None
    cache = tmp_path / "cache.jsonl"
    command = judge_command(judge.url, results)
    script = Script(["test_ift.py", *command, "--parallel", "1"], {"OPENAI_API_KEY": KEY})
    try:
        wait_for(lambda: cache.exists() and cache.read_text().count("\n") >= 5, "five judgements")
    finally:
        script.kill()
        go_on.set()
    with cache.open("a") as file:
        file.write('{"key": "half a li')  # as a kill in the midst of writing leaves it
    before = len(judge.requests)
    assert "| good | 65.5 |" in run_judge(command)
    asked = [request["messages"][0]["content"] for request in judge.requests]
    assert len(asked) - before == 12 - 5
    assert set(asked[:5]).isdisjoint(asked[before:])
    assert len(cache.read_text().splitlines()) == 13


def test_replies_that_stay_wrong_and_keys_that_are_none(
    tmp_path: Path, judge: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = write_results(tmp_path, good=lambda i: f"{60 + i}")
    command = judge_command(judge.url, results, "--retries", "1", "--parallel", "1")
    judge.spoil = lambda count: "no"
    with pytest.raises(RunError, match="gave no valid scores in 2 attempts"):
        run_judge(command)
    # Of the first three questions: the first with a schema, the others without, as it did not help.
    assert [("response_format" in request) for request in judge.requests][:6] == [True] + 5 * [False]
    for status, key, shown in ((400, KEY, r"\[key\]"), (401, KEY, r"\[key\]"), (401, "no", "Bearer no")):
        judge.spoil = lambda count, status=status: status
        with pytest.raises(RunError, match=f"status {status}: .*no: .*{shown}") as caught:
            run_judge(command, key)
        assert KEY not in str(caught.value)
    with pytest.raises(InputError, match="contains characters that no key has"):
        run_judge(command, "sk-a\nb")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        run_judge(command[:2], "")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=re.escape('pip install -e ".[judge]"')):
        run_judge(command)


def test_without_a_model_words_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each wrong answer shares one of its three words with a reference of one word."""
    results = write_results(
        tmp_path,
        right=lambda i: RECORDS[i]["output"].upper() + ".",
        half=lambda i: RECORDS[i]["output"] if i % 2 else f"the {RECORDS[i]['output']} or none",
    )
    test_ift.main.main(["judge", *map(str, results), "--no-llm"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "| right | 100.0 | 100.0 to 100.0 |" in printed
    assert "| half | 75.0 |" in printed  # (1 + 2 * 1 / (1 + 3)) / 2
    assert "| right minus half | +25.0 |" in printed


def test_bootstrap_intervals_are_those_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(50, 10, (1, 400))
    low, high = test_ift.bootstrap_intervals(values, seed=1)[0]
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.1)
    assert high == pytest.approx(values.mean() + error, abs=0.1)


def test_results_that_do_not_go_together(tmp_path: Path) -> None:
    one, two = write_results(tmp_path, one=lambda i: "1", two=lambda i: "2")
    records = json.loads(two.read_text())
    two.write_text(json.dumps(random.Random(0).sample(records, len(records))))
    with pytest.raises(InputError, match="record 0 is a different question"):
        test_ift.main.main(["judge", str(one), str(two), "--no-llm"], standalone_mode=False)
    two.write_text(json.dumps(records[:-1]))
    with pytest.raises(InputError, match="record 11 is a different question"):
        judging.read_questions((one, two))
    with pytest.raises(InputError, match="two files are named one"):
        judging.read_questions((one, one))
    two.write_text(json.dumps(RECORDS))
    with pytest.raises(InputError, match='record 0 has no string "model_response"'):
        judging.read_questions((one, two))
