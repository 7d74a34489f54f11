"""The process that imports everything once, from which scripts and tests are forked: one for all of pytest's
workers, which pytest itself starts while they start. So this imports nothing that is slow."""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from functools import cache
from multiprocessing import resource_tracker
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
