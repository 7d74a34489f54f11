"""Data sets by their Hub ids, as `datasets` understands them: configurations, splits, types, gated access."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from folder_hub import COMMIT, FolderHub, serve_folder
from helpers import Finished, Script, wait_for
from texts import assert_holds, split_texts

from basemodel.data.tokenizer import get_tokenizer

TEXTS = {
    name: [f"{name} {i} " + "word " * (i % 50) for i in range(400)]
    for name in ("small", "big", "held", "own")
}
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*}
  - {split: dev, path: small/validation-*}
  - {split: test, path: small/test-*}
- config_name: big
  data_files:
  - {split: train, path: big/*}
---
# Two configurations
"""


def write_parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FolderHub]:
    """Three data sets: in parquet with two configurations, in .jsonl.zst, and in .csv."""
    root = tmp_path / "hub/me"
    write_parquet(root / "two/small/train-00000-of-00001.parquet", TEXTS["small"])
    write_parquet(root / "two/small/validation-00000-of-00001.parquet", TEXTS["held"])
    write_parquet(root / "two/small/test-00000-of-00001.parquet", TEXTS["big"])
    write_parquet(root / "two/big/0.parquet", TEXTS["big"])
    (root / "two/README.md").write_text(CARD)
    (root / "lines/data").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS["own"]).encode()
    (root / "lines/data/a.jsonl.zst").write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))
    (root / "sheet").mkdir()
    (root / "sheet/a.csv").write_text("id,text\n" + "".join(f"1,{text}\n" for text in TEXTS["own"]))
    (root / "pictures").mkdir()
    (root / "pictures/a.tar").write_bytes(b"")
    (root / "scripted").mkdir()
    (root / "scripted/scripted.py").write_text("import datasets\n")
    with serve_folder(tmp_path / "hub") as hub:
        yield hub


SMALL = "from basemodel.prepare import documents, encoding; documents.SHARD_BYTES = 4_000"
SLOW = """
import time
write = encoding.write_part
encoding.write_part = lambda *arguments: (time.sleep(0.2), write(*arguments))[1]
"""


def start(hub: FolderHub, dataset: str, output: Path, *options: str, before: str = SMALL) -> Script:
    command = ["prepare_datasets.py", dataset, str(output), "--tokenizer", "bytes", *options]
    return Script(command, hub.env(hub.folder.parent / "home"), before)


def finished(script: Script) -> Finished:
    done = script.wait()
    assert done.returncode == 0, done.stderr
    return done


OWN = split_texts(TEXTS["own"], 0.1)
DOCUMENTS = {
    "me/two --name small": {"train": TEXTS["small"], "validation": TEXTS["held"]},
    "me/lines --validation-fraction 0.1": OWN,
    "me/sheet --validation-fraction 0.1": OWN,
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_data_set_by_its_id(hub: FolderHub, tmp_path: Path, case: str) -> None:
    """The right documents in the right split."""
    dataset, *options = case.split()
    finished(start(hub, dataset, tmp_path / "out", *options))
    meta = assert_holds(tmp_path / "out", DOCUMENTS[case], get_tokenizer("bytes"))
    assert meta["revision"] == COMMIT and meta["source"] == dataset
    assert meta["files_skipped"] == ({"of the split 'test'": 1} if dataset == "me/two" else {})


def test_a_data_set_by_its_id_resumes_without_a_second_download(hub: FolderHub, tmp_path: Path) -> None:
    case = "me/two --name small"
    dataset, *options = case.split()
    killed = start(hub, dataset, tmp_path / "out", *options, "--workers", "1", before=SMALL + SLOW)
    parts = tmp_path / "out.incomplete/parts"
    wait_for(lambda: len(list(parts.glob("??????/record.json"))) >= 2 or killed.has_ended, "two parts")
    killed.kill()
    asked = len(hub.requests)
    said = finished(start(hub, dataset, tmp_path / "out", *options, "--workers", "4")).stdout
    assert "shards were already encoded by an earlier run" in said
    again = [request for request in hub.requests[asked:] if request.startswith("GET")]
    assert not any(request.endswith(".parquet") for request in again)
    assert_holds(tmp_path / "out", DOCUMENTS[case], get_tokenizer("bytes"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("me/two", "Please pick one among the available configs: ['small', 'big']"),
        ("me/two --name bog", "BuilderConfig 'bog' not found. Available: ['small', 'big']"),
        ("me/two --name big --split tset", "me/two: has no split 'tset'; --split is one of ['train']"),
        ("me/two --name big --revision v9", "Revision 'v9' doesn't exist"),
        ("me/nothing", "Dataset 'me/nothing' doesn't exist on the Hub or cannot be accessed"),
        ("me/scripted", "the Hub may have made tables of it: --revision refs/convert/parquet"),
        ("me/pictures", "me/pictures: a.tar has an unknown type; known are .parquet"),
        (
            "me/sheet --text-column body",
            "a.csv: the first row has no 'body'; set --text-column to one of ['id', 'text']",
        ),
    ],
)
def test_what_is_not_there(hub: FolderHub, tmp_path: Path, arguments: str, message: str) -> None:
    dataset, *options = arguments.split()
    done = start(hub, dataset, tmp_path / "out", *options).wait()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("Error: ")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("token", [None, "hf_test"])
def test_gated_access(
    hub: FolderHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    hub.gated.add("me/sheet")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    done = start(hub, "me/sheet", tmp_path / "out").wait()
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: me/sheet: ") and "is a gated dataset on the Hub" in line
    assert line.endswith("a private or gated data set needs: hf auth login")
