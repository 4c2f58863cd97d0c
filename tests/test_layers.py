"""The layers as objects: options, initial values, parameters, saving, freezing, streams, import.

What the layers compute is in test_against_reference.py.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import pickle
import statistics
import sys
from typing import Any

import fastrnn
import numpy as np
import pytest
from conftest import CELLS, assert_same_bits, make_layer, map_state, run_python, state_arrays
from fastrnn import _device

I, H = 6, 8
LAYERS = [fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU]
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}

every_layer = pytest.mark.parametrize("Layer", LAYERS, ids=lambda layer: layer.__name__)
every_cell = pytest.mark.parametrize("cell", CELLS)


def x_of(rng: np.random.Generator, *shape: int, dtype: Any = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


# --- Options ------------------------------------------------------------------------------------


@every_layer
def test_attributes(Layer: Any) -> None:
    layer = Layer(I, H)
    want = {"input_size": I, "hidden_size": H, "num_layers": 1, "bias": True, "dropout": 0.0}
    want |= {"batch_first": False, "bidirectional": False, "device": "cpu"}
    want |= {"dtype": np.dtype("float32")}
    assert {name: getattr(layer, name) for name in want} == want
    assert isinstance(layer.rng, np.random.Generator)
    layer = Layer(
        np.int64(3), np.uint8(4), 2, bias=False, batch_first=True, dropout=0.5, bidirectional=True,
        dtype=np.float64, device="cpu", rng=np.random.default_rng(1), init="orthogonal",
    )  # fmt: skip
    want = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bias": False, "dropout": 0.5}
    want |= {"batch_first": True, "bidirectional": True, "dtype": np.dtype("float64")}
    assert {name: getattr(layer, name) for name in want} == want
    assert type(layer.input_size) is int and type(layer.hidden_size) is int


def test_options_of_the_cells() -> None:
    assert fastrnn.RNN(1, 1).nonlinearity == "tanh"
    assert fastrnn.RNN(1, 1, nonlinearity="relu").nonlinearity == "relu"
    assert fastrnn.GRU(1, 1).reset_after is True
    assert fastrnn.GRU(1, 1, reset_after=False).reset_after is False


BAD_OPTIONS: list[tuple[type[Exception], dict[str, Any]]] = [
    (TypeError, {"bias": 1}),
    (TypeError, {"bias": "yes"}),
    (TypeError, {"batch_first": None}),
    (TypeError, {"bidirectional": 2}),
    (TypeError, {"dtype": None}),
    (TypeError, {"dtype": "floating"}),
    (ValueError, {"dtype": "float16"}),
    (ValueError, {"dtype": "int32"}),
    (ValueError, {"dtype": ">f4"}),
    (ValueError, {"device": "tpu"}),
    (TypeError, {"device": 0}),
    (TypeError, {"rng": "seed"}),
    (TypeError, {"rng": True}),
    (TypeError, {"rng": np.random.RandomState(0)}),
    (ValueError, {"rng": -1}),
    (ValueError, {"init": "zeros"}),
    (TypeError, {"init": None}),
]


@every_layer
@pytest.mark.parametrize(("error", "option"), BAD_OPTIONS)
def test_bad_options(Layer: Any, error: type[Exception], option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(error, match=f"^{name}: expected .*, got "):
        Layer(I, H, **option)


def test_bad_options_of_the_cells() -> None:
    with pytest.raises(ValueError, match=r"^nonlinearity: expected one of 'tanh', 'relu', 's"):
        fastrnn.RNN(I, H, nonlinearity="linear")
    with pytest.raises(TypeError, match=r"^nonlinearity: "):
        fastrnn.RNN(I, H, nonlinearity=np.tanh)  # type: ignore[arg-type]
    for bad in (0, None, "yes"):
        with pytest.raises(TypeError, match=r"^reset_after: expected True or False"):
            fastrnn.GRU(I, H, reset_after=bad)  # type: ignore[arg-type]
    for bad in ("1", True, [1.0], 1j):
        with pytest.raises(TypeError, match=r"^forget_bias: "):
            fastrnn.LSTM(I, H, forget_bias=bad)  # type: ignore[arg-type]
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^forget_bias: "):
            fastrnn.LSTM(I, H, forget_bias=bad)
    with pytest.raises(ValueError, match=r"^forget_bias: expected None without biases"):
        fastrnn.LSTM(I, H, bias=False, forget_bias=1.0)
    for Layer in (fastrnn.RNN, fastrnn.GRU):
        with pytest.raises(TypeError, match="forget_bias"):
            Layer(I, H, forget_bias=1.0)  # type: ignore[call-arg]


@every_layer
def test_63_cuda_says_what_is_missing(Layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_CUDA", "")
    monkeypatch.setitem(sys.modules, "fastrnn._cuda", None)  # as in a build without it
    _device._cuda.cache_clear()
    try:
        config = fastrnn.show_config("dict")
        assert config is not None and config["cuda"] == "not in this build"
        with pytest.raises(RuntimeError, match=r"^device: expected 'cpu', got 'cuda', .*no CUDA"):
            Layer(I, H, device="cuda")
    finally:
        _device._cuda.cache_clear()


@every_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("D", [1, 2])
def test_names_and_shapes_are_pytorchs(Layer: Any, D: int, bias: bool) -> None:
    layer = Layer(I, H, 2, bias=bias, bidirectional=D == 2)
    rows, want = GATES[Layer.__name__] * H, {}
    for k in range(2):
        for end in (f"_l{k}", f"_l{k}_reverse")[:D]:
            want[f"weight_ih{end}"] = (rows, I if k == 0 else D * H)
            want[f"weight_hh{end}"] = (rows, H)
            if bias:
                want[f"bias_ih{end}"] = want[f"bias_hh{end}"] = (rows,)
    assert list(layer.params) == list(want)
    assert {name: array.shape for name, array in layer.params.items()} == want


# --- Initial values -----------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uniform(Layer: Any, dtype: str) -> None:
    """Every parameter from U(-1/√H, 1/√H), by its range and its first moments."""
    hidden = 128
    bound = 1 / np.sqrt(hidden)
    layer = Layer(64, hidden, dtype=dtype, rng=0)
    for name, array in layer.params.items():
        assert array.dtype == dtype
        assert np.abs(array).max() <= bound * (1 + 1e-6), name
        assert np.abs(array).max() > 0.95 * bound, name
        error = bound / np.sqrt(3 * array.size)  # of the mean
        assert abs(array.mean()) < 5 * error, name
        assert abs(array.std() / (bound / np.sqrt(3)) - 1) < 5 / np.sqrt(array.size), name
        quarters, _ = np.histogram(array, 4, (-bound, bound))
        assert np.abs(quarters / array.size - 0.25).max() < 5 * 0.433 / np.sqrt(array.size), name


@every_layer
def test_identity(Layer: Any) -> None:
    layer = Layer(300, H, 2, bidirectional=True, init="identity", rng=0)
    for name, array in layer.params.items():
        if name.startswith("weight_hh"):
            for gate in array.reshape(-1, H, H):
                np.testing.assert_array_equal(gate, np.eye(H))
        elif name.startswith("bias"):
            assert not array.any()
        else:
            assert abs(array.mean()) < 5e-3 / np.sqrt(array.size), name
            assert abs(array.std() / 1e-3 - 1) < 5 / np.sqrt(array.size), name


@every_layer
def test_orthogonal(Layer: Any) -> None:
    layer = Layer(50, 40, 2, init="orthogonal", dtype="float64", rng=0)
    gates = []
    for name, array in layer.params.items():
        if name.startswith("weight_hh"):
            for gate in array.reshape(-1, 40, 40):
                np.testing.assert_allclose(gate @ gate.T, np.eye(40), atol=1e-12)
                gates.append(gate)
        elif name.startswith("bias"):
            assert not array.any()
        else:
            bound = np.sqrt(6 / (40 + array.shape[1]))
            assert 0.99 * bound < np.abs(array).max() <= bound
    assert all(np.abs(a - b).max() > 0.1 for a, b in itertools.pairwise(gates))
    # Uniform among all orthogonal matrices: the diagonal has no preferred sign.
    signs = np.concatenate([np.sign(np.diagonal(gate)) for gate in gates])
    assert abs(signs.mean()) < 5 / np.sqrt(len(signs))


@pytest.mark.parametrize("init", ["uniform", "identity", "orthogonal"])
def test_forget_bias(init: str) -> None:
    layer = fastrnn.LSTM(I, H, 2, bidirectional=True, init=init, forget_bias=1.5, rng=3)
    plain = fastrnn.LSTM(I, H, 2, bidirectional=True, init=init, rng=3)
    for name, array in layer.params.items():
        want = plain.params[name].copy()
        if name.startswith("bias"):
            want[H : 2 * H] = 1.5 if name.startswith("bias_ih") else 0
        np.testing.assert_array_equal(array, want)


@every_layer
def test_seeds(Layer: Any) -> None:
    """The same seed, the same layer; a generator goes on; none means chance."""
    a, b, c = Layer(I, H, rng=5), Layer(I, H, rng=5), Layer(I, H, rng=6)
    assert_same_bits(a.flat, b.flat)
    assert (a.flat != c.flat).any() and (Layer(I, H).flat != Layer(I, H).flat).any()
    rng = np.random.default_rng(5)
    first, second = Layer(I, H, rng=rng), Layer(I, H, rng=rng)
    assert_same_bits(first.flat, a.flat)
    assert (first.flat != second.flat).any() and first.rng is rng


def test_dropout_draws_from_the_layers_generator(rng: np.random.Generator) -> None:
    """The masks of two layers of one seed are alike, those of two passes are not."""
    x = x_of(rng, 4, 3, I)
    a, b = (fastrnn.LSTM(I, H, 2, dropout=0.5, rng=2) for _ in range(2))
    first, _, tape = a.forward(x)
    assert_same_bits(b.forward(x)[0], first)
    assert isinstance(tape.dropout_key, int) and 0 <= tape.dropout_key < 2**64
    assert (a.forward(x)[0] != first).any()
    assert_same_bits(a(x)[0], fastrnn.LSTM(I, H, 2, rng=2)(x)[0])
    assert fastrnn.LSTM(I, H, 2).forward(x)[2].dropout_key is None
    assert fastrnn.LSTM(I, H, 1, dropout=0.5).forward(x)[2].dropout_key is None


# --- Parameters ---------------------------------------------------------------------------------


@every_cell
def test_parameters_are_live(cell: str, rng: np.random.Generator) -> None:
    """Written through a name, an element or the flat buffer: the next call sees it."""
    layer, x = make_layer(cell, I, H, 2), x_of(rng, 5, 3, I)
    seen = [layer(x)[0]]
    layer.params["weight_ih_l0"][0, 0] += 1
    seen.append(layer(x)[0])
    layer.params["weight_hh_l1"] = np.zeros_like(layer.params["weight_hh_l1"])
    seen.append(layer(x)[0])
    layer.params["bias_ih_l0"] *= 2
    seen.append(layer(x)[0])
    layer.flat *= 0.5
    seen.append(layer(x)[0])
    assert all((a != b).any() for k, a in enumerate(seen) for b in seen[:k])
    start = 0
    for array in layer.params.values():
        assert np.shares_memory(array, layer.flat) and array.flags.writeable
        assert_same_bits(array.ravel(), layer.flat[start : start + array.size])
        start += array.size
    assert start == layer.flat.size
    layer.flat[:] = 0
    y, _ = layer(x)
    assert (y == (0.5 if cell == "rnn_sigmoid" else 0)).all()


def test_the_names_of_parameters_are_fixed() -> None:
    layer = make_layer("lstm", I, H)
    before = layer.flat.copy()
    with pytest.raises(KeyError, match="expected one of"):
        layer.params["weight"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"expected shape \(32,\), got \(8,\)"):
        layer.params["bias_ih_l0"] = np.zeros(8, np.float32)
    with pytest.raises(TypeError):
        layer.params["bias_ih_l0"] = np.zeros(32, complex)
    for change in (
        lambda: layer.params.clear(),
        lambda: layer.params.pop("bias_ih_l0"),
        lambda: layer.params.popitem(),
        lambda: layer.params.setdefault("a", 1),
        lambda: layer.params.__delitem__("bias_ih_l0"),
    ):
        with pytest.raises(TypeError, match="fixed"):
            change()
    assert_same_bits(layer.flat, before)


@every_cell
def test_state_dict(cell: str, rng: np.random.Generator) -> None:
    layer, other = make_layer(cell, I, H, 2, 2), make_layer(cell, I, H, 2, 2, rng=9)
    saved, flat = layer.state_dict(), other.flat
    assert not any(np.shares_memory(array, layer.flat) for array in saved.values())
    other.load_state_dict(saved)
    assert other.flat is flat
    assert_same_bits(flat, layer.flat)
    saved["weight_ih_l0"][:] = 0
    assert layer.params["weight_ih_l0"].any() and other.params["weight_ih_l0"].any()
    x = x_of(rng, 4, 2, I)
    assert_same_bits(layer(x)[0], other(x)[0])
    layer.load_state_dict(layer.params)
    assert_same_bits(flat, layer.flat)


def test_state_dict_of_another_layer() -> None:
    """All that does not fit is listed at once, and nothing is loaded."""
    layer = make_layer("lstm", I, H)
    before = layer.flat.copy()
    state = make_layer("lstm", I + 1, H, 2, rng=1).state_dict()
    del state["bias_hh_l0"]
    with pytest.raises(ValueError) as info:
        layer.load_state_dict(state)
    for part in ("missing 'bias_hh_l0'", "unknown 'bias_ih_l1'", "unknown 'weight_hh_l1'"):
        assert part in str(info.value)
    assert "'weight_ih_l0' of shape (32, 7) instead of (32, 6)" in str(info.value)
    for bad in (None, 3, [("a", 1)], "abc"):
        with pytest.raises(TypeError, match=r"^state: expected a mapping"):
            layer.load_state_dict(bad)  # type: ignore[arg-type]
    good = layer.state_dict()
    for dtype in (int, complex, object, "S4", bool):
        with pytest.raises(TypeError, match=r"^state\['bias_hh_l0'\]: expected"):
            layer.load_state_dict({**good, "bias_hh_l0": np.zeros(4 * H, dtype)})
    assert_same_bits(layer.flat, before)


# --- Copies, configuration, text ----------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
def test_copies_of_layers(cell: str, how: str, rng: np.random.Generator) -> None:
    """The same results, and nothing shared that can be written."""
    layer, x = make_layer(cell, I, H, 2, dropout=0.5), x_of(rng, 4, 2, I)
    functions: dict[str, Any] = {"deepcopy": copy.deepcopy, "copy": copy.copy}
    functions["pickle"] = lambda value: pickle.loads(pickle.dumps(value))
    other = functions[how](layer)
    assert other.config() == layer.config() and repr(other) == repr(layer)
    want = layer(x)[0]
    assert_same_bits(other(x)[0], want)
    if how != "copy":  # which shares the generator
        assert_same_bits(other.forward(x)[0], layer.forward(x)[0])
    assert all(np.shares_memory(array, other.flat) for array in other.params.values())
    other.params["weight_ih_l0"][:] = 7
    other.flat[-1] = 7
    assert_same_bits(layer(x)[0], want)


@every_cell
def test_config(cell: str) -> None:
    """JSON there and back makes the same layer, its values apart."""
    for options in ({}, {"bias": False, "batch_first": True, "dropout": 0.25, "dtype": "float64"}):
        layer = make_layer(cell, I, H, 2, 2, **options)
        config = json.loads(json.dumps(layer.config()))
        other = type(layer)(**config)
        assert other.config() == layer.config()
        other.load_state_dict(layer.state_dict())
        x = np.ones((3, 2, I), layer.dtype)
        assert_same_bits(other(x)[0], layer(x)[0])


def test_repr() -> None:
    """The constructor's call, without defaults."""
    cases = {
        "LSTM(input_size=6, hidden_size=8)": fastrnn.LSTM(6, 8),
        "GRU(input_size=6, hidden_size=8, num_layers=2, reset_after=False)": fastrnn.GRU(
            6, 8, 2, reset_after=False
        ),
        "RNN(input_size=1, hidden_size=2, bias=False, dtype='float64', nonlinearity='relu')": (
            fastrnn.RNN(1, 2, bias=False, dtype="float64", nonlinearity="relu")
        ),
        "LSTM(input_size=1, hidden_size=2, num_layers=2, batch_first=True, dropout=0.5, "
        "bidirectional=True)": fastrnn.LSTM(
            1, 2, 2, batch_first=True, dropout=0.5, bidirectional=True
        ),
    }
    for text, layer in cases.items():
        assert repr(layer) == text
        again = eval(text, {name: getattr(fastrnn, name) for name in GATES})
        assert again.config() == layer.config()
    assert "lstm" in repr(fastrnn.LSTM(6, 8).freeze())


