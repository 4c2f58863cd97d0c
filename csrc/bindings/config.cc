// What the process runs on and with: thread counts, instruction sets, how the extension was
// compiled.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/kernels.h"
#include "core/threads.h"
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
}

}  // namespace fastrnn
