"""fastrnn.optim: against the formulas in plain NumPy, against torch.optim, and bit for bit.

Numbers in names are those of the hostile cases.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastrnn import _params, nn, optim

DTYPES = ["float32", "float64"]
SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 3), "d": (20_000,), "e": (0, 4), "f": ()}

MAKERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "sgd_decay": lambda p: optim.SGD(p, 0.1, weight_decay=0.03),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, 0.02),
    "adam_options": lambda p: optim.Adam(p, 0.02, (0.8, 0.95), 1e-6, 0.1),
    "adamw": lambda p: optim.AdamW(p, 0.02, weight_decay=0.1),
}


def arrays(dtype: str, seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Parameters or gradients of SHAPES in one buffer."""
    flat, out = _params.allocate(SHAPES, dtype)
    flat[...] = scale * np.random.default_rng(seed).standard_normal(flat.size)
    return out


def apart(grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same values in arrays of their own."""
    return {name: array.copy() for name, array in grads.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(a[k].tobytes() == b[k].tobytes() for k in a)


def numpy_steps(
    opt: Any, w: np.ndarray, grads: list[np.ndarray], scale: float, limit: float
) -> np.ndarray:
    """The papers' formulas in float64, not rearranged."""
    w, m, v = w.astype(float), 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        g = np.clip(grad.astype(float) * scale, -limit, limit)
        if isinstance(opt, optim.SGD):
            g = g + opt.weight_decay * w
            m = opt.momentum * m + g
            w = w - opt.lr * (g + opt.momentum * m if opt.nesterov else m)
            continue
        if isinstance(opt, optim.AdamW):
            w = w - opt.lr * opt.weight_decay * w
        else:
            g = g + opt.weight_decay * w
        beta1, beta2 = opt.betas
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - opt.lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + opt.eps)
    return w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 30.0}, {"clip_value": 0.5}])
