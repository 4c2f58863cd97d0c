#!/usr/bin/env python3
"""Counts the instructions of three cases under callgrind and compares them with the record.

    python tools/instruction_counts.py            compare with tools/instruction_counts.json
    python tools/instruction_counts.py --write    record what is counted now

Times on a shared machine vary by tens of percent; the instructions that a single thread executes
hardly vary at all, so that a change which makes a kernel, the packing or a call's overhead longer
shows here. What it does not show: caches, and everything beyond AVX2 and one thread.

All cases run in one interpreter under valgrind. Before and after what is counted they call getppid,
before which callgrind writes down what it has counted since the last time (--dump-before), so that
neither the start of Python nor the building of a case counts, and no symbol of ours is needed.
valgrind knows AVX2 and not AVX-512, hence FASTRNN_ISA=avx2; it takes a helper's call for a fused
multiply-add of each lane, hence small cases.

Counts belong to a compiler, and those of short calls to a version of Python. With others than the
recorded ones the table is printed and nothing is judged. Status 1 if a count is more than 3 %
beyond what is recorded, or below it: then there is slack in which a slower change would hide.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")
TOLERANCE = 0.03
ISA = "avx2"

# --- What is counted: each case is made once and then called a number of times --------------------


def lstm_inference() -> Callable[[], object]:
    import fastrnn
    import numpy as np

    T, B, I, H = 8, 32, 128, 128
    lstm = fastrnn.LSTM(I, H, rng=1).freeze()
    x = np.random.default_rng(2).standard_normal((T, B, I), np.float32)
    return lambda: lstm(x)


def lstm_training() -> Callable[[], object]:
    import fastrnn
    import numpy as np

    T, B, I, H = 8, 16, 96, 96
    lstm = fastrnn.LSTM(I, H, rng=1)
    rng = np.random.default_rng(2)
    x = rng.standard_normal((T, B, I), np.float32)
    dy = rng.standard_normal((T, B, H), np.float32)

    def step() -> None:
        _, _, tape = lstm.forward(x)
        tape.backward(dy)

    return step


def gru_stream() -> Callable[[], object]:
    import fastrnn
    import numpy as np

    I, H = 64, 64
    stream = fastrnn.GRU(I, H, rng=1).freeze().stream()
    x = np.random.default_rng(2).standard_normal((1, I), np.float32)
    y = np.zeros((1, H), np.float32)
    return lambda: stream.step(x, y)


# Name: what makes it, and how many calls the count is the mean of.
CASES: dict[str, tuple[Callable[[], Callable[[], object]], int]] = {
    "LSTM inference, T=8 B=32 I=H=128": (lstm_inference, 1),
    "LSTM forward + backward, T=8 B=16 I=H=96": (lstm_training, 1),
    "GRU streaming step, B=1 I=H=64": (gru_stream, 100),
}


def run_cases() -> None:
    """In the process under valgrind: every case once, then counted."""
    gc.disable()
    for make, calls in CASES.values():
        call = make()
        call()
        os.getppid()
        for _ in range(calls):
            call()
        os.getppid()


# --- Counting -------------------------------------------------------------------------------------


def count() -> dict[str, int]:
    """Instructions a call, by case."""
    settings = {
        "FASTRNN_ISA": ISA,
        "FASTRNN_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--dump-before=getppid"),
            *(f"--callgrind-out-file={folder}/out", sys.executable, __file__, "--run"),
        ]
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=1200
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        # out.1 ends where the first case begins to be counted, out.2 where it ends, and so on.
        dumps = [Path(folder, f"out.{k}").read_text() for k in range(1, 2 * len(CASES) + 1)]
    totals = [re.findall(r"^totals: (\d+)$", dump, re.MULTILINE) for dump in dumps[1::2]]
    return {
        name: round(int(total) / calls)
        for (name, (_, calls)), (total,) in zip(CASES.items(), totals, strict=True)
    }


def environment() -> dict[str, str]:
    """What the counts belong to."""
    import fastrnn

    return {
        "compiler": fastrnn._core.compiled()["compiler"],
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


# --- Comparing ------------------------------------------------------------------------------------


def report(record: dict[str, Any], here: dict[str, str], counts: dict[str, int]) -> int:
    """Prints the table; 1 if counts of the same environment are not those recorded."""
    outside = []
    print(f"{'instructions a call':44} {'recorded':>12} {'now':>12}  change")
    for name, now in counts.items():
        then = record["counts"].get(name)
        if then is None:
            outside.append(name)
            print(f"{name:44} {'-':>12} {now:12,}")
            continue
        change = now / then - 1
        if abs(change) > TOLERANCE:
            outside.append(name)
        print(f"{name:44} {then:12,} {now:12,}  {change:+.1%}")
    differing = [
        f"{key} {here[key]} instead of {record.get(key)}"
        for key in here
        if here[key] != record.get(key)
    ]
    if differing:
        print(f"Not judged: {', '.join(differing)}; counts are comparable for the same only.")
        return 0
    if outside:
        print(
            f"More than {TOLERANCE:.0%} from the record: {'; '.join(outside)}. If that is meant, "
            "record it: make counts WRITE=1, and say in the commit what it buys."
        )
        return 1
    print(
        f"All within {TOLERANCE:.0%} of the record ({here['compiler']}, Python {here['python']})."
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Instruction counts of three cases.")
    parser.add_argument("--write", action="store_true", help="record the counts")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        run_cases()
        return 0
    import fastrnn

    if ISA not in fastrnn._core.isas():
        print(f"Not counted: this machine has no {ISA}, which the record is of.")
        return 0
    if shutil.which("valgrind") is None:
        print("valgrind is missing: sudo apt install valgrind", file=sys.stderr)
        return 1
    here, counts = environment(), count()
    if options.write:
        RECORD.write_text(json.dumps({**here, "counts": counts}, indent=2) + "\n")
        print(f"Recorded in {RECORD.name}:")
    return report(json.loads(RECORD.read_text()), here, counts)


if __name__ == "__main__":
    sys.exit(main())
