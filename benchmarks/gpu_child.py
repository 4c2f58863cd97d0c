"""Programs that a run starts: their output as it comes, their log, and their end, if need be."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ended", "run"]


class Ended(NamedTuple):
    """How a program ended.

    Attributes:
        status: Its exit status, negative for a signal.
        why: "" if it ended by itself, else why it was stopped.
        output: All it printed.
    """

    status: int
    why: str
    output: str

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1].strip() if lines else ""


def run(
    command: Sequence[str],
    log: Path,
    seconds: float,
    *,
    env: Mapping[str, str],
    cwd: Path,
    silent: float = 1e9,
    line: Callable[[str], None] = lambda _: None,
) -> Ended:
    """Runs a program with standard output and error in `log`, which is appended to.

    Args:
        command: The program and its arguments.
        log: Where all it prints goes.
        seconds: It is stopped, with all that it has started, when it takes longer, …
        env: Its environment.
        cwd: Its folder.
        silent: … or prints nothing for so many seconds.
        line: Called with each complete line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = heard = time.monotonic()
    why, chunks, rest, by_itself = "", [], b"", False
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    now = time.monotonic()
                    if now - begin > seconds:
                        why = f"stopped after {seconds:.0f} s"
                    elif now - heard > silent:
                        why = f"stopped, since it said nothing for {silent:.0f} s"
                    if why:
                        break
                    if not selector.select(timeout=0.2):
                        if process.poll() is None:
                            continue
                        by_itself = True  # although something that it started has its output
                        break
                    data = os.read(process.stdout.fileno(), 1 << 16)
                    if not data:
                        by_itself = True
                        break
                    heard = time.monotonic()
                    file.write(data)
                    file.flush()
                    chunks.append(data)
                    *lines, rest = (rest + data).split(b"\n")
                    for each in lines:
                        line(each.decode(errors="replace"))
        finally:
            status = _end(process, at_once=not by_itself)
            process.stdout.close()
        file.write(f"\n[status {status}{', ' + why if why else ''}]\n".encode())
    return Ended(status, why, b"".join(chunks).decode(errors="replace"))


def _end(process: subprocess.Popen[bytes], *, at_once: bool) -> int:
    """Waits for the end, or brings it about; nothing of its session is left."""
    if not at_once:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=10)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    return process.wait()
