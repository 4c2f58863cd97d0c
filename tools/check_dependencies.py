#!/usr/bin/env python3
"""Which part of fastrnn may depend on which: the lint behind "May depend on" in the architecture.

The rules are the tables at the top; the rest reads files. The reading path goes one way only,
``LSTM.forward`` → bindings → dispatch → cpu/forward → cells/lstm.h, and a part that includes
something it should not know about breaks that silently. So does code of one instruction set that
leaks into another's: what csrc/cpu/kernels.cc includes is compiled once per ISA, and one inline
function of the C++ library there is enough for a crash on an older machine.

Prints one line a finding, ``file:line: what``; status 1 if there is any.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# --- The rules ------------------------------------------------------------------------------------

# C++: a part (the longest prefix of a path under csrc/) and the prefixes that it may include.
MAY_INCLUDE = {
    "cells/": ("cells/",),
    "core/": ("core/",),
    "cpu/": ("cpu/", "cells/", "core/", "dispatch.h"),
    "cuda/": ("cuda/", "cells/", "core/"),
    "dispatch.": ("dispatch.h", "core/"),
    # cpu/stack.h is the engine's plain interface.
    "bindings/": ("bindings/", "dispatch.h", "core/", "cpu/stack.h"),
    # An extension module of its own.
    "bindings/cuda/": (
        "bindings/cuda/",
        "bindings/arrays.h",
        "bindings/call.h",
        "cuda/",
        "core/",
    ),
}

# cpu/ has two halves. What this file includes, directly or not, is compiled once per ISA: C headers
# only, whose functions are not inline, and no dispatch. The other half organises the work (threads,
# chunks, memory), is compiled once and asks dispatch for the kernels.
PER_ISA_SOURCE = "cpu/kernels.cc"
PER_ISA_MAY_INCLUDE = ("cpu/", "cells/", "core/")
PER_ISA_HEADERS = ("stddef.h", "stdint.h", "string.h", "immintrin.h", "arm_neon.h")

# What kernels are written in: CUDA to nvcc, the host's emulator to the C++ compiler. So it is not
# for files that are C++ in both builds.
KERNEL_WORDS = "cuda/simt.h"
KERNEL_WORDS_ALSO_IN = ("cuda/emulator.cc",)

# Headers of other libraries (a pattern), and the only parts that may include them.
ONLY_IN = [
    (r"pybind11/|Python\.h$|numpy/", ("bindings/",)),
    (r"cuda|cublas|cooperative_groups|nv", ("cuda/simt_device.h", "cuda/runtime.cu")),
    (
        r"\w*intrin\.h$|arm_neon\.h$|cpuid\.h$|sys/auxv\.h$",
        ("dispatch.", "cpu/vec.h", "core/fpenv.h"),
    ),
]

# Names of ISAs, their macros, intrinsics and register types stand in these parts only. fpenv.h sets
# the control register (MXCSR, FPCR), which has no name that all machines share. Which architecture
# it is (__x86_64__, __aarch64__) is no secret.
ISA_PARTS = ("dispatch.", "cpu/vec.h", "core/fpenv.h")
ISA_NAMES = re.compile(
    r"""\b( sse\d* | avx2? | avx512\w* | neon | sve\d?      # names
        | __SSE\w* | __AVX\w* | __FMA__ | __ARM_NEON\w*    # macros
        | __builtin_cpu_\w+
        | _mm\d*_\w+ | __m(128|256|512)\w*                  # x86 intrinsics
        | (float|int|uint)(32|64)x[24]_t | v\w+q?_[fsu](32|64)  # NEON intrinsics
        )\b""",
    re.VERBOSE | re.IGNORECASE,
)

# Python: a module (the longest prefix of its dotted name) and the third-party packages that it may
# import; the standard library always. None of ours means: not even fastrnn itself.
MAY_IMPORT = {
    "fastrnn": ("fastrnn", "numpy"),
    "fastrnn.reference": ("numpy",),  # the specification stands alone
    "fastrnn.io": ("fastrnn", "numpy", "safetensors"),
    "fastrnn._threadpoolctl": ("fastrnn", "threadpoolctl"),  # where it is installed
    "fastrnn.cli": ("fastrnn", "numpy", "click", "rich", "matplotlib"),
    "fastrnn._charlm": ("fastrnn", "numpy", "rich", "matplotlib"),  # the command line's engine room
    "fastrnn.interop": ("fastrnn", "numpy", "torch", "jax"),
    "fastrnn.estimators": ("fastrnn", "numpy", "sklearn"),
}

# --- Reading --------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One broken rule."""

    path: Path
    line: int
    what: str


