"""The benchmarks: the tiny run writes all its files; what the figures are made of is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastrnn import _core

from benchmarks import cases, history, memory, plots, properties, report, timing
from benchmarks.__main__ import disagreement, hopeless, parse
from benchmarks.cases import CHARACTERS, INFERENCE, STEP, TRAINING, Case, Problem
from benchmarks.properties import Property
from benchmarks.results import Result, shares, summary

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_quick_run_writes_page_data_and_pictures(tmp_path: Path) -> None:
    # In its own process: it loads every library there is, and their thread pools.
    done = run("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(names) == {".md", ".json", ".png"}
    assert len(list(tmp_path.glob("*.png"))) == 3

    data = json.loads(names[".json"].read_text())
    assert [line["name"] for line in data["results"]] == [case.name for case in cases.quick()]
    assert not any(line["failures"] for line in data["results"])
    assert {"fastrnn", "NumPy"} <= set(data["versions"])
    for line in data["results"]:
        assert line["seconds"] > 0 and line["gflops"] > 0
        assert all(ratio > 0 for ratio in line["ratios"].values())
    for key in ("date", "processor", "threads", "instruction set in use"):
        assert data["machine"][key]

    assert len(data["properties"]) == 21
    assert all(math.isfinite(line["value"] or 0) for line in data["properties"])
    assert data["since"] is None

    page = names[".md"].read_text()
    for text in (
        "FMA peak",
        "× NumPy",
        "## Properties",
        data["machine"]["date"],
        data["versions"]["NumPy"],
    ):
        assert text in page
    for path in tmp_path.glob("*.png"):
        assert path.name in page
        assert path.read_bytes().startswith(b"\x89PNG")


def test_filter_that_matches_nothing_says_so(tmp_path: Path) -> None:
    done = run("--quick", "--filter", "no such case", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no case matches 'no such case'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_filter_that_is_no_expression_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--filter", "("])
    assert "no regular expression" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "-a"])
def test_name_that_is_no_part_of_a_file_name_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse([f"--name={name}"])
    assert "expected a-z, 0-9 and -" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", [cases.quick(), cases.standard(), cases.full()])
def test_names_of_cases_are_unique(chosen: list[Case]) -> None:
    assert len({case.name for case in chosen}) == len(chosen)


def test_arithmetic_of_a_case() -> None:
    # Two products of 4 gates × 3 units, with 2 inputs and 3 units, for each of 5 × 7 steps.
    flops = 2 * 4 * 3 * (2 + 3) * 5 * 7
    assert Case(INFERENCE, "LSTM", 5, 7, 3, I=2).flops == flops
    assert Case(TRAINING, "LSTM", 5, 7, 3, I=2).flops == 3 * flops
    deep = Case(INFERENCE, "LSTM", 5, 7, 3, I=2, layers=2, bidirectional=True)
    assert deep.flops == 2 * flops + 2 * (2 * 4 * 3 * (6 + 3) * 5 * 7)
    ragged = Case(INFERENCE, "LSTM", 5, 7, 3, I=2, ragged=True)
    assert ragged.lengths is not None
    assert ragged.flops * 5 * 7 == flops * ragged.lengths.sum()


def test_shortest_time_of_one_row() -> None:
    # At 1 GB/s and 1 GF/s a byte or an operation takes 1 ns.
    sequence = Case(INFERENCE, "GRU", 5, 1, 4, I=2)
    read, product = 5 * 3 * 4 * 4 * 4, 5 * 2 * 3 * 4 * 2
    assert sequence.shortest(1, 1) == pytest.approx((read + product) * 1e-9)
    step = Case(STEP, "GRU", 1, 1, 4, I=2)
    assert step.shortest(1, 1) == pytest.approx(3 * 4 * (4 + 2) * 4 * 1e-9)
    assert not Case(INFERENCE, "GRU", 5, 2, 4).reads_weights


def test_problem_has_the_shapes_of_its_case() -> None:
    case = Case(TRAINING, "GRU", 5, 3, 8, I=4, layers=2, bidirectional=True, dtype="float64")
    problem = Problem.of(case)
    assert problem.x.shape == (5, 3, 4) and problem.dy.shape == (5, 3, 16)
    assert problem.weights["weight_ih_l1_reverse"].shape == (24, 16)
    assert {array.dtype for array in problem.weights.values()} == {np.dtype("float64")}
    np.testing.assert_equal(Problem.of(case).x, problem.x)


def test_every_round_begins_with_another_contestant() -> None:
    order: list[str] = []
    contestants = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    values = timing.race(contestants, 3, 60, lambda values: {"b"})
    assert "".join(order) == "abc" + "ca" + "ac"
    assert values == {"a": [1, 5, 6], "b": [2], "c": [3, 4, 7]}
    assert timing.race({"a": lambda: 1}, 5, 0, lambda values: set()) == {"a": [1]}


def test_a_turn_times_at_least_one_call() -> None:
    calls: list[str] = []
    seconds = timing.turn(lambda: calls.append("call"), lambda: calls.append("select"), 1e-6)
    assert calls[:2] == ["select", "call"] and len(calls) > 2
    assert 0 < seconds < 1


def test_hopeless_thread_counts_of_others_only() -> None:
    values = {("fastrnn", 1): [9.0], ("fastrnn", 2): [1.0], ("A", 1): [2.0], ("A", 2): [1.0]}
    assert hopeless({**values, ("", 1): [(1.0, 1.0, 1.0)]}) == {("A", 1)}


def test_disagreement() -> None:
    a = np.linspace(-1, 1, 5)
    assert not disagreement([a, a], [a, a + 1e-6], 1e-5)
    assert "result 1 differs" in disagreement([a, a], [a, a + 1e-4], 1e-5)
    assert "result 0 differs" in disagreement([a * np.nan], [a], 1e-5)
    assert "shape" in disagreement([a[None]], [a], 1e-5)
    assert "expected 2" in disagreement([a], [a, a], 1e-5)


def test_conclusions_from_rounds() -> None:
    case = Case(INFERENCE, "RNN", 1, 1, 500)
    seconds = {
        "fastrnn": {1: [4e-3, 4e-3, 8e-3], 2: [2e-3, 2e-3, 4e-3]},
        "PyTorch": {1: [9.0], 2: [8e-3, 6e-3, 16e-3]},
        "ONNX Runtime": {1: [3e-3, 3e-3, 6e-3], 2: [1.0]},
    }
    result = Result(case, seconds, {1: [(1.0, 1.0, 0.5)] * 3, 2: [(2.0, 1.0, 1.0)] * 3})
    assert (result.threads("fastrnn"), result.threads("ONNX Runtime")) == (2, 1)
    assert result.time() == 2e-3 and result.speed_up() == 2
    assert result.ratio("PyTorch") == 4 and result.ratio("JAX") is None
    assert result.best_ratio() == 1.5
    assert result.of_peak() == pytest.approx(1e6 / (2e-3 * 2e9))
    assert result.of_tile() is None  # B = 1
    assert result.of_read_limit() == pytest.approx((1e6 + 0.5e6 / 2) * 1e-9 / 2e-3)
    lines = {line["peer"]: line for line in summary([result], ["PyTorch", "ONNX Runtime"])}
    assert lines["PyTorch"]["geometric_mean"] == pytest.approx(4)
    assert lines["the faster of PyTorch and ONNX Runtime"]["least"] == 1.5


def test_fewest_threads_where_more_gain_nothing() -> None:
    result = Result(Case(STEP, "RNN", 1, 1, 8), {"fastrnn": {1: [1.01], 2: [1.0]}}, {})
    assert result.threads("fastrnn") == 1


def made(case: Case, seconds: float, numpy: float | None = None, tile: float = 2.0) -> Result:
    """A result that ran as long in all of three rounds, on a machine of 4 GF/s and 8 GB/s."""
    times = {"fastrnn": {1: [seconds] * 3}}
    if numpy is not None:
        times["NumPy"] = {1: [numpy] * 3}
    return Result(case, times, {1: [(4.0, 8.0, tile)] * 3})


def test_part_of_the_tile_limit() -> None:
    case = Case(INFERENCE, "LSTM", 2, 32, 256)
    result = made(case, case.flops / 1e9)
    assert (result.of_peak(), result.of_tile()) == (pytest.approx(0.25), pytest.approx(0.5))
    assert made(case, 1.0, tile=0.0).of_tile() is None  # a build that does not measure it


def test_shares_of_the_limits() -> None:
    large = [Case(TRAINING, "LSTM", 2, 32, H) for H in (128, 256, 512, 1024)]
    small = Case(STEP, "GRU", 1, 1, 64)
    results = [made(case, k * case.flops / 1e9) for k, case in enumerate(large, 1)]
    results.append(made(small, 2 * small.shortest(4, 8)))
    lines = {(line["kind"], line["limit"]): line for line in shares(results)}
    assert set(lines) == {(TRAINING, "peak"), (TRAINING, "tile"), (STEP, "read limit")}
    peak, tile = lines[TRAINING, "peak"], lines[TRAINING, "tile"]
    assert (peak["cases"], peak["where"]) == (3, large[3].label)  # H = 128 is not large
    assert peak["median"] == pytest.approx(1 / 12) and peak["least"] == pytest.approx(1 / 16)
    assert tile["median"] == pytest.approx(1 / 6)
    assert lines[STEP, "read limit"]["median"] == pytest.approx(0.5)
    text = report.console_summary(results, [])
    assert "training, B ≥ 32, H ≥ 256: of the tile: median 17 % over 3, least 12 %" in text


# --- history.py -----------------------------------------------------------------------------------

ONE, TWO = Case(INFERENCE, "LSTM", 5, 1, 8), Case(INFERENCE, "GRU", 5, 1, 8)
THREE = Case(CHARACTERS, "LSTM", 5, 3, 8, I=11)


def test_history_is_of_the_same_machine_and_instruction_set(tmp_path: Path) -> None:
    path, names = tmp_path / "out" / history.FILE, [ONE.name, TWO.name]
    assert history.newest(path, "here", "avx2", names) is None
    history.append(path, [made(ONE, 4.0)], "2001-01-02 10:00 UTC", "here", "b", "avx2")
    history.append(path, [made(ONE, 5.0)], "2001-01-01 10:00 UTC", "here", "a", "avx2")
    history.append(path, [made(ONE, 6.0)], "2001-01-03 10:00 UTC", "there", "c", "avx2")
    history.append(path, [made(ONE, 7.0)], "2001-01-03 10:00 UTC", "here", "c", "avx512")
    history.append(path, [made(THREE, 8.0)], "2001-01-03 10:00 UTC", "here", "c", "avx2")
    expected = history.Run("2001-01-02 10:00 UTC", "b", {ONE.name: 4.0}, {})
    assert history.newest(path, "here", "avx2", names) == expected
    assert history.newest(path, "elsewhere", "avx2", names) is None
    lines = path.read_text().splitlines()
    assert len(lines) == 6 and lines[0] == ",".join(history.COLUMNS)
    assert lines[1].startswith(f"2001-01-02 10:00 UTC,here,b,avx2,{ONE.name},4,1,")
    assert lines[5].endswith(",,,,,")  # no part of the peak, no other library


def test_comparison_with_the_last_run(tmp_path: Path) -> None:
    path = tmp_path / history.FILE
    before = [made(ONE, 4.0, 8.0), made(TWO, 3.0), made(Case(STEP, "RNN", 1, 1, 8), 1.0)]
    history.append(path, before, "2001-01-01 10:00 UTC", "here", "abc", "avx2")
    now = [made(ONE, 1.0, 8.0), made(TWO, 12.0, 12.0), made(THREE, 1.0)]
    run = history.newest(path, "here", "avx2", [result.case.name for result in now])
    assert run is not None
    since = history.compare(run, now)
    # 4 times as fast and a quarter as fast; the ratio to NumPy rose from 2 to 8, the other is new.
    (kind,) = since["kinds"]
    assert (kind["kind"], kind["cases"]) == (INFERENCE, 2)
    assert kind["time"] == pytest.approx(1) and kind["to_numpy"] == pytest.approx(4)
    assert [(line["case"], line["time"]) for line in since["gained"]] == [(ONE.name, 4.0)]
    assert [(line["case"], line["time"]) for line in since["lost"]] == [(TWO.name, 0.25)]
    text = report.console_since(since)
    assert "2001-01-01 10:00 UTC (commit abc)" in text
    assert "inference: × 1.00 by time, × 4.00 by the ratio to NumPy, over 2" in text
    assert f"lost most: {TWO.name}: × 0.25 by time, × – by the ratio to NumPy" in text


HEADER = ",".join(history.COLUMNS) + "\n"
LINE = "2001-01-01 10:00 UTC,here,a,avx2,a case,1.5,1,2,,,,,\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "line 1: expected the columns date,machine"),
        ("a,b\n", "line 1: expected the columns date,machine"),
        (HEADER + "one,two\n", "line 2: expected 13 fields, not 2"),
        (HEADER + LINE + LINE.replace("1.5", "soon"), "line 3: .* for seconds, not 'soon'"),
        (HEADER + LINE.replace("1.5", ""), "line 2: .* for seconds, not ''"),
        (HEADER + LINE.replace(",2,", ",nan,"), "line 2: .* for gflops, not 'nan'"),
        (HEADER + LINE + LINE.rstrip(), "line 3: the line does not end"),
        (HEADER + '"open', "no table"),
        (b"\xff\xfe", "no table"),
    ],
)
def test_history_that_is_none_is_refused(tmp_path: Path, content: str | bytes, what: str) -> None:
    path = tmp_path / history.FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"history.csv.*{what}"):
        history.newest(path, "here", "avx2", ["a case"])


def test_history_without_runs(tmp_path: Path) -> None:
    path = tmp_path / history.FILE
    path.write_text(HEADER)
    assert history.newest(path, "here", "avx2", ["a case"]) is None


# The default run with two tiny cases, without the other libraries, and with these properties.
SHORTENED = """
import sys
from benchmarks import __main__ as command, cases, peers, properties
chosen = cases.quick()[:2]
cases.standard = lambda: chosen
command.STANDARD = command.QUICK
peers.MODULES = {"ours": (), "plain_numpy": ()}
def measure(sizes):
    yield properties.Property("a property", 2.0, ("≤", 1.0), "nothing")
    if "stopped" in sys.argv:
        raise KeyboardInterrupt
