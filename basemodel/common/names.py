"""The names of files and folders, and checks of names that a user gives."""

import re

from basemodel.common.errors import InputError

# In the folder of a run
MODEL_JSON, TRAIN_JSON = "model.json", "train.json"
CHECKPOINTS, METRICS, STATUS, SAMPLES = "checkpoints", "metrics.jsonl", "status.json", "samples.jsonl"
CHART = "training-run-chart.png"
LINKS = ("latest", "best")  # in checkpoints/
RESULTS = (CHECKPOINTS, METRICS, STATUS, CHART, SAMPLES, "trackers.json", "tensorboard", "wandb")
# In the folder of a checkpoint or a data set
META, TOKENIZER_FILE = "meta.json", "tokenizer.json"


def require_plain_name(name: str, what: str) -> str:
    """Return `name` if it is a plain folder name, which cannot lead out of its parent. Raises InputError."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in (".", ".."):
        raise InputError(f"{what} '{name}' must be a plain name of letters, digits, '.', '_' and '-'")
    return name


def require_repo_id(repo_id: str, what: str = "dataset") -> None:
    """Raise InputError unless `repo_id`, which names a `what` on the Hub, is OWNER/NAME, both plain names."""
    owner, slash, name = repo_id.partition("/")
    if not slash:
        raise InputError(f"{what} must be OWNER/NAME, not '{repo_id}'")
    require_plain_name(owner, f"the {what}'s owner")
    require_plain_name(name, f"the {what}'s name")
