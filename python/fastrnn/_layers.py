"""The recurrent layers: parameters, options, and calls into the compiled kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import _check, _device, _init, _tape
from fastrnn._cells import PRECISIONS, Family, Network, variant_of
from fastrnn._frozen import Frozen
from fastrnn._params import Array, Module
from fastrnn._tape import Tape

__all__ = ["GRU", "LSTM", "RNN"]

State = Any  # h (L·D, B, H); for an LSTM the pair (h, c)

_MAX_LAYERS = 65536  # each has names and arrays of its own, made before a size is found absurd

_ARGS = """
    Args:
        input_size: I, features of the input, or the size of the vocabulary of integer input.
        hidden_size: H.
        num_layers: L, layers stacked: each takes the outputs of the one below.
        bias: Whether the layers have biases.
        batch_first: Input and output are (B, T, ·) instead of (T, B, ·). States are not affected.
        dropout: Probability in [0, 1) of zeroing an output between layers, in ``forward`` only.
        bidirectional: D = 2: a second set of weights reads each sequence from its end; outputs are
            concatenated, (…, 2·H).
        dtype: ``"float32"`` or ``"float64"``, of parameters, inputs, outputs and states.
        device: ``"cpu"`` or ``"cuda"``, where parameters are and results are computed; ``to`` moves
            them. On the device x, states and gradients may be arrays of PyTorch, CuPy, JAX or any
            library with DLPack or ``__cuda_array_interface__``, which are used in place and get
            results of their own kind; NumPy arrays are copied there and the results back.
        precision: What products are computed in on the device: None or ``"float32"``, exactly that;
            ``"tf32"``, ``"bfloat16"`` or ``"float16"``, less exact and several times as fast. Sums,
            states and gradients of parameters are float32. The CPU computes in ``dtype``.
        rng: Seed or ``numpy.random.Generator`` for initial weights and dropout.
        init: ``"uniform"`` (PyTorch's), ``"identity"`` or ``"orthogonal"``; see ``fastrnn._init``.
"""

_ATTRIBUTES = """
    Attributes:
        params: Parameters by PyTorch's names, live: writing to them changes the layer.
        flat: The buffer that holds all of them, in order.

    Raises:
        TypeError, ValueError: An argument has a wrong type or value; the message names it.
        RuntimeError: ``device="cuda"``, and no CUDA device can be had; the message says why.
"""


class _Recurrent(Module):
    """What RNN, LSTM and GRU share; the cell is in the name of the kernel they call."""

    _family: Family

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        variant: str,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        dtype: npt.DTypeLike,
        device: str,
        precision: str | None,
        rng: int | np.random.Generator | None,
        init: str,
        forget_bias: float | None = None,
    ) -> None:
        self.input_size = _check.size("input_size", input_size)
        self.hidden_size = _check.size("hidden_size", hidden_size)
        self.num_layers = _check.size("num_layers", num_layers, _MAX_LAYERS)
        self.bias = _check.flag("bias", bias)
        self.batch_first = _check.flag("batch_first", batch_first)
        self.dropout = _check.probability("dropout", dropout)
        self.bidirectional = _check.flag("bidirectional", bidirectional)
        self.dtype = _check.float_dtype("dtype", dtype)
        _device.kernels(_check.choice("device", device, _device.DEVICES))
        if precision is not None:
            _check.choice("precision", precision, PRECISIONS)
            if self.dtype != np.float32:
                raise ValueError(f"precision: expected None for {self.dtype}, got {precision!r}")
        self.rng = _check.generator("rng", rng)
        self._network = Network(
            self._family,
            variant,
            self.input_size,
            self.hidden_size,
            self.num_layers,
            2 if self.bidirectional else 1,
            self.bias,
            self.dtype,
            precision=precision,
        )
        method = _check.choice("init", init, _init.METHODS)
        if forget_bias is not None:
            forget_bias = _check.number("forget_bias", forget_bias)
            if not self.bias:
                raise ValueError(f"forget_bias: expected None without biases, got {forget_bias}")
        self._allocate(self._network.shapes(), self.dtype)
        _init.initialize(self.params, method, self.hidden_size, self.rng, forget_bias)
        self.to(device)

    @property
    def precision(self) -> str | None:
        """What products are computed in on the device; None for ``dtype``."""
        return self._network.precision

    def _place(self, flat: Array) -> None:
        super()._place(flat)
        self._network = replace(self._network, device=self.device)

    def __call__(
        self,
        x: Any,
        state: State = None,
        *,
        lengths: npt.ArrayLike | None = None,
        reset: Any = None,
        threads: int | None = None,
    ) -> tuple[Any, State]:
        """Inference: the outputs and the final state. Nothing is saved, no dropout.

        Args:
            x: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) without a batch; or integers
                of shape (T, B), (B, T) or (T,), which stand for one-hot rows. Any strides. Or
                sequences of different lengths without padding: a list of arrays (T_b, I) or (T_b,),
                or ``fastrnn.Ragged(values, offsets)``; y and reset then have the same form.
            state: Initial h of shape (L·D, B, H), or (L·D, H) without a batch; for an LSTM the pair
                (h, c). None for zeros.
            lengths: (B,) integers from 0 to T: the steps of each row. Outputs past them are 0, the
                final state is the one at a row's last step, the reverse direction starts there.
            reset: Bool per step and row, in x's layout: True where a new sequence begins. No
                direction carries its state across the boundary before that step.
            threads: At most this many threads; the bits do not depend on it.

        Returns:
            (y, state): y (T, B, D·H) in x's layout, and the final state in the form of ``state``.
            Within 1e-6 (float32) or 1e-12 (float64) of exact arithmetic. A row's bits do not depend
            on the other rows, on threads, or on how the sequence is cut into calls.

        Raises:
            TypeError: An argument's type or dtype; other dtypes are never converted silently.
            ValueError: An argument's shape or values; the message says what was expected.
        """
        return _tape.infer(
            self._network, self.params, x, state, lengths, reset, self.batch_first, threads
        )

    def forward(
        self,
        x: Any,
        state: State = None,
        *,
        lengths: npt.ArrayLike | None = None,
        reset: Any = None,
        threads: int | None = None,
        checkpoint_every: int | None = None,
        tbptt: tuple[int, int] | None = None,
    ) -> tuple[Any, State, Tape]:
        """The forward pass of training: as a call, with dropout, and a tape to go back through.

        Args:
            x: As for a call, like ``state``, ``lengths``, ``reset`` and ``threads``.
            state: As for a call.
            lengths: As for a call.
            reset: As for a call.
            threads: As for a call.
            checkpoint_every: Keep only every k-th state and run the steps in between again on the
                way back (Chen et al. 2016): memory O(T/k + k) instead of O(T), the same bits. x is
                read again: leave it as it is until then.
            tbptt: (k1, k2), k2 ≥ k1: truncated back-propagation through time, BPTT(k2; k1) of
                Williams & Peng 1990. Every k1 steps the losses of the last k1 steps go back through
                at most k2 steps: the loss of step t reaches back to step s and no further,
                s = max(0, (⌊t/k1⌋ + 1)·k1 - k2), where the state of all layers is a constant. The
                bits of y and state are the same; ``dstate`` goes back through a row's last window
                only, and the gradient of the initial state comes from the windows that begin at
                step 0. Memory O(k2) beside the input, k2/k1 times the work and one more inference
                (two where k2 > k1).

        Returns:
            (y, state, tape); ``tape.backward(dy, dstate)`` gives the gradients, exact ones unless
            ``tbptt`` truncates them.

        Raises:
            TypeError, ValueError: As for a call; ``tbptt`` is not a pair of integers 1 ≤ k1 ≤ k2,
                or comes with ``checkpoint_every``, dropout between layers or a second direction,
                which starts at the end of the sequence: a window has no state to start it from.
        """
        key = _tape.draw_key(self.rng) if self.dropout > 0 and self.num_layers > 1 else None
        return _tape.forward(
            self._network,
            self.params,
            x,
            state,
            lengths=lengths,
            reset=reset,
            batch_first=self.batch_first,
            threads=threads,
            dropout=self.dropout,
            dropout_key=key,
            checkpoint_every=checkpoint_every,
            tbptt=tbptt,
        )

    def freeze(self, weights: str | None = None) -> Frozen:
        """An immutable copy, packed once: faster calls, streaming, safe to share between threads.

        Args:
            weights: The dtype to store the weights in; None or the layer's own.

        Raises:
            ValueError: Another dtype than the layer's.
        """
        if weights is not None and _check.float_dtype("weights", weights) != self.dtype:
            raise ValueError(f"weights: expected None or {self.dtype.name!r}, got {weights!r}")
        return Frozen.of(self._network, self.params, self.batch_first)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values (initialisation and rng left out)."""
        return {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "bidirectional": self.bidirectional,
            "dtype": self.dtype.name,
            "device": self.device,
            **({} if self.precision is None else {"precision": self.precision}),
        }

    def __repr__(self) -> str:
        defaults: dict[str, Any] = {"num_layers": 1, "bias": True, "batch_first": False}
        defaults |= {"dropout": 0.0}
        defaults |= {"bidirectional": False, "device": "cpu", "nonlinearity": "tanh"}
        defaults |= {"reset_after": True, "dtype": "float32"}
        rest = [f"{k}={v!r}" for k, v in self.config().items() if v != defaults.get(k, object())]
        return f"{type(self).__name__}({', '.join(rest)})"


