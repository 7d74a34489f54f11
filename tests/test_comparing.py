"""compare_runs.py: the table, the chart, and the page that follows runs."""

import contextlib
import dataclasses
import html.parser
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers import MODEL, TRAIN, Sandbox, refused, run_python, run_script, write_dataset
from hypothesis import given
from hypothesis import strategies as st
from properties import EXAMPLES

import compare_runs
from basemodel.common.errors import InputError
from basemodel.evaluation.measurements import MeasuredLoss, TaskResult, add_task_results, write_test_loss
from basemodel.model.config import GPTConfig
from compare_runs import main, notes, read_run
from gpt import GPTModel

VALIDATE = {"validation_interval": 4, "validation_batches": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Two trained runs, the first with a price and a test loss, and one that has not begun."""
    sandbox = Sandbox(tmp_path_factory.mktemp("runs"))
    write_dataset(sandbox.datasets / "test/tokens")
    sandbox.write_run("one", train={**VALIDATE, "usd_per_hour": 3600.0})
    sandbox.write_run("two", model={"qkv_bias": True}, train={**VALIDATE, "global_batch_size": 4})
    sandbox.write_run("later", train=VALIDATE)
    sandbox.train("one")
    sandbox.train("two")
    result = MeasuredLoss("test/tokens", "validation", 0, 320, 16, 3.21, 24.8, 0.012, None, "now")
    write_test_loss(sandbox.run_dir("one") / "checkpoints/best", result)
    return sandbox


def compare(sandbox: Sandbox, *options: str | Path) -> str:
    paths = ("--runs-dir", sandbox.path / "runs", "--chart", sandbox.path / "chart.png")
    done = run_script("compare_runs.py", *options, *paths)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(printed: str) -> dict[str, dict[str, str]]:
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


class Page(html.parser.HTMLParser):
    """What a page refers to, and the data that it holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.data, self._inside, self.unclosed = [], "", "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self._inside = dict(attributes).get("id", "")
        self.links += [value for name, value in attributes if name in ("src", "href")]
        self.unclosed += [] if tag in ("meta", "input") else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data += data if self._inside == "runs" else ""


def test_table_chart_and_page(runs: Sandbox) -> None:
    page = runs.path / "runs/compare.html"
    rows = rows_of(compare(runs, "one", "two", "later", "--html", page))
    one, two, later = rows.values()
    assert list(rows) == ["one", "two", "later"]
    changed = "qkv_bias false → true, global_batch_size 8 → 4, usd_per_hour 3600.0 → null"
    assert two["differs from the first by"] == changed
    status, lines = runs.status("one"), runs.metrics("one", "val_loss")
    assert int(two["parameters"].replace(",", "")) - int(one["parameters"].replace(",", "")) == 2 * 3 * 32
    assert (one["tokens"], one["global batch"], two["global batch"]) == ("1,024", "8", "4")
    assert one["validation loss"] == f"{min(lines):.4f}"
    assert (one["test loss"], two["test loss"]) == ("3.2100 ± 0.0120", "–")
    assert one["cost"] == f"${status['cost_usd']:,.2f}"
    assert re.fullmatch(r"\d+%", one["validation time"])
    assert {later[key] for key in ("tokens", "validation loss", "hours", "cost", "tokens/s")} == {"–"}
    assert (runs.path / "chart.png").read_bytes().startswith(b"\x89PNG")
    parsed = Page(page)
    assert parsed.links == []
    assert parsed.unclosed == []
    first, _, third = json.loads(parsed.data)
    assert first["folder"] == "one"
    assert first["cells"]["now"] == "finished"
    assert first["validation"] == [[step * 128, loss] for step, loss in zip((0, 4, 8), lines, strict=True)]
    assert third["train"] == []
    assert first["learning_rate"] == [[step * 128, 0.01] for step in range(1, 9)]
    norms = runs.metrics("one", "grad_norm")
    assert first["grad_norm"] == [[step * 128, norm] for step, norm in enumerate(norms, start=1)]
    assert (first["cells"]["cost"], first["cells"]["cost to come"]) == (one["cost"], "$0.00")
    assert third["cells"]["cost to come"] == "–"


NO_TORCH = """
import sys
from compare_runs import main
main.main([*sys.argv[2:], "later"], standalone_mode=False)
assert not {"torch", "matplotlib"} & sys.modules.keys()
main.main([*sys.argv[2:], sys.argv[1]], standalone_mode=False)
assert "torch" not in sys.modules and "matplotlib" in sys.modules
"""


def test_a_table_needs_no_torch_and_matplotlib_only_for_a_chart(runs: Sandbox, tmp_path: Path) -> None:
    options = ("--runs-dir", runs.path / "runs", "--chart", tmp_path / "chart.png")
    done = run_python("-c", NO_TORCH, "one", *options)
    assert done.returncode == 0, done.stderr
    assert "| one |" in done.stdout and (tmp_path / "chart.png").exists()


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True, "qkv_bias": True}])
def test_parameters_are_counted_without_a_model(changes: dict[str, bool]) -> None:
    config = GPTConfig(**{**MODEL, **changes})
    assert config.parameter_count == sum(p.numel() for p in GPTModel.outline(config).parameters())


