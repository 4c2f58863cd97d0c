"""Threads as Python sees them: how many a call uses, and layers and streams shared between them.

Hostile cases 44, 45 and 49. The pool itself is tested in cpp/test_threads.cc; that the results do
not depend on threads in test_bits.py; fork, signals and the end of the process in test_hostile.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import CELLS, assert_same_bits, make_layer, run_python, state_arrays
from fastrnn import functional

BAD_VALUES = [0, -1, 10**9, 1025, 2**63, -(2**63), 10**30]
BAD_TYPES = ["two", "2", 1.0, np.float32(2), True, False, np.True_, [2], (), 2j, b"2", {}]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """work(0) … work(count - 1) at once; the first exception of any is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(k: int) -> None:
        try:
            barrier.wait()
            work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# --- How many -----------------------------------------------------------------------------------


def calls_with_threads() -> dict[str, Callable[[Any], Any]]:
    layer, x = make_layer("lstm", 3, 4), np.zeros((2, 2, 3), np.float32)
    y, _, _ = layer.forward(x)

    def backward(threads: Any) -> Any:
        return layer.forward(x)[2].backward(y, threads=threads)

    return {
        "call": lambda threads: layer(x, threads=threads),
        "forward": lambda threads: layer.forward(x, threads=threads),
        "backward": backward,
        "frozen": lambda threads: layer.freeze()(x, threads=threads),
        "functional": lambda threads: functional.lstm(x, layer.params, threads=threads),
        "functional forward": lambda t: functional.lstm_forward(x, layer.params, threads=t),
    }


@pytest.mark.parametrize("name", calls_with_threads())
def test_49_threads_of_a_call(name: str) -> None:
    call = calls_with_threads()[name]
    for good in (None, 1, 2, 1024, np.int64(3), np.uint8(1)):
        call(good)
    for value in BAD_VALUES:
        with pytest.raises(ValueError, match=r"^threads: expected None or an integer from 1 to"):
            call(value)
    for other in BAD_TYPES:
        with pytest.raises(TypeError, match=r"^threads: expected None or an integer from 1 to"):
            call(other)


def test_49_set_num_threads() -> None:
    before = fastrnn.get_num_threads()
    try:
        for good in (1, 3, np.int64(2), 1024):
            fastrnn.set_num_threads(good)
            assert fastrnn.get_num_threads() == good
        for value in BAD_VALUES:
            with pytest.raises(ValueError, match=r"^threads: expected an integer from 1 to 1024"):
                fastrnn.set_num_threads(value)
        for other in [*BAD_TYPES, None]:
            with pytest.raises(TypeError, match=r"^threads: expected an integer from 1 to 1024"):
                fastrnn.set_num_threads(other)
        assert fastrnn.get_num_threads() == 1024
    finally:
        fastrnn.set_num_threads(before)


def test_available_threads() -> None:
    assert 1 <= fastrnn.available_threads() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        assert fastrnn.available_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_the_default_is_what_the_process_may_use() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fastrnn
print(fastrnn.available_threads(), fastrnn.get_num_threads())
"""
    assert run_python(code, FASTRNN_NUM_THREADS="").stdout.split() == ["1", "1"]


COUNT = """
import numpy as np, fastrnn
print(fastrnn.get_num_threads())
fastrnn.LSTM(2, 3)(np.zeros((1, 1, 2), np.float32))
fastrnn.set_num_threads(5)
print(fastrnn.get_num_threads())
"""


@pytest.mark.parametrize("value", ["1", "7", "1024"])
def test_the_environment_variable(value: str) -> None:
    result = run_python(COUNT, FASTRNN_NUM_THREADS=value)
    assert result.stdout.split() == [value, "5"], result.stderr


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1025", "2 3", "9" * 30, "0x2"])
def test_49_a_bad_environment_variable(value: str) -> None:
    """Said at the first call that needs it; set_num_threads mends it."""
    code = """
import numpy as np, fastrnn
layer, x = fastrnn.LSTM(2, 3), np.zeros((1, 1, 2), np.float32)
for call in (fastrnn.get_num_threads, lambda: layer(x), lambda: fastrnn.show_config("dict")):
    try:
        call()
    except ValueError as error:
        print(error)
layer(x, threads=1)
fastrnn.set_num_threads(2)
layer(x)
"""
    result = run_python(code, FASTRNN_NUM_THREADS=value)
    assert result.returncode == 0, result.stderr
    message = f"FASTRNN_NUM_THREADS: expected an integer from 1 to 1024, got '{value}'"
    assert result.stdout.splitlines() == [message] * 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_threads_that_are_started() -> None:
    """None for one thread or for little work, and never more than set_num_threads allows.

    W_hh is small enough for any second-level cache: more would be worth a team for a single step.
    """
    code = """