class RNN(_Recurrent):
    __doc__ = f"""The simple recurrent network (Elman 1990).

    h_t = f(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), f the nonlinearity.
{_ARGS.rstrip()}
        nonlinearity: ``"tanh"``, ``"relu"`` or ``"sigmoid"``.
{_ATTRIBUTES}"""

    _family = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: npt.DTypeLike = "float32",
        device: str = "cpu",
        precision: str | None = None,
        rng: int | np.random.Generator | None = None,
        init: str = "uniform",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            variant=variant_of("rnn", nonlinearity=nonlinearity),
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            dtype=dtype,
            device=device,
            precision=precision,
            rng=rng,
            init=init,
        )

    @property
    def nonlinearity(self) -> str:
        """``"tanh"``, ``"relu"`` or ``"sigmoid"``."""
        return self._network.variant

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values."""
        return {**super().config(), "nonlinearity": self.nonlinearity}


class LSTM(_Recurrent):
    __doc__ = f"""Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

    i, f, o = σ(·), g = tanh(·) of W_ih x_t + b_ih + W_hh h_(t-1) + b_hh;
    c_t = f∘c_(t-1) + i∘g;  h_t = o∘tanh(c_t). The state is the pair (h, c).
{_ARGS.rstrip()}
        forget_bias: Initial bias of the forget gate; None leaves it to ``init``.
{_ATTRIBUTES}"""

    _family = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: npt.DTypeLike = "float32",
        device: str = "cpu",
        precision: str | None = None,
        rng: int | np.random.Generator | None = None,
        init: str = "uniform",
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            variant="",
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            dtype=dtype,
            device=device,
            precision=precision,
            rng=rng,
            init=init,
            forget_bias=forget_bias,
        )


class GRU(_Recurrent):
    __doc__ = f"""The gated recurrent unit (Cho et al. 2014), in both of its forms.

    r, z = σ(·) of W_ih x_t + b_ih + W_hh h_(t-1) + b_hh;  h_t = (1-z)∘n + z∘h_(t-1) with
    n = tanh(W_in x_t + b_in + r∘(W_hn h_(t-1) + b_hn))  when ``reset_after`` (PyTorch, cuDNN), or
    n = tanh(W_in x_t + b_in + b_hn + W_hn (r∘h_(t-1)))  when not (the paper).
{_ARGS.rstrip()}
        reset_after: Which form.
{_ATTRIBUTES}"""

    _family = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        reset_after: bool = True,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: npt.DTypeLike = "float32",
        device: str = "cpu",
        precision: str | None = None,
        rng: int | np.random.Generator | None = None,
        init: str = "uniform",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            variant=variant_of("gru", reset_after=reset_after),
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            dtype=dtype,
            device=device,
            precision=precision,
            rng=rng,
            init=init,
        )

    @property
    def reset_after(self) -> bool:
        """Whether the reset gate acts after the product with h."""
        return self._network.variant == "after"

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values."""
        return {**super().config(), "reset_after": self.reset_after}
