"""The parts of a run that pass or fail: the tests on the device and CUDA's checkers."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks import gpu_child
from benchmarks.gpu_machine import ROOT, find_tool

__all__ = ["FAIL", "NOT_MEASURED", "PASS", "Verdict", "sanitize", "test"]

PASS, FAIL, NOT_MEASURED = "pass", "fail", "not measured"

SILENT = 75.0  # seconds without a word from pytest: a test that hangs
RESTARTS = 4
OUTCOME = re.compile(r"^(\S+\.py::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
SKIPS = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.*)$", re.MULTILINE)
RUNNING = re.compile(r"^(\S+\.py::\S+)\s*$")


class Verdict(NamedTuple):
    """What became of a part."""

    status: str
    summary: str
    details: list[str]


@dataclass
class _Outcomes:
    """Of each test, over all starts of pytest."""

    by_test: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)  # of skips
    details: list[str] = field(default_factory=list)

    def read(self, output: str) -> None:
        for name, outcome in OUTCOME.findall(output):
            # A test may pass and then fail in its teardown.
            if self.by_test.get(name) not in ("FAILED", "ERROR"):
                self.by_test[name] = outcome
        for count, reason in SKIPS.findall(output):
            self.reasons[reason] = self.reasons.get(reason, 0) + int(count)
        self.details += re.findall(r"^(?:FAILED|ERROR) .*$", output, re.MULTILINE)

    def count(self, *outcomes: str) -> int:
        return sum(outcome in outcomes for outcome in self.by_test.values())


def test(
    select: str, log: Path, seconds: float, env: Mapping[str, str], *, rehearse: bool = False
) -> Verdict:
    """Runs the tests marked `cuda` whose names match ``-k select``.

    A test that hangs, or that leaves a device which nothing can use any more, is a failure; the
    tests after it run in a new process.
    """
    end = time.monotonic() + seconds
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default"]
    command += ["--durations=5", "--color=no", "--tb=short", "-k", select]
    if not rehearse:  # on the emulator they have no mark
        command += ["-m", "cuda"]
    env = {**env, "COLUMNS": "250"}  # as wide as reasons may be
    files = [str(path.relative_to(ROOT)) for path in marked]
    found, late = _Outcomes(), ""
    for _ in range(RESTARTS):
        left = end - time.monotonic()
        if left < 5:
            late = "no time was left"
            break
        skip = [f"--deselect={name}" for name in found.by_test]
        ended = gpu_child.run(
            [*command, *skip, *files], log, left, env=env, cwd=ROOT, silent=SILENT
        )
        found.read(ended.output)
        if not ended.why and ended.status in (0, 1, 5):  # 5: nothing was left to run
            break
        running = RUNNING.match(ended.last_line)
        if running:
            hung = "said nothing" in ended.why
            if ended.why and not hung:
                late = f"{ended.why}, in {running[1]}"
                break
            found.by_test[running[1]] = "FAILED"
            what = "hung" if hung else f"ended the process (status {ended.status})"
            found.details.append(f"FAILED {running[1]} - {what}")
        elif ended.status != 70:  # 70: a test has told that the device is lost
            late = ended.why or f"pytest: status {ended.status}: {ended.last_line}"
            break
    return _judge(found, late)


def _judge(found: _Outcomes, late: str) -> Verdict:
    passed, failed = found.count("PASSED", "XFAIL"), found.count("FAILED", "ERROR", "XPASS")
    skipped = found.count("SKIPPED")
    summary = f"{passed} passed, {failed} failed, {skipped} skipped" + (late and f"; {late}")
    reasons = sorted(found.reasons.items(), key=lambda item: -item[1])
    details = [*dict.fromkeys(found.details), *(f"SKIPPED {n}: {text}" for text, n in reasons[:12])]
    # There is a device: where no test could use it, something is wrong.
    if failed or late.startswith("pytest:") or not (passed or late):
        return Verdict(FAIL, summary, details[:60])
    return Verdict(NOT_MEASURED if late else PASS, summary, details[:60])


def sanitize(log: Path, seconds: float, env: Mapping[str, str]) -> Verdict:
    """Every family on small shapes under compute-sanitizer's memcheck and racecheck."""
    tool = find_tool("compute-sanitizer")
    if tool is None:
        return Verdict(NOT_MEASURED, "there is no compute-sanitizer", [])
    begin, verdicts = time.monotonic(), []
    for number, name in enumerate(("memcheck", "racecheck")):
        left = seconds - (time.monotonic() - begin)
        command = [tool, "--tool", name, "--error-exitcode", "99", "--print-limit", "20"]
        command += [sys.executable, "-m", "benchmarks.gpu_sanitize"]
        ended = gpu_child.run(command, log, left / (2 - number), env=env, cwd=ROOT)
        verdicts.append(_judge_checker(name, ended))
    statuses = [verdict.status for verdict in verdicts]
    worst = FAIL if FAIL in statuses else NOT_MEASURED if NOT_MEASURED in statuses else PASS
    return Verdict(
        worst,
        "; ".join(verdict.summary for verdict in verdicts),
        [line for verdict in verdicts for line in verdict.details],
    )


def _judge_checker(name: str, ended: gpu_child.Ended) -> Verdict:
    lines = [line.strip("= \r") for line in ended.output.splitlines()]
    done = sum(line.endswith(" ran") for line in lines)
    shown = [line for line in lines if re.search(r"SUMMARY|Invalid|Race|hazard|Error", line)][:20]
    errors = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", ended.output)
    if errors and int(errors[1]) > 0:
        return Verdict(FAIL, f"{name}: {errors[1]} errors or hazards", shown)
    if ended.why:
        last = next((line for line in reversed(lines) if line), "nothing")
        return Verdict(NOT_MEASURED, f"{name}: {ended.why}, {done} checks done", [last])
    if ended.status == 0 and errors:
        return Verdict(PASS, f"{name}: {done} checks, no errors", [])
    refused = "not supported" in ended.output.lower() or not done
    reason = next((line for line in lines if "not supported" in line.lower()), ended.last_line)
    if refused and not errors:
        return Verdict(NOT_MEASURED, f"{name} does not work here: {reason[:200]}", shown)
    return Verdict(FAIL, f"{name}: status {ended.status}: {ended.last_line[:200]}", shown)
