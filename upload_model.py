#!/usr/bin/env python3
"""Let others use it: a trained model as a standard GPT-2 folder of the library transformers.

    python upload_model.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors exported/demo
    python upload_model.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors ME/demo --push

The folder loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, with no code
of ours. It is loaded again and compared with gpt.py before it gets its name or is pushed.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import tiktoken
import torch

from basemodel.command_line import require_plain_name, run_command
from basemodel.config import optimizer_in_words
from basemodel.errors import InputError, RunError, require
from basemodel.json_config import read_json_object
from basemodel.measured_loss import read_test_loss
from basemodel.tokenizer import get_tokenizer
from basemodel.weights import load_model, to_huggingface
from checkpointing import META_FILE
from gpt import GPTConfig, GPTModel

CHART = "training-run-chart.png"
# What the model card takes from a checkpoint's meta.json.
CARD_META = {
    *("train_config", "model_config", "tokens_seen", "global_batch", "global_step", "total_steps"),
    *("train_loss", "val_loss", "processes", "device", "precision", "seconds", "versions"),
}
# What the tokenizers must agree about: words, spaces, digits, contractions, scripts, an emoji of four parts.
SAMPLE_TEXT = "It's 1,024 tokens,\n\tisn't it?   Größe, 語言, язык, العربية 👩‍👩‍👧‍👦 x==y"


def huggingface_config(config: GPTConfig, end_of_text: int) -> dict[str, Any]:
    """What config.json says of a model: Hugging Face's names for a GPTConfig."""
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


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in vocab.json: itself where it is printable in
    Latin-1, else one from U+0100 on (Radford et al. 2019, encoder.py of their code)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of a byte-pair encoding, in order, from its tokens' ranks: a token is made of the two that
    remain when those of lower rank have been merged in it, lowest first."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            first = min(range(len(joined)), key=joined.__getitem__)
            assert joined[first] < rank, f"token {rank} is no merge of two tokens"
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def write_tokenizer(folder: Path, tokenizer: tiktoken.Encoding, context_length: int) -> None:
    """Write a tiktoken encoding as the files of a Hugging Face GPT-2 tokenizer, old form and new."""
    from transformers import GPT2Tokenizer

    characters, end_of_text = byte_characters(), tokenizer.decode([tokenizer.eot_token])

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    ranks = tokenizer._mergeable_ranks
    vocab = {written(token): rank for token, rank in ranks.items()} | {end_of_text: tokenizer.eot_token}
    pairs = [(written(a), written(b)) for a, b in merges(ranks)]
    theirs = GPT2Tokenizer(vocab=vocab, merges=pairs, model_max_length=context_length)
    theirs.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_model(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Write weights, configuration and tokenizer files into an empty folder."""
    end_of_text = tokenizer.eot_token
    config = huggingface_config(model.config, end_of_text)
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in to_huggingface(model.tensors()).items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, tokenizer, model.config.context_length)


def read_checkpoint_meta(weights: Path) -> dict[str, Any]:
    """What the checkpoint that a weights file belongs to says of its training; nothing where it is no
    checkpoint of this project."""
    try:
        meta = read_json_object(weights.parent / META_FILE)
    except InputError:
        return {}
    return meta if meta.keys() >= CARD_META else {}


def training_facts(meta: dict[str, Any]) -> dict[str, str]:
    """How a checkpoint was trained, for people: what is known of it."""
    train, facts = meta["train_config"], {}
    facts["Data"] = f"{train['dataset']}, {meta['tokens_seen']:,} tokens, {train['epochs']} epochs at most"
    length = meta["model_config"]["context_length"]
    facts["Global batch"] = f"{meta['global_batch']:,} sequences of {length:,} tokens"
    facts["Steps"] = f"{meta['global_step']:,} of {meta['total_steps']:,}"
    facts["Optimiser"] = optimizer_in_words(train)
    if meta["train_loss"] is not None:
        facts["Training loss"] = f"{meta['train_loss']:.3f} nats per token"
    if meta["val_loss"] is not None:
        within = ", within documents" if train.get("document_masking") else ""
        facts["Validation loss"] = f"{meta['val_loss']:.3f} nats per token{within}"
    facts["Hardware"] = f"{meta['processes']} x {meta['device']}, precision {meta['precision']}"
    facts["Time"] = f"{timedelta(seconds=round(meta['seconds']))} (hours, minutes, seconds)"
    if train.get("usd_per_hour") is not None:
        facts["Cost"] = f"${train['usd_per_hour'] * meta['seconds'] / 3600:.2f}"
    facts["Software"] = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return facts


def model_card(name: str, model: GPTModel, weights: Path, licence: str | None, *, has_chart: bool) -> str:
    """The folder's README.md: metadata for the Hub, how to use the model, what is known of its training."""
    from huggingface_hub import ModelCard, ModelCardData

    config, meta = model.config, read_checkpoint_meta(weights)
    dataset = meta["train_config"]["dataset"] if meta else "local/"
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2"],
        datasets=None if dataset.startswith("local/") else [dataset],
    )
    facts = {
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "Shape": f"{config.n_layers} layers of {config.emb_dim}, {config.n_heads} heads, context "
        f"{config.context_length:,}, vocabulary {config.vocab_size:,} ({config.tokenizer}), "
        f"{'tied' if config.tie_weights else 'untied'}, QKV bias {'on' if config.qkv_bias else 'off'}, "
        f"dropout {config.drop_rate:g}",
    }
    facts |= training_facts(meta) if meta else {}
    if (test := read_test_loss(weights.parent)) is not None:
        facts["Test loss"] = (
            f"{test.loss:.3f} nats per token, perplexity {test.perplexity:.2f}"
            + (f", {test.bits_per_byte:.4f} bits per byte" if test.bits_per_byte is not None else "")
            + f" ({test.dataset}, {test.split}, {test.tokens:,} tokens from {test.start_token:,} on)"
        )
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    chart = f"\n\n![Loss, learning rate and gradient norm while it trained]({CHART})" if has_chart else ""
    body = f"""# {name}

A GPT-2 model, trained from scratch with one script and two JSON files.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Every effort moves you", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=25)[0]))
```

It is a base model: it continues text, and was taught neither to follow instructions nor to be right or kind.

| | |
| --- | --- |
{rows}{chart}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


@torch.no_grad()
def largest_logit_difference(folder: Path, model: GPTModel) -> tuple[float, float]:
    """Load a written folder with transformers and compare it with `model`, on the CPU, on two sequences of
    the model's full length. Returns the largest difference of a logit, and the largest logit."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    shape = (2, model.config.context_length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    return (logits - theirs(tokens).logits).abs().max().item(), logits.abs().max().item()


