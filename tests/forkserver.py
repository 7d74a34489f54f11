"""The process that imports everything once, from which scripts and tests are forked: one for all of pytest's
workers, which pytest itself starts while they start. So this imports nothing that is slow."""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
from functools import cache
from importlib import import_module
from multiprocessing import resource_tracker
from pathlib import Path
from unittest.mock import patch

import shim

FORKSERVER = multiprocessing.get_context("forkserver")
SCRIPTS = ("ddp_train", "prepare_datasets", "compare_runs", "upload_model")
SCRIPTS += ("test_loss", "test_smoke", "test_ift", "test_harness", "ablate")
HEAVY = (
    "torch._dynamo",
    "torch.distributed.run",
    "matplotlib.pyplot",
    "matplotlib.font_manager",
    "tiktoken",
    "openai",
    "pytest",
    "pyarrow.parquet",
    # What `datasets` imports; itself and huggingface_hub read the environment as they are imported.
    "pandas",
    "pyarrow.dataset",
    "fsspec",
    "multiprocess",
    "httpx",
    "yaml",
)
ADDRESS = "TESTS_FORKSERVER"  # the environment variable that tells workers where the process listens


@cache
def start_forkserver() -> bool:
    """Start the process, unless pytest has; it finds modules as this one does. Returns whether it has the
    library of faults.c, which does nothing until a test asks for it."""
    server = multiprocessing.forkserver._forkserver
    if address := os.environ.get(ADDRESS):
        server._forkserver_address = address
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # pytest has the one that counts
        server.ensure_running = resource_tracker.ensure_running
        return "TESTS_WITHOUT_FAULTS" not in os.environ
    FORKSERVER.set_forkserver_preload(["preload"])
    library = shim.library_file()
    env = shim.environment(library) if library else {}
    # Given for a single test, where importing everything takes longer than it saves.
    env["PRELOAD"] = os.environ.get("PRELOAD") or ",".join([*SCRIPTS, *HEAVY])
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with patch.dict(os.environ, env):
        multiprocessing.forkserver.ensure_running()
    return library is not None


def start_for_all_workers() -> None:
    """Start the process from pytest's own, and tell the workers that pytest is about to start."""
    if sys.version_info < (3, 14):  # which has each of them know a secret
        if not start_forkserver():
            os.environ["TESTS_WITHOUT_FAULTS"] = "1"
        os.environ[ADDRESS] = multiprocessing.forkserver._forkserver._forkserver_address


def be_script(
    command: list[str], env: dict[str, str], files: tuple[str, str], before: str, folder: Path
) -> None:
    """Be a script, in a process group of its own, whose output goes to two files."""
    os.setpgid(0, 0)
    for number, name in enumerate(files, start=1):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, number)
    os.chdir(folder)
    be_python(command, env, before)


def be_python(words: list[str], env: dict[str, str], before: str = "") -> None:
    """Do what `python WORDS` would do, in this process, after the statements `before`."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    unbuffered = words[0] == "-u" or "PYTHONUNBUFFERED" in env
    sys.stdout = open(1, "w", closefd=False, buffering=1 if unbuffered else -1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    if "GPT2_STAND_IN" in env:  # set by the fixture `gpt2`
        import_module("tiktoken.registry").ENCODINGS["gpt2"] = import_module("texts").gpt2_stand_in()
    words = words[1:] if words[0] == "-u" else words
    is_script = words[0] not in ("-c", "-m")
    sys.path.insert(0, str(Path(words[0]).resolve().parent if is_script else Path.cwd()))
    sys.argv = words if is_script else words[1:]
    exec(before, {})
    if is_script:
        runpy.run_path(words[0], run_name="__main__")
    elif words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        exec(words[1], {"__name__": "__main__"})
