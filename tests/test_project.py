"""The project around its scripts: packages and imports, `make`, the set-up of a rented machine, the docs."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

from basemodel.training.resume import FREE_ON_RESUME

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {
    *("torch", "tiktoken", "datasets", "huggingface_hub", "safetensors"),
    *("numpy", "matplotlib", "tqdm", "click"),
}
PRODUCT = [*ROOT.glob("*.py"), *ROOT.glob("basemodel/**/*.py")]
EVERYTHING = [*PRODUCT, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]


def requirements(*extras: str) -> list[Requirement]:
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in (lines if extras else PROJECT["dependencies"])]


# ------------------------------------------------------------------------------------------------------------
# What is installed and imported
# ------------------------------------------------------------------------------------------------------------


def test_pytest_leaves_the_scripts_at_the_root_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    for path in ("tests/test_one.py", *(path.name for path in ROOT.glob("test_*.py"))):
        (tmp_path / path).write_text("def test_one(): pass")
    command = [sys.executable, "-m", "pytest", "-n0", "--collect-only"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert (done.returncode, collected) == (0, ["tests/test_one.py::test_one"]), done.stdout


def test_the_lock_pins_one_version_of_all_that_can_be_asked_for() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)] == []
    pins = dict(line.replace("-", "_").lower().split("==") for line in lines)
    assert len(pins) == len(lines), "each package once"
    assert pins["torch"] == "2.13.0"
    for asked in [*requirements(), *requirements(*PROJECT["optional-dependencies"])]:
        assert asked.specifier.contains(pins[asked.name.replace("-", "_")]), asked


def imports(node: ast.AST, *, loaded: bool = True) -> Iterator[tuple[str, bool]]:
    """The packages that a file imports, and whether importing the file is enough to load them."""
    if isinstance(node, ast.Import):
        yield from ((alias.name.partition(".")[0], loaded) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module.partition(".")[0], loaded
    elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        loaded = loaded and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from imports(child, loaded=loaded)


def test_the_core_dependencies_are_the_nine() -> None:
    assert sorted(requirement.name for requirement in requirements()) == sorted(CORE)


@pytest.mark.parametrize("name", sorted(CORE))
def test_each_core_dependency_is_used(name: str) -> None:
    assert any(name == package for path in PRODUCT for package, _ in imports(ast.parse(path.read_text())))


def test_files_load_core_dependencies_alone_and_extras_only_where_used() -> None:
    own = {path.stem for path in PRODUCT} | {"basemodel"}
    at_once = sys.stdlib_module_names | CORE | own
    extras = set(PROJECT["optional-dependencies"]) - {"test"}
    packages = {requirement.name.replace("-", "_") for requirement in requirements(*extras)}
    later = at_once | packages | {"pyarrow"}  # which comes with datasets
    for path in PRODUCT:
        for package, loaded in imports(ast.parse(path.read_text())):
            assert package in (at_once if loaded else later), f"{path.name} imports {package}"


def test_nothing_reads_or_writes_pickles() -> None:
    """Neither with a pickling module nor through torch or numpy."""
    forbidden = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {f"{module}.{name}" for module in ("torch", "np", "numpy") for name in ("load", "save")}
    assert len(EVERYTHING) > 40
    for path in EVERYTHING:
        for node in ast.walk(ast.parse(path.read_text())):
            names = {ast.unparse(node)} if isinstance(node, ast.Attribute) else set()
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            if isinstance(node, ast.keyword):
                names |= {node.arg}
            assert not names & (forbidden | calls | {"allow_pickle"}), f"{path}:{node.lineno}"


# ------------------------------------------------------------------------------------------------------------
# make and the set-up of a rented machine, with stand-ins for commands that would download or train
# ------------------------------------------------------------------------------------------------------------

STAND_IN = r"""#!/bin/sh
name=${0##*/}
echo "$name $*" >>"$HOME/calls"
case "$name $*" in
    "id -u") echo 1000 ;;
    "sudo "*) exec "$@" ;;
    "apt-get install "*fonts-humor-sans*) touch "$HOME/font" ;;
    "fc-list "*) [ ! -e "$HOME/font" ] || { echo "Humor Sans"; yes | head -n 100000; } ;;
    "python3 -c "*version_info*) [ ! -e "$HOME/old" ] || exec "$REAL" -c "$OLD$2" ;;
    *" -m venv .venv" | "uv venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "pip3 install "*" uv") mkdir -p "$HOME/.local/bin" && cp "$0" "$HOME/.local/bin/uv" ;;
    "nvidia-smi "*) cat "$HOME/gpus" ;;
    "apt-get install "*" build-essential python3.12-dev") touch "$HOME/tools" ;;
    "python -c "*missing_build_tools*) [ -e "$HOME/tools" ] ;;
    "python -c "*-dev*) echo python3.12-dev ;;
    "python -c"*) [ ! -e "$HOME/no-cuda" ] ;;
    "python prepare_datasets.py "*) mkdir -p "$3" && touch "$3/meta.json" ;;
    "python ddp_train.py "*) mkdir "$SAVED" && ln -s TODAY-iteration-9 "$SAVED/best" ;;