def test_the_chart_holds_what_it_draws(
    runs: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of the first steps, far above the others, would draw lines from outside the picture."""
    one = read_run(runs.path / "runs", "one")
    curves = {"train": [(10, 9.0), (40, 6.0), (50, 5.0), (500, 4.0), (1000, 3.0)]}
    curves["validation"] = [(0, 11.0), (500, 5.5), (1000, 3.5)]
    one = dataclasses.replace(one, tokens=1000, curves=curves)
    figures = []

    @contextlib.contextmanager
    def figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
        figures.append(import_module("matplotlib.figure").Figure())
        yield figures[0]

    monkeypatch.setattr(compare_runs, "xkcd_chart", figure)
    compare_runs.draw_chart([one], tmp_path / "chart.png")
    axes = figures[0].axes[0]
    train, validation, _ = (line.get_xydata().tolist() for line in axes.lines)
    assert train == [[50, 5.0], [500, 4.0], [1000, 3.0]]
    assert validation == [[500, 5.5], [1000, 3.5]]
    assert axes.get_ylim()[1] >= 5.5


@EXAMPLES
@given(rng=st.randoms(use_true_random=True))
def test_a_runs_figures_are_those_of_its_metrics(
    tmp_path_factory: pytest.TempPathFactory, rng: Random
) -> None:
    """Of steps that read halves at first, validate now and then, are logged in two lines by a stop between
    step and validation, or not finite."""
    steps, halves = rng.randint(1, 30), rng.choice([0, 4])
    lines, tokens, seconds, speeds, validations, validating, train = [], 0, 0.0, [], [], 0.0, []
    for step in range(steps + 1):
        line = {"step": step}
        if step:
            tokens += 32 if step <= halves else 64
            seconds, loss = seconds + rng.uniform(1, 3), rng.choice([None, rng.uniform(2, 4)])
            speeds.append(rng.uniform(10, 50))
            line |= {"train_loss": loss, "tokens_per_second": speeds[-1]}
            train += [] if loss is None else [(tokens, loss)]
        line |= {"tokens": tokens, "seconds": seconds}
        lines.append(dict(line))
        if rng.random() < 0.3 or step == 0:
            seconds, validating, loss = seconds + 2, validating + 2, rng.uniform(2, 4)
            validations.append((tokens, loss))
            more = {"val_loss": loss, "validation_seconds": 2.0, "seconds": seconds}
            if rng.choice([True, False]):
                lines.append({"step": step, "tokens": tokens, **more})
            else:
                lines[-1] |= more
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "train.json").write_text(json.dumps(TRAIN))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "tok')
    run = read_run(folder.parent, "tiny")
    assert (run.tokens, run.seconds) == (tokens, pytest.approx(seconds))
    assert run.global_batch == (2 if steps <= halves else 4)
    assert run.validation_loss == min(loss for _, loss in validations)
    assert run.curves["validation"] == validations and run.curves["train"] == train
    assert run.tokens_per_second == statistics.median(speeds)
    assert run.validation_share == pytest.approx(validating / seconds)


def test_the_share_of_validation_follows_from_the_metrics(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    folder = sandbox.write_run(train=VALIDATE)
    # 1 s of validation, then steps of 2 s, of which the first reads half a batch; after the second 3 s of
    # validation and 4 s of saving.
    lines = [
        {"step": 0, "tokens": 0, "val_loss": 4.0, "validation_seconds": 1.0, "seconds": 1.0},
        {"step": 1, "tokens": 32, "train_loss": 4.0, "tokens_per_second": 32.0, "seconds": 3.0},
        {
            "step": 2,
            "tokens": 96,
            "train_loss": 3.0,
            "tokens_per_second": 32.0,
            "val_loss": 3.0,
            "validation_seconds": 3.0,
            "seconds": 8.0,
        },
        {"step": 3, "tokens": 160, "train_loss": 2.0, "tokens_per_second": 32.0, "seconds": 14.0},
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "to'
    )
    run = read_run(tmp_path / "runs", "tiny")
    assert run.validation_share == pytest.approx((1 + 3) / 14)
    assert (run.tokens, run.global_batch, run.tokens_per_second, run.seconds) == (160, 4, 32.0, 14.0)


def test_the_test_loss_is_the_best_checkpoints_if_measured_else_the_latests(
    runs: Sandbox, tmp_path: Path
) -> None:
    folder = shutil.copytree(runs.run_dir("one"), tmp_path / "one", symlinks=True) / "checkpoints"
    for link in ("latest", "best"):
        (folder / link).unlink()
    for link, name in (("latest", "20260101Z000000-iteration-9"), ("best", "20260101Z000000-iteration-8")):
        (folder / link).symlink_to(name)
        (folder / name).mkdir()
        loss = 3.9 if link == "latest" else 3.1
        result = MeasuredLoss("test/tokens", "validation", 0, 320, 16, loss, 24.8, 0.012, None, "now")
        write_test_loss(folder / name, result)
        assert read_run(tmp_path, "one").test.loss == loss


def test_test_losses_of_different_data_are_said_to_be(runs: Sandbox) -> None:
    one, two = (read_run(runs.path / "runs", name) for name in ("one", "two"))
    same = dataclasses.replace(two, test=one.test)
    other = dataclasses.replace(two, test=dataclasses.replace(one.test, start_token=64))
    assert notes([one, two]) == notes([one, same]) == []
    assert notes([one, other])[0].startswith(
        "The test losses were measured on different data: test/tokens validation from 0"
    )


def test_wrong_comparisons(runs: Sandbox) -> None:
    assert "no such run; nearest: later, two, one" in refused(
        "compare_runs.py", "--runs-dir", runs.path / "runs", "one", "three"
    )
    for arguments, message in (
        (("one", "two", "one"), "run 'one' is named twice"),
        (("one", "--html", str(runs.path / "nowhere/page.html")), "no such folder: .*nowhere"),
        (("../one",), "must be a plain name"),
    ):
        with pytest.raises(InputError, match=message):
            main.main([*arguments, "--runs-dir", str(runs.path / "runs")], standalone_mode=False)


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "headless_shell"))), None
)


@pytest.fixture
def served(runs: Sandbox) -> Iterator[str]:
    """The address at which `python -m http.server` serves the runs."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*command, "--directory", str(runs.path / "runs")], **options) as server:
        yield re.search(r"http://[\d.:]+", server.stdout.readline())[0]
        server.terminate()


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to render the page")


def rendered(address: str, *options: str) -> str:
    """The page as Chromium shows it after its scripts have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", "--enable-logging=stderr", *options, address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Uncaught" not in done.stderr, done.stderr
    return done.stdout


@needs_chromium
def test_the_page_follows_a_run_in_headless_chromium(runs: Sandbox, served: str) -> None:
    folder = runs.run_dir("later")
    runs.write_run("later", train={**VALIDATE, "usd_per_hour": 8.0})
    (folder / "samples.jsonl").write_text("")
    compare(runs, "one", "two", "later", "--html", runs.path / "runs/compare.html")
    (folder / "samples.jsonl").unlink()
    # What happens after the page was made, half a line included.
    line = {"step": 3, "tokens": 384, "train_loss": 4.1, "val_loss": 3.9876, "seconds": 7200.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "tok')
    now = {"status": "running", "step": 3, "total_steps": 8, "tokens": 384, "tokens_per_second": 4321.0}
    now |= {"eta_seconds": 90.0, "seconds": 7200.0, "cost_usd": 16.0}
    (folder / "status.json").write_text(json.dumps(now))
    picture = runs.path / "page.png"
    page = rendered(f"{served}/compare.html", f"--screenshot={picture}", "--window-size=1200,900")
    for name in ("metrics.jsonl", "status.json"):
        (folder / name).unlink()
    runs.write_run("later", train=VALIDATE)
    cells = re.findall(r"<td>([^<]*)</td>", page)
    for text in ("running, 3 / 8 steps", "3.9876", "4,321", "2.00", "1.5", "$16.00", "$0.20"):
        assert text in cells, text
    assert "$0.20 to come" in page
    assert "3 of 3 runs read" in page
    # Two losses, the learning rate and the gradient norm of each run.
    assert page.count("<polyline") == 3 * 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def fifteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of five configs with three seeds each, with samples and tasks."""
    sandbox = Sandbox(tmp_path_factory.mktemp("fifteen"))
    names = []
    for rate in (1, 2, 3, 4, 5):
        for seed in (42, 43, 44):
            names.append(f"rate-{rate}--seed-{seed}")
            train = {**VALIDATE, "learning_rate": rate / 100, "random_seed": seed}
            folder = sandbox.write_run(names[-1], train=train)
            lines = [{"step": 0, "tokens": 0, "val_loss": 99.0, "seconds": 0.1}]
            lines += [
                {"step": step, "tokens": 64 * step, "train_loss": 4 / step + rate, "grad_norm": 1 + step % 2}
                | {"learning_rate": rate / 100, "seconds": step, "val_loss": 4 / step + rate + seed / 100}
                for step in range(1, 9)
            ]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
            samples = [
                {"step": step, "tokens": 64 * step, "prompt": prompt, "text": f"{step} </script>{last}{rate}"}
                for step in (2, 4, 8)
                for prompt, last in (("Every effort", "t"), ("Return the", "e"))
            ]
            (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)) + '\n{"step": 9')
            best = folder / "checkpoints/best"
            best.mkdir(parents=True)
            results = [
                TaskResult("piqa", "acc", 0.5 + rate / 100, 0.01, True, 9, None, 0, None, "1", "1", "now")
            ]
            if seed == 42:
                results += [
                    TaskResult("arc_easy", "acc", 0.25, None, True, 100, 100, 5, None, "1", "1", "now")
                ]
            add_task_results(best, results)
    (sandbox.run_dir(names[-1]) / "checkpoints/best/harness.json").write_text('{"results": [{"task": 1')
    page = sandbox.path / "compare.html"
    compare(sandbox, *names, "--html", page)
    return page