properties.measure = measure
name = ["--name", "slow"] if "named" in sys.argv else []
sys.exit(command.main(["--out", sys.argv[1], *name]))
"""


def test_complete_runs_have_a_history(tmp_path: Path) -> None:
    def shortened(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SHORTENED, str(tmp_path), *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    path = tmp_path / history.FILE
    done = shortened("stopped")
    assert done.returncode == 130, done.stderr
    assert not path.exists() and len(list(tmp_path.glob("*-part.md"))) == 1
    done = shortened("named")
    (page,) = tmp_path.glob("*-named-slow.md")
    assert done.returncode == 0 and not path.exists()
    assert "- conditions of this run: slow" in page.read_text()
    page.unlink()
    for lines in (3, 5):
        done = shortened()
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(path.read_text().splitlines()) == lines
        (page,) = (page for page in tmp_path.glob("*.md") if "-part" not in page.stem)
        for text in (done.stdout, page.read_text()):
            assert "Not as expected: 1 of 1 (a property)." in text
            assert ("Since the last run" in text) == (lines == 5)
    path.write_text("")
    done = shortened()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"benchmarks: {path}, line 1: expected the columns")


# --- properties.py, memory.py ---------------------------------------------------------------------


def test_a_property_holds_or_not() -> None:
    assert Property("a", 1.2, ("≤", 1.2), "").holds
    assert Property("a", 0.1, ("<", 0.1), "").holds is False
    assert Property("a", None, ("<", 0.1), "").holds is None
    assert Property("a", 1.0, None, "").holds is None
    line = Property("a", 1234.5, ("≥", 0.45), "", "MiB")
    assert (line.measured, line.expected) == ("1,234 MiB", "≥ 0.45 MiB")
    lines = [line, Property("b", 1.0, ("<", 1.0), ""), Property("c", None, ("<", 1.0), "")]
    assert report.missed(lines) == "Not as expected: 1 of 2 (b)."
    assert report.missed(lines[:1]) == ""


def test_where_there_is_one_thread_nothing_is_said_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_core, "available_threads", lambda: 1)
    for line in properties.two_threads(properties.TINY):
        assert line.value is None and "one thread" in line.how
    alone, *others = properties.idle(properties.TINY)
    assert alone.value is not None and alone.name.endswith("one thread")
    for line in others:
        assert line.value is None and "one thread" in line.how


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the largest size cannot be reset"
)
def test_memory_that_a_call_adds() -> None:
    added = memory.added(lambda: np.ones(64 << 20, np.uint8))
    assert 60 << 20 < added < 80 << 20


def test_memory_that_cannot_be_measured_says_why() -> None:
    with pytest.raises(memory.NotMeasuredError, match="KeyError: 'nothing'"):
        memory.in_a_process("nothing", 1, 1, 1)


# --- plots.py -------------------------------------------------------------------------------------


def test_pictures_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MANY", 3)
    results = [
        made(Case(kind, cell, 2, B, 256), 1.0, 2.0)
        for kind in (INFERENCE, TRAINING)
        for cell in ("LSTM", "GRU")
        for B in (1, 32)
    ]
    limits = {"gflops": {1: 4.0}, "tile_gflops": {1: 2.0}, "gbytes_per_s": {1 << 20: {1: 8.0}}}
    steps = {"T": [10, 100], "seconds_a_step": [1e-6, 1.1e-6]}
    lines = [Property("steps", 10.0, None, "by hand", "%", steps)]
    drawn = plots.draw(results, lines, ["fastrnn", "NumPy"], limits, tmp_path / "a", "below")
    # Without PyTorch and ONNX Runtime there is nothing to hold against the faster of them.
    expected = [f"a-{end}.png" for end in ("ratios", "step-h", "step-b", "roofline", "step-t")]
    assert [file for _, file in drawn] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


# --- machine.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_limits_of_the_machine(dtype: str) -> None:
    limits = _core.measure_limits(1, 1 << 16, 0.002, dtype)
    assert limits["gflops"] > 0.01 and limits["gbytes_per_s"] > 0.01
    assert _core.measure_limits(3, 0, 0.002, dtype)["gbytes_per_s"] == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((0,), "threads"),
        ((1, -1), "bytes"),
        ((1, 2**40), "bytes"),
        ((1, 0, 0.0), "seconds"),
        ((1, 0, float("nan")), "seconds"),
        ((1, 0, 0.01, "float16"), "dtype"),
    ],
)
def test_limits_refuse_what_does_not_fit(arguments: tuple[object, ...], what: str) -> None:
    with pytest.raises(ValueError, match=f"^{what}: expected"):
        _core.measure_limits(*arguments)
