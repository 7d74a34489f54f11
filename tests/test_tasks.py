"""test_harness.py scores tasks of lm-evaluation-harness like a slow loop over logits."""

import json
import math
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from folder_hub import serve_folder
from helpers import Sandbox, option_defaults, refused, run_script, write_model
from safetensors.torch import load_file, save_file

from basemodel.common.errors import InputError, RunError
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation.harness import (
    continue_until,
    evaluate_task,
    harness_model,
    load_tasks,
    paired_difference,
    require_harness,
)
from basemodel.evaluation.measurements import (
    MeasuredLoss,
    TaskResult,
    add_task_results,
    headlines,
    read_task_results,
    write_test_loss,
)
from basemodel.evaluation.scoring import Scorer
from basemodel.model.weights import load_model
from basemodel.results.export import write_model_card
from compare_runs import read_run, table
from gpt import GPTModel
from test_harness import label_models, main

CONTEXT = 48  # bytes; less than some of the texts below
WORDS = "the cat sat on a mat and then it ran away from big dog under blue sky"
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
LAST_WORD = {
    "task": "last_word",
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
WHOLE = {
    "task": "whole",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
WRITE = {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["t"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def sentence(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS.split(), rng.integers(least, most)))


def documents() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "query": sentence(rng, 2, 12),
            "choices": [sentence(rng, 1, 4) for _ in range(3)],
            "gold": int(rng.integers(3)),
            "text": sentence(rng, 4, 16),
        }
        for _ in range(32)
    ]


@dataclass
class Tasks:
    """Two models and four tasks on the same documents."""

    folder: Path
    documents: list[dict[str, Any]]
    models: list[tuple[Path, Path]]

    def run(self, *options: str | Path, models: int = 2) -> str:
        done = CliRunner().invoke(main, self.command(*options, models=models), catch_exceptions=False)
        return done.stdout

    def command(self, *options: str | Path, models: int = 2) -> list[str]:
        files = [path for pair in self.models[:models] for path in pair]
        return [str(word) for word in (*files, "--include-path", self.folder / "tasks", *options)]

    def load(self, index: int) -> GPTModel:
        return load_model(*self.models[index])

    def scorer(self, index: int, cache: Path) -> Scorer:
        return Scorer(self.load(index), get_tokenizer("bytes"), batch_size=7, cache=cache)


def write_task(folder: Path, values: dict[str, Any], data: Path) -> None:
    """A task's file, in JSON, which is YAML."""
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    values = {**values, **source, "test_split": "test", "metadata": {"version": 1.0}}
    (folder / f"{values['task']}.yaml").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tasks]:
    """Models that have learnt some of the words, so that they are sometimes right."""
    folder = tmp_path_factory.mktemp("tasks")
    tasks = Tasks(folder, documents(), [])
    (folder / "tasks").mkdir()
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in tasks.documents)
    )
    for values in (CHOICE, {**CHOICE, "task": "alone", "num_fewshot": 0}, LAST_WORD, WHOLE, WRITE):
        write_task(folder / "tasks", values, folder / "documents.jsonl")
    text = torch.tensor(list(" ".join(document["text"] for document in tasks.documents * 2).encode()))
    for seed, steps in ((1, 60), (2, 30)):
        files = write_model(folder / f"model{seed}", seed, context_length=CONTEXT)
        (files[1].parent / "meta.json").write_text("{}")  # so that it counts as a checkpoint
        model = load_model(*files)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(steps):
            first = 37 * step % 1000
            rows = text[first : first + 8 * (CONTEXT + 1)].view(8, CONTEXT + 1)
            loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, files[1])
        tasks.models.append(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        require_harness()
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "home")
        yield tasks


@torch.no_grad()
def slow(model: GPTModel, context: str, answer: str) -> tuple[float, bool]:
    """The answer's log-likelihood, in a pass of its own, and whether each byte is the most likely. The model
    sees only the end of a text that is longer than its context."""
    tokens = list((context + answer).encode()[-CONTEXT - 1 :])
    count = len(answer.encode())
    rows = model(torch.tensor([tokens[:-1]]))[0, -count:].double().log_softmax(-1)
    nats = sum(row[token].item() for row, token in zip(rows, tokens[-count:], strict=True))
    return nats, rows.argmax(-1).tolist() == tokens[-count:]