def polylines(page: str, panel: str = "loss") -> list[tuple[str, str, list[float]]]:
    """The curves of a panel: color, thickness, and heights on the screen."""
    chart = page.partition(f'<svg id="{panel}"')[2].partition("</svg>")[0]
    curves = []
    for style, inside in re.findall(r"<g style=\"--color: (#\w+)\"[^>]*>(.*?)</g>", chart):
        for points, thickness in re.findall(r'<polyline points="([^"]*)" stroke-width="([\d.]+)"', inside):
            curves.append((style, thickness, [float(point.partition(",")[2]) for point in points.split()]))
    return curves


@needs_chromium
def test_fifteen_runs_are_readable(fifteen: Path) -> None:
    page = rendered(f"file://{fifteen}")
    colors = [color for color, thickness, _ in polylines(page) if thickness == "2.5"]
    assert len(colors) == 15 and len(set(colors)) == 5
    assert [colors[index] for index in (0, 1, 2)] == [colors[0]] * 3 and colors[3] != colors[0]
    assert len(re.findall("rate-. × 3", page)) == 5
    heights = [heights for _, _, heights in polylines(page)]
    assert all(8 <= height <= 440 for curve in heights for height in curve)
    assert all(len(curve) == 8 for curve in heights), "not the loss of 99 before training"
    assert [len(polylines(page, panel)) for panel in ("learning_rate", "grad_norm")] == [15, 15]
    tasks = page.partition('<table id="tasks">')[2].partition("</table>")[0]
    assert re.findall("<th>(.*?)</th>", tasks) == [
        "run",
        "piqa acc",
        "arc_easy acc (5-shot, first 100 documents)",
    ]
    assert (tasks.count("0.5300 ± 0.0100"), tasks.count("<td>0.2500</td>"), tasks.count("<tr")) == (3, 5, 15)
    assert "0.5300" not in page.partition('<table id="table">')[2].partition("</table>")[0]
    assert page.count("8 &lt;/script&gt;t1") == 3 and "2 &lt;/script&gt;" not in page


