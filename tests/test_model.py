"""The model, and the weights of others that it loads."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import MODEL, ROOT, Sandbox, random_tokens, run_script
from safetensors.torch import load_file, save_file

from basemodel.common.errors import InputError
from basemodel.common.json_config import read_config
from basemodel.model.config import GPTConfig
from basemodel.model.generation import GREEDY, Sampling, generate
from basemodel.model.weights import load_weights
from basemodel.training.config import TrainConfig
from gpt import GPTModel

SMALL = GPTConfig(**MODEL)


def small_model(**changes: object) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(replace(SMALL, **changes)).eval()


def test_gpt2_small_has_the_published_number_of_parameters_and_flops() -> None:
    with torch.device("meta"):
        model = GPTModel(read_config(GPTConfig, ROOT / "runs/original/model.json"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 163_009_536
    assert model.config.flops_per_token == pytest.approx(0.855e9, rel=1e-3)


def test_parameter_names_are_the_published_ones() -> None:
    names = set(small_model(n_layers=1, qkv_bias=True).state_dict())
    block = {
        f"att.{name}.{kind}"
        for name in ("W_query", "W_key", "W_value", "out_proj")
        for kind in ("weight", "bias")
    }
    block |= {f"ff.layers.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")}
    block |= {f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("scale", "shift")}
    rest = {"tok_emb.weight", "pos_emb.weight", "final_norm.scale", "final_norm.shift", "out_head.weight"}
    assert names == rest | {f"trf_blocks.0.{name}" for name in block}


def test_every_run_in_the_repository_is_valid() -> None:
    runs = sorted(path.parent for path in ROOT.glob("runs/*/train.json"))
    assert len(runs) >= 16
    for run in runs:
        read_config(GPTConfig, run / "model.json")
        config = read_config(TrainConfig, run / "train.json")
        assert run.name.startswith(("demo", "1xt4")) or config.min_train_tokens >= 3_260_190_720


def test_attention_is_causal_and_equals_the_formula() -> None:
    model = small_model(drop_rate=0.5)  # eval mode: no dropout
    att = model.trf_blocks[0].att
    x = torch.randn(2, 10, 32)
    split = lambda y: y.view(2, 10, 2, 16).transpose(1, 2)  # noqa: E731
    q, k, v = split(att.W_query(x)), split(att.W_key(x)), split(att.W_value(x))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(16)).masked_fill(
        torch.ones(10, 10).triu(1).bool(), -math.inf
    )
    slow = att.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 10, 32))
    torch.testing.assert_close(att(x), slow, rtol=1e-5, atol=1e-6)


def shares_of(x: torch.Tensor) -> dict[float, float]:
    """How often each value occurs."""
    values, counts = x.unique(return_counts=True)
    return dict(zip(values.tolist(), (counts / counts.sum()).tolist(), strict=True))


@torch.no_grad()
def test_dropout_is_on_attention_weights() -> None:
    """The first of two tokens attends to itself alone, with a weight of 1: a head drops or doubles it."""
    model = small_model(drop_rate=0.5)
    attention = model.trf_blocks[0].att
    for projection in (attention.W_value, attention.out_proj):
        torch.nn.init.eye_(projection.weight)
    attention.out_proj.bias.zero_()
    first = attention.train()(torch.ones(4000, 2, 32))[:, 0]
    heads = first.view(4000, 2, 16)
    assert torch.equal(heads, heads[:, :, :1].expand_as(heads)), "a whole head at a time"
    assert set(heads.unique().tolist()) == {0.0, 2.0}
    assert heads.mean().item() == pytest.approx(1, abs=0.05)
    assert heads[:, 0].ne(heads[:, 1]).any()
    assert attention.eval()(torch.ones(1, 2, 32)).allclose(torch.ones(1))


@torch.no_grad()
def test_dropout_is_on_both_additions_to_the_residual_stream() -> None:
    """Each branch adds ones: what is left is 0, 2 or 4, as often as two tosses of a coin say."""
    block = small_model(drop_rate=0.5).trf_blocks[0]
    for last in (block.att.out_proj, block.ff.layers[2]):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.ones_(last.bias)
    assert shares_of(block.train()(torch.zeros(100, 16, 32))) == pytest.approx(
        {0.0: 0.25, 2.0: 0.5, 4.0: 0.25}, abs=0.02
    )
    assert shares_of(block.eval()(torch.zeros(100, 16, 32))) == {2.0: 1.0}


@torch.no_grad()
def test_dropout_is_on_the_embeddings() -> None:
    model = small_model(drop_rate=0.25)
    torch.nn.init.ones_(model.tok_emb.weight)
    torch.nn.init.zeros_(model.pos_emb.weight)
    seen = []
    model.trf_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(shares_of(inputs[0])))
    tokens = torch.zeros(100, 16, dtype=torch.int64)
    model.train()(tokens)
    model.eval()(tokens)
    assert seen[0] == pytest.approx({0.0: 0.25, torch.tensor(4 / 3).item(): 0.75}, abs=0.02)
    assert seen[1] == {1.0: 1.0}


def test_weights_load_with_mask_buffers_and_with_either_of_two_tied_tensors(tmp_path: Path) -> None:
    model = small_model(tie_weights=True)
    tokens = torch.randint(64, (2, 16))
    for dropped in ("out_head.weight", "tok_emb.weight", None):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != dropped}
        state["trf_blocks.0.att.mask"] = torch.ones(16, 16)
        save_file(state, tmp_path / "model.safetensors")
        loaded = small_model(tie_weights=True, init="gpt2")
        load_weights(loaded, tmp_path / "model.safetensors")
        assert torch.equal(loaded(tokens), model(tokens)), dropped


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"pos_emb.weight": torch.zeros(8, 32)},
            {},
            r"pos_emb\.weight has shape \(8, 32\).* makes it \(16, 32\)",
        ),
        ({"other": torch.zeros(1)}, {}, "tensor 'other' has no place"),
        ({}, {"n_layers": 3}, r"has no tensor 'trf_blocks\.2\."),
        ({}, {"qkv_bias": True}, "has no tensor 'trf_blocks.0.att.W_query.bias'"),
        ({}, {"tie_weights": True}, "set tie_weights to false"),
    ],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path, tensors: dict, config: dict, message: str
) -> None:
    save_file({**small_model().state_dict(), **tensors}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_weights(small_model(**config), tmp_path / "model.safetensors")


def test_temperature_0_takes_the_likeliest_token_past_the_context_limit() -> None:
    model = small_model()
    tokens = torch.randint(64, (2, 3))
    continued = generate(model, tokens, 20, GREEDY)
    for end in (3, 10, 22):
        window = continued[:, max(0, end - 16) : end]
        assert torch.equal(model(window)[:, -1].argmax(-1), continued[:, end])


def test_top_k_draws_only_from_the_likeliest() -> None:
    model = small_model()
    start = torch.zeros(200, 1, dtype=torch.long)
    drawn = generate(model, start, 1, Sampling(1.0, 3, torch.Generator().manual_seed(0)))[:, 1]
    assert set(drawn.tolist()) == set(model(start[:1])[0, -1].topk(3).indices.tolist())


@pytest.fixture(scope="module")
def huggingface_gpt2(tmp_path_factory: pytest.TempPathFactory):
    """A random Hugging Face GPT-2 as its library saves it, with the vocabulary of the bytes tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=256
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("huggingface")
    model.save_pretrained(folder)
    ours = {
        "vocab_size": 257,
        "context_length": 32,
        "emb_dim": 32,
        "n_heads": 4,
        "n_layers": 2,
        "drop_rate": 0.1,
    }
    ours |= {"qkv_bias": True, "tie_weights": True, "tokenizer": "bytes"}
    (folder / "model.json").write_text(json.dumps(ours))
    return model, folder


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_logits_of_a_huggingface_model_are_equal(huggingface_gpt2, tmp_path: Path, prefix: str) -> None:
    theirs, folder = huggingface_gpt2
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("transformer.", prefix): tensor for name, tensor in tensors.items()}
    renamed[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # the mask, as OpenAI's own file has it
    save_file(renamed, tmp_path / "model.safetensors")
    ours = GPTModel(read_config(GPTConfig, folder / "model.json")).eval()
    load_weights(ours, tmp_path / "model.safetensors")
    tokens = torch.randint(257, (3, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_the_scripts_measure_and_continue_like_transformers(huggingface_gpt2, sandbox: Sandbox) -> None:
    theirs, folder = huggingface_gpt2
    tokens = random_tokens(32 * 50 + 1, vocab_size=257)
    (sandbox.datasets / "test/bytes").mkdir()
    from safetensors.numpy import save_file as save_arrays

    save_arrays({"tokens": tokens}, sandbox.datasets / "test/bytes/validation.safetensors")
    model = (folder / "model.json", folder / "model.safetensors")
    done = run_script(
        *("test_loss.py", sandbox.datasets, *model, "--dataset", "test/bytes", "--start-token", "0"),
        *("--tokens", str(32 * 50), "--batch-size", "7"),
    )
    assert done.returncode == 0, done.stderr
    sequences = torch.from_numpy(tokens.astype("int64"))
    with torch.no_grad():
        logits = theirs(sequences[:-1].view(50, 32)).logits
    losses = F.cross_entropy(logits.transpose(1, 2), sequences[1:].view(50, 32), reduction="none").double()
    values = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert float(values["Loss against our test dataset"]) == pytest.approx(losses.mean().item(), abs=6e-4)
    assert float(values["Perplexity"]) == pytest.approx(losses.mean().exp().item(), rel=1e-4)
    error = losses.mean(1).std().item() / math.sqrt(50)
    assert float(values["Standard error"]) == pytest.approx(error, abs=6e-5)
    written = sum(token != 256 for token in tokens[1:].tolist())  # of which each is one byte
    bits = losses.sum().item() / math.log(2) / written
    assert float(values["Bits per byte"]) == pytest.approx(bits, rel=1e-4)

    done = run_script("test_smoke.py", *model, "--prompt", "Hello", "--temperature", "0", "--tokens", "20")
    assert done.returncode == 0, done.stderr
    prompt = torch.tensor([list(b"Hello")])
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=256)[0].tolist()
    expected = expected[: expected.index(256)] if 256 in expected else expected
    assert done.stdout == bytes(expected).decode(errors="replace") + "\n"


def test_smoke_samples_are_fixed_by_the_seed(huggingface_gpt2) -> None:
    _, folder = huggingface_gpt2
    command = "test_smoke.py", folder / "model.json", folder / "model.safetensors", "--samples", "3"
    command += "--prompt", "a"
    ascii = "import sys; sys.stdout.reconfigure(encoding='ascii')"
    first = run_script(*command, "--seed", "7", before=ascii).stdout
    again, other = (run_script(*command, "--seed", seed).stdout for seed in ("7", "8"))
    assert first != "" and other != again
    assert first == again.encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize(("precision", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float32)])
def test_the_residual_stream_is_in_bf16_where_products_are(precision: str, expected: torch.dtype) -> None:
    model, found = GPTModel(SMALL), []
    for block in model.trf_blocks:
        block.register_forward_hook(lambda _, inputs, output: found.extend((inputs[0].dtype, output.dtype)))
    tokens = torch.randint(SMALL.vocab_size, (2, 8))
    with torch.autocast("cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]):
        model(tokens)
    assert found == [expected] * 2 * SMALL.n_layers
    found.clear()
    model(tokens)
    assert found == [torch.float32] * 2 * SMALL.n_layers
