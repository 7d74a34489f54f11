"""The loss of trained models: what test_loss.py says is what an independent sum says."""

import math
import statistics
from pathlib import Path

import pytest
import tiktoken
import torch
from click.testing import CliRunner
from helpers import MODEL, Sandbox, option_defaults, run_script, write_dataset, write_model

from basemodel.data import Sequences
from basemodel.errors import InputError
from basemodel.measured_loss import read_test_loss
from basemodel.token_files import TokenFiles
from basemodel.tokenizer import get_tokenizer
from gpt import GPTConfig, GPTModel
from test_loss import main, sequence_losses

TEXTS = ["as quick as a fox.\n", "Größe, 語言 and язык 👩‍👩‍👧", "def f(x):\n\treturn x ** 2\n"] * 12


def measure(sandbox: Sandbox, *arguments: str | Path) -> str:
    command = [sandbox.datasets, *arguments, "--dataset", "test/texts", "--start-token", "0"]
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
    options = ("--dataset", "test/texts", "--start-token", "0", "--tokens", str(count * 16))
    done = run_script("test_loss.py", sandbox.datasets, *files, *options)
    assert done.returncode == 0, done.stderr
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
    wanted = {
        "Loss against our test dataset": pytest.approx(loss, abs=6e-4),
        "Perplexity": pytest.approx(math.exp(loss), abs=6e-3),
        "Standard error": pytest.approx(error, abs=6e-5),
        "Bits per byte": pytest.approx(sum(losses) / size / math.log(2), abs=6e-5),
    }
    found = {name: float(value) for name, value in figures(done.stdout).items()}
    assert found == wanted
    assert list(found) == list(wanted)


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
    losses = sequence_losses(models, sequences, 10, batch_size=4, document_masking=False)
    assert reads == [(0, 4), (4, 4), (8, 2)]
    assert torch.equal(
        losses[2], sequence_losses(models[2:], sequences, 10, batch_size=3, document_masking=False)[0]
    )


def test_the_loss_of_a_checkpoint_is_kept_beside_it(sandbox: Sandbox) -> None:
    write_texts(sandbox, "bytes")
    files = write_model(sandbox.path / "checkpoint")
    (sandbox.path / "checkpoint/meta.json").write_text("{}")
    printed = measure(sandbox, *files, "--tokens", "320")
    kept = read_test_loss(sandbox.path / "checkpoint")
    assert f"Loss against our test dataset: {kept.loss:.3f}" in printed
    assert (kept.dataset, kept.tokens, kept.context_length) == ("test/texts", 320, 16)


def test_models_that_do_not_go_together(sandbox: Sandbox) -> None:
    write_texts(sandbox, "bytes")
    models = write_model(sandbox.path / "one") + write_model(sandbox.path / "two", context_length=8)
    options = ("--dataset", "test/texts", "--start-token", "0", "--tokens", "320")
    for arguments, message in (
        (models, r"context lengths differ \(8, 16\); --context-length 8"),
        (models[:3], "model.json has no partner"),
        ((*models, "--context-length", "16"), "can be at most 8, a model's own, not 16"),
        ((*models[:2], "--tokens", "9999"), r"which make \d+ sequences .* asks for 624"),
    ):
        with pytest.raises(InputError, match=message):
            main.main([str(sandbox.datasets), *options, *map(str, arguments)], standalone_mode=False)
    main.main(
        [*map(str, (sandbox.datasets, *models, *options)), "--context-length", "8"], standalone_mode=False
    )
