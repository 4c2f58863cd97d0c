"""What GPU there is, asked of the driver itself, and on what its figures are measured.

Imports neither fastrnn, which may not be built yet, nor PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

__all__ = ["Card", "NoDeviceError", "card", "describe", "find_tool", "load", "slug"]

ROOT = Path(__file__).resolve().parent.parent


class NoDeviceError(Exception):
    """There is no GPU to be had; the message says what is missing."""


class Card(NamedTuple):
    """CUDA device 0."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int  # bytes


def card() -> Card:
    """Device 0, by the driver's interface.

    Raises:
        NoDeviceError: No driver, or no device.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoDeviceError("no NVIDIA driver (libcuda.so.1) was found") from None
    status = driver.cuInit(0)
    if status == 100:  # CUDA_ERROR_NO_DEVICE
        raise NoDeviceError("the NVIDIA driver sees no GPU")
    if status != 0:
        raise NoDeviceError(f"the NVIDIA driver does not start: cuInit gives error {status}")
    count, device, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        raise NoDeviceError("the NVIDIA driver sees no GPU")
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Card(name.value.decode(), (attribute(75), attribute(76)), attribute(16), total.value)


def find_tool(name: str) -> str | None:
    """The path of one of CUDA's tools, on the PATH or beside nvcc."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    folders = [
        os.environ.get("PATH", ""),
        *(f"{os.environ[home]}/bin" for home in ("CUDA_PATH", "CUDA_HOME") if home in os.environ),
        str(Path(nvcc).resolve().parent) if nvcc else "",
        "/usr/local/cuda/bin",
        "/usr/local/cuda/compute-sanitizer",
    ]
    return shutil.which(name, path=os.pathsep.join(filter(None, folders)))


def describe(found: Card | None, commit: str = "") -> dict[str, str]:
    """What a reader needs to know to compare the figures with another machine's."""
    lines = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    if found is not None:
        major, minor = found.capability
        lines["card"] = (
            f"{found.name}, compute capability {major}.{minor}, {found.multiprocessors} "
            f"multiprocessors, {found.memory / 2**30:.0f} GiB"
        )
        lines["driver"] = _query("driver_version") or _driver_of_the_kernel()
    else:
        lines["card"] = "none: rehearsed on the emulator"
    release = re.search(r"release (\S+?),", _output(find_tool("nvcc") or "nvcc", "--version"))
    lines["nvcc"] = release[1] if release else "none"
    lines["compiler"] = _output(os.environ.get("CXX", "c++"), "--version").partition("\n")[0]
    lines["Python"] = platform.python_version()
    lines["NumPy"] = _version("numpy")
    lines["processor"] = f"{_processor()}, {os.cpu_count()} threads"
    lines["system"] = f"{platform.system()} {platform.release()}"
    lines["commit"] = commit or _commit()
    return {key: value for key, value in lines.items() if value}


def load() -> str:
    """What the card is doing now: clocks, temperature, use; "" where nvidia-smi does not say."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit,utilization.gpu"
    return _query(f"{fields},memory.used")


def slug(name: str) -> str:
    """A card in a file name: nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _query(fields: str) -> str:
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")


def _driver_of_the_kernel() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _commit() -> str:
    """The checkout's commit, marked where files differ from it; "" outside git."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*")


if __name__ == "__main__":
    try:
        print(describe(card()))
    except NoDeviceError as error:
        sys.exit(str(error))
