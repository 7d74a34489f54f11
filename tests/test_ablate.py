"""ablate.py: runs and seeds, kills and signals, and which differences are noise."""

import contextlib
import fcntl
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    FORKED,
    ROOT,
    Finished,
    Sandbox,
    Script,
    forked_children_of,
    refused,
    run_script,
    wait_for,
    write_dataset,
)

import ablate as ablate_script
from basemodel.common.errors import InputError
from basemodel.results.study import (
    CONFIGS,
    KEYS,
    Study,
    Variant,
    differing_conditions,
    outcomes,
    student_t_quantile,
)
from basemodel.training.run import Run

VALIDATE = {"validation_interval": 4, "validation_batches": 2}
QUICK = f"from basemodel.results import study; study.draw_chart = lambda *_: None; {FORKED}"


def study_command(sandbox: Sandbox, *options: object) -> list[str]:
    places = ["--runs-dir", sandbox.path / "runs", "--chart", sandbox.path / "ablate.png"]
    return [str(word) for word in ("ablate.py", "tiny", sandbox.datasets, *places, *options)]


def ablate(sandbox: Sandbox, *options: object, before: str = QUICK, status: int = 0) -> Finished:
    done = run_script(*study_command(sandbox, *options), before=before)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def table_of(output: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]


def trained(sandbox: Sandbox) -> list[str]:
    """The runs that have begun."""
    return sorted(path.parent.name for path in (sandbox.path / "runs").glob("*/metrics.jsonl"))


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    write_dataset(tmp_path / "datasets/test/tokens")
    sandbox = Sandbox(tmp_path)
    sandbox.write_run(train=VALIDATE)
    return sandbox


