"""Layers and models with device="cuda" as objects, on the emulated GPU.

Moving, other libraries' arrays, batches without padding, training of whole models, saving, the
command line, and what happens where there is no device. What the kernels compute is in
test_cuda_recurrent.py and test_cuda_training.py.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_producers as producers
import fastrnn
import numpy as np
import pytest
from conftest import (
    CELLS,
    assert_gradient_close,
    assert_same_bits,
    make_layer,
    map_state,
    random_state,
    run_python,
    state_arrays,
)
from fastrnn import _core, functional, nn, optim

try:
    import fastrnn._cuda_emulated as cuda
except ModuleNotFoundError:
    if os.environ.get("CI"):  # where everything is built
        raise
    pytest.skip(
        "this build has no emulator: -DFASTRNN_CUDA_EMULATED=ON makes one", allow_module_level=True
    )
if os.environ["FASTRNN_CUDA"] != "emulated":
    pytest.skip("this process has another CUDA backend", allow_module_level=True)

pytestmark = pytest.mark.skipif(
    _core.isa() == "baseline", reason="the CPU rounds twice here, the device once"
)
every_cell = pytest.mark.parametrize("cell", CELLS)
there = fastrnn.device_array
I, H, T, B = 5, 7, 6, 4


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def same(got: Any, want: np.ndarray, what: str = "") -> None:
    """The bits of ``want``, on the device."""
    assert isinstance(got, fastrnn.DeviceArray), what
    assert_same_bits(got.numpy(), want, what)


def close(got: Any, want: np.ndarray, what: str = "") -> None:
    assert_gradient_close(np.asarray(got), want, what)


# --- Moving -------------------------------------------------------------------------------------

MODULES = {
    **{cell: lambda cell=cell: make_layer(cell, I, H, 2, 2, dropout=0.2) for cell in CELLS},
    "float64": lambda: fastrnn.LSTM(I, H, dtype="float64", rng=1),
    "linear": lambda: nn.Linear(I, H, rng=1),
    "embedding": lambda: nn.Embedding(I, H, rng=1),
    "dropout": lambda: nn.Dropout(0.3, rng=1),
    "sequential": lambda: nn.Sequential(
        fastrnn.GRU(I, H, rng=1), nn.Dropout(0.1, rng=2), nn.Linear(H, 3, rng=3)
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_there_and_back(name: str) -> None:
    here, module = MODULES[name](), MODULES[name]()
    params = module.params
    assert module.to("cpu") is module and module.device == "cpu"
    assert module.to("cuda") is module and module.device == "cuda"
    assert module.params is params and module.to("cuda").flat is module.flat
    same(module.flat, here.flat)
    for key, want in here.params.items():
        same(module.params[key], want, key)
        assert_same_bits(module.state_dict()[key], want, key)
    if params:
        key = next(iter(params))
        module.params[key] = np.zeros(here.params[key].shape)  # writes into the live array
        assert not module.flat.numpy()[: here.params[key].size].any()
        module.params[key] = there(here.params[key])
        for bad in (np.zeros((1, 2, 3)), there(np.zeros((1, 2, 3), "f4"))):
            with pytest.raises(ValueError, match=r"^params\['.*'\]: expected shape"):
                module.params[key] = bad
        with pytest.raises(TypeError, match=r"^params\['.*'\]: expected values of "):
            module.params[key] = np.zeros(here.params[key].shape, complex)
    module.load_state_dict({key: array + 1 for key, array in here.state_dict().items()})
    same(module.flat, here.flat + 1)
    module.load_state_dict({key: there(array) for key, array in here.params.items()})
    assert module.to("cpu").device == "cpu" and isinstance(module.flat, np.ndarray)
    assert_same_bits(module.flat, here.flat)
    assert module.config() == here.config()
    assert module.flat.flags.writeable and module.flat.base is None


def test_a_sequential_moves_as_a_whole(rng: np.random.Generator) -> None:
    model = MODULES["sequential"]().to("cuda")
    assert all(module.device == "cuda" for module in model.modules)
    model.modules[2].params["bias"][...] = 3  # still views of the model's buffer
    assert model.flat.numpy()[-3:].tolist() == [3, 3, 3]
    assert model.modules[0]._network.device == "cuda"
    with pytest.raises(ValueError, match=r"^to: expected a module of its own"):
        model.modules[0].to("cpu")
    with pytest.raises(ValueError, match=r"^modules\[1\]: expected device cuda as of modules\[0\]"):
        nn.Sequential(fastrnn.LSTM(I, H, device="cuda"), nn.Linear(H, 2))
    assert nn.Sequential(fastrnn.LSTM(I, H, device="cuda")).device == "cuda"
    again = copy.copy(model)
    same(again.flat, model.flat.numpy())
    with pytest.raises(ValueError, match="expected a free module"):
        nn.Sequential(model.modules[0])


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles(name: str) -> None:
    module = MODULES[name]().to("cuda")
    before = module.flat.numpy()
    for again in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.device == "cuda"
        same(again.flat, before)
        again.flat[...] = 0
        for array in again.params.values():
            assert not array.numpy().any()
    same(module.flat, before)


def test_options() -> None:
    layer = fastrnn.LSTM(I, H, device="cuda", precision="bfloat16", rng=1)
    assert layer.precision == "bfloat16" and layer.config()["precision"] == "bfloat16"
    assert "device='cuda'" in repr(layer) and "precision='bfloat16'" in repr(layer)
    assert "precision" not in fastrnn.LSTM(I, H).config()
    assert fastrnn.LSTM(I, H, precision="tf32").to("cuda").precision == "tf32"
    same(layer.flat, fastrnn.LSTM(I, H, rng=1).flat)
    for error, options in (
        (ValueError, {"precision": "float8"}),
        (TypeError, {"precision": 16}),
        (ValueError, {"precision": "tf32", "dtype": "float64"}),
        (ValueError, {"device": "cuda:1"}),
    ):
        with pytest.raises(error, match=r"^(precision|device): expected "):
            fastrnn.GRU(I, H, **options)
    with pytest.raises(ValueError, match=r"^device: expected one of 'cpu', 'cuda'"):
        layer.to("gpu")


# --- Calls --------------------------------------------------------------------------------------


@every_cell
def test_numpy_in_numpy_out(cell: str, rng: np.random.Generator) -> None:
    here = make_layer(cell, I, H, 2, 2)
    layer = copy.deepcopy(here).to("cuda")
    x, state = draw(rng, T, B, I), random_state(CELLS[cell][0], (4, B, H), "float32", rng)
    lengths, reset = np.array([3, 6, 0, 5]), rng.random((T, B)) < 0.2
    options = {"lengths": lengths, "reset": reset}
    want = here(x, state, **options)
    device_state = map_state(there, state)
    for move, given in ((np.asarray, state), (there, device_state), (there, state)):
        y, final = layer(move(x), given, lengths=lengths, reset=reset)
        for a, b in zip([y, *state_arrays(final)], [want[0], *state_arrays(want[1])], strict=True):
            assert isinstance(a, np.ndarray) == (move is np.asarray)
            assert_same_bits(np.asarray(a), b)
    y, final, tape = here.forward(x, state, **options)
    dy, dstate = draw(rng, *y.shape), map_state(lambda a: draw(rng, *a.shape), final)
    g = tape.backward(dy, dstate)
    for move in (np.asarray, there):
        got_y, _, tape = layer.forward(move(x), map_state(move, state), **options)
        got = tape.backward(move(dy), map_state(move, dstate))
        assert isinstance(got.x, np.ndarray) == (move is np.asarray)
        close(got.x, g.x, "dx")
        for a, b in zip(state_arrays(got.state), state_arrays(g.state), strict=True):
            assert isinstance(a, np.ndarray) == (move is np.asarray)
            close(a, b, "dstate")
        for name, array in g.params.items():
            assert isinstance(got.params[name], fastrnn.DeviceArray)
            close(got.params[name], array, name)
        assert_same_bits(np.asarray(got_y), y)


def test_gradients_are_added(rng: np.random.Generator) -> None:
    layer = fastrnn.LSTM(I, H, rng=1, device="cuda")
    x, dy = there(draw(rng, T, B, I)), there(draw(rng, T, B, H))
    once = layer.forward(x)[2].backward(dy).params
    into = {name: there(np.ones(a.shape, "f4")) for name, a in reversed(once.items())}
    assert layer.forward(x)[2].backward(dy, into=into).params is into
    for name, array in once.items():
        close(into[name], array.numpy() + 1, name)
    with pytest.raises(TypeError, match=r"^into\['weight_ih_l0'\]: expected a DeviceArray of fl"):
        layer.forward(x)[2].backward(dy, into={n: a.numpy() for n, a in once.items()})
    here = fastrnn.LSTM(I, H, rng=1)
    with pytest.raises(TypeError, match=r"^into\['weight_ih_l0'\]: expected an array of float32"):
        here.forward(x.numpy())[2].backward(dy.numpy(), into=once)


def test_layers_on_the_cpu_refuse_device_arrays(rng: np.random.Generator) -> None:
    layer, x = fastrnn.LSTM(I, H), draw(rng, T, B, I)
    state = tuple(there(np.zeros((1, B, H), "f4")) for _ in range(2))
    for call in (lambda: layer(there(x)), lambda: layer.forward(there(x)),
                 lambda: layer(x, state), lambda: layer.freeze()(there(x)),
                 lambda: layer.forward(x)[2].backward(there(draw(rng, T, B, H)))):  # fmt: skip
        with pytest.raises(TypeError, match="expected an array on the CPU, where the layer is"):
            call()


@every_cell
@pytest.mark.parametrize("form", ["list", "ragged", "device list", "device ragged", "ids"])
def test_batches_without_padding(cell: str, form: str, rng: np.random.Generator) -> None:
    here = make_layer(cell, I, H, 1, 2)
    layer = copy.deepcopy(here).to("cuda")
    lengths = (3, 0, 5, 1)
    if form == "ids":
        xs = [rng.integers(0, I, n) for n in lengths]
    else:
        xs = [draw(rng, n, I) for n in lengths]
    dys = [draw(rng, n, 2 * H) for n in lengths]
    y, state, tape = here.forward(xs)
    g = tape.backward(dys)

    def formed(arrays: list[np.ndarray]) -> Any:
        moved = [there(a) if "device" in form else a for a in arrays]
        return fastrnn.Ragged.of(moved) if "ragged" in form else moved

    got, got_state, tape = layer.forward(formed(xs))
    grads = tape.backward(formed(dys))
    pairs = [(got, y)] if grads.x is None else [(got, y), (grads.x, g.x)]
    for a, b in pairs:
        assert isinstance(a, fastrnn.Ragged) == ("ragged" in form)
        parts = a.split() if isinstance(a, fastrnn.Ragged) else a
        for part, want in zip(parts, b, strict=True):
            assert isinstance(part, np.ndarray) == ("device" not in form)
            close(part, want)
    for a, b in zip(state_arrays(got_state), state_arrays(state), strict=True):
        assert_same_bits(np.asarray(a), b)
    for name, array in g.params.items():
        close(grads.params[name], array, name)


@pytest.mark.parametrize("form", ["numpy", "device", "lengths", "ragged", "batch_first", "ids"])
@pytest.mark.parametrize("pair", [(2, 2), (2, 5), (4, 4)])
def test_truncated_backpropagation(
    form: str, pair: tuple[int, int], rng: np.random.Generator
) -> None:
    first = form == "batch_first"
    here = fastrnn.LSTM(I, H, 2, batch_first=first, rng=1)
    layer = copy.deepcopy(here).to("cuda")
    options: dict[str, Any] = {"tbptt": pair}
    x: Any = rng.integers(0, I, (7, B)) if form == "ids" else draw(rng, 7, B, I)
    dy: Any = draw(rng, 7, B, H)
    if first:
        x, dy = draw(rng, B, 7, I), draw(rng, B, 7, H)
    if form == "lengths":
        options["lengths"] = np.array([3, 7, 0, 5])
        options["reset"] = rng.random((7, B)) < 0.2
    if form == "ragged":
        lengths = (3, 7, 0, 5)
        x = fastrnn.Ragged.of([draw(rng, n, I) for n in lengths])
        dy = fastrnn.Ragged.of([draw(rng, n, H) for n in lengths])
    state = random_state("lstm", (2, B, H), "float32", rng)
    dstate = random_state("lstm", (2, B, H), "float32", rng)
    y, _, tape = here.forward(x, state, **options)
    g = tape.backward(dy, dstate)

    def move(a: Any) -> Any:
        if form == "numpy":
            return a
        return fastrnn.Ragged(there(a.values), a.offsets) if form == "ragged" else there(a)

    got, _, tape = layer.forward(move(x), state, **options)
    assert tape.nbytes > 0
    grads = tape.backward(move(dy), dstate)
    values = (lambda a: np.asarray(a.values)) if form == "ragged" else np.asarray
    assert_same_bits(values(got), values(y))
    if form != "ids":
        close(values(grads.x), values(g.x), "dx")
    for a, b in zip(state_arrays(grads.state), state_arrays(g.state), strict=True):
        close(a, b, "dstate")
    for name, array in g.params.items():
        close(grads.params[name], array, name)


def test_functional(rng: np.random.Generator) -> None:
    weights = fastrnn.GRU(I, H, 2, rng=1).state_dict()
    on_device = {name: there(array) for name, array in weights.items()}
    x, dy = draw(rng, T, B, I), draw(rng, T, B, H)
    y, h, tape = functional.gru_forward(x, weights)
    g = functional.gru_backward(tape, dy)
    same(functional.gru(there(x), on_device)[0], y)
    assert_same_bits(functional.gru(x, on_device)[1], h)
    got, _, tape = functional.gru_forward(there(x), on_device)
    same(got, y)
    grads = functional.gru_backward(tape, there(dy))
    for name, array in g.params.items():
        close(grads.params[name], array, name)
    with pytest.raises(TypeError, match=r"^weights\['weight_ih_l0'\]: expected an array of fl"):
        functional.gru(x, {name: there(array, dtype="float16") for name, array in weights.items()})


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_other_precisions_are_near(precision: str, rng: np.random.Generator) -> None:
    here = fastrnn.LSTM(I, H, rng=1)
    layer = fastrnn.LSTM(I, H, rng=1, device="cuda", precision=precision)
    x, dy = draw(rng, T, B, I), draw(rng, T, B, H)
    y, _, tape = here.forward(x)
    g = tape.backward(dy)
    for move in (np.asarray, there):
        got, _, tape = layer.forward(move(x))
        assert np.asarray(got).dtype == np.float32
        np.testing.assert_allclose(np.asarray(got), y, rtol=0, atol=0.03)
        grads = tape.backward(move(dy))
        for name, array in g.params.items():
            scale = float(np.abs(array).max())
            np.testing.assert_allclose(
                grads.params[name].numpy(), array, rtol=0, atol=0.05 * scale, err_msg=name
            )
    if precision != "tf32":
        got, _, tape = layer.forward(there(x, dtype=precision))
        assert got.dtype == precision
        assert tape.backward(there(dy, dtype=precision)).x.dtype == precision
        got, _, tape = layer.forward(there(x, dtype=precision), tbptt=(2, 3))
        assert tape.backward(there(dy, dtype=precision)).x.dtype == precision


# --- Other libraries ----------------------------------------------------------------------------


class Foreign:
    """An array of a library that is like CuPy, PyTorch or JAX."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: int, max_version: Any = None) -> Any:
        self.streams.append(stream)
        return self.inner.__dlpack__(stream=stream, max_version=max_version)


