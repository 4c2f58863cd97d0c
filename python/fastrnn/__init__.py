"""fastrnn: recurrent networks on NumPy arrays, at the machine's limit, without a framework.

    lstm = fastrnn.LSTM(64, 256)
    y, (h, c) = lstm(x)                       # inference, x (T, B, 64)
    y, (h, c), tape = lstm.forward(x)         # training
    grads = tape.backward(dy)                 # exact back-propagation through time
    lstm.to("cuda")                           # the same on an NVIDIA GPU

Names, shapes and semantics are PyTorch's: ``x`` (T, B, I), states (L·D, B, H), gates i, f, g, o and
r, z, n. T steps, B batch rows, I inputs, H hidden units, G gates, L layers, D directions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastrnn import _core, functional
from fastrnn._config import show_config
from fastrnn._core import Stream, available_threads, get_num_threads, set_num_threads
from fastrnn._device import DeviceArray, device_array
from fastrnn._frozen import Frozen
from fastrnn._layers import GRU, LSTM, RNN
from fastrnn._params import Gradients
from fastrnn._ragged import Ragged
from fastrnn._tape import Tape
from fastrnn._threadpoolctl import register_at_import as _register_at_import
from fastrnn._threadpoolctl import register_threadpoolctl

if TYPE_CHECKING:
    from fastrnn import io, nn, optim, reference
    from fastrnn.io import load, save

__version__: str = _core.compiled()["version"]

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "DeviceArray",
    "Frozen",
    "Gradients",
    "Ragged",
    "Stream",
    "Tape",
    "__version__",
    "available_threads",
    "device_array",
    "functional",
    "get_num_threads",
    "io",
    "load",
    "nn",
    "optim",
    "reference",
    "register_threadpoolctl",
    "save",
    "set_num_threads",
    "show_config",
]

_register_at_import()

_SUBMODULES = ("io", "nn", "optim", "reference")


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that importing fastrnn stays a matter of milliseconds.
    if name in _SUBMODULES:
        return importlib.import_module(f"fastrnn.{name}")
    if name in ("load", "save"):
        return getattr(importlib.import_module("fastrnn.io"), name)
    raise AttributeError(f"module 'fastrnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
