"""test_loss.py measures the same loss as an independent sum over tokens."""

import itertools
import json
import math
import statistics
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiktoken
import torch
from click.testing import CliRunner
from helpers import MODEL, Sandbox, option_defaults, write_dataset, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import EXAMPLES

from basemodel.common.errors import InputError
from basemodel.data.sequences import Sequences
from basemodel.data.token_files import TokenFiles
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation.measurements import read_test_loss
from basemodel.model.config import GPTConfig
from basemodel.model.weights import load_model
from gpt import GPTModel
from test_loss import main, mean_and_error, sequence_losses

TEXTS = ["as quick as a fox.\n", "Größe, 語言 and язык 👩‍👩‍👧", "def f(x):\n\treturn x ** 2\n"] * 12


def measure(sandbox: Sandbox, *arguments: str | Path) -> str:
    command = ["--dataset", "test/texts", "--start-token", "0", sandbox.datasets, *arguments]
    return CliRunner().invoke(main, list(map(str, command)), catch_exceptions=False).stdout


def figures(printed: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)


def write_texts(sandbox: Sandbox, tokenizer_name: str) -> torch.Tensor:
    tokenizer = get_tokenizer(tokenizer_name)
    tokens = torch.tensor(
        [t for text in TEXTS for t in (*tokenizer.encode_ordinary(text), tokenizer.eot_token)]
    )
    write_dataset(sandbox.datasets / "test/texts", validation=tokens.numpy().astype("uint16"))
    return tokens


