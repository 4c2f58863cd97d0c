"""What fastrnn runs on, for the curious and for bug reports."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastrnn import _check, _core, _device
from fastrnn._cells import PRECISIONS

__all__ = ["show_config"]

_CELLS = {"rnn": "rnn_tanh", "lstm": "lstm", "gru": "gru_after"}


def show_config(
    mode: str = "print", *, plan: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Prints the configuration, or returns it as a dict with ``mode="dict"``.

    Instruction set in use and available, threads, processor, CUDA, versions, compiler.

    Args:
        mode: ``"print"`` or ``"dict"``.
        plan: A layer: ``cell`` (``"rnn"``, ``"lstm"``, ``"gru"``), ``hidden_size``, ``batch_size``,
            and, where they are not 1 direction and ``"float32"``, ``bidirectional`` and
            ``precision``. Which kernels of the CUDA device would run it and why is added as
            ``"plan"``.

    Raises:
        RuntimeError: ``plan`` is given and there is no CUDA device.
        TypeError, ValueError: An argument is of the wrong type, or unknown.
    """
    if mode not in ("print", "dict"):
        raise ValueError(f"mode: expected 'print' or 'dict', got {mode!r}")
    compiled = _core.compiled()
    config = {
        "fastrnn": compiled["version"],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _core.cpu(),
        "isa": _core.isa(),
        "isas": _core.isas(),
        "threads": _core.get_num_threads(),
        "available_threads": _core.available_threads(),
        "cuda": _device.status(),
        "compiler": compiled["compiler"],
    }
    if plan is not None:
        config["plan"] = _plan(**plan)
    if mode == "dict":
        return config
    for name, value in config.items():
        print(f"{name:18} {', '.join(value) if isinstance(value, list) else value}")
    return None


def _plan(
    cell: str,
    hidden_size: int,
    batch_size: int,
    bidirectional: bool = False,
    precision: str = "float32",
) -> str:
    """The kernels that would run a layer on the device, and why."""
    chosen = _device.kernels("cuda").plan(
        _CELLS[_check.choice("plan['cell']", cell, tuple(_CELLS))],
        _check.size("plan['hidden_size']", hidden_size),
        _check.size("plan['batch_size']", batch_size),
        2 if _check.flag("plan['bidirectional']", bidirectional) else 1,
        _check.choice("plan['precision']", precision, (*PRECISIONS, "float64")),
    )
    reason = chosen["reason"]
    return f"{chosen['family']} ({reason})" if reason else str(chosen["family"])
