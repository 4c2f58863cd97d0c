"""ONNX Runtime: a model of its recurrent operators, a session for every thread count."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cases import INFERENCE, STEP, Array, Case, Problem
from benchmarks.peers import Job

NAME = "ONNX Runtime"
VERSION = onnxruntime.__version__
THREADS = True

# ONNX's order of the gates, in places of PyTorch's: i, o, f, c and z, r, h.
ORDER = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}


def prepare(problem: Problem, threads: int) -> Job | None:
    case, x = problem.case, problem.x
    if case.kind not in (INFERENCE, STEP) or case.dtype != "float32" or case.ragged:
        return None  # no gradients; its LSTM refuses float64
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model(problem), options, providers=["CPUExecutionProvider"]
    )
    if case.kind == STEP:
        return one_step(case, x, session)

    def infer() -> Any:
        return session.run(["y"], {"x": x})[0]  # (T, D, B, H)

    def check() -> list[Array]:
        return [infer().transpose(0, 2, 1, 3).reshape(case.T, case.B, -1)]

    return Job(infer, check)


def one_step(case: Case, x: Array, session: Any) -> Job:
    names = ["h", "c"] if case.cell == "LSTM" else ["h"]
    after = [f"{name}_after" for name in names]
    start = [np.zeros((1, case.B, case.H), np.float32) for _ in names]
    state = start

    def step() -> Any:
        nonlocal state
        state = session.run(after, {"x": x, **dict(zip(names, state, strict=True))})
        return state[0]

    def check() -> list[Array]:
        nonlocal state
        state = start
        return [[step() for _ in range(3)][-1][0]]

    return Job(step, check)


def model(problem: Problem) -> bytes:
    """The model x (T, B, I) → y (T, D, B, H), the last layer's; for one step with states too."""
    case, D = problem.case, problem.case.directions
    constants: dict[str, Array] = {}
    nodes = []
    names = ["h", "c"] if case.cell == "LSTM" else ["h"]
    stream = case.kind == STEP
    source = "x"
    for layer in range(case.layers):
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][:D]

        def stacked(kind: str, suffixes: list[str] = suffixes) -> Array:
            arrays = (problem.weights[kind + suffix] for suffix in suffixes)
            return np.stack([reordered(case, array) for array in arrays])

        constants[f"W{layer}"] = stacked("weight_ih")
        constants[f"R{layer}"] = stacked("weight_hh")
        constants[f"B{layer}"] = np.concatenate([stacked("bias_ih"), stacked("bias_hh")], axis=1)
        target = "y" if layer == case.layers - 1 else f"y{layer}"
        options: dict[str, Any] = {
            "hidden_size": case.H,
            "direction": "bidirectional" if D == 2 else "forward",
        }
        if case.cell == "GRU":
            options["linear_before_reset"] = 1
        inputs = [source, f"W{layer}", f"R{layer}", f"B{layer}"]
        nodes.append(
            helper.make_node(
                case.cell,
                [*inputs, "", *names] if stream else inputs,
                [target, *(f"{name}_after" for name in names)] if stream else [target],
                **options,
            )
        )
        if layer < case.layers - 1:  # (T, D, B, H) → (T, B, D*H)
            constants[f"shape{layer}"] = np.array([case.T, case.B, D * case.H])
            nodes.append(helper.make_node("Transpose", [target], [f"{target}t"], perm=[0, 2, 1, 3]))
            source = f"{target}r"
            nodes.append(helper.make_node("Reshape", [f"{target}t", f"shape{layer}"], [source]))

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    arguments = [value("x", case.T, case.B, case.inputs)]
    outputs = [value("y", case.T, D, case.B, case.H)]
    if stream:
        arguments += [value(name, 1, case.B, case.H) for name in names]
        outputs += [value(f"{name}_after", 1, case.B, case.H) for name in names]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, case.cell, arguments, outputs, tensors)
    # Versions that ONNX Runtimes of the last years read.
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def reordered(case: Case, array: Array) -> Array:
    parts = np.split(array, case.gates)
    return np.concatenate([parts[gate] for gate in ORDER[case.cell]])
