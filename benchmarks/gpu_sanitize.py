"""Small calls of every kernel, a program for CUDA's checkers to watch.

Says what it does before it does it, so that the log tells where a checker stopped. Imports no
PyTorch, whose start would take most of the time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import fastrnn
import numpy as np
from fastrnn import nn, optim

SIZES = [(3, 9, 40), (4, 3, 130)]  # T, B, H
CALLS = [  # family, layer, options
    ("step", fastrnn.LSTM, {}),
    ("step", fastrnn.GRU, {"reset_after": False, "dtype": "float64"}),
    *(
        (family, layer, {"precision": precision})
        for family in ("cluster", "grid", "step")
        for layer, precision in (
            (fastrnn.LSTM, "bfloat16"),
            (fastrnn.GRU, "float16"),
            (fastrnn.RNN, "bfloat16"),
        )
    ),
]


def main() -> int:
    for what, work in jobs():
        print(what, end=" ", flush=True)
        try:
            work()
        except ValueError as error:  # a family that cannot run it
            print(f"cannot: {error}", flush=True)
            continue
        print("ran", flush=True)
    return 0


def jobs() -> Iterator[tuple[str, Any]]:
    for family, layer, options in CALLS:
        for sizes in SIZES:
            name = f"{family} {layer.__name__} {options or ''} T, B, H = {sizes}:"
            yield name, lambda f=family, c=layer, o=options, s=sizes: recurrent(f, c, o, *s)
    yield "training:", train


def recurrent(family: str, layer: Any, options: dict[str, Any], T: int, B: int, H: int) -> None:
    """Both directions, ragged, with resets; forward and backward."""
    os.environ["FASTRNN_CUDA_FAMILY"] = family
    rng = np.random.default_rng(0)
    network = layer(5, H, bidirectional=True, device="cuda", rng=1, **options)
    x = rng.standard_normal((T, B, 5)).astype(network.dtype)
    lengths = np.linspace(0, T, B).astype(np.int64)
    y, _, tape = network.forward(x, lengths=lengths, reset=rng.random((T, B)) < 0.3)
    gradients = tape.backward(y)
    if not (np.isfinite(y).all() and np.isfinite(gradients.x).all()):
        raise SystemExit("results that are not finite")


def train() -> None:
    """What a step of training runs beside the recurrence."""
    os.environ["FASTRNN_CUDA_FAMILY"] = ""
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Embedding(11, 6, rng=1),
        fastrnn.LSTM(6, 12, 2, dropout=0.3, rng=2),
        nn.Dropout(0.3, rng=3),
        nn.Linear(12, 11, rng=4),
    ).to("cuda")
    for optimizer in (optim.SGD(model, 0.1, momentum=0.9), optim.Adam(model)):
        ids = rng.integers(0, 11, (4, 3))
        logits, _, tape = model.forward(ids)
        _, dlogits = nn.softmax_cross_entropy(logits, ids, rng.random(ids.shape) < 0.8)
        optimizer.step(tape.backward(dlogits).params, clip_norm=0.5)
    z = fastrnn.device_array(rng.standard_normal((7, 5)).astype(np.float32))
    nn.mean_squared_error(z, fastrnn.device_array(z.numpy() + 1))


if __name__ == "__main__":
    sys.exit(main())
