"""On what the figures were measured: machine, software, and the machine's own limits."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fastrnn
from fastrnn import _core

__all__ = ["describe", "limits_table", "measure_limits", "slug"]

WORKING_SETS = (16 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
SAMPLE = 2e-3  # seconds


def describe() -> dict[str, Any]:
    """What a reader needs to know to compare the figures with another machine's."""
    config = fastrnn.show_config("dict") or {}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": config["cpu"],
        "threads": _core.available_threads(),
        "caches": _caches(),
        "memory": _memory(),
        "system": _system(),
        "instruction set in use": config["isa"],
        "Python": platform.python_version(),
        "compiler": config["compiler"],
        "commit": _commit(),
        "load average before": round(os.getloadavg()[0], 2),
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine in a file name: intel-xeon-processor-2-threads."""
    name = machine["processor"].partition(" (sse")[0].replace("(R)", "").replace("(TM)", "")
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{name}-{machine['threads']}-threads"


def measure_limits(
    threads: int, working_set: int, seconds: float, dtype: str = "float32"
) -> tuple[float, float, float]:
    """(GF/s, GB/s, tile GF/s) on `threads`: what the machine can do at most.

    They are the FMA peak, the read bandwidth of `working_set` bytes, and the rate of our tile of a
    matrix product on operands in the first-level cache (0 from a build that does not measure it).
    The median of short measurements, as the times of calls are: an interruption hits both alike.
    """
    fastrnn.set_num_threads(threads)
    number = max(1, round(seconds / SAMPLE))
    samples = [
        _core.measure_limits(threads, working_set, seconds / number, dtype) for _ in range(number)
    ]
    return (
        statistics.median(sample["gflops"] for sample in samples),
        statistics.median(sample["gbytes_per_s"] for sample in samples),
        statistics.median(sample.get("tile_gflops", 0.0) for sample in samples),
    )


def limits_table(threads: list[int], seconds: float) -> dict[str, Any]:
    """The limits for the report, all for each number of threads.

    {"gflops": {threads: …}, "tile_gflops": {threads: …}, "gbytes_per_s": {bytes: {threads: …}}}.
    The best of three, since a limit that a neighbour pushed down is none.
    """

    def best(count: int, size: int) -> tuple[float, float, float]:
        tries = [measure_limits(count, size, seconds) for _ in range(3)]
        gflops, gbytes, tile = (max(values) for values in zip(*tries, strict=True))
        return gflops, gbytes, tile

    arithmetic = {count: best(count, 0) for count in threads}
    return {
        "gflops": {count: values[0] for count, values in arithmetic.items()},
        "tile_gflops": {count: values[2] for count, values in arithmetic.items()},
        "gbytes_per_s": {
            size: {count: best(count, size)[1] for count in threads} for size in WORKING_SETS
        },
    }


def _caches() -> str:
    """On Linux L1d 48K, L2 2048K, L3 266240K: of one core, what it shares with others included."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found) or "unknown"


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return "unknown"
    return f"{pages * size / 2**30:.0f} GiB"


def _system() -> str:
    """Distribution and kernel: Debian GNU/Linux 12 (bookworm), Linux 6.1.0."""
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def _commit() -> str:
    """The checkout's commit, marked where files differ from it; "" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
