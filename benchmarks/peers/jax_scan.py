"""JAX: jax.lax.scan, compiled; its thread pool has the size of the machine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import INFERENCE, STEP, TRAINING, Array, Case, Problem
from benchmarks.peers import Job

NAME = "JAX"
VERSION = jax.__version__
THREADS = False


def cell(kind: str, w_hh: Any, b_hh: Any, state: Any, a_x: Any) -> Any:
    """One step; a_x (B, G*H) is the input's part of the pre-activations."""
    a_h = state[0] @ w_hh.T + b_hh
    if kind == "RNN":
        state = (jnp.tanh(a_x + a_h),)
    elif kind == "LSTM":
        i, f, g, o = jnp.split(a_x + a_h, 4, axis=1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        state = (jax.nn.sigmoid(o) * jnp.tanh(c), c)
    else:
        (x_r, x_z, x_n), (h_r, h_z, q) = jnp.split(a_x, 3, axis=1), jnp.split(a_h, 3, axis=1)
        n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * q)
        state = (n + jax.nn.sigmoid(x_z + h_z) * (state[0] - n),)
    return state, state[0]


def zeros(case: Case) -> Any:
    return (jnp.zeros((case.B, case.H)),) * (2 if case.cell == "LSTM" else 1)


def prepare(problem: Problem, threads: int) -> Job | None:
    case = problem.case
    if case.kind not in (INFERENCE, TRAINING, STEP) or case.dtype != "float32" or case.ragged:
        return None
    weights = [jnp.asarray(array) for array in problem.weights.values()]
    x, dy = jnp.asarray(problem.x), jnp.asarray(problem.dy)

    def run(x: Any, weights: list[Any]) -> Any:
        for layer in range(case.layers):
            outputs = []
            for d in range(case.directions):
                k = 4 * (layer * case.directions + d)
                w_ih, w_hh, b_ih, b_hh = weights[k : k + 4]
                scanned = jax.lax.scan(
                    lambda state, a, w=w_hh, b=b_hh: cell(case.cell, w, b, state, a),
                    zeros(case),
                    x @ w_ih.T + b_ih,
                    reverse=d == 1,
                )
                outputs.append(scanned[1])
            x = jnp.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]
        return x

    if case.kind == STEP:
        return one_step(case, x[0], weights)
    if case.kind == INFERENCE:
        compiled = jax.jit(run)

        def infer() -> Any:
            return compiled(x, weights).block_until_ready()

        return Job(infer, lambda: [np.asarray(infer())])

    @jax.jit
    def gradients(x: Any, weights: list[Any], dy: Any) -> Any:
        y, backward = jax.vjp(run, x, weights)
        return y, backward(dy)

    def train() -> Any:
        return jax.block_until_ready(gradients(x, weights, dy))

    def check() -> list[Array]:
        y, (dx, dweights) = train()
        return [np.asarray(array) for array in (y, dx, *dweights)]

    return Job(train, check)


def one_step(case: Case, x: Any, weights: list[Any]) -> Job:
    w_ih, w_hh, b_ih, b_hh = weights

    @jax.jit
    def compiled(x: Any, state: Any) -> Any:
        return cell(case.cell, w_hh, b_hh, state, x @ w_ih.T + b_ih)

    state = zeros(case)

    def step() -> Any:
        nonlocal state
        state, y = compiled(x, state)
        return y.block_until_ready()

    def check() -> list[Array]:
        nonlocal state
        state = zeros(case)
        return [np.asarray([step() for _ in range(3)][-1])]

    return Job(step, check)
