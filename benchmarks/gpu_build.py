"""Builds fastrnn with the CUDA path for one card, without installing anything outside build/gpu."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from benchmarks import gpu_child
from benchmarks.gpu_machine import ROOT, Card, find_tool

__all__ = ["BUILD", "build", "environment", "missing"]

BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"  # the package as it is used
PACKAGES = BUILD / "packages"  # what the machine lacked

# Module → package, of what building, tests and the hostile cases need.
NEEDED = {
    "numpy": "numpy",
    "pybind11": "pybind11>=3.1,<3.2",
    "safetensors": "safetensors",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
}


def environment(installed: bool, rehearse: bool) -> dict[str, str]:
    """For programs that use the build: its package first, and the real device."""
    paths = [str(ROOT)] if installed else [str(SITE), str(PACKAGES), str(ROOT)]
    inherited = os.environ.get("PYTHONPATH")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths + ([inherited] if inherited else [])),
        "PYTHONUNBUFFERED": "1",
        "FASTRNN_CUDA": "emulated" if rehearse else "",
    }
    env.pop("CI", None)  # under which tests expect everything to be built
    library = _cublaslt()
    if library is not None and not rehearse:
        env.setdefault("FASTRNN_CUBLASLT", str(library))
    return env


def _cublaslt() -> Path | None:
    """The library of NVIDIA's Python packages: a package installed among them would find it."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return None
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        for name in ("cu13/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.12"):
            if (Path(folder) / name).exists():
                return Path(folder) / name
    return None


def missing() -> list[str]:
    """The packages of NEEDED that cannot be imported."""
    path = str(PACKAGES)
    if PACKAGES.is_dir() and path not in sys.path:
        sys.path.append(path)
    importlib.invalidate_caches()
    return [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]


def build(card: Card, log: Path, seconds: float) -> str:
    """Configures, compiles and installs into SITE; what was built, in a line.

    Raises:
        RuntimeError: It failed; the message says what, and the log all.
    """
    env = dict(os.environ)
    env.pop("FASTRNN_CUDA", None)
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc: it is neither on the PATH nor in CUDA_PATH or /usr/local/cuda")
    env.setdefault("CUDACXX", nvcc)
    absent = missing()
    if not _cmake():
        absent.append("cmake")
    if absent:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["--timeout", "5", "--retries", "1", "--target", str(PACKAGES), *absent]
        if gpu_child.run(pip, log, 90, env=env, cwd=ROOT).status != 0:
            raise RuntimeError(f"missing, and not to be had from the network: {' '.join(absent)}")
    cmake = _cmake()
    if not cmake:
        raise RuntimeError("no cmake")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGES), env.get("PYTHONPATH")]))
    pybind11 = gpu_child.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], log, 30, env=env, cwd=ROOT
    )
    target = _architecture(card)
    tree = BUILD / f"cmake-{target}"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": SITE,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.last_line,
        "FASTRNN_CUDA": "ON",
        "FASTRNN_CUDA_ARCHITECTURES": target,
        "FASTRNN_CUDA_EMULATED": "OFF",
        "FASTRNN_TESTS": "OFF",
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = str(os.cpu_count() or 1)
    steps = {
        "configuring": [cmake, "-S", str(ROOT), "-B", str(tree), *generator]
        + [f"-D{name}={value}" for name, value in options.items()],
        "compiling": [cmake, "--build", str(tree), "--parallel", jobs],
        "installing": [cmake, "--install", str(tree), "--strip"],
    }
    for what, command in steps.items():
        ended = gpu_child.run(command, log, seconds, env=env, cwd=ROOT)
        if ended.why or ended.status != 0:
            raise RuntimeError(f"{what} failed: {ended.why or _error(ended.output)}")
    shutil.copytree(
        ROOT / "python" / "fastrnn",
        SITE / "fastrnn",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return f"by {nvcc} for {target}, into {SITE.relative_to(ROOT)}"


def _architecture(card: Card) -> str:
    """In CMake's notation: machine code of this card and no other; 9.0's own instructions too."""
    major, minor = card.capability
    return "90a-real" if (major, minor) == (9, 0) else f"{major}{minor}-real"


def _cmake() -> str:
    folders = [os.environ.get("PATH", ""), str(PACKAGES / "bin"), str(Path(sys.executable).parent)]
    return shutil.which("cmake", path=os.pathsep.join(folders)) or ""


def _error(output: str) -> str:
    """The first line of a compiler's output that speaks of an error, or the last one."""
    lines = [line.strip() for line in output.strip().splitlines()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[0 if errors else -1][:300]
