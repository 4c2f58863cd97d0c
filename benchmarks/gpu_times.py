"""Times the cases on the device, beside PyTorch; a line of JSON on standard output for each.

A program of its own, which gpu.py starts, and starts again where a case has ended it. Weights,
inputs and gradients are on the device and nothing is copied to or from the host. Both libraries
get the same PyTorch tensors and return PyTorch tensors; PyTorch computes in the case's precision,
with cuDNN. Their results are compared before anything is timed.

A time is that of calls one after the other, from before the first to when the device is done with
the last, over their number: what a program that calls layers sees, launches included. Both take
turns, round after round; inputs rotate, so that no call finds its own in a cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import fastrnn
import numpy as np
import torch
import torch.utils.dlpack
from fastrnn import _device

from benchmarks.cases import TRAINING, Case
from benchmarks.gpu_cases import TOLERANCE, Timed, cases
from benchmarks.peers import OURS
from benchmarks.timing import race

PEER = "PyTorch"
LAYERS = {"RNN": fastrnn.RNN, "LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU}
KERNELS = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru_after"}
TENSORS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDS, TURN, BUDGET = 5, 8e-3, 1.0  # seconds: of a turn, of all turns of one library
LOST = 70  # the status where a case has left a device that nothing can use any more
MOST_SETS, MOST_SET_BYTES = 8, 1 << 30  # of inputs that rotate


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_times")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="on the emulator, tiny")
    parser.add_argument("--filter", default="", metavar="REGEX")
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    arguments = parser.parse_args(argv)
    end = time.perf_counter() + arguments.seconds
    if not arguments.rehearse and not torch.cuda.is_available():
        say(unusable=f"PyTorch {torch.__version__} has no CUDA device")
        return 0
    chosen = cases(quick=arguments.quick, rehearse=arguments.rehearse)
    pattern = re.compile(arguments.filter, re.IGNORECASE)
    bench = Bench(arguments.rehearse)
    say(versions=bench.versions(), limits={} if arguments.first else bench.limits())
    for number, timed in enumerate(chosen):
        name = f"{timed.group}: {timed.case.name}"
        if number < arguments.first or not pattern.search(name):
            continue
        if time.perf_counter() > end:
            say(left_out=name, number=number)
            continue
        say(begin=name, number=number)
        say(result=bench.measure(timed), number=number)
        if not bench.usable():
            return LOST
    return 0


@dataclass
class Job:
    """One library, ready to run a case.

    ``call`` takes the number of the inputs to use. ``check`` runs the first of them and returns y,
    dx and the parameters' gradients, in training; else y.
    """

    call: Callable[[int], Any]
    check: Callable[[], dict[str, torch.Tensor]]


class Problem:
    """A case's weights and rotating inputs as PyTorch tensors, the same for both libraries."""

    def __init__(self, case: Case, bench: Bench) -> None:
        self.case = case
        self.tensor = torch.float32 if bench.rehearse else TENSORS.get(case.dtype, torch.float32)
        generator = torch.Generator(bench.device).manual_seed(0)
        bound = case.H**-0.5

        def draw(*shape: int) -> torch.Tensor:
            values = torch.rand(shape, generator=generator, device=bench.device)
            stored: torch.Tensor = (2 * values - 1) * bound
            return stored.to(TENSORS.get(case.dtype, torch.float32)).float()

        self.weights: dict[str, torch.Tensor] = {}
        for layer in range(case.layers):
            inputs = case.inputs if layer == 0 else case.H * case.directions
            for suffix in ("", "_reverse")[: case.directions]:
                for kind, shape in (
                    ("weight_ih", (inputs,)),
                    ("weight_hh", (case.H,)),
                    ("bias_ih", ()),
                    ("bias_hh", ()),
                ):
                    name = f"{kind}_l{layer}{suffix}"
                    self.weights[name] = draw(case.gates * case.H, *shape)
        size = case.T * case.B * case.inputs * torch.finfo(self.tensor).bits // 8
        sets = 1 + min(MOST_SETS - 1, bench.cache // size + 1, MOST_SET_BYTES // size)

        def normal(features: int) -> torch.Tensor:
            shape = (case.T, case.B, features)
            return torch.randn(shape, generator=generator, device=bench.device).to(self.tensor)

        self.x = [normal(case.inputs) for _ in range(sets)]
        self.dy = [normal(case.H * case.directions) for _ in range(sets)]
        if case.lengths is not None:  # the gradient of what is padding
            steps = torch.arange(case.T, device=bench.device)[:, None, None]
            lengths = torch.from_numpy(case.lengths).to(bench.device)[None, :, None]
            for dy in self.dy:
                dy *= steps < lengths


class Bench:
    """The device, and how each library runs a case on it."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.device = "cpu" if rehearse else "cuda"
        self.kernels = _device.kernels("cuda")
        self.cache = int(self.kernels.device_info()["l2_bytes"])
        self._layer: tuple[Any, Any] = (None, None)  # the last case's, by what it was made of

    def versions(self) -> dict[str, str]:
        cudnn: Any = torch.backends.cudnn
        config = fastrnn.show_config("dict") or {}
        return {
            OURS: f"{fastrnn.__version__} on {config['cuda']}",
            PEER: f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn.version()}",
        }

    def limits(self) -> dict[str, float]:
        """What the card can do at most: copies counting what is read and written, products."""
        if self.rehearse:
            return {}
        a = torch.randn(1 << 28, device="cuda")
        b = torch.empty_like(a)
        copied = min(self.timed(lambda _: b.copy_(a), 10) for _ in range(5))
        m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        product = min(self.timed(lambda _: m @ m, 5) for _ in range(5))
        return {
            "copy_gbytes_per_s": 2 * a.nbytes / copied / 1e9,
            "bfloat16_product_tflops": 2 * 8192**3 / product / 1e12,
        }

    def wait(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def usable(self) -> bool:
        """Whether the device still works; also gives back what the last case held."""
        try:
            self.wait()
            if not self.rehearse:
                torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def timed(self, call: Callable[[int], Any], number: int) -> float:
        """Seconds a call, of `number` calls one after the other."""
        self.wait()
        gc.disable()
        try:
            begin = time.perf_counter()
            for i in range(number):
                call(i)
            self.wait()
            return (time.perf_counter() - begin) / number
        finally:
            gc.enable()

    def turn(self, job: Job, tf32: bool) -> float:
        torch.backends.cudnn.allow_tf32 = tf32
        job.call(0)
        once = self.timed(job.call, 1)
        return self.timed(job.call, max(2, min(500, round(TURN / once))))

    def measure(self, timed: Timed) -> dict[str, Any]:
        """A case's result for the file; ``failures`` says what did not run or did not agree."""
        case = timed.case
        cell, B, D, precision = KERNELS[case.cell], case.B, case.directions, case.dtype
        plan = self.kernels.plan(cell, case.H, B, D, precision)
        result: dict[str, Any] = {
            "group": timed.group,
            "name": case.name,
            "kind": case.kind,
            "cell": case.cell,
            **{size: getattr(case, size) for size in "TBH"},
            "I": case.inputs,
            "layers": case.layers,
            "directions": D,
            "ragged": case.ragged,
            "precision": precision,
            "family": plan["family"],
            "flops": case.flops,
            "seconds": {},
            "difference": None,
            "failures": [],
        }
        try:
            self._race(case, result)
        except Exception as error:
            result["failures"].append(f"{type(error).__name__}: {str(error)[:500]}")
        gc.collect()
        return result

    def _race(self, case: Case, result: dict[str, Any]) -> None:
        problem = Problem(case, self)
        tf32 = case.dtype == "tf32"
        torch.backends.cudnn.allow_tf32 = tf32
        jobs = {PEER: self.theirs(problem), OURS: self.ours(problem)}
        want = jobs[PEER].check()
        self.poison(want)
        worst, where = difference(jobs[OURS].check(), want)
        result["difference"] = {"norm": worst, "of": where}
        if not worst <= TOLERANCE[case.dtype]:
            result["failures"].append(f"{where} differs from {PEER}'s by {worst:.2g} of its norm")
        del want
        contestants = {name: partial(self.turn, job, tf32) for name, job in jobs.items()}
        rounds = 2 if self.rehearse else ROUNDS
        result["seconds"] = race(contestants, rounds, BUDGET, lambda _: set())
        result["ratio"] = statistics.median(
            theirs / ours
            for theirs, ours in zip(*(result["seconds"][k] for k in (PEER, OURS)), strict=False)
        )

    def poison(self, like: dict[str, torch.Tensor]) -> None:
        """Leaves NaN in memory that our results, of the same sizes, may be given next."""
        held = []
        for tensor in like.values():
            name = str(tensor.dtype).removeprefix("torch.")
            held.append(self.kernels.Array.empty((tensor.numel(),), name))
            held[-1][...] = float("nan")
        self.wait()

    # --- fastrnn ---------------------------------------------------------------------------------

    def give(self, tensor: torch.Tensor) -> Any:
        """A tensor as our caller has it: on the device, or NumPy's for the emulator."""
        return tensor.numpy() if self.rehearse else tensor

    def take(self, array: Any) -> torch.Tensor:
        """A result of ours as a tensor."""
        if isinstance(array, torch.Tensor):
            return array
        if self.rehearse:
            return torch.from_numpy(np.asarray(array))
        return torch.utils.dlpack.from_dlpack(array)

    def layer(self, problem: Problem) -> Any:
        case = problem.case
        key = (case.cell, case.inputs, case.H, case.layers, case.directions, case.dtype)
        if self._layer[0] != key:
            self._layer = (None, None)
            layer: Any = LAYERS[case.cell](
                case.inputs,
                case.H,
                case.layers,
                bidirectional=case.bidirectional,
                device="cuda",
                precision=None if case.dtype == "float32" else case.dtype,
                rng=0,
            )
            self._layer = (key, layer)
        for name, tensor in problem.weights.items():
            self._layer[1].params[name] = fastrnn.device_array(self.give(tensor))
        return self._layer[1]

    def ours(self, problem: Problem) -> Job:
        lengths, layer = problem.case.lengths, self.layer(problem)
        x, dy = [self.give(t) for t in problem.x], [self.give(t) for t in problem.dy]
        frozen = layer.freeze() if problem.case.kind != TRAINING else layer

        def infer(number: int) -> Any:
            return frozen(x[number % len(x)], lengths=lengths)

        def train(number: int) -> Any:
            y, _, tape = layer.forward(x[number % len(x)], lengths=lengths)
            return y, tape.backward(dy[number % len(x)])

        def check() -> dict[str, torch.Tensor]:
            if problem.case.kind != TRAINING:
                return {"y": self.take(infer(0)[0])}
            y, gradients = train(0)
            found = {"y": y, "dx": gradients.x}
            found |= {f"d{name}": gradients.params[name] for name in problem.weights}
            return {name: self.take(array) for name, array in found.items()}

        return Job(train if problem.case.kind == TRAINING else infer, check)

    # --- PyTorch ---------------------------------------------------------------------------------

    def theirs(self, problem: Problem) -> Job:
        case = problem.case
        module = getattr(torch.nn, case.cell)(
            case.inputs,
            case.H,
            case.layers,
            bidirectional=case.bidirectional,
            device=self.device,
        )
        module.load_state_dict(problem.weights)
        module = module.to(problem.tensor)
        module.flatten_parameters()
        lengths = None if case.lengths is None else torch.from_numpy(case.lengths)
        pack = torch.nn.utils.rnn.pack_padded_sequence
        unpack = torch.nn.utils.rnn.pad_packed_sequence

        def run(x: torch.Tensor) -> torch.Tensor:
            if lengths is None:
                y: torch.Tensor = module(x)[0]
                return y
            packed, _ = module(pack(x, lengths, enforce_sorted=False))
            return unpack(packed, total_length=case.T)[0]

        @torch.inference_mode()
        def infer(number: int) -> Any:
            return run(problem.x[number % len(problem.x)])

        if case.kind != TRAINING:
            return Job(infer, lambda: {"y": infer(0)})
        leaves = [x.detach().requires_grad_() for x in problem.x]
        parameters = [dict(module.named_parameters())[name] for name in problem.weights]

        def train(number: int) -> Any:
            x = leaves[number % len(leaves)]
            y = run(x)
            return y, torch.autograd.grad(y, [x, *parameters], problem.dy[number % len(leaves)])

        def check() -> dict[str, torch.Tensor]:
            y, gradients = train(0)
            names = ["y", "dx", *(f"d{name}" for name in problem.weights)]
            return dict(zip(names, [y.detach(), *gradients], strict=True))

        return Job(train, check)


def difference(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """The largest norm of a difference over the norm, and of which tensor; infinite for NaN."""
    worst, where = -1.0, ""
    for (name, a), b in zip(found.items(), expected.values(), strict=True):
        if a.shape != b.shape:
            return float("inf"), f"the shape of {name}, {tuple(a.shape)}, not {tuple(b.shape)},"
        norm = float(torch.linalg.vector_norm((a.float() - b.float()).double()))
        part = norm / max(float(torch.linalg.vector_norm(b.double())), 1e-30)
        part = part if part == part else float("inf")
        worst, where = max((worst, where), (part, name), key=lambda pair: pair[0])
    return worst, where


if __name__ == "__main__":
    sys.exit(main())
