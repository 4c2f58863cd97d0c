"""Optimisers: one fused pass over a model's flat buffers, clipping included.

``step`` reads the gradients once (twice with clipping, which needs their norm first) and updates
parameters and moments in place. Parameters that are no views of one buffer are updated array by
array, with the same bits.

Clipping in ``step``: first the global norm (Pascanu et al. 2013), then each value. A clipped step
whose gradient norm is NaN or infinite raises FloatingPointError before anything is changed.

For parameters on a CUDA device moments and steps are there, too, with the same bits. Gradients must
be on the device of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastrnn import _check, _device
from fastrnn._params import Array, Gradients, Module, flat_view, shapes_of, views

__all__ = ["SGD", "Adam", "AdamW", "clip_by_norm", "clip_by_value", "global_norm"]

Grads = Mapping[str, Array]


class _Optimizer:
    """What the optimisers share: whose parameters, the moments, clipping, saving.

    A subclass names its moments in ``_slots`` and updates in ``_update``.
    """

    _slots: tuple[str, ...] = ()

    def __init__(self, params: Any, lr: float) -> None:
        if not isinstance(params, (Module, Mapping)):
            got = type(params).__name__
            raise TypeError(f"params: expected a module or a dict of arrays, got {got}")
        self._target = params
        self.lr = lr
        arrays = self._params()
        self._shapes = shapes_of(arrays)
        dtypes = {_device.dtype_of(array) for array in arrays.values()} or {"float32"}
        if len(dtypes) > 1:
            raise ValueError(f"params: expected one dtype, got {sorted(dtypes)}")
        self._dtype = _check.float_dtype("params", dtypes.pop())
        self._device = _place_of(arrays)
        size = sum(array.size for array in arrays.values())
        self._bind([_device.zeros(size, self._dtype, self._device) for _ in self._slots])
        self._steps = 0

    def _bind(self, flat_moments: list[Array]) -> None:
        """Lets the moments be views of these arrays."""
        self._flat_moments = flat_moments
        self._moments = {
            slot: views(flat, self._shapes)
            for slot, flat in zip(self._slots, flat_moments, strict=True)
        }

    @property
    def lr(self) -> float:
        """The learning rate; assign to it between steps to follow a schedule."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = _check.number("lr", value, low=0.0)

    def step(
        self,
        grads: Grads,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        threads: int | None = None,
    ) -> float | None:
        """Updates the parameters in place.

        Args:
            grads: Gradients by parameter name, such as ``Gradients.params``; not changed.
            clip_norm: Scale the gradients so that their global norm is at most this.
            clip_value: Clip each (scaled) gradient to [-clip_value, clip_value].
            threads: Threads to use; None is the default. The results do not depend on it.

        Returns:
            The global norm of ``grads`` where clipping needed it, else None.

        Raises:
            TypeError: an argument is of the wrong type or dtype.
            ValueError: missing, unknown or wrongly shaped gradients; a limit that is not positive.
            FloatingPointError: clipping, and the gradients' norm is NaN or infinite. The parameters
                and the optimiser are as they were.
        """
        limit = math.inf
        if clip_norm is not None:
            clip_norm = _check.number("clip_norm", clip_norm, low=0.0, low_open=True)
        if clip_value is not None:
            limit = _check.number("clip_value", clip_value, low=0.0, low_open=True)
        count = _check.threads(threads)
        params = self._params()
        if shapes_of(params) != self._shapes:
            raise ValueError("params: expected the names and shapes of the start, got others")
        self._follow(params)
        given = self._gradients(grads)
        norm, scale = None, 1.0
        if clip_norm is not None or clip_value is not None:
            norm = _finite_norm(given, count)
            if clip_norm is not None and norm > clip_norm:
                scale = clip_norm / norm
        flat_params, flat_grads = flat_view(params), flat_view(given)
        if flat_params is not None and flat_grads is not None:
            weights, gradients = [flat_params], [flat_grads]
            moments = [[flat] for flat in self._flat_moments]
        else:
            weights, gradients = list(params.values()), list(given.values())
            moments = [list(parts.values()) for parts in self._moments.values()]
        self._update(weights, gradients, moments, scale, limit, count)
        self._steps += 1
        return norm

    def state_dict(self) -> dict[str, Array]:
        """Copies of the moments as ``"<moment>.<parameter>"``, and the count of steps, ``"step"``.

        On the CPU, wherever the parameters are.

        Learning rate and the constructor's other arguments are not part of it.
        """
        state: dict[str, Array] = {"step": np.array(self._steps, dtype=np.int64)}
        for name, array in self._named_moments().items():
            state[name] = _device.move(array, "cpu")
        return state

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Restores what ``state_dict`` returned; all of it or, on an error, nothing.

        Raises:
            TypeError: not a mapping, or a wrong dtype.
            ValueError: missing, unknown or wrongly shaped entries; the message lists them all.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of arrays, got {type(state).__name__}")
        targets = self._named_moments()
        wanted = {"step": (), **shapes_of(targets)}
        arrays = {name: np.asarray(value) for name, value in state.items()}
        problems = [f"missing {name!r}" for name in wanted if name not in arrays]
        problems += [f"unknown {name!r}" for name in arrays if name not in wanted]
        problems += [
            f"{name!r} of shape {arrays[name].shape} instead of {shape}"
            for name, shape in wanted.items()
            if name in arrays and arrays[name].shape != shape
        ]
        if problems:
            raise ValueError(f"state: expected this optimiser's, got: {', '.join(problems)}")
        steps = int(_check.int_array("state['step']", arrays["step"]))
        if steps < 0:
            raise ValueError(f"state['step']: expected a count, got {steps}")
        checked = {
            name: _check.float_array(f"state[{name!r}]", arrays[name], self._dtype)
            for name in targets
        }
        for name, target in targets.items():
            target[...] = checked[name]
        self._steps = steps

    def _update(
        self,
        weights: list[Array],
        grads: list[Array],
        moments: list[list[Array]],
        scale: float,
        limit: float,
        threads: int,
    ) -> None:
        """One step on lists of arrays that correspond; ``moments`` has a list for each slot."""
        raise NotImplementedError

    def _params(self) -> Mapping[str, Array]:
        """The parameters as they are now: a module may have been moved into a model since."""
        params = self._target.params if isinstance(self._target, Module) else self._target
        for name, array in params.items():
            if not isinstance(array, np.ndarray) and not _device.is_array(array):
                raise TypeError(f"params[{name!r}]: expected array, got {type(array).__name__}")
            if _device.read_only(array) or not _device.in_place(array):
                raise ValueError(f"params[{name!r}]: expected a writable C-contiguous array")
        return params

    def _follow(self, params: Mapping[str, Array]) -> None:
        """Moves the moments to the device of the parameters, if those have moved."""
        device = _place_of(params)
        if device != self._device:
            self._bind([_device.move(flat, device) for flat in self._flat_moments])
            self._device = device

    def _gradients(self, grads: Any) -> dict[str, Array]:
        """``grads`` checked, in the parameters' order."""
        arrays = _arrays(grads)
        problems = [f"missing {name!r}" for name in self._shapes if name not in arrays]
        problems += [f"unknown {name!r}" for name in arrays if name not in self._shapes]
        if problems:
            raise ValueError(f"grads: expected the parameters' names, got: {', '.join(problems)}")
        result = {}
        for name, shape in self._shapes.items():
            what, value = f"grads[{name!r}]", arrays[name]
            if self._device == "cuda" and not _device.on_device(value):
                got = type(value).__name__
                raise TypeError(f"{what}: expected an array on the device, got {got}")
            taken = _device.port(self._device, value).take(what, value)
            result[name] = _check.float_array(what, taken, self._dtype, shape)
        return result

    def _named_moments(self) -> dict[str, Array]:
        return {
            f"{slot}.{name}": array
            for slot, parts in self._moments.items()
            for name, array in parts.items()
        }


