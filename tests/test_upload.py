"""What upload_model.py writes is what transformers reads, to the last bit of a weight and every token."""

import base64
import http.server
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiktoken
import torch
import transformers
from folder_hub import use_hub
from helpers import (
    BYTES,
    ROOT,
    Sandbox,
    assert_modes_are_the_umasks,
    needs_gpt2,
    random_tokens,
    run_script,
    write_dataset,
    write_model,
)
from safetensors.torch import load_file

import upload_model
from basemodel.common.errors import InputError, RunError
from basemodel.data.tokenizer import get_tokenizer
from basemodel.model.config import GPTConfig
from basemodel.model.generation import Sampling, generate
from basemodel.model.hf_format import from_huggingface, to_huggingface
from basemodel.model.weights import load_tensors
from basemodel.results import export
from gpt import GPTModel

torch.set_num_threads(1)
SHAPE = {
    "context_length": 32,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
CONFIG = GPTConfig(vocab_size=257, tokenizer="bytes", **SHAPE)
MIXED = [
    'def f(x):\n\t"""Return\n\n    x, or   None."""\n\treturn x[0] if x else None\r\n',
    "as 's a's 1a1 a.a,,a ,.,.',.  a \u4e2d\u00e9s\n\na",
    "It's we'll they've I'M 12345 3.14159   \t\n\n  trailing ",
    "Größe naïve 語言モデル язык العربية עברית हिन्दी 👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0\ufeff",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_transformers_computes_and_continues_the_same(tmp_path: Path, tied: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = GPTModel(replace(CONFIG, tie_weights=tied, qkv_bias=bias)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("scale" in name), std=0.1)
    export.write_model(tmp_path, model, get_tokenizer("bytes"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(257, (4, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=2e-5)
    prompt = tokens[:1, :3]
    ours = generate(model, prompt, 29, Sampling(0, stop=256))
    assert torch.equal(theirs.generate(prompt, max_new_tokens=29, do_sample=False), ours)
    assert theirs.config.tie_word_embeddings == tied
    assert theirs.config.layer_norm_epsilon == 1e-5
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


@pytest.mark.parametrize(("tied", "context", "words"), [(False, 32, 1), (True, 300, 7)])
def test_pipelines_batches_and_collators_take_the_folder_as_it_is(
    tmp_path: Path,
    tied: bool,
    context: int,
    words: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    torch.manual_seed(0)
    model = GPTModel(replace(CONFIG, tie_weights=tied, context_length=context)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("scale" in name), std=0.1)
    export.write_model(tmp_path, model, get_tokenizer("bytes"))
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path))
    for _ in range(10):  # without a limit it would go on past the last position
        assert pipeline("Return the" * words)[0]["generated_text"].startswith("Return the" * words)
    tokenizer, theirs = transformers.AutoTokenizer.from_pretrained(tmp_path), pipeline.model
    prompts = ["Return the", "a", "if x"]
    together = theirs.generate(
        **tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=9, do_sample=False
    )
    for prompt, row in zip(prompts, together, strict=True):
        ours = generate(model, torch.tensor([list(prompt.encode())]), 9, Sampling(0, stop=256))[0]
        ours = ours[len(prompt) :].tolist()
        assert row[10 : 10 + len(ours)].tolist() == ours
    assert pipeline("Return the", max_new_tokens=3)[0]["generated_text"].startswith("Return the")
    export.check_folder(tmp_path, model, get_tokenizer("bytes"))
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    records = [tokenizer(prompt) for prompt in prompts]
    default = transformers.DataCollatorWithPadding(tokenizer)(records)
    assert default["input_ids"].shape == (3, 10)
    batch = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(records)
    assert (batch["labels"] != -100).sum() == len("".join(prompts))
    assert theirs(**batch).loss.isfinite()
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**default).logits, theirs(**default).logits)


def test_a_huggingface_model_comes_back_bit_by_bit() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    there = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    model = GPTModel(replace(CONFIG, tie_weights=True, qkv_bias=True))
    load_tensors(model, there, "transformers")
    back = to_huggingface(model.tensors())
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in there.items())
    assert from_huggingface(back, qkv_bias=True).keys() == model.tensors().keys()


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, gpt2: tiktoken.Encoding, name: str) -> None:
    tokenizer = get_tokenizer(name)
    export.write_tokenizer(tmp_path, tokenizer, 1024)
    config = export.huggingface_config(replace(CONFIG, vocab_size=tokenizer.n_vocab), tokenizer.eot_token)
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in MIXED:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode_ordinary(text), text
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.convert_tokens_to_ids("<|endoftext|>") == tokenizer.eot_token
    # The older pair of files says the same.
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(tokenizer.n_vocab))
    pairs = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(pairs) == tokenizer.n_vocab - 257
    old = transformers.GPT2Tokenizer(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in pairs])
    assert old(MIXED[1])["input_ids"] == tokenizer.encode_ordinary(MIXED[1])


