"""Which tokens a step takes, and at which learning rate."""

import hashlib
import itertools
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers import MODEL, random_tokens, write_dataset

from basemodel.common.errors import InputError
from basemodel.data.hub import fingerprint_files
from basemodel.data.sequences import Sequences, match_tokenizer
from basemodel.data.token_files import TokenFiles
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig
from basemodel.training.run import Run, check_tokens, open_data
from basemodel.training.schedule import BatchPlan, learning_rate_at, plan_batches


def sequences(tmp_path: Path, tokens: int = 1000, start: int = 0, length: int = 10) -> Sequences:
    write_dataset(tmp_path, train=np.arange(tokens, dtype=np.uint16))
    return Sequences(TokenFiles(tmp_path, "train"), start, length, seed=42)


def config(**values: object) -> TrainConfig:
    return TrainConfig(**{"dataset": "a/b", "microbatch_size": 4, "min_train_tokens": -1, **values})


@pytest.mark.parametrize("meta", [None, {"description": "tokens", "token_dtype": "uint16", "files": {}}])
def test_published_data_sets_say_little_of_themselves(tmp_path: Path, meta: dict | None) -> None:
    folder = write_dataset(tmp_path, meta=meta)
    match_tokenizer(folder, GPTConfig(**MODEL))
    data = (folder / "train.safetensors").read_bytes()
    found = fingerprint_files(folder, ["train"])["train.safetensors"]
    assert (found["size"], found["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_sequence_i_of_the_first_epoch_is_where_the_contract_says(tmp_path: Path) -> None:
    data = sequences(tmp_path, start=7)
    batch = data.read(3, 2).tolist()
    assert batch == [list(range(37, 48)), list(range(47, 58))]


@pytest.mark.parametrize(
    ("tokens", "start", "count"), [(101, 0, 10), (100, 0, 9), (111, 10, 10), (10, 0, 0), (5, 9, 0)]
)
def test_an_epoch_holds_whole_sequences_with_their_targets(tmp_path: Path, tokens, start, count) -> None:
    assert sequences(tmp_path, tokens, start).count == count


def test_later_epochs_go_through_the_same_sequences_in_orders_of_their_own(tmp_path: Path) -> None:
    data = sequences(tmp_path)
    epochs = [data.read(epoch * data.count, data.count)[:, 0].tolist() for epoch in range(3)]
    assert epochs[0] == sorted(epochs[0])
    assert sorted(epochs[1]) == sorted(epochs[2]) == epochs[0]
    assert epochs[1] != epochs[0] and epochs[2] != epochs[1]
    assert sequences(tmp_path).read(data.count, data.count)[:, 0].tolist() == epochs[1]
    straddling = data.read(data.count - 2, 4)[:, 0].tolist()
    assert straddling == epochs[0][-2:] + epochs[1][:2]


def test_the_global_batch_is_the_same_however_it_is_split() -> None:
    splits = [(12, 1, 1), (4, 1, 3), (2, 3, 2), (1, 2, 6)]  # microbatch, accumulation, processes
    for step in (0, 5):
        batches = []
        for microbatch, accumulation, processes in splits:
            plan = plan_batches(
                config(microbatch_size=microbatch, gradient_accumulation_steps=accumulation),
                10,
                processes,
                1000,
            )
            batches.append(batch_of(plan, step))
        assert all(batch == list(range(step * 12, step * 12 + 12)) for batch in batches)


def batch_of(plan: BatchPlan, step: int) -> list[int]:
    places = [place for rank in range(plan.processes) for place in plan.microbatches(step, rank)]
    assert max(count for _, count in places) <= plan.microbatch_size
    return sorted(n for first, count in places for n in range(first, first + count))


@pytest.mark.parametrize("split", [(12, 1, 1), (4, 1, 3), (2, 3, 2), (1, 2, 6), (3, 4, 1), (4, 3, 1)])
def test_the_first_batches_are_halves_of_the_same_sequences_however_they_are_split(
    split: tuple[int, int, int],
) -> None:
    """40% of ten batches of 12 sequences are eight of 6."""
    microbatch, accumulation, processes = split
    settings = config(
        microbatch_size=microbatch,
        gradient_accumulation_steps=accumulation,
        half_batch_percent=40,
        min_train_tokens=10 * 12 * 5 - 1,
    )
    plan = plan_batches(settings, 5, processes, 1000)
    sizes = [6] * 8 + [12] * 6
    assert plan.steps == len(sizes)
    for step, size in enumerate(sizes):
        assert batch_of(plan, step) == list(range(sum(sizes[:step]), sum(sizes[:step]) + size))
        assert plan.tokens(step) == 5 * sum(sizes[:step])
    assert [plan.steps_for(n) for n in (0, 0.4, 0.5, 3.9, 4, 4.5, 5, 10)] == [0, 0, 1, 7, 8, 8, 9, 14]


def test_the_learning_rate_of_half_batches_follows_the_tokens() -> None:
    """Each two of its halves together have the rates of a whole batch, as nearly as halves can."""
    schedule = {"learning_rate": 1.0, "lr_schedule": "wsd", "warmup_period_percent": 10}
    runs = {
        percent: Run(Path("x"), settings, GPTConfig(**MODEL), plan_batches(settings, 10, 1, 1000))
        for percent in (0, 30)
        for settings in [config(**schedule, min_train_tokens=40 * 40, half_batch_percent=percent)]
    }
    rates = {n: [run.learning_rate_at(step) for step in range(run.plan.steps)] for n, run in runs.items()}
    assert rates[30][:24:2] == rates[0][:12] and rates[30][24:] == rates[0][12:]
    assert rates[30][1] == pytest.approx(1.5 / 4)


@pytest.mark.parametrize(("minimum", "steps"), [(1, 1), (40, 1), (41, 2), (400, 10), (-1, 25)])
def test_tokens_are_rounded_up_to_whole_global_batches_and_exact_multiples_stay(
    minimum: int, steps: int
) -> None:
    assert plan_batches(config(min_train_tokens=minimum), 10, 1, 103).steps == steps


def test_learning_rate_warms_up_then_falls_along_a_cosine_to_a_tenth() -> None:
    scheduled = config(learning_rate=1.0, lr_schedule="cosine", warmup_period_percent=10)
    rates = [learning_rate_at(step, 100, scheduled) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1)
    middle = rates[10:]
    assert all(one > other for one, other in itertools.pairwise(middle))
    assert middle[44] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))
    assert learning_rate_at(99, 100, config(learning_rate=0.3)) == 0.3


def test_random_tokens_can_be_learnt() -> None:
    """The tests' data are not noise: otherwise none of them would notice training that does nothing."""
    tokens = random_tokens(1000).astype(int)
    assert set((np.diff(tokens) % 64).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("index", "refused"), [(6, False), (7, True), (47, True), (48, False)])
def test_the_tokens_that_a_run_uses_are_checked_and_no_others(
    tmp_path: Path, index: int, refused: bool
) -> None:
    """Four sequences of ten tokens after the seventh: the last target is token 47."""
    tokens = np.zeros(100, dtype=np.uint16)
    tokens[index] = 64
    write_dataset(tmp_path / "a/b", train=tokens, validation=tokens)
    model = GPTConfig(**{**MODEL, "context_length": 10})
    settings = {"start_train_token": 7, "start_val_token": 7, "validation_interval": 1}
    data = open_data(config(**settings, validation_batches=1), model, tmp_path)
    for used, (part, parts) in itertools.product(((4, 1), (1, 4)), ((0, 1), (0, 3), (1, 3), (2, 3))):
        found = refused and part == (parts - 1 if index == 47 else 0)
        with pytest.raises(InputError, match=f"token 64 at index {index} ") if found else nullcontext():
            check_tokens(data, *used, share=(part, parts))