class SGD(_Optimizer):
    """Stochastic gradient descent, with momentum (Sutskever et al. 2013) as in PyTorch.

    g ← grad + weight_decay · w;  m ← momentum · m + g;
    w ← w − lr · (g + momentum · m if nesterov else m).

    Args:
        params: A module or model, or a dict of writable C-contiguous arrays of one dtype.
        lr: Learning rate; writable as ``.lr``.
        momentum: In [0, 1).
        nesterov: Look ahead along the momentum; needs one.
        weight_decay: Factor of the L2 penalty's gradient.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.momentum = _check.probability("momentum", momentum)
        self.nesterov = _check.flag("nesterov", nesterov)
        self.weight_decay = _check.number("weight_decay", weight_decay, low=0.0)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: expected a momentum above 0 with it, got 0")
        if self.momentum:
            self._slots = ("momentum",)
        super().__init__(params, lr)

    def _update(
        self,
        weights: list[Array],
        grads: list[Array],
        moments: list[list[Array]],
        scale: float,
        limit: float,
        threads: int,
    ) -> None:
        _device.kernels(self._device).sgd_step(
            weights,
            grads,
            moments[0] if moments else [],
            scale=scale,
            limit=limit,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            threads=threads,
        )


class Adam(_Optimizer):
    """Adam (Kingma & Ba 2015, algorithm 1) as in PyTorch.

    g ← grad + weight_decay · w;  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;
    w ← w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)  in step t = 1, 2, …

    Args:
        params: A module or model, or a dict of writable C-contiguous arrays of one dtype.
        lr: Learning rate; writable as ``.lr``.
        betas: (β₁, β₂), each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Factor of the L2 penalty's gradient (``AdamW``: of the decay itself).

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.
    """

    _slots = ("first", "second")
    _decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError):
            raise TypeError(f"betas: expected two numbers, got {betas!r}") from None
        self.betas = (
            _check.probability("betas[0]", beta1),
            _check.probability("betas[1]", beta2),
        )
        self.eps = _check.number("eps", eps, low=0.0)
        self.weight_decay = _check.number("weight_decay", weight_decay, low=0.0)
        super().__init__(params, lr)

    def _update(
        self,
        weights: list[Array],
        grads: list[Array],
        moments: list[list[Array]],
        scale: float,
        limit: float,
        threads: int,
    ) -> None:
        _device.kernels(self._device).adam_step(
            weights,
            grads,
            moments[0],
            moments[1],
            scale=scale,
            limit=limit,
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=self._decoupled,
            step=self._steps + 1,
            threads=threads,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) as in PyTorch.

    w ← (1 − lr · weight_decay) w, then Adam's step without an L2 penalty. Arguments as ``Adam``'s.
    """

    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