def slow_values(tasks: Tasks, index: int) -> dict[tuple[str, str], list[float]]:
    """The metrics' values of each document, by task and metric."""
    model = tasks.load(index)
    values: dict[tuple[str, str], list[float]] = {}
    for document in tasks.documents:
        nats = [slow(model, document["query"], " " + choice)[0] for choice in document["choices"]]
        by_length = [value / len(choice) for value, choice in zip(nats, document["choices"], strict=True)]
        context, _, word = document["text"].rpartition(" ")
        likelihood, best = slow(model, context, " " + word)
        for key, value in {
            ("choice", "acc"): float(np.argmax(nats) == document["gold"]),
            ("choice", "acc_norm"): float(np.argmax(by_length) == document["gold"]),
            ("last_word", "perplexity"): likelihood,
            ("last_word", "acc"): float(best),
        }.items():
            values.setdefault(key, []).append(value)
    return values


def standard_error(values: Any) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def rows_of(printed: str) -> dict[tuple[str, str], list[str]]:
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return {(row[0], row[1][:-2]): row[2:] for row in rows[2:]}


def numbers(cell: str) -> list[float]:
    return [float(part) for part in cell.replace(",", "").split(" ± ")]


def test_both_formats_equal_a_slow_loop_over_logits(tasks: Tasks, tmp_path: Path) -> None:
    """Multiple choice and the last word: values, standard errors, and differences document by document."""
    slowly = [slow_values(tasks, index) for index in range(2)]
    options = ("--tasks", "choice,last_word", "--cache", tmp_path, "--batch-size", "7")
    rows = rows_of(tasks.run(*options))
    assert list(rows) == list(slowly[0]) and 0 < np.mean(slowly[0]["last_word", "acc"]) < 1
    for key, (documents, one, other, difference) in rows.items():
        values = [np.array(values_by_key[key]) for values_by_key in slowly]
        assert documents == "32"
        if key[1] == "perplexity":
            ppl = [math.exp(-nats.mean()) for nats in values]
            assert numbers(one)[0] == pytest.approx(ppl[0], abs=1e-3)
            assert numbers(difference)[0] == pytest.approx(ppl[1] - ppl[0], rel=1e-4)
            # The resampled errors, by the delta method: as good as 1,000 resamples of 32 documents are.
            assert numbers(one)[1] == pytest.approx(ppl[0] * standard_error(values[0]), rel=0.35)
            slope = ppl[1] * values[1] - ppl[0] * values[0]
            assert numbers(difference)[1] == pytest.approx(standard_error(slope), rel=0.35)
            continue
        for cell, expected in ((one, values[0]), (other, values[1]), (difference, values[1] - values[0])):
            assert numbers(cell) == pytest.approx([expected.mean(), standard_error(expected)], abs=6e-5)
    results = {(r.task, r.metric): r for r in read_task_results(tasks.models[1][1].parent)}
    assert results.keys() >= rows.keys()
    assert results["choice", "acc"].value == np.mean(slowly[1]["choice", "acc"])
    perplexity = math.exp(-np.mean(slowly[1]["last_word", "perplexity"]))
    assert results["last_word", "perplexity"].value == pytest.approx(perplexity, rel=1e-5)


def test_whole_texts_and_written_answers_equal_slow_loops(tasks: Tasks, tmp_path: Path) -> None:
    """Documents longer than the context, in the harness's windows: each byte is scored once, and the last
    window is full."""
    model, scorer = tasks.load(0), tasks.scorer(0, tmp_path)
    (whole,) = evaluate_task(scorer, load_tasks(["whole"], [tasks.folder / "tasks"], None)["whole"], None)
    nats, size = 0.0, 0
    for document in tasks.documents:
        tokens = [256, *document["text"].encode()]
        size += len(tokens) - 1
        for start in range(1, len(tokens), CONTEXT):
            end = min(start + CONTEXT, len(tokens))
            seen = torch.tensor([tokens[max(0, end - 1 - CONTEXT) : end - 1]])
            with torch.no_grad():
                log_probabilities = model(seen)[0].double().log_softmax(-1)[start - end :]
            nats -= sum(
                row[token].item() for row, token in zip(log_probabilities, tokens[start:end], strict=True)
            )
    assert whole.result.value == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert max(len(document["text"]) for document in tasks.documents) > CONTEXT + 1
    assert scorer.cut == 0, "long documents are read in parts"
    scorer.log_likelihoods([([256] * CONTEXT, [1, 2]), ([256] * CONTEXT, [1])])
    assert scorer.cut == 1

    requests = [(document["query"], WRITE["generation_kwargs"]) for document in tasks.documents[:5]]
    written = continue_until(scorer, requests)
    for (query, _), answer in zip(requests, written, strict=True):
        tokens = list(query.encode())
        for _ in range(12):
            tokens.append(model(torch.tensor([tokens[-CONTEXT:]]))[0, -1].argmax().item())
        assert answer == bytes(tokens[len(query) :]).decode(errors="replace").partition("t")[0]


