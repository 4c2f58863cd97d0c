#!/usr/bin/env python3
"""Which part of fastrnn may depend on which: the lint behind "May depend on" in the architecture.

The rules are the tables at the top; the rest reads files. The reading path goes one way only,
``LSTM.forward`` → bindings → dispatch → cpu/sequence → cells/lstm.h, and a part that includes
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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# --- The rules ------------------------------------------------------------------------------------

# C++: a part (the longest prefix of a path under csrc/) and the prefixes that it may include.
MAY_INCLUDE = {
    "cells/": ("cells/",),
    "core/": ("core/",),
    "cpu/": ("cpu/", "cells/", "core/"),
    # The engine's plain interface: it splits work, and asks dispatch for the kernels.
    "cpu/stack.": ("cpu/stack.h", "core/", "dispatch.h"),
    "cuda/": ("cuda/", "cells/", "core/"),
    "dispatch.": ("dispatch.h", "core/"),
    "bindings/": ("bindings/", "dispatch.h", "core/", "cpu/stack.h"),
}

# Headers of other libraries (a pattern), and the only parts that may include them.
ONLY_IN = [
    (r"pybind11/|Python\.h$|numpy/", ("bindings/",)),
    (r"cuda|cublas|cooperative_groups|nv", ("cuda/",)),
    (
        r"\w*intrin\.h$|arm_neon\.h$|cpuid\.h$|sys/auxv\.h$",
        ("dispatch.", "cpu/vec.h", "core/fpenv.h"),
    ),
]

# Compiled once per ISA: C headers only, whose functions are not inline.
PER_ISA = ("cpu/", "cells/")
NOT_PER_ISA = ("cpu/stack.",)
PER_ISA_HEADERS = ("stddef.h", "stdint.h", "string.h", "immintrin.h", "arm_neon.h")

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
    "fastrnn.cli": ("fastrnn", "numpy", "click", "rich", "matplotlib"),
    "fastrnn._cli": ("fastrnn", "numpy", "click", "rich", "matplotlib"),
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


def longest_prefix(name: str, prefixes: object) -> str:
    """The most specific of `prefixes` that `name` starts with, "" if none does."""
    assert isinstance(prefixes, (dict, tuple))
    return max((p for p in prefixes if name.startswith(p)), key=len, default="")


def without_comments(text: str) -> str:
    """`text` with its comments blanked; strings and line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return COMMENT_OR_STRING.sub(blank, text)


def check_cpp(csrc: Path) -> Iterator[Finding]:
    """Findings in the C++ and CUDA files under `csrc`."""
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in CPP_SUFFIXES):
        name = path.relative_to(csrc).as_posix()
        part = longest_prefix(name, MAY_INCLUDE)
        if not part:
            yield Finding(
                path, 1, "belongs to no part in MAY_INCLUDE of tools/check_dependencies.py"
            )
            continue
        per_isa = name.startswith(PER_ISA) and not name.startswith(NOT_PER_ISA)
        for number, line in enumerate(without_comments(path.read_text()).splitlines(), start=1):
            include = INCLUDE.match(line)
            if include:
                ours, system = include.groups()
                what = (
                    check_own_include(csrc, path, part, ours)
                    if ours
                    else check_system_include(name, system, per_isa)
                )
                if what:
                    yield Finding(path, number, what)
            elif not name.startswith(ISA_PARTS):
                isa = ISA_NAMES.search(line)
                if isa:
                    yield Finding(
                        path, number, f"'{isa.group()}' is an ISA's: only in {', '.join(ISA_PARTS)}"
                    )


def check_own_include(csrc: Path, path: Path, part: str, target: str) -> str:
    """What is wrong with #include "target" in `path`, "" if nothing."""
    if not (csrc / target).is_file():
        hint = "write it from csrc/ on" if (path.parent / target).is_file() else "no such file"
        return f'#include "{target}": {hint}'
    if not target.startswith(MAY_INCLUDE[part]):
        return f'{part} may not include "{target}", only {", ".join(MAY_INCLUDE[part])}'
    return ""


def check_system_include(name: str, header: str, per_isa: bool) -> str:
    """What is wrong with #include <header> in the file `name`, "" if nothing."""
    for pattern, parts in ONLY_IN:
        if re.match(pattern, header) and not name.startswith(parts):
            return f"<{header}> only in {', '.join(parts)}"
    if per_isa and header not in PER_ISA_HEADERS:
        return f"<{header}> in code that is compiled per ISA, only {', '.join(PER_ISA_HEADERS)}"
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