def global_norm(grads: Grads, *, threads: int | None = None) -> float:
    """The Euclidean norm of all gradients as one vector; NaN or infinite if any of them is.

    Args:
        grads: Arrays by name, float32 or float64, of one dtype.
        threads: Threads to use; None is the default. The result does not depend on it.

    Returns:
        The norm, summed in float64 in a fixed order; exact to 1e-12, without overflow.

    Raises:
        TypeError: ``grads`` is no mapping of float32 or float64 arrays.
    """
    return _norm(_float_arrays(grads), _check.threads(threads))


def clip_by_norm(grads: Grads, max_norm: float, *, threads: int | None = None) -> float:
    """Scales the gradients in place so that their global norm is at most ``max_norm``.

    ``optimiser.step(…, clip_norm=…)`` does the same without a pass of its own.

    Returns:
        The norm before.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.
        FloatingPointError: the norm is NaN or infinite; the gradients are as they were.
    """
    limit = _check.number("max_norm", max_norm, low=0.0, low_open=True)
    arrays = _writable(grads)
    norm = _finite_norm(arrays, _check.threads(threads))
    if norm > limit:
        _device.scale(list(arrays.values()), limit / norm)
    return norm


def clip_by_value(grads: Grads, limit: float, *, threads: int | None = None) -> None:
    """Clips every gradient in place to [-limit, limit].

    ``optimiser.step(…, clip_value=…)`` does the same without a pass of its own.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or out of range.
        FloatingPointError: a gradient is NaN or infinite; the gradients are as they were.
    """
    bound = _check.number("limit", limit, low=0.0, low_open=True)
    arrays = _writable(grads)
    _finite_norm(arrays, _check.threads(threads))
    _device.clip(list(arrays.values()), bound)


def _place_of(arrays: Mapping[str, Any]) -> str:
    """The device that all of the arrays are on.

    Raises:
        ValueError: Some are on another one.
    """
    devices = {_device.device_of(array) for array in arrays.values()} or {"cpu"}
    if len(devices) > 1:
        raise ValueError("expected arrays on one device, got some on the CPU and some on CUDA")
    return devices.pop()


def _arrays(grads: Any) -> Mapping[str, Any]:
    if isinstance(grads, Gradients):
        raise TypeError("grads: expected a dict of arrays, got Gradients; pass its .params")
    if not isinstance(grads, Mapping):
        raise TypeError(f"grads: expected a dict of arrays, got {type(grads).__name__}")
    return grads


def _float_arrays(grads: Any) -> dict[str, Array]:
    """Arrays of one floating dtype, as they are where that is possible."""
    arrays = {
        name: _check.any_float_array(f"grads[{name!r}]", array)
        for name, array in _arrays(grads).items()
    }
    for name, array in arrays.items():
        dtype = np.dtype(next(iter(arrays.values())).dtype)
        _check.float_array(f"grads[{name!r}]", array, dtype)
    return arrays


def _writable(grads: Any) -> dict[str, Array]:
    """The caller's own arrays, checked, to be changed in place."""
    _float_arrays(grads)
    for name, array in grads.items():
        if not isinstance(array, np.ndarray) and not _device.is_array(array):
            raise TypeError(f"grads[{name!r}]: expected array, got {type(array).__name__}")
        if _device.read_only(array):
            raise ValueError(f"grads[{name!r}]: expected a writable array, got a read-only one")
    return dict(grads)


def _norm(arrays: Mapping[str, Array], threads: int) -> float:
    """The norm of checked arrays of one dtype."""
    values = [array for array in arrays.values() if array.size]
    total = float(_device.kernels(_place_of(arrays)).sum_squares(values, threads))
    if 1e-280 < total < math.inf or math.isnan(total) or not values:
        return math.sqrt(total)
    # Squares have left float64's range, or there is an infinity: once more, scaled by the largest.
    values = [np.asarray(array) for array in values]
    largest = max(float(np.abs(array).max()) for array in values)
    if largest == 0 or not math.isfinite(largest):
        return largest
    scaled = [array.astype(np.float64) / largest for array in values]
    return largest * math.sqrt(float(_device.kernels("cpu").sum_squares(scaled, threads)))


def _finite_norm(arrays: Mapping[str, Array], threads: int) -> float:
    """The norm; FloatingPointError if that is no number."""
    norm = _norm(arrays, threads)
    if not math.isfinite(norm):
        bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        where = f" in {', '.join(map(repr, bad))}" if bad else ""
        raise FloatingPointError(
            f"grads: expected gradients with a finite norm, got {norm}{where}; nothing was changed"
        )
    return norm
