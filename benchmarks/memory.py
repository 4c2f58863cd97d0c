"""Memory that a call adds, measured in a process of its own: ``python -m benchmarks.memory``.

A process that measured other things before would use their freed memory again. The weights, the
input and the output's gradient are there before; so is what a first short call leaves behind, such
as threads.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["NotMeasuredError", "in_a_process", "main"]

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")
SHORT = 2  # steps of the first call


class NotMeasuredError(Exception):
    """The process ended without a result; what it said last."""


def in_a_process(what: str, T: int, B: int, H: int, every: int = 0) -> int:
    """Bytes: `what` is a key of CALLS; `every` is for its checkpoints."""
    command = [sys.executable, "-m", "benchmarks.memory", what, *map(str, (T, B, H, every))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise NotMeasuredError("no result after two minutes") from error
    if done.returncode:
        raise NotMeasuredError((done.stderr.strip() or "nothing said").splitlines()[-1])
    return int(done.stdout.split()[-1])


def training(T: int, B: int, H: int, every: int) -> Callable[[int], Any]:
    """Forward and backward, with checkpoints every so many steps unless 0."""
    import fastrnn

    layer = fastrnn.LSTM(H, H)
    x, dy = arrays(T, B, H)

    def call(steps: int) -> Any:
        y, _, tape = layer.forward(x[:steps], checkpoint_every=every or None)
        return y, tape.backward(dy[:steps])

    return call


def pytorch(T: int, B: int, H: int, every: int) -> Callable[[int], Any]:
    """The same in PyTorch, which has no checkpoints."""
    import torch

    layer = torch.nn.LSTM(H, H)
    x, dy = (torch.from_numpy(array) for array in arrays(T, B, H))
    x.requires_grad_()

    def call(steps: int) -> Any:
        part = x[:steps]
        y = layer(part)[0]
        return y, torch.autograd.grad(y, [part, *layer.parameters()], dy[:steps])

    return call


def inference(T: int, B: int, H: int, every: int) -> Callable[[int], Any]:
    """A frozen layer's call."""
    import fastrnn

    frozen = fastrnn.LSTM(H, H).freeze()
    x, _ = arrays(T, B, H)
    return lambda steps: frozen(x[:steps])


CALLS = {"training": training, "pytorch": pytorch, "inference": inference}


def arrays(T: int, B: int, H: int) -> list[Any]:
    """Input and output gradient, both written to, so that they take memory."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((T, B, H), np.float32) for _ in range(2)]


def added(call: Callable[[], Any]) -> int:
    """Bytes by which the process grows, at most, from before the call to its end."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is the size now
    except OSError:
        pass  # no Linux, or not allowed: the size now may then be less, and the growth too small
    before = _largest()
    result = call()
    after = _largest()
    del result
    return after - before


def _largest() -> int:
    """Bytes of the process at its largest."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest << 10


def main(arguments: list[str]) -> int:
    """Prints the bytes."""
    what, T, B, H, every = arguments[0], *map(int, arguments[1:])
    call = CALLS[what](T, B, H, every)
    call(min(T, SHORT))
    print(added(lambda: call(T)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
