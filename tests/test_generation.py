"""Continuing text: the same tokens with a key-value cache as without, and together as one by one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
import torch
from click.testing import CliRunner
from helpers import MODEL, option_defaults, run_script, write_model
from safetensors.torch import save_file

from basemodel.data.tokenizer import get_tokenizer
from basemodel.model.config import GPTConfig
from basemodel.model.generation import BATCH_SIZE, GREEDY, Sampling, continuations, generate
from basemodel.model.weights import load_model
from gpt import GPTModel
from test_smoke import main, printable

torch.set_num_threads(1)  # the models are tiny, and the machine has other work
SMALL = replace(GPTConfig(**MODEL), context_length=48)
BYTES = replace(SMALL, vocab_size=257, tokenizer="bytes")


def small_model(config: GPTConfig = SMALL) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(config).eval()


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bytes")
    config = {**MODEL, "vocab_size": 257, "context_length": 48, "tokenizer": "bytes"}
    (folder / "model.json").write_text(json.dumps(config))
    save_file(small_model(BYTES).state_dict(), folder / "model.safetensors")
    return folder / "model.json", folder / "model.safetensors"


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "tie_weights": True}])
def test_cached_generation_gives_the_same_tokens_past_the_context_limit_too(changes: dict) -> None:
    model = small_model(replace(SMALL, **changes))
    tokens = torch.randint(64, (3, 5))
    plain = generate(model, tokens, 100, replace(GREEDY, use_cache=False))
    assert plain.shape == (3, 105)
    assert torch.equal(generate(model, tokens, 100, GREEDY), plain)
    cached, plain = (
        generate(model, tokens, 60, Sampling(0.8, 10, torch.Generator().manual_seed(1), use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_with_a_cache_each_token_is_read_once() -> None:
    model, read = small_model(), []
    model.tok_emb.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[1]))
    generate(model, torch.zeros(2, 5, dtype=torch.long), 40, GREEDY)
    assert read == [5] + [1] * 39


@pytest.mark.parametrize("count", [20, 45])
def test_padded_rows_are_continued_as_if_they_were_alone(count: int) -> None:
    model = small_model()
    rows = [torch.randint(64, (length,)) for length in (1, 7, 20)]
    padded = torch.stack([torch.cat([torch.full((20 - len(row),), 9), row]) for row in rows])
    padding = torch.tensor([20 - len(row) for row in rows])
    together = generate(model, padded, count, GREEDY, padding)
    for row, empty, alone in zip(together, padding.tolist(), rows, strict=True):
        assert torch.equal(row[empty:], generate(model, alone[None], count, GREEDY)[0])


def test_generation_ends_when_every_row_has_stopped() -> None:
    model = small_model()
    tokens = torch.randint(64, (2, 4))
    whole = generate(model, tokens, 30, GREEDY)
    stop = int(whole[0, 10])
    ends = [next((i for i in range(4, 34) if row[i] == stop), 33) for row in whole]
    stopped = generate(model, tokens, 30, replace(GREEDY, stop=stop))
    assert torch.equal(stopped, whole[:, : max(ends) + 1])


def test_prompts_are_continued_in_their_order_and_end_at_end_of_text() -> None:
    model, tokenizer = small_model(BYTES), get_tokenizer("bytes")
    prompts = ["short", "a longer one, ", "", "b"] * (BATCH_SIZE // 4 + 1)
    texts = continuations(model, tokenizer, prompts, 12, GREEDY)
    assert texts[:4] * (BATCH_SIZE // 4 + 1) == texts
    for prompt, text in zip(prompts[:4], texts, strict=False):
        assert continuations(model, tokenizer, [prompt], 12, GREEDY) == [text]
        tokens = tokenizer.encode_ordinary(prompt) or [256]  # an empty prompt is end-of-text, and no end
        added = generate(model, torch.tensor([tokens]), 12, GREEDY)[0, len(tokens) :].tolist()
        assert text == tokenizer.decode(added) and len(added) == 12 and 256 not in added
    model.out_head.weight.data[256] = 0
    model.out_head.register_forward_hook(
        lambda _module, _inputs, logits: logits.index_fill(-1, torch.tensor(256), 1e9)
    )
    assert continuations(model, tokenizer, ["short"], 12, GREEDY) == [""]


def test_what_upsets_a_terminal_is_escaped() -> None:
    assert printable("ä\n\tb\x1b[2J\r\x07\x9b語") == "ä\n\tb\\x1b[2J\\x0d\\x07\\x9b語"


def test_several_prompts_and_samples(bytes_model: tuple[Path, Path]) -> None:
    prompts = ("--prompt", "ab\x1b[2J", "--prompt", "Größe")
    options = ("--samples", "2", "--tokens", "6", "--temperature", "0")
    before = "import sys; sys.stdout.reconfigure(encoding='ascii')"
    done = run_script("test_smoke.py", *bytes_model, *prompts, *options, before=before)
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = done.stdout.rstrip("\n").split("\n\n")
    assert first == second
    assert first.startswith(r"ab\x1b[2J")
    assert third == fourth
    assert third.startswith(r"Gr\xf6\xdfe")


def test_options_do_what_they_say(bytes_model: tuple[Path, Path]) -> None:
    def continued(*options: str) -> str:
        command = [*map(str, bytes_model), "--prompt", "a", *options]
        return CliRunner().invoke(main, command, catch_exceptions=False).stdout

    model, tokenizer = small_model(BYTES), get_tokenizer("bytes")
    likeliest = {
        count: f"a{printable(continuations(model, tokenizer, ['a'], count, GREEDY)[0])}\n"
        for count in (20, 7)
    }
    assert continued("--temperature", "0") == likeliest[20] != likeliest[7]
    assert continued("--temperature", "0", "--tokens", "7") == likeliest[7]
    assert continued("--top-k", "1") == likeliest[20]
    assert continued("--top-k", "2", "--seed", "5") != likeliest[20]
    assert continued("--top-k", "0", "--seed", "5") == continued("--top-k", "257", "--seed", "5")
    assert continued("--top-k", "0", "--seed", "5") != continued("--seed", "5")
    assert continued("--temperature", "0.001", "--seed", "5") == likeliest[20]


def test_the_default_prompt_is_continued_with_gpt2s_tokens(gpt2: tiktoken.Encoding, tmp_path: Path) -> None:
    files = write_model(tmp_path, vocab_size=gpt2.n_vocab, tokenizer="gpt2")
    done = CliRunner().invoke(main, [*map(str, files), "--temperature", "0"], catch_exceptions=False)
    model = load_model(*files)
    tokens = torch.tensor([gpt2.encode_ordinary("Every effort moves you")])
    continued = generate(model, tokens, 20, replace(GREEDY, stop=gpt2.eot_token))[0].tolist()
    assert done.stdout == printable(gpt2.decode(continued).removesuffix("<|endoftext|>")) + "\n"


def test_defaults() -> None:
    assert option_defaults(main) == {
        "--prompt": "Every effort moves you",
        "--tokens": "20",
        "--temperature": "1.0",
        "--top-k": "25",
        "--samples": "1",
    }
