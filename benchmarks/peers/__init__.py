"""The libraries that are compared, a module each; those that are not installed stay out.

A module has ``NAME``, ``VERSION``, ``THREADS`` (whether the number of threads can be chosen) and
``prepare(problem, threads)``, which returns a Job, or None for a case that the library cannot do.
Inputs and weights are handed over in the library's own format; converting them is not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.cases import Array, Problem

__all__ = ["OURS", "Job", "Peer", "installed"]

OURS = "fastrnn"
# Module → the packages it needs.
MODULES = {
    "ours": (),
    "plain_numpy": (),
    "pytorch": ("torch",),
    "onnx_runtime": ("onnx", "onnxruntime"),
    "jax_scan": ("jax",),
}


def nothing() -> None:
    """No thread count to set."""


class Job(NamedTuple):
    """A case, ready to run.

    Attributes:
        call: What is timed; what it returns stays alive no longer than a caller's result would.
        check: Runs the same once and returns its results in a fixed order, as NumPy arrays:
            inference y; training y, dx and the gradients by the weights in the problem's order; one
            step the output of the third step from the zero state; a character model its logits.
        select: Sets the number of threads; called before every turn.
    """

    call: Callable[[], Any]
    check: Callable[[], list[Array]]
    select: Callable[[], None] = nothing


class Peer(NamedTuple):
    """A library that is installed."""

    name: str
    version: str
    threads: bool
    prepare: Callable[[Problem, int], Job | None]


def installed() -> tuple[list[Peer], list[str]]:
    """All that can be imported, ours first, and the packages that the others need."""
    peers: list[Peer] = []
    missing: list[str] = []
    for name, packages in MODULES.items():
        try:
            module = importlib.import_module(f"benchmarks.peers.{name}")
        except ImportError:
            if not packages:
                raise
            missing += packages
            continue
        peers.append(Peer(module.NAME, module.VERSION, module.THREADS, module.prepare))
    return peers, missing