def test_each_length_of_an_answer_is_kept_by_itself(tasks: Tasks, tmp_path: Path) -> None:
    prompts = [document["query"] for document in tasks.documents[:3]]
    kept, fresh = ({n: tasks.scorer(0, tmp_path / str(n * each)) for n in (3, 9)} for each in (0, 1))
    short, long = ([kept[n].continue_greedily(prompts, n) for n in order] for order in ((3, 9), (9, 3)))
    assert short == long[::-1] == [fresh[n].continue_greedily(prompts, n) for n in (3, 9)]
    assert [len(text) for text in short[0] + short[1]] == [3] * 3 + [9] * 3


def test_options_and_their_defaults(tasks: Tasks, tmp_path: Path) -> None:
    assert option_defaults(main) == {
        "--tasks": "hellaswag,lambada_openai,arc_easy,piqa,winogrande",
        "--batch-size": "32",
        "--cache": "harness-cache",
    }
    options = ("--tasks", "choice", "--limit", "10", "--cache", tmp_path)
    assert rows_of(tasks.run(*options, models=1))["choice (first 10 documents)", "acc"][0] == "10"


def test_few_shot_questions_come_after_solved_ones(tasks: Tasks, tmp_path: Path) -> None:
    scorer = tasks.scorer(0, tmp_path)
    asked: list[str] = []
    scorer.encode = lambda text: asked.append(text) or list(text.encode())
    by_name = load_tasks(["choice", "alone"], [tasks.folder / "tasks"], 2)
    assert evaluate_task(scorer, by_name["alone"], 3)[0].result.fewshot == 0, "its file says that none help"
    loaded = by_name["choice"]
    asked.clear()
    result = evaluate_task(scorer, loaded, 3)[0].result
    assert (result.fewshot, result.title) == (2, "choice acc (2-shot, first 3 documents)")
    solved = {f"{document['query']} {document['choices'][document['gold']]}" for document in tasks.documents}
    for text in filter(None, asked):
        *examples, question = text.split("\n\n")
        assert len(examples) == 2 and set(examples) <= solved
        assert any(question.startswith(document["query"]) for document in tasks.documents[:3])


KILL = """
import os, signal
from basemodel.evaluation.scoring import Scorer
batches, score = [], Scorer._score
def killed(self, batch):
    batches.append(batch)
    if len(batches) > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(self, batch)
Scorer._score = killed
"""