CPP_SUFFIXES = {".h", ".cc", ".cpp", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def longest_prefix(name: str, prefixes: Iterable[str]) -> str:
    """The most specific of `prefixes` that `name` starts with, "" if none does."""
    return max((p for p in prefixes if name.startswith(p)), key=len, default="")


def without_comments(text: str) -> str:
    """`text` with its comments blanked; strings and line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return COMMENT_OR_STRING.sub(blank, text)


def includes(path: Path) -> Iterator[tuple[int, str, str]]:
    """Of each #include: its line number and the target, "ours" or <theirs>; the other is ""."""
    for number, line in enumerate(without_comments(path.read_text()).splitlines(), start=1):
        match = INCLUDE.match(line)
        if match:
            yield number, match[1] or "", match[2] or ""


def reached(csrc: Path, name: str) -> set[str]:
    """The file `name` under `csrc` and all of ours that it includes, directly or not."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        name = todo.pop()
        if name not in seen and (csrc / name).is_file():
            seen.add(name)
            todo += [ours for _, ours, _ in includes(csrc / name) if ours]
    return seen


def check_cpp(csrc: Path) -> Iterator[Finding]:
    """Findings in the C++ and CUDA files under `csrc`."""
    per_isa = reached(csrc, PER_ISA_SOURCE)
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in CPP_SUFFIXES):
        name = path.relative_to(csrc).as_posix()
        part = longest_prefix(name, MAY_INCLUDE)
        if not part:
            yield Finding(path, 1, "in no part of MAY_INCLUDE in tools/check_dependencies.py")
            continue
        for number, ours, theirs in includes(path):
            if ours:
                what = check_own_include(csrc, path, part, ours)
                if not what and name in per_isa and not ours.startswith(PER_ISA_MAY_INCLUDE):
                    what = f'"{ours}" in code that is compiled per ISA'
                always_cpp = path.suffix == ".cc" and name not in KERNEL_WORDS_ALSO_IN
                if not what and always_cpp and KERNEL_WORDS in reached(csrc, ours):
                    what = f'"{ours}" is or includes "{KERNEL_WORDS}", which is for .cu files'
            else:
                what = check_library_include(name, theirs)
                if not what and name in per_isa and theirs not in PER_ISA_HEADERS:
                    allowed = ", ".join(PER_ISA_HEADERS)
                    what = f"<{theirs}> in code that is compiled per ISA, only {allowed}"
            if what:
                yield Finding(path, number, what)
        if not name.startswith(ISA_PARTS):
            for number, line in enumerate(without_comments(path.read_text()).splitlines(), start=1):
                isa = ISA_NAMES.search(line)
                if isa and not INCLUDE.match(line):
                    where = ", ".join(ISA_PARTS)
                    yield Finding(path, number, f"'{isa.group()}' is an ISA's, only in {where}")


def check_own_include(csrc: Path, path: Path, part: str, target: str) -> str:
    """What is wrong with #include "target" in `path`, "" if nothing."""
    if not (csrc / target).is_file():
        hint = "write it from csrc/ on" if (path.parent / target).is_file() else "no such file"
        return f'#include "{target}": {hint}'
    if not target.startswith(MAY_INCLUDE[part]):
        return f'{part} may not include "{target}", only {", ".join(MAY_INCLUDE[part])}'
    return ""


def check_library_include(name: str, header: str) -> str:
    """What is wrong with #include <header> in the file `name`, "" if nothing."""
    for pattern, parts in ONLY_IN:
        if re.match(pattern, header) and not name.startswith(parts):
            return f"<{header}> only in {', '.join(parts)}"
    return ""


def check_python(package: Path) -> Iterator[Finding]:
    """Findings in the Python modules of the package folder `package` (…/fastrnn)."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        rule = max(
            (r for r in MAY_IMPORT if module == r or module.startswith((f"{r}.", f"{r}_"))), key=len
        )
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = ["fastrnn" if node.level else str(node.module)]
            else:
                continue
            for root in (name.partition(".")[0] for name in imported):
                if root not in sys.stdlib_module_names and root not in MAY_IMPORT[rule]:
                    allowed = ", ".join(MAY_IMPORT[rule])
                    yield Finding(
                        path, node.lineno, f"{module} may not import {root}, only {allowed}"
                    )


def main(argv: list[str] | None = None) -> int:
    """Check the tree and print what is wrong; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args(argv).root
    csrc, package = root / "csrc", root / "python" / "fastrnn"
    for folder in (csrc, package):
        if not folder.is_dir():
            parser.error(f"--root: expected a folder with {folder.relative_to(root)}, got {root}")
    findings = [*check_cpp(csrc), *check_python(package)]
    for path, line, what in findings:
        print(f"{path.relative_to(root)}:{line}: {what}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
