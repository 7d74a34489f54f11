"""Command-line plumbing of all scripts: one-line errors, exit statuses, checks of names and paths."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from basemodel.common.errors import InputError, RunError

# Seconds that a torchrun process other than the node's first waits before it prints an error. All processes
# usually hit the same error; the first one prints it, and torchrun then ends the others. A process that is
# still alive after that hit it alone.
SILENCE_SECONDS = 5.0


def run_command(command: click.Command, leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a click command and `leave` with its exit status.

    That is what the command returns (None means 0), 2 for wrong usage, configs or data, and 1 for a failure
    while running. Errors that the user can fix are one line on standard error, `Error: ...`; any other
    exception is a bug and keeps its traceback.
    """
    try:
        status = command.main(standalone_mode=False) or 0
    except click.exceptions.Abort:
        status = say_error("interrupted", 130)
    except (InputError, click.ClickException) as error:
        status = say_error(
            error.format_message() if isinstance(error, click.ClickException) else str(error), 2
        )
    except (RunError, OSError) as error:
        status = say_error(str(error), 1)
    sys.stdout.flush()
    leave(status)


def say_error(message: str, status: int) -> int:
    """Print an error's line, late where the node's first process may print the same; return `status`."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SILENCE_SECONDS)
    print("Error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


class FileSize(click.ParamType):
    """A file's size with a decimal unit, as disks and the Hub count: 500kB, 1.5MB or 40GB."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The size in bytes, at least 1,000: less has no room for a file's header and a sequence."""
        match = re.fullmatch(r"(\d+\.?\d*) ?([kmg])b", value.strip(), re.IGNORECASE)
        size = round(float(match[1]) * 1000 ** " kmg".index(match[2].lower())) if match else 0
        if size < 1000:
            self.fail(f"'{value}' is not a size of at least 1kB, such as 500kB, 1.5MB or 40GB", param, ctx)
        return size


def require_plain_name(name: str, what: str) -> str:
    """Return `name` if it is a plain folder name, which cannot lead out of its parent folder.

    Plain means `[A-Za-z0-9._-]+`, and neither `.` nor `..`. Raises InputError otherwise.
    """
    plain = re.fullmatch(r"[A-Za-z0-9._-]+", name) and name not in (".", "..")
    if not plain:
        raise InputError(f"{what} '{name}' must be a plain name of letters, digits, '.', '_' and '-'")
    return name


def require_inside(folder: Path, path: Path) -> None:
    """Raise InputError if `path` resolves, through links, to a place outside `folder`."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path}: is a link that points outside {folder}; give the folder itself")


def require_file_path(path: Path) -> None:
    """Raise InputError unless a file can be written to `path`, as far as folders go."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder: {path.parent}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")


def require_repo_id(repo_id: str, what: str = "dataset") -> None:
    """Raise InputError unless `repo_id`, of a `what` on the Hub, is OWNER/NAME, with plain names."""
    owner, slash, name = repo_id.partition("/")
    if not slash:
        raise InputError(f"{what} must be OWNER/NAME, not '{repo_id}'")
    require_plain_name(owner, f"the {what}'s owner")
    require_plain_name(name, f"the {what}'s name")
