"""A prompt line: prompts are continued token by token, each by itself, and settings changed in between."""

import codecs
import contextlib
import difflib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import tiktoken
import torch

from basemodel.common.errors import InputError
from basemodel.common.terminal import printable
from basemodel.model.generation import encode_prompts, stream
from gpt import GPTModel

HELP = """\
Type a prompt, and the model continues it; it remembers none of the prompts before.
/temperature 0.7   how boldly to sample; 0: always the likeliest token
/top-k 25          sample from the k likeliest tokens; 0: from all
/tokens 100        how many tokens to add at most
/seed 42           the same answer to the same prompt every time; /seed none: another one each time
/help, /quit       this text; the end, as Ctrl-D
A setting without a value shows it. Ctrl-C stops an answer. A prompt that begins with / is typed with //."""


class Temperature(click.FloatRange):
    """A number from 0 to 1000, and not NaN."""

    name = "temperature"

    def __init__(self) -> None:
        super().__init__(0, 1000)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


@dataclass
class PromptLine:
    """Reads prompts and settings from standard input until it ends.

    `settings` are temperature, top-k, tokens and seed (None: another one for each prompt); `types` say which
    values they take.
    """

    model: GPTModel
    tokenizer: tiktoken.Encoding
    settings: dict[str, Any]
    types: dict[str, click.ParamType]

    def run(self) -> None:
        """Answer line after line."""
        at_terminal = sys.stdin.isatty()
        sys.stdin.reconfigure(errors="replace")
        if at_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then edits its line, and recalls those before it
            print(HELP)
        while True:
            try:
                line = input("> " if at_terminal else "")
                if re.fullmatch(r"\s*/(quit|exit|q)\s*", line):
                    return
                self._take(line)
            except EOFError:
                print(end="\n" if at_terminal else "")
                return
            except KeyboardInterrupt:  # in an answer, ends it; otherwise, discards the line
                print()
            except InputError as error:
                print(f"Error: {error}")

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            print(self._command(line))
        elif line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _command(self, line: str) -> str:
        """Obey a line such as `/temperature 0.7`; return what to say."""
        word, value = re.fullmatch(r"/\s*([^\s=]*)[\s=]*(.*?)\s*", line).groups()
        word = word.lower().replace("_", "-")
        names = [*self.settings, "help", "quit"]
        fitting = [name for name in names if name == word] or [n for n in names if n.startswith(word)]
        if len(fitting) != 1:
            near = fitting or difflib.get_close_matches(word, names, n=1, cutoff=0.0)
            raise InputError(f"there is no /{word}; did you mean /{' or /'.join(near)}? /help says more")
        (name,) = fitting
        if name not in self.settings:
            return HELP
        if name == "seed" and value.lower() == "none":
            self.settings[name] = None
        elif value:
            try:
                self.settings[name] = self.types[name].convert(value, None, None)
            except click.BadParameter as error:
                raise InputError(f"/{name}: {error.message}") from None
        now = self.settings[name]
        return f"{name} {'none' if now is None else now}"

    def _answer(self, prompt: str) -> None:
        """Print the prompt and what follows it, as it comes."""
        (tokens,) = encode_prompts(self.tokenizer, [prompt], self.model.config.vocab_size)
        most = self.model.config.context_length
        if len(tokens) > most:
            print(f"(The prompt has {len(tokens):,} tokens; the model sees the last {most:,}.)")
        print(printable(prompt), end="", flush=True)
        for piece in self._pieces(tokens[-most:]):
            print(printable(piece), end="", flush=True)
        print("\n")

    def _pieces(self, tokens: list[int]) -> Iterator[str]:
        """What the model adds, token by token; a character whose bytes are in several tokens comes whole."""
        device = self.model.tok_emb.weight.device
        generator, seed = torch.Generator(device), self.settings["seed"]
        generator.manual_seed(seed) if seed is not None else generator.seed()
        options = {"temperature": self.settings["temperature"], "top_k": self.settings["top-k"]}
        options |= {"generator": generator, "stop": self.tokenizer.eot_token}
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rows = torch.tensor([tokens], device=device)
        for column in stream(self.model, rows, self.settings["tokens"], **options):
            # The model's vocabulary may be padded beyond the tokenizer's.
            if (token := column.item()) < self.tokenizer.n_vocab and token != self.tokenizer.eot_token:
                yield decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        yield decoder.decode(b"", final=True)
