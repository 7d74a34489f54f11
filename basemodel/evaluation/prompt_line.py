"""A prompt line: prompts are continued token by token, each by itself, and settings changed in between."""

import codecs
import contextlib
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import tiktoken
import torch

from basemodel.common.errors import InputError
from basemodel.common.output import printable
from basemodel.model.generation import Sampling, encode_prompts, random_generator, stream
from gpt import GPTModel

HELP = """\
Type a prompt, and the model continues it. It does not remember earlier prompts.
/temperature 0.7   randomness of the choice; 0 always takes the most likely token
/top-k 25          number of most likely tokens to sample from; 0: all
/tokens 100        tokens to add at most
/seed 42           give the same answer to the same prompt every time; /seed none: a different one each time
/help, /quit       show this text; leave, like Ctrl-D
A setting without a value shows it. Ctrl-C stops an answer. For a prompt that begins with /, type //."""


@dataclass
class PromptLine:
    """Reads prompts and settings from standard input until it ends.

    `settings` are temperature, top-k, tokens and seed (None: a different one for each prompt), of the click
    `types` with the same names.
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
        """Obey a line such as `/temperature 0.7`; return the answer."""
        word, value = re.fullmatch(r"/\s*([^\s=]*)[\s=]*(.*?)\s*", line).groups()
        word = word.lower().replace("_", "-")
        names = [*self.settings, "help", "quit"]
        matches = [name for name in names if name.startswith(word)]
        if len(matches) != 1:
            nearest = matches or difflib.get_close_matches(word, names, n=1, cutoff=0.0)
            raise InputError(f"there is no /{word}; did you mean /{' or /'.join(nearest)}? Try /help")
        (name,) = matches
        if name not in self.settings:
            return HELP
        if name == "seed" and value.lower() == "none":
            self.settings[name] = None
        elif value:
            try:
                self.settings[name] = self.types[name].convert(value, None, None)
            except click.BadParameter as error:
                raise InputError(f"/{name}: {error.message}") from None
        setting = self.settings[name]
        return f"{name} {'none' if setting is None else setting}"

    def _answer(self, prompt: str) -> None:
        """Print the prompt and its continuation, token by token."""
        (tokens,) = encode_prompts(self.tokenizer, [prompt], self.model.config.vocab_size)
        length = self.model.config.context_length
        if len(tokens) > length:
            print(f"(The prompt has {len(tokens):,} tokens; the model sees the last {length:,}.)")
        print(printable(prompt), end="", flush=True)
        for piece in self._pieces(tokens[-length:]):
            print(printable(piece), end="", flush=True)
        print("\n")

    def _pieces(self, tokens: list[int]) -> Iterator[str]:
        """What the model adds, token by token; a character spread over several tokens comes whole."""
        settings, stop = self.settings, self.tokenizer.eot_token
        generator = random_generator(self.model, settings["seed"])
        sampling = Sampling(settings["temperature"], settings["top-k"], generator, stop)
        rows = torch.tensor([tokens], device=generator.device)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for column in stream(self.model, rows, settings["tokens"], sampling):
            # The model's vocabulary may be padded beyond the tokenizer's.
            if (token := column.item()) < self.tokenizer.n_vocab and token != stop:
                yield decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        yield decoder.decode(b"", final=True)