# --- Freezing and streaming ---------------------------------------------------------------------


@every_cell
def test_freezing(cell: str, rng: np.random.Generator) -> None:
    """The layer's bits, whatever becomes of the layer."""
    layer, x = make_layer(cell, I, H, 2, 2), x_of(rng, 7, 3, I)
    rows = {"lengths": [7, 0, 3], "reset": rng.random((7, 3)) < 0.3}
    want_y, want = layer(x, **rows)
    frozen = layer.freeze()
    layer.flat[:] = np.nan
    state = map_state(np.zeros_like, want)
    y, final = frozen(x, state, **rows, threads=2)
    assert_same_bits(y, want_y)
    for a, b in zip(state_arrays(final), state_arrays(want), strict=True):
        assert_same_bits(a, b)
    assert (frozen.input_size, frozen.hidden_size, frozen.dtype) == (I, H, np.float32)
    for name in ("batch_first", "dtype", "hidden_size", "weights"):
        with pytest.raises(AttributeError):
            setattr(frozen, name, 1)
    assert frozen.batch_first is False


def test_freezing_to_a_dtype() -> None:
    layer = make_layer("gru_reset_after", I, H, dtype="float64")
    assert layer.freeze("float64").dtype == layer.freeze(weights=None).dtype == np.float64
    with pytest.raises(ValueError, match=r"^weights: "):
        layer.freeze("float32")
    with pytest.raises(TypeError, match=r"^weights: "):
        layer.freeze(3)


