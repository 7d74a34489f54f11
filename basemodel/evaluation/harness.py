"""lm-evaluation-harness on our models: its tasks, requests and metrics, with answers from scoring.py."""

import contextlib
import difflib
import importlib.metadata
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from basemodel.common.errors import InputError
from basemodel.evaluation.measurements import TaskResult
from basemodel.evaluation.scoring import Scorer
from basemodel.model.memory import memory_errors_explained

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

RESAMPLES = 1000  # for the standard errors of metrics that are not means
SEED = 1234  # of few-shot examples: the library's own default


@dataclass(frozen=True)
class Score:
    """A result, and what it was computed from."""

    result: TaskResult
    values: list[Any]  # one per document; none for a group of tasks
    aggregate: Callable[[list[Any]], float] | None


def require_harness() -> None:
    """Raise InputError if the library is not installed, or too old; restrict its log to errors."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # or it would fork a process per core for each bootstrap
    try:
        import lm_eval.evaluator

        _ = lm_eval.evaluator.TaskManager.load
    except (ImportError, AttributeError):
        fix = 'install it with: pip install -e ".[harness]"'
        raise InputError(f"lm-evaluation-harness is missing or too old; {fix}") from None
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_tasks(names: Sequence[str], folders: Sequence[Path], fewshot: int | None) -> dict[str, Any]:
    """The library's tasks and groups of these names, or in these YAML files, with their data; `folders` hold
    more YAML files. Raises InputError for a name that is unknown, and for a task that cannot be loaded."""
    manager = find_tasks(names, folders)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
            raise InputError(f"unknown task '{name}'{hint}")
    loaded = {name: load_task(manager, name) for name in names}
    for tasks in loaded.values():
        for name, task in tasks["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise InputError(f"task '{name}' runs code of the model or shows pictures; choose another")
            own_fewshot = task.get_config("num_fewshot")
            if own_fewshot != 0:  # in its file 0 means that examples make no sense
                task.set_config("num_fewshot", (own_fewshot or 0) if fewshot is None else fewshot)
            task.set_fewshot_seed(SEED)
    return loaded


def find_tasks(names: Sequence[str], folders: Sequence[Path]) -> "TaskManager":
    """An index of tasks that includes `names`, if they exist. To read all the library's files takes ten
    seconds, so folders named like the tasks are tried first."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks import __file__ as library

    likely = [path for path in Path(library).parent.iterdir() if path.is_dir()]
    likely = [path for path in likely if any(name.startswith(path.name) for name in names)]
    manager = TaskManager(include_path=[*likely, *folders], include_defaults=False)
    # The members of a group or tag may lie anywhere.
    if all(name in manager.all_subtasks or Path(name).is_file() for name in names):
        return manager
    return TaskManager(include_path=list(folders))


def load_task(manager: "TaskManager", name: str) -> Any:
    """A task or group with its data, which `datasets` fetches once. Raises InputError."""
    try:
        return manager.load([name])
    except Exception as error:  # whatever a task's own code, datasets and the network can raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        offline = "; run it once with a network, then the data stay in the cache of datasets (HF_HOME)"
        hint = offline if isinstance(error, ConnectionError) else ""
        raise InputError(f"task '{name}' could not be loaded: {reason}{hint}") from None


def harness_model(scorer: Scorer) -> "LM":
    """The library's view of a model. Its own cache is not used, because it pickles."""
    from lm_eval.api.model import TemplateLM

    class Model(TemplateLM):
        """Passes the library's requests on as tokens."""

        eot_token_id = scorer.tokenizer.eot_token

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return scorer.encode(string)

        def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            for (context, answer), _tokens, continuation in requests:
                if not continuation:
                    raise InputError(f"a task's answer {answer!r} has no tokens after {context[-40:]!r}")
            return scorer.log_likelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
            texts = [scorer.encode(request.args[0]) for request in requests]
            return [nats for nats, _ in scorer.log_likelihoods([([self.eot_token_id], x) for x in texts])]

        def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
            return continue_until(scorer, [request.args for request in requests])

    return Model()


def continue_until(scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Continue the prompt of each request (prompt, options) greedily, up to the first of its stop strings."""
    if any(options.get("do_sample") and options.get("temperature") != 0 for _, options in requests):
        raise InputError("the task samples its answers, which is not supported; choose another")
    counts = [options.get("max_gen_toks", 256) for _, options in requests]
    texts: dict[int, dict[str, str]] = {}
    for count in set(counts):
        prompts = [prompt for (prompt, _), own in zip(requests, counts, strict=True) if own == count]
        texts[count] = dict(zip(prompts, scorer.continue_greedily(prompts, count), strict=True))
    answers = []
    for (prompt, options), count in zip(requests, counts, strict=True):
        answer, until = texts[count][prompt], options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answer = answer.partition(stop)[0] if stop else answer
        answers.append(answer)
    return answers


def evaluate_task(scorer: Scorer, loaded: Any, limit: int | None) -> list[Score]:
    """What a model scores on a task, or on a group and its tasks, on the first `limit` documents."""
    from lm_eval.evaluator import evaluate

    hint = "a smaller --batch-size needs less, and the answers so far are kept"
    # The library's own messages go to standard error, so that the table stands alone.
    options = {"limit": limit, "bootstrap_iters": RESAMPLES, "log_samples": True}
    with contextlib.redirect_stdout(sys.stderr), memory_errors_explained(hint):
        report = evaluate(harness_model(scorer), loaded, **options)
    scores = []
    for name, values in report["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            task = loaded["tasks"].get(name)  # None: a group
            samples = report["samples"][name] if task else []
            own = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
            aggregate = task.aggregation().get(metric) if task else None
            scores.append(Score(task_result(report, name, key, limit), own, aggregate))
    return scores


def task_result(report: dict[str, Any], name: str, key: str, limit: int | None) -> TaskResult:
    """The result at `key`, which is METRIC,FILTER, of a task or group in the library's report."""
    values, (metric, _, kind) = report["results"][name], key.partition(",")
    error = values.get(f"{metric}_stderr,{kind}")
    groups = report["group_subtasks"].items()  # a group counts if it has a result of its own
    return TaskResult(
        task=name,
        metric=metric if kind == "none" else f"{metric} {kind}",
        value=float(values[key]),
        standard_error=float(error) if isinstance(error, int | float) else None,
        higher_is_better=report["higher_is_better"].get(name, {}).get(metric),
        documents=values.get("sample_len", 0),
        limit=limit,
        fewshot=report["n-shot"].get(name) or 0,
        group=next((group for group, tasks in groups if name in tasks and group in report["results"]), None),
        version=str(report["versions"].get(name)),
        harness=importlib.metadata.version("lm_eval"),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def paired_difference(one: Score, other: Score) -> tuple[float, float | None]:
    """How much more `one` scores than `other` on the same documents, and the standard error of the
    difference: over documents for a mean, else over resamples of them; None if there are no values."""
    from lm_eval.api.metrics import mean

    difference, count = one.result.value - other.result.value, len(one.values)
    if one.aggregate is None or count < 2 or len(other.values) != count:
        return difference, None
    if one.aggregate is mean:
        errors = np.subtract(one.values, other.values, dtype=float)
        return difference, errors.std(ddof=1) / math.sqrt(count)
    rng = random.Random(SEED)
    draws = [rng.choices(range(count), k=count) for _ in range(RESAMPLES)]
    resampled = [
        one.aggregate([one.values[i] for i in draw]) - other.aggregate([other.values[i] for i in draw])
        for draw in draws
    ]
    return difference, float(np.std(resampled, ddof=1))
