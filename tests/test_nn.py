"""fastrnn.nn: stateless modules, losses, Sequential; parameter buffers and the validator.

Values are compared with plain NumPy always and with torch.nn where it is installed; gradients with
central differences in float64. Numbers in names are those of the hostile cases.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastrnn
import hypothesis
import numpy as np
import pytest
from conftest import FINITE_DIFFERENCE_ATOL, FINITE_DIFFERENCE_RTOL
from fastrnn import _check, _core, _params, nn
from hypothesis import strategies as st

DTYPES = ["float32", "float64"]
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    return generator(seed).standard_normal(shape).astype(dtype)


def same(a: Any, b: Any) -> bool:
    """Equal bits, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def differences(f: Callable[[], float], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of f by each element of x, which f reads."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + step
        above = f()
        x[index] = kept - step
        below = f()
        x[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient


def assert_gradient(got: np.ndarray, f: Callable[[], float], x: np.ndarray) -> None:
    np.testing.assert_allclose(
        got, differences(f, x), atol=FINITE_DIFFERENCE_ATOL, rtol=FINITE_DIFFERENCE_RTOL
    )


# --- Linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (3, 4), (2, 0, 3)])
def test_linear_is_numpys_product(dtype: str, bias: bool, lead: tuple[int, ...]) -> None:
    layer = nn.Linear(7, 19, bias=bias, dtype=dtype, rng=0)
    x, dy = normal(*lead, 7, dtype=dtype), normal(*lead, 19, dtype=dtype, seed=1)
    w, b = layer.params["weight"].astype(float), layer.params.get("bias", np.zeros(19))
    y, tape = layer.forward(x)
    g = tape.backward(dy)
    rows, drows = x.reshape(-1, 7).astype(float), dy.reshape(-1, 19).astype(float)
    expected = {"weight": drows.T @ rows, "bias": drows.sum(0)}
    close = {"atol": 20 * TOLERANCE[dtype], "rtol": 0}
    np.testing.assert_allclose(y, x @ w.T + b, **close)
    np.testing.assert_allclose(g.x, dy @ w, **close)
    assert list(g.params) == list(layer.params)
    for name, array in g.params.items():
        np.testing.assert_allclose(array, expected[name], **close)
    assert y.dtype == g.x.dtype == g.params["weight"].dtype == dtype
    assert y.shape == (*lead, 19) and g.x.shape == x.shape and g.state is None
    assert same(layer(x), y) and same(layer.freeze()(x), y)
    assert _params.flat_view(g.params) is not None


def test_linear_against_torch() -> None:
    torch = pytest.importorskip("torch")
    layer = nn.Linear(33, 65, dtype="float64", rng=0)
    peer = torch.nn.Linear(33, 65, dtype=torch.float64)
    peer.load_state_dict({k: torch.tensor(v) for k, v in layer.state_dict().items()})
    x = torch.tensor(normal(4, 9, 33), requires_grad=True)
    dy = normal(4, 9, 65, seed=1)
    peer(x).backward(torch.tensor(dy))
    y, tape = layer.forward(x.detach().numpy())
    g = tape.backward(dy)
    np.testing.assert_allclose(y, peer(x).detach().numpy(), atol=1e-13)
    np.testing.assert_allclose(g.x, x.grad.numpy(), atol=1e-13)
    for name, parameter in peer.named_parameters():
        np.testing.assert_allclose(g.params[name], parameter.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_starts_as_torchs(dtype: str) -> None:
    layer = nn.Linear(100, 200, dtype=dtype, rng=0)
    for array in layer.params.values():
        assert np.abs(array).max() <= 0.1 and abs(array.std() - 0.1 / 3**0.5) < 0.01
    assert same(layer.flat, nn.Linear(100, 200, dtype=dtype, rng=generator(0)).flat)
    assert not same(layer.flat, nn.Linear(100, 200, dtype=dtype, rng=1).flat)


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_38_a_row_alone_or_in_a_batch(dtype: str) -> None:
    layer = nn.Linear(37, 29, dtype=dtype, rng=0)
    x = normal(23, 37, dtype=dtype)
    y = layer(x)
    assert all(same(layer(x[i]), y[i]) for i in range(23))


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_33_nan_stays_in_its_row(dtype: str) -> None:
    layer = nn.Linear(8, 5, dtype=dtype, rng=0)
    x = normal(6, 8, dtype=dtype)
    y = layer(x)
    x[2, 3] = np.nan
    z = layer(x)
    assert np.isnan(z[2]).all() and same(np.delete(z, 2, 0), np.delete(y, 2, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_37_threads_do_not_change_bits(dtype: str) -> None:
    x, dy = normal(500, 40, dtype=dtype), normal(500, 33, dtype=dtype, seed=1)
    ids, de = generator(2).integers(0, 9, 4000), normal(4000, 40, dtype=dtype, seed=3)
    linear, embedding = nn.Linear(40, 33, dtype=dtype, rng=0), nn.Embedding(9, 40, dtype=dtype)

    def run(threads: int) -> list[np.ndarray]:
        y, tape = linear.forward(x, threads=threads)
        g = tape.backward(dy, threads=threads)
        e, etape = embedding.forward(ids, threads=threads)
        eg = etape.backward(de, threads=threads)
        d, dtape = nn.Dropout(0.3, rng=0).forward(e, threads=threads)
        dg = dtape.backward(de, threads=threads)
        loss, dlogits = nn.softmax_cross_entropy(e, ids, threads=threads)
        return [
            y,
            g.x,
            *g.params.values(),
            e,
            *eg.params.values(),
            d,
            dg.x,
            dlogits,
            np.array(loss),
        ]

    for threads in (2, 3, 7):
        for one, many in zip(run(1), run(threads), strict=True):
            assert same(one, many)


# --- Embedding and Dropout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (6,), (4, 5), (3, 0)])
@pytest.mark.parametrize("kind", ["int64", "int32", "uint8"])
def test_embedding(dtype: str, shape: tuple[int, ...], kind: str) -> None:
    layer = nn.Embedding(11, 6, dtype=dtype, rng=0)
    ids = generator().integers(0, 11, shape).astype(kind)
    y, tape = layer.forward(ids)
    dy = normal(*shape, 6, dtype=dtype, seed=1)
    g = tape.backward(dy)
    expected = np.zeros((11, 6), dtype)
    np.add.at(expected, ids.reshape(-1), dy.reshape(-1, 6))
    assert same(y, layer.params["weight"][ids])
    assert same(g.params["weight"], expected)
    assert g.x is None and g.state is None
    assert same(layer(ids), y) and same(layer.freeze()(ids), y)


def test_embedding_starts_normal() -> None:
    weight = nn.Embedding(300, 100, rng=0).params["weight"]
    assert abs(weight.mean()) < 0.02 and abs(weight.std() - 1) < 0.02


@pytest.mark.parametrize("bad", [[-1], [5], [2**40], np.array([2**63], np.uint64)])
def test_embedding_refuses_ids_out_of_range(bad: Any) -> None:
    layer = nn.Embedding(5, 3)
    for call in (layer, layer.forward, layer.freeze()):
        with pytest.raises(ValueError, match="x: expected integers"):
            call(bad)


def splitmix64(z: int) -> int:
    mask = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_keeps_what_its_generator_says(dtype: str, p: float) -> None:
    x, dy = normal(7, 100, dtype=dtype), normal(7, 100, dtype=dtype, seed=1)
    key = int(generator(5).integers(2**64, dtype=np.uint64))
    keep = [(splitmix64((key + e) % 2**64) >> 11) * 2.0**-53 >= p for e in range(700)]
    factor = np.reshape(keep, (7, 100)) * np.array(1 / (1 - p), dtype)
    layer = nn.Dropout(p, rng=5)
    y, tape = layer.forward(x)
    assert np.array_equal(y, x * factor)
    assert np.array_equal(tape.backward(dy).x, dy * factor)
    assert same(layer(x), x) and same(layer.freeze()(x), x)
    assert not np.shares_memory(y, x)


def test_dropout_rate_and_new_masks() -> None:
    layer = nn.Dropout(0.25, rng=0)
    first, second = (layer.forward(np.ones(100_000))[0] == 0 for _ in range(2))
    assert abs(first.mean() - 0.25) < 0.005 and abs((first & second).mean() - 0.0625) < 0.003


def test_dropout_drops_nan_too() -> None:
    y, _ = nn.Dropout(0.5, rng=0).forward(np.full(1000, np.nan))
    assert 400 < (y == 0).sum() < 600


# --- losses


def numpy_cross_entropy(
    z: np.ndarray, t: np.ndarray, mask: np.ndarray | None
) -> tuple[float, np.ndarray]:
    z = z.astype(float)
    keep = np.ones(t.shape, bool) if mask is None else mask
    shifted = z - z.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p, t[..., None], -1)[..., 0]
    gradient = np.exp(log_p)
    np.put_along_axis(
        gradient, t[..., None], np.take_along_axis(gradient, t[..., None], -1) - 1, -1
    )
    return loss[keep].mean(), np.where(keep[..., None], gradient, 0) / keep.sum()


@hypothesis.given(
    lead=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    V=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_cross_entropy(
    lead: tuple[int, ...], V: int, dtype: str, masked: bool, scale: float
) -> None:
    z = (scale * normal(*lead, V)).astype(dtype)
    t = generator(1).integers(0, V, lead)
    mask = np.asarray(generator(2).random(lead) < 0.6) if masked else None
    if mask is not None and not mask.any():
        mask = ~mask
    loss, dlogits = nn.softmax_cross_entropy(z, t, mask)
    expected, gradient = numpy_cross_entropy(z, t, mask)
    tolerance = 1e-6 if dtype == "float32" else 1e-13
    assert isinstance(loss, float) and loss == pytest.approx(expected, abs=tolerance)
    np.testing.assert_allclose(dlogits, gradient, atol=tolerance, rtol=0)
    assert dlogits.dtype == dtype


def test_cross_entropy_against_torch() -> None:
    torch = pytest.importorskip("torch")
    z = torch.tensor(5 * normal(40, 101), requires_grad=True)
    t = generator(1).integers(0, 101, 40)
    expected = torch.nn.functional.cross_entropy(z, torch.tensor(t))
    expected.backward()
    loss, dlogits = nn.softmax_cross_entropy(z.detach().numpy(), t)
    assert loss == pytest.approx(expected.item(), abs=1e-14)
    np.testing.assert_allclose(dlogits, z.grad.numpy(), atol=1e-15)


def test_cross_entropy_gradient_by_differences() -> None:
    z, t = normal(3, 4), np.array([1, 0, 3])
    mask = np.array([True, False, True])
    _, dlogits = nn.softmax_cross_entropy(z, t, mask)
    assert_gradient(dlogits, lambda: nn.softmax_cross_entropy(z, t, mask)[0], z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_34_cross_entropy_of_huge_logits(dtype: str) -> None:
    z = np.array([[1e30, -1e30, 0], [-np.inf, 0, 0], [1e30, 1e30, 1e30]], dtype)
    loss, dlogits = nn.softmax_cross_entropy(z, [0, 1, 2])
    assert loss == pytest.approx((np.log(2) + np.log(3)) / 3)
    np.testing.assert_allclose(dlogits[0], 0)
    np.testing.assert_allclose(3 * dlogits[1], [0, -0.5, 0.5], atol=1e-6)
    loss, _ = nn.softmax_cross_entropy(np.array([[0.0, np.nan]], dtype), [0])
    assert np.isnan(loss)
    loss, dlogits = nn.softmax_cross_entropy(np.array([[-np.inf, 1.0]], dtype), [0])
    assert loss == np.inf and same(dlogits, np.array([[-1, 1]], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_26_nan_under_the_mask(dtype: str) -> None:
    z = normal(4, 9, dtype=dtype)
    t, mask = np.array([3, 0, 8, 1]), np.array([True, False, True, True])
    loss, dlogits = nn.softmax_cross_entropy(z, t, mask)
    z[1], t[1] = np.nan, -100
    again, dagain = nn.softmax_cross_entropy(z, t, mask)
    assert loss == again and same(dlogits, dagain) and not dagain[1].any()
    pred = normal(4, 9, dtype=dtype)
    pred[1] = np.inf
    loss, dpred = nn.mean_squared_error(pred, np.zeros_like(pred), mask)
    assert loss == pytest.approx(np.square(pred[mask]).mean()) and not dpred[1].any()
    nothing, dnothing = nn.softmax_cross_entropy(z, t, np.zeros(4, bool))
    assert nothing == 0 and not dnothing.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_squared_error(dtype: str) -> None:
    pred, target = normal(3, 5, dtype=dtype), normal(3, 5, dtype=dtype, seed=1)
    mask = generator(2).random((3, 5)) < 0.5
    loss, dpred = nn.mean_squared_error(pred, target)
    assert loss == pytest.approx(np.mean((pred.astype(float) - target) ** 2), rel=1e-6)
    np.testing.assert_allclose(dpred, 2 * (pred - target) / 15, rtol=1e-6)
    loss, dpred = nn.mean_squared_error(pred, target, mask)
    assert loss == pytest.approx(np.mean((pred.astype(float) - target)[mask] ** 2), rel=1e-6)
    np.testing.assert_allclose(dpred[mask], 2 * (pred - target)[mask] / mask.sum(), rtol=1e-6)
    assert not dpred[~mask].any() and dpred.dtype == dtype


def test_losses_refuse_what_does_not_fit() -> None:
    z, t = normal(3, 4), np.array([0, 1, 2])
    for error, match, call in (
        (ValueError, "targets: expected shape", lambda: nn.softmax_cross_entropy(z, t[:2])),
        (
            ValueError,
            r"targets: expected integers in \[0, 4\)",
            lambda: nn.softmax_cross_entropy(z, t + 2),
        ),
        (ValueError, "targets", lambda: nn.softmax_cross_entropy(z, t - 1)),
        (TypeError, "targets", lambda: nn.softmax_cross_entropy(z, t.astype(float))),
        (TypeError, "logits", lambda: nn.softmax_cross_entropy(z.astype(int), t)),
        (ValueError, "logits", lambda: nn.softmax_cross_entropy(np.zeros((3, 0)), t)),
        (TypeError, "mask", lambda: nn.softmax_cross_entropy(z, t, np.ones(3))),
        (ValueError, "mask", lambda: nn.softmax_cross_entropy(z, t, np.ones(2, bool))),
        (ValueError, "target", lambda: nn.mean_squared_error(z, z[:2])),
        (TypeError, "astype", lambda: nn.mean_squared_error(z, z.astype("float32"))),
        (ValueError, "mask", lambda: nn.mean_squared_error(z, z, np.ones(4, bool))),
        (TypeError, "pred", lambda: nn.mean_squared_error(np.array(["a"]), z)),
    ):
        with pytest.raises(error, match=match):
            call()


# --- tapes


MODULES: dict[str, tuple[Callable[[], Any], Callable[[], np.ndarray]]] = {
    "linear": (lambda: nn.Linear(4, 3, rng=0), lambda: normal(5, 4, dtype="float32")),
    "embedding": (lambda: nn.Embedding(4, 3, rng=0), lambda: np.array([0, 3, 1, 0, 2])),
    "dropout": (lambda: nn.Dropout(0.4, rng=0), lambda: normal(5, 3, dtype="float32")),
}


@pytest.mark.parametrize("name", MODULES)
def test_case_56_a_tape_serves_once(name: str) -> None:
    make, x = MODULES[name]
    _, tape = make().forward(x())
    dy = normal(5, 3, dtype="float32", seed=1)
    tape.backward(dy)
    with pytest.raises(RuntimeError, match="tape"):
        tape.backward(dy)


@pytest.mark.parametrize("name", MODULES)
def test_case_7_a_wrong_gradient_is_refused_and_the_tape_still_good(name: str) -> None:
    make, x = MODULES[name]
    _, tape = make().forward(x())
    dy = normal(5, 3, dtype="float32", seed=1)
    for error, bad in (
        (ValueError, dy[:4]),
        (ValueError, dy[:, :2]),
        (ValueError, dy[None]),
        (TypeError, dy.astype(float)),
        (TypeError, None),
    ):
        with pytest.raises(error, match="dy: expected"):
            tape.backward(bad)
    with pytest.raises(ValueError, match="threads"):
        tape.backward(dy, threads=0)
    tape.backward(dy)


@pytest.mark.parametrize("name", MODULES)
def test_case_55_the_gradient_is_of_the_forward_as_it_ran(name: str) -> None:
    make, given = MODULES[name]
    dy = normal(5, 3, dtype="float32", seed=1)
    expected = make().forward(given())[1].backward(dy)
    module, x = make(), given()
    y, tape = module.forward(x)
    module.flat[...] = 7
    x[...] = 0
    y[...] = 0
    g = tape.backward(dy)
    assert same(g.x, expected.x) if g.x is not None else expected.x is None
    assert all(same(g.params[k], expected.params[k]) for k in expected.params)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_into_accumulates(name: str) -> None:
    make, x = MODULES[name]
    module, dy = make(), normal(5, 3, dtype="float32", seed=1)
    once = module.forward(x())[1].backward(dy)
    total = module.forward(x())[1].backward(dy)
    again = module.forward(x())[1].backward(dy, into=total.params)
    assert again.params is total.params
    for key, array in total.params.items():
        np.testing.assert_allclose(array, 2 * once.params[key], rtol=1e-6)


def test_into_refuses_what_does_not_fit() -> None:
    layer, x, dy = nn.Linear(4, 3), np.ones((2, 4), "float32"), np.ones((2, 3), "float32")
    good = {"weight": np.zeros((3, 4), "float32"), "bias": np.zeros(3, "float32")}
    readonly = good["weight"].copy()
    readonly.setflags(write=False)
    for error, bad in (
        (ValueError, {"weight": good["weight"]}),
        (ValueError, {**good, "more": good["bias"]}),
        (ValueError, {**good, "bias": np.zeros(4, "float32")}),
        (TypeError, {**good, "bias": np.zeros(3)}),
        (TypeError, {**good, "bias": [0, 0, 0]}),
        (ValueError, {**good, "weight": readonly}),
        (ValueError, {**good, "weight": np.zeros((4, 3), "float32").T}),
        (TypeError, [good["weight"], good["bias"]]),
    ):
        _, tape = layer.forward(x)
        with pytest.raises(error, match="into"):
            tape.backward(dy, into=bad)
        assert not good["weight"].any() and not good["bias"].any()


# --- input


@pytest.mark.parametrize("name", MODULES)
def test_cases_12_13_15_any_layout_gives_the_same_bits(name: str) -> None:
    make, given = MODULES[name]
    x = given()
    y, tape = make().forward(x)
    dy = normal(5, 3, dtype="float32", seed=1)
    g = tape.backward(dy)

    def layouts(a: np.ndarray) -> list[np.ndarray]:
        spread = np.zeros((2 * len(a), *a.shape[1:]), a.dtype)
        spread[::2] = a
        raw = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        raw[...] = a
        swapped = a.astype(a.dtype.newbyteorder())
        return [np.asfortranarray(a), spread[::2], a[::-1].copy()[::-1], raw, swapped]

    for xs, dys in zip(layouts(x), layouts(dy), strict=True):
        xs.setflags(write=False)
        module = make()
        ys, tape = module.forward(xs)
        gs = tape.backward(dys)
        assert same(ys, y) and same(module(xs), make()(x))
        assert gs.x is None or same(gs.x, g.x)
        assert all(same(gs.params[k], g.params[k]) for k in g.params)


@pytest.mark.parametrize("call", ["__call__", "forward"])
def test_cases_11_16_17_wrong_input(call: str) -> None:
    linear, embedding = nn.Linear(4, 3), nn.Embedding(4, 3)
    for error, module, bad in (
        (ValueError, linear, np.zeros((), "float32")),
        (ValueError, linear, np.zeros((2, 5), "float32")),
        (TypeError, linear, np.zeros((2, 4))),
        (TypeError, linear, np.zeros((2, 4), int)),
        (TypeError, linear, np.zeros((2, 4), bool)),
        (TypeError, linear, np.zeros((2, 4), object)),
        (TypeError, linear, np.zeros((2, 4), complex)),
        (TypeError, linear, np.zeros(4, [("a", "float32")])),
        (TypeError, linear, None),
        (TypeError, embedding, np.zeros(2)),
        (TypeError, embedding, np.zeros(2, bool)),
        (TypeError, embedding, None),
        (TypeError, nn.Dropout(0.5), np.zeros(2, int)),
        (TypeError, nn.Dropout(0.5), np.zeros(2, "float16")),
    ):
        with pytest.raises(error, match="x: expected"):
            getattr(module, call)(bad)
    with pytest.raises(TypeError, match=r"astype\('float32'\)"):
        getattr(linear, call)(np.zeros((2, 4)))


@pytest.mark.parametrize("threads", [0, -1, 10**9, 2**70, True, "two", 1.0])
def test_case_49_threads(threads: Any) -> None:
    for call in (
        lambda: nn.Linear(2, 2)(np.zeros((1, 2), "float32"), threads=threads),
        lambda: nn.Embedding(2, 2).forward([0], threads=threads),
        lambda: nn.Dropout(0.5).freeze()(np.zeros(2), threads=threads),
        lambda: nn.softmax_cross_entropy(np.zeros((1, 2)), [0], threads=threads),
    ):
        with pytest.raises((TypeError, ValueError), match="threads: expected"):
            call()


@pytest.mark.parametrize("bad", [0, -1, True, 2**63, 2.0, "3", None])
def test_case_28_sizes(bad: Any) -> None:
    for make in (
        lambda: nn.Linear(bad, 3),
        lambda: nn.Linear(3, bad),
        lambda: nn.Embedding(bad, 3),
        lambda: nn.Embedding(3, bad),
    ):
        with pytest.raises((TypeError, ValueError), match="expected an integer"):
            make()


def test_case_28_other_options() -> None:
    for error, make in (
        (ValueError, lambda: nn.Dropout(1.0)),
        (ValueError, lambda: nn.Dropout(-0.1)),
        (ValueError, lambda: nn.Dropout(float("nan"))),
        (TypeError, lambda: nn.Dropout("half")),
        (TypeError, lambda: nn.Dropout(False)),
        (ValueError, lambda: nn.Linear(2, 2, dtype="float16")),
        (TypeError, lambda: nn.Linear(2, 2, dtype=None)),
        (TypeError, lambda: nn.Linear(2, 2, dtype="no such")),
        (TypeError, lambda: nn.Linear(2, 2, bias=1)),
        (TypeError, lambda: nn.Linear(2, 2, rng="seed")),
        (ValueError, lambda: nn.Linear(2, 2, rng=-1)),
        (TypeError, lambda: nn.Linear(2, 2, rng=np.random)),
    ):
        with pytest.raises(error, match="expected"):
            make()


def test_case_44_one_module_in_many_threads() -> None:
    layer = nn.Linear(30, 20, rng=0)
    xs = [normal(50, 30, dtype="float32", seed=i) for i in range(16)]
    expected = [layer(x) for x in xs]

    def work(i: int) -> bool:
        y, tape = layer.forward(xs[i])
        return same(y, expected[i]) and same(
            tape.backward(y).x, layer.forward(xs[i])[1].backward(y).x
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, list(range(16)) * 4))


# --- parameters


def test_params_are_live_views_of_one_buffer() -> None:
    layer = nn.Linear(3, 2, rng=0)
    assert [(k, v.shape) for k, v in layer.params.items()] == [("weight", (2, 3)), ("bias", (2,))]
    assert _params.flat_view(layer.params) is not None
    layer.params["weight"] = np.ones((2, 3))
    layer.params["bias"] += 2
    assert layer.flat.tolist() == [1, 1, 1, 1, 1, 1, *layer.params["bias"].tolist()]
    layer.params.update(bias=[5, 6])
    assert layer.flat[6:].tolist() == [5, 6]
    layer.flat[...] = 0
    assert not layer(np.ones((1, 3), "float32")).any()
    with pytest.raises(ValueError, match="shape"):
        layer.params["weight"] = np.ones(3)
    with pytest.raises(KeyError, match="weights"):
        layer.params["weights"] = np.ones(3)
    for change in (
        lambda: layer.params.pop("bias"),
        lambda: layer.params.clear(),
        lambda: layer.params.__delitem__("bias"),
    ):
        with pytest.raises(TypeError, match="fixed"):
            change()


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
@pytest.mark.parametrize("name", MODULES)
def test_copies_are_whole_and_apart(name: str, duplicate: Callable[[Any], Any]) -> None:
    make, x = MODULES[name]
    module = make()
    twin = duplicate(module)
    assert same(twin(x()), module(x())) and twin.config() == module.config()
    assert not np.shares_memory(twin.flat, module.flat)
    if twin.params:
        assert _params.flat_view(twin.params) is not None
        twin.flat[...] = 0
        assert not twin.params["weight"].any() and module.params["weight"].any()


def test_state_dict_round_trip() -> None:
    layer, other = nn.Linear(3, 2, rng=0), nn.Linear(3, 2, rng=1)
    state = layer.state_dict()
    other.load_state_dict(state)
    assert same(other.flat, layer.flat)
    state["weight"][...] = 0
    assert layer.params["weight"].any() and other.params["weight"].any()


def test_case_59_load_state_dict_lists_all_that_is_wrong() -> None:
    layer = nn.Linear(3, 2, rng=0)
    before = layer.flat.copy()
    with pytest.raises(ValueError, match=r"missing 'bias'.*unknown 'biases'.*'weight' of shape"):
        layer.load_state_dict({"weight": np.zeros((3, 2)), "biases": np.zeros(2)})
    with pytest.raises(TypeError, match="weight"):
        layer.load_state_dict({"bias": np.zeros(2), "weight": np.zeros((2, 3), int)})
    with pytest.raises(TypeError, match="mapping"):
        layer.load_state_dict([1, 2])  # type: ignore[arg-type]
    assert same(layer.flat, before)


def test_config_rebuilds() -> None:
    for module in (
        nn.Linear(3, 2, bias=False, dtype="float64"),
        nn.Embedding(3, 4),
        nn.Dropout(0.3),
    ):
        twin = type(module)(**module.config())
        assert twin.config() == module.config()
        assert {k: v.shape for k, v in twin.params.items()} == {
            k: v.shape for k, v in module.params.items()
        }


def test_flat_view_wants_the_whole_story() -> None:
    flat, arrays = _params.allocate({"a": (2, 3), "b": (4,), "c": (0, 2)}, np.float32)
    found = _params.flat_view(arrays)
    assert found is not None and found.size == 10 and np.shares_memory(found, flat)
    assert _params.flat_view({"b": arrays["b"], "a": arrays["a"]}) is None
    assert _params.flat_view({"a": arrays["a"], "b": arrays["b"].copy()}) is None
    assert _params.flat_view({"a": arrays["a"][:, :2], "b": arrays["b"]}) is None
    part = _params.flat_view({"b": arrays["b"]})
    assert part is not None and part.size == 4
    assert _params.flat_view({}) is None


def test_validator() -> None:
    assert _check.size("n", np.int8(3)) == 3 and _check.flag("f", np.bool_(True)) is True
    assert _check.choice("c", "a", ["a", "b"]) == "a"
    with pytest.raises(ValueError, match=r"c: expected one of 'a', 'b', got 'x' \(str\)"):
        _check.choice("c", "x", ["a", "b"])
    with pytest.raises(TypeError, match="c: expected one of"):
        _check.choice("c", 3, ["a", "b"])
    with pytest.raises(ValueError, match="n: expected a finite number"):
        _check.number("n", 10**400)
    given = generator()
    assert _check.generator("rng", given) is given


# --- Sequential


def model(cell: str = "LSTM", dropout: float = 0.0, dtype: str = "float64", **options: Any) -> Any:
    recurrent = getattr(fastrnn, cell)(5, 4, dtype=dtype, rng=1, **options)
    width = 8 if options.get("bidirectional") else 4
    return nn.Sequential(
        nn.Embedding(7, 5, dtype=dtype, rng=2),
        recurrent,
        nn.Dropout(dropout, rng=3),
        nn.Linear(width, 6, dtype=dtype, rng=4),
    )


def ids(*shape: int) -> np.ndarray:
    return generator(9).integers(0, 7, shape)


def leaves(state: Any) -> list[np.ndarray]:
    if state is None:
        return []
    return [a for s in state for a in leaves(s)] if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_sequential_is_its_modules_in_turn(cell: str) -> None:
    net, x = model(cell), ids(6, 3)
    y, state = net(x)
    h, inner = net.modules[1](net.modules[0](x))
    assert same(y, net.modules[3](h))
    assert len(state) == 4 and state[0] is state[2] is state[3] is None
    assert all(same(a, b) for a, b in zip(leaves(state), leaves(inner), strict=True))
    fy, fstate, _ = net.forward(x)
    assert same(fy, y)
    assert all(same(a, b) for a, b in zip(leaves(state), leaves(fstate), strict=True))


def test_sequential_has_one_buffer() -> None:
    net = model()
    assert list(net.params)[:2] == ["0.weight", "1.weight_ih_l0"]
    assert net.flat.size == sum(a.size for a in net.params.values())
    assert _params.flat_view(net.params) is not None
    for i, module in enumerate(net.modules):
        for name, array in module.params.items():
            assert np.shares_memory(array, net.flat) and same(array, net.params[f"{i}.{name}"])
    net.flat[...] = 0
    assert not net(ids(2, 2))[0].any()
    net.params["3.bias"] = np.arange(6.0)
    assert np.array_equal(net(ids(2, 2))[0][1, 1], np.arange(6.0))


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("ragged", [False, True])
def test_sequential_gradients_by_differences(cell: str, ragged: bool) -> None:
    net, x = model(cell, dropout=0.4), ids(4, 2)
    lengths = np.array([4, 2]) if ragged else None
    state = net(x)[1]
    dy = normal(4, 2, 6, seed=5)
    dstate = tuple(None if s is None else jiggle(s) for s in state)
    start = tuple(None if s is None else jiggle(s) for s in state)

    def loss() -> float:
        net.modules[2].rng = generator(3)  # the same mask every time
        y, end, _ = net.forward(x, start, lengths=lengths)
        pairs = zip(leaves(dstate), leaves(end), strict=True)
        return float((dy * y).sum() + sum((d * s).sum() for d, s in pairs))

    net.modules[2].rng = generator(3)
    _, _, tape = net.forward(x, start, lengths=lengths)
    g = tape.backward(dy, dstate)
    assert g.x is None and list(g.params) == list(net.params)
    assert _params.flat_view(g.params) is not None
    for name, array in net.params.items():
        assert_gradient(g.params[name], loss, array)
    for got, array in zip(leaves(g.state), leaves(start), strict=True):
        assert_gradient(got, loss, array)


def jiggle(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(jiggle(s) for s in state)
    return normal(*state.shape, seed=state.size)


def test_sequential_gradient_of_a_float_input() -> None:
    net = nn.Sequential(
        nn.Linear(3, 5, dtype="float64", rng=0), fastrnn.GRU(5, 4, dtype="float64", rng=1)
    )
    x, dy = normal(4, 2, 3), normal(4, 2, 4, seed=1)
    g = net.forward(x)[2].backward(dy)
    assert_gradient(g.x, lambda: float((dy * net(x)[0]).sum()), x)


def test_sequential_without_dy() -> None:
    net, x = model(), ids(4, 2)
    y, state, tape = net.forward(x)
    dstate = (None, jiggle(state[1]), None, None)
    g = tape.backward(None, dstate)
    expected = net.forward(x)[2].backward(np.zeros_like(y), dstate)
    for name, array in expected.params.items():
        np.testing.assert_allclose(g.params[name], array, atol=1e-15)
    assert all(same(a, b) for a, b in zip(leaves(g.state), leaves(expected.state), strict=True))
    with pytest.raises(TypeError, match="dy"):
        net.forward(x)[2].backward(None)


def test_sequential_into_accumulates() -> None:
    net, x, dy = model(), ids(4, 2), normal(4, 2, 6, seed=1)
    g = net.forward(x)[2].backward(dy)
    once = {name: array.copy() for name, array in g.params.items()}
    again = net.forward(x)[2].backward(dy, into=g.params)
    assert again.params is g.params
    for name, array in once.items():
        np.testing.assert_allclose(g.params[name], 2 * array, rtol=1e-12, atol=1e-15)


def test_cases_7_56_sequential_tape() -> None:
    net, x, dy = model(), ids(4, 2), normal(4, 2, 6, seed=1)
    _, state, tape = net.forward(x)
    h, c = state[1]
    for error, arguments in (
        (ValueError, (dy[:3],)),
        (ValueError, (dy[:, :1],)),
        (TypeError, (dy.astype("float32"),)),
        (ValueError, (dy, state[:2])),
        (TypeError, (dy, h)),
        (ValueError, (dy, (h, (h, c), None, None))),
        (ValueError, (dy, (None, (h, c[:, :1]), None, None))),
        (TypeError, (dy, (None, h, None, None))),
        (TypeError, (dy, (None, (h, c.astype("float32")), None, None))),
    ):
        into = {name: np.zeros_like(array) for name, array in net.params.items()}
        with pytest.raises(error, match="expected"):
            tape.backward(*arguments, into=into)
        assert not any(array.any() for array in into.values())
    tape.backward(dy)
    with pytest.raises(RuntimeError, match="tape"):
        tape.backward(dy)


def test_case_55_sequential() -> None:
    net, x, dy = model(), ids(4, 2), normal(4, 2, 6, seed=1)
    expected = net.forward(x)[2].backward(dy)
    y, state, tape = net.forward(x)
    net.flat[...] = 3
    x[...] = 0
    for array in (y, *leaves(state)):
        array[...] = 0
    g = tape.backward(dy)
    assert all(same(g.params[name], expected.params[name]) for name in expected.params)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_case_39_chunks_and_streams(cell: str) -> None:
    net, x = model(cell, num_layers=2), ids(9, 3)
    y, state = net(x)
    first, middle = net(x[:4])
    second, end = net(x[4:], middle)
    assert same(np.concatenate([first, second]), y)
    fast = net.freeze()
    fy, fstate = fast(x)
    assert same(fy, y)
    stream = fast.stream(3)
    out = np.empty((3, 6))
    for t in range(9):
        assert stream.step(x[t], out) is out and same(out, y[t])
    for a, b, c, d in zip(*map(leaves, (state, end, fstate, stream.state)), strict=True):
        assert same(a, b) and same(a, c) and same(a, d)
    stream.reset()
    assert same(stream.step(x[0]), y[0])
    stream.state = middle
    assert same(stream.step(x[4]), y[4])


def test_case_52_53_stream_out() -> None:
    net = nn.Sequential(fastrnn.GRU(4, 6, rng=0), nn.Linear(6, 4, rng=1))
    stream = net.freeze().stream(2)
    x = normal(2, 4, dtype="float32")
    readonly = np.zeros((2, 4), "float32")
    readonly.setflags(write=False)
    for error, out in (
        (ValueError, x),
        (ValueError, readonly),
        (ValueError, np.zeros((2, 5), "float32")),
        (TypeError, np.zeros((2, 4))),
        (TypeError, [0] * 4),
    ):
        with pytest.raises(error, match="out: expected"):
            stream.step(x, out)
        assert not any(array.any() for array in leaves(stream.state))
    for bad in (x[:1], x[None], x[:, :3], np.zeros((2, 4))):
        with pytest.raises((TypeError, ValueError), match="x"):
            stream.step(bad)
    stream.step(x)
    before = leaves(stream.state)
    with pytest.raises(ValueError, match="out"):
        stream.step(x, np.zeros((2, 5), "float32"))
    assert all(same(a, b) for a, b in zip(before, leaves(stream.state), strict=True))


def test_stream_state_is_set_whole_or_not_at_all() -> None:
    net = nn.Sequential(fastrnn.GRU(3, 4, rng=0), fastrnn.GRU(4, 5, rng=1))
    stream = net.freeze().stream(2)
    stream.step(normal(2, 3, dtype="float32"))
    before = stream.state
    for bad in ((np.zeros_like(before[0]), before[1][:, :1]), before[:1], None, "no"):
        with pytest.raises((TypeError, ValueError), match="expected"):
            stream.state = bad
        assert all(same(a, b) for a, b in zip(before, stream.state, strict=True))


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_sequential_copies_are_whole_and_apart(duplicate: Callable[[Any], Any]) -> None:
    net, x = model(), ids(3, 2)
    y, _ = net(x)
    twin = duplicate(net)
    assert same(twin(x)[0], y) and same(net(x)[0], y) and twin.config() == net.config()
    assert _params.flat_view(twin.params) is not None
    twin.flat[...] = 0
    assert not twin(x)[0].any() and same(net(x)[0], y)
    net.params["3.bias"] = np.zeros(6)
    assert not net.modules[3].params["bias"].any()
    fast = net.freeze()
    assert same(pickle.loads(pickle.dumps(fast))(x)[0], fast(x)[0])


def test_frozen_does_not_follow() -> None:
    net, x = model(), ids(3, 2)
    fast = net.freeze()
    y, _ = fast(x)
    net.flat[...] = 0
    assert same(fast(x)[0], y)


def test_sequential_refuses_what_does_not_fit() -> None:
    linear = nn.Linear(3, 3)
    taken = nn.Linear(3, 3)
    nn.Sequential(taken)
    for error, modules in (
        (ValueError, ()),
        (TypeError, (linear, "relu")),
        (TypeError, (nn.Sequential(nn.Linear(3, 3)), linear)),
        (ValueError, (linear, linear)),
        (ValueError, (taken,)),
        (ValueError, (linear, nn.Linear(4, 3))),
        (ValueError, (linear, nn.Linear(3, 3, dtype="float64"))),
        (ValueError, (linear, nn.Embedding(3, 3))),
        (ValueError, (nn.Embedding(9, 4), nn.Dropout(0.1), linear)),
        (ValueError, (fastrnn.LSTM(3, 4), linear)),
        (ValueError, (fastrnn.LSTM(3, 2, bidirectional=True), linear)),
        (ValueError, (fastrnn.GRU(3, 3), fastrnn.RNN(3, 3, batch_first=True))),
    ):
        with pytest.raises(error, match=r"modules.*expected"):
            nn.Sequential(*modules)
    assert linear.flat.base is None  # none of it took the layer
    for error, state in ((ValueError, (None,)), (TypeError, np.zeros(3)), (ValueError, (None, 1))):
        with pytest.raises(error, match="state"):
            nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))(np.zeros((1, 3), "float32"), state)


def test_case_19_empty_batches() -> None:
    net = model()
    for shape in ((4, 0), (0, 3)):
        y, state, tape = net.forward(ids(*shape))
        assert y.shape == (*shape, 6)
        g = tape.backward(np.zeros(y.shape))
        assert not any(array.any() for array in g.params.values())
        assert all(a.shape == b.shape for a, b in zip(leaves(state), leaves(g.state), strict=True))


# --- instruction sets

ISA_SCRIPT = """
import sys
import numpy as np
from fastrnn import nn, optim

out = {}
for dtype in ("float32", "float64"):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((101, 103)).astype(dtype)
    ids = rng.integers(0, 103, 101)
    for name, opt in {
        "sgd": lambda p: optim.SGD(p, 0.1, 0.9, True, 0.01), "adam": optim.Adam
    }.items():
        params = {"w": x.copy()}
        step = opt(params)
        out["norm", name, dtype] = np.array(step.step({"w": x[::-1]}, clip_norm=1, clip_value=0.1))
        out[name, dtype] = params["w"]
    out["dropout", dtype] = nn.Dropout(0.3, rng=1).forward(x)[0]
    _, tape = nn.Embedding(103, 103, dtype=dtype, rng=2).forward(ids)
    out["embedding", dtype] = tape.backward(x).params["weight"]
    loss, out["dlogits", dtype] = nn.softmax_cross_entropy(x, ids)
    out["loss", dtype] = np.array(loss)
    y, tape = nn.Linear(103, 37, dtype=dtype, rng=3).forward(x)
    out["linear", dtype], out["linear_dx", dtype] = y, tape.backward(y).x
np.savez(sys.argv[1], **{" ".join(key): array for key, array in out.items()})
"""


def test_every_isa(tmp_path: Path) -> None:
    results = {}
    for isa in _core.isas():
        path = tmp_path / f"{isa}.npz"
        subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT, str(path)],
            env={**os.environ, "FASTRNN_ISA": isa},
            check=True,
            timeout=60,
        )
        results[isa] = dict(np.load(path))
    exact = ("norm", "sgd", "adam", "dropout", "embedding")
    first, *others = results
    for isa in others:
        fused = "baseline" not in (first, isa)  # SSE2 lacks the fused multiply-add of the others
        for name, array in results[first].items():
            if fused or name.startswith(exact):
                assert same(array, results[isa][name]), (isa, name)
            else:
                tolerance = 1e-5 if "float32" in name else 1e-13
                np.testing.assert_allclose(results[isa][name], array, atol=tolerance, rtol=0)