@every_cell
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False])
def test_pickled_frozen_networks(
    cell: str, dtype: str, bias: bool, rng: np.random.Generator
) -> None:
    """The same bits, on other instruction sets too, and a second time."""
    layer = make_layer(cell, I, 21, 2, 2, dtype=dtype, bias=bias, batch_first=True)
    if bias:
        layer.params["bias_ih_l0"][:3] = layer.params["bias_hh_l0"][:3] = -0.0
    x = x_of(rng, 3, 5, I, dtype=dtype)
    x[:, ::2] = 0
    frozen = layer.freeze()
    again = pickle.loads(pickle.dumps(frozen))
    twice = copy.deepcopy(again)
    for other in (again, twice):
        assert other.batch_first is True and other.dtype == dtype
        assert_same_bits(other(x)[0], layer(x)[0])
    assert repr(again) == repr(frozen)


def test_streams(rng: np.random.Generator) -> None:
    layer = make_layer("lstm", I, H, 2)
    frozen, x = layer.freeze(), x_of(rng, 9, 4, I)
    assert frozen.stream().batch_size == 1
    stream = frozen.stream(4)
    assert stream.batch_size == 4 and isinstance(stream, fastrnn.Stream)
    assert all(not array.any() and array.shape == (2, 4, H) for array in stream.state)

    state = tuple(rng.uniform(-1, 1, (2, 4, H)).astype(np.float32) for _ in range(2))
    stream.state = state
    h, c = stream.state
    assert_same_bits(h, state[0])
    assert_same_bits(c, state[1])
    h[:] = np.nan  # a copy
    y, final = layer(x, state)
    out = np.empty((4, H), np.float32)
    for t in range(9):
        assert_same_bits(stream.step(x[t], out=out if t % 2 else None), y[t])
    for a, b in zip(stream.state, final, strict=True):
        assert_same_bits(a, b)

    stream.reset(2)
    for a, b in zip(stream.state, final, strict=True):
        assert not a[:, 2].any()
        assert_same_bits(a[:, [0, 1, 3]], b[:, [0, 1, 3]])
    stream.reset([-0, 3])
    assert not stream.state[0][:, [0, 2, 3]].any() and stream.state[0][:, 1].any()
    stream.state = state
    stream.reset(np.array([True, False, False, True]))
    assert not stream.state[1][:, [0, 3]].any() and stream.state[1][:, [1, 2]].all()
    stream.reset([])
    assert stream.state[1][:, [1, 2]].all()
    stream.reset()
    assert not any(array.any() for array in stream.state)
    stream.state = state
    stream.state = None
    assert not any(array.any() for array in stream.state)
    stream.state = (state[0], None)
    assert_same_bits(stream.state[0], state[0])
    assert not stream.state[1].any()


