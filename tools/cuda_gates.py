#!/usr/bin/env python3
"""What nvcc made of the CUDA kernels: registers, spills, and the machine code of the time loops.

The kernels are fast because of what their machine code does not contain: weights that stay in
registers and are never spilled, and a loop over the steps in which no barrier and no memory fence
stands. Both can be read from compiled code, so they are checked where there is no GPU.

    tools/cuda_gates.py             the installed fastrnn._cuda, and how it is linked
    tools/cuda_gates.py FILE...     anything that nvcc compiled: .o, .a, .so, .cubin

Prints a table with a line for each kernel and GPU, then what is wrong; status 1 if there is
anything. The rules are the table at the top. It reads with NVIDIA's cuobjdump and nvdisasm (PyPI
packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or a CUDA toolkit's) and c++filt.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# --- The rules ------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What must hold of a kernel; the first rule whose pattern is found in its name counts."""

    kernel: str  # a pattern for the name with its template arguments
    registers: int  # of a thread, at most
    since: int = 0  # the first GPU (90: capability 9.0) on which it is more than an empty shell
    loop_has: tuple[str, ...] = ()  # patterns of opcodes that the time loop must have,
    loop_lacks: tuple[str, ...] = ()  # and that it must not


CLUSTER_WIDE = ("UCGABAR", "MEMBAR")  # a barrier of a cluster's blocks; a fence

RULES = (
    # Weights in registers; one wait for the neighbours' stores a step and nothing else.
    Rule(r"^cluster::forward", 255, 90, ("HMMA", "STAS"), ("BAR", *CLUSTER_WIDE)),
    Rule(r"^cluster::backward", 255, 90, ("HMMA", "STAS"), CLUSTER_WIDE),
    # What blocks exchange is its own flag: no fence, no invalidated cache.
    Rule(r"^grid::(forward|backward)", 255, 80, ("HMMA",), ("MEMBAR", r"CCTL.*\.IV")),
    Rule(r"^product<", 208),  # 256 threads, one block a multiprocessor
    Rule(r"^step::", 168),
    Rule(r"", 80),
)

# Of every kernel: registers that did not fit. The stack would hold arrays with unknown indices.
SPILLS = ("LDL", "STL")

# What the module must find at run time and never needs to be loaded.
NOT_LINKED = re.compile(r"cuda|cublas|nvidia|nvrtc")

CMAKE_LIST = Path(__file__).resolve().parent.parent / "cmake" / "cuda.cmake"

# --- Reading compiled code ------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One instruction; its address is its index times 16."""

    predicate: str  # "@P0", "" where it is always executed
    opcode: str  # "BRA.U"
    operands: str  # "!UP0,0x750"


class Kernel(NamedTuple):
    """One kernel's machine code for one GPU."""

    name: str  # demangled, without arguments and our namespace
    gpu: str  # "sm_90a"
    registers: int
    stack: int  # bytes
    instructions: list[Instruction]
    loop: list[Instruction]  # those of the time loop


INSTRUCTION_BYTES = 16  # since 7.0
PACKAGES = {"cuobjdump": "nvidia-cuda-cuobjdump", "nvdisasm": "nvidia-cuda-nvdisasm"}


@functools.cache
def tool(name: str) -> str:
    """The path of NVIDIA's tool `name`: of its package, else on the PATH or in the toolkit."""
    try:
        files = importlib.metadata.files(PACKAGES[name]) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = next((str(f.locate()) for f in files if f.stem == name and "bin" in f.parts), None)
    found = found or shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if not found:
        raise SystemExit(f"cuda_gates needs {name}: pip install {PACKAGES[name]}")
    return found


