"""Answers kept on disk, so that nothing is computed, or asked and paid for, twice."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from basemodel.common.errors import InputError


class AnswerCache:
    """Answers by key, one JSON line each in the file at `path`. Raises InputError if it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, Any] = {}
        try:
            self._file = path.open("a+b", buffering=0)
            self._file.seek(0)
            text = self._file.read()
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, after a kill
                entry = json.loads(line)
                self.answers[entry["key"]] = entry["reply"]
        if text and not text.endswith(b"\n"):
            self._file.write(b"\n")

    def add(self, answers: dict[str, Any]) -> None:
        """Keep answers; they are on disk when this returns. It is a single write, so threads need no lock."""
        self.answers |= answers
        lines = [json.dumps({"key": key, "reply": answer}) + "\n" for key, answer in answers.items()]
        self._file.write("".join(lines).encode())
        os.fsync(self._file.fileno())


def key_of(question: Any) -> str:
    """The key of a question that JSON can express: its SHA-256."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