@pytest.fixture(params=["torch", "cupy", "jaxlib"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The class of a library's arrays, whose current stream is 50 (JAX tells none)."""
    name = request.param
    cls = type("Array", (Foreign,), {"__module__": f"{name}.part"})

    def from_dlpack(array: Any) -> Any:
        stream = None if name == "jaxlib" else 50
        return cls(cuda.Array.import_(producers.Capsule(array.__dlpack__(stream=stream)), 50))

    stream = types.SimpleNamespace(cuda_stream=50, ptr=50)
    module = types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            current_stream=lambda: stream, get_current_stream=lambda: stream
        ),
        from_dlpack=from_dlpack,
    )
    monkeypatch.setitem(sys.modules, "jax.dlpack" if name == "jaxlib" else name, module)
    yield cls


def test_other_libraries_get_their_own_arrays(library: Any, rng: np.random.Generator) -> None:
    here = fastrnn.LSTM(I, H, rng=1)
    layer = copy.deepcopy(here).to("cuda")
    x, dy = draw(rng, T, B, I), draw(rng, T, B, H)
    y, (h, c), tape = here.forward(x)
    g = tape.backward(dy)
    given = library(there(x))
    got, (got_h, got_c), tape = layer.forward(given, lengths=np.full(B, T))
    grads = tape.backward(library(there(dy)))
    expected = 50 if library.__module__ != "jaxlib.part" else given.streams[0]
    assert given.streams == [expected] and expected > 2
    for a, b in ((got, y), (got_h, h), (got_c, c), (grads.x, g.x), (grads.state[0], g.state[0])):
        assert type(a) is library
        close(a.inner, b)
    for name, array in g.params.items():  # as the parameters: ours
        close(grads.params[name], array, name)
    assert type(layer(library(there(x)), (got_h, got_c))[0]) is library
    model = nn.Sequential(fastrnn.LSTM(I, H, rng=1), nn.Linear(H, 3, rng=2)).to("cuda")
    logits, state, tape = model.forward(library(there(x)))
    assert type(logits) is library and type(state[0][1]) is library and state[1] is None
    loss, dlogits = nn.softmax_cross_entropy(logits, rng.integers(0, 3, (T, B)))
    assert type(dlogits) is library and loss > 0
    grads = tape.backward(dlogits)
    assert type(grads.x) is library
    optim.Adam(model).step(grads.params, clip_norm=1)
    assert model.flat.stream == (50 if library.__module__ != "jaxlib.part" else expected)
    ids = library(there(rng.integers(0, I, (T, B))))
    assert type(layer(ids)[0]) is library
    assert type(nn.Linear(H, 2).to("cuda")(got)) is library
    assert type(nn.mean_squared_error(got, dy)[1]) is library


