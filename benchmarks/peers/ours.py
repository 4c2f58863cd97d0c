"""fastrnn itself."""

from __future__ import annotations

from typing import Any

import fastrnn
from fastrnn import nn, optim

from benchmarks.cases import CHARACTERS, DROPOUT, INFERENCE, STEP, Array, Problem
from benchmarks.peers import OURS, Job

NAME = OURS
VERSION = fastrnn.__version__
THREADS = True

LAYERS = {"RNN": fastrnn.RNN, "LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU}


def prepare(problem: Problem, threads: int) -> Job:
    def select() -> None:
        fastrnn.set_num_threads(threads)

    case, x, lengths = problem.case, problem.x, problem.case.lengths
    layer: Any = LAYERS[case.cell](
        case.inputs,
        case.H,
        case.layers,
        bidirectional=case.bidirectional,
        dtype=case.dtype,
    )
    layer.load_state_dict(problem.weights)
    if case.kind == CHARACTERS:
        return characters(problem, layer)._replace(select=select)
    if case.kind == STEP:
        stream, x_t, out = layer.freeze().stream(case.B), x[0], problem.dy[0].copy()

        def three_steps() -> list[Array]:
            stream.reset()
            return [[stream.step(x_t).copy() for _ in range(3)][-1]]

        return Job(lambda: stream.step(x_t, out=out), three_steps, select)
    if case.kind == INFERENCE:
        frozen = layer.freeze()
        return Job(
            lambda: frozen(x, lengths=lengths), lambda: [frozen(x, lengths=lengths)[0]], select
        )

    def train() -> Any:
        y, _, tape = layer.forward(x, lengths=lengths)
        return y, tape.backward(problem.dy)

    def check() -> list[Array]:
        y, gradients = train()
        return [y, gradients.x, *(gradients.params[name] for name in problem.weights)]

    return Job(train, check, select)


def characters(problem: Problem, lstm: Any) -> Job:
    case = problem.case
    linear = nn.Linear(case.H, case.inputs)
    linear.params["weight"][...], linear.params["bias"][...] = problem.head
    model = nn.Sequential(lstm, nn.Dropout(DROPOUT), linear)
    optimizer = optim.Adam(model, lr=1e-3)
    state: Any = None

    def step() -> None:
        nonlocal state
        logits, state, tape = model.forward(problem.x, state)
        _, dlogits = nn.softmax_cross_entropy(logits, problem.dy)
        optimizer.step(tape.backward(dlogits).params, clip_norm=1.0)

    return Job(step, lambda: [model(problem.x)[0]])