@needs_gpt2
def test_gpt2_merges_are_the_published_ones() -> None:
    pairs = export.merges(get_tokenizer("gpt2")._mergeable_ranks)
    assert len(pairs) == 50_000
    assert pairs[:5] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e"), (b"i", b"n"), (b"r", b"e")]
    assert pairs[-1] == (b" g", b"azed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sandbox, Path]:
    """A run of a tiny byte-level model, trained to its end, and its best checkpoint."""
    sandbox = Sandbox(tmp_path_factory.mktemp("trained"))
    write_dataset(sandbox.datasets / "test/tokens", train=random_tokens(4000, 250))
    sandbox.write_run(
        model=BYTES,
        train={"validation_interval": 4, "validation_batches": 2, "usd_per_hour": 3600.0},
    )
    sandbox.train()
    (sandbox.run_dir("tiny") / "training-run-chart.png").write_bytes(b"a chart")
    return sandbox, sandbox.run_dir("tiny") / "checkpoints/best"


def upload(trained: tuple[Sandbox, Path], destination: object, *options: str) -> tuple[str, ...]:
    sandbox, checkpoint = trained
    model = sandbox.run_dir("tiny") / "model.json", checkpoint / "model.safetensors"
    return ("upload_model.py", *map(str, model), str(destination), *options)


def test_the_folder_holds_what_is_known_of_the_run(trained: tuple[Sandbox, Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    _, checkpoint = trained
    output = tmp_path / "exported/tiny"
    command = [*upload(trained, output, "--license", "mit")]
    command[2] = str(checkpoint)  # a folder will do, and its file does elsewhere
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    difference = float(re.search(r"Largest logit difference .*: (\S+)", done.stdout)[1])
    assert difference <= 2e-5
    written = {path.name for path in output.iterdir()}
    assert written >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert written >= {"vocab.json", "merges.txt", "tokenizer_config.json", "README.md"}
    assert_modes_are_the_umasks(output)
    card = ModelCard.load(output / "README.md")
    assert (card.data.library_name, card.data.license) == ("transformers", "mit")
    assert card.data.datasets == ["test/tokens"]
    meta = json.loads((checkpoint / "meta.json").read_text())
    cells = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", card.text, flags=re.MULTILINE))
    assert cells["Data"].startswith(f"test/tokens, {meta['tokens_seen']:,} tokens")
    assert cells["Global batch"].startswith("8 sequences of 16 tokens")
    assert cells["Validation loss"].startswith(f"{meta['val_loss']:.3f}")
    assert meta["device"] in cells["Hardware"]
    assert cells["Cost"] == f"${meta['seconds']:.2f}"
    assert cells["llama.cpp"].startswith("not convertible")  # its converter knows GPT-2's tokenizer
    chart = re.search(r"!\[.*\]\((.*)\)", card.text)[1]
    assert (output / chart).read_bytes() == b"a chart"
    with pytest.raises(InputError, match="already exists"):
        upload_model.main.main(list(upload(trained, output)[1:]), standalone_mode=False)


def test_nothing_is_left_of_an_export_that_fails(
    trained: tuple[Sandbox, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = list(upload(trained, tmp_path / "new")[1:])
    convert = export.to_huggingface
    monkeypatch.setattr(
        export, "to_huggingface", lambda tensors: {k: t + 1 for k, t in convert(tensors).items()}
    )
    with pytest.raises(RunError, match=r"logits differ from gpt.py's by [1-9]"):
        upload_model.main.main(files, standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_wrong_exports(
    trained: tuple[Sandbox, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write_model(tmp_path / "small", vocab_size=64)
    with pytest.raises(InputError, match="vocabulary of 64 does not hold the 257 tokens"):
        upload_model.main.main([*map(str, small), str(tmp_path / "new")], standalone_mode=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=re.escape('pip install -e ".[upload]"')):
        upload_model.main.main(list(upload(trained, tmp_path / "new")[1:]), standalone_mode=False)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def model_hub() -> Iterator[SimpleNamespace]:
    """A Hugging Face Hub for models, as far as a commit of small files goes; it knows one token."""
    hub = SimpleNamespace(files={}, requests=[], token="hf_test")

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer(200, {"id": "me/tiny", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.requests.append(self.path)
            if self.headers["Authorization"] != f"Bearer {hub.token}":
                self.answer(401, {"error": "Invalid credentials"})
            elif self.path == "/api/repos/create":
                self.answer(200, {"url": f"{hub.url}/me/tiny", "name": "me/tiny", "id": "1"})
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = {"commitUrl": f"{hub.url}/me/tiny/commit/1", "commitOid": "1" * 40}
                self.answer(200, {**commit, "pullRequestUrl": None})
            else:
                self.answer(200, {"warnings": [], "errors": []})  # of the card's metadata

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def test_push(
    trained: tuple[Sandbox, Path],
    tmp_path: Path,
    model_hub: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    use_hub(monkeypatch, model_hub.url, tmp_path)
    upload_model.main.main(list(upload(trained, "me/tiny", "--push")[1:]), standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed.index("Largest logit difference") < printed.index(f"Pushed: {model_hub.url}")
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, data in model_hub.files.items():
        (folder / name).write_bytes(data)
    _, checkpoint = trained
    back = from_huggingface(load_file(folder / "model.safetensors"), qkv_bias=False)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(back[name], tensor), name
    assert transformers.AutoTokenizer.from_pretrained(folder)("Ab")["input_ids"] == [65, 98]
    assert not (ROOT / "me").exists()


def test_push_that_cannot_be(
    trained: tuple[Sandbox, Path],
    tmp_path: Path,
    model_hub: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_hub(monkeypatch, model_hub.url, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RunError, match="me/tiny: the upload failed") as error:
        upload_model.main.main(list(upload(trained, "me/tiny", "--push")[1:]), standalone_mode=False)
    assert "hf_wrong" not in str(error.value) and "\n" not in str(error.value)
    assert model_hub.files == {}
    monkeypatch.delenv("HF_TOKEN")
    for name, message in (
        ("me/tiny", r"the Hub denies access \(Token is required.*hf auth login"),
        ("tiny", "OWNER/NAME, not 'tiny'"),
    ):
        with pytest.raises(InputError, match=message):
            upload_model.main.main(list(upload(trained, name, "--push")[1:]), standalone_mode=False)