import os, threading
import numpy as np, fastrnn
count = lambda: len(os.listdir("/proc/self/task"))
layer, x = fastrnn.LSTM(64, 128), np.zeros((20, 64, 64), np.float32)
fastrnn.set_num_threads(4)
before = count()
layer(x[:1, :1])
layer(x, threads=1)
print(count() - before)
layer(x)
print(count() - before)
layer(x, threads=1024)
print(count() - before)
"""
    none, some, most = map(int, run_python(code).stdout.split())
    assert none == 0 and 1 <= some <= 3 and most <= 3


# --- Shared objects -----------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_44_one_layer_in_many_threads(cell: str) -> None:
    """Calls, training passes and a frozen copy, each with its own sizes and thread counts."""
    layer = make_layer(cell, 9, 40, 2, 2)
    frozen = layer.freeze()

    def everything(k: int, threads: int) -> list[np.ndarray]:
        rng = np.random.default_rng(k)
        x = rng.standard_normal((10 + k, 3 + 2 * k, 9)).astype(np.float32)
        y, state = layer(x, threads=threads)
        y2, _ = frozen(x, threads=threads)
        y3, _, tape = layer.forward(x, threads=threads)
        g = tape.backward(y3, threads=threads)
        arrays = [y, y2, y3, g.x, *g.params.values()]
        return arrays + state_arrays(state) + state_arrays(g.state)

    want = [everything(k, 1) for k in range(6)]

    def work(k: int) -> None:
        for round_ in range(8):
            for a, b in zip(everything(k, 1 + round_ % 3), want[k], strict=True):
                assert_same_bits(a, b, f"thread {k}")

    in_threads(6, work)


@pytest.mark.parametrize("D", [1, 2])
def test_44_single_rows_of_wide_layers(D: int) -> None:
    """Threads that would share a row's units find the others taken, in whole or in part."""
    layer = make_layer("lstm", 9, 512, D=D)
    x = np.random.default_rng(0).standard_normal((20, 4, 9)).astype(np.float32)
    want = [layer(x[:, k : k + 1], threads=1)[0] for k in range(4)]

    def work(k: int) -> None:
        for round_ in range(6):
            y, _ = layer(x[:, k : k + 1], threads=1 + round_)
            assert_same_bits(y, want[k], f"thread {k}")

    in_threads(4, work)


def test_44_many_streams_of_one_network() -> None:
    frozen = make_layer("gru_reset_after", 5, 33, 2).freeze()
    x = np.random.default_rng(0).standard_normal((50, 4, 5)).astype(np.float32)
    want = frozen(x)[0]

    def work(k: int) -> None:
        for _ in range(5):
            stream = frozen.stream(4)
            for t in range(50):
                assert_same_bits(stream.step(x[t]), want[t], f"thread {k}, step {t}")

    in_threads(5, work)


def test_44_one_tape_is_used_once() -> None:
    """Of many threads one gets the gradients, all others a RuntimeError; nbytes stays readable."""
    layer = make_layer("lstm", 16, 64, 2)
    x = np.random.default_rng(0).standard_normal((60, 16, 16)).astype(np.float32)
    for _ in range(5):
        y, _, tape = layer.forward(x)
        size, gradients, refusals = tape.nbytes, [], []

        def work(
            k: int,
            tape: Any = tape,
            y: Any = y,
            size: int = size,
            gradients: list[Any] = gradients,
            refusals: list[RuntimeError] = refusals,
        ) -> None:
            try:
                gradients.append(tape.backward(y))
            except RuntimeError as error:
                refusals.append(error)
            for _ in range(100):
                assert tape.nbytes in (0, size)

        in_threads(4, work)
        assert len(gradients) == 1 and len(refusals) == 3
        assert tape.nbytes == 0


def test_45_one_stream_in_two_threads() -> None:
    """A second caller gets a RuntimeError; what was done is a whole number of steps."""
    frozen = make_layer("lstm", 64, 256, 2).freeze()
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    stream, done, refused = frozen.stream(64), [0] * 4, [0] * 4

    def work(k: int) -> None:
        for n in range(400):
            try:
                if k == 3 and n % 8 == 0:
                    h, c = stream.state
                    assert np.isfinite(h).all() and np.isfinite(c).all()
                else:
                    stream.step(x)
                    done[k] += 1
            except RuntimeError as error:
                assert "stream" in str(error)
                refused[k] += 1
            if refused[k] >= 20 and done[k] >= 2:
                return

    in_threads(4, work)
    assert sum(refused) > 0
    alone = frozen.stream(64)
    for _ in range(sum(done)):
        want = alone.step(x)
    assert_same_bits(stream.step(x), alone.step(x))
    assert want.shape == (64, 256)
    for a, b in zip(stream.state, alone.state, strict=True):
        assert_same_bits(a, b)


def test_45_a_stream_within_its_own_step() -> None:
    """An input that steps the stream while it is converted is a second caller too."""
    stream = make_layer("lstm", 3, 4).freeze().stream(2)

    class Steps:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            with pytest.raises(RuntimeError, match="stream"):
                stream.step(np.zeros((2, 3), np.float32))
            with pytest.raises(RuntimeError, match="stream"):
                stream.reset()
            return np.zeros((2, 3), np.float32)

    stream.step(Steps())
    stream.step(np.zeros((2, 3), np.float32))


def test_the_lock_is_released() -> None:
    """Other Python threads run during a call, a training pass, a backward pass and a large step."""
    layer = make_layer("lstm", 64, 256, 2)
    frozen = layer.freeze()
    x = np.zeros((200, 32, 64), np.float32)
    stream = frozen.stream(2000)
    y, _, tape = layer.forward(x)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for call in (
            lambda: layer(x),
            lambda: layer.forward(x),
            lambda: tape.backward(y),
            lambda: stream.step(np.zeros((2000, 64), np.float32)),
        ):
            before = ticks[0]
            call()
            assert ticks[0] > before + 1
    finally:
        stop.set()
        thread.join()
