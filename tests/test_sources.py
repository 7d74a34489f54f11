"""Text of any kind: names, encodings, compressions, schemas and damage, and what is read of such files."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from properties import EXAMPLES

from basemodel.common.errors import InputError
from basemodel.prepare.readers import cut_into_pieces, read_documents
from basemodel.prepare.sources import Request, Source, find_source

TEXTS = ["one", "two \u00e9\u4e2d\U0001f600", 'three "quoted", with\na line and <|endoftext|>', "NA", "0012"]
KANJI = ["\u6f22" * 99] * 9
ROWS = [*TEXTS, None, ""]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def table(texts: Any = ROWS, **columns: Any) -> pyarrow.Table:
    return pyarrow.table({"id": range(len(texts)), "text": texts, **columns})


def parquet(rows: pyarrow.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer, row_group_size=3)
    return buffer.getvalue()


def arrow(rows: pyarrow.Table, writer: Callable = pyarrow.ipc.new_stream) -> bytes:
    buffer = io.BytesIO()
    with writer(buffer, rows.schema) as file:
        file.write_table(rows)
    return buffer.getvalue()


def jsonl(rows: Any = ROWS) -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(rows)
    ).encode()


def array(indent: int | None = None, rows: Any = ROWS) -> bytes:
    return json.dumps([{"id": i, "text": text} for i, text in enumerate(rows)], indent=indent).encode()


def sheet(rows: Any = TEXTS, delimiter: str = ",") -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows([("id", "text"), *enumerate(rows)])
    return buffer.getvalue().encode()


def pieces_of(source: Source) -> list[Any]:
    return [piece for path, split in source.files for piece in cut_into_pieces(path, split, "text")]


def read(source: Path, **request: str) -> tuple[list[str | None], Source]:
    """The documents of a source in order, None for a null, and what was found."""
    found = find_source(Request(str(source), **request), leave_out=None)()
    documents = (document for piece in pieces_of(found) for document in read_documents(piece, "text"))
    return [d if d is None else b"".join(d).decode() for d in documents], found


LATIN = "\u00c4rger mit \u00f6ffentlichen \u00dcbungen, gr\u00fc\u00dft Herr M\u00fcller. " * 20
CATEGORIES = pyarrow.array(ROWS).dictionary_encode()
GOOD: dict[str, tuple[str, bytes, list[str | None]]] = {
    # name: file, content, documents
    "parquet": ("a.parquet", parquet(table()), ROWS),
    "parquet compressed as a whole": ("a.parquet.zst", zstd(parquet(table())), ROWS),
    "pandas categories": ("a.parquet", parquet(table(CATEGORIES)), ROWS),
    "bytes without a logical type": (
        "a.parquet",
        parquet(table(pyarrow.array([b"a", b"\xff"]))),
        ["a", "\ufffd"],
    ),
    "large strings": ("a.parquet", parquet(table(pyarrow.array(ROWS, pyarrow.large_string()))), ROWS),
    "nothing but nulls": ("a.parquet", parquet(table([None, None])), [None, None]),
    "arrow stream": ("a.arrow", arrow(table()), ROWS),
    "arrow file": ("a.arrow", arrow(table(), pyarrow.ipc.new_file), ROWS),
    "arrow categories": ("a.arrow", arrow(table(CATEGORIES)), ROWS),
    "arrow.gz": ("a.arrow.gz", gzip.compress(arrow(table())), ROWS),
    "jsonl": ("a.jsonl", jsonl(), ROWS),
    "ndjson": ("a.ndjson", jsonl(), ROWS),
    "capital letters": ("B.JSONL", jsonl(), ROWS),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress(jsonl()), ROWS),
    "several gz streams in one": ("a.jsonl.gz", gzip.compress(jsonl()) + gzip.compress(jsonl()), ROWS * 2),
    "jsonl.zst": ("a.jsonl.zst", zstd(jsonl()) + zstd(jsonl()), ROWS * 2),
    "jsonl.xz": ("a.jsonl.xz", lzma.compress(jsonl()), ROWS),
    "jsonl.bz2": ("A.Jsonl.BZ2", bz2.compress(jsonl()), ROWS),
    "jsonl after a byte order mark": ("a.jsonl", codecs.BOM_UTF8 + jsonl(), ROWS),
    "jsonl in UTF-16": ("a.jsonl", jsonl().decode().encode("utf-16"), ROWS),
    "jsonl in UTF-16, longer in UTF-8": ("a.jsonl", jsonl(KANJI).decode().encode("utf-16"), KANJI),
    "jsonl with CRLF and empty lines": ("a.jsonl", jsonl().replace(b"\n", b"\r\n\r\n"), ROWS),
    "jsonl without a last newline": ("a.jsonl", jsonl()[:-1], ROWS),
    "jsonl with invalid UTF-8": ("a.jsonl", b'{"text": "a\xffb"}\n', ["a\ufffdb"]),
    "jsonl with line separators": ("a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),
    "jsonl in a .json": ("a.json", jsonl(), ROWS),
    "json array": ("a.json", array(), ROWS),
    "json array on many lines": ("a.json", array(indent=2), ROWS),
    "json array in UTF-16": ("a.json", array().decode().encode("utf-16"), ROWS),
    "json array.zst": ("a.json.zst", zstd(array()), ROWS),
    "json object on many lines": ("a.json", b'{\n"text":\n"a"}\n', ["a"]),
    "empty json array": ("a.json", b" [ ] ", []),
    "csv": ("a.csv", sheet(), TEXTS),
    "csv.gz": ("a.csv.gz", gzip.compress(sheet()), TEXTS),
    "csv.zst": ("a.csv.zst", zstd(sheet()), TEXTS),
    "csv after a byte order mark": ("a.csv", codecs.BOM_UTF8 + sheet(), TEXTS),
    "csv in UTF-16, as spreadsheets export it": (
        "a.csv",
        sheet(delimiter="\t").decode().encode("utf-16"),
        TEXTS,
    ),
    "csv with semicolons": ("a.csv", sheet(delimiter=";"), TEXTS),
    "csv with an empty cell": ("a.csv", b"id,text\n1,\n2,a\n", ["", "a"]),
    "csv with invalid UTF-8": ("a.csv", b"id,text\n1,a\xffb\n2,c\n", ["a\ufffdb", "c"]),
    "csv with * in its name": ("notes [1]*.csv", sheet(), TEXTS),
    "csv with pandas' index": ("a.csv", b",text\n0,a\n1,b\n", ["a", "b"]),
    "csv with a comma after each row": ("a.csv", b"id,text,\n0,a,\n1,b,\n", ["a", "b"]),
    "csv with other columns of one name": ("a.csv", b"x,text,x\n0,a,1\n", ["a"]),
    "tsv as pandas writes it": ("a.tsv", sheet(delimiter="\t"), TEXTS),
    "tsv with quotes around all cells": ("a.tsv", b'"id"\t"text"\n"0"\t"a"\n', ["a"]),
    "tsv of one column": ("a.tsv", b'text\n"a\nb"\n"c ""x"""\nd, e\n', ["a\nb", 'c "x"', "d, e"]),
    "json with invalid UTF-8": ("a.json", b'[{"text": "a\xff"}]', ["a\ufffd"]),
    "tsv with a line break in a cell": ("a.tsv", b'id\ttext\n0\t"a\nb"\n', ["a\nb"]),
    "tsv with a quote that none ends": (
        "a.tsv",
        b'id\ttext\n0\t"Said the cat\n1\ta\n2\t"b" and "c"\n3\tsaid the cat."\n',
        ['"Said the cat', "a", '"b" and "c"', 'said the cat."'],
    ),
    "txt": ("a.txt", "a\u00e9\r\nb".encode(), ["a\u00e9\r\nb"]),
    "txt in capitals": ("A.TXT", b"a", ["a"]),
    "txt after a byte order mark": ("a.txt", codecs.BOM_UTF8 + b"text", ["text"]),
    "txt in UTF-16": (
        "a.txt",
        "Notepad's \u00fcnicode \U0001f600".encode("utf-16"),
        ["Notepad's \u00fcnicode \U0001f600"],
    ),
    "txt in big-endian UTF-16": ("a.txt", codecs.BOM_UTF16_BE + "\u00fc\n".encode("utf-16-be"), ["\u00fc\n"]),
    "txt in UTF-32": ("a.txt", "\u4e2d".encode("utf-32"), ["\u4e2d"]),
    "txt with nothing in it": ("a.txt", b"", [""]),
    "txt with a byte order mark alone": ("a.txt", codecs.BOM_UTF8, [""]),
    "txt.gz": ("a.txt.gz", gzip.compress(b"text"), ["text"]),
    "txt in Latin-1": ("a.txt", LATIN.encode("latin-1"), [LATIN.encode("latin-1").decode(errors="replace")]),
    "markdown": ("a.md", b"# title\n", ["# title\n"]),
    "md.xz": ("a.md.xz", lzma.compress(b"# title\n"), ["# title\n"]),
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# A frame whose header asks for a window of 2 GiB, as `zstd --long=31` writes it
ZSTD_LONG = bytes.fromhex("28b52ffd04a8")
KANA = "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002" * 20
BAD: dict[str, tuple[str, bytes, str]] = {
    # name: file, content, what is said after the file's name
    "Shift-JIS": ("a.txt", KANA.encode("shift-jis"), "most of it is not UTF-8 text"),
    "UTF-16 without a byte order mark": ("a.txt", b"t\0e\0x\0t\0" * 9, "most of it is not UTF-8 text"),
    "a program called .txt": ("a.txt", bytes(range(256)) * 9, "most of it is not UTF-8 text"),
    "a Git LFS pointer": (
        "a.txt",
        LFS_POINTER,
        "is a Git LFS pointer, not the file itself; fetch the file with: git lfs pull",
    ),
    "jsonl in KOI8-R": (
        "a.jsonl",
        ('{"text": "%s"}\n' % ("\u0442\u0435\u043a\u0441\u0442" * 20)).encode("koi8-r"),
        "most of it is not UTF-8",
    ),
    "cut-off gz": (
        "a.jsonl.gz",
        gzip.compress(jsonl() * 99)[:-20],
        "cannot be read: Truncated compressed stream",
    ),
    "cut-off xz": (
        "a.txt.xz",
        lzma.compress(jsonl() * 99)[:-20],
        "cannot be read: Compressed file ended before",
    ),
    "gz that is none": ("a.jsonl.gz", jsonl(), "cannot be read: zlib inflate failed: incorrect header check"),
    "cut-off parquet": ("a.parquet", parquet(table())[:-9], "cannot be read"),
    "empty parquet": ("a.parquet", b"PAR1", "cannot be read"),
    "arrow that is none": ("a.arrow", b"what is this?" * 9, "cannot be read"),
    "numbers": (
        "a.parquet",
        parquet(table([1, 2])),
        "column 'text' is not text: Unsupported cast from int64",
    ),
    "numbers in arrow": (
        "a.arrow",
        arrow(table([1, 2])),
        "column 'text' is not text: Unsupported cast from int64",
    ),
    "lists": ("a.parquet", parquet(table([["a"]])), "column 'text' is not text: Unsupported cast from list<"),
    "no such column": (
        "a.parquet",
        parquet(pyarrow.table({"body": ["a"]})),
        ": has no 'text'; set --text-column to one of ['body']",
    ),
    "no such column in arrow": (
        "a.arrow",
        arrow(pyarrow.table({"body": ["a"]})),
        ": has no 'text'; set --text-column to one of ['body']",
    ),
    "no such column in csv": (
        "a.csv",
        b"id,body\n1,a\n",
        "the first row has no 'text'; set --text-column to one of ['id', 'body']",
    ),
    "csv with a row too long": (
        "a.csv",
        b"id,text\n1,a\n2,b,c\n",
        "the row that ends in line 3: cells: 3; columns in the header: 2",
    ),
    "csv with a row too short": ("a.csv", b"id,text\n1,a\n2\n", "line 3: cells: 1; columns in the header: 2"),
    "csv with a quote left open": (
        "a.csv",
        b'id,text\n1,"a\n2,b\n',
        "the row that ends in line 3: unexpected end of data",
    ),
    "csv with one cell more in each row": (
        "a.csv",
        b"id,text\n0,a,\n1,b,\n",
        "the row that ends in line 2: cells: 3; columns in the header: 2",
    ),
    "csv with backslashes before quotes": (
        "a.csv",
        b'id,text\n0,"He said \\"hi\\", and left"\n',
        "line 2: ',' expected after '\"'; quotes in a quoted cell must be doubled",
    ),
    "csv without a header": ("a.csv", b"0," + b"A long text. " * 99 + b"\n", "of ['0', 'A long text. A "),
    "csv with two columns of the text's name": (
        "a.csv",
        b"text,text\na,b\n",
        "has 2 columns named 'text'; rename all but one",
    ),
    "parquet with two columns of the text's name": (
        "a.parquet",
        parquet(pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"])),
        "has 2 columns named 'text'; rename all but one",
    ),
    "tsv with quotes that may belong to the text": (
        "a.tsv",
        b'id\ttext\n0\t"a"\n1\tb\n',
        "quotes at the start of some cells may belong to the text or not",
    ),
    "tsv with what may be rows of their own or of one cell": (
        "a.tsv",
        b'id\ttext\n1\t"def f():\n\treturn 1"\n2\tx\n',
        "quotes at the start of some cells may belong to the text or not",
    ),
    "tsv with a cell too many": ("a.tsv", b"id\ttext\n0\ta\tb\n", "cells: 3; columns in the header: 2"),
    "jsonl with other keys": (
        "a.jsonl",
        b'{"story": "a"}\n',
        "line 1 has no 'text'; set --text-column to one of ['story']",
    ),
    "json with other keys": (
        "a.json",
        b'[{"story": "a"}]',
        "object 1 has no 'text'; set --text-column to one of ['story']",
    ),
    "zstd with a large window": ("a.jsonl.zst", ZSTD_LONG, "decompress it first: zstd -d --long=31"),
    "a page in place of text": (
        "a.txt",
        codecs.BOM_UTF8 + b"\n<!DOCTYPE html>\n<html>Not found",
        "is an HTML page, not the file itself",
    ),
    "a page in place of a table": (
        "a.parquet",
        b"<html><body>Log in",
        "is an HTML page, not the file itself",
    ),
    "a Git LFS pointer to a table": ("a.parquet", LFS_POINTER, "fetch the file with: git lfs pull"),
    "a Git LFS pointer to a compressed file": (
        "a.jsonl.gz",
        LFS_POINTER,
        "fetch the file with: git lfs pull",
    ),
    "jsonl with a number": (
        "a.jsonl",
        jsonl() + b'{"text": 5}\n',
        f'line {len(ROWS) + 1} is not a JSON object with a string "text"',
    ),
    "jsonl with null lines": (
        "a.jsonl",
        jsonl() + b"null\n",
        f'line {len(ROWS) + 1} is not a JSON object with a string "text"',
    ),
    "cut-off json": ("a.json", array()[:-20], "cannot be read: "),
    "several json objects on many lines": (
        "a.json",
        b'{\n"text":\n"a"}\n{"text": "b"}\n',
        "cannot be read: Extra data",
    ),
    "json array of strings": ("a.json", b'["a", "b"]', 'object 1 is not a JSON object with a string "text"'),
    "unknown type": ("a.docx", b"PK", "unknown file type; known are .parquet, .arrow"),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_read(tmp_path: Path, case: str) -> None:
    name, content, texts = GOOD[case]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name)[0] == read(tmp_path)[0] == texts


CHARACTERS = st.sampled_from(
    " \"',;\t\n\r|#\\01aZ\u00e9\u4e2d\u0085\u2028\ufeff\ufffd\U0001f600"
) | st.characters(exclude_categories=["Cs"])
SQUEEZED = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress, ".bz2": bz2.compress}


