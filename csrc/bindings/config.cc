// What the process runs on and with: thread counts, instruction sets, how the extension was
// compiled.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/kernels.h"
#include "core/threads.h"
#include "cpu/stack.h"
#include "dispatch.h"

namespace py = pybind11;

namespace fastrnn {

void register_config(py::module_& m);

namespace {

#define FASTRNN_STRING_(x) #x
#define FASTRNN_STRING(x) FASTRNN_STRING_(x)

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// A Python integer from 1 to kMaxThreads; TypeError or ValueError.
int thread_count(const py::object& value) {
  const auto complaint = [&value] {
    return "threads: expected an integer from 1 to " + std::to_string(kMaxThreads) + ", got " +
           std::string(py::repr(value)) + " (" + Py_TYPE(value.ptr())->tp_name + ")";
  };
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) throw py::type_error(complaint());
  const Py_ssize_t n = PyNumber_AsSsize_t(value.ptr(), nullptr);  // clips instead of overflowing
  if (PyErr_Occurred() != nullptr) {  // an index in name only, such as NumPy's bool or an array
    PyErr_Clear();
    throw py::type_error(complaint());
  }
  if (n < 1 || n > kMaxThreads) throw py::value_error(complaint());
  return static_cast<int>(n);
}

py::dict compiled() {
  py::dict result;
  result["version"] = FASTRNN_VERSION;
  result["compiler"] = kCompiler;
  result["standard"] = "C++" + std::to_string(__cplusplus / 100 % 100);
  result["pybind11"] = FASTRNN_STRING(PYBIND11_VERSION_MAJOR) "." FASTRNN_STRING(
      PYBIND11_VERSION_MINOR) "." FASTRNN_STRING(PYBIND11_VERSION_PATCH);
#if defined(__OPTIMIZE__)
  result["optimized"] = true;
#else
  result["optimized"] = false;
#endif
#if defined(NDEBUG)
  result["assertions"] = false;
#else
  result["assertions"] = true;
#endif
  return result;
}

py::dict limits(const py::object& threads, int64_t bytes, double seconds,
                const std::string& dtype) {
  const int n = thread_count(threads);
  if (bytes < 0 || bytes > int64_t{1} << 36) {
    throw py::value_error("bytes: expected 0 to 2**36, got " + std::to_string(bytes));
  }
  if (!(seconds > 0 && seconds <= 10)) {
    throw py::value_error("seconds: expected more than 0 and at most 10, got " +
                          std::to_string(seconds));
  }
  if (dtype != "float32" && dtype != "float64") {
    throw py::value_error("dtype: expected 'float32' or 'float64', got '" + dtype + "'");
  }
  Limits measured;
  {
    py::gil_scoped_release release;
    measured = dtype == "float32" ? measure_limits<float>(n, bytes, seconds)
                                  : measure_limits<double>(n, bytes, seconds);
  }
  py::dict result;
  result["gflops"] = measured.gflops;
  result["tile_gflops"] = measured.tile_gflops;
  result["gbytes_per_s"] = measured.gbytes_per_s;
  return result;
}

}  // namespace

void register_config(py::module_& m) {
  m.def(
      "set_num_threads", [](const py::object& threads) { set_num_threads(thread_count(threads)); },
      py::arg("threads"),
      "Let parallel calls use this many threads, 1 to 1024; the caller's thread counts.\n\n"
      "Results are the same bits for any number. TypeError or ValueError for anything else.");
  m.def(
      "get_num_threads", &get_num_threads,
      "Threads a parallel call may use: FASTRNN_NUM_THREADS at first, else available_threads().\n\n"
      "ValueError when that variable is not an integer from 1 to 1024.");
  m.def("available_threads", &available_threads,
        "Processors this process may use: its affinity mask, cut by the cgroup's CPU quota.");
  m.def(
      "isa", [] { return std::string(dispatch().isa); },
      "The instruction set in use, one of isas().\n\n"
      "The widest the machine has, or FASTRNN_ISA; RuntimeError when that cannot be had.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const KernelTable* table : available_kernels()) names.emplace_back(table->isa);
        return names;
      },
      "The instruction sets that are compiled in and that this machine has, best first.");
  m.def("cpu", &cpu_description, "The processor's name and its features that matter here.");
  m.def("compiled", &compiled,
        "How the extension was compiled: version, compiler, standard, pybind11, optimized, "
        "assertions.");
  m.def("measure_limits", &limits, py::arg("threads"), py::arg("bytes") = 0,
        py::arg("seconds") = 0.02, py::arg("dtype") = "float32",
        "What this machine can do at most, measured for `seconds` each: a dict of gflops, fused\n"
        "multiply-adds counted as two, tile_gflops, the same in the engine's tile on operands in "
        "the\n"
        "first-level cache, and gbytes_per_s, read again and again from `bytes` bytes\n"
        "of which each thread has its share (0 where bytes is 0).\n\n"
        "At most get_num_threads() threads run at once. TypeError or ValueError for anything that\n"
        "does not fit.");
}

}  // namespace fastrnn
