"""What fastrnn runs on, for the curious and for bug reports."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from fastrnn import _core

__all__ = ["show_config"]


def show_config(mode: str = "print") -> dict[str, Any] | None:
    """Prints the configuration, or returns it as a dict with ``mode="dict"``.

    Instruction set in use and available, threads, processor, CUDA, versions, compiler.
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
        "cuda": "not in this build",
        "compiler": compiled["compiler"],
    }
    if mode == "dict":
        return config
    for name, value in config.items():
        print(f"{name:18} {', '.join(value) if isinstance(value, list) else value}")
    return None
