"""A model as a standard GPT-2 folder for transformers: weights, config.json, tokenizer files, and a check."""

import itertools
import json
from pathlib import Path
from typing import Any

import tiktoken
import torch

from basemodel.errors import RunError
from basemodel.weights import save_tensors, to_huggingface
from gpt import GPTConfig, GPTModel

# What the tokenizers must agree on: words, spaces, digits, contractions, scripts, an emoji of four parts.
SAMPLE_TEXT = "It's 1,024 tokens,\n\tisn't it?   Größe, 語言, язык, العربية 👩‍👩‍👧‍👦 x==y"


def write_model(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Write weights, configuration and tokenizer files into an empty folder."""
    end_of_text = tokenizer.eot_token
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    config = huggingface_config(model.config, end_of_text)
    for name, values in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in to_huggingface(model.tensors()).items()}
    save_tensors(tensors, folder / "model.safetensors")
    write_tokenizer(folder, tokenizer, model.config.context_length)


def huggingface_config(config: GPTConfig, end_of_text: int) -> dict[str, Any]:
    """A GPTConfig under Hugging Face's names, for config.json."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": config.drop_rate,
        "embd_pdrop": config.drop_rate,
        "resid_pdrop": config.drop_rate,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def write_tokenizer(folder: Path, tokenizer: tiktoken.Encoding, context_length: int) -> None:
    """Write a tiktoken encoding as a Hugging Face GPT-2 tokenizer, in the old and the new file format."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters, end_of_text = bytes_to_unicode(), tokenizer.decode([tokenizer.eot_token])

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ranks = tokenizer._mergeable_ranks
    vocab = {written(token): rank for token, rank in ranks.items()} | {end_of_text: tokenizer.eot_token}
    pairs = [(written(a), written(b)) for a, b in merges(ranks)]
    GPT2Tokenizer(vocab=vocab, merges=pairs, model_max_length=context_length).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a byte-pair encoding, in order: each token comes from the two parts that are left of it
    once all merges of lower rank have been applied, lowest first.

    transformers' TikTokenConverter lists every possible split instead, 108,299 for GPT-2's 50,000 merges.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            first = min(range(len(joined)), key=joined.__getitem__)
            assert joined[first] < rank, f"token {rank} is not a merge of two tokens"
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def check_folder(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Compare a written folder, as transformers loads it, with the model. Raises RunError if they differ."""
    from transformers import AutoTokenizer

    difference, largest = largest_logit_difference(folder, model)
    found = f"{difference:.1e} (logits up to {largest:.1f})"
    print(f"Largest logit difference between transformers and gpt.py: {found}")
    if not difference <= 2e-5 * max(1.0, largest):
        raise RunError(f"the export's logits differ by {difference:.1e} from gpt.py's; nothing was kept")
    exported = AutoTokenizer.from_pretrained(folder)
    if exported(SAMPLE_TEXT)["input_ids"] != tokenizer.encode_ordinary(SAMPLE_TEXT):
        raise RunError("the exported tokenizer's tokens differ from the model's own; nothing was kept")


@torch.no_grad()
def largest_logit_difference(folder: Path, model: GPTModel) -> tuple[float, float]:
    """The largest difference of a logit between a written folder and `model` on the CPU, and the largest
    logit, on two sequences of full length."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    shape = (2, model.config.context_length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    return (logits - exported(tokens).logits).abs().max().item(), logits.abs().max().item()