@pytest.mark.parametrize("tokenizer_name", ["bytes", "gpt2"])
def test_figures_are_those_of_a_sum_token_by_token(
    sandbox: Sandbox, gpt2: tiktoken.Encoding, tokenizer_name: str
) -> None:
    """Bits per byte are lm-evaluation-harness's: minus the sum of log-likelihoods in bits, over the bytes
    of the text in UTF-8. Here that is the text that the targets stand for."""
    tokens = write_texts(sandbox, tokenizer_name)
    tokenizer = get_tokenizer(tokenizer_name)
    config = {"vocab_size": tokenizer.n_vocab, "tokenizer": tokenizer_name}
    files = write_model(sandbox.path / "model", **config)
    count = (len(tokens) - 1) // 16
    output = measure(sandbox, *files, "--tokens", str(count * 16))
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(**{**MODEL, **config})).eval()
    losses = []  # of each sequence, in nats
    with torch.no_grad():
        for first in range(0, count * 16, 16):
            logits = model(tokens[None, first : first + 16])[0].double().log_softmax(-1)
            losses.append(-sum(row[tokens[first + i + 1]].item() for i, row in enumerate(logits)))
    scored = [token for token in tokens[1 : count * 16 + 1].tolist() if token != tokenizer.eot_token]
    # A document's first bytes, less what the first token stands for, and its cut end, from the text itself.
    text = "".join(TEXTS).encode("utf-8")
    size = len(text) - len(tokenizer.decode_bytes(tokens[:1].tolist()))
    rest = [token for token in tokens[count * 16 + 1 :].tolist() if token != tokenizer.eot_token]
    size -= len(tokenizer.decode_bytes(rest))
    assert size == len(tokenizer.decode_bytes(scored))
    loss, error = statistics.mean(losses) / 16, statistics.stdev(losses) / 16 / math.sqrt(count)
    expected = {
        "Loss against our test dataset": pytest.approx(loss, abs=6e-4),
        "Perplexity": pytest.approx(math.exp(loss), abs=6e-3),
        "Standard error": pytest.approx(error, abs=6e-5),
        "Bits per byte": pytest.approx(sum(losses) / size / math.log(2), abs=6e-5),
    }
    printed = {name: float(value) for name, value in figures(output).items()}
    assert printed == expected
    assert list(printed) == list(expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    files = write_model(tmp_path_factory.mktemp("checkpoint"))
    (files[1].parent / "meta.json").write_text("{}")
    return files


@settings(EXAMPLES, max_examples=20)
@given(rng=st.randoms(use_true_random=True))
def test_any_slice_in_any_batches_measures_what_a_slow_sum_does(
    checkpoint: tuple[Path, Path], rng: Random
) -> None:
    """Sequences of any length up to the model's, within documents or not, and fewer than were asked for."""
    length, start = rng.randint(1, 16), rng.randint(0, 30)
    tokens = [
        rng.choice([256, *b"ab c"]) for _ in range(start + length * rng.randint(1, 9) + rng.randint(1, 9))
    ]
    asked, masked = rng.randint(length, 9 * length), rng.choice([True, False])
    sandbox = Sandbox(checkpoint[0].parent)
    write_dataset(sandbox.datasets / "test/texts", validation=np.array(tokens, np.uint16))
    options = ["--start-token", start, "--tokens", asked, "--context-length", length]
    options += ["--batch-size", rng.randint(1, 5), *(["--document-masking"] if masked else [])]
    measure(sandbox, *checkpoint, *options)

    model, losses, size = load_model(*checkpoint), [], 0
    for first in range(start, min(start + asked // length * length, len(tokens) - length), length):
        row = tokens[first : first + length + 1]
        starts = [0, *(i for i in range(1, length) if masked and row[i] == 256), length]
        nats = 0.0
        for begin, end in itertools.pairwise(starts):
            logits = model(torch.tensor([row[begin:end]]))[0].double().log_softmax(-1)
            nats -= sum(logits[i, row[begin + i + 1]].item() for i in range(end - begin))
        losses.append(nats / length)
        size += sum(token != 256 for token in row[1:])
    found = read_test_loss(checkpoint[1].parent)
    assert (found.tokens, found.context_length) == (len(losses) * length, length)
    assert found.loss == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-4)
    spread = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    assert found.standard_error == (spread if spread is None else pytest.approx(spread, rel=1e-3, abs=1e-6))
    bits = sum(losses) * length / math.log(2) / size if size else None
    assert found.bits_per_byte == (bits if bits is None else pytest.approx(bits, rel=1e-5))


def test_defaults_are_the_published_test_set() -> None:
    assert option_defaults(main) == {
        "--dataset": "gpjt/fineweb-gpt2-tokens",
        "--split": "validation",
        "--start-token": "50000000",
        "--tokens": "19660800",
        "--batch-size": "6",
    }


def test_several_models_share_one_pass_and_give_the_figures_of_each_alone(sandbox: Sandbox) -> None:
    write_texts(sandbox, "bytes")
    models = [write_model(sandbox.path / name, seed) for seed, name in enumerate(("one", "two"))]
    printed = measure(sandbox, *models[0], *models[1], "--tokens", "640")
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if ".safetensors |" in line]
    assert [row[0] for row in rows] == [str(weights) for _, weights in models]
    alone = measure(sandbox, *models[1], "--tokens", "640")
    assert rows[1][2:5] == [figures(alone)[key] for key in ("Standard error", "Perplexity", "Bits per byte")]
    assert float(rows[1][5].split(" ± ")[0]) == pytest.approx(float(rows[1][1]) - float(rows[0][1]), abs=2e-4)
    assert not (models[0][1].parent / "test-loss.json").exists(), "no checkpoint, nothing is left beside it"


def test_one_pass_reads_the_data_once(sandbox: Sandbox) -> None:
    write_texts(sandbox, "bytes")
    reads = []

    class Counted(Sequences):
        def read(self, first: int, count: int) -> torch.Tensor:
            reads.append((first, count))
            return super().read(first, count)

    sequences = Counted(TokenFiles(sandbox.datasets / "test/texts", "validation"), 0, 16, 0)
    torch.manual_seed(0)
    models = [GPTModel(GPTConfig(**{**MODEL, "vocab_size": 257})).eval() for _ in range(3)]
    losses = sequence_losses(models, sequences, 10, 4, False)
    assert reads == [(0, 4), (4, 4), (8, 2)]
    assert torch.equal(losses[2], sequence_losses(models[2:], sequences, 10, 3, False)[0])


def test_the_loss_of_a_checkpoint_is_kept_beside_it(sandbox: Sandbox) -> None:
    write_texts(sandbox, "bytes")
    files = write_model(sandbox.path / "checkpoint")
    (sandbox.path / "checkpoint/meta.json").write_text("{}")
    model_json, weights = files
    printed = measure(sandbox, model_json, weights.parent, "--tokens", "320")
    result = read_test_loss(sandbox.path / "checkpoint")
    assert f"Loss against our test dataset: {result.loss:.3f}" in printed
    assert (result.dataset, result.tokens, result.context_length) == ("test/texts", 320, 16)
    # As earlier versions wrote it, which could also score documents.
    file = sandbox.path / "checkpoint/test-loss.json"
    values = json.loads(file.read_text())
    for windows, expected in (("sequences", result), ("harness windows", None)):
        file.write_text(json.dumps({**values, "windows": windows}))
        assert read_test_loss(sandbox.path / "checkpoint") == expected


def test_models_that_do_not_go_together(sandbox: Sandbox) -> None:
    write_texts(sandbox, "bytes")
    models = write_model(sandbox.path / "one") + write_model(sandbox.path / "two", context_length=8)
    options = ("--dataset", "test/texts", "--start-token", "0", "--tokens", "320")
    for arguments, message in (
        (models, r"context lengths differ \(8, 16\); --context-length 8"),
        (models[:3], "model.json has no partner"),
        ((*models, "--context-length", "16"), "can be at most 8, a model's own, not 16"),
        ((*models[:2], "--tokens", "9"), "--tokens 9 is less than one sequence; use 16 or more"),
        (
            (*models[:2], "--start-token", "9999"),
            r"not one sequence of 16 .*can be at most \d+",
        ),
    ):
        with pytest.raises(InputError, match=message):
            main.main([str(sandbox.datasets), *options, *map(str, arguments)], standalone_mode=False)
    main.main(
        [*map(str, (sandbox.datasets, *models, *options)), "--context-length", "8"], standalone_mode=False
    )


def test_of_a_small_data_set_what_there_is_is_measured(sandbox: Sandbox) -> None:
    """With the options of the published test set, which begins after 50 million tokens."""
    tokens = write_texts(sandbox, "bytes")
    files = write_model(sandbox.path / "model")
    arguments = [sandbox.datasets, *files, "--dataset", "test/texts"]
    printed = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False).stdout
    count = (len(tokens) - 1) // 16
    first, second, third, *rest = printed.splitlines()
    assert first == f"There are only {len(tokens):,} tokens; the slice starts at 0 instead of 50,000,000"
    assert second == f"There are only {count} of the 1,228,800 sequences; measuring all of them"
    assert third.startswith(f"{count} sequences of 16 tokens from")
    assert rest == measure(sandbox, *files, "--tokens", str(count * 16)).splitlines()[1:]
    asked = measure(sandbox, *files, "--start-token", "48", "--tokens", "9999")
    assert f"There are only {count - 3} of the 624 sequences; measuring all of them" in asked
    assert mean_and_error(torch.ones(1)) == (1.0, None)
