"""What runs and reports on a GPU, as far as that can be seen without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    gpu,
    gpu_build,
    gpu_cases,
    gpu_checks,
    gpu_child,
    gpu_machine,
    gpu_report,
)
from benchmarks.cases import INFERENCE, TRAINING, Case
from benchmarks.gpu_checks import FAIL, NOT_MEASURED, PASS
from benchmarks.gpu_machine import ROOT, NoDeviceError

ENV = dict(os.environ)


def has_device() -> bool:
    try:
        gpu_machine.card()
    except NoDeviceError:
        return False
    return True


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**ENV, "PYTHON": sys.executable}
    return subprocess.run(
        [ROOT / "benchmarks/gpu.sh", *arguments], env=env, capture_output=True, text=True
    )


@pytest.mark.skipif(has_device(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_status_2(tmp_path: Path) -> None:
    done = start("--out", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("benchmarks/gpu.sh: needs an NVIDIA GPU: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("torch") is None, reason="the peer is PyTorch")
@pytest.mark.skipif(find_spec("fastrnn._cuda_emulated") is None, reason="a build without emulator")
def test_a_rehearsal_writes_page_and_data(tmp_path: Path) -> None:
    done = start("--rehearse", "--only", "build,benchmark", "--filter", "GRU", "--out", tmp_path)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(files) == {".json", ".md"}
    assert all(path.name.endswith(f"-emulator-rehearsal-part{end}") for end, path in files.items())
    data = json.loads(files[".json"].read_text())
    assert [part["status"] for part in data["parts"].values()] == [PASS, PASS]
    assert [result["kind"] for result in data["results"]] == [INFERENCE, TRAINING]
    for result in data["results"]:
        assert not result["failures"] and result["family"] == "step" and result["ratio"] > 0
        assert 0 <= result["difference"]["norm"] < 1e-5
        assert len(result["seconds"]["fastrnn"]) == len(result["seconds"]["PyTorch"]) == 2
    page = files[".md"].read_text()
    assert "no figure here means anything" in page and "| GRU T=3 B=2 H=16 I=4 | step |" in page


@pytest.mark.parametrize(
    "arguments", [["--only", "tests,lunch"], ["--filter", "["], ["--seconds", "soon"]]
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu.parse(arguments)
    assert error.value.code == 2


def test_parts_keep_their_order_and_leave_time_to_each_other() -> None:
    arguments = gpu.parse(["--only", "benchmark,tests", "--seconds", "300"])
    assert arguments.only == ["tests", "benchmark"]
    run = gpu.Run(arguments, None)
    tests, benchmark = run.limit("tests"), run.limit("benchmark")
    assert tests == pytest.approx(170, abs=2) and benchmark == pytest.approx(292, abs=2)
    run.begin -= 150  # what the tests have taken
    assert run.limit("tests") == 10 + 12 or run.limit("tests") == pytest.approx(22, abs=2)
    assert run.limit("benchmark") == pytest.approx(142, abs=2)


# --- Cases ----------------------------------------------------------------------------------------


def test_the_cases_are_those_that_were_promised() -> None:
    timed = gpu_cases.cases()
    names = [(group, case.name) for group, case in timed]
    assert len(set(names)) == len(names)
    assert timed[0].case == Case(INFERENCE, "LSTM", 1024, 16, 768, dtype="bfloat16")
    found = {(c.kind, c.cell, c.H, c.B, c.dtype) for _, c in timed if c.plain and c.I == 0}
    for kind in (INFERENCE, TRAINING):
        for cell in ("LSTM", "GRU"):
            for H in (128, 256, 512, 1024, 2048):
                for B in (1, 8, 32, 128):
                    for precision in gpu_cases.TOLERANCE:
                        assert (kind, cell, H, B, precision) in found
    assert any(case.ragged for _, case in timed) and any(case.bidirectional for _, case in timed)
    grids = {group for group, case in timed if case.H == 2048}
    assert all(gpu_cases.AIMS[group] == (1.5, 1.0) for group in grids)
    assert all(len(gpu_cases.cases(**few)) < 15 for few in ({"quick": True}, {"rehearse": True}))  # type: ignore[arg-type]


# --- What pytest and the checkers say -------------------------------------------------------------

SAID = """\
tests/test_a.py::test_one[x-1] PASSED                                    [ 20%]
tests/test_a.py::test_two SKIPPED (no such family: ...)                  [ 40%]
tests/test_a.py::test_three FAILED                                       [ 60%]
tests/test_a.py::test_four PASSED                                        [ 80%]
tests/test_a.py::test_four ERROR                                         [ 80%]
SKIPPED [1] tests/test_a.py:12: no such family: 'grid' (it is not there)
FAILED tests/test_a.py::test_three - AssertionError: 1 != 2
ERROR tests/test_a.py::test_four - RuntimeError: afterwards
"""


def ended(output: str, status: int = 0, why: str = "") -> gpu_child.Ended:
    return gpu_child.Ended(status, why, output)


def test_outcomes_are_counted() -> None:
    found = gpu_checks._Outcomes()
    found.read(SAID)
    verdict = gpu_checks._judge(found, "")
    assert verdict.status == FAIL and verdict.summary == "1 passed, 2 failed, 1 skipped"
    assert verdict.details[0] == "FAILED tests/test_a.py::test_three - AssertionError: 1 != 2"
    assert verdict.details[2] == "SKIPPED 1: no such family: 'grid' (it is not there)"


def test_with_a_gpu_something_must_pass() -> None:
    found = gpu_checks._Outcomes()
    assert gpu_checks._judge(found, "no time was left").status == NOT_MEASURED
    assert gpu_checks._judge(found, "").status == FAIL
    found.read("tests/test_a.py::test_two SKIPPED (no device) [100%]\n")
    assert gpu_checks._judge(found, "").status == FAIL
    found.read("tests/test_a.py::test_one PASSED [100%]\n")
    assert gpu_checks._judge(found, "").status == PASS
    assert gpu_checks._judge(found, "no time was left").status == NOT_MEASURED
    assert gpu_checks._judge(found, "pytest: status 3: internal error").status == FAIL


def test_a_test_that_ends_the_process_fails_and_the_rest_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pytest is played: it ends in a test, tells of a lost device, hangs, and gets through."""
    first = "tests/test_a.py::test_one "
    plays = [
        ended(f"tests/test_a.py::test_nil PASSED [ 1%]\n{first}", -11),
        ended("tests/test_a.py::test_two FAILED [ 2%]\n!!! the device was lost !!!\n", 70),
        ended("tests/test_a.py::test_three ", -9, "stopped, since it said nothing for 75 s"),
        ended("tests/test_a.py::test_four PASSED [ 9%]\n"),
    ]
    commands: list[list[str]] = []

    def play(command: list[str], *_: Any, **__: Any) -> gpu_child.Ended:
        commands.append(command)
        return plays[len(commands) - 1]

    monkeypatch.setattr(gpu_child, "run", play)
    verdict = gpu_checks.test("all", tmp_path / "log", 100, ENV)
    assert verdict.status == FAIL and verdict.summary == "2 passed, 3 failed, 0 skipped"
    assert "FAILED tests/test_a.py::test_one - ended the process (status -11)" in verdict.details
    assert "FAILED tests/test_a.py::test_three - hung" in verdict.details
    assert f"--deselect={first.strip()}" in commands[1]
    assert "--deselect=tests/test_a.py::test_three" in commands[3]


