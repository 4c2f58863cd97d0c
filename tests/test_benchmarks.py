"""The benchmarks: the tiny run writes all its files; what the figures are made of is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastrnn import _core

from benchmarks import cases, timing
from benchmarks.__main__ import disagreement, hopeless, parse
from benchmarks.cases import INFERENCE, STEP, TRAINING, Case, Problem
from benchmarks.results import Result, summary

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
    assert len(list(tmp_path.glob("*.png"))) == 2

    data = json.loads(names[".json"].read_text())
    assert [line["name"] for line in data["results"]] == [case.name for case in cases.quick()]
    assert not any(line["failures"] for line in data["results"])
    assert {"fastrnn", "NumPy"} <= set(data["versions"])
    for line in data["results"]:
        assert line["seconds"] > 0 and line["gflops"] > 0
        assert all(ratio > 0 for ratio in line["ratios"].values())
    for key in ("date", "processor", "threads", "instruction set in use"):
        assert data["machine"][key]

    page = names[".md"].read_text()
    for text in ("FMA peak", "× NumPy", data["machine"]["date"], data["versions"]["NumPy"]):
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
    assert hopeless({**values, ("", 1): [(1.0, 1.0)]}) == {("A", 1)}


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
    result = Result(case, seconds, {1: [(1.0, 1.0)] * 3, 2: [(2.0, 1.0)] * 3})
    assert (result.threads("fastrnn"), result.threads("ONNX Runtime")) == (2, 1)
    assert result.time() == 2e-3 and result.speed_up() == 2
    assert result.ratio("PyTorch") == 4 and result.ratio("JAX") is None
    assert result.best_ratio() == 1.5
    assert result.of_peak() == pytest.approx(1e6 / (2e-3 * 2e9))
    assert result.of_read_limit() == pytest.approx((1e6 + 0.5e6 / 2) * 1e-9 / 2e-3)
    lines = {line["peer"]: line for line in summary([result], ["PyTorch", "ONNX Runtime"])}
    assert lines["PyTorch"]["geometric_mean"] == pytest.approx(4)
    assert lines["the faster of PyTorch and ONNX Runtime"]["least"] == 1.5


def test_fewest_threads_where_more_gain_nothing() -> None:
    result = Result(Case(STEP, "RNN", 1, 1, 8), {"fastrnn": {1: [1.01], 2: [1.0]}}, {})
    assert result.threads("fastrnn") == 1


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
