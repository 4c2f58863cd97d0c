"""PyTorch: torch.nn's layers in inference mode, and autograd."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import CHARACTERS, DROPOUT, INFERENCE, STEP, Array, Problem
from benchmarks.peers import Job

NAME = "PyTorch"
VERSION = torch.__version__
THREADS = True


def load(module: torch.nn.Module, weights: dict[str, Array]) -> None:
    module.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})


def prepare(problem: Problem, threads: int) -> Job:
    def select() -> None:
        torch.set_num_threads(threads)

    case = problem.case
    if case.kind == STEP:
        return one_step(problem)._replace(select=select)
    layer = getattr(torch.nn, case.cell)(
        case.inputs,
        case.H,
        case.layers,
        bidirectional=case.bidirectional,
        dtype=getattr(torch, case.dtype),
    )
    load(layer, problem.weights)
    if case.kind == CHARACTERS:
        return characters(problem, layer)._replace(select=select)
    x, dy = torch.from_numpy(problem.x), torch.from_numpy(problem.dy)
    lengths = None if case.lengths is None else torch.from_numpy(case.lengths)
    pack = torch.nn.utils.rnn.pack_padded_sequence
    unpack = torch.nn.utils.rnn.pad_packed_sequence

    def run() -> torch.Tensor:
        if lengths is None:
            y: torch.Tensor = layer(x)[0]
            return y
        packed, _ = layer(pack(x, lengths, enforce_sorted=False))
        y, _ = unpack(packed, total_length=case.T)
        return y

    if case.kind == INFERENCE:
        infer = torch.inference_mode()(run)
        return Job(infer, lambda: [infer().numpy()], select)

    x.requires_grad_()
    wanted = [x, *(dict(layer.named_parameters())[name] for name in problem.weights)]

    def train() -> Any:
        y = run()
        return y, torch.autograd.grad(y, wanted, dy)

    def check() -> list[Array]:
        y, gradients = train()
        return [y.detach().numpy(), *(g.numpy() for g in gradients)]

    return Job(train, check, select)


def one_step(problem: Problem) -> Job:
    """The cell modules, which take half the time of a layer on a sequence of one."""
    case = problem.case
    cell = getattr(torch.nn, f"{case.cell}Cell")(case.inputs, case.H)
    load(cell, {name.removesuffix("_l0"): array for name, array in problem.weights.items()})
    x = torch.from_numpy(problem.x[0])
    state: Any = None

    @torch.inference_mode()
    def step() -> torch.Tensor:
        nonlocal state
        state = cell(x, state)
        y: torch.Tensor = state[0] if case.cell == "LSTM" else state
        return y

    def check() -> list[Array]:
        nonlocal state
        state = None
        return [[step() for _ in range(3)][-1].numpy()]

    return Job(step, check)


def characters(problem: Problem, lstm: torch.nn.Module) -> Job:
    case = problem.case
    linear = torch.nn.Linear(case.H, case.inputs)
    load(linear, {"weight": problem.head[0], "bias": problem.head[1]})
    dropout = torch.nn.Dropout(DROPOUT)
    parameters = [*lstm.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    ids, targets = torch.from_numpy(problem.x), torch.from_numpy(problem.dy)
    state: Any = None

    def step() -> None:
        nonlocal state
        x = torch.nn.functional.one_hot(ids, case.inputs).float()
        y, after = lstm(x, state)
        logits = linear(dropout(y))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        state = tuple(part.detach() for part in after)

    @torch.inference_mode()
    def check() -> list[Array]:
        x = torch.nn.functional.one_hot(ids, case.inputs).float()
        return [linear(lstm(x)[0]).numpy()]

    return Job(step, check)