@needs_chromium
def test_a_view_is_chosen_by_clicking_and_kept_in_the_address(fifteen: Path) -> None:
    clicks = """
        const click = (where, index = 0) => document.querySelectorAll(where)[index].click();
        const slide = (name, value) => {
          control(name).value = value;
          control(name).dispatchEvent(new Event("input"));
        };
        click("#legend button", 2);  // hides the second group
        click("#table tr:nth-child(2) input");  // and the first run
        click("[name=log]");
        click("[name=only]");
        slide("step", 1);
        control("prompt").value = "Return the";
        control("prompt").dispatchEvent(new Event("change"));
        click("#table th", 2), click("#table th", 2);  // by validation loss, the worst first
        document.title = location.hash;
        const last = near.loss.at(-1), box = id("loss").getBoundingClientRect();
        const there = { clientX: box.x + last.px, clientY: box.y + last.py };
        id("loss").dispatchEvent(new PointerEvent("pointermove", there));
    """
    clicked = fifteen.with_name("clicked.html")
    clicked.write_text(fifteen.read_text().replace("</html>", f"<script>{clicks}</script></html>"))
    page = rendered(f"file://{clicked}")
    hashed = re.search("<title>(.*?)</title>", page)[1].replace("&amp;", "&")
    again = rendered(f"file://{fifteen}{hashed}")
    for shown in (page, again):
        assert len(polylines(shown)) == 15 - 3 - 1
        losses = [4 / step + 5 + 0.44 for step in range(1, 9)]
        heights = polylines(shown)[-1][2][1:]
        # Evenly spaced on the screen as their logarithms are.
        ratio = (heights[1] - heights[0]) / (heights[3] - heights[0])
        expected = [math.log(loss) for loss in losses]
        assert ratio == pytest.approx((expected[1] - expected[0]) / (expected[3] - expected[0]), abs=0.02)
        assert shown.count("4 &lt;/script&gt;e1") == 2 and "&lt;/script&gt;e2" not in shown
    assert re.search(r'<div id="tip">rate-5--seed-44: validation loss 5.94 at 512 tokens</div>', page)
    rows = re.findall(r'<tr[^>]*data-run="([^"]*)"', page.partition('<table id="table">')[2])
    assert (rows[0], rows[14]) == ("rate-5--seed-44", "rate-1--seed-42")
    smooth = polylines(rendered(f"file://{fifteen}#smooth=0.5"))[0][2]
    # Of 5, 3 and 7/3, with weights 1, 1/2, 1/4 from the last one back: 5, 11/3 and 61/21.
    assert (smooth[1] - smooth[0]) / (smooth[2] - smooth[0]) == pytest.approx(7 / 11, abs=0.01)
