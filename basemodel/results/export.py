"""A model as a standard GPT-2 folder for transformers: weights, config.json, tokenizer, and a check."""

import json
from pathlib import Path
from typing import Any

import tiktoken
import torch

from basemodel.common.errors import RunError
from basemodel.data.tokenizer import byte_characters, merges
from basemodel.model.config import GPTConfig
from basemodel.model.hf_format import gelu_name, to_huggingface
from basemodel.model.weights import save_tensors
from gpt import GPTModel

# Where the tokenizers must agree: words, spaces, digits, contractions, scripts, an emoji of four parts.
SAMPLE_TEXT = "It's 1,024 tokens,\n\tisn't it?   Größe, 語言, язык, العربية 👩‍👩‍👧‍👦 x==y"


def write_model(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Write weights, configuration and tokenizer files into an empty folder."""
    end_of_text = tokenizer.eot_token
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    # Without a limit, generation would run past the last position.
    generation["max_length"] = model.config.context_length
    config = huggingface_config(model.config, end_of_text) | {"activation_function": gelu_name(model)}
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

    characters, end_of_text = byte_characters(), tokenizer.decode([tokenizer.eot_token])

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ranks = tokenizer._mergeable_ranks
    vocab = {written(token): rank for token, rank in ranks.items()} | {end_of_text: tokenizer.eot_token}
    pairs = [(written(a), written(b)) for a, b in merges(ranks)]
    # Batches need padding; generation needs it before the text.
    padding = {"pad_token": end_of_text, "padding_side": "left"}
    exported = GPT2Tokenizer(vocab=vocab, merges=pairs, model_max_length=context_length, **padding)
    exported.save_pretrained(folder)
    exported.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt


def check_folder(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Compare a written folder, as transformers loads it, with the model. Raises RunError if they differ."""
    from transformers import AutoTokenizer

    difference, largest = largest_logit_difference(folder, model)
    print(
        "Largest logit difference between transformers and gpt.py: "
        f"{difference:.1e} (logits up to {largest:.1f})"
    )
    if not difference <= 2e-5 * max(1.0, largest):
        raise RunError(
            f"the export's logits differ by {difference:.1e} from gpt.py's; the export was removed"
        )
    exported = AutoTokenizer.from_pretrained(folder)
    if exported(SAMPLE_TEXT)["input_ids"] != tokenizer.encode_ordinary(SAMPLE_TEXT):
        raise RunError("the exported tokenizer's tokens differ from the model's; the export was removed")


@torch.no_grad()
def largest_logit_difference(folder: Path, model: GPTModel) -> tuple[float, float]:
    """The largest difference between a written folder's logits and the model's, on the CPU, and the largest
    logit, on two sequences of full length."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    shape = (2, model.config.context_length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    return (logits - exported(tokens).logits).abs().max().item(), logits.abs().max().item()