def written(kind: str, texts: list[str], end: str, *, quoted: bool) -> str:
    """A file of texts, as the usual libraries write them."""
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    if kind in ("jsonl", "ndjson"):
        return "".join(json.dumps(row, ensure_ascii=quoted) + end for row in rows)
    if kind == "json":
        return json.dumps(rows, ensure_ascii=quoted, indent=2).replace("\n", end)
    if kind == "txt":
        return texts[0]
    buffer = io.StringIO(newline="")
    options = (
        {"delimiter": "\t"} if kind == "tsv" else {"quoting": csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL}
    )
    if kind == "csv; in Europe":
        options["delimiter"] = ";"
    csv.writer(buffer, lineterminator=end, **options).writerows([("id", "text"), *enumerate(texts)])
    return buffer.getvalue()


@settings(EXAMPLES, max_examples=200)
@given(
    kind=st.sampled_from(["csv", "csv; in Europe", "tsv", "jsonl", "ndjson", "json", "txt"]),
    texts=st.lists(st.text(CHARACTERS, max_size=12), min_size=1, max_size=6),
    times=st.sampled_from([1, 1, 30]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    end=st.sampled_from(["\n", "\r\n"]),
    squeezed=st.sampled_from(list(SQUEEZED)),
    quoted=st.booleans(),
)
def test_documents_in_are_documents_out_or_the_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    texts: list[str],
    times: int,
    encoding: str,
    end: str,
    squeezed: str,
    quoted: bool,
) -> None:
    texts = [text * times for text in texts]
    content = written(kind, texts, end, quoted=quoted)
    assume(not content.startswith("\ufeff"))
    # Python 3.11's csv quotes no lone \r, which then looks like the end of a row.
    assume(quoted or end == "\r\n" or "\r" not in "".join(texts) or "sv" not in kind)
    path = tmp_path_factory.mktemp("a") / f"a.{kind[:6].partition(';')[0]}{squeezed}"
    path.write_bytes(SQUEEZED[squeezed](content.encode(encoding)))
    try:
        found = read(path)[0]
    except InputError as error:
        assert ("quotes at the start of some cells may" in str(error) and kind == "tsv") or kind == "txt", (
            error
        )
        return
    assert found == (texts[:1] if kind == "txt" else texts)


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_found_in_order_and_the_others_counted(tmp_path: Path) -> None:
    names = ["b/2.txt", "a.txt", "b.txt", "b/1.md", "C.TXT"]
    for name in (*names, "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "a.pdf", "b/x.docx", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    texts, found = read(tmp_path)
    assert texts == sorted(names, key=lambda name: Path(name))
    skipped = {"hidden": 2, ".pdf": 1, ".docx": 1, "no suffix": 1, ".txt": 1}
    assert found.skipped == skipped
    assert read(tmp_path, files="b/*")[0] == ["b/1.md", "b/2.txt"]
    found = find_source(Request(str(tmp_path)), leave_out=tmp_path / "b")()
    assert [path.name for path, _ in found.files] == ["C.TXT", "a.txt", "b.txt"]


def test_what_describes_a_data_set_is_not_its_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# notes")
    (tmp_path / "a.md").write_text("text")
    assert read(tmp_path)[0] == ["# notes", "text"], "among texts a README is one"
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(arrow(table(["row"])))
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "prepared").mkdir()
    for name in ("README.md", "meta.json", "train.safetensors"):
        (tmp_path / "prepared" / name).write_text("{}")
    texts, found = read(tmp_path)
    assert texts == ["text", "row"]
    assert found.skipped == {"hidden": 0, "descriptions of data sets": 2, "prepared data sets": 1}


