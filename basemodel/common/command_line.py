"""Command-line plumbing for all scripts: one-line errors, exit statuses, checks of names and paths."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import click

from basemodel.common.errors import InputError, RunError
from basemodel.common.output import make_output_expendable

# Seconds that a torchrun process other than the node's first waits before it prints an error. All processes
# usually hit the same error; the first one prints it, and torchrun then ends the others. A process that
# is still alive after that is the only one that hit the error.
SILENCE_SECONDS = 5.0

runs_dir_option = click.option(
    "--runs-dir",
    type=Path,
    default=Path(__file__).parents[2] / "runs",
    show_default="runs/ beside this script",
    help="Folder of the runs.",
)


def run_command(command: click.Command, *, abruptly: bool = False) -> NoReturn:
    """Run a click command and exit with its status.

    The status is what the command returns (None means 0), 2 for wrong usage, configs or data, and 1 for a
    failure while running. Errors that the user can fix print one line on standard error, `Error: ...`; any
    other exception is a bug and keeps its traceback. `abruptly`: skip Python's normal exit, which the threads
    of a process group can block or abort after other processes have died.
    """
    make_output_expendable()
    try:
        Path.home()
    except RuntimeError:  # no HOME and no entry in /etc/passwd, as in many a container
        os.environ["HOME"] = tempfile.gettempdir()
    try:
        status = command.main(standalone_mode=False) or 0
    except click.exceptions.Abort:
        status = say_error("interrupted", 130)
    except click.ClickException as error:
        status = say_error(error.format_message(), 2)
    except InputError as error:
        status = say_error(str(error), 2)
    except (RunError, OSError) as error:
        status = say_error(str(error), 1)
    sys.stdout.flush()
    (os._exit if abruptly else sys.exit)(status)


def say_error(message: str, status: int) -> int:
    """Print an error, delayed if the node's first process may print the same one; return `status`."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SILENCE_SECONDS)
    print("Error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def available_cpus() -> int:
    """The CPUs that this process may use, which taskset, SLURM and containers limit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def require_file_path(path: Path) -> None:
    """Raise InputError if `path` is a folder or its parent folder does not exist."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: no such folder: {path.parent}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