# ------------------------------------------------------------------------------------------------------------
# A study
# ------------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_runs_own_files(sandbox: Sandbox) -> None:
    options = "--vary", "learning_rate=0.001", "--vary", "qkv_bias = true, betas=[0.8,0.95]", "--seeds", 2
    output = ablate(sandbox, *options, before=FORKED).stdout
    names = ["tiny", "tiny--learning_rate-0.001", "tiny--betas-0.8-0.95--qkv_bias-true"]
    assert trained(sandbox) == sorted(f"{name}--seed-{seed}" for name in names for seed in (42, 43))
    both = json.loads((sandbox.run_dir(f"{names[2]}--seed-43") / "train.json").read_text())
    assert (both["random_seed"], both["betas"]) == (43, [0.8, 0.95])
    assert (
        json.loads((sandbox.run_dir(f"{names[2]}--seed-43") / "model.json").read_text())["qkv_bias"] is True
    )
    losses = {
        name: [sandbox.metrics(f"{name}--seed-{seed}", "val_loss")[-1] for seed in (42, 43)] for name in names
    }
    header, _, base, *rows = table_of(output)
    assert header[5] == "97.5% interval"
    low, high = sorted(losses["tiny"])
    assert base == ["tiny", "2", f"{(low + high) / 2:.4f}", f"{low:.4f} to {high:.4f}", "–", "–", "–"]
    for row, name in zip(rows, names[1:], strict=True):
        one, two = (loss - before for loss, before in zip(losses[name], losses["tiny"], strict=True))
        reach = 25.4517 * abs(one - two) / 2  # Student's t for 97.5% within and one degree of freedom
        mean = (one + two) / 2
        assert row[4] == f"{mean:+.4f}"
        ends = [float(end) for end in row[5].split(" to ")]
        assert ends == pytest.approx([mean - reach, mean + reach], abs=2e-4)
        assert row[6] == ("within noise" if reach > abs(mean) else "worse" if mean > 0 else "better")
    assert (sandbox.path / "ablate.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is trained twice, and a study with less shares the runs.
    again = ablate(sandbox, *options).stdout
    assert table_of(again) == table_of(output) and "[" not in again.partition("| ")[0]
    assert "[" not in ablate(sandbox, *options[2:]).stdout.partition("| ")[0]


def test_write_prints_the_runs_for_a_queue_to_train(sandbox: Sandbox) -> None:
    names = ablate(sandbox, "--vary", "qkv_bias=true", "--seeds", 2, "--write").stdout.split()
    assert names == [f"tiny{change}--seed-{seed}" for seed in (42, 43) for change in ("", "--qkv_bias-true")]
    configs = [json.loads((sandbox.run_dir(name) / "train.json").read_text()) for name in names]
    assert [config["random_seed"] for config in configs] == [42, 42, 43, 43] and not trained(sandbox)


def test_validation_is_over_as_much_whatever_the_microbatch(sandbox: Sandbox) -> None:
    study = Study.plan(sandbox.path / "runs", "tiny", ("microbatch_size=1", "context_length=8"), 1)
    assert [variant.values["train"]["validation_batches"] for variant in study.variants] == [2, 4, 4]
    # Keys are looked up in both files, and so must be in one alone.
    assert len(KEYS) == sum(len(config.__dataclass_fields__) for config in CONFIGS.values())


def test_settings_of_a_study_that_has_begun(sandbox: Sandbox) -> None:
    """What changes no loss may change; other changes are refused, by name."""
    options = "--vary", "learning_rate=0.001", "--seeds", 1
    output = ablate(sandbox, *options).stdout
    assert table_of(output)[3][4:] == [table_of(output)[3][4], "–", "needs two seeds"]
    sandbox.write_run(train={**VALIDATE, "keep_checkpoints": 1, "usd_per_hour": 2.0})
    assert table_of(ablate(sandbox, *options).stdout) == table_of(output)
    sandbox.write_run(train={**VALIDATE, "weight_decay": 0.2})
    message = refused(*study_command(sandbox, *options))
    assert "tiny--seed-42: was begun with weight_decay 0.1, not 0.2; undo that" in message


def test_runs_of_other_code_are_pointed_out(sandbox: Sandbox) -> None:
    study = Study.plan(sandbox.path / "runs", "tiny", ("learning_rate=0.001",), 1)
    for folder, commit in zip(study.runs(), "ab", strict=True):
        checkpoint = folder / "checkpoints/20260101Z000000-iteration-8"
        checkpoint.mkdir(parents=True)
        meta = {"git_commit": commit, "device": "cpu", "precision": "fp32"}
        (checkpoint / "meta.json").write_text(json.dumps(meta))
    assert differing_conditions(study) == ['git_commit "a" and "b"']


# ------------------------------------------------------------------------------------------------------------
# Kills, signals, failures
# ------------------------------------------------------------------------------------------------------------

KILLS = int(os.environ.get("KILLS", 2))


def test_killed_at_random_moments_it_ends_with_the_same_table(sandbox: Sandbox, tmp_path: Path) -> None:
    """Half of the times with its training, half of the times without, which then goes on."""
    dice = random.Random(KILLS)
    options = "--vary", "learning_rate=0.001", "--seeds", 1
    sandbox.write_run(model={"drop_rate": 0.1}, train={**VALIDATE, "checkpoint_interval": 1})
    undisturbed = Sandbox(tmp_path / "undisturbed")
    for name in ("datasets", "runs"):
        shutil.copytree(sandbox.path / name, undisturbed.path / name)
    expected = table_of(ablate(undisturbed, *options).stdout)

    def lines() -> int:
        logs = (sandbox.path / "runs").glob("*/metrics.jsonl")
        return sum(log.read_text().count("train_loss") for log in logs)

    for moment in sorted(dice.sample(range(2 * 8), KILLS)):
        script = Script(study_command(sandbox, *options), before=QUICK)
        wait_for(lambda moment=moment, script=script: script.has_ended or lines() >= moment, "a step")
        time.sleep(dice.uniform(0, 0.05))
        trainings = [] if script.has_ended else forked_children_of(script.pid)
        for training in trainings[: dice.randrange(2)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(training, signal.SIGKILL)
        script.kill()
    assert table_of(ablate(sandbox, *options).stdout) == expected


def test_what_trains_a_run_already_is_waited_for(sandbox: Sandbox) -> None:
    options = "--vary", "learning_rate=0.001", "--seeds", 1
    study = Study.plan(sandbox.path / "runs", "tiny", options[1:2], 1)
    study.write_configs()
    handle = os.open(study.runs()[1], os.O_RDONLY)  # a later one too: they would share the GPUs
    fcntl.flock(handle, fcntl.LOCK_EX)
    script = Script(study_command(sandbox, *options), before=QUICK)
    try:
        wait_for(lambda: trained(sandbox) or "Waiting for process" in script.stdout, "a word about waiting")
        time.sleep(0.5)
        assert trained(sandbox) == []
    finally:
        os.close(handle)
    done = script.wait()
    assert done.returncode == 0, done.stderr
    assert [row[1] for row in table_of(done.stdout)[2:]] == ["1", "1"]


def test_a_signal_stops_the_training_with_a_checkpoint(sandbox: Sandbox) -> None:
    long = {**VALIDATE, "epochs": 1000, "min_train_tokens": 3000 * 8 * 16, "keep_checkpoints": 1}
    sandbox.write_run(train={**long, "validation_interval": 2000})
    script = Script(study_command(sandbox, "--vary", "qkv_bias=true"), before=QUICK)
    log = sandbox.run_dir("tiny--seed-42") / "metrics.jsonl"
    wait_for(lambda: script.has_ended or (log.exists() and log.read_text().count("\n") > 3), "steps")
    script.signal(signal.SIGTERM)
    done = script.wait()
    assert (done.returncode, "Stopped; the same command continues" in done.stdout) == (143, True), done.stderr
    assert sandbox.status("tiny--seed-42")["status"] == "preempted"
    assert trained(sandbox) == ["tiny--seed-42"]


def test_a_training_that_fails_leaves_the_others_alone(sandbox: Sandbox) -> None:
    done = ablate(sandbox, "--vary", "learning_rate=1e38", "--seeds", 2, status=1)
    base, wild = table_of(done.stdout)[2:]
    assert base[1] == "2" and wild[1] == "0" and wild[6] == "needs two seeds, 2 of 2 seeds missing"
    error = done.stderr.splitlines()[-1]
    assert re.match("Error: 2 trainings failed; .* tiny--learning_rate-1e.38--seed-42 failed: .*nan", error)
    sandbox.write_run(train={**VALIDATE, "learning_rate": 1e37})  # and where the base fails
    for folder in (sandbox.path / "runs").glob("tiny--*"):
        shutil.rmtree(folder)
    ablate(sandbox, "--vary", "learning_rate=0.01", status=1)
    assert trained(sandbox) == ["tiny--seed-42"]


def test_what_cannot_be_trained_is_refused_before_anything_is(sandbox: Sandbox) -> None:
    message = refused(*study_command(sandbox, "--vary", "global_batch_size=7"), before=FORKED)
    assert message.startswith("tiny--global_batch_size-7--seed-42: global_batch_size 7 is not a multiple of")
    assert trained(sandbox) == []


def test_launch_says_what_starts_the_script(sandbox: Sandbox) -> None:
    launcher, log = sandbox.path / "my launcher.sh", sandbox.path / "log"
    launcher.write_text(f'echo "$@" >> {log}')
    options = "--vary", "qkv_bias=true", "--launch", f"sh '{launcher}' --nproc_per_node=8"
    done = ablate(sandbox, *options, before="", status=1)
    words = f"--nproc_per_node=8 ddp_train.py tiny%s--seed-42 {sandbox.datasets} %s --runs-dir"
    expected = [("", "--plan"), ("--qkv_bias-true", "--plan"), ("", "--resume")]
    commands = log.read_text().replace(f"{ROOT}/", "")
    lines = [line.rpartition(" ")[0] for line in commands.splitlines()]
    assert lines == [words % values for values in expected]
    assert done.stderr == "Error: tiny--seed-42 ended with exit status 0, without a result\n"


WRONG = {
    "learning_rte=0.1": "--vary learning_rte=0.1: unknown key 'learning_rte'; did you mean 'learning_rate'?",
    "use_amp=false": "--vary use_amp=false: use_amp is an old key; vary precision instead",
    "ctx_length=8": "did you mean 'context_length'?",
    "qkv_bias": "must be KEY=VALUE[,KEY=VALUE...], such as",
    "=0.1": "must be KEY=VALUE",
    "qkv_bias=": "must be KEY=VALUE",
    "qkv_bias=True": 'qkv_bias must be true or false, not "True"',
    "learning_rate=-1": "learning_rate must be more than 0, not -1.0",
    "learning_rate=NaN": "learning_rate must be a number, not NaN",
    "optimizer=sgd": 'optimizer must be "adamw" or "muon", not "sgd"',
    "learning_rate=0.1,learning_rate=0.2": "learning_rate appears twice",
    "random_seed=7": "all variations are trained with the same seeds; use --seeds",
    "validation_batches=3": "validation_batches cannot vary, because the losses could not be compared",
    "microbatch_size=3": "do not fill the base's 64; make the base's validation_batches a multiple of 3",
    "learning_rate=0.01": "learning_rate is already 0.01 in tiny",
    "learning_rate=1e-2,qkv_bias=true": "learning_rate is already 0.01 in tiny",
    "muon_learning_rate=0.1": 'muon_learning_rate has no effect without "optimizer": "muon"; leave it out',
    "n_layers=default": "--vary n_layers=default: the key 'n_layers' is missing",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_variations(sandbox: Sandbox, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(WRONG[text])):
        Study.plan(sandbox.path / "runs", "tiny", (text,), 3)


def test_the_schedule_of_a_base_with_old_keys_can_vary(sandbox: Sandbox) -> None:
    sandbox.write_run(train={**VALIDATE, "schedule_learning_rate": True})
    study = Study.plan(sandbox.path / "runs", "tiny", ("lr_schedule=wsd",), 1)
    study.write_configs()
    schedules = [Run.read(folder.parent, folder.name).config.lr_schedule for folder in study.runs()]
    assert schedules == ["cosine", "wsd"]


def test_wrong_studies(sandbox: Sandbox) -> None:
    def message(*options: str) -> str:
        with pytest.raises(InputError) as raised:
            command.main([*study_command(sandbox, *options)[1:]], standalone_mode=False)
        return str(raised.value)

    command = ablate_script.main
    same = "--vary", "betas=[0.8,0.95],qkv_bias=true", "--vary", "qkv_bias=true,betas=[0.80, 0.95]"
    assert "is the same as betas=[0.8,0.95],qkv_bias=true" in message(*same)
    assert "there is no program 'torchrn'" in message("--vary", "qkv_bias=true", "--launch", "torchrn -n 8")
    assert "no such folder" in message(
        "--vary", "qkv_bias=true", "--chart", str(sandbox.path / "no/where.png")
    )
    sandbox.write_run(train={"validation_interval": ...})
    assert "train.json: has no validation" in message("--vary", "qkv_bias=true")
    assert trained(sandbox) == []


def test_a_key_has_one_folder_for_each_value(sandbox: Sandbox) -> None:
    texts = "min_train_tokens=-1", "min_train_tokens=1", "clipping_max_norm=1", "betas=[0.1,0.2],epochs=2"
    texts += ("learning_rate=default",)
    study = Study.plan(sandbox.path / "runs", "tiny", texts, 1)
    names = [folder.name for folder in study.runs()]
    assert names[1:] == [
        "tiny--min_train_tokens--1--seed-42",
        "tiny--min_train_tokens-1--seed-42",
        "tiny--clipping_max_norm-1.0--seed-42",
        "tiny--betas-0.1-0.2--epochs-2--seed-42",
        "tiny--learning_rate-0.0004--seed-42",
    ]
    settings = {**VALIDATE, "learning_rate": 0.02, "weight_decay": 0.3, "clipping_max_norm": 2.0, "epochs": 9}
    settings |= {"warmup_period_percent": 3, "checkpoint_interval": 10, "keep_checkpoints": 9}
    text = ",".join(f"{key}={value}" for key, value in settings.items() if key not in VALIDATE)
    long, longer = Study.plan(sandbox.path / "runs", "tiny", (text, text + ",betas=[0.1,0.2]"), 1).runs()[1:]
    assert long.name != longer.name and len(long.name) < 200 and long.name.endswith("--seed-42")


# ------------------------------------------------------------------------------------------------------------
# Noise
# ------------------------------------------------------------------------------------------------------------


def test_students_t() -> None:
    """Against the printed tables, and the density summed up."""
    tables = {(0.95, 1): 12.7062, (0.95, 2): 4.3027, (0.95, 3): 3.1824, (0.95, 4): 2.7764, (0.95, 9): 2.2622}
    tables |= {(0.99, 1): 63.6567, (0.99, 2): 9.9248, (0.99, 5): 4.0321, (0.95, 30): 2.0423, (0.9, 7): 1.8946}
    for (confidence, degrees), quantile in tables.items():
        assert student_t_quantile(confidence, degrees) == pytest.approx(quantile, abs=6e-5)
    for confidence, degrees in ((0.9964, 2), (0.975, 5), (0.5, 8)):  # as several comparisons need
        t = np.linspace(0, student_t_quantile(confidence, degrees), 100_001)
        density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
        density *= math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi * degrees)
        assert 2 * np.trapezoid(density, t) == pytest.approx(confidence, abs=1e-8)


@pytest.mark.parametrize(("seeds", "variations"), [(3, 1), (3, 4), (5, 2)])
def test_a_false_difference_in_at_most_one_study_of_twenty(
    seeds: int, variations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: a seed adds the same to all its runs, and something else to each of them."""
    generator, studies = np.random.default_rng(0), 600
    variants = [Variant(str(index), {}, {"drop_rate": index}) for index in range(variations + 1)]
    study = Study("base", Path("runs"), variants, list(range(seeds)))
    false = 0
    for _ in range(studies):
        shared = generator.normal(3, 0.05, seeds)
        losses = iter(shared[None] + generator.normal(0, 0.01, (variations + 1, seeds)))
        stream = itertools.chain.from_iterable(losses)
        monkeypatch.setattr(
            "basemodel.results.study.final_loss", lambda folder, stream=stream: float(next(stream))
        )
        verdicts = [outcome.verdict for outcome in outcomes(study)[1:]]
        false += verdicts != ["within noise"] * variations
    assert 0.02 * studies < false < 0.07 * studies


def test_a_real_difference_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 3.2, 3.1, 2.9, 3.11, 3.0])
    monkeypatch.setattr("basemodel.results.study.final_loss", lambda folder: next(losses))
    study = Study("base", Path("runs"), [Variant("base", {}), Variant("b", {}, {"epochs": 2})], [1, 2, 3])
    better = outcomes(study)[1]
    # The losses of a seed are alike, so that the difference shows although the ranges overlap.
    assert better.verdict == "better"
    assert better.interval == pytest.approx([-0.0967 - 0.0143, -0.0967 + 0.0143], abs=1e-4)


REPETITIONS = int(os.environ.get("REPETITIONS", 1))


def test_equal_configs_differ_within_noise(sandbox: Sandbox) -> None:
    """Another microbatch has the same batches and other dropout masks, so that all that differs is noise."""
    within = []
    for repetition in range(REPETITIONS):
        train = {**VALIDATE, "validation_interval": 8, "random_seed": 42 + 3 * repetition}
        sandbox.write_run(model={"drop_rate": 0.2}, train=train)
        row = table_of(ablate(sandbox, "--vary", "microbatch_size=4").stdout)[3]
        assert row[1] == "3" and row[4] != "+0.0000"
        within.append(row[6] == "within noise")
    print(f"{sum(within)} of {REPETITIONS} called noise")
    assert sum(within) >= 0.9 * REPETITIONS
