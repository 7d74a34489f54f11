"""Each script of benchmarks/ runs to its end on a tiny model, and prints figures."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    BYTES,
    FORKED,
    MODEL,
    ROOT,
    TRAIN,
    Sandbox,
    Script,
    is_alive,
    needs_gpt2,
    random_tokens,
    rank_environment,
    reserve_port,
    write_dataset,
)

from basemodel.common.errors import RunError
from basemodel.training.processes import join_world

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations
import common
import gpu
import gpu_parts
import ladder
import lease
import optimizers

FIGURE = r"-?[\d,]*\.?\d+"
SPREAD = rf"{FIGURE} \({FIGURE} to {FIGURE}\)"
SIGNED = SPREAD.replace("-?", "[+-]")


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    """The runs demo and demo-rate: tiny, with all that a benchmark has to cope with."""
    sandbox = Sandbox(tmp_path, {"OMP_NUM_THREADS": "1"})
    tokens = {"train": random_tokens(4000, 257), "validation": random_tokens(2000, 257)}
    write_dataset(sandbox.datasets / "test/tokens", **tokens)
    changes = {
        "optimizer": "muon",
        "clipping_max_norm": 1.0,
        "validation_interval": 4,
        "validation_batches": 2,
    }
    sandbox.write_run("demo", BYTES, changes)
    sandbox.write_run("demo-rate", BYTES, {**changes, "learning_rate": 0.02})
    return sandbox


def measured(
    sandbox: Sandbox,
    name: str,
    *options: object,
    runs: bool = True,
    before: str = FORKED,
) -> str:
    """What a benchmark prints."""
    words = [f"benchmarks/{name}.py", *map(str, options)]
    words += ["--runs-dir", str(sandbox.path / "runs")] if runs else []
    done = Script(words, sandbox.env, before).wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_lines(said: str, *patterns: str) -> None:
    """Each pattern is that of one line; a space in it stands for any number of them."""
    for pattern in patterns:
        spaced = pattern.replace(" ", " +")
        assert len(re.findall(rf"^{spaced}$", said, re.MULTILINE)) == 1, f"{pattern}\n{said}"


def test_every_benchmark_is_run_here() -> None:
    scripts = {path.stem for path in ROOT.glob("benchmarks/*.py")} - {
        "common",
        "reference",
        "gpu_parts",
        "lease",
    }
    scripts.remove("roofline")  # whose figures test_plan.py checks
    assert scripts == set(
        re.findall(r'(?:measured|Script)\([^"]*"(?:benchmarks/)?(\w+)(?:\.py)?"', Path(__file__).read_text())
    )


def test_ablations(sandbox: Sandbox) -> None:
    command = sandbox.datasets, sandbox.path / "kept", "--seeds", 1, "--tokens", 256, "--rounds", 2
    said = measured(sandbox, "ablations", *command)
    assert_lines(said, rf"\| demo \| 1 \| {FIGURE} \| .*", rf"\| learning_rate=0.02 \| 1 \| {FIGURE} \| .*")
    assert_lines(said, rf"\| demo \| \| {FIGURE} \| 1.00 \|")
    assert_lines(said, rf"\| demo-rate \| learning_rate=0.02 \| {FIGURE} \| {FIGURE} \|")
    config = json.loads((sandbox.path / "kept/demo--learning_rate-0.02--seed-42/train.json").read_text())
    assert (config["min_train_tokens"], config["validation_batches"]) == (256, 1999 // 16 // 2)


def test_generation(sandbox: Sandbox) -> None:
    said = measured(sandbox, "generation", "demo", "--tokens", 24, "--rounds", 2)
    assert_lines(
        said, rf"with cache {SPREAD} s, {FIGURE} tokens/s", rf"without {SPREAD} s, {FIGURE} tokens/s"
    )
    assert_lines(said, rf"ratio {SPREAD}")


ABSENT = ("datasets", "pyarrow", "tiktoken")


def test_footprint(sandbox: Sandbox) -> None:
    said = measured(sandbox, "footprint", "--measure", "1M", "eager", runs=False)
    assert_lines(said, FIGURE)


def test_gpu(sandbox: Sandbox) -> None:
    """All its parts, in a rehearsal, without the packages that the rented machine may lack."""
    without = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); {FORKED}"
    (sandbox.datasets / "test/tokens/meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    sandbox.env |= {"CUDA_VISIBLE_DEVICES": ""}
    options = "all", "--tiny", "--datasets-dir", sandbox.datasets, "--out", sandbox.path / "out"
    said = measured(sandbox, "gpu", *options, runs=False, before=without)
    figure = rf"\| {FIGURE} \|"
    for part in ("correct", "speed", "run", "recipe"):
        assert_lines(said, rf"\| {part} \| passed {figure}")
        kept = (sandbox.path / f"out/{part}.md").read_text()
        assert "\n| --- |" in kept and kept in said
    skipped = len(
        re.findall(r"^\| `test_\w+\[cuda.*` \| skipped \| .* torch.cuda is not available", said, re.M)
    )
    assert skipped > 20
    speed = rf"\| {SPREAD} \| unknown \| {FIGURE} \| {FIGURE} \|"
    assert_lines(said, rf"\| plain \| adamw \| plain \| 2 {speed} 1.00 \|")
    assert_lines(said, rf"\| eager, document masks \| muon \| bf16 \| 16 {speed} {FIGURE} \|")
    killed = int(re.search(r"\| killed \| by SIGKILL after step (\d+) \|", said)[1])
    resumed = int(
        re.search(rf"\| resumed \| after step (\d+); {FIGURE} s from .* to step {killed + 1} \|", said)[1]
    )
    assert 40 <= resumed <= killed < 80
    assert_lines(said, rf"\| 80 \| 5,120 {figure}")
    for recipe in gpu_parts.RECIPES:
        assert_lines(said, rf"\| {recipe} \|( {FIGURE} \|){{7}} unknown \|")


PART = """
import subprocess, sys, time
part = sys.argv[1]
if part == "run":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(sys.argv[2], "w").write(str(child.pid))
    time.sleep(60)
