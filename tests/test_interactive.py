"""test_smoke.py --interactive: streamed answers, settings, and characters shown only when complete."""

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT, write_model
from safetensors.torch import load_file, save_file

from basemodel.common.errors import InputError
from basemodel.data.tokenizer import get_tokenizer
from basemodel.evaluation import prompt_line
from basemodel.evaluation.prompt_line import PromptLine
from basemodel.model.weights import load_model
from test_smoke import main

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(path) for path in write_model(tmp_path_factory.mktemp("model"), context_length=48)]


def output_of(files: list[str], lines: str | bytes, *options: str) -> str:
    """The output of the prompt line for these lines, through a pipe."""
    done = CliRunner().invoke(main, [*files, "--interactive", *options], input=lines, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def answer(files: list[str], prompt: str, *options: str) -> str:
    """The same without the prompt line."""
    done = CliRunner().invoke(main, [*files, "--prompt", prompt, *options], catch_exceptions=False)
    return done.stdout + "\n"


def test_answers_are_those_without_a_prompt_line_and_each_prompt_stands_alone(files: list[str]) -> None:
    options = ("--seed", "3", "--tokens", "60", "--temperature", "0.9")
    one, other = (answer(files, prompt, *options) for prompt in ("one", "Größe /語"))
    assert output_of(files, "one\nGröße /語\n\none\n", *options) == one + other + one
    assert output_of(files, "//dir\n", *options) == answer(files, "/dir", *options)


def test_settings_are_changed_between_prompts(files: list[str]) -> None:
    greedy = answer(files, "a", "--temperature", "0", "--tokens", "7")
    sampled = answer(files, "a", "--temperature", "1.5", "--top-k", "3", "--tokens", "9", "--seed", "11")
    *changed, rest = output_of(files, "/temperature 0\n/tokens 7\n/\na\n").split("\n", 3)
    counts = (20, 7, 7)
    assert changed == [f"/temperature 0.0 /top-k 25 /tokens {count} /seed None" for count in counts]
    assert rest == greedy
    *changed, rest = output_of(files, "/temperature 1.5 /top-k=3\n/tokens 9 /seed 11\na\n").split("\n", 2)
    assert changed[1] == "/temperature 1.5 /top-k 3 /tokens 9 /seed 11"
    assert rest == sampled


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/tempertaure 1", "No such option '--tempertaure'. Did you mean '--temperature'?"),
        ("/temperature -1", "Invalid value for '--temperature': -1.0 is not in the range 0<=x<=1000."),
        ("/tokens many", "Invalid value for '--tokens': 'many' is not a valid integer range."),
        ("/seed", "Option '--seed' requires an argument."),
    ],
)
def test_what_is_mistyped_is_one_line_and_changes_nothing(files: list[str], line: str, error: str) -> None:
    options = ("--temperature", "0", "--tokens", "3")
    shown = output_of(files, f"{line}\na\n", *options)
    assert shown.startswith(f"Error: {error}")
    assert shown.split("\n", 1)[1] == answer(files, "a", *options)


def test_a_prompt_longer_than_the_context_is_cut_with_a_note(files: list[str]) -> None:
    options = ("--temperature", "0", "--tokens", "5")
    note, rest = output_of(files, "x" * 20 + "y" * 48 + "\n", *options).split("\n", 1)
    assert note == "(The prompt has 68 tokens; the model sees the last 48.)"
    assert rest == "x" * 20 + answer(files, "y" * 48, *options)


def test_prompt_and_samples_go_without_a_prompt_line(files: list[str]) -> None:
    for option in (("--prompt", "a"), ("--samples", "2")):
        with pytest.raises(InputError, match="--interactive reads its prompts itself; leave out --prompt"):
            main.main([*files, "--interactive", *option], standalone_mode=False)


class Screen:
    """A standard output that records each write."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        self.written.append(text)

    def flush(self) -> None:
        pass


def test_an_answer_streams_and_shows_no_character_by_halves(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that says what it is told, a byte at a time; its last character lacks a byte."""
    text = "é語🙂\x1b[2J!".encode() + "語".encode()[:2]
    screen, says = Screen(), iter(text)
    monkeypatch.setattr(sys, "stdout", screen)

    def stream(*_: object) -> Iterator[torch.Tensor]:
        for byte in says:
            screen.written.append(byte)
            yield torch.tensor([[byte]])

    monkeypatch.setattr(prompt_line, "stream", stream)
    settings = {"temperature": 0.0, "top_k": 1, "tokens": 99, "seed": None}
    line = PromptLine(load_model(*map(Path, files)), get_tokenizer("bytes"), settings, [])
    line._answer("ä")
    told = [i for i, item in enumerate(screen.written) if isinstance(item, int)]
    shown = [item for item in screen.written if isinstance(item, str)]
    assert "".join(shown) == "äé語🙂\\x1b[2J!\N{REPLACEMENT CHARACTER}\n\n"
    between = ["".join(screen.written[a + 1 : b]) for a, b in pairwise(told)]
    assert between == ["", "é", "", "", "語", "", "", "", "🙂", "\\x1b", "[", "2", "J", "!", ""]


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "dumb"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
            os.execv(sys.executable, [sys.executable, *command])
        self.shown = ""

    def expect(self, pattern: str) -> str:
        """Wait until the terminal shows `pattern`; return what stood before, and it."""
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.handle], [], [], 1)[0]:
                self.shown += os.read(self.handle, 4096).decode(errors="replace")
        seen, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return seen

    def type(self, keys: str) -> None:
        os.write(self.handle, keys.encode())


def test_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C stops an answer and discards a line, Ctrl-D leaves. The model never ends by itself."""
    model_json, weights = write_model(tmp_path, context_length=48)
    tensors = load_file(weights)
    tensors["final_norm.shift"].fill_(5.0)
    tensors["out_head.weight"][256].fill_(-1.0)
    save_file(tensors, weights)
    options = ("--interactive", "--tokens", "1000000")
    terminal = Terminal("test_smoke.py", str(model_json), str(weights), *options)
    assert "Ctrl-C stops an answer" in terminal.expect("> $")
    terminal.type("abc\n")
    terminal.expect(r"abc\r\nabc.{100}")
    terminal.type("\x03")
    terminal.expect(r"\r\n> $")
    terminal.type("discarded")
    terminal.expect("discarded")
    time.sleep(0.3)  # Python notices a signal that comes before it waits only with the next key
    terminal.type("\x03")
    terminal.expect(r"\r\n> $")
    terminal.type("/tokens 1000001\n")
    terminal.expect(r"/tokens 1000001 /seed None\r\n> $")
    terminal.type("\x04")
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
