"""Training on the device, on the emulated GPU: the CPU's bits, wherever it says so.

Optimisers, losses, linear layer, embedding and dropout do the CPU's arithmetic in the CPU's order,
gradients of the linear layer apart, whose sums are in another order.
"""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import cuda_producers as producers
import fastrnn
import numpy as np
import pytest
from conftest import assert_gradient_close, assert_same_bits
from fastrnn import _core, _device, nn, optim

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

# One multiply-add, one rounding: so is the GPU's, and SSE2 has none.
fused = pytest.mark.skipif(_core.isa() == "baseline", reason="the CPU rounds twice here")
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])

there = fastrnn.device_array


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def same(got: Any, want: np.ndarray, what: str = "") -> None:
    """The bits of ``want``, on the device."""
    assert isinstance(got, fastrnn.DeviceArray), what
    assert_same_bits(got.numpy(), want, what)


# --- Optimisers ---------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: optim.AdamW(p, 0.01, betas=(0.8, 0.95), eps=1e-6),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@every_optimizer
@both_dtypes
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.5}, {"clip_value": 0.3}], ids=str)
def test_steps_have_the_cpus_bits(
    name: str, dtype: str, clip: dict[str, float], rng: np.random.Generator
) -> None:
    here = nn.Linear(37, 50, dtype=dtype, rng=1)
    on_device = copy.deepcopy(here).to("cuda")
    optimizers = [OPTIMIZERS[name](here), OPTIMIZERS[name](on_device)]
    for _ in range(4):
        grads = {key: draw(rng, *array.shape, dtype=dtype) for key, array in here.params.items()}
        norms = [
            optimizers[0].step(grads, **clip),
            optimizers[1].step({key: there(g) for key, g in grads.items()}, **clip),
        ]
        assert norms[0] == norms[1]
        same(on_device.flat, here.flat)
    states = [optimizer.state_dict() for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for key, want in states[0].items():
        assert_same_bits(states[1][key], want, key)


@every_optimizer
def test_subnormals_are_zero_as_on_the_cpu(name: str, rng: np.random.Generator) -> None:
    here = {"w": draw(rng, 4000) * np.float32(1e-30)}
    on_device = {"w": there(here["w"])}
    optimizers = [OPTIMIZERS[name](here), OPTIMIZERS[name](on_device)]
    for _ in range(3):
        exponents = rng.uniform(-44, -15, 4000)
        grads = (np.sign(draw(rng, 4000)) * 10**exponents).astype(np.float32)
        optimizers[0].step({"w": grads})
        optimizers[1].step({"w": there(grads)})
        same(on_device["w"], here["w"])


@every_optimizer
def test_optimisers_follow_their_module(name: str, rng: np.random.Generator) -> None:
    """Moments move with the parameters; and a state saved on one device goes on on the other."""
    modules = [nn.Linear(4, 5, rng=1) for _ in range(3)]
    optimizers = [OPTIMIZERS[name](module) for module in modules]
    for step in range(6):
        grads = {key: draw(rng, *array.shape) for key, array in modules[0].params.items()}
        if step in (2, 4):
            modules[1].to("cuda" if step == 2 else "cpu")
        if step == 3:
            modules[2].to("cuda")
            again = OPTIMIZERS[name](modules[2])
            again.load_state_dict(optimizers[2].state_dict())
            optimizers[2] = again
        for module, optimizer in zip(modules, optimizers, strict=True):
            cuda_side = module.device == "cuda"
            optimizer.step({k: there(g) if cuda_side else g for k, g in grads.items()})
    assert_same_bits(modules[1].flat, modules[0].flat)
    same(modules[2].flat, modules[0].flat)


def test_parameters_that_are_no_views_of_one_buffer(rng: np.random.Generator) -> None:
    arrays = {"a": draw(rng, 3, 4), "b": draw(rng, 5)}
    grads = {key: draw(rng, *array.shape) for key, array in arrays.items()}
    on_device = {key: there(array) for key, array in arrays.items()}
    optim.Adam(arrays, 0.1).step(grads, clip_norm=1)
    optim.Adam(on_device, 0.1).step({key: there(g) for key, g in grads.items()}, clip_norm=1)
    for key, want in arrays.items():
        same(on_device[key], want, key)


def test_gradients_of_another_library(rng: np.random.Generator) -> None:
    module = nn.Linear(3, 4, rng=1)
    on_device = copy.deepcopy(module).to("cuda")
    grads = {key: draw(rng, *array.shape) for key, array in module.params.items()}
    optim.SGD(module, 0.1).step(grads)
    optim.SGD(on_device, 0.1).step({k: producers.Producer(there(g)) for k, g in grads.items()})
    same(on_device.flat, module.flat)


def test_norms_and_clipping(rng: np.random.Generator) -> None:
    grads = {"a": draw(rng, 50, 99), "b": draw(rng, 3), "none": draw(rng, 0)}
    on_device = {key: there(array) for key, array in grads.items()}
    assert optim.global_norm(on_device) == optim.global_norm(grads)
    assert optim.clip_by_norm(on_device, 2.0) == optim.clip_by_norm(grads, 2.0)
    for key, want in grads.items():
        same(on_device[key], want, key)
    optim.clip_by_value(on_device, 0.01)
    optim.clip_by_value(grads, 0.01)
    for key, want in grads.items():
        same(on_device[key], want, key)
    for scale in (1e-30, 1e30):  # whose squares have left float64's range
        huge = {"a": there(np.float64([3, 4]) * scale**6)}
        assert optim.global_norm(huge) == pytest.approx(5 * scale**6, rel=1e-12)


def test_a_gradient_that_is_no_number_changes_nothing(rng: np.random.Generator) -> None:
    module = nn.Linear(3, 4, rng=1).to("cuda")
    before = module.flat.numpy()
    grads = {key: there(draw(rng, *array.shape)) for key, array in module.params.items()}
    grads["bias"][1:2] = np.nan
    with pytest.raises(FloatingPointError, match="in 'bias'; nothing was changed"):
        optim.Adam(module).step(grads, clip_norm=1)
    same(module.flat, before)
    with pytest.raises(FloatingPointError):
        optim.clip_by_value(grads, 1.0)


def test_optimisers_refuse(rng: np.random.Generator) -> None:
    module = nn.Linear(3, 4, rng=1).to("cuda")
    optimizer = optim.SGD(module, 0.1)
    grads = {key: draw(rng, *array.shape) for key, array in module.params.items()}
    with pytest.raises(TypeError, match=r"^grads\['weight'\]: expected an array on the device"):
        optimizer.step(grads)
    with pytest.raises(TypeError, match=r"^grads\['weight'\]: expected an array of float32, got f"):
        optimizer.step({key: there(g.astype("float64")) for key, g in grads.items()})
    with pytest.raises(ValueError, match=r"^grads\['weight'\]: expected shape \(4, 3\), got \(3, "):
        optimizer.step({"weight": there(draw(rng, 3, 4)), "bias": there(grads["bias"])})
    with pytest.raises(TypeError, match=r"^grads\['weight'\]: expected an array on the CPU"):
        optim.SGD(nn.Linear(3, 4), 0.1).step({key: there(g) for key, g in grads.items()})
    with pytest.raises(ValueError, match="arrays on one device"):
        optim.SGD({"a": there(draw(rng, 2)), "b": draw(rng, 2)}, 0.1)
    whole = there(draw(rng, 4, 4))
    with pytest.raises(ValueError, match=r"^params\['a'\]: expected a writable C-contiguous"):
        optim.SGD({"a": whole[:, 1:3]}, 0.1)
    with pytest.raises(TypeError, match=r"^params: expected 'float32' or 'float64'"):
        optim.SGD({"a": there(draw(rng, 2), dtype="bfloat16")}, 0.1)


# --- Losses -------------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("V", [1, 2, 15, 100, 1000])
@pytest.mark.parametrize("masked", [False, True])
@fused
def test_cross_entropy_has_the_cpus_bits(
    V: int, masked: bool, dtype: str, rng: np.random.Generator
) -> None:
    z = (draw(rng, 6, 5, V) * 8).astype(dtype)
    t = rng.integers(0, V, (6, 5))
    mask = rng.random((6, 5)) < 0.6 if masked else None
    if mask is not None:
        t[~mask] = -100  # any integer will do
    loss, dz = nn.softmax_cross_entropy(z, t, mask)
    for targets in (t, t.astype(np.int32), there(t), there(t.astype(np.int32))):
        for keep in (mask,) if mask is None else (mask, there(mask)):
            got, gradient = nn.softmax_cross_entropy(there(z), targets, keep)
            assert got == loss
            same(gradient, dz)


def test_cross_entropy_of_little_or_nothing(rng: np.random.Generator) -> None:
    z = draw(rng, 3, 4)
    nobody = nn.softmax_cross_entropy(there(z), np.zeros(3, int), np.zeros(3, bool))
    assert nobody[0] == 0 and not nobody[1].numpy().any()
    loss, dz = nn.softmax_cross_entropy(there(z[:0]), np.zeros(0, int))
    assert loss == 0 and dz.shape == (0, 4)
    loss, dz = nn.softmax_cross_entropy(there(z[0]), np.int64(2))
    want = nn.softmax_cross_entropy(z[0], np.int64(2))
    assert loss == pytest.approx(want[0], rel=1e-15) and dz.shape == (4,)
    strided = there(draw(rng, 6, 8))
    got = nn.softmax_cross_entropy(strided[1:4, 2:6], np.array([0, 3, 1]))
    want = nn.softmax_cross_entropy(strided.numpy()[1:4, 2:6], np.array([0, 3, 1]))
    assert got[0] == pytest.approx(want[0], rel=1e-15)
    np.testing.assert_allclose(got[1].numpy(), want[1], rtol=0, atol=1e-7)


def test_cross_entropy_refuses(rng: np.random.Generator) -> None:
    z = there(draw(rng, 3, 4))
    for targets in (np.array([0, 4, 1]), np.array([0, -1, 1])):
        for form in (targets, there(targets), producers.Producer(there(targets))):
            given = form if not isinstance(form, producers.Producer) else cuda.Array.import_(form)
            with pytest.raises(ValueError, match=r"^targets: expected integers in \[0, 4\), got "):
                nn.softmax_cross_entropy(z, given)
    with pytest.raises(TypeError, match=r"^logits: expected an array of float32 or float64, got i"):
        nn.softmax_cross_entropy(there(np.zeros((3, 4), int)), np.zeros(3, int))
    with pytest.raises(TypeError, match=r"^targets: expected an array of int64 or int32, got fl"):
        nn.softmax_cross_entropy(z, there(np.zeros(3)))
    with pytest.raises(ValueError, match=r"^targets: expected shape \(3,\), got \(4,\)"):
        nn.softmax_cross_entropy(z, there(np.zeros(4, int)))
    with pytest.raises(ValueError, match=r"^logits: expected shape"):
        nn.softmax_cross_entropy(z[:, 0:0], np.zeros(3, int))


@both_dtypes
def test_mean_squared_error(dtype: str, rng: np.random.Generator) -> None:
    p, t = draw(rng, 5, 4, 3, dtype=dtype), draw(rng, 5, 4, 3, dtype=dtype)
    full = rng.random((5, 4, 3)) < 0.5
    for mask in (None, full, full[..., 0], np.zeros((5, 4), bool)):
        loss, dp = nn.mean_squared_error(p, t, mask)
        for target in (t, there(t)):
            got, gradient = nn.mean_squared_error(there(p), target, mask)
            assert got == pytest.approx(loss, rel=1e-14)
            same(gradient, dp)
    with pytest.raises(TypeError, match=r"^target: expected an array of"):
        nn.mean_squared_error(there(p), there(t.astype("float64" if dtype == "float32" else "f4")))


# --- Modules without state ----------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("bias", [True, False])
@fused
def test_linear(bias: bool, dtype: str, rng: np.random.Generator) -> None:
    here = nn.Linear(19, 33, bias=bias, dtype=dtype, rng=1)
    on_device = copy.deepcopy(here).to("cuda")
    x, dy = draw(rng, 4, 7, 19, dtype=dtype), draw(rng, 4, 7, 33, dtype=dtype)
    want = here(x)
    same(on_device(there(x)), want)
    assert_same_bits(on_device(x), want)  # NumPy in, NumPy out
    y, tape = here.forward(x)
    g = tape.backward(dy)
    for move in (there, np.asarray):
        y, tape = on_device.forward(move(x))
        got = tape.backward(move(dy))
        assert isinstance(y, np.ndarray) == isinstance(got.x, np.ndarray) == (move is np.asarray)
        assert_same_bits(np.asarray(y), want)
        assert_same_bits(np.asarray(got.x), g.x, "dx")
        assert got.params.keys() == g.params.keys()
        for name, array in g.params.items():
            assert_gradient_close(got.params[name].numpy(), array, name)
    into = {name: there(np.ones_like(array)) for name, array in g.params.items()}
    y, tape = on_device.forward(there(x))
    added = tape.backward(there(dy), into=into)
    assert added.params is into
    for name, array in g.params.items():
        assert_gradient_close(into[name].numpy(), array + 1, name)
    with pytest.raises(RuntimeError, match="consumed"):
        tape.backward(there(dy))


@both_dtypes
def test_embedding(dtype: str, rng: np.random.Generator) -> None:
    here = nn.Embedding(11, 6, dtype=dtype, rng=1)
    on_device = copy.deepcopy(here).to("cuda")
    ids, dy = rng.integers(0, 10, (9, 8)), draw(rng, 9, 8, 6, dtype=dtype)
    y, tape = here.forward(ids)
    g = tape.backward(dy)
    for form in (ids, there(ids), there(ids.astype(np.int32)), producers.Producer(there(ids))):
        got, tape = on_device.forward(form)
        assert_same_bits(np.asarray(got), y)
        grads = tape.backward(there(dy))
        assert grads.x is None
        same(grads.params["weight"], g.params["weight"])
    for bad in (np.array([11]), np.array([-1])):
        for form in (bad, there(bad), producers.Producer(there(bad))):
            with pytest.raises(ValueError, match=r"^x: expected integers in \[0, 11\), got "):
                on_device(form)
    with pytest.raises(TypeError, match=r"^x: expected an array of int64 or int32, got float32"):
        on_device(there(draw(rng, 3)))
    assert on_device(np.zeros((0, 3), int)).shape == (0, 3, 6)


@both_dtypes
def test_dropout(dtype: str, rng: np.random.Generator) -> None:
    x, dy = draw(rng, 20, 30, dtype=dtype), draw(rng, 20, 30, dtype=dtype)
    for p in (0.0, 0.3, 0.9):
        here, on_device = nn.Dropout(p, rng=3), nn.Dropout(p, rng=3).to("cuda")
        assert on_device.device == "cuda"
        y, tape = here.forward(x)
        got, tape_there = on_device.forward(there(x))
        same(got, y)
        same(tape_there.backward(there(dy)).x, tape.backward(dy).x)
        same(on_device(there(x)), x)


def test_modules_keep_their_own_copies(rng: np.random.Generator) -> None:
    module = nn.Linear(3, 4, rng=1).to("cuda")
    x, dy = there(draw(rng, 5, 3)), there(draw(rng, 5, 4))
    want = module.forward(x)[1].backward(dy)
    _, tape = module.forward(x)
    x[...] = 0
    module.flat[...] = 0
    got = tape.backward(dy)
    same(got.x, want.x.numpy())
    same(got.params["weight"], want.params["weight"].numpy())
    frozen = nn.Linear(3, 4, rng=1).to("cuda").freeze()
    assert frozen.device == "cuda"
    again = pickle.loads(pickle.dumps(frozen))
    x = draw(rng, 2, 3)
    assert_same_bits(again(x), nn.Linear(3, 4, rng=1)(x))
    table = nn.Embedding(5, 2, rng=1).to("cuda").freeze()
    assert_same_bits(pickle.loads(pickle.dumps(table))(np.arange(5)), np.asarray(table._weight))


def test_modules_refuse(rng: np.random.Generator) -> None:
    module = nn.Linear(3, 4, rng=1).to("cuda")
    y, tape = module.forward(there(draw(rng, 5, 3)))
    with pytest.raises(ValueError, match=r"^dy: expected shape \(5, 4\), got \(5, 3\)"):
        tape.backward(there(draw(rng, 5, 3)))
    for into, error, match in (
        (
            {"weight": np.zeros((4, 3), "f4"), "bias": there(np.zeros(4, "f4"))},
            TypeError,
            "DeviceArray",
        ),
        (
            {"weight": there(np.zeros((4, 3))), "bias": there(np.zeros(4))},
            TypeError,
            "float32, got",
        ),
        ({"weight": there(np.zeros((3, 4), "f4")), "bias": y}, ValueError, "shape"),
        ({"weight": there(np.zeros((4, 6), "f4"))[:, 1:4], "bias": y}, ValueError, "strided"),
    ):
        with pytest.raises(error, match=rf"^into\['weight'\]: expected .*{match}"):
            tape.backward(there(draw(rng, 5, 4)), into=into)
    tape.backward(draw(rng, 5, 4))  # it was not used up
    with pytest.raises(TypeError, match=r"^x: expected an array of float32, got float64"):
        module(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"^x: expected shape \(\.\.\., 3\), got \(2, 4\)"):
        module(there(draw(rng, 2, 4)))
    with pytest.raises(TypeError, match=r"^x: expected an array on the CPU, where the layer is"):
        nn.Linear(3, 4)(there(draw(rng, 2, 3)))


# --- The kernels' other functions ---------------------------------------------------------------


def test_where_and_add(rng: np.random.Generator) -> None:
    x = draw(rng, 3, 4, 5)
    mask = rng.random((4, 1)) < 0.5
    same(cuda.where(mask, there(x)), np.where(mask, x, np.float32(0)))
    total = there(x)
    cuda.add(total[1:, :, 2:4], there(x[1:, :, 2:4]))
    x[1:, :, 2:4] += x[1:, :, 2:4]
    same(total, x)
    for bad in (there(x[:2]), there(x.astype("f8"))):
        with pytest.raises((TypeError, ValueError), match=r"^values: expected "):
            cuda.add(total, bad)


def test_one_dimensional_views_join(rng: np.random.Generator) -> None:
    flat = there(draw(rng, 20))
    parts = [flat[0:6].reshape(2, 3), flat[6:6], flat[6:20]]
    assert _device.joined(parts).shape == (20,)
    assert _device.joined(parts[1:]).shape == (14,)
    assert _device.joined(parts[::-1]) is None
    assert _device.joined([parts[0], flat[7:20]]) is None
    assert _device.joined([parts[0], flat[6:20].copy()]) is None
    assert _device.joined([flat.reshape(4, 5)[:, 1:2]]) is None
    assert _device.joined([parts[0], np.zeros(3)]) is None
