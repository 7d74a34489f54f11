"""notebooks/colab.ipynb from top to bottom: on a CPU, with tiny models, and a folder for Google Drive."""

import json
import os
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from forkserver import ADDRESS, start_for_all_workers
from helpers import BYTES, ROOT, Sandbox, write_dataset
from mutants import NOT_COPIED
from nbclient import NotebookClient

# In place of the cell with the addresses; the package is installed already.
PARAMETERS = """
REPOSITORY, PROJECT = "nowhere", {project!r}
DRIVE = {drive!r}
SOURCE = {source!r} + " --tokenizer bytes"
RUN = "tiny"
"""
# What Google Drive cannot do, for paths below it.
NO_LINKS_NO_LOCKS = """
import errno, fcntl, os
def refused(call, place):
    def maybe(*arguments, **options):
        if {drive!r} in str(place(arguments)):
            raise OSError(errno.EPERM, "Operation not permitted")
        return call(*arguments, **options)
    return maybe
os.symlink = refused(os.symlink, lambda arguments: arguments[1])
for name in ("flock", "lockf"):
    place = lambda arguments: os.readlink(f"/proc/self/fd/{{arguments[0]}}")
    setattr(fcntl, name, refused(getattr(fcntl, name), place))
"""
# What happens to the run on the first machine.
TAKEN_AWAY = """
import signal, sys
from basemodel.results.reporting import Reporter
log = Reporter.step
def step(self, number, *arguments):
    log(self, number, *arguments)
    if number == 5 and not os.path.exists("taken_away"):
        open("taken_away", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
if "tiny" in sys.argv:
    Reporter.step = step
"""
# The module by which a notebook mounts it.
COLAB = """
import sys, types
colab = types.ModuleType("google.colab")
colab.drive = types.SimpleNamespace(mount=lambda place: print("Mounted at", place))
sys.modules |= {"google": types.ModuleType("google"), "google.colab": colab}
"""
# The `python` of the cells: forked like the other tests' scripts, because importing PyTorch takes longer.
PYTHON = """#!{python}
import os, sys
sys.path.insert(0, {tests!r})
from forkserver import FORKSERVER, be_script, start_forkserver
if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] == "ddp_train.py" and "--runs-dir" not in words:
        words += ["--runs-dir", "runs"]  # by default that of the project from which it is forked
    start_forkserver()
    files = [f"/proc/{{os.getpid()}}/fd/{{number}}" for number in (1, 2)]
    values = words, dict(os.environ), files, {drive!r}, os.getcwd()
    script = FORKSERVER.Process(target=be_script, args=values)
    script.start()
    script.join()
    sys.exit(script.exitcode)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project whose demo is over in a second, with another tiny run beside it."""
    project = Path(shutil.copytree(ROOT, tmp_path / "project", ignore=NOT_COPIED))
    sandbox = Sandbox(project)
    tokens = np.random.default_rng(0).integers(32, 127, 40_000).astype(np.uint16)
    meta = {"tokenizer": "bytes", "vocab_size": 257}
    write_dataset(project / "datasets/local/python-docs", tokens, tokens, meta)
    demo = project / "runs/demo"
    configs = {name: json.loads((demo / name).read_text()) for name in ("model.json", "train.json")}
    configs["train.json"] |= {"min_train_tokens": 4 * 2048, "precision": "fp32"}
    shutil.rmtree(demo)  # it may have been trained
    demo.mkdir()
    for name, values in configs.items():
        (demo / name).write_text(json.dumps(values))
    (project / "stories").mkdir()
    (project / "stories/a.txt").write_text("Once upon a time there was a text. " * 300)
    tiny = {"dataset": "local/stories", "epochs": 99, "checkpoint_interval": 3, "keep_checkpoints": 2}
    sandbox.write_run("tiny", BYTES, tiny)
    return project


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is Google Drive to the notebook and to the commands of its cells."""
    drive = tmp_path / "drive"
    for folder in ("site", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(COLAB)
    wrapper = tmp_path / "bin/python"
    limits = NO_LINKS_NO_LOCKS.format(drive=str(drive)) + TAKEN_AWAY
    wrapper.write_text(PYTHON.format(python=sys.executable, tests=str(Path(__file__).parent), drive=limits))
    wrapper.chmod(0o755)
    if ADDRESS not in os.environ:
        start_for_all_workers()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return drive


def execute(notebook: nbformat.NotebookNode) -> list[str]:
    """Execute a notebook's cells in a kernel of their own; return what each has printed."""
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(each.get("text", "") for each in cell.outputs) for cell in cells]


def test_the_notebook_goes_on_from_top_to_bottom_where_colab_took_the_machine_away(
    project: Path, drive: Path, tmp_path: Path
) -> None:
    notebook = nbformat.read(ROOT / "notebooks/colab.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("REPOSITORY = ")
    values = {"project": str(project), "drive": str(drive), "source": str(project / "stories")}
    cells[0].source = PARAMETERS.format(**values)
    cells[1].source = "\n".join(line for line in cells[1].source.splitlines() if not line.startswith("%pip"))
    training = next(number for number, cell in enumerate(cells) if "{RUN} datasets" in cell.source)
    before = [*cells[:3], *cells[training - 1 : training + 1]]
    said = execute(nbformat.from_dict({**notebook, "cells": before}))
    assert "Starting" not in said[-1] and "Training complete" not in said[-1], said[-1]
    checkpoints = drive / "runs/tiny/checkpoints"
    assert [path.name.rpartition("-")[2] for path in checkpoints.glob("2*")] == ["3"]

    shutil.rmtree(project / "datasets/local/stories")  # it was on the machine
    said = execute(notebook)
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    assert not [text for text in said if "Error" in text or "Traceback" in text], said
    assert sum("Training complete in" in text for text in said) == 2
    assert "Resuming after step 3" in said[training] and "Warning: " in said[training], "there are no locks"
    pictures = [each for cell in cells for each in cell.outputs if "image/png" in each.get("data", {})]
    assert len(pictures) == 2
    assert (checkpoints / "latest").is_file() and not (checkpoints / "latest").is_symlink()
    assert (drive / "exported/model.safetensors").exists()