@every_cell
def test_streams_of_token_ids(cell: str, rng: np.random.Generator) -> None:
    layer = make_layer(cell, I, H, 2)
    ids = rng.integers(I, size=(6, 3))
    want, stream = layer(ids)[0], layer.freeze().stream(3)
    for t, dtype in enumerate(("u1", "i2", "i4", "i8", "u8", ">i4")):
        assert_same_bits(stream.step(ids[t].astype(dtype)), want[t])


def test_streams_of_bidirectional_networks() -> None:
    with pytest.raises(ValueError, match="expected a network of one direction"):
        make_layer("lstm", I, H, D=2).freeze().stream()


def test_streams_cannot_be_copied() -> None:
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            function(make_layer("lstm", I, H).freeze().stream())


# --- The package --------------------------------------------------------------------------------


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = fastrnn.show_config("dict")
    assert config is not None
    assert config["fastrnn"] == fastrnn.__version__ and config["numpy"] == np.__version__
    assert config["isa"] in config["isas"] and config["threads"] == fastrnn.get_num_threads()
    assert fastrnn.show_config() is None
    printed = capsys.readouterr().out
    assert all(name in printed for name in config) and config["cpu"] in printed
    with pytest.raises(ValueError, match=r"^mode: "):
        fastrnn.show_config("json")


