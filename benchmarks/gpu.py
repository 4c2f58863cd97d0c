"""The command behind gpu.sh: runs the parts, one after the other, and keeps what they found.

    python -m benchmarks.gpu [--quick] [--out DIR] [--only PART,...] [--filter REGEX] [--seconds N]

Parts: build, tests, sanitizer, hostile, benchmark. Each runs in programs of its own, so that one
that hangs or dies takes nothing along, and after each (in the benchmark after each case) the files
are written anew: what was found survives a run that is killed. Logs are in build/gpu/logs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import gpu_build, gpu_child, gpu_machine, gpu_report
from benchmarks.gpu_checks import FAIL, NOT_MEASURED, PASS, Verdict, sanitize, test
from benchmarks.gpu_machine import ROOT, Card, NoDeviceError

RESULTS = Path(__file__).parent / "results"
LOGS = gpu_build.BUILD / "logs"

# Part → (seconds that it may take at most, seconds that parts before it must leave to it).
PARTS: dict[str, tuple[float, float]] = {
    "build": (420, 0),
    "tests": (170, 60),
    "sanitizer": (70, 20),
    "hostile": (90, 30),
    "benchmark": (1e9, 120),
}
SECONDS, QUICK_SECONDS = 570.0, 240.0
RESERVE = 8.0  # seconds, for writing
HOSTILE = "case_6"  # in the names of tests: the hostile cases 63 to 67
REHEARSED = "bits_of_the_cpu and lstm and float32 and plain"
CASE_SILENT = 60.0  # seconds for one case, after which it hangs
RESTARTS = 8


class Run:
    """One run: its options, its clock, its data and its files."""

    def __init__(self, arguments: argparse.Namespace, card: Card | None) -> None:
        self.arguments, self.card = arguments, card
        self.begin = time.monotonic()
        self.mode = "rehearsal" if card is None else "quick" if arguments.quick else "full"
        self.env = gpu_build.environment(arguments.installed or card is None, card is None)
        machine = gpu_machine.describe(card, arguments.commit)
        self.data: dict[str, Any] = {
            "format": 1,
            "mode": self.mode,
            "machine": machine,
            "versions": {},
            "load": {},
            "limits": {},
            "parts": {},
            "results": [],
            "left_out": [],
            "summary": [],
        }
        some = arguments.only != list(PARTS) or bool(arguments.filter)
        name = f"gpu-{machine['date'][:10]}-{gpu_machine.slug(card.name if card else 'emulator')}"
        # Only a whole run gets the plain name, and nothing less ever replaces it.
        less = [self.mode] * (self.mode != "full") + ["part"] * some
        self.stem = arguments.out / "-".join([name, *less])

    @property
    def files(self) -> list[Path]:
        return [self.stem.with_name(self.stem.name + end) for end in (".md", ".json")]

    def write(self) -> None:
        self.data["summary"] = gpu_report.summary(self.data["results"])
        page, data = self.files
        page.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (data, json.dumps(self.data, indent=1, ensure_ascii=False) + "\n"),
            (page, gpu_report.markdown(self.data)),
        ):
            draft = path.with_name(path.name + ".new")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)

    def limit(self, part: str) -> float:
        """Seconds for a part, so that those after it have their least."""
        names = self.arguments.only
        later = sum(PARTS[name][1] for name in names[names.index(part) + 1 :])
        left = float(self.arguments.seconds) - (time.monotonic() - self.begin) - RESERVE
        most = PARTS[part][0] * (0.5 if self.arguments.quick and part != "build" else 1)
        return max(10.0, min(most, left - later))

    def part(self, name: str, work: Callable[[float, Path], Verdict]) -> None:
        """Runs a part, whatever becomes of it."""
        seconds = self.limit(name)
        print(f"== {name} (at most {seconds:.0f} s)", flush=True)
        # What stands there should the run be killed meanwhile.
        entry = {"status": "interrupted", "seconds": 0.0, "summary": "", "details": []}
        self.data["parts"][name] = entry
        self.write()
        log = LOGS / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        begin = time.monotonic()
        try:
            verdict = work(seconds, log)
        except Exception as error:
            verdict = Verdict(FAIL, f"{type(error).__name__}: {error}", [])
        entry["status"], entry["summary"], entry["details"] = verdict
        entry["seconds"] = time.monotonic() - begin
        self.write()
        print(f"   {verdict.status}: {verdict.summary}", flush=True)

    # --- The parts -------------------------------------------------------------------------------

    def build(self, seconds: float, log: Path) -> Verdict:
        if self.card is None or self.arguments.installed:
            return Verdict(PASS, "not built: the fastrnn that python3 imports", [])
        try:
            built = gpu_build.build(self.card, log, seconds)
        except RuntimeError as error:
            tail = log.read_text(errors="replace").splitlines()[-40:]
            return Verdict(FAIL, str(error), tail)
        return Verdict(PASS, built, [])

    def tests(self, seconds: float, log: Path) -> Verdict:
        select = REHEARSED if self.card is None else f"not {HOSTILE}"
        return test(select, log, seconds, self.env, rehearse=self.card is None)

    def hostile(self, seconds: float, log: Path) -> Verdict:
        select = f"{HOSTILE}3" if self.card is None else HOSTILE
        return test(select, log, seconds, self.env, rehearse=self.card is None)

    def sanitizer(self, seconds: float, log: Path) -> Verdict:
        if self.card is None:
            command = [sys.executable, "-m", "benchmarks.gpu_sanitize"]
            ended = gpu_child.run(command, log, seconds, env=self.env, cwd=ROOT)
            status = NOT_MEASURED if ended.status == 0 else FAIL
            return Verdict(status, f"without a checker: {ended.last_line}", [])
        return sanitize(log, seconds, self.env)

    def benchmark(self, seconds: float, log: Path) -> Verdict:
        self.data["load"]["before"] = gpu_machine.load()
        end = time.monotonic() + seconds
        child = Times(self)
        trouble = ""
        for _ in range(RESTARTS):
            left = end - time.monotonic()
            if child.next is None or left < 15:
                break
            command = [sys.executable, "-m", "benchmarks.gpu_times", f"--first={child.next}"]
            command += [f"--seconds={left - 10:.0f}", f"--filter={self.arguments.filter}"]
            command += ["--quick"] * self.arguments.quick + ["--rehearse"] * (self.card is None)
            child.next = None  # unless it says that it has begun a case
            ended = gpu_child.run(
                command, log, left, env=self.env, cwd=ROOT, silent=CASE_SILENT, line=child.line
            )
            if not ended.why and ended.status == 0:
                break
            if ended.why.startswith("stopped after"):
                child.broken("no time was left")
                break
            trouble = ended.why or f"ended with status {ended.status}: {ended.last_line[:200]}"
            child.broken(trouble)
        self.data["load"]["after"] = gpu_machine.load()
        self.data["load"] = {key: value for key, value in self.data["load"].items() if value}
        return child.verdict(trouble)


class Times:
    """What gpu_times.py says, as it comes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.next: int | None = 0  # the case to go on with; None: none was begun
        self.begun: str | None = None
        self.unusable = ""

    def line(self, text: str) -> None:
        if not text.startswith("{"):
            return
        try:
            said = json.loads(text)
        except ValueError:
            return
        data = self.run.data
        if "versions" in said:
            data["versions"] |= said["versions"]
            data["limits"] = said["limits"] or data["limits"]
        elif "begin" in said:
            self.begun, self.next = said["begin"], said["number"] + 1
        elif "result" in said:
            self.begun = None
            data["results"].append(said["result"])
            print(f"   {gpu_report.result_line(said['result'])}", flush=True)
            self.run.write()
        elif "left_out" in said:
            data["left_out"].append(said["left_out"])
        elif "unusable" in said:
            self.unusable = said["unusable"]

    def broken(self, why: str) -> None:
        """The program ended in the case that it had begun, if any."""
        if self.begun is not None:
            self.run.data["left_out"].append(f"{self.begun}: {why}")
            self.begun = None

    def verdict(self, trouble: str) -> Verdict:
        results, left = self.run.data["results"], len(self.run.data["left_out"])
        failed = [f"{r['name']}: {f}" for r in results for f in r["failures"]]
        text = f"{len(results)} cases" + (f", {left} left out" if left else "")
        if self.unusable:
            return Verdict(NOT_MEASURED, self.unusable, [])
        if "No module named 'torch'" in trouble:
            return Verdict(NOT_MEASURED, "PyTorch is not installed", [])
        if failed or trouble:
            return Verdict(FAIL, f"{text}, {len(failed)} failed; {trouble}".rstrip("; "), failed)
        return Verdict(PASS if results else NOT_MEASURED, text, [])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def parts(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in PARTS]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {unknown}")
        return [name for name in PARTS if name in names]

    def pattern(text: str) -> str:
        try:
            re.compile(text)
        except re.error as error:
            raise argparse.ArgumentTypeError(f"no regular expression: {error}") from None
        return text

    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Builds, tests and measures fastrnn's CUDA path on the GPU that is there.",
        epilog="status: 0; 1 if a part failed; 2 without a GPU. Logs: build/gpu/logs.",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, four minutes at most")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results"
    )
    parser.add_argument(
        "--only",
        type=parts,
        default=list(PARTS),
        metavar="PART,...",
        help=f"some of {','.join(PARTS)}; without build, what was built before",
    )
    parser.add_argument(
        "--filter", type=pattern, default="", metavar="REGEX", help="of the benchmark's cases"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help=f"for all; default {SECONDS:.0f}, or 240"
    )
    parser.add_argument("--commit", default="", metavar="TEXT", help="where there is no git")
    parser.add_argument(
        "--installed", action="store_true", help="build nothing: the fastrnn that python3 imports"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU: a little of every part, on the emulator of the installed fastrnn",
    )
    arguments = parser.parse_args(argv)
    if arguments.seconds is None:
        arguments.seconds = QUICK_SECONDS if arguments.quick else SECONDS
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 if a part failed, 2 without a GPU."""
    arguments = parse(argv)
    card = None
    if not arguments.rehearse:
        try:
            card = gpu_machine.card()
        except NoDeviceError as error:
            print(f"benchmarks/gpu.sh: needs an NVIDIA GPU: {error}", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, _stop)
    run = Run(arguments, card)
    for key, value in run.data["machine"].items():
        print(f"{key}: {value}", flush=True)
    try:
        for name in arguments.only:
            run.part(name, getattr(run, name))
            if name == "build" and run.data["parts"][name]["status"] == FAIL:
                for other in arguments.only[1:]:
                    run.part(other, _without_build)
                break
    except KeyboardInterrupt:
        print("stopped; what was found so far is written", file=sys.stderr)
    finally:
        run.write()
    print(f"\n{gpu_report.console(run.data)}\n")
    took = time.monotonic() - run.begin
    print(f"{took:.0f} s; wrote {', '.join(map(os.path.relpath, map(str, run.files)))}")
    statuses = [part["status"] for part in run.data["parts"].values()]
    return 1 if FAIL in statuses or "interrupted" in statuses else 0


def _without_build(_seconds: float, _log: Path) -> Verdict:
    return Verdict(NOT_MEASURED, "there is no build", [])


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