@pytest.mark.parametrize(
    ("output", "status", "why", "expected"),
    [
        ("step LSTM: ran\n========= ERROR SUMMARY: 0 errors\n", 0, "", PASS),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 2 errors\n", 99, "", FAIL),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", 99, "", FAIL),
        ("========= Error: Device not supported\n", 1, "", NOT_MEASURED),
        ("step LSTM: ran\ngrid LSTM: ", -9, "stopped after 30 s", NOT_MEASURED),
        ("step LSTM: ran\nresults that are not finite\n========= ERROR SUMMARY: 0 errors\n",
         1, "", FAIL),
    ],
)  # fmt: skip
def test_what_a_checker_says(output: str, status: int, why: str, expected: str) -> None:
    assert gpu_checks._judge_checker("memcheck", ended(output, status, why)).status == expected


# --- Programs -------------------------------------------------------------------------------------


def test_a_program_is_heard_while_it_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import sys; print('one'); print('two', file=sys.stderr); print('three', end='')"
    done = gpu_child.run(
        [sys.executable, "-u", "-c", code],
        tmp_path / "log",
        60,
        env=ENV,
        cwd=tmp_path,
        line=lines.append,
    )
    assert (done.status, done.why, done.last_line) == (0, "", "three")
    assert lines == ["one", "two"]
    assert "one\ntwo\nthree" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("seconds", "silent"), [(1.0, 60.0), (60.0, 1.0)])
