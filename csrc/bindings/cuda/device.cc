// What device there is.
#include <pybind11/pybind11.h>

#include "cuda/cublaslt.h"
#include "cuda/runtime.h"

namespace py = pybind11;

namespace fastrnn {

void register_device(py::module_& m);

namespace {

py::dict info() {
  const cuda::DeviceInfo i = cuda::device_info();
  py::dict d;
  d["name"] = i.name;
  d["compute_capability"] = py::make_tuple(i.major, i.minor);
  d["multiprocessors"] = i.multiprocessors;
  d["shared_per_block"] = i.shared_per_block;
  d["registers_per_multiprocessor"] = i.registers_per_multiprocessor;
  d["memory"] = i.memory;
  d["free_memory"] = cuda::free_memory();
  d["l2_bytes"] = i.l2_bytes;
  d["driver"] = i.driver;
  d["runtime"] = i.runtime;
  d["cublaslt"] = cuda::cublaslt::description();
  return d;
}

}  // namespace

void register_device(py::module_& m) {
  m.def("require_device", &cuda::require_device,
        "Unavailable, a RuntimeError that says why, unless this process can use CUDA device 0.");
  m.def("device_info", &info, "What device 0 is: a dict.");
}

}  // namespace fastrnn
