#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can show, in one command and some ten minutes: builds the CUDA path
# for the card that is there, runs the tests marked `cuda`, the memory and race checkers, the hostile cases, and the
# benchmark beside PyTorch with cuDNN. Writes benchmarks/results/gpu-<date>-<card>.{json,md}.
#
#   benchmarks/gpu.sh [--quick] [--out DIR] [--only PART,...] [--filter REGEX] [--seconds N]; --help says more
#
# Needs nvcc, a C++ compiler, CMake and python3 with NumPy, pybind11, pytest, pytest-timeout and hypothesis; what is
# missing of the packages is installed into build/gpu where there is a network. PyTorch with CUDA is the peer.
# Status: 0, or 1 if a part failed, or 2 without a GPU. PYTHON names another python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "benchmarks/gpu.sh: needs $python" >&2
  exit 2
fi
if ! "$python" -c 'import numpy' 2>/dev/null; then
  echo "benchmarks/gpu.sh: needs NumPy for $python" >&2
  exit 2
fi
exec "$python" -m benchmarks.gpu "$@"