def test_steps_follow_the_papers(name: str, dtype: str, clip: dict[str, float]) -> None:
    params = arrays(dtype, 0)
    start = apart(params)
    grads = [arrays(dtype, 1 + t) for t in range(5)]
    opt = MAKERS[name](params)
    if "clip_norm" in clip:  # one norm for all steps, so that one scale serves the oracle
        grads = [grads[0]] * 5
    norms = [opt.step(g, **clip) for g in grads]
    norm = math.sqrt(sum(float((a.astype(float) ** 2).sum()) for a in grads[0].values()))
    assert norms[0] == (pytest.approx(norm, rel=1e-12) if clip else None)
    scale = 30.0 / norm if "clip_norm" in clip else 1.0
    tolerance = 5e-6 if dtype == "float32" else 1e-13
    for key, array in params.items():
        expected = numpy_steps(
            opt, start[key], [g[key] for g in grads], scale, clip.get("clip_value", np.inf)
        )
        np.testing.assert_allclose(array, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_steps_against_torch(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    params = arrays(dtype, 0)
    peers = {k: torch.tensor(v, requires_grad=True) for k, v in params.items()}
    opt = MAKERS[name](params)
    common = {"lr": opt.lr, "weight_decay": opt.weight_decay}
    if isinstance(opt, optim.SGD):
        options = {"momentum": opt.momentum, "nesterov": opt.nesterov, **common}
        peer = torch.optim.SGD(peers.values(), **options)
    else:
        kind = torch.optim.AdamW if isinstance(opt, optim.AdamW) else torch.optim.Adam
        peer = kind(peers.values(), betas=opt.betas, eps=opt.eps, **common)
    for t in range(20):
        grads = arrays(dtype, 1 + t)
        for key, tensor in peers.items():
            tensor.grad = torch.tensor(grads[key])
        peer.step()
        opt.step(grads)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    for key, tensor in peers.items():
        np.testing.assert_allclose(
            params[key], tensor.detach().numpy(), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_one_buffer_or_many_arrays_and_any_threads_give_the_same_bits(
    name: str, dtype: str
) -> None:
    def run(loose_params: bool, loose_grads: bool, threads: int) -> dict[str, np.ndarray]:
        params = arrays(dtype, 0)
        if loose_params:
            params = apart(params)
        opt = MAKERS[name](params)
        for t in range(3):
            grads = arrays(dtype, 1 + t)
            if loose_grads:
                grads = dict(reversed(apart(grads).items()))
            opt.step(grads, clip_norm=10.0, clip_value=0.3, threads=threads)
        return params

    expected = run(False, False, 1)
    assert same(run(True, False, 1), expected)
    assert same(run(False, True, 2), expected)
    assert same(run(True, True, 3), expected)
    assert same(run(False, False, 7), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("clip", ["clip_norm", "clip_value"])
def test_case_40_a_gradient_norm_that_is_no_number(name: str, clip: str, bad: float) -> None:
    params, grads = arrays("float32", 0), arrays("float32", 1)
    opt = MAKERS[name](params)
    opt.step(grads)
    before, moments = apart(params), opt.state_dict()
    grads["c"][1, 0, 2] = bad
    with pytest.raises(FloatingPointError, match=r"norm, got (nan|inf) in 'c'"):
        opt.step(grads, **{clip: 1.0})
    assert same(params, before) and same(opt.state_dict(), moments)
    grads["c"][1, 0, 2] = 0
    opt.step(grads, **{clip: 1.0})


def test_case_40_functions() -> None:
    grads = arrays("float32", 0)
    grads["b"][0] = np.nan
    before = apart(grads)
    assert math.isnan(optim.global_norm(grads))
    with pytest.raises(FloatingPointError, match="'b'"):
        optim.clip_by_norm(grads, 1.0)
    with pytest.raises(FloatingPointError, match="'b'"):
        optim.clip_by_value(grads, 1.0)
    assert same(grads, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm(dtype: str) -> None:
    grads = arrays(dtype, 0)
    expected = math.sqrt(sum(float((a.astype(float) ** 2).sum()) for a in grads.values()))
    norms = {optim.global_norm(g, threads=n) for g in (grads, apart(grads)) for n in (1, 2, 5)}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(expected, rel=1e-12)
    assert optim.global_norm({}) == 0
    assert optim.global_norm({"w": np.zeros((3, 4), dtype)}) == 0
    assert optim.global_norm({"w": np.array([3, 4, np.inf], dtype)}) == np.inf
    sliced = {"w": grads["d"][::-3]}
    assert optim.global_norm(sliced) == optim.global_norm(apart(sliced))


def test_global_norm_where_squares_leave_the_range() -> None:
    assert optim.global_norm({"w": np.array([3e200, 4e200])}) == pytest.approx(5e200, rel=1e-14)
    assert optim.global_norm({"w": np.array([3e-200, 4e-200])}) == pytest.approx(5e-200, rel=1e-14)
    assert optim.global_norm({"w": np.full(4, 3e38, "float32")}) == pytest.approx(6e38, rel=1e-6)
    params = {"w": np.zeros(2)}
    assert optim.SGD(params, 1.0).step({"w": np.array([3e200, 4e200])}, clip_norm=1.0) > 1e200
    np.testing.assert_allclose(params["w"], [-0.6, -0.8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_functions(dtype: str) -> None:
    grads = arrays(dtype, 0)
    before = apart(grads)
    norm = optim.clip_by_norm(grads, 2.0)
    assert norm == optim.global_norm(before)
    assert optim.global_norm(grads) == pytest.approx(2.0, rel=1e-6)
    for name, array in grads.items():
        np.testing.assert_allclose(array, before[name] * (2.0 / norm), rtol=1e-6)
    small = apart(grads)
    assert optim.clip_by_norm(grads, 3.0) == pytest.approx(2.0, rel=1e-6) and same(grads, small)
    optim.clip_by_value(grads, 1e-3)
    assert all(
        same({"": a}, {"": np.clip(b, -1e-3, 1e-3)})
        for a, b in zip(grads.values(), small.values(), strict=True)
    )
    strided = np.asfortranarray(before["a"])[::-1]
    optim.clip_by_norm({"a": strided}, 1.0)
    assert np.linalg.norm(strided) == pytest.approx(1.0, rel=1e-6)


def test_gradients_are_only_read() -> None:
    params, grads = arrays("float32", 0), arrays("float32", 1)
    before = apart(grads)
    for array in grads.values():
        array.setflags(write=False)
    for make in MAKERS.values():
        make(params).step(grads, clip_norm=0.1, clip_value=0.01)
    assert same(grads, before)


def test_gradients_of_any_layout() -> None:
    layouts: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
        lambda a: a.T.copy().T,
        lambda a: a.astype(">f4"),
        lambda a: a[::-1].copy()[::-1] if a.ndim else a,
    )
    for layout in layouts:
        one, other = arrays("float32", 0), arrays("float32", 0)
        grads = arrays("float32", 1)
        optim.Adam(one).step(grads)
        optim.Adam(other).step({name: layout(array) for name, array in grads.items()})
        assert same(one, other)


@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_resumes_to_the_bit(name: str) -> None:
    straight, stopped = arrays("float32", 0), arrays("float32", 0)
    opt, first = MAKERS[name](straight), MAKERS[name](stopped)
    for t in range(3):
        opt.step(arrays("float32", t))
        first.step(arrays("float32", t))
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = MAKERS[name](stopped)
    second.load_state_dict(state)
    for t in range(3, 6):
        opt.step(arrays("float32", t))
        second.step(arrays("float32", t))
    assert same(straight, stopped) and same(opt.state_dict(), second.state_dict())
    assert all(isinstance(array, np.ndarray) for array in state.values())


def test_load_state_dict_refuses_what_does_not_fit() -> None:
    opt = optim.Adam({"w": np.ones(3)})
    opt.step({"w": np.ones(3)})
    good = opt.state_dict()
    with pytest.raises(ValueError, match=r"missing 'step'.*unknown 'x'.*'first.w' of shape \(2,\)"):
        opt.load_state_dict({"x": good["step"], "first.w": np.ones(2), "second.w": np.ones(3)})
    for error, bad in (
        (TypeError, {**good, "first.w": np.ones(3, "float32")}),
        (TypeError, {**good, "step": np.array(1.0)}),
        (ValueError, {**good, "step": np.array(-1)}),
        (TypeError, None),
    ):
        with pytest.raises(error, match="state"):
            opt.load_state_dict(bad)  # type: ignore[arg-type]
    assert same(opt.state_dict(), good)


def test_learning_rate_is_writable() -> None:
    params = {"w": np.zeros(2)}
    opt = optim.SGD(params, 1.0)
    opt.step({"w": np.ones(2)})
    opt.lr = 0.5
    opt.step({"w": np.ones(2)})
    assert params["w"].tolist() == [-1.5, -1.5]
    for bad in (-1, math.nan, math.inf, "fast", None, True):
        with pytest.raises((TypeError, ValueError), match="lr: expected"):
            opt.lr = bad  # type: ignore[assignment]
    assert opt.lr == 0.5


def test_a_module_moved_after_the_optimiser_was_made() -> None:
    layer = nn.Linear(3, 2, rng=0)
    opt = optim.SGD(layer, 1.0)
    model = nn.Sequential(layer)
    before = model.flat.copy()
    opt.step({name: np.ones_like(array) for name, array in layer.params.items()})
    np.testing.assert_allclose(model.flat, before - 1)


def test_wrong_arguments() -> None:
    params = {"w": np.zeros((2, 3)), "b": np.zeros(2)}
    grads = apart(params)
    readonly = np.zeros(2)
    readonly.setflags(write=False)
    opt = optim.Adam(params)
    gradients: Any = _params.Gradients(None, None, grads)
    for error, match, call in (
        (TypeError, "params", lambda: optim.SGD([np.zeros(2)], 0.1)),
        (TypeError, "params", lambda: optim.SGD({"w": [1.0]}, 0.1)),
        (ValueError, "params", lambda: optim.SGD({"w": np.zeros((3, 2)).T}, 0.1)),
        (ValueError, "params", lambda: optim.SGD({"w": readonly}, 0.1)),
        (ValueError, "params", lambda: optim.SGD({"w": np.zeros(2, int)}, 0.1)),
        (ValueError, "params", lambda: optim.SGD({**params, "c": np.zeros(2, "f")}, 0.1)),
        (ValueError, "momentum", lambda: optim.SGD(params, 0.1, momentum=1.0)),
        (ValueError, "nesterov", lambda: optim.SGD(params, 0.1, nesterov=True)),
        (ValueError, "weight_decay", lambda: optim.SGD(params, 0.1, weight_decay=-1)),
        (ValueError, "lr", lambda: optim.SGD(params, -0.1)),
        (TypeError, "betas", lambda: optim.Adam(params, betas=0.9)),  # type: ignore[arg-type]
        (ValueError, "betas", lambda: optim.Adam(params, betas=(0.9, 1.0))),
        (ValueError, "eps", lambda: optim.Adam(params, eps=math.nan)),
        (ValueError, "missing 'b'", lambda: opt.step({"w": grads["w"]})),
        (ValueError, "unknown 'c'", lambda: opt.step({**grads, "c": grads["b"]})),
        (ValueError, "shape", lambda: opt.step({**grads, "b": np.zeros(3)})),
        (TypeError, "astype", lambda: opt.step({**grads, "b": np.zeros(2, "float32")})),
        (TypeError, r"\.params", lambda: opt.step(gradients)),
        (TypeError, "grads", lambda: opt.step(None)),  # type: ignore[arg-type]
        (ValueError, "clip_norm", lambda: opt.step(grads, clip_norm=0)),
        (ValueError, "clip_value", lambda: opt.step(grads, clip_value=math.inf)),
        (TypeError, "clip_norm", lambda: opt.step(grads, clip_norm="1")),  # type: ignore[arg-type]
        (ValueError, "threads", lambda: opt.step(grads, threads=0)),
        (TypeError, "threads", lambda: optim.global_norm(grads, threads=1.5)),  # type: ignore[arg-type]
        (TypeError, "grads", lambda: optim.global_norm({"w": np.zeros(2, int)})),
        (TypeError, "grads", lambda: optim.global_norm({"w": np.zeros(2), "v": np.zeros(2, "f")})),
        (ValueError, "read-only", lambda: optim.clip_by_norm({"w": readonly}, 1.0)),
        (TypeError, "grads", lambda: optim.clip_by_value({"w": [1.0]}, 1.0)),
        (ValueError, "max_norm", lambda: optim.clip_by_norm(grads, -1.0)),
    ):
        with pytest.raises(error, match=match):
            call()
    assert opt.state_dict()["step"] == 0 and not any(a.any() for a in params.values())


def test_training_learns() -> None:
    """A small regression: two linear layers find a linear map."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(5, 16, rng=rng), nn.Linear(16, 3, rng=rng))
    x = rng.standard_normal((64, 5)).astype("float32")
    target = x @ rng.standard_normal((5, 3)).astype("float32")
    for make in (
        lambda: optim.SGD(model, 0.05, momentum=0.9),
        lambda: optim.Adam(model, 0.01),
        lambda: optim.AdamW(model, 0.01, weight_decay=0.0),
    ):
        model.load_state_dict(
            nn.Sequential(nn.Linear(5, 16, rng=1), nn.Linear(16, 3, rng=2)).state_dict()
        )
        opt = make()
        for _ in range(300):
            y, _, tape = model.forward(x)
            loss, dy = nn.mean_squared_error(y, target)
            opt.step(tape.backward(dy).params, clip_norm=5.0)
        assert loss < 1e-3
