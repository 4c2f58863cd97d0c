"""The repository's own tools: the dependency lint, the stub check, the gates of CUDA kernels."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


deps = load("check_dependencies")
gates = load("cuda_gates")
stubs = load("check_stubs")

CLEAN = {
    "csrc/cells/scalar.h": "#include <stdint.h>\n",
    "csrc/cells/lstm.h": '#include "cells/scalar.h"\n',
    "csrc/core/kernels.h": "#include <stdint.h>\n",
    "csrc/core/threads.h": "#include <atomic>\n",
    "csrc/cpu/vec.h": "#include <immintrin.h>\n__m256 x = _mm256_setzero_ps();\n",
    "csrc/cpu/kernels.cc": '#include "cells/lstm.h"\n#include "core/kernels.h"\n',
    "csrc/cpu/stack.h": '#include <vector>\n#include "core/kernels.h"\n',
    "csrc/cpu/stack.cc": '#include "cpu/stack.h"\n#include "dispatch.h"\n',
    "csrc/cuda/plan.cc": '#include "cuda/plan.h"\n',
    "csrc/cuda/plan.h": '#include "core/kernels.h"\n',
    "csrc/cuda/simt.h": '#include "cuda/simt_device.h"\n',
    "csrc/cuda/simt_device.h": "#include <cuda_runtime.h>\n",
    "csrc/cuda/step.cu": '#include "cells/lstm.h"\n#include "cuda/step_loop.h"\n',
    "csrc/cuda/step_loop.h": '#include "cuda/simt.h"\n',
    "csrc/dispatch.h": '#include "core/kernels.h"\n',
    "csrc/dispatch.cc": '#include "dispatch.h"\nconst char* isa = "avx2";\n',
    "csrc/bindings/module.cc": '#include <pybind11/pybind11.h>\n#include "cpu/stack.h"\n',
    "csrc/bindings/arrays.h": "#include <pybind11/numpy.h>\n",
    "csrc/bindings/cuda/module.cc": '#include "bindings/arrays.h"\n#include "cuda/plan.h"\n',
    "python/fastrnn/__init__.py": "from fastrnn import _core\nimport numpy\n",
    "python/fastrnn/reference.py": "import math\nimport numpy as np\n",
    "python/fastrnn/io/__init__.py": "import safetensors.numpy\n",
    "python/fastrnn/cli.py": "import click\nfrom fastrnn import io\n",
}


def findings(root: Path, capsys: pytest.CaptureFixture[str], **changed: str) -> list[str]:
    """Run the lint on the clean tree with some files changed; its lines of output."""
    for name, text in {**CLEAN, **changed}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    status = deps.main(["--root", str(root)])
    lines = capsys.readouterr().out.splitlines()
    assert status == bool(lines)
    return lines


def test_clean_tree_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert findings(tmp_path, capsys) == []


def test_this_repository_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert deps.main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "csrc/cells/lstm.h",
            '#include "core/kernels.h"',
            'cells/ may not include "core/kernels.h"',
        ),
        ("csrc/core/kernels.h", '#include "cells/lstm.h"', "core/ may not include"),
        ("csrc/core/kernels.h", "#include <pybind11/numpy.h>", "only in bindings/"),
        ("csrc/core/kernels.h", "#include <cuda_runtime.h>", "only in cuda/simt_device.h"),
        ("csrc/cuda/step.cu", "#include <cuda_bf16.h>", "only in cuda/simt_device.h"),
        ("csrc/cuda/step.cu", '#include "cpu/vec.h"', "cuda/ may not include"),
        ("csrc/cuda/plan.cc", '#include "cuda/simt.h"', "which is for .cu files"),
        ("csrc/cuda/plan.cc", '#include "cuda/step_loop.h"', "which is for .cu files"),
        (
            "csrc/bindings/cuda/module.cc",
            '#include "cpu/stack.h"',
            "bindings/cuda/ may not include",
        ),
        ("csrc/bindings/cuda/module.cc", '#include "bindings/module.cc"', "bindings/cuda/ may not"),
        ("csrc/bindings/module.cc", '#include "cuda/plan.h"', "bindings/ may not include"),
        ("csrc/core/kernels.h", "#include <immintrin.h>", "only in dispatch."),
        ("csrc/core/kernels.h", '#include "nothing.h"', "no such file"),
        ("csrc/cpu/kernels.cc", '#include "lstm.h"', "no such file"),
        ("csrc/cpu/kernels.cc", '#include "vec.h"', "write it from csrc/ on"),
        ("csrc/cpu/kernels.cc", '#include "dispatch.h"', "compiled per ISA"),
        ("csrc/cpu/kernels.cc", "#include <vector>", "compiled per ISA"),
        ("csrc/cpu/kernels.cc", "auto y = vfmaq_f32(a, b, c);", "'vfmaq_f32' is an ISA's"),
        ("csrc/cpu/kernels.cc", "#if defined(__AVX512F__)", "'__AVX512F__' is an ISA's"),
        ("csrc/cells/scalar.h", "#include <cmath>", "compiled per ISA"),
        ("csrc/core/kernels.h", "#include <atomic>", "compiled per ISA"),
        ("csrc/bindings/module.cc", '#include "cpu/vec.h"', "bindings/ may not include"),
        ("csrc/bindings/module.cc", 'if (isa == "avx2") {}', "'avx2' is an ISA's"),
        ("csrc/dispatch.cc", '#include "cpu/stack.h"', "dispatch. may not include"),
        ("csrc/cpu/stack.cc", '#include "bindings/module.cc"', "cpu/ may not include"),
        ("csrc/other/file.cc", "", "in no part"),
        ("python/fastrnn/reference.py", "from fastrnn import _core", "may not import fastrnn"),
        ("python/fastrnn/reference.py", "from . import _core", "may not import fastrnn"),
        ("python/fastrnn/reference.py", "def f():\n    import scipy", "may not import scipy"),
        ("python/fastrnn/__init__.py", "import safetensors", "fastrnn may not import safetensors"),
        ("python/fastrnn/nn/__init__.py", "import torch", "fastrnn.nn may not import torch"),
    ],
)
def test_each_rule_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (line,) = findings(tmp_path, capsys, **{name: text + "\n"})
    number = text.count("\n") + 1
    assert line.startswith(f"{name}:{number}: ")
    assert message in line


def test_comments_may_name_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '// as on AVX2, _mm256_fmadd_ps\n/* #include <vector>\n avx512 */ int x; // "neon"\n'
    assert findings(tmp_path, capsys, **{"csrc/cpu/kernels.cc": text}) == []


def test_wrong_root_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        deps.main(["--root", str(tmp_path)])
    assert error.value.code == 2
    assert "expected a folder with csrc" in capsys.readouterr().err


def test_difference_of_stubs() -> None:
    assert stubs.difference("a\nb\n", "a\nb\n") == ""
    diff = stubs.difference("def f(x: int) -> int: ...\n", "def f(x: float) -> int: ...\n")
    assert "-def f(x: int)" in diff and "+def f(x: float)" in diff
    long = stubs.difference("", "".join(f"line {i}\n" for i in range(100)), lines=10)
    assert len(long.splitlines()) == 11
    assert re.search(r"and \d+ more lines", long)


@pytest.fixture
def stub_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stubs, "FOLDER", tmp_path)
    monkeypatch.setattr(stubs, "MODULES", {"_core.pyi": "_core"})
    monkeypatch.setattr(stubs, "generate", lambda module: f"x: {module}\n")
    return tmp_path / "_core.pyi"


def test_stale_stubs_fail_until_written(
    stub_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.main([]) == 1
    assert "+x: _core" in capsys.readouterr().out
    assert stubs.main(["--write"]) == 0
    assert stub_file.read_text() == "x: _core\n"
    assert stubs.main([]) == 0


# A kernel as nvdisasm shows it, an instruction a line: weights loaded in a loop, then the loop over
# the steps with a wait in it and a part that the compiler moved behind the end, then a barrier.
SASS = """
    LDC R1, c[0x0][0x28]
    LDG.E.128 R4, [R2.64]
    @P0 BRA 0x10
    BSSY B0, 0x80
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R13+URZ], R12
    @!P0 BRA 0x40
    @P1 BRA 0x110
    BSYNC B0
    HMMA.16816.F32.BF16 R4, R8, R10, R4
    HMMA.16816.F32.BF16 R4, R8, R10, R4
    STAS.64 [R168.64], R22
    BRA.U !UP0, 0x30
    BSSY B0, 0xf0
    BAR.SYNC.DEFER_BLOCKING 0x0
    BSYNC B0
    EXIT
    BRA 0x100
    NANOSLEEP R2
    BRA 0x70
    BRA 0x130