esac
"""


class Machine:
    """A copy of the project on a machine with stand-in commands that record how they are called."""

    def __init__(self, folder: Path, *stand_ins: str) -> None:
        self.home, self.project, commands = folder / "home", folder / "project", folder / "bin"
        for path in (self.home, commands, self.project / "runs/demo"):
            path.mkdir(parents=True)
        for name in ("Makefile", "setup_lambda.sh", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, self.project)
        for name in stand_ins:
            (commands / name).write_text(STAND_IN)
            (commands / name).chmod(0o755)
        usual = "bash sh make echo dirname env grep wc cat cp mkdir touch ln yes head readlink"
        for name in set(usual.split()) - set(stand_ins):
            (commands / name).symlink_to(shutil.which(name))
        self.env = {
            "PATH": str(commands),
            "HOME": str(self.home),
            "SAVED": "runs/demo/checkpoints",
            "REAL": sys.executable,
            "OLD": "import sys; sys.version_info = 3, 10; ",
        }

    def run(self, *command: str) -> tuple[list[str], list[str]]:
        """Run a command that must succeed; return the calls it made and the lines it printed."""
        (self.home / "calls").unlink(missing_ok=True)
        done = subprocess.run(command, cwd=self.project, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        calls = self.home / "calls"
        return calls.read_text().splitlines() if calls.exists() else [], done.stdout.splitlines()


INSTALL = "python -m pip install --quiet -c requirements.lock -e ."


def test_make_demo_prepares_trains_and_says_where_things_are(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "python3")
    calls, output = machine.run("make", "demo")
    assert calls[1:3] == ["python3 -m venv .venv", INSTALL]
    assert [" ".join(call.split()[1:4]) for call in calls[3:]] == [
        "prepare_datasets.py python-docs datasets/local/python-docs",
        "ddp_train.py demo datasets",
        "test_smoke.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors",
    ]
    assert output[-2:] == [
        "Chart:      runs/demo/training-run-chart.png",
        "Checkpoint: runs/demo/checkpoints/TODAY-iteration-9",
    ]
    shutil.rmtree(machine.project / "runs/demo/checkpoints")
    calls, _ = machine.run("make", "demo")
    assert [call.split()[1] for call in calls] == ["ddp_train.py", "test_smoke.py"], "the rest is there"
    calls, _ = machine.run("make", "test")
    assert calls == [f"{INSTALL[:-2]} .[test]", "python -m pytest"]


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "python3")
    (machine.home / "old").touch()
    with pytest.raises(AssertionError, match="Error 1"):
        machine.run("make", "test")
    assert len((machine.home / "calls").read_text().splitlines()) == 1, "nothing after the first look"


def test_the_set_up_of_a_rented_machine_can_be_repeated(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "id", "sudo", "apt-get", "fc-list", "python3", "python3.12", "nvidia-smi")
    (machine.home / "gpus").write_text("NVIDIA H100 80GB HBM3\n" * 8)
    calls, output = machine.run("bash", "setup_lambda.sh")
    font = "apt-get install -y --no-install-recommends fontconfig fonts-humor-sans"
    tools = "apt-get install -y --no-install-recommends build-essential python3.12-dev"
    for call in (font, tools, "python3.12 -m venv .venv", INSTALL):
        assert calls.count(call) == 1, call
    assert output.count("NVIDIA H100 80GB HBM3") == 8
    assert output[-1].strip() == "torchrun --nproc_per_node=8 ddp_train.py 8xh100m80-best datasets --resume"

    (machine.home / "gpus").write_text("NVIDIA A100-SXM4-40GB\n" * 8)
    calls, output = machine.run("bash", "setup_lambda.sh")
    assert "already there" in output
    assert not [call for call in calls if "apt-get" in call or "venv" in call]
    assert calls.count(INSTALL) == 1
    assert output[-1].strip() == "torchrun --nproc_per_node=8 ddp_train.py 8xa100m40-best datasets --resume"

    (machine.home / "gpus").write_text("NVIDIA H100 80GB HBM3\n")
    _, output = machine.run("bash", "setup_lambda.sh")
    assert output[-1].strip() == "torchrun --nproc_per_node=1 ddp_train.py 1xrtx3090-best datasets --resume"

    (machine.home / "no-cuda").touch()
    with pytest.raises(AssertionError):
        machine.run("bash", "setup_lambda.sh")


@pytest.mark.parametrize("run", ["8xh100m80-best", "8xa100m40-best", "1xrtx3090-best"])
def test_the_set_up_names_runs_that_exist(run: str) -> None:
    assert run in (ROOT / "setup_lambda.sh").read_text()
    assert (ROOT / "runs" / run / "train.json").exists()


def test_the_set_up_gets_uv_where_python_is_too_old(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "id", "python3", "pip3")
    (machine.home / "old").touch()
    calls, output = machine.run("bash", "setup_lambda.sh")
    assert [call for call in calls if call.split()[0] in ("pip3", "uv")] == [
        "pip3 install --quiet --user uv",
        "uv venv --python 3.12 --seed .venv",
        "uv pip install --quiet --python .venv/bin/python -c requirements.lock -e .",
    ]
    assert "no font was installed; charts will use DejaVu Sans" in output
    assert "nvidia-smi finds no GPU; training would run on the CPU" in output
    assert output[-1].strip() == "torchrun --nproc_per_node=1 ddp_train.py 1xrtx3090-best datasets --resume"


BESIDE_PYTHON = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


@pytest.mark.parametrize("script", ["setup_lambda.sh", ".ci/run"])
@pytest.mark.parametrize("check", ["bash -n", "shellcheck"])
def test_shell_scripts_are_sound(check: str, script: str) -> None:
    if shutil.which(check.split()[0], path=BESIDE_PYTHON) is None:
        pytest.skip(f"{check} is not installed")
    env = {**os.environ, "PATH": BESIDE_PYTHON}
    done = subprocess.run([*check.split(), script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------
# The README and docs/
# ------------------------------------------------------------------------------------------------------------

PAGES = runpy.run_path(str(ROOT / "docs/make_pages.py"))["PAGES"]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md")]


def links(document: Path) -> set[str]:
    """The targets of a document's links and images, without web addresses."""
    targets = re.findall(
        r"""\]\(([^)#\s]+)[^)]*\)|(?:src|href)="([^"]+)\"""", document.read_text(encoding="utf-8")
    )
    return {link or image for link, image in targets if "://" not in link + image}


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "run `make docs`"