def test_libraries_that_we_do_not_know_get_ours(rng: np.random.Generator) -> None:
    layer = fastrnn.GRU(I, H, rng=1, device="cuda")
    x = draw(rng, T, B, I)
    want = layer(x)[0]
    for form in (producers.Producer(there(x)), producers.Interface(there(x)[::1])):
        same(layer(form)[0], want)
    with pytest.raises(ValueError, match=r"^x: expected an array on CUDA device 0, got one on DLP"):
        layer(producers.Producer(there(x), device=(2, 1)))
    strided = producers.Interface(there(x.transpose(1, 0, 2).copy()), shape=(T, B, I),
                                  strides=(4 * I, 4 * I * T, 4))  # fmt: skip
    same(layer(strided)[0], want)


# --- Frozen networks and streams ----------------------------------------------------------------


@every_cell
def test_frozen(cell: str, rng: np.random.Generator) -> None:
    layer = make_layer(cell, I, H, 2).to("cuda")
    x = draw(rng, T, B, I)
    want, state = layer(x)
    frozen = layer.freeze()
    layer.flat[...] = 0
    assert frozen.device == "cuda"
    for network in (frozen, pickle.loads(pickle.dumps(frozen))):
        same(network(there(x))[0], want)
        stream = network.stream(B)
        assert stream.batch_size == B
        for t in range(T):
            y = stream.step(x[t] if t % 2 else there(x[t]))
            assert isinstance(y, np.ndarray) == bool(t % 2)
            assert_same_bits(np.asarray(y), want[t])
        for a, b in zip(state_arrays(stream.state), state_arrays(state), strict=True):
            same(a, b)


