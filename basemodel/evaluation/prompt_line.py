"""A prompt line: prompts are continued token by token, each by itself, and settings changed in between."""

import codecs
import contextlib
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
/temperature 0.7 changes an option of this command, and / shows /temperature, /top-k, /tokens and /seed.
For a prompt that begins with /, type //. Ctrl-C stops an answer, Ctrl-D leaves."""


@dataclass
class PromptLine:
    """Reads prompts and settings from standard input until it ends. `settings` are the values of temperature,
    top_k, tokens and seed (None: a different one for each prompt), `options` their click options."""

    model: GPTModel
    tokenizer: tiktoken.Encoding
    settings: dict[str, Any]
    options: list[click.Parameter]

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
                if line.startswith("/") and not line.startswith("//"):
                    self._change_settings(line)
                elif line.strip():
                    self._answer(line.removeprefix("/"))
            except EOFError:
                print(end="\n" if at_terminal else "")
                return
            except KeyboardInterrupt:  # in an answer, ends it; otherwise, discards the line
                print()
            except InputError as error:
                print(f"Error: {error}")

    def _change_settings(self, line: str) -> None:
        """Obey a line such as `/temperature 0.7`, which click reads as options."""
        words = line.replace("/", "--").split()
        command = click.Command("", params=self.options, add_help_option=False)
        try:
            self.settings |= command.make_context("", words, default_map=self.settings).params
        except click.UsageError as error:
            raise InputError(error.format_message()) from None
        print(" ".join(f"/{name.replace('_', '-')} {value}" for name, value in self.settings.items()))

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
        sampling = Sampling(settings["temperature"], settings["top_k"], generator, stop)
        rows = torch.tensor([tokens], device=generator.device)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for column in stream(self.model, rows, settings["tokens"], sampling):
            # The model's vocabulary may be padded beyond the tokenizer's.
            if (token := column.item()) < self.tokenizer.n_vocab and token != stop:
                yield decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        yield decoder.decode(b"", final=True)