def test_the_page_about_the_code_lists_every_module() -> None:
    modules = {path.resolve() for path in (*ROOT.glob("*.py"), *ROOT.glob("basemodel/*/*.py"))}
    listed = {
        (ROOT / "docs" / link).resolve() for link in links(ROOT / "docs/code.md") if link.endswith(".py")
    }
    assert listed - {ROOT / "tests/test_layout.py"} == modules


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    assert not [link for link in links(document) if not (document.parent / link).exists()]


def test_the_page_about_resuming_names_the_keys_that_may_change() -> None:
    _, _, section = (ROOT / "docs/surviving.md").read_text().partition("## Keys that may change")
    assert set(re.findall(r"`(\w+)`", section.partition("\n## ")[0])) == FREE_ON_RESUME


def test_the_readme_is_short_and_shows_every_room_and_script() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 160
    rooms = {path.name for path in ROOT.glob("basemodel/*") if any(path.glob("*.py"))}
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert not {name for name in rooms if f"  {name}/ " not in readme}
    assert not {name for name in scripts if name not in readme}


def test_the_tests_that_hold_promises_exist() -> None:
    """docs/tested.md names at least one test for each promise."""
    rows = [
        line.split(" | ")[1].rstrip(" |")
        for line in (ROOT / "docs/tested.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith(("| promise", "| ---"))
    ]
    named = {name for row in rows for name in row.split(", ")}
    written = {
        f"{path.stem.removeprefix('test_')}::{node.name.removeprefix('test_')}"
        for path in ROOT.glob("tests/test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert len(named) > 60 and named <= written, sorted(named - written)
