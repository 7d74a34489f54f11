"""What has changed under a run that goes on (data, configs, its end) or leads elsewhere."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers import MODEL, TRAIN, Sandbox, random_tokens, run_script, write_dataset
from safetensors.torch import load_file

from basemodel.common.errors import InputError
from basemodel.data.hub import same_on_all_nodes
from basemodel.model.config import GPTConfig
from basemodel.training.config import TrainConfig
from basemodel.training.resume import check_resumable
from basemodel.training.run import Run
from basemodel.training.schedule import BatchPlan

CONFIGS = {"model.json": GPTConfig, "train.json": TrainConfig}


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_data_are_compared_with_their_hashes_once(sandbox: Sandbox) -> None:
    folder = sandbox.datasets / "test/tokens"
    (folder / "meta.json").write_text(json.dumps({"sha256": hashes(folder)}))
    sandbox.write_run()
    sandbox.train()
    known = folder / ".fingerprints.json"
    assert json.loads(known.read_text())["train.safetensors"]["sha256"] == hashes(folder)["train.safetensors"]
    read = known.stat().st_mtime_ns
    sandbox.train("tiny", "--resume")
    assert known.stat().st_mtime_ns == read, "not read again"
    data = bytearray((folder / "train.safetensors").read_bytes())
    data[-2] ^= 1
    (folder / "train.safetensors").write_bytes(data)
    done = run_script(*sandbox.command("tiny"))
    assert done.returncode == 2
    assert (
        "train.safetensors: damaged (its SHA-256 is not meta.json's); fetch or prepare it again"
        in done.stderr
    )


def test_other_data_or_configs_under_a_resumed_run_are_refused_unless_allowed(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4})
    sandbox.train()
    shutil.rmtree(sandbox.checkpoints()[-1])
    write_dataset(sandbox.datasets / "test/tokens", train=random_tokens(4000, seed=7))
    sandbox.write_run(train={"checkpoint_interval": 4, "learning_rate": 0.02})
    done = run_script(*sandbox.command("tiny", "--resume"))
    assert done.returncode == 2
    for part in (
        "train.json: learning_rate was 0.01, now 0.02",
        "the SHA-256 of train.safetensors in test/tokens was",
        "--allow-config-change",
    ):
        assert part in done.stderr
    assert len(sandbox.checkpoints()) == 1
    said = sandbox.train("tiny", "--resume", "--allow-config-change")
    assert "despite changes, as requested: train.json: learning_rate was 0.01, now 0.02; the SHA-256" in said
    assert sandbox.metrics(key="learning_rate") == [0.01] * 4 + [0.02] * 4


FREE = {
    *("microbatch_size", "gradient_accumulation_steps", "global_batch_size", "compile", "usd_per_hour"),
    *(
        "checkpoint_interval",
        "checkpoint_minutes",
        "keep_checkpoints",
        "validation_interval",
        "validation_batches",
    ),
    *("start_val_token", "sample_interval", "sample_prompts", "report_to", "max_hours", "max_usd"),
}


@pytest.mark.parametrize(
    ("file", "key"),
    [(file, field.name) for file, kind in CONFIGS.items() for field in dataclasses.fields(kind)],
)
def test_a_run_goes_on_with_what_it_was_trained_with(tmp_path: Path, file: str, key: str) -> None:
    config, model_config = TrainConfig(**TRAIN), GPTConfig(**MODEL)
    run, other = (
        Run(tmp_path, config, model_config, BatchPlan(2, accumulation, 1, 16, 8), files={})
        for accumulation in (4, 2)
    )
    saved = dict(zip(CONFIGS, map(dataclasses.asdict, (model_config, config)), strict=True))
    saved[file][key] = "something else"
    meta = {"model_config": saved["model.json"], "train_config": saved["train.json"], "global_batch": 8}
    meta |= {"global_step": 3, "sequences_seen": 24}
    if key in FREE:
        check_resumable("x", meta, run, None)
        return
    with pytest.raises(InputError, match=rf'another run: {file}: {key} was "something else", now '):
        check_resumable("x", meta, run, None)
    said: list[str] = []
    check_resumable("x", meta, run, said.append)
    assert len(said) == 1 and f"{file}: {key} was" in said[0]
    with pytest.raises(InputError, match="set global_batch_size to 8"):
        check_resumable("x", meta, other, said.append)
    halved = dataclasses.replace(run, plan=dataclasses.replace(run.plan, half_steps=2))
    with pytest.raises(InputError, match="24 sequences after 3 steps, but this run would have read 16; half"):
        check_resumable("x", meta, halved, said.append)


def test_nodes_with_other_data_are_told_so() -> None:
    one, other = ({"train.safetensors": {"size": 8, "sha256": digit * 64}} for digit in "ab")
    assert same_on_all_nodes([one, dict(one)]) == one
    with pytest.raises(InputError, match=r"train\.safetensors is not the same on all nodes"):
        same_on_all_nodes([one, one, other])


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_an_allowed_change_of_optimizer_keeps_the_weights_and_begins_its_state_afresh(
    sandbox: Sandbox, before: str, after: str
) -> None:
    sandbox.write_run(train={"checkpoint_interval": 4, "optimizer": before})
    sandbox.train()
    shutil.rmtree(sandbox.checkpoints()[-1])
    sandbox.write_run(train={"checkpoint_interval": 4, "optimizer": after})
    said = sandbox.train("tiny", "--resume", "--allow-config-change")
    assert f'optimizer was "{before}", now "{after}"' in said
    assert "Resuming after step 4" in said
    state = load_file(sandbox.checkpoints()[-1] / "optimizer.safetensors")
    of_matrices = {key.rsplit(".", 1)[1] for key in state if ".ff.layers.0.weight." in key}
    assert of_matrices == ({"momentum_buffer"} if after == "muon" else {"exp_avg", "exp_avg_sq", "step"})
    assert state["out_head.weight.step"] == 8


def test_a_checkpoint_behind_the_end_that_a_changed_config_has_is_refused(sandbox: Sandbox) -> None:
    sandbox.write_run(train={"checkpoint_interval": 6})
    sandbox.train()
    sandbox.write_run(train={"checkpoint_interval": 6, "min_train_tokens": 4 * 8 * 16})
    done = run_script(*sandbox.command("tiny", "--resume", "--allow-config-change"))
    assert done.returncode == 2
    assert "is past the run's last step, 4; raise min_train_tokens, or name an earlier" in done.stderr
