"""Weights as other tools leave them: shards, folders, wrappers' names, nanoGPT's and transformers' forms."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import BYTES, MODEL, ROOT, refused, run_script, write_model
from safetensors.torch import load_file, save_file

from basemodel.common.errors import InputError
from basemodel.data.tokenizer import get_tokenizer
from basemodel.model.config import GPTConfig
from basemodel.model.hf_format import build_model, to_huggingface
from basemodel.model.weights import load_model, load_weights
from basemodel.results import export
from gpt import GPTModel

torch.set_num_threads(1)
CONFIG = GPTConfig(**{**MODEL, **BYTES})
TOKENS = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))


def random_model(**changes: object) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(replace(CONFIG, **changes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("scale" in name), std=0.1)
    return model


def loaded(path: Path, **changes: object) -> GPTModel:
    model = GPTModel(replace(CONFIG, **changes)).eval()
    load_weights(model, path)
    return model


def assert_same(one: GPTModel, other: GPTModel) -> None:
    with torch.no_grad():
        assert torch.equal(one(TOKENS), other(TOKENS))


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two shards and their index, as transformers writes them."""
    names = sorted(tensors)
    files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    parts = {files[0]: names[::2], files[1]: names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


WRAPPERS = {
    "DDP": "module.{}",
    "compiled": "_orig_mod.{}",
    "DDP of a compiled model": "module._orig_mod.{}",
    "a compiled DDP": "_orig_mod.module.{}",
    "compiled blocks": "{}",
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_wrappers_prefixes_are_taken_off(tmp_path: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    model = random_model()
    if case == "compiled blocks":
        named = {re.sub(r"^(trf_blocks\.\d+\.)", r"\1_orig_mod.", n): t for n, t in model.tensors().items()}
    else:
        named = {WRAPPERS[case].format(name): tensor for name, tensor in model.tensors().items()}
    save_file(named, tmp_path / "model.safetensors")
    assert_same(loaded(tmp_path / "model.safetensors"), model)
    assert capsys.readouterr().err.endswith("model.safetensors: wrappers' prefixes taken off\n")


def test_a_tensor_with_and_without_a_prefix_is_refused(tmp_path: Path) -> None:
    tensors = random_model().tensors()
    tensors["module.pos_emb.weight"] = tensors["pos_emb.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"'(module\.)?pos_emb\.weight' and '(module\.)?pos_emb\.weight' are one"
    ):
        loaded(tmp_path / "model.safetensors")


@pytest.mark.parametrize("theirs", [False, True])
def test_shards_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture, theirs: bool) -> None:
    model = random_model()
    index = write_shards(tmp_path, to_huggingface(model.tensors()) if theirs else model.tensors())
    assert_same(loaded(index), model)
    assert_same(loaded(tmp_path), model)
    assert capsys.readouterr().err.count("Hugging Face's GPT-2\n") == 2 * theirs
    second = tmp_path / "model-00002-of-00002.safetensors"
    with pytest.raises(InputError, match="is one of several shards; give their index or their folder"):
        loaded(second)
    second.unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors: no such file"):
        loaded(tmp_path)
    index.write_text("{}")
    with pytest.raises(InputError, match="has no weight_map"):
        loaded(tmp_path)


def test_a_checkpoints_folder_is_its_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model_json, weights = write_model(tmp_path)
    save_file({"step": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    assert_same(load_model(model_json, tmp_path).cpu(), load_model(model_json, weights).cpu())
    assert capsys.readouterr().err == "", "what is as usual is not remarked on"


class NanoGPT(torch.nn.Module):
    """A model as nanoGPT names, stores and computes it: exact GELU, and matrices (out, in)."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        size = 32
        names = {"c_attn": (size, 3 * size), "c_proj": (size, size)}
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(257, size),
                "wpe": torch.nn.Embedding(16, size),
                "h": torch.nn.ModuleList(),
                "ln_f": torch.nn.LayerNorm(size, bias=bias),
            }
        )
        for _ in range(2):
            attn = {name: torch.nn.Linear(*shape, bias=bias) for name, shape in names.items()}
            mlp = {
                "c_fc": torch.nn.Linear(size, 4 * size, bias=bias),
                "c_proj": torch.nn.Linear(4 * size, size, bias=bias),
            }
            block = {"ln_1": torch.nn.LayerNorm(size, bias=bias), "attn": torch.nn.ModuleDict(attn)}
            block |= {"ln_2": torch.nn.LayerNorm(size, bias=bias), "mlp": torch.nn.ModuleDict(mlp)}
            self.transformer.h.append(torch.nn.ModuleDict(block))
        self.lm_head = torch.nn.Linear(size, 257, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        for block in self.transformer.h:
            qkv = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block.attn.c_proj(y)
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        return self.lm_head(self.transformer.ln_f(x))


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_state_dict_is_computed_as_nanogpt_does(
    tmp_path: Path, capsys: pytest.CaptureFixture, bias: bool
) -> None:
    torch.manual_seed(0)
    theirs = NanoGPT(bias=bias).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("ln_" in name and "weight" in name), std=0.5)
    state = {f"_orig_mod.{name}": tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    ours = loaded(tmp_path / "model.safetensors", qkv_bias=bias, tie_weights=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS), rtol=0, atol=1e-4)
    assert "nanoGPT's names, with its exact GELU" in capsys.readouterr().err
    # Exported, it stays what it is, and comes back by its config.json.
    folder = tmp_path / "exported"
    folder.mkdir()
    export.write_model(folder, ours, get_tokenizer("bytes"))
    export.check_folder(folder, ours, get_tokenizer("bytes"))
    back = load_model(folder / "config.json", folder).cpu()
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS), theirs(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_fine_tuned_elsewhere_and_brought_back(tmp_path: Path, tied: bool) -> None:
    """Exported without QKV bias, which Hugging Face's GPT-2 always has and trains."""
    exported, tuned = tmp_path / "exported", tmp_path / "tuned"
    exported.mkdir()
    export.write_model(exported, random_model(tie_weights=tied), get_tokenizer("bytes"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    theirs(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    theirs.save_pretrained(tuned, max_shard_size="40KB")
    assert (tuned / "model.safetensors.index.json").exists()
    with pytest.raises(InputError) as caught:
        loaded(tuned, tie_weights=tied)
    assert "tensor 'trf_blocks.0.att.W_key.bias' has no place" in str(caught.value)
    assert str(caught.value).endswith('; set "qkv_bias": true in the model\'s config')
    ours = load_model(tuned / "config.json", tuned).cpu()
    expected = GPTConfig(**{**MODEL, **BYTES, "qkv_bias": True, "tie_weights": tied})
    assert ours.config == expected
    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(loaded(tuned, qkv_bias=True, tie_weights=tied)(TOKENS), ours(TOKENS))
    done = run_script("test_smoke.py", tuned / "config.json", tuned, "--prompt", "a", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"{tuned}: ")


CONFIGS = {
    "another architecture": ({"model_type": "llama"}, "model_type is 'llama'; only 'gpt2'"),
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; only 1e-05"),
    "another activation": (
        {"activation_function": "relu"},
        "activation_function is 'relu', not one of gelu_new",
    ),
    "another width": ({"n_inner": 100}, "n_inner is 100; only 4 x n_embd"),
    "scaled by layer": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    "no number": ({"n_layer": "two"}, 'n_layers must be an integer, not "two"'),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_computed(tmp_path: Path, case: str) -> None:
    changes, message = CONFIGS[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(export.huggingface_config(CONFIG, 256) | changes))
    with pytest.raises(InputError, match=f"config.json: {message}"):
        build_model(path)


def test_openais_config_is_gpt2_small(tmp_path: Path) -> None:
    """Its keys of shape; of the others transformers' defaults hold."""
    path = tmp_path / "config.json"
    shape = {
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    path.write_text(json.dumps({"model_type": "gpt2", "activation_function": "gelu_new", **shape}))
    wanted = GPTConfig(50_257, 1024, 768, 12, 12, 0.1, qkv_bias=True, tie_weights=True)
    with torch.device("meta"):
        assert build_model(path).config == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a safetensors file: "),
        (b"<!DOCTYPE html><html>", "is an HTML page, not the file itself"),
        (b'{"vocab_size": 257}', "damaged or not a safetensors file: "),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"model\.safetensors: {message}"):
        loaded(path)


def test_the_two_files_in_the_wrong_order(tmp_path: Path) -> None:
    model_json, weights = write_model(tmp_path)
    assert "MODEL_JSON comes before the weights" in refused("test_smoke.py", weights, model_json)
    with pytest.raises(InputError, match=r"must be a model\.json or config\.json"):
        load_model(tmp_path, weights)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds neither .*; a run's are in .*run/checkpoints$"):
        load_model(model_json, tmp_path / "run")


SAVE = """
import torch, safetensors.torch
torch.save(
    {"model": safetensors.torch.load_file("model.safetensors"), "iter_num": 5},
    "only/pytorch_model.bin",
    _use_new_zipfile_serialization=NEW,
)
"""


@pytest.mark.parametrize("new", [True, False])
def test_pickles_are_refused_and_the_documented_command_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    model_json, weights = write_model(tmp_path)
    pickled = tmp_path / "only" / "pytorch_model.bin"
    pickled.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    exec(SAVE, {"NEW": new})
    for path in (pickled, pickled.parent):
        with pytest.raises(InputError, match="is a pickle, which can run any code") as caught:
            load_model(model_json, path)
    assert "holds neither model.safetensors nor" in str(caught.value)
    assert "convert one that you trust with the command in docs/clients.md" in str(caught.value)
    (command,) = re.findall("^python -c .*", (ROOT / "docs/clients.md").read_text(), re.MULTILINE)
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    monkeypatch.chdir(pickled.parent)
    exec(words[2], {})
    converted, original = load_file(pickled.parent / "model.safetensors"), load_file(weights)
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, "no tensor 'trf_blocks.2.att.W_query.weight', .*; set \"n_layers\": 2 in"),
        ({"n_layers": 1}, "'trf_blocks.1.*' has no place .*; set \"n_layers\": 2 in the model's config$"),
        (
            {"vocab_size": 300, "context_length": 8},
            r"tok_emb.weight has shape \(257, 32\).*; set \"vocab_size\": 257, \"context_length\": 16",
        ),
    ],
)
def test_errors_name_tensors_and_the_keys_to_set(tmp_path: Path, changes: dict, message: str) -> None:
    save_file(to_huggingface(random_model().tensors()), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        loaded(tmp_path / "model.safetensors", **changes)


def test_weights_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.layers.0.mlp.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match=r"holds no tensor of a GPT-2.*but 'model.layers.0.mlp.weight'"):
        loaded(path)
    tensors = random_model().tensors()
    save_file({**tensors, "pos_emb.weight": torch.zeros(16, 32, dtype=torch.int8)}, path)
    with pytest.raises(InputError, match=r"pos_emb.weight is torch.int8; quantized weights cannot be read"):
        loaded(path)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    assert loaded(path).pos_emb.weight.dtype == torch.float32