def test_streams(rng: np.random.Generator) -> None:
    layer = fastrnn.LSTM(I, H, 2, rng=1)
    here, on_device = layer.freeze().stream(3), copy.deepcopy(layer).to("cuda").freeze().stream(3)
    state = random_state("lstm", (2, 3, H), "float32", rng)
    out = np.zeros((3, H), np.float32)
    for step, action in enumerate(
        (None, 1, [0, 2], np.array([True, False, True]), [], "state", "zero", "half", None)
    ):
        for stream in (here, on_device):
            if isinstance(action, str):
                stream.state = {"state": state, "zero": None, "half": (None, state[1])}[action]
            elif action is not None or step > 0:
                stream.reset(action)
        ids = rng.integers(0, I, 3)
        want = here.step(ids)
        assert on_device.step(ids, out) is out
        assert_same_bits(out, want)
        x = draw(rng, 3, I)
        target = there(out)
        assert on_device.step(x, target) is target
        same(target, here.step(x))
        for a, b in zip(on_device.state, here.state, strict=True):
            same(a, b)
    before = [a.numpy() for a in on_device.state]
    for error, call in (
        (ValueError, lambda: on_device.step(draw(rng, 3, I + 1))),
        (ValueError, lambda: on_device.step(draw(rng, 2, I))),
        (TypeError, lambda: on_device.step(draw(rng, 3, I, dtype="float64"))),
        (ValueError, lambda: on_device.step(np.array([0, 1, I]))),
        (ValueError, lambda: on_device.step(ids, np.zeros((3, H + 1), "f4"))),
        (TypeError, lambda: on_device.step(ids, [0.0])),
        (ValueError, lambda: on_device.step(ids, np.broadcast_to(np.float32(0), (3, H)))),
        (ValueError, lambda: on_device.reset(3)),
        (TypeError, lambda: on_device.reset(1.5)),
        (ValueError, lambda: on_device.reset(np.zeros(2, bool))),
        (TypeError, lambda: setattr(on_device, "state", state[0])),
        (ValueError, lambda: setattr(on_device, "state", (state[0],))),
        (ValueError, lambda: setattr(on_device, "state", (state[0][:1], None))),
    ):
        with pytest.raises(error):
            call()
    for a, b in zip(on_device.state, before, strict=True):
        same(a, b)
    with on_device._lock, pytest.raises(RuntimeError, match="one thread at a time"):
        on_device.step(ids)
    with pytest.raises(ValueError, match="one direction"):
        fastrnn.RNN(I, H, bidirectional=True, device="cuda").freeze().stream()