def check_folder(folder: Path, model: GPTModel, tokenizer: tiktoken.Encoding) -> None:
    """Compare what was written with what it was written from. Raises RunError if they differ."""
    from transformers import AutoTokenizer

    difference, largest = largest_logit_difference(folder, model)
    print(
        f"Largest logit difference between transformers and gpt.py: {difference:.1e} "
        f"(logits up to {largest:.1f})"
    )
    if not difference <= 2e-5 * max(1.0, largest):
        raise RunError(
            f"the exported model's logits differ by {difference:.1e} from gpt.py's; nothing was kept"
        )
    theirs = AutoTokenizer.from_pretrained(folder)(SAMPLE_TEXT)["input_ids"]
    if theirs != tokenizer.encode_ordinary(SAMPLE_TEXT):
        raise RunError("the exported tokenizer's tokens differ from the model's own; nothing was kept")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` if all goes well and is gone if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(path)  # an empty folder may be there
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def push(folder: Path, repository: str, *, private: bool) -> None:
    """Upload a folder to a Hub repository, made if it is not there. Raises RunError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the model")
    except Exception as error:  # whatever a network, a proxy or the Hub can think of
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(
            f"{repository}: the Hub did not take the model ({reason}); the same command tries again"
        ) from None
    print(f"Pushed: {done.commit_url}")


def check_repository(repository: str) -> None:
    """Raise InputError unless `repository` is OWNER/NAME, and a token to push with is there."""
    from huggingface_hub import get_token

    owner, slash, name = repository.partition("/")
    require(
        bool(slash), f"with --push, DESTINATION is a repository of the Hub, OWNER/NAME, not '{repository}'"
    )
    require_plain_name(owner, "the repository's owner")
    require_plain_name(name, "the repository's name")
    require(get_token() is not None, "no token of the Hub is here; set HF_TOKEN, or run: hf auth login")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_json", type=click.Path(path_type=Path))
@click.argument("model_safetensors", type=click.Path(path_type=Path))
@click.argument("destination", metavar="OUTPUT_DIR|REPO_ID")
@click.option("--push", "pushes", is_flag=True, help="Upload to the Hub's repository OWNER/NAME.")
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
@click.option("--license", "licence", help="For the model card, by the Hub's names: apache-2.0, mit, ...")
def main(
    model_json: Path,
    model_safetensors: Path,
    destination: str,
    *,
    pushes: bool,
    private: bool,
    licence: str | None,
) -> None:
    """Write the model in MODEL_SAFETENSORS as a standard GPT-2 folder of transformers, with a model card.

    Without --push, the folder OUTPUT_DIR is made. With it, the folder is made aside and uploaded to REPO_ID.
    """
    try:
        import transformers
    except ImportError:
        raise InputError('transformers is missing; install it with: pip install -e ".[upload]"') from None
    transformers.utils.logging.disable_progress_bar()
    output = Path(destination)
    if pushes:
        check_repository(destination)
    else:
        require(not private, "--private goes with --push")
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
        require(not taken, f"{output}: is there already; remove it or choose another folder")
    model = load_model(model_json, model_safetensors).cpu()
    require(
        all(tensor.isfinite().all() for tensor in model.tensors().values()),
        f"{model_safetensors}: holds weights that are no numbers",
    )
    tokenizer = get_tokenizer(model.config.tokenizer)
    require(
        tokenizer.n_vocab <= model.config.vocab_size,
        f"{model_json}: a vocabulary of {model.config.vocab_size} does not hold the {tokenizer.n_vocab} "
        f"tokens of the tokenizer '{model.config.tokenizer}'; was another one meant?",
    )
    # runs/RUN/checkpoints/NAME/model.safetensors
    chart = model_safetensors.resolve().parent.parent.parent / CHART
    has_chart = chart.exists() and bool(read_checkpoint_meta(model_safetensors))
    with tempfile.TemporaryDirectory() as aside:
        target = Path(aside) / "model" if pushes else output
        with new_folder(target) as folder:
            write_model(folder, model, tokenizer)
            name = destination if pushes else output.resolve().name
            card = model_card(name, model, model_safetensors, licence, has_chart=has_chart)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if has_chart:
                shutil.copyfile(chart, folder / CHART)
            check_folder(folder, model, tokenizer)
        if pushes:
            push(target, destination, private=private)
        else:
            print(f"Written to {output}")


if __name__ == "__main__":
    run_command(main)
