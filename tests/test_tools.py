"""The repository's own tools: the dependency lint and the stub check."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


deps = load("check_dependencies")
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
    "csrc/dispatch.h": '#include "core/kernels.h"\n',
    "csrc/dispatch.cc": '#include "dispatch.h"\nconst char* isa = "avx2";\n',
    "csrc/bindings/module.cc": '#include <pybind11/pybind11.h>\n#include "cpu/stack.h"\n',
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
        ("csrc/core/kernels.h", "#include <cuda_runtime.h>", "only in cuda/"),
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
    path = tmp_path / "_core.pyi"
    monkeypatch.setattr(stubs, "STUBS", path)
    monkeypatch.setattr(stubs, "generate", lambda: "x: int\n")
    return path


def test_stale_stubs_fail_until_written(
    stub_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.main([]) == 1
    assert "+x: int" in capsys.readouterr().out
    assert stubs.main(["--write"]) == 0
    assert stub_file.read_text() == "x: int\n"
    assert stubs.main([]) == 0


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