def test_frozen_model_and_its_stream(rng: np.random.Generator) -> None:
    layers = nn.Embedding(9, I, rng=1), fastrnn.GRU(I, H, rng=1), nn.Linear(H, 4, rng=2)
    here = nn.Sequential(*layers)
    model = copy.deepcopy(here).to("cuda")
    ids = rng.integers(0, 9, (T, B))
    want, _ = here(ids)
    frozen = pickle.loads(pickle.dumps(model.freeze()))
    assert frozen.device == "cuda"
    assert_same_bits(frozen(ids)[0], want)
    same(frozen(there(ids))[0], want)
    stream = frozen.stream(B)
    out = np.zeros((B, 4), np.float32)
    for t in range(T):
        if t == 1:
            assert stream.step(ids[t], out) is out
            assert_same_bits(out, want[t])
        elif t == 2:
            same(stream.step(there(ids[t])), want[t])
        else:
            assert_same_bits(stream.step(ids[t]), want[t])
    stream.state = stream.state
    stream.reset()
    assert_same_bits(stream.step(ids[0]), want[0])


# --- Models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [optim.Adam, lambda m, lr: optim.SGD(m, lr, momentum=0.9)])
def test_training_a_model(optimizer: Any, rng: np.random.Generator) -> None:
    V = 11

    def model() -> nn.Sequential:
        return nn.Sequential(
            nn.Embedding(V, I, rng=1), fastrnn.LSTM(I, H, 2, dropout=0.2, rng=2),
            nn.Dropout(0.1, rng=3), nn.Linear(H, V, rng=4),
        )  # fmt: skip

    here, on_device, by_numpy = model(), model().to("cuda"), model().to("cuda")
    runs = [(here, np.asarray), (on_device, there), (by_numpy, np.asarray)]
    optimizers = [optimizer(part, 1e-2) for part, _ in runs]
    states: list[Any] = [None] * 3
    for _ in range(5):
        ids, targets = rng.integers(0, V, (2, T, B))
        losses = []
        for i, (part, move) in enumerate(runs):
            logits, states[i], tape = part.forward(move(ids), states[i])
            assert isinstance(logits, np.ndarray) == (move is np.asarray)
            loss, dlogits = nn.softmax_cross_entropy(logits, targets)
            grads = tape.backward(dlogits)
            assert grads.x is None
            optimizers[i].step(grads.params, clip_norm=1.0)
            losses.append(loss)
        assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-5)
    same(on_device.flat, by_numpy.flat.numpy())
    np.testing.assert_allclose(on_device.flat.numpy(), here.flat, rtol=0, atol=1e-4)