sys.exit(part == "speed")
"""


def test_gpu_goes_on_after_a_part_that_fails_or_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part.py").write_text(PART)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
    monkeypatch.setattr(gpu, "LIMIT", 2.0)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.run_all(tmp_path, [str(tmp_path / "child")]) == 1
    results = [line.split(" | ")[:2] for line in (tmp_path / "all.md").read_text().splitlines()[3:]]
    assert results == [
        ["| correct", "passed"],
        ["| speed", "FAILED with status 1"],
        ["| run", "FAILED: not finished after 2 s"],
        ["| recipe", "passed"],
    ]
    assert not is_alive(int((tmp_path / "child").read_text())), "what the part had started"


def test_lease(sandbox: Sandbox) -> None:
    """Every stage, in a rehearsal: each figure at once as a line of JSON, and a table of all in the end."""
    (sandbox.datasets / "test/tokens/meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    sandbox.env |= {"CUDA_VISIBLE_DEVICES": "", "MEASURED_COMMIT": "0123abc"}
    options = "lease", "--tiny", "--datasets-dir", sandbox.datasets, "--out", sandbox.path / "out"
    said = measured(sandbox, "gpu", *options, runs=False)
    text = (sandbox.path / "out/lease.jsonl").read_text()
    assert said.startswith(text)
    found: dict[str, list[dict]] = {}
    for line in map(json.loads, text.splitlines()):
        found.setdefault(line.pop("stage"), []).append(line)
    assert list(found) == list(lease.STAGES)
    assert not [line for lines in found.values() for line in lines if "problem" in line]
    assert found["facts"][0]["commit"] == "0123abc"
    keys = {
        "eager": {"tokens_per_second", "ms", "peak_gib"},
        "compiled": {"first_step_seconds", "idle_share", "launches", "kernels", "unique_graphs"},
        "best": {"tokens_per_second", "kernels", "shape", "optimizer"},
        "small": {"microbatch", "ddp", "host_ms", "launches"},
        "levers": {"variant", "loss", "tokens_per_second"},
        "tests": {"tests"},
        "run": {"seconds_to_step_1", "killed_after", "resumed_after", "stall_seconds", "val_loss"},
        "recipes": {"recipe", "val_loss", "tokens_per_second"},
    }
    for stage, wanted in keys.items():
        assert wanted <= {key for line in found[stage] for key in line}, stage
    losses = [line["val_loss"] for line in found["run"] if "val_loss" in line]
    assert losses[-1] < losses[0]
    assert len((sandbox.path / "out/lease.md").read_text().splitlines()) == len(text.splitlines()) + 3


def test_gpu_says_which_steps_fail_and_measures_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_setup: object, side: str, _model: object, train: dict) -> dict:
        if train["microbatch_size"] > 32:
            return {"problem": "out of memory"}
        if train.get("precision") == "tf32":
            raise RunError("gpu.py speed ended with status 1: Error: torch.compile failed (a | b)")
        speeds = [9e5, 1e6, 1.1e6] if side == "compiled" else [1e5, 1e5, 1e5]
        return {"precision": "bf16", "tokens_per_second": speeds, "peak_gib": 1.5, "first_step_seconds": 9.0}

    monkeypatch.setattr(gpu_parts, "measure_apart", measure)
    setup = gpu_parts.Setup(None, tiny=False, device_name="NVIDIA A100-SXM4-40GB", device_gib=40)
    with pytest.raises(RunError, match="1 kinds of steps failed"):
        gpu_parts.speed(setup, gpu_parts.Report(tmp_path / "speed.md"))
    rows = (tmp_path / "speed.md").read_text()
    share = 1e6 * 854_433_792 / 312e12
    assert_lines(
        rows,
        rf"\| compiled \| muon \| bf16 \| 16 \| 1,000,000 .* \| {share:.1%} \| 1.50 \| 9.0 \| 10.00 \|",
        r"\| compiled \| adamw \| tf32 \| 16 \| status 1: Error: torch.compile failed \(a \\\| b\)( \|){5}",
        r"\| compiled \| adamw \| auto \| 64 \| out of memory( \|){5}",
    )


def test_gpu_trains_with_less_where_the_largest_microbatch_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(_training: object, train: dict, _steps: int) -> tuple[int, float]:
        tried.append(train["microbatch_size"])
        if len(tried) == 1:
            raise RunError("training gpt2-small ended with status 1: Error: memory ran out; -f finds")
        return 100, 9.0

    tokens = gpu_parts.Tokens(tmp_path, "a/b", {}, train=10**7, validation=10**5)
    monkeypatch.setattr(gpu_parts, "find_tokens", lambda _: tokens)
    monkeypatch.setattr(gpu_parts, "find_microbatch", lambda *_: (40, 20.0, 1e5, "came to its end"))
    monkeypatch.setattr(gpu_parts, "train_with_a_kill", train)
    monkeypatch.setattr(gpu_parts, "show_training", lambda *_: None)
    setup = gpu_parts.Setup(None, tiny=False, device_name="", device_gib=24, folder=tmp_path)
    with pytest.raises(RunError, match="memory ran out with the microbatch that -f had found"):
        gpu_parts.run(setup, gpu_parts.Report(tmp_path / "run.md"))
    assert tried == [40, 35]
    assert "| training with microbatch 40 | memory ran out |" in (tmp_path / "run.md").read_text()


def test_gpu_needs_a_gpu_but_for_a_rehearsal(sandbox: Sandbox) -> None:
    words, env = (
        ["benchmarks/gpu.py", "speed", "--out", str(sandbox.path / "out")],
        {"CUDA_VISIBLE_DEVICES": ""},
    )
    done = Script(words, env, FORKED).wait()
    assert done.returncode == 2 and done.stderr.startswith("Error: torch.cuda is not available; --tiny")
    assert not (sandbox.path / "out").exists()


def test_ladder(sandbox: Sandbox) -> None:
    """Each training once, of both studies, and the table from what they have come to."""
    shared = {**MODEL, **BYTES, **TRAIN, "validation_interval": 100, "validation_batches": 4}
    study = {"size": "tiny", "seeds": 1}
    studies = {
        "tuning": [{**study, "recipe": "old", "vary": ["learning_rate=0.02"]}],
        "compare": [{**study, "recipe": "new", "vary": ["min_train_tokens=512"]}],
    }
    new = {"optimizer": "muon", "init": "zero", "half_batch_percent": 50}
    recipes = {"old": {"learning_rate": 0.001}, "new": new}
    ladder_json = {"sizes": {"tiny": {}}, "shared": shared, "recipes": recipes, "studies": studies}
    (sandbox.path / "ladder.json").write_text(json.dumps(ladder_json))
    command = [sandbox.datasets, sandbox.path / "kept", "--ladder", sandbox.path / "ladder.json", "--time"]
    said = measured(sandbox, "ladder", *command, runs=False)
    assert_lines(
        said, rf"\| learning_rate=0.02 \| 1 \| {FIGURE} \| .*", r"\| min_train_tokens=512 \| 1 \| .*"
    )
    assert_lines(said, rf"\| tiny \| new \| 512 \| {FIGURE} \(1\) \|  \|  \|")
    new, old = (
        float(re.search(rf"^\| tiny \| {name} \| 1,024 \| ([\d.]+) \(1\)", said, re.M)[1])
        for name in ("new", "old")
    )
    assert new < old < 5.6
    assert measured(sandbox, "ladder", *command[:-1], "--report", runs=False).count("| tiny |") == 3
    lines = (sandbox.path / "kept/tiny-new--seed-1/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 12 and len(lines) < 16, "trained twice"


def test_each_kind_of_step_is_timed_and_counted(sandbox: Sandbox) -> None:
    """Of eight whole batches the first four are halves, and the first two have short sequences."""
    sandbox.write_run("small", train={"half_batch_percent": 50, "short_sequence_percent": 25})
    kinds = ablations.steps_of(sandbox.run_dir("small"), join_world())
    shapes = [[tuple(each.shape) for each in step.args[0]] for step, _ in kinds]
    assert shapes == [[(8, 5)] * 2, [(2, 17)] * 2, [(2, 17)] * 4]
    assert [share for _, share in kinds] == [0.5, 0.5, 0.5]


def test_where_a_recipe_reaches_a_loss() -> None:
    """Half-way between two losses is half-way between the logarithms of their tokens."""
    points = [(100, 5.0, 1), (400, 4.0, 1), (800, 3.5, 2)]
    assert ladder.tokens_to(4.5, points) == pytest.approx(200)
    assert ladder.tokens_to(3.5, points) == pytest.approx(800)
    assert ladder.tokens_to(5.1, points) == 100
    assert ladder.tokens_to(3.4, points) is None and ladder.tokens_to(3.4, []) is None


def test_the_fit_finds_the_factor_that_losses_were_made_with() -> None:
    def loss(size: float, tokens: float) -> float:
        return 1.5 + 2.0 * (size / 1e6) ** -0.3 + 3.0 * (tokens / 1e6) ** -0.2

    sizes = [(1e6, 1e6), (1e6, 2e6), (2e6, 2e6), (5e6, 1.5e6), (5e6, 3e6)]
    points = [("new", *each, loss(*each)) for each in sizes]
    points += [("today", size, tokens, loss(size, 0.6 * tokens)) for size, tokens in sizes[1:]]
    error, factors = ladder.fit(points)
    assert error < 1e-3
    assert factors == {"new": 1.0, "today": pytest.approx(0.6, rel=0.03)}
    assert ladder.fit([("new", size, tokens, tokens / 1e6) for size, tokens in sizes])[1] == {}


def test_optimizers(sandbox: Sandbox) -> None:
    said = measured(sandbox, "optimizers", "demo", "--rounds", 2)
    for side in ("AdamW", "torch's Muon", "Muon"):
        assert_lines(said, rf"\| {side} \| {SPREAD} \| {FIGURE}% \| {FIGURE} \|")
    matrix = torch.nn.Linear(1024, 1024, bias=False)
    kept = [torch.optim.AdamW(matrix.parameters())]
    matrix(torch.ones(1024)).sum().backward()
    kept[0].step()
    assert optimizers.state_gib(kept) * 2**30 == 2 * 4 * 1024**2 + 4


def test_overlap(sandbox: Sandbox) -> None:
    """With a compiler that takes graphs as they are."""
    eager = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='eager')"
    words = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16", "--rounds", "1"]
    with reserve_port() as holder:
        envs = [sandbox.env | rank_environment(rank, 2, holder) for rank in range(2)]
        scripts = [Script(["benchmarks/overlap.py", *words], env, f"{eager}\n{FORKED}") for env in envs]
        done = [script.wait() for script in scripts]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    sides = (rf"\| {side} \| \d+(, \d+)* \| {SPREAD} \|" for side in ("eager", "compiled"))
    assert_lines(done[0].stdout, *sides)
    assert not done[1].stdout


def test_overhead(sandbox: Sandbox) -> None:
    said = measured(sandbox, "overhead", "demo", sandbox.datasets)
    assert_lines(said, rf"{FIGURE} s, 8 steps, {FIGURE} µs to log each")
    for part in ("logging", "validation", "checkpoints, the stall"):
        assert_lines(said, rf"{part}: {FIGURE} s, (?!0.00){FIGURE}%")


@needs_gpt2
def test_prepare(sandbox: Sandbox) -> None:
    command = "--megabytes", 0.5, "--rounds", 1, "--only", "tiktoken, 1"
    stand_in = "readers.python_docs = lambda: ['Few words do.']"
    few = f"from basemodel.prepare import readers; {stand_in}; {FORKED}"
    said = measured(sandbox, "prepare", *command, runs=False, before=few)
    for side in ("plain loop", "tiktoken, 1"):
        assert_lines(said, rf"\| {side} \| {SPREAD} \| {SPREAD} \| {FIGURE} \| {FIGURE}, {FIGURE} \|")


def test_fetching(sandbox: Sandbox) -> None:
    said = measured(sandbox, "fetching", "--megabytes", 2, "--rounds", 1, runs=False)
    for client in ("training's download", "snapshot_download"):
        assert_lines(said, rf"\| {client} \|( {SPREAD} \|){{4}}")


def test_readers(sandbox: Sandbox) -> None:
    said = measured(sandbox, "readers", "--gigabytes", 0.001, "--readers", 1, runs=False)
    assert_lines(said, rf"resident, grew by MB {FIGURE}", rf"of it unshared, MB {FIGURE}")


def test_recipe(sandbox: Sandbox) -> None:
    text = sandbox.path / "text"
    text.write_bytes(random.Random(0).randbytes(100_000))
    said = measured(sandbox, "recipe", text, "--rounds", 1, "--steps", 2, "--tokens", 1024)
    loss = r"[56]\.\d{3}"  # log 257 = 5.549
    assert_lines(said, rf"\| 1 \| nanoGPT's \| {FIGURE} \| 1 \| {loss} \|")
    assert_lines(said, rf"\| 1 \| the demo's \| {FIGURE} \| {FIGURE} \| {loss} \|")


def test_saving(sandbox: Sandbox) -> None:
    said = measured(sandbox, "saving", "demo", "--interval", 3, "--saves", 3)
    for figure in ("Stall per save", "Step", "Step while one is saved"):
        assert_lines(said, rf"{figure}: {SPREAD} s")
    assert_lines(said, rf"Checkpoint: {FIGURE} GB", rf"SIGTERM to exit: {FIGURE} s, .* durable")


def test_startup(sandbox: Sandbox) -> None:
    """With a torch that is there at once."""
    (sandbox.path / "torch.py").touch()
    sandbox.env["PYTHONPATH"] = str(sandbox.path)
    said = measured(sandbox, "startup", "--rounds", 1, "--only", "compare_runs", runs=False, before="")
    for command in ("import torch", "compare_runs.py --help"):
        assert_lines(said, rf"\| {command} \| {FIGURE} \| {FIGURE} to {FIGURE} \| {FIGURE} \|")


def test_throughput(sandbox: Sandbox) -> None:
    said = measured(sandbox, "throughput", "demo", "--rounds", 1, "--turn", 0.05, "--without", "compiled")
    assert "on both sides muon, clipping to 1; on ours alone" in said
    speed = rf"(?:fp32|bf16), 2 \| {SPREAD} \| {FIGURE}% of {FIGURE} TFLOP/s \| {FIGURE} \| {FIGURE} s \|"
    assert_lines(said, rf"\| plain \| {speed} 1.00 \(1.00 to 1.00\) \|", rf"\| eager \| {speed} {SPREAD} \|")


def test_a_process_that_fails_fails_the_benchmark() -> None:
    with pytest.raises(RunError, match=r"^-c import sys; sys.exit\('broken'\) ended with status 1: broken$"):
        common.run_python("-c", "import sys; sys.exit('broken')")
