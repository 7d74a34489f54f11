"""What every script does with what a user typed: names, errors in one line, exit status."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from basemodel.errors import InputError, RunError

# How long a torchrun process other than the node's first waits with an error, in seconds: all processes of a
# node meet the same error, the first one says it, and torchrun then ends the others. One that still lives met
# it alone.
SILENCE_SECONDS = 5.0


def run_command(command: click.Command, leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a click command and `leave` with the exit status: what the command returns (None is 0), 2 for wrong
    usage, configs or data, 1 for a failure while running.

    Errors that the user can fix are one line on standard error, `Error: ...`; any other exception is a bug
    in this project and keeps its traceback.
    """
    try:
        status = command.main(standalone_mode=False) or 0
    except click.exceptions.Abort:
        status = _say_error("interrupted", 130)
    except (InputError, click.ClickException) as error:
        status = _say_error(
            error.format_message() if isinstance(error, click.ClickException) else str(error), 2
        )
    except (RunError, OSError) as error:
        status = _say_error(str(error), 1)
    sys.stdout.flush()
    leave(status)


def _say_error(message: str, status: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SILENCE_SECONDS)
    print("Error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def require_plain_name(name: str, what: str) -> str:
    """Return `name` if it is a plain folder name, so that it cannot lead out of the folder it is looked up
    in.

    Raises InputError otherwise. Plain is `[A-Za-z0-9._-]+`, and neither `.` nor `..`.
    """
    plain = re.fullmatch(r"[A-Za-z0-9._-]+", name) and name not in (".", "..")
    if not plain:
        raise InputError(f"{what} '{name}' must be a plain name of letters, digits, '.', '_' and '-'")
    return name


def require_inside(folder: Path, path: Path) -> None:
    """Raise InputError if `path`, by way of links, leads out of the folder that it was looked up in."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path}: is a link that leads out of {folder}; give the folder itself")


def require_dataset_id(dataset: str) -> None:
    """Raise InputError unless `dataset` is a Hub data set id, OWNER/NAME, both of them plain names."""
    owner, slash, name = dataset.partition("/")
    if not slash:
        raise InputError(f"dataset must be OWNER/NAME, not '{dataset}'")
    require_plain_name(owner, "the dataset's owner")
    require_plain_name(name, "the dataset's name")