def output(*command: str | Path, folder: Path | None = None, text: str | None = None) -> str:
    """What `command` prints; SystemExit with its message where it fails."""
    run = subprocess.run(
        [str(c) for c in command],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed:\n{run.stdout[-500:]}{run.stderr[-500:]}")
    return run.stdout


def demangle(names: list[str]) -> list[str]:
    """The C++ names of symbols, without return type, arguments and our namespace."""
    lines = output("c++filt", text="".join(f"{n}\n" for n in names)).splitlines()
    return [short_name(line) for line in lines]


def short_name(name: str) -> str:
    """``void fastrnn::cuda::f<int>(int)`` as ``f<int>``."""
    for noise in ("fastrnn::cuda::", "fastrnn::", "(anonymous namespace)::"):
        name = name.replace(noise, "")
    depth = 0  # the arguments' parenthesis is the first outside of template arguments
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """Of each function in the output of cuobjdump -res-usage: REG, STACK, … as numbers."""
    found = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(.*)", text):
        found[name] = {key: int(n) for key, n in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
    return found


def parse_code(document: list[Any]) -> dict[str, list[Instruction]]:
    """The functions in the output of nvdisasm -json."""
    return {
        function["function-name"]: [
            Instruction(i.get("predicate", ""), i["opcode"], i.get("operands", ""))
            for i in function["sass-instructions"]
        ]
        for function in document[1]
    }


def read_cubin(path: Path) -> list[Kernel]:
    """The kernels of one file of machine code, whose name says for which GPU it is."""
    gpu = re.search(r"sm_\d+[af]?", path.name)
    resources = parse_resources(output(tool("cuobjdump"), "-res-usage", path))
    if not resources:
        return []
    code = parse_code(json.loads(output(tool("nvdisasm"), "-json", path)))
    symbols = [s for s in resources if s in code]
    return [
        Kernel(
            name,
            gpu.group() if gpu else "sm_?",
            resources[s]["REG"],
            resources[s]["STACK"] + resources[s]["LOCAL"],
            code[s],
            time_loop(code[s]),
        )
        for s, name in zip(symbols, demangle(symbols), strict=True)
    ]


def read(files: Iterable[Path]) -> list[Kernel]:
    """All kernels in `files`."""
    with tempfile.TemporaryDirectory() as scratch:
        cubins = []
        for number, file in enumerate(files):
            if file.suffix == ".cubin":
                cubins.append(file)
                continue
            folder = Path(scratch, str(number))
            folder.mkdir()
            output(tool("cuobjdump"), "-xelf", "all", file.resolve(), folder=folder)
            cubins += sorted(folder.glob("*.cubin"))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return [kernel for kernels in pool.map(read_cubin, cubins) for kernel in kernels]


# --- The time loop --------------------------------------------------------------------------------


def successors(code: list[Instruction]) -> list[list[int]]:
    """Of each instruction, by index: those that may be executed after it. Calls return."""
    joins: dict[str, list[int]] = {}  # of each barrier register: where its threads meet again
    for i in code:
        if i.opcode.startswith("BSSY"):
            register, _, target = i.operands.partition(",")
            joins.setdefault(register, []).append(int(target, 16) // INSTRUCTION_BYTES)
    following = []
    for index, (predicate, opcode, operands) in enumerate(code):
        name, next_ones = opcode.partition(".")[0], [index + 1]
        # BRA.U and BRA.DIV have their condition among the operands: "!UP0,0x750".
        always = not predicate and "," not in operands
        if name in ("BRA", "JMP"):
            target = int(operands.rpartition(",")[2], 16) // INSTRUCTION_BYTES
            next_ones = [target] if always else [index + 1, target]
        elif name == "BSYNC":
            # The compiler puts it before its join; the same register serves other joins, too.
            joined = joins.get(operands, [])
            next_ones = next_ones if index + 1 in joined else [*next_ones, *joined]
        elif name in ("EXIT", "RET") and not predicate:
            next_ones = []
        following.append([n for n in next_ones if n < len(code)])
    return following


def loops(graph: list[list[int]]) -> Iterator[list[int]]:
    """The strongly connected components of `graph` that have a cycle, as lists of indices.

    Tarjan's algorithm with a stack of its own. An outer loop, the loops within it and whatever
    the compiler moved out of line are one component; what comes before and after them is not.
    """
    number: list[int] = [0] * len(graph)  # in the order of discovery, from 1 on
    low = [0] * len(graph)
    waiting: list[int] = []
    on_stack = [False] * len(graph)
    count = 0
    for root in range(len(graph)):
        if number[root]:
            continue
        path = [(root, iter(graph[root]))]
        count += 1
        number[root] = low[root] = count
        waiting.append(root)
        on_stack[root] = True
        while path:
            node, rest = path[-1]
            for child in rest:
                if not number[child]:
                    count += 1
                    number[child] = low[child] = count
                    waiting.append(child)
                    on_stack[child] = True
                    path.append((child, iter(graph[child])))
                    break
                if on_stack[child]:
                    low[node] = min(low[node], number[child])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == number[node]:
                    at = waiting.index(node)
                    component = waiting[at:]
                    del waiting[at:]
                    for member in component:
                        on_stack[member] = False
                    if len(component) > 1:  # each kernel ends in a jump to itself
                        yield sorted(component)


def time_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop with the most matrix instructions, the longest of several; [] if there is none."""
    found = ([code[i] for i in loop] for loop in loops(successors(code)))
    return max(found, key=lambda loop: (opcodes(loop)["HMMA"], len(loop)), default=[])


def opcodes(code: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode occurs, by its first part: "HMMA" of "HMMA.16816.F32"."""
    return Counter(i.opcode.partition(".")[0] for i in code)


# --- Judging --------------------------------------------------------------------------------------


def rule_of(kernel: Kernel) -> Rule:
    """The first rule whose pattern is found in the kernel's name."""
    return next(rule for rule in RULES if re.search(rule.kernel, kernel.name))


def capability(gpu: str) -> int:
    """``sm_90a`` as 90."""
    return int(re.sub(r"\D", "", gpu) or 0)


def faults(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel."""
    rule, everything = rule_of(kernel), opcodes(kernel.instructions)
    if kernel.registers > rule.registers:
        yield f"{kernel.registers} registers, expected at most {rule.registers}"
    for opcode in SPILLS:
        if everything[opcode]:
            yield f"{everything[opcode]} {opcode}: registers are spilled"
    if kernel.stack:
        yield f"{kernel.stack} bytes of stack"
    if not (rule.loop_has or rule.loop_lacks) or capability(kernel.gpu) < rule.since:
        return
    loop = Counter(i.opcode for i in kernel.loop)
    for pattern in rule.loop_has:
        if not any(re.match(pattern, opcode) for opcode in loop):
            yield f"no {pattern} in the time loop"
    for opcode, count in loop.items():
        if any(re.match(pattern, opcode) for pattern in rule.loop_lacks):
            yield f"{count} {opcode} in the time loop"


def table(kernels: list[Kernel]) -> Iterator[str]:
    """A line for each template and GPU: the worst of its kernels."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name.partition("<")[0], kernel.gpu), []).append(kernel)
    width = max((len(name) for name, _ in groups), default=0)
    yield (
        f"{'kernel':{width}} GPU      count  registers  limit  spills  "
        "longest loop: instructions   HMMA   STAS"
    )
    for (name, gpu), group in sorted(groups.items()):
        most = max(k.registers for k in group)
        spills = sum(opcodes(k.instructions)[o] for k in group for o in SPILLS)
        loop = max((k.loop for k in group), key=len)
        count = opcodes(loop)
        yield (
            f"{name:{width}} {gpu:7} {len(group):6} {most:10} {rule_of(group[0]).registers:6} "
            f"{spills:7} {len(loop):27} {count['HMMA']:6} {count['STAS']:6}"
        )


def promised_gpus(text: str) -> tuple[list[str], list[str]]:
    """FASTRNN_CUDA_ARCHITECTURES in cmake/cuda.cmake as machine code and PTX of which GPUs."""
    names = re.search(r"set\(FASTRNN_CUDA_ARCHITECTURES ([^)\n]*)", text)[1].split()  # type: ignore[index]
    code = [f"sm_{n.removesuffix('-real')}" for n in names if not n.endswith("-virtual")]
    ptx = [f"sm_{n.removesuffix('-virtual')}" for n in names if not n.endswith("-real")]
    return code, ptx


def module_faults(module: Path, kernels: list[Kernel]) -> Iterator[str]:
    """What is wrong with how the extension module was built."""
    code, ptx = promised_gpus(CMAKE_LIST.read_text())
    for gpu in code:
        if not any(k.gpu == gpu for k in kernels):
            yield f"no machine code for {gpu}"
    listed = output(tool("cuobjdump"), "-lptx", module)
    for gpu in ptx:
        if f".{gpu}.ptx" not in listed:
            yield f"no PTX of {gpu}"
    for library in re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", module)):
        if NOT_LINKED.search(library):
            yield f"linked to {library}, which only machines with a GPU have"
    for rule in RULES:
        if not any(rule_of(k) is rule for k in kernels):
            yield f"no kernel is called '{rule.kernel}', for which there is a rule"


def main(argv: list[str] | None = None) -> int:
    """Print the table and what is wrong; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="compiled by nvcc")
    files = parser.parse_args(argv).files
    for file in files:
        if not file.is_file():
            parser.error(f"FILE: expected a compiled file, got {file}")
    module = None
    if not files:
        spec = importlib.util.find_spec("fastrnn._cuda")
        if spec is None or spec.origin is None:
            raise SystemExit("cuda_gates: the installed fastrnn has no CUDA path")
        module = Path(spec.origin)
        files = [module]
    kernels = read(files)
    print(*table(kernels), sep="\n")
    wrong = [f"{k.name}, {k.gpu}: {what}" for k in kernels for what in faults(k)]
    if module:
        wrong += [f"{module.name}: {what}" for what in module_faults(module, kernels)]
    if not kernels:
        wrong.append("no kernels")
    print(*wrong, f"{len(kernels)} kernels, {len(wrong)} findings", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