def test_a_program_that_hangs_is_stopped_with_its_children(
    tmp_path: Path, seconds: float, silent: float
) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    begin = time.monotonic()
    done = gpu_child.run(
        [sys.executable, "-c", code],
        tmp_path / "log",
        seconds,
        env=ENV,
        cwd=tmp_path,
        silent=silent,
    )
    assert time.monotonic() - begin < 20
    assert done.status < 0 and done.why.startswith("stopped")
    child = Path(f"/proc/{done.output.strip()}/stat")
    for _ in range(50):  # a zombie, until somebody asks for its status, counts as gone
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child is still there")


# --- The benchmark's program, its data and the page -----------------------------------------------


def result(ratio: float) -> dict[str, Any]:
    case = Case(TRAINING, "LSTM", 100, 8, 256, dtype="bfloat16")
    return {
        "group": "LSTM, bfloat16 and float16",
        "name": case.name,
        "kind": case.kind,
        "T": case.T,
        "family": "cluster",
        "flops": case.flops,
        "seconds": {"fastrnn": [1e-3, 1e-3, 2e-3], "PyTorch": [ratio * 1e-3] * 3},
        "ratio": ratio,
        "difference": {"norm": 0.004, "of": "dx"},
        "failures": [],
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    return gpu.Run(gpu.parse(["--rehearse", "--out", str(tmp_path)]), None)


def test_what_the_timing_program_says_is_kept(run: gpu.Run) -> None:
    times = gpu.Times(run)
    for line in (
        {"versions": {"PyTorch": "9"}, "limits": {}},
        {"begin": "a", "number": 0},
        {"result": result(2.0), "number": 0},
        {"begin": "b", "number": 1},
    ):
        times.line(json.dumps(line))
    times.line("Warning: something else")
    times.line("{broken")
    saved = json.loads(run.files[1].read_text())  # after each case
    assert [each["ratio"] for each in saved["results"]] == [2.0]
    times.broken("ended with status -11")
    assert times.next == 2 and run.data["left_out"] == ["b: ended with status -11"]
    assert times.verdict("ended with status -11").status == FAIL
    assert times.verdict("").status == PASS
    times.line(json.dumps({"unusable": "PyTorch has no CUDA device"}))
    assert times.verdict("")[:2] == (NOT_MEASURED, "PyTorch has no CUDA device")


def test_a_part_that_raises_fails_and_is_written(run: gpu.Run) -> None:
    def broken(_seconds: float, _log: Path) -> Any:
        entry = json.loads(run.files[1].read_text())["parts"]["tests"]
        assert entry["status"] == "interrupted"  # what remains should the run be killed now
        raise OSError("no space")

    run.part("tests", broken)
    entry = json.loads(run.files[1].read_text())["parts"]["tests"]
    assert (entry["status"], entry["summary"]) == (FAIL, "OSError: no space")


def test_a_build_that_fails_leaves_the_rest_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = gpu_machine.Card("NVIDIA H200", (9, 0), 132, 143771 << 20)
    monkeypatch.setattr(gpu_machine, "card", lambda: card)
    monkeypatch.setattr(gpu_build, "find_tool", lambda _: None)
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.main(["--quick", "--commit", "abc", "--out", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("gpu-*-nvidia-h200-quick.json")
    data = json.loads(file.read_text())
    statuses = {name: part["status"] for name, part in data["parts"].items()}
    assert statuses == dict.fromkeys(gpu.PARTS, NOT_MEASURED) | {"build": FAIL}
    assert "no nvcc" in data["parts"]["build"]["summary"]
    assert data["machine"]["commit"] == "abc"
    assert data["machine"]["card"].startswith("NVIDIA H200, compute capability 9.0, 132 ")
    assert "build      fail" in capsys.readouterr().out


def test_the_build_is_for_the_card_and_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CMake and pip are played: no package is asked for where none is missing."""
    commands: list[list[str]] = []

    def play(command: list[str], *_: Any, **__: Any) -> gpu_child.Ended:
        commands.append(command)
        return ended("/pybind11\n")

    monkeypatch.setattr(gpu_child, "run", play)
    monkeypatch.setattr(gpu_build, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_build, "find_tool", lambda name: f"/cuda/bin/{name}")
    monkeypatch.setattr(gpu_build, "missing", list)
    monkeypatch.setattr(gpu_build, "_cmake", lambda: "/bin/cmake")
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    (tmp_path / "python/fastrnn").mkdir(parents=True)
    (tmp_path / "python/fastrnn/__init__.py").touch()
    for capability, target in (((9, 0), "90a-real"), ((8, 9), "89-real"), ((12, 0), "120-real")):
        commands.clear()
        card = gpu_machine.Card("a card", capability, 100, 1 << 34)
        assert target in gpu_build.build(card, tmp_path / "log", 60)
        assert f"-DFASTRNN_CUDA_ARCHITECTURES={target}" in commands[1]
        assert "-Dpybind11_DIR=/pybind11" in commands[1]
        assert not any("pip" in command for command in commands)
    assert (tmp_path / "site/fastrnn/__init__.py").exists()
    monkeypatch.setattr(gpu_build, "missing", lambda: ["hypothesis"])
    monkeypatch.setattr(gpu_child, "run", lambda *_, **__: ended("no network", 1))
    with pytest.raises(RuntimeError, match="not to be had from the network: hypothesis"):
        gpu_build.build(card, tmp_path / "log", 60)


def test_summary_and_page(run: gpu.Run) -> None:
    gpu_cases.cases()  # which makes the aims
    broken = result(1.0) | {"seconds": {}, "ratio": None, "difference": None}
    broken["failures"] = ["y differs | a lot"]
    run.data["results"] = [result(4.0), result(1.0), broken]
    run.data["parts"]["tests"] = {
        "status": FAIL, "seconds": 12.0, "summary": "1 failed", "details": ["FAILED it"]
    }  # fmt: skip
    run.data["left_out"] = ["GRU"]
    (line,) = gpu_report.summary(run.data["results"])
    assert line["cases"] == 2 and line["geometric_mean"] == pytest.approx(2.0)
    assert line["least"] == 1.0 and line["aim"] == (1.5, 1.0)
    page = gpu_report.markdown(run.data)
    for text in (
        "| LSTM, bfloat16 and float16, training | 2 | 2.00 | 1.00 (LSTM T=100",
        "| 1.5 and 1.0: reached |",
        "| cluster | 1 ms | 10 µs |",
        "y differs | a lot",
        "FAILED it",
        "- GRU",
    ):
        assert text in page, page
    assert "left out for lack of time: 1" in gpu_report.console(run.data)


def test_a_card_in_a_file_name() -> None:
    assert gpu_machine.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu_machine.slug("NVIDIA GeForce RTX 4090 (24 GB)") == "nvidia-geforce-rtx-4090-24-gb"
