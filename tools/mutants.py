#!/usr/bin/env python3
"""Breaks the cell maths and the kernels on purpose, one fault at a time; the tests must notice.

A test suite that passes says little unless it fails where it should. Each mutant below is one fault
of the kind that is easy to make in a recurrent network and hard to see in its results: a sign, two
gates exchanged, a bias dropped, a state taken one step too late. The script compiles the extension
with that fault, in a temporary folder outside of the checkout, and runs the comparison with the
reference on it. The tests must fail for every mutant, and pass without one.

A mutant names a piece of source that must occur exactly once in its file, so that the list cannot
go stale in silence; ``--check`` verifies that and no more. The extension is compiled for the plain
architecture's instruction set and without optimisation, and a mutant recompiles only the files that
include its own: some three minutes on two cores. ``--quick`` takes the first mutant of each file.

Prints a line a mutant; status 1 if one survives or the tests fail without any.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# File under csrc/ → (the fault, the source with ⟨what is there → what the mutant has⟩). A blank
# stands for any white space, so that lines may be broken elsewhere.
MUTANTS: dict[str, list[tuple[str, str]]] = {
    "cells/rnn.h": [
        ("tanh's slope 1 + y²", "d * ⟨fnma → fma⟩(y, y, V::set(1))"),
        ("relu's slope y, not 1", "select_gt(y, V::zero(), ⟨d → d * y⟩,"),
        ("sigmoid's slope y, not y (1-y)", "d * ⟨(y * (V::set(1) - y)) → y⟩"),
        ("dh goes past the gates", "⟨dh = V::zero(); → ⟩"),
    ],
    "cells/lstm.h": [
        ("i and f exchanged", "fma(⟨s[1] → s[0]⟩, c_prev, ⟨s[0] → s[1]⟩ * s[2])"),
        ("no output gate", "h = ⟨s[3] * → ⟩ tanh(c);"),
        ("sigmoid for g", "s[2] = ⟨tanh → sigmoid⟩(s[2]);"),
        ("dc not carried from the step after", "tanh_c, one), ⟨dc → V::zero()⟩);"),
        ("dc carried on without f", "dc = dc * ⟨f → one⟩;"),
        ("df with tanh(c') for c", "s[1] = dc * ⟨c_prev → tanh_c⟩ *"),
        ("sign of do", "s[3] = ⟨dh → -dh⟩ * tanh_c *"),
    ],
    "cells/gru.h": [
        ("r and z exchanged", "tanh(fma(⟨s[0] → s[1]⟩, s[2], s[3]))"),
        ("h' = n + z h, without (1-z)", "fma(s[1], h_prev ⟨- s[3] → ⟩, s[3])"),
        ("dn without (1-z)", "s[3] = dh ⟨* (one - z) → ⟩ *"),
        ("hidden n's gradient without r", "s[2] = s[3] ⟨* r → ⟩;"),
        ("dr with n for the hidden part of n", "s[0] = s[3] * ⟨q → n⟩ *"),
        ("n's input product in the hidden slot", "kInputSlot[3] = {0, 1, ⟨3 → 2⟩}"),
        (
            "reset before: z and 1-z exchanged",
            "fma(s[1], ⟨h_prev - s[2] → s[2] - h_prev⟩, ⟨s[2] → h_prev⟩)",
        ),
        ("reset before: z's path dropped from dh", "dh = ⟨fma(drh, r, dh) → drh * r⟩;"),
        ("reset before: dr without h", "r = drh ⟨* h_prev → ⟩ * slope;"),
    ],
    "cells/dropout.h": [
        ("keeps what it should drop", "⟨>= → <⟩ threshold"),
    ],
    "cpu/gemm.h": [
        ("first row missing from bias gradients", "run.rows - 1; k ⟨>= → >⟩ run.row; --k"),
        ("last column of k missing", "k < left.tail⟨ → - 1⟩; ++k"),
        ("last whole group of k missing", "left.groups - (left.tail ⟨< → <=⟩ W);"),
        ("one row missing from weight gradients", "while (k ⟨> 0 → > 1⟩) take("),
        ("one row of weight gradients eight times", "add<1>(x - u * W, y - ⟨u → 1⟩ * W, b_stride)"),
        ("one value of k eight times", "add<W>(a + ⟨u → 0⟩, w + u * W"),
    ],
    "cpu/pack.h": [
        (
            "W_hh for its transpose",
            "⟨transpose(panels + (p * K + b * W) * W, W, n, W, dst, W) → "
            "memcpy(dst, panels + (p * K + b * W) * W, sizeof(T) * W * W)⟩;",
        ),
        ("the gates' order reversed", "transpose(w + (⟨g → (gates - 1 - g)⟩ * H + s * W) * K"),
        ("gradients replaced, not added: whole panels", "(⟨first → true⟩ ? V::zero() :"),
        ("gradients replaced, not added: the rest", "(⟨first → true⟩ ? T(0) :"),
        ("one-hot gradients of the next unit", "turned + ⟨u → (u + 1) % lanes⟩ * kBlock"),
    ],
    "cpu/steps.h": [
        ("reverse direction not reversed", "⟨reverse ? s.length[j] - 1 - k : k → k⟩"),
        ("resets ignored", "return ⟨ → false && ⟩a.reset.data["),
        ("reverse resets one step late", "a.reverse ? at.t ⟨+ 1 → ⟩ : at.t;"),
    ],
    "cpu/forward.h": [
        ("resets leave c", "if (⟨Cell::kHasCell → false⟩) zero_row(c_,"),
        (
            "final states of ended rows lost",
            "if (⟨next.base != home.base → false⟩) copy_rows(next,",
        ),
        ("dropout without its scale", "? *x ⟨* static_cast<T>(mask.scale) → ⟩"),
        ("n's hidden part without its bias", "if (⟨has_input(slot) → true⟩) continue;"),
        ("superblocks together, all into the first", "gates_.at((s + ⟨i / COUNT → 0⟩) *"),
        ("h' for h in the cell", "Cell::forward(slot, V::load(⟨cur → next⟩.at"),
    ],
    "cpu/backward.h": [
        ("resets leave dc", "if (⟨Cell::kHasCell → false⟩) zero_row(dc,"),
        ("no resets when states are made again", "⟨zero_row(h_prev_, mine, row + j); → ⟩"),
        ("c lost when states are made again", "V c = ⟨Cell::kHasCell → false⟩ ? V::load(c_prev_"),
        (
            "h' for h when states are made again",
            "V::load(h_prev_.at(s, ⟨row → next⟩ + r) + v), c, h);",
        ),
        ("dx through dropout without its scale", "src[i] ⟨* static_cast<T>(mask.scale) → ⟩"),
        (
            "reset before: dW_hn from h, not r h",
            "⟨Cell::kTwoPhase && g == 2 ? rh_ : h_prev_ → h_prev_⟩",
        ),
        (
            "weight gradients of all chunks but the first lost",
            "first = ⟨last_chunk && → ⟩ i == 0",
        ),
        ("dy's tail ignored", "⟨dh = dh + V::load_n(dy + v, lanes - v); → ⟩"),
        ("dW_hh from the input's slot", "outer_panels(⟨dg_state → dg_in⟩, state.at"),
    ],
    "core/schedule.cc": [
        ("rows work one step past their end", "(n - 1)] ⟨<= → <⟩ k) --n;"),
        ("a step's rows missing from sums", "{run.row, ⟨run.rows + → ⟩ runs_.back().rows}"),
    ],
    "cpu/stack.cc": [
        ("b_hh dropped", "in ⟨+ hidden → ⟩"),
        ("b_hn and b_in exchanged", "slot == 2 ? ⟨hidden : in → in : hidden⟩"),
        ("h0 for c0", "load_state(call.⟨c0 → h0⟩,"),
    ],
    "cpu/layer.h": [
        ("first step past a row's end not zeroed", "t = lengths[b]⟨ → + 1⟩; t <"),
        ("dropout's scale (1-p)", "1.0 ⟨/ → *⟩ (1.0 - p)"),
    ],
    "cpu/tape.cc": [
        ("dcn ignored", "load_state(⟨call.dcn → static_cast<const T*>(nullptr)⟩,"),
        (
            "the same dropout mask in every layer",
            "call.dropout_key ⟨+ static_cast<uint64_t>(l) → ⟩",
        ),
        ("b_in's gradient for b_hn", "gate == 2 ? ⟨3 → 2⟩ : gate;"),
        (
            "c of a checkpoint from h",
            "forward_directions[0].c, layer.⟨checkpoint_c → checkpoint_h⟩",
        ),
        ("one direction's dx replaces the other's", "a.add_dx = ⟨D > 1 → false⟩;"),
        ("what is added to not started from 0", "std::memset(all + from, ⟨0 → 63⟩,"),
        ("padding of dx not zeroed", "if (⟨call.dx != nullptr → false⟩)"),
    ],
    "cpu/stream.cc": [
        ("reset of a row leaves c", "spec().count() * ⟨2 → 1⟩ * ceil_div"),
    ],
}

# What must notice: the quick part of the comparison with the reference, in double precision, where
# the least fault stands out.
TESTS = [
    "tests/test_against_reference.py",
    "-k",
    "float64 and not (a_thousand_steps or larger) or accumulation",
]

# The kernels' instruction set, which every machine of the architecture has.
ISA, ISA_FLAGS = {
    "x86_64": ("baseline", ["-msse2"]),
    "aarch64": ("neon", []),
}[platform.machine()]


class Mutant(NamedTuple):
    """One entry of MUTANTS and the mutated text of its file."""

    file: str
    fault: str
    text: str


def mutants() -> list[Mutant]:
    """All mutants. Raises SystemExit where a piece of source is not there exactly once."""
    found, problems = [], []
    for file, entries in MUTANTS.items():
        source = (ROOT / "csrc" / file).read_text()
        for fault, piece in entries:
            old = re.sub("⟨(.*?) → .*?⟩", r"\1", piece)
            new = re.sub("⟨.*? → (.*?)⟩", r"\1", piece)
            places = [*re.finditer(r"\s+".join(map(re.escape, old.split())), source)]
            if len(places) != 1:
                problems.append(f"csrc/{file}: {len(places)} times instead of once: {old}")
                continue
            begin, end = places[0].span()
            found.append(Mutant(file, fault, source[:begin] + new + source[end:]))
    if problems:
        raise SystemExit("tools/mutants.py no longer fits the source:\n" + "\n".join(problems))
    return found


def run(command: list[str], **options: object) -> None:
    """Run a compiler. Raises SystemExit with its messages where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


