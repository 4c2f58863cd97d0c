"""threadpoolctl sees and limits fastrnn's threads, in whichever order the two are imported.

Every test runs in an interpreter of its own: what is imported, and the number of threads, belong to
the process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("threadpoolctl", minversion="3.3")


def run(code: str) -> str:
    """The output of ``code`` in a new interpreter that may use four threads."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "FASTRNN_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FIRST = "import fastrnn, threadpoolctl\n"
SECOND = "import threadpoolctl, fastrnn\n"
BETWEEN = """
import fastrnn
from threadpoolctl import threadpool_info, threadpool_limits
import threadpoolctl
"""


@pytest.mark.parametrize("imports", [FIRST, SECOND, BETWEEN])
def test_listed_once(imports: str) -> None:
    code = """
found = [e for e in threadpoolctl.threadpool_info() if e["user_api"] == "fastrnn"]
assert len(found) == 1, found
entry = found[0]
assert entry["internal_api"] == "fastrnn" and entry["num_threads"] == 4
assert entry["version"] == fastrnn.__version__
assert __import__("os").path.samefile(entry["filepath"], fastrnn._core.__file__)
fastrnn.register_threadpoolctl()
fastrnn.register_threadpoolctl()
assert threadpoolctl.threadpool_info().count(entry) == 1
print("done")
"""
    assert run(imports + code) == "done"


@pytest.mark.parametrize("imports", [FIRST, SECOND, BETWEEN])
def test_limits(imports: str) -> None:
    code = """
n = fastrnn.get_num_threads
assert n() == 4
with threadpoolctl.threadpool_limits(limits=1):
    assert n() == 1
    with threadpoolctl.threadpool_limits(limits=3):
        assert n() == 3
    assert n() == 1
assert n() == 4
with threadpoolctl.threadpool_limits(limits=2, user_api="fastrnn"):
    assert n() == 2
with threadpoolctl.threadpool_limits(limits={"fastrnn": 2}):
    assert n() == 2
with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
    assert n() == 4
with threadpoolctl.threadpool_limits(limits={"fastrnn": 5000}):  # more than we ever start
    assert n() == 1024
controller = threadpoolctl.ThreadpoolController()
with controller.limit(limits=1):
    assert n() == 1
assert n() == 4
@controller.wrap(limits=2)
def limited():
    return n()
assert limited() == 2 and n() == 4
assert controller.select(user_api="fastrnn").info()[0]["num_threads"] == 4
print("done")
"""
    assert run(imports + code) == "done"


def test_results_under_a_limit() -> None:
    code = """
import numpy as np
lstm = fastrnn.LSTM(64, 64, rng=1)
x = np.random.default_rng(2).standard_normal((50, 32, 64)).astype("float32")
y, _ = lstm(x)
with threadpoolctl.threadpool_limits(limits=1):
    z, _ = lstm(x)
print((y == z).all())
"""
    assert run(FIRST + code) == "True"


def test_other_libraries_of_our_name_are_not_ours() -> None:
    """Many packages have an extension module _core: a copy of ours stands for them."""
    code = """
import ctypes, os, shutil, tempfile
with tempfile.TemporaryDirectory() as folder:
    copy = shutil.copy(fastrnn._core.__file__, folder)
    ctypes.PyDLL(copy)
    loaded = threadpoolctl.threadpool_info()
assert sum(e["user_api"] == "fastrnn" for e in loaded) == 1, loaded
print("done")
"""
    assert run(FIRST + code) == "done"


def test_importing_fastrnn_does_not_import_threadpoolctl() -> None:
    assert run("import sys, fastrnn; print('threadpoolctl' in sys.modules)") == "False"


def test_without_threadpoolctl() -> None:
    """Not installed: nothing happens until it is asked for."""
    code = """
import importlib, os, sys
sys.path[:] = [p for p in sys.path if not os.path.exists(os.path.join(p, "threadpoolctl.py"))]
for attempt in range(2):
    try:
        importlib.import_module("threadpoolctl")
    except ModuleNotFoundError as error:
        print(error.name)
try:
    fastrnn.register_threadpoolctl()
except ImportError as error:
    print("ImportError")
"""
    assert run("import fastrnn\n" + code).split() == ["threadpoolctl"] * 2 + ["ImportError"]


def test_old_versions() -> None:
    """3.1 and older cannot be extended: said where it is asked for, ignored otherwise."""
    code = """
import sys, types
old = types.ModuleType("threadpoolctl")
old.__version__ = "3.1.0"
sys.modules["threadpoolctl"] = old
import fastrnn
try:
    fastrnn.register_threadpoolctl()
except RuntimeError as error:
    print(error)
"""
    assert run(code) == "threadpoolctl: expected version 3.2 or newer, got 3.1.0"
