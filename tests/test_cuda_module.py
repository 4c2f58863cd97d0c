"""The CUDA module that nvcc built, on a machine without a GPU: it loads, and says what is missing.

What it computes is tested on the emulated GPU, and on a real one by ``pytest -m cuda``.
"""

from __future__ import annotations

import ctypes
import importlib.util

import pytest
from conftest import run_python

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fastrnn._cuda") is None, reason="a build without nvcc"
)

LAYER = """
import fastrnn

try:
    fastrnn.LSTM(3, 4, device="cuda")
except RuntimeError as error:
    print(error)
"""


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_loads_without_a_device() -> None:
    result = run_python("import fastrnn._cuda", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_is_not_loaded_before_its_first_use() -> None:
    result = run_python("import sys, fastrnn; print('fastrnn._cuda' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_without_a_device_a_layer_says_why() -> None:
    result = run_python(LAYER, FASTRNN_CUDA="", CUDA_VISIBLE_DEVICES="")
    assert result.stdout.startswith("device: expected 'cpu', got 'cuda', and ")
    assert ("device" if has_driver() else "driver") in result.stdout.partition(", and ")[2]