def test_everything_public_exists() -> None:
    for name in fastrnn.__all__:
        assert getattr(fastrnn, name) is not None and name in dir(fastrnn)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastrnn.nonsense


def test_import_time() -> None:
    """The contract says 50 ms on top of NumPy's; three times that does not fail by chance."""
    code = """
import time
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import fastrnn
print(time.perf_counter() - middle)
"""
    run_python(code)  # byte code and pages are there from now on
    seconds = [float(run_python(code).stdout) for _ in range(5)]
    assert statistics.median(seconds) < 0.15, seconds


def test_import_loads_nothing_else() -> None:
    """Only NumPy and ourselves: no other package of any extra, none of our own optional parts."""
    code = """
import sys, numpy
before = set(sys.modules)
import fastrnn
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
print(*(name for name in sys.modules if name.startswith("fastrnn.")))
"""
    packages, own = run_python(code).stdout.splitlines()
    foreign = {
        name for name in packages.split() if name not in sys.stdlib_module_names and name != "numpy"
    }
    assert foreign == {"fastrnn"}
    assert not {"fastrnn.nn", "fastrnn.optim", "fastrnn.io", "fastrnn.cli"} & set(own.split())


def test_without_the_command_lines_extra() -> None:
    """The package and all of its public parts work where click, rich and matplotlib are missing."""
    code = """
import sys
for name in ("click", "rich", "matplotlib"):
    sys.modules[name] = None  # importing it is an ImportError
import numpy as np, fastrnn
for name in fastrnn.__all__:
    getattr(fastrnn, name)
fastrnn.LSTM(2, 3)(np.zeros((1, 1, 2), np.float32))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert importlib.util.find_spec("fastrnn.cli") is not None