def test_a_killed_evaluation_goes_on_without_computing_anything_again(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tasks", "choice,last_word", "--batch-size", "16", "--cache", tmp_path / "cache")
    killed = run_script("test_harness.py", *tasks.command(*options, models=1), before=KILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes() + b'{"key": "cut')
    scored: list[str] = []
    score = Scorer._score

    def counted(self: Scorer, batch: list) -> list:
        scored.extend(f"{id(self)} {window}" for window in batch)
        return score(self, batch)

    monkeypatch.setattr(Scorer, "_score", counted)
    resumed = tasks.run(*options, models=1)
    rest = len(scored)
    undisturbed = tasks.run(*options[:-1], tmp_path / "other", models=1)
    assert len(scored) - rest == len(set(scored[rest:])), "each window once"
    assert len(scored) - rest == rest + 4 * 16, "what the killed process had computed is not computed again"
    assert resumed == undisturbed
    del scored[:]
    assert tasks.run(*options, models=1) == resumed and not scored


def test_answers_of_one_model_are_not_taken_for_anothers(tasks: Tasks, tmp_path: Path) -> None:
    model_json, weights = tasks.models[0]
    config = json.loads(model_json.read_text())
    tensors = load_file(weights)
    tensors["final_norm.shift"] = tensors["final_norm.shift"] + 1e-6
    for name, changed, saved in (
        ("heads", {**config, "n_heads": 4}, load_file(weights)),
        ("weights", config, tensors),
        ("copy", config, load_file(weights)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(json.dumps(changed))
        save_file(saved, tmp_path / name / "model.safetensors")
        model = load_model(tmp_path / name / "model.json", tmp_path / name / "model.safetensors")
        Scorer(model, get_tokenizer("bytes"), batch_size=1, cache=tmp_path / "cache")
    tasks.scorer(0, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def write_hub(folder: Path, documents: list[dict[str, Any]]) -> None:
    """Documents in the form of HellaSwag and LAMBADA, where the library's own tasks look for them."""
    hellaswag, lambada = folder / "Rowan/hellaswag", folder / "EleutherAI/lambada_openai"
    for path in (hellaswag, lambada):
        path.mkdir(parents=True)
    lines = [
        {
            "activity_label": "Running",
            "ctx_a": document["query"],
            "ctx_b": "then it",
            "endings": document["choices"],
            "label": str(document["gold"]),
        }
        for document in documents
    ]
    for split in ("train", "validation"):
        (hellaswag / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [json.dumps({"text": document["text"]}) + "\n" for document in documents]
    (lambada / "test.jsonl").write_text("".join(texts))


def test_hellaswag_and_lambada_come_from_the_hub_once(tasks: Tasks, tmp_path: Path) -> None:
    """The library's own tasks, on copies of their data, equal a slow loop. Then these need no Hub any more;
    for a third task, one line says that its data are missing."""
    write_hub(tmp_path / "hub", tasks.documents)
    model_json, weights = tasks.models[1]
    command = ["test_harness.py", model_json, weights, "--tasks", "hellaswag,lambada_openai", "--cache"]
    with serve_folder(tmp_path / "hub") as hub:
        env = hub.env(tmp_path / "home")
        first = run_script(*command, tmp_path / "cache", env=env)
        assert first.returncode == 0, first.stderr
    model, results = tasks.load(1), {(r.task, r.metric): r.value for r in read_task_results(weights.parent)}
    right, likelihoods = [], []
    for document in tasks.documents:
        context = f"Running: {document['query']} Then it"
        nats = [slow(model, context, f" {choice}")[0] for choice in document["choices"]]
        right.append(np.argmax(nats) == document["gold"])
        start, _, word = document["text"].rpartition(" ")
        likelihoods.append(slow(model, start, f" {word}")[0])
    assert results["hellaswag", "acc"] == np.mean(right)
    assert results["lambada_openai", "perplexity"] == pytest.approx(math.exp(-np.mean(likelihoods)), rel=1e-5)

    command[command.index("--tasks") + 1] = "hellaswag,lambada_openai,piqa"
    error = refused(*command, tmp_path / "cache", env=env | {"HF_HUB_OFFLINE": "1"})
    assert error.startswith("task 'piqa' could not be loaded: ")
    assert error.endswith("run it once with a network, then the data stay in the cache of datasets (HF_HOME)")


def test_a_group_is_the_mean_of_its_tasks(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))  # its own tasks take 10 s to read
    group = {"group": "both", "task": ["choice", "last_word"], "metadata": {"version": 1.0}}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    loaded = load_tasks(["both"], [tasks.folder / "tasks", tmp_path], None)["both"]
    one, other = (
        {(score.result.task, score.result.metric): score for score in evaluate_task(scorer, loaded, None)}
        for scorer in (tasks.scorer(0, tmp_path / "cache"), tasks.scorer(1, tmp_path / "cache"))
    )
    keys = [("choice", "acc"), ("last_word", "acc")]
    for scores in (one, other):
        values = np.concatenate([scores[key].values for key in keys])
        assert scores["both", "acc"].result.value == pytest.approx(values.mean())
    difference = one["both", "acc"].result.value - other["both", "acc"].result.value
    assert paired_difference(one["both", "acc"], other["both", "acc"]) == (difference, None)
    assert one["both", "acc"].result.documents == 64
    assert [one[key].result.group for key in (*keys, ("both", "acc"))] == ["both", "both", None]


def test_the_library_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=re.escape('too old; install it with: pip install -e ".[harness]"')):
        require_harness()


def test_wrong_evaluations(tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import manager

    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))  # its own tasks take 10 s to read
    one, (model_json, _) = tasks.models
    wide, small = write_model(tmp_path / "small", vocab_size=100)
    (tmp_path / "file").touch()
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, {**CHOICE, "task": "runs", "unsafe_code": True}, tasks.folder / "documents.jsonl")
    write_task(folder, {**CHOICE, "task": "empty"}, tmp_path / "nothing.jsonl")
    write_task(folder, {**CHOICE, "task": "odd", "doc_to_choice": ""}, tasks.folder / "documents.jsonl")
    for arguments, message in (
        ((*one, "--tasks", "choise"), "unknown task 'choise'; did you mean choice"),
        ((*one, "--tasks", "quite_another_thing"), "unknown task 'quite_another_thing'$"),
        ((*one, "--tasks", " , "), "--tasks names no task"),
        ((*one, model_json), "model.json has no partner"),
        ((*one, *one), "model.safetensors is given twice"),
        ((*one, "--include-path", tmp_path / "none"), "none' does not exist"),
        ((*one, "--tasks", "runs"), "task 'runs' runs code of the model"),
        (
            (*one, "--tasks", "empty"),
            "task 'empty' could not be loaded: FileNotFound.*nothing.jsonl'$",
        ),
        ((*one, "--cache", tmp_path / "file"), "File exists: .*file"),
        ((wide, small), "vocabulary of 100 does not hold the 257 tokens"),
        ((model_json, tmp_path / "none.safetensors"), "none.safetensors: no such file"),
    ):
        options = ["--cache", tmp_path / "cache", "--include-path", tasks.folder / "tasks"]
        command = map(str, (*options, "--include-path", folder, *arguments))
        with pytest.raises((InputError, OSError, click.UsageError), match=message):
            main.main(list(command), standalone_mode=False)


def test_damaged_weights_and_answers_without_tokens(tasks: Tasks, tmp_path: Path) -> None:
    scorer = tasks.scorer(0, tmp_path)
    with torch.no_grad():
        scorer.model.final_norm.scale[0] = math.nan
    with pytest.raises(RunError, match="not finite: its weights are damaged"):
        scorer.log_likelihoods([([1], [2])])
    with pytest.raises(InputError, match="answer '' has no tokens after 'the cat'"):
        harness_model(scorer)._loglikelihood_tokens([(("the cat", ""), [1], [])])
    with pytest.raises(InputError, match="samples its answers"):
        continue_until(scorer, [("the", {"do_sample": True, "temperature": 0.8})])


def test_models_have_short_names() -> None:
    runs = [Path(f"runs/{name}/checkpoints/best/model.safetensors") for name in ("one", "two")]
    assert label_models(runs) == ["one", "two"]
    assert label_models([*runs, Path("gpt2/model.safetensors")]) == [
        "runs/one/checkpoints/best",
        "runs/two/checkpoints/best",
        "gpt2",
    ]
    assert label_models(runs[:1]) == ["runs/one/checkpoints/best"]
    two = [Path("models/a.safetensors"), Path("models/b.safetensors")]
    assert label_models(two) == ["models/a.safetensors", "models/b.safetensors"]


RESULT = TaskResult("choice", "acc", 0.25, 0.0125, True, 400, None, 0, None, "1.0", "0.4.13", "now")


def test_results_are_kept_for_the_comparison_and_the_card(sandbox: Sandbox) -> None:
    for run in ("one", "two"):
        sandbox.write_run(run)
        (sandbox.run_dir(run) / "checkpoints/best").mkdir(parents=True)
    best = sandbox.run_dir("one") / "checkpoints/best"
    add_task_results(best, [RESULT, replace(RESULT, metric="acc_norm", value=0.3)])
    add_task_results(best, [replace(RESULT, value=0.2), replace(RESULT, limit=10, documents=10, value=0.9)])
    assert [result.value for result in read_task_results(best)] == [0.2, 0.3, 0.9]
    one, two = table([read_run(sandbox.path / "runs", run) for run in ("one", "two")])
    assert (one["choice acc_norm"], two["choice acc_norm"]) == ("0.3000 ± 0.0125", "–")
    assert list(one) == list(two) and "choice acc" not in one

    loss = MeasuredLoss("me/tokens", "validation", 0, 320, 16, 3.21, 24.8, 0.012, None, "now")
    write_test_loss(best, loss)
    model = load_model(*write_model(sandbox.path / "model"))
    write_model_card(sandbox.path, "me/model", model, best / "model.safetensors", None)
    card = (sandbox.path / "README.md").read_text()
    assert "| choice acc_norm | 0.3000 ± 0.0125 (lm-evaluation-harness 0.4.13) |" in card
    assert "| Test loss | 3.210 nats per token, perplexity 24.80 (me/tokens, validation, 320 tokens" in card


def test_headlines_are_whole_tasks_by_their_best_known_metric() -> None:
    results = [
        replace(RESULT, task="words", metric="perplexity"),
        replace(RESULT, task="words"),
        replace(RESULT, task="group"),
        replace(RESULT, task="member", group="group"),
        replace(RESULT, task="try", limit=5),
        replace(RESULT, task="bits", metric="bits_per_byte"),
    ]
    assert [result.title for result in headlines(results)] == ["words acc", "group acc", "bits bits_per_byte"]