"""


def kernel(
    name: str = "cluster::forward<512, 4>", gpu: str = "sm_90a", sass: str = SASS, **changed: int
) -> Any:
    functions = []
    for line in sass.strip().splitlines():
        predicate, opcode, operands = re.fullmatch(r"\s*(@!?P\d )?(\S+)\s?(.*)", line).groups()
        functions.append({"opcode": opcode, "operands": operands.replace(" ", "")})
        if predicate:
            functions[-1]["predicate"] = predicate.strip()
    document = [{}, [{"function-name": "f", "start": 0, "sass-instructions": functions}]]
    usage = {"registers": 200, "stack": 0, **changed}
    code = gates.parse_code(document)["f"]
    return gates.Kernel(name, gpu, usage["registers"], usage["stack"], code, gates.time_loop(code))


def test_time_loop_is_found() -> None:
    loop = kernel().loop
    assert (loop[0].opcode, loop[-1].operands) == ("BSSY", "0x70")
    assert gates.opcodes(loop) == {
        "BSSY": 1, "SYNCS": 1, "BRA": 4, "BSYNC": 1, "HMMA": 2, "STAS": 1, "NANOSLEEP": 1
    }  # fmt: skip
    assert kernel(sass="LDC R1, c[0x0][0x28]\nEXIT\nBRA 0x20").loop == []


@pytest.mark.parametrize(
    ("changed", "faults"),
    [
        ({}, []),
        ({"registers": 300}, ["300 registers, expected at most 255"]),
        ({"stack": 16}, ["16 bytes of stack"]),
        ({"sass": SASS.replace("BRA 0x70", "STL [R1], R2\nBRA 0x70")}, ["1 STL: registers"]),
        ({"sass": SASS.replace("NANOSLEEP", "MEMBAR.SC.GPU")}, ["1 MEMBAR.SC.GPU in the"]),
        ({"sass": SASS.replace("STAS.64", "STS")}, ["no STAS in the time loop"]),
        ({"sass": "EXIT"}, ["no HMMA in the time loop", "no STAS in the time loop"]),
        ({"sass": "EXIT", "gpu": "sm_86"}, []),  # which has no clusters
        ({"name": "grid::forward<1024>"}, []),
        (
            {"name": "grid::forward<1024>", "sass": SASS.replace("NANOSLEEP", "CCTL.IVALL")},
            ["1 CCTL.IVALL in the time loop"],
        ),
        ({"name": "grid::forward<1024>", "sass": SASS.replace("NANOSLEEP", "CCTL.E.PF2")}, []),
        ({"name": "add_rows<float>", "registers": 99}, ["99 registers, expected at most 80"]),
        ({"name": "add_rows<float>", "sass": "BAR.SYNC 0x0\nBRA 0x0", "registers": 20}, []),
    ],
)
def test_gates_of_a_kernel(changed: dict[str, Any], faults: list[str]) -> None:
    found = list(gates.faults(kernel(**changed)))
    assert len(found) == len(faults)
    for got, expected in zip(found, faults, strict=True):
        assert got.startswith(expected)


def test_gates_read_what_nvidia_prints() -> None:
    text = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function _Z1fv:\n"
        "  REG:228 STACK:8 SHARED:1040 LOCAL:4 CONSTANT[0]:944 TEXTURE:0\n"
        " Function _Z1gv:\n  REG:16 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:532 TEXTURE:0\n"
    )
    usage = gates.parse_resources(text)
    assert list(usage) == ["_Z1fv", "_Z1gv"]
    assert usage["_Z1fv"] == {
        "REG": 228, "STACK": 8, "SHARED": 1040, "LOCAL": 4, "CONSTANT": 944, "TEXTURE": 0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("fastrnn::cuda::grid::run(float*)", "grid::run"),
        (
            "void fastrnn::cuda::(anonymous namespace)::step<fastrnn::Lstm, (int)4>(float*, S<2>)",
            "step<Lstm, (int)4>",
        ),
    ],
)
def test_short_names_of_kernels(name: str, short: str) -> None:
    assert gates.short_name(name) == short


def test_gates_know_which_gpus_are_promised() -> None:
    code, ptx = gates.promised_gpus((ROOT / "cmake" / "cuda.cmake").read_text())
    assert "sm_90a" in code
    assert ptx and not any(gpu.endswith("a") for gpu in ptx)  # PTX is for later GPUs
    text = "set(FASTRNN_CUDA_ARCHITECTURES 80-real 90-virtual 100\n  CACHE STRING"
    assert gates.promised_gpus(text) == (["sm_80", "sm_100"], ["sm_90", "sm_100"])


def test_gates_want_a_compiled_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gates.main(["nowhere.o"])
    assert error.value.code == 2
    assert "expected a compiled file, got nowhere.o" in capsys.readouterr().err


def test_versions_stand_in_one_place() -> None:
    """CMake reads the version with a pattern, make the build tools: both must find their line."""
    text = (ROOT / "pyproject.toml").read_text()
    assert len(re.findall(r'^version = "\d+\.\d+\.\d+"$', text, re.MULTILINE)) == 1
    requires = re.findall(r'^requires = \["(.*)"\]$', text, re.MULTILINE)
    assert len(requires) == 1
    assert [r.partition(">")[0] for r in requires[0].split('", "')] == [
        "scikit-build-core",
        "pybind11",
    ]