@pytest.mark.parametrize("layout", ["folders", "names"])
def test_a_folder_of_splits(tmp_path: Path, layout: str) -> None:
    name = {"folders": "{}/some.jsonl", "names": "{}-00000-of-00001.jsonl"}[layout]
    for split in ("train", "validation", "test"):
        path = tmp_path / name.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jsonl([split]))
    texts, found = read(tmp_path)
    assert texts == ["train", "validation"]
    assert [split for _, split in found.files] == ["train", "validation"]
    assert found.skipped["of the split 'test'"] == 1
    assert read(tmp_path, split="test")[0] == ["test", "validation"]
    assert read(tmp_path, split="validation")[0] == ["validation"]
    # Without a split for validation, the text of each document decides.
    validation = tmp_path / name.format("validation")
    validation.unlink()
    texts, found = read(tmp_path)
    assert texts == ["train"] and found.files[0][1] is None and found.skipped["of the split 'test'"] == 1
    validation.write_bytes(jsonl(["validation"]))
    # A file that belongs to none: perhaps those names mean something else. All is read, and split by text.
    (tmp_path / "another.jsonl").write_bytes(jsonl(["another"]))
    texts, found = read(tmp_path)
    assert sorted(texts) == ["another", "test", "train", "validation"]
    assert {split for _, split in found.files} == {None}


@pytest.mark.parametrize(
    ("source", "request_", "message"),
    [
        ("missing", {}, "no such file or folder"),
        ("./owner/name", {}, "no such file or folder"),
        ("a/b/c", {}, "no such file or folder"),
        ("owner/notes.md", {}, "no such file or folder"),
        (".", {"split": "tset"}, "do not tell which belong to the split 'tset'"),
        (".", {"split": "validation"}, "do not tell which belong to the split 'validation'"),
        (".", {"files": "*.parquet"}, "that match --files '*.parquet'"),
        (".", {"name": "x"}, "--name is for a data set on the Hub"),
    ],
)
def test_sources_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, request_: dict, message: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="(?s)" + message.replace("*", r"\*")):
        find_source(Request(source, **request_), leave_out=None)