def test_gradients_of_the_state_alone(rng: np.random.Generator) -> None:
    here = nn.Sequential(fastrnn.LSTM(I, H, rng=1), nn.Linear(H, 2, rng=2))
    model = copy.deepcopy(here).to("cuda")
    x, dstate = draw(rng, T, B, I), (random_state("lstm", (1, B, H), "float32", rng), None)
    g = here.forward(x)[2].backward(None, dstate)
    grads = model.forward(there(x))[2].backward(None, dstate)
    close(grads.x, g.x)
    for name, array in g.params.items():
        close(grads.params[name], array, name)
    y, state, tape = model.forward(x)
    assert isinstance(y, np.ndarray) and isinstance(state[0][0], np.ndarray)
    got = tape.backward(np.ones_like(y), state)
    assert isinstance(got.x, np.ndarray) and isinstance(got.state[0][0], np.ndarray)
    with pytest.raises(ValueError, match=r"^dstate\[0\]\[0\]: expected shape"):
        model.forward(x)[2].backward(y, ((state[0][0][:, :1], None), None))


def test_saving(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "model.safetensors"
    x = draw(rng, T, B, I)
    for model in (
        nn.Sequential(fastrnn.LSTM(I, H, rng=1), nn.Linear(H, 2, rng=2)).to("cuda"),
        fastrnn.GRU(I, H, rng=1, device="cuda", precision="float32"),
    ):
        fastrnn.save(path, model)
        again = fastrnn.load(path)
        assert again.device == "cpu"
        assert_same_bits(again.flat, model.flat.numpy())
        assert_same_bits(again(x)[0], model(x)[0])
        assert getattr(again, "precision", None) == getattr(model, "precision", None)
        again.to("cuda")
        same(again.flat, model.flat.numpy())


def test_nothing_leaks(rng: np.random.Generator) -> None:
    def used() -> int:
        info = cuda.device_info()
        return int(info["memory"] - info["free_memory"])

    model = nn.Sequential(fastrnn.LSTM(I, H, 2, rng=1), nn.Linear(H, 3, rng=2)).to("cuda")
    optimizer = optim.Adam(model)
    x, t = draw(rng, T, B, I), rng.integers(0, 3, (T, B))
    sizes = set()
    for _ in range(5):
        logits, _, tape = model.forward(there(x))
        _, dlogits = nn.softmax_cross_entropy(logits, t)
        optimizer.step(tape.backward(dlogits).params)
        model.forward(x)  # a tape that nobody uses
        model.freeze().stream(2).step(x[0, :2])
        with pytest.raises(ValueError):
            model.forward(there(x[..., :2]))
        del logits, tape, dlogits, _
        sizes.add(used())
    assert len(sizes) == 1


# --- The command line ---------------------------------------------------------------------------


def fastrnn_command(folder: Path, *args: str, **env: str) -> Any:
    code = "import sys; from fastrnn.cli import main; sys.argv[0] = 'fastrnn'; main()"
    return run_python(f"import os; os.chdir({str(folder)!r}); {code}", *args, timeout=250, **env)


def test_the_command_line_trains_on_the_device(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog. " * 30
    (tmp_path / "text.txt").write_text(text)
    small = ["--hidden", "8", "--batch", "4", "--window", "16", "--seed", "3", "--dropout", "0.1"]
    for device, out in (("cpu", "cpu"), ("cuda", "gpu"), ("cuda", "again")):
        command = ["train", "text.txt", "--out", f"{out}.safetensors", "--device", device, *small]
        # "again" stops after one epoch and goes on.
        for extra in (["--epochs", "1"], ["--epochs", "2", "--resume"]) if out == "again" else (
            ["--epochs", "2"],
        ):  # fmt: skip
            resumed = ["train", "text.txt", "--out", f"{out}.safetensors", "--device", device]
            result = fastrnn_command(
                tmp_path, *(resumed if "--resume" in extra else command), *extra
            )
            assert result.returncode == 0, result.stderr
    logs = {
        name: json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("cpu", "gpu", "again")
    }
    assert [log["device"] for log in logs.values()] == ["cpu", "cuda", "cuda"]
    assert logs["gpu"]["validation_nats_per_char"] == pytest.approx(
        logs["cpu"]["validation_nats_per_char"], rel=1e-4
    )
    sampled = fastrnn_command(tmp_path, "sample", "gpu.safetensors", "--length", "5", "--seed", "1")
    assert sampled.returncode == 0 and len(sampled.stdout) == 6


def test_a_run_goes_on_exactly(tmp_path: Path) -> None:
    from fastrnn._charlm.model import Settings
    from fastrnn._charlm.text import Corpus
    from fastrnn._charlm.train import Trainer

    corpus = Corpus.of("abcab abcabd abccba. " * 40)
    settings = Settings(hidden=8, batch=3, window=8, epochs=1, layers=2)
    whole, half = (Trainer(settings, corpus, None, "cuda") for _ in range(2))
    for _ in range(4):
        whole.step()
    for _ in range(2):
        half.step()
    half.save(tmp_path / "run.state")
    again = Trainer.restore(tmp_path / "run.state", corpus, {}, None, "cuda")
    for _ in range(2):
        again.step()
    same(again.model.flat, whole.model.flat.numpy())
    elsewhere = Trainer.restore(tmp_path / "run.state", corpus, {}, None, "cpu")
    for _ in range(2):
        elsewhere.step()
    np.testing.assert_allclose(elsewhere.model.flat, whole.model.flat.numpy(), rtol=0, atol=1e-3)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    config = fastrnn.show_config("dict", plan={"cell": "lstm", "hidden_size": 64, "batch_size": 8})
    assert config is not None
    assert config["cuda"].startswith("emulator, compute capability 9.0")
    assert config["plan"].startswith("step (")
    plan = {"cell": "gru", "hidden_size": 64, "batch_size": 8, "precision": "bfloat16"}
    fastrnn.show_config(plan={**plan, "bidirectional": True})
    assert "plan" in capsys.readouterr().out
    for error, bad in (
        (ValueError, {"cell": "mlp"}), (TypeError, {"hidden_size": "big"}),
        (ValueError, {"precision": "int8"}), (TypeError, {"depth": 3}), (TypeError, {"cell": 3}),
    ):  # fmt: skip
        with pytest.raises(error):
            fastrnn.show_config("dict", plan={**plan, **bad})


# --- Where there is no device -------------------------------------------------------------------

TRY = """
import sys
if sys.argv[1:] == ["hide"]:
    sys.modules["fastrnn._cuda"] = sys.modules["fastrnn._cuda_emulated"] = None
import fastrnn
print(fastrnn.show_config("dict")["cuda"])
for call in (lambda: fastrnn.LSTM(3, 4, device="cuda"), lambda: fastrnn.LSTM(3, 4).to("cuda"),
             lambda: fastrnn.device_array([1.0]),
             lambda: fastrnn.show_config(plan={"cell": "lstm", "hidden_size": 1, "batch_size": 1})):
    try:
        call()
    except (RuntimeError, ValueError) as error:
        print(error)
print(isinstance(3, fastrnn.DeviceArray))
"""


@pytest.mark.parametrize(
    "choice, hide, why",
    [
        ("", True, "this build of fastrnn has no CUDA backend; install fastrnn from source on a"),
        ("emulated", True, "this build of fastrnn has no CUDA backend"),
        ("off", False, "CUDA is off (FASTRNN_CUDA=off)"),
    ],
)
def test_errors_say_what_is_missing(choice: str, hide: bool, why: str) -> None:
    result = run_python(TRY, *(["hide"] if hide else []), FASTRNN_CUDA=choice)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 6, result.stderr
    assert lines[0] == ("not in this build" if hide else why)
    for line in lines[1:5]:
        assert line.startswith(f"device: expected 'cpu', got 'cuda', and {why}")
    assert lines[5] == "False"


def test_an_unknown_backend() -> None:
    result = run_python(TRY, FASTRNN_CUDA="metal")
    assert result.stdout.count("FASTRNN_CUDA: expected nothing, 'emulated' or 'off', got") == 5


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 100)
    result = fastrnn_command(tmp_path, "train", "text.txt", "--device", "cuda", FASTRNN_CUDA="off")
    assert result.returncode == 2
    assert result.stderr == "fastrnn: --device cuda: CUDA is off (FASTRNN_CUDA=off)\n"


def test_nothing_is_loaded_before_its_first_use() -> None:
    result = run_python(
        "import sys, numpy, fastrnn; fastrnn.LSTM(3, 4)(numpy.zeros((2, 1, 3), 'f4'));"
        "print([name for name in sys.modules if '_cuda' in name])"
    )
    assert result.stdout == "[]\n", result.stderr


def test_fork() -> None:
    """CUDA does not survive a fork: the child gets an error, and the parent goes on."""
    result = run_python(
        """
import os, fastrnn, numpy as np
x = np.ones((2, 1, 3), np.float32)
layer = fastrnn.LSTM(3, 4, rng=1, device="cuda")
want = layer(x)[0]
child = os.fork()
if child == 0:
    for call in (lambda: layer(x), lambda: layer.flat.numpy(), lambda: layer.to("cpu"),
                 lambda: fastrnn.device_array(x), lambda: fastrnn.LSTM(3, 4, device="cuda")):
        try:
            call()
        except RuntimeError as error:
            print("forked" in str(error), flush=True)
    fastrnn.LSTM(3, 4)(x)  # the CPU works
    del layer
    print("child done", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print((layer(x)[0] == want).all())
""",
        FASTRNN_CUDA="emulated",
    )
    assert result.stdout.splitlines() == [*["True"] * 5, "child done", "True"], result.stderr


def test_the_process_ends_in_order() -> None:
    """Arrays, tapes, streams and capsules that are alive at the end disturb nobody."""
    result = run_python(
        """
import fastrnn, numpy as np
from fastrnn import nn
x = np.ones((2, 1, 3), np.float32)
model = nn.Sequential(fastrnn.LSTM(3, 4, device="cuda"))
kept = [model.forward(fastrnn.device_array(x)), model.freeze().stream(1)]
kept.append(kept[0][0].__dlpack__(stream=1))
class Cycle: pass
cycle = Cycle()
cycle.self, cycle.kept = cycle, kept
print("end")
"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")