class Builder:
    """Compiles the extension: once as it is, then each mutant with what it changes."""

    def __init__(self, folder: Path) -> None:
        import pybind11

        self.folder = folder
        self.sources = sorted(
            path.relative_to(ROOT / "csrc").as_posix()
            for pattern in ("*.cc", "core/*.cc", "cpu/*.cc", "bindings/*.cc")
            for path in (ROOT / "csrc").glob(pattern)
        )
        self.compiler = os.environ.get("CXX", "c++").split()
        self.flags = [
            *("-std=c++17", "-O0", "-w", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
            *(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
            *(f"-DFASTRNN_HAVE_{ISA.upper()}", '-DFASTRNN_VERSION="mutant"'),
        ]
        self.includes: dict[str, set[str]] = {}  # source → the files of csrc/ that it includes

    def compile(self, source: str, path: Path, into: Path, *first: str) -> Path:
        """Compile `path`, which stands for csrc/<source>, with `first` include folders."""
        kernels = source == "cpu/kernels.cc"
        target = into / f"{source.replace('/', '.')}.o"
        flags = [*self.flags, *([f"-DFASTRNN_ISA={ISA}", *ISA_FLAGS] if kernels else [])]
        includes = [f"-I{folder}" for folder in (*first, ROOT / "csrc")]
        depends = ["-MMD", "-MF", str(target.with_suffix(".d"))]
        run([*self.compiler, *flags, *includes, *depends, "-c", str(path), "-o", str(target)])
        return target

    def link(self, package: Path, objects: list[Path]) -> None:
        """Make `package` a folder that Python can import fastrnn from."""
        (package / "fastrnn").mkdir(parents=True)
        for path in (ROOT / "python" / "fastrnn").iterdir():
            if path.name != "__pycache__":
                (package / "fastrnn" / path.name).symlink_to(path)
        module = package / "fastrnn" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        run([*self.compiler, "-shared", "-pthread", *map(str, objects), "-o", str(module)])

    def original(self, pool: ThreadPoolExecutor) -> Path:
        """The extension as it is; the folder of its package."""
        objects = self.folder / "original"
        objects.mkdir()
        slow_first = sorted(self.sources, key=lambda source: not source.startswith("bindings/"))
        targets = list(
            pool.map(
                lambda source: self.compile(source, ROOT / "csrc" / source, objects), slow_first
            )
        )
        prefix = f"{ROOT / 'csrc'}/"
        for source, target in zip(slow_first, targets, strict=True):
            words = target.with_suffix(".d").read_text().replace("\\\n", " ").split()
            self.includes[source] = {w.removeprefix(prefix) for w in words if w.startswith(prefix)}
        self.link(objects, targets)
        return objects

    def mutant(self, number: int, mutant: Mutant) -> Path:
        """The extension with one fault; the folder of its package."""
        folder = self.folder / f"mutant{number}"
        changed = folder / "csrc" / mutant.file
        changed.parent.mkdir(parents=True)
        changed.write_text(mutant.text)
        objects = []
        for source in self.sources:
            target = self.folder / "original" / f"{source.replace('/', '.')}.o"
            if source == mutant.file:
                target = self.compile(source, changed, folder)
            elif mutant.file in self.includes[source]:
                # Found before the original, because sources include each other from csrc/ on.
                path = ROOT / "csrc" / source
                target = self.compile(source, path, folder, str(folder / "csrc"))
            objects.append(target)
        self.link(folder, objects)
        return folder


def run_tests(package: Path) -> tuple[str, str]:
    """Run TESTS on a build until the first fails: ("" or what failed, the output)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        return "no end", ""
    output = done.stdout + done.stderr
    if done.returncode < 0:
        return f"died of {signal.Signals(-done.returncode).name}", output
    if done.returncode == 0:
        return "", output
    failed = re.findall(r"^FAILED \S*::(\S+)", output, re.MULTILINE)
    if done.returncode != 1 or not failed:  # pytest could not even run them
        raise SystemExit(output)
    return failed[0], output


def main(argv: list[str] | None = None) -> int:
    """Build and test all mutants; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check that every mutant fits")
    parser.add_argument("--quick", action="store_true", help="the first mutant of each file")
    parser.add_argument("--only", metavar="WORD", help="mutants with this in their description")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once")
    arguments = parser.parse_args(argv)
    chosen = mutants()
    if arguments.check:
        print(f"{len(chosen)} mutants fit the source")
        return 0
    if arguments.quick:
        chosen = list({mutant.file: mutant for mutant in reversed(chosen)}.values())[::-1]
    if arguments.only:
        chosen = [mutant for mutant in chosen if arguments.only in mutant.fault]

    start, survivors = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        builder = Builder(Path(folder))
        failed, output = run_tests(builder.original(pool))
        if failed:
            print(f"The tests fail without any mutant ({failed}):\n{output}")
            return 1
        print(f"no mutant: tests pass, {time.monotonic() - start:.0f} s", flush=True)
        results = pool.map(lambda i: run_tests(builder.mutant(i, chosen[i]))[0], range(len(chosen)))
        for mutant, caught in zip(chosen, results, strict=True):
            survivors += not caught
            verdict = f"caught: {caught}" if caught else "SURVIVED"
            print(f"{mutant.file:16} {mutant.fault:44} {verdict}", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(chosen)} mutants, {survivors} survived, {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
